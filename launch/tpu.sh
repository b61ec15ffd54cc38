#!/usr/bin/env bash
# A TPU pod of Google Cloud: made, filled with this project's code, used and removed.
#
#   bash launch/tpu.sh create [--wait] [-- GCLOUD_FLAGS...]   asks for the pod (a queued resource)
#   bash launch/tpu.sh setup [--commit=REV]          ships git's HEAD to all workers and installs it
#   bash launch/tpu.sh run [--] COMMAND...           starts a command on all workers and returns
#   bash launch/tpu.sh status                        of the request, its nodes, and the command on each worker
#   bash launch/tpu.sh logs [--node=0] [--worker=0] [--host=NAME] [--lines=100] [--follow]
#   bash launch/tpu.sh stop [--seconds=300]          SIGTERM, time to save (exit code 42), then SIGKILL
#   bash launch/tpu.sh delete [--yes]                gives the pod back
#
# --dry-run, before or after the word, prints the commands and runs none. Settings (PROJECT, ZONE,
# NAME, ACCELERATOR_TYPE, ...) are environment variables; launch/env.sh lists them. For instance:
#
#   export PROJECT=my-project ZONE=us-east5-a ACCELERATOR_TYPE=v5p-64 NAME=adapt-7b
#   bash launch/tpu.sh create --wait && bash launch/tpu.sh setup
#   bash launch/tpu.sh run python -m diffucoder_jax.train --config=configs/adapt_7b.py --workdir=gs://B/W
#
# `python` is the one of the venv that setup made; DIFFUCODER_MULTIHOST=1 is set. `run` refuses when a
# command is running already. launch/babysit.sh does all of this, again after each preemption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

POLL_SECONDS=${POLL_SECONDS:-30}
WORKER=diffucoder/code/launch/worker.sh # on a worker, from its home

tpus() { run gcloud compute tpus "$@"; }
place() { PLACE=("--project=$PROJECT" "--zone=$ZONE"); }

# ssh_flags [NODE WORKER]: where a command goes; to all workers of all nodes when nothing is said.
ssh_flags() {
  local i
  place
  NODES=()
  for ((i = 0; i < SLICES; i++)); do
    if [ "${1:-all}" = all ] || [ "$1" -eq "$i" ]; then NODES+=("$(node "$i")"); fi
  done
  [ ${#NODES[@]} -gt 0 ] || fail "there is no node $1; SLICES=$SLICES are counted from 0"
  SSH=("${PLACE[@]}" "--worker=${2:-all}") VM=(gcloud compute tpus tpu-vm)
  case $SSH_VIA in
    internal) SSH+=(--internal-ip) ;;
    iap) SSH+=(--tunnel-through-iap) VM=(gcloud alpha compute tpus tpu-vm) ;;
  esac
}

# node NUMBER: the name that Google gives a slice.
node() {
  if [ "$SLICES" -eq 1 ]; then echo "$NAME"; else echo "$NAME-$1"; fi
}

# on_node NODE ssh LINE, or on_node NODE scp FILE
on_node() {
  case $2 in
    ssh) run "${VM[@]}" ssh "$1" "${SSH[@]}" "--command=$3" ;;
    scp) run "${VM[@]}" scp "$3" "$1:$(basename "$3")" "${SSH[@]}" ;;
  esac
}

# on_nodes WORDS...: at the same time on the nodes that `ssh_flags` chose; fails when one of them
# fails. Not by `queued-resources ssh --node=all`, which leaves out a node that it cannot reach and
# ends well all the same.
on_nodes() {
  local node pids=() pid code=0
  for node in "${NODES[@]}"; do
    if [ ${#NODES[@]} -eq 1 ] || [ -n "$DRY_RUN" ]; then
      on_node "$node" "$@" || code=$?
    else
      on_node "$node" "$@" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || code=$?
  done
  return "$code"
}

# on_workers LINE: runs a line of shell on the workers that `ssh_flags` chose.
on_workers() {
  on_nodes ssh "$1"
}

# worker WORDS...: calls worker.sh there.
worker() {
  on_workers "test -e $WORKER || { echo \"\$(hostname): not set up; bash launch/tpu.sh setup\" >&2; exit 1; }; $(quote bash "$WORKER" "$@")"
}

# state_of_request: what gcloud calls the state, MISSING when there is no such request. Any other
# failure is gcloud's to explain.
state_of_request() {
  local out
  if out=$(gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)' 2>&1); then
    echo "$out" | tail -n 1
  elif [[ $out == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$out" >&2
    fail "gcloud could not tell the state of $NAME"
  fi
}

create() {
  local wait="" state="" before="" words=()
  while [ $# -gt 0 ]; do
    case $1 in
      --wait) wait=1 ;;
      --)
        shift
        break
        ;;
      *) fail "create does not know '$1'; flags for gcloud go behind --" ;;
    esac
    shift
  done
  check_accelerator
  check PROVISIONING 'spot|on-demand|reserved' 'spot, on-demand or reserved'
  words=("--accelerator-type=$(accelerator_type)" "--runtime-version=$(runtime_version)")
  if [ "$SLICES" -gt 1 ]; then
    words+=("--node-count=$SLICES" "--node-prefix=$NAME")
  else
    words+=("--node-id=$NAME")
  fi
  case $PROVISIONING in
    spot) words+=(--spot) ;;
    reserved) words+=(--reserved) ;;
  esac
  place
  tpus queued-resources create "$NAME" "${PLACE[@]}" "${words[@]}" "$@"
  show gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" "--format=value(state.state)"
  [ -z "$DRY_RUN" ] || return 0
  while true; do
    state=$(state_of_request)
    [ "$state" = "$before" ] || echo "$(date -u +%FT%TZ) $NAME is $state"
    before=$state
    [ -n "$wait" ] || return 0
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | MISSING)
        why_it_failed
        fail "$NAME is $state; bash launch/tpu.sh delete, then create again (or babysit.sh, which does so)"
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

