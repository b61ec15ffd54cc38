#!/usr/bin/env bash
# Runs the tests, two files at a time; arguments go to pytest. First call: makes .venv.
#   bash launch/test.sh              the default set, minutes
#   bash launch/test.sh -m slow      real processes, kills, real models
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
enter_venv test
export JAX_PLATFORMS=cpu
echo "== pytest $*"
python -m pytest -n 2 --dist loadfile "$@"
