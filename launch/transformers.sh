#!/usr/bin/env bash
# Opens exported weights with several versions of transformers: the tests marked `torch` that are about them.
#   bash launch/transformers.sh                  4.46.3, 4.57.6 and the newest 5.x, one after another
#   bash launch/transformers.sh 4.52.4 5.0.0     these; "5" is the newest 5.x on the day of the install
# Each version has a venv of its own, .venv-transformers-VERSION, with the project and PyTorch (about
# 2 GB; more where pip finds PyTorch with CUDA). The first call makes it, which takes minutes; remove
# it to have it made again. Needs the reference material beside the project (see tests/conftest.py).
# Ends with an error when a version fails, after having gone through all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh # find_python, fail
TORCH=${TORCH:-2.13.0}
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1

# make_venv VERSION: says nothing and does nothing when setup.py and PyTorch's version are the same.
make_venv() {
  local venv=.venv-transformers-$1 wanted requirement="transformers==$1" python
  [[ $1 == *.* ]] || requirement="transformers==$1.*"
  wanted="$TORCH $(sha256sum setup.py)"
  if grep -qxF "$wanted" "$venv/installed" 2>/dev/null; then
    return
  fi
  python=$(find_python) || exit 1
  echo "== making $venv with $("$python" --version) (minutes; log in $venv/install.log)"
  "$python" -m venv "$venv" || fail "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv"
  echo '*' >"$venv/.gitignore"
  "$venv/bin/python" -m pip install --disable-pip-version-check -e '.[test]' "torch==$TORCH" \
    "$requirement" >"$venv/install.log" 2>&1 || {
    tail -n 5 "$venv/install.log" >&2
    fail "pip could not install $requirement and torch==$TORCH (is there a network? is the disk full?)"
  }
  echo "$wanted" >"$venv/installed"
}

[ $# -gt 0 ] || set -- 4.46.3 4.57.6 5
failed=()
for version in "$@"; do
  make_venv "$version"
  python=.venv-transformers-$version/bin/python
  echo "== transformers $("$python" -c 'import importlib.metadata as m; print(m.version("transformers"))')"
  "$python" -m pytest -m torch -k 'not real_weights' tests/hf tests/test_check_export.py || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || fail "failed with transformers ${failed[*]}"
