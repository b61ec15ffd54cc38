# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv once and installs the project into it.
# Afterwards `python` is the one of .venv. A second call finds everything there and takes no time.

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "needs Python 3.11 or newer and found $(python3 --version 2>&1 || true). Install it, or name" \
    "it: PYTHON=/path/to/python3.12 bash $0"
}

# enter_venv EXTRAS: creates .venv when it is absent, installs when setup.py or EXTRAS changed.
enter_venv() {
  local extras=$1 wanted free_kb python
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 1
    free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
    [ "$free_kb" -ge 3000000 ] ||
      fail "needs 3 GB of free disk for .venv in $PWD and found $((free_kb / 1000)) MB"
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv .venv ||
      fail "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv; then remove .venv and try again"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
  wanted="$extras $(sha256sum setup.py)"
  if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
    echo "== installing JAX and the project into .venv (about a minute; log in .venv/install.log)"
    python -m pip install --disable-pip-version-check -e ".[$extras]" >.venv/install.log 2>&1 || {
      tail -n 5 .venv/install.log >&2
      fail "pip could not install the packages (is there a network? is the disk full?)"
    }
    echo "$wanted" >>.venv/installed
  fi
}