why_it_failed() {
  gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
    --format='value(state.failedData.error.message,state.stateInitiator)' >&2 || true
}

setup() {
  local rev=HEAD commit folder
  while [ $# -gt 0 ]; do
    case $1 in
      --commit=*) rev=${1#*=} ;;
      *) fail "setup does not know '$1'" ;;
    esac
    shift
  done
  commit=$(git rev-parse --verify --quiet "$rev^{commit}") || fail "git knows no commit '$rev'"
  [ -n "$DRY_RUN" ] || [ -z "$(git status --porcelain)" ] ||
    echo "note: what is not committed is not shipped ($(git status --porcelain | wc -l | tr -d ' ') files; git status)" >&2
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder of now
  trap "rm -rf '$folder'" EXIT
  # shellcheck disable=SC2016 # so that a dry run always prints the same
  if [ -n "$DRY_RUN" ]; then folder='$TMP' commit=COMMIT; fi
  ssh_flags
  run git archive --format=tar.gz --output="$folder/diffucoder.tar.gz" "$commit"
  on_nodes scp "$folder/diffucoder.tar.gz"
  on_workers "set -e; if [ -e $WORKER ] && bash $WORKER status | grep -q ' running '; then echo 'a command is running; stop it first' >&2; exit 1; fi; rm -rf diffucoder/code diffucoder/commit; mkdir -p diffucoder/code; tar -xzf diffucoder.tar.gz -C diffucoder/code; $(quote bash "$WORKER" install "$commit" "$EXTRAS")"
}

start() {
  local settings=()
  [ "${1:-}" != -- ] || shift
  [ $# -gt 0 ] || fail "run needs a command, such as: python -m diffucoder_jax.train --config=... --workdir=..."
  [[ $1 != -* ]] || fail "run does not know '$1'; the command comes last"
  ssh_flags
  [ -z "$BUCKET" ] || settings+=("JAX_COMPILATION_CACHE_DIR=${BUCKET%/}/compiled") # restarts find it there
  [ -z "$PREPARE" ] || settings+=("PREPARE=$PREPARE")
  # All or none: a command that still runs on one worker would be a second run in the same workdir.
  on_workers "test -e $WORKER || { echo \"\$(hostname): not set up; bash launch/tpu.sh setup\" >&2; exit 1; }; ! bash $WORKER status | grep ' running '" ||
    fail "not started: a command is running, or a worker could not be asked (above). bash launch/tpu.sh stop ends it"
  on_workers "$(quote env ${settings[@]+"${settings[@]}"} bash "$WORKER" start "$(job_of "$@")" "$@")"
}

status() {
  local i node state
  place
  show gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" "--format=value(state.state)"
  if [ -z "$DRY_RUN" ]; then
    state=$(state_of_request)
    echo "request $NAME $state"
    case $state in
      ACTIVE) ;;
      FAILED) why_it_failed && return ;;
      *) return 0 ;;
    esac
  fi
  for ((i = 0; i < SLICES; i++)); do
    node=$(node "$i")
    show gcloud compute tpus tpu-vm describe "$node" "${PLACE[@]}" "--format=value(state)"
    [ -n "$DRY_RUN" ] ||
      echo "node $node $(gcloud compute tpus tpu-vm describe "$node" "${PLACE[@]}" --format='value(state)' || echo UNKNOWN)"
  done
  ssh_flags
  on_workers "if [ -e $WORKER ]; then bash $WORKER status; else echo \"worker \$(hostname) absent\"; fi"
}

logs() {
  local node="" which="" host="" lines=100 follow=""
  while [ $# -gt 0 ]; do
    case $1 in
      --node=*) node=${1#*=} ;;
      --worker=*) which=${1#*=} ;;
      --host=*) host=${1#*=} ;; # as status calls it
      --lines=*) lines=${1#*=} ;;
      --follow) follow=follow ;;
      *) fail "logs does not know '$1'" ;;
    esac
    shift
  done
  if [ -n "$host" ]; then node=${node:-all} which=${which:-all}; fi
  node=${node:-0} which=${which:-0}
  [[ $node =~ ^([0-9]+|all)$ ]] || fail "--node=$node is no number; nodes are counted from 0, or 'all'"
  [[ $which =~ ^([0-9]+|all)$ ]] || fail "--worker=$which is no number; workers are counted from 0, or 'all'"
  [[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines is no number"
  [[ $host =~ ^[-A-Za-z0-9_.]*$ ]] || fail "--host=$host is no name of a host; status has them"
  ssh_flags "$node" "$which"
  worker log "$lines" "${follow:-end}" ${host:+"$host"}
}

stop() {
  local seconds=300
  while [ $# -gt 0 ]; do
    case $1 in
      --seconds=*) seconds=${1#*=} ;;
      *) fail "stop does not know '$1'" ;;
    esac
    shift
  done
  [[ $seconds =~ ^[0-9]+$ ]] || fail "--seconds=$seconds is no number"
  ssh_flags
  worker stop "$seconds"
}

delete() {
  confirm "$NAME in $ZONE with all that is on its disks" "$@"
  place
  tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

read_word "create setup run status logs stop delete" "$@"
check_place
[ -n "$DRY_RUN" ] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
[ "$WORD" != run ] || WORD=start # `run` is env.sh's
"$WORD" ${REST[@]+"${REST[@]}"}
