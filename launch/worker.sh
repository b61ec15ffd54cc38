#!/usr/bin/env bash
# The side of tpu.sh that runs on each worker; tpu.sh ships it with the code and calls it by ssh.
#
#   worker.sh install COMMIT EXTRAS      makes the venv when it is absent or setup.py has changed
#   worker.sh start JOB COMMAND...       starts a command that outlives the ssh session
#   worker.sh status                     one line: running, exited with which code, lost, idle
#   worker.sh stop SECONDS               SIGTERM, and after so many seconds SIGKILL
#   worker.sh exec COMMAND...            becomes the command, as `start` would run it (for containers)
#   worker.sh log LINES end|follow [HOST]   the end of what the command printed; only if this is HOST
#
# All is in ~/diffucoder: code/ (what git had), venv/, run/ (log, pid, exit code of the last command).
set -euo pipefail
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HERE=$(dirname "$CODE") # ~/diffucoder
RUN=$HERE/run VENV=$HERE/venv

fail() {
  echo "worker.sh on $(hostname): $*" >&2
  exit 1
}

# put FILE TEXT: writes a file so that it is never seen half.
put() {
  echo "$2" >"$1.new"
  mv "$1.new" "$1"
}

get() {
  cat "$RUN/$1" 2>/dev/null || true
}

# birth PID: when a live process started, in clock ticks after boot; a number may come again.
birth() {
  sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'
}

# running: whether the command of the last start lives.
running() {
  local pid
  pid=$(get pid)
  [ -n "$pid" ] && [ -n "$(birth "$pid")" ] && [ "$(birth "$pid")" = "$(get birth)" ]
}

install() {
  local commit=$1 extras=$2 wanted
  wanted="$extras $(sha256sum "$CODE/setup.py" | cut -d ' ' -f 1)"
  if ! grep -qxF "$wanted" "$VENV/installed" 2>/dev/null; then
    # TPU VMs come with a Python that is too old; uv brings its own.
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
      fail "cannot install uv with pip (is there a network?)"
    rm -rf "$VENV"
    uv venv --quiet --python 3.12 "$VENV" || fail "uv cannot make $VENV (is there a network?)"
    uv pip install --quiet --python "$VENV/bin/python" -e "${CODE}[$extras]" ||
      fail "cannot install the project with [$extras] (is there a network? is the disk full?)"
    put "$VENV/installed" "$wanted"
  fi
  put "$HERE/commit" "$commit"
  echo "$(hostname): $commit is installed"
}

start() {
  local job=$1
  shift
  mkdir -p "$RUN"
  exec 9>"$RUN/lock"
  flock -n 9 || fail "another start is under way"
  ! running || fail "a command is running already (job $(get job), process $(get pid)); stop it first"
  rm -f "$RUN/exit_code" "$RUN/pid"
  put "$RUN/job" "$job"
  setsid nohup bash "$CODE/launch/worker.sh" supervise "$@" </dev/null >>"$RUN/log" 2>&1 9>&- &
  disown # this shell has nothing to say about its end
  for _ in $(seq 200); do
    if [ -e "$RUN/pid" ]; then
      echo "$(hostname): process $(get pid) runs job $job"
      return
    fi
    sleep 0.05
  done
  fail "the command did not start; see $RUN/log"
}

# supervise COMMAND...: runs it and keeps its exit code. In a session of its own.
supervise() {
  local child code=0
  trap : TERM # a machine that shuts down tells all processes; this one stays to note the exit code
  export PATH="$VENV/bin:$PATH" DIFFUCODER_MULTIHOST=1 PYTHONUNBUFFERED=1
  cd "$CODE"
  set_flags
  echo "== $(date -u +%FT%TZ) $(get job) at $(cat "$HERE/commit"): $*"
  (
    if [ -n "${PREPARE:-}" ]; then
      bash -c "$PREPARE" || fail "PREPARE failed (exit code $?): $PREPARE"
    fi
    exec "$@"
  ) &
  child=$!
  put "$RUN/birth" "$(birth "$child")"
  put "$RUN/pid" "$child"
  while true; do
    code=0
    wait "$child" || code=$?
    # wait also returns when a signal came for this shell, with the child still alive
    kill -0 "$child" 2>/dev/null || break
  done
  echo "== $(date -u +%FT%TZ) exit code $code"
  put "$RUN/ended" "$(date +%s)"
  put "$RUN/exit_code" "$code"
  kill -KILL -- "-$$" # what the command left behind, and this shell
}

# exec COMMAND...: no process of ours stays between a container's signals and the program.
become() {
  export DIFFUCODER_MULTIHOST=1 PYTHONUNBUFFERED=1
  cd "$CODE"
  set_flags
  exec "$@"
}

# set_flags: XLA's and libtpu's flags, from the one place that knows them; on a CPU there are none.
set_flags() {
  local line
  case ${JAX_PLATFORMS:-tpu} in *tpu*) ;; *) return 0 ;; esac
  if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("diffucoder_jax.runtime.flags") is None)'; then
    return 0
  fi
  while read -r line; do
    line=${line#export }
    [[ $line =~ ^[A-Z_]+= ]] || continue
    echo "== $line"
    export "${line%%=*}=$(python -c 'import shlex, sys; print(" ".join(shlex.split(sys.argv[1])))' "${line#*=}")"
  done < <(python -m diffucoder_jax.runtime.flags)
}

status() {
  local state="" code
  for _ in $(seq 10); do # it may have ended just now, with its exit code about to be noted
    if running; then
      state="running pid=$(get pid)"
    elif code=$(get exit_code) && [ -n "$code" ]; then
      state="exited code=$code at=$(get ended)"
    elif [ -z "$(get job)" ]; then
      state=idle
    fi
    [ -z "$state" ] || break
    sleep 0.1
  done
  # lost: killed together with its supervisor, or the machine was restarted
  echo "worker $(hostname) ${state:-lost} job=$(get job) commit=$(cat "$HERE/commit" 2>/dev/null || true)"
}

stop() {
  local seconds=$1 pid
  if running; then
    pid=$(get pid)
    kill -TERM "$pid" 2>/dev/null || true # to the program alone: its data workers must outlive the save
    for _ in $(seq $((seconds * 5))); do
      running || break
      sleep 0.2
    done
    if running; then
      echo "$(hostname): still there after $seconds s; SIGKILL"
      kill -KILL "$pid" 2>/dev/null || true
    fi
    for _ in $(seq 50); do # its supervisor notes the exit code
      [ -z "$(get exit_code)" ] || break
      sleep 0.1
    done
  fi
  status
}

log() {
  [ -z "${3:-}" ] || [ "$3" = "$(hostname)" ] || return 0
  [ -e "$RUN/log" ] || fail "nothing has run here"
  if [ "$2" = follow ]; then
    tail -n "$1" -F "$RUN/log"
  else
    tail -n "$1" "$RUN/log"
  fi
}

case ${1:-} in
  install | start | supervise | status | stop | log) "$@" ;;
  exec) become "${@:2}" ;;
  *)
    awk 'NR > 1 && /^#/ {sub(/^# ?/, ""); print; next} NR > 1 {exit}' "$0"
    [ "${1:-}" = --help ] || exit 2
    ;;
esac
