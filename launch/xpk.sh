#!/usr/bin/env bash
# The same job on GKE: one workload of the cluster CLUSTER, through xpk (pip install xpk).
#
#   bash launch/xpk.sh image [--push]                builds the container IMAGE from git's HEAD
#   bash launch/xpk.sh create [--restarts=100] [--] COMMAND...   submits the command as workload NAME
#   bash launch/xpk.sh list                          how the workload is
#   bash launch/xpk.sh logs [--lines=100] [--follow] what it printed
#   bash launch/xpk.sh delete [--yes]                ends and removes it; the cluster stays
#
# --dry-run, before or after the word, prints the commands and runs none. Settings (PROJECT, ZONE,
# NAME, ACCELERATOR_TYPE, CLUSTER, IMAGE, ...) are environment variables; launch/env.sh lists them.
#
#   export PROJECT=my-project ZONE=us-east5-a ACCELERATOR_TYPE=v5p-64 NAME=adapt-7b
#   export CLUSTER=my-cluster IMAGE=us-east5-docker.pkg.dev/my-project/images/diffucoder:1
#   bash launch/xpk.sh image --push
#   bash launch/xpk.sh create python -m diffucoder_jax.train --config=configs/adapt_7b.py --workdir=gs://B/W
#
# GKE does what babysit.sh does elsewhere: after a preemption, after exit codes 42 and 43
# and after a kill it starts the command again, --restarts times; any other exit code ends the
# workload. `create` ends with exit code 3 when a workload of this name is queued or running, and
# replaces one that has ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

EXISTS=3
GRACE_SECONDS=${GRACE_SECONDS:-300} # between SIGTERM and SIGKILL: to save

xpk_place() { XPK=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE"); }

# listed STATUS: whether xpk lists the workload with that status. A row has its name as a word.
listed() {
  local out
  show xpk workload list "${XPK[@]}" "--filter-by-job=^$NAME\$" "--filter-by-status=$1"
  [ -z "$DRY_RUN" ] || return 1
  out=$(xpk workload list "${XPK[@]}" "--filter-by-job=^$NAME\$" "--filter-by-status=$1" 2>&1) || {
    echo "$out" >&2
    fail "xpk could not list the workloads of $CLUSTER"
  }
  awk -v name="$NAME" '{for (i = 1; i <= NF; i++) if ($i == name) found = 1} END {exit !found}' <<<"$out"
}

image() {
  local push="" folder
  while [ $# -gt 0 ]; do
    case $1 in
      --push) push=1 ;;
      *) fail "image does not know '$1'" ;;
    esac
    shift
  done
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder of now
  trap "rm -rf '$folder'" EXIT
  # shellcheck disable=SC2016 # so that a dry run always prints the same
  if [ -n "$DRY_RUN" ]; then folder='$TMP'; fi
  run git archive --format=tar --output="$folder/code.tar" HEAD
  run tar -xf "$folder/code.tar" -C "$folder"
  run docker build --tag="$IMAGE" --file="$folder/launch/Dockerfile" "$folder"
  [ -z "$push" ] || run docker push "$IMAGE"
}

create() {
  local restarts=100 words
  while [ $# -gt 0 ]; do
    case $1 in
      --restarts=*) restarts=${1#*=} ;;
      --)
        shift
        break
        ;;
      -*) fail "create does not know '$1'; the command comes last" ;;
      *) break ;;
    esac
    shift
  done
  [ $# -gt 0 ] || fail "create needs a command, such as: python -m diffucoder_jax.train --config=... --workdir=..."
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts is no number"
  # xpk writes the command into a YAML block, where a new line would end it.
  [[ $* != *$'\n'* ]] || fail "the command has a line break in it, which xpk cannot carry"
  check_accelerator
  for status in RUNNING QUEUED; do
    if listed "$status"; then
      echo "xpk.sh: workload $NAME is $status already; bash launch/xpk.sh delete ends it" >&2
      exit "$EXISTS"
    fi
  done
  if listed FINISHED; then # its name is taken until it is removed
    run xpk workload delete "${XPK[@]}" --workload="$NAME" --force
  fi
  words=(--workload="$NAME" "${XPK[@]}" "--tpu-type=$(accelerator_type)" "--num-slices=$SLICES"
    --docker-image="$IMAGE" "--max-restarts=$restarts"
    --restart-on-exit-codes=43 # beside 42 and 127 to 255: of a process that others have left
    "--termination-grace-period-seconds=$GRACE_SECONDS")
  [ -z "$BUCKET" ] || words+=("--env=JAX_COMPILATION_CACHE_DIR=${BUCKET%/}/compiled")
  # exec: so that the program itself, and no shell around it, gets the SIGTERM.
  run xpk workload create "${words[@]}" --command="exec bash launch/worker.sh exec $(quote "$@")"
}

list() {
  [ $# -eq 0 ] || fail "list takes no arguments"
  run xpk workload list "${XPK[@]}" "--filter-by-job=^$NAME\$"
}

logs() {
  local lines=100 follow=()
  while [ $# -gt 0 ]; do
    case $1 in
      --lines=*) lines=${1#*=} ;;
      --follow) follow=(--follow) ;;
      *) fail "logs does not know '$1'" ;;
    esac
    shift
  done
  [[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines is no number"
  # kubectl speaks to the cluster that xpk last spoke to.
  run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --prefix --tail="$lines" \
    --max-log-requests=100 ${follow[@]+"${follow[@]}"}
}

delete() {
  confirm "workload $NAME of cluster $CLUSTER" "$@"
  run xpk workload delete "${XPK[@]}" --workload="$NAME" --force
}

read_word "image create list logs delete" "$@"
check_place
check CLUSTER '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-cluster
check IMAGE '[a-z0-9][-a-z0-9._/:@]*' us-east5-docker.pkg.dev/my-project/images/diffucoder:1
[ -n "$DRY_RUN" ] || [ "$WORD" = image ] || command -v xpk >/dev/null ||
  fail "xpk is not installed: pip install xpk"
xpk_place
"$WORD" ${REST[@]+"${REST[@]}"}
