#!/usr/bin/env bash
# Keeps a command going on a TPU pod until it is done: makes the pod, again whenever it was preempted,
# ships the code, starts the command, watches it, and starts it again into the same workdir, where it
# goes on from its last checkpoint.
#
#   bash launch/babysit.sh [--dry-run] [--failures=5] [--window=3600] [--commit=REV]
#     [--delete-when-done] [--] COMMAND...
#
#   export PROJECT=my-project ZONE=us-east5-a ACCELERATOR_TYPE=v5p-64 NAME=adapt-7b
#   bash launch/babysit.sh python -m diffucoder_jax.train --config=configs/adapt_7b.py --workdir=gs://B/W
#
# Exit code 0 of the command ends it; 42 (saved itself) and a preemption start it again; any other
# ending is a failure, and after --failures of them within --window seconds this script gives up and
# shows the end of the log of the worker that failed first. The pod stays then, and costs. Exit code: 0
# done, 3 given up on the command, 1 something else is wrong (settings, gcloud, the pod is in use).
# All restarts run the commit of the first start (--commit, git's HEAD when it is not given).
# Stopping this script (Ctrl-C) stops no pod; started again, it goes on watching. Run it in tmux, or
# on a small VM that stays up. Settings are environment variables: see launch/env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

GAVE_UP=3
POLL_SECONDS=${POLL_SECONDS:-60}
STRAGGLER_SECONDS=${STRAGGLER_SECONDS:-600} # some workers ended and others have not: they hang
UNREACHABLE_LOOKS=${UNREACHABLE_LOOKS:-10}  # of a pod that is said to be there

FAILURES=5 WINDOW=3600 DELETE="" COMMIT=HEAD
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --help)
      usage
      exit
      ;;
    --failures=*) FAILURES=${1#*=} ;;
    --window=*) WINDOW=${1#*=} ;;
    --commit=*) COMMIT=${1#*=} ;;
    --delete-when-done) DELETE=1 ;;
    --)
      shift
      break
      ;;
    -*) fail "'$1' is no option; see --help" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "needs a command, such as: python -m diffucoder_jax.train --config=... --workdir=..."
[[ $FAILURES =~ ^[1-9][0-9]*$ ]] || fail "--failures=$FAILURES is no number from 1"
[[ $WINDOW =~ ^[1-9][0-9]*$ ]] || fail "--window=$WINDOW is no number of seconds"
check_place
check_accelerator
COMMIT=$(git rev-parse --verify --quiet "$COMMIT^{commit}") || fail "git knows no such commit"
JOB=$(job_of "$@")

tpu() { bash launch/tpu.sh "$@"; }
say() { echo "$(date -u +%FT%TZ) $*"; }

if [ -n "$DRY_RUN" ]; then
  export DRY_RUN
  for words in create setup; do tpu "$words"; done
  tpu run "$@"
  tpu status
  [ -z "$DELETE" ] || tpu delete --yes
  exit
fi

LOOK=$(mktemp -d)
trap 'rm -rf "$LOOK"' EXIT
left() {
  say "not watching any more; the command on $NAME goes on, and the pod costs until it is deleted"
  exit "$1"
}
trap 'left 130' INT
trap 'left 143' TERM
pause() {
  sleep "$POLL_SECONDS" &
  wait $!
}

failed=() # when, in seconds
# failure WHAT [HOST]: notes one, and gives up when there were too many. HOST ran the command that failed.
failure() {
  local time now kept=()
  now=$(date +%s)
  for time in ${failed[@]+"${failed[@]}"}; do
    [ $((now - time)) -ge "$WINDOW" ] || kept+=("$time")
  done
  failed=(${kept[@]+"${kept[@]}"} "$now")
  say "failure ${#failed[@]} of $FAILURES within $WINDOW s: $1"
  if [ ${#failed[@]} -ge "$FAILURES" ]; then
    [ -z "${2:-}" ] || tpu logs --lines=40 "--host=$2" || true
    say "giving up; $NAME is left as it is and costs; bash launch/tpu.sh delete gives it back"
    [ -z "${2:-}" ] || exit "$GAVE_UP"
    exit 1
  fi
}

# look: asks how things are. Sets REQUEST, NODES, WORKERS (lines) and REACHED.
look() {
  REACHED=1
  tpu status >"$LOOK/out" 2>"$LOOK/err" || REACHED=""
  REQUEST=$(awk '$1 == "request" {print $3}' "$LOOK/out")
  NODES=$(awk '$1 == "node" {printf "%s ", $3}' "$LOOK/out")
  WORKERS=$(grep '^worker ' "$LOOK/out" || true)
}

# count PATTERN: how many workers' lines have it.
count() { grep -c -- "$1" <<<"$WORKERS" || true; }

# summary: the workers' states without what differs between them, each with its number.
summary() {
  sed -E 's/^worker [^ ]+ //; s/ (pid|at|job|commit)=[^ ]*//g; /^$/d' <<<"$WORKERS" | sort | uniq -c |
    awk '{n = $1; $1 = ""; print n " worker(s)" $0}' | tr '\n' ' '
}

# first_to_fail: the line of the worker that failed first; the others fail because of it.
first_to_fail() {
  grep -vE " exited code=(0|$PREEMPTED) " <<<"$WORKERS" | sed 's/^.* at=\([0-9]*\) .*/\1 &/' | sort -n |
    head -n 1 | sed 's/^[0-9]* //'
}

# not_started WHAT: a failure, unless the pod was taken away meanwhile.
not_started() {
  look
  if [ "$REQUEST" = ACTIVE ] && [ -n "$REACHED" ]; then failure "$1"; else say "$1; it is ${REQUEST:-unknown}"; fi
}

recreate() {
  tpu delete --yes || failure "$NAME could not be deleted"
  watched="" mixed_since=""
}

look
if [ -z "$REQUEST" ]; then
  cat "$LOOK/err" >&2
  fail "nothing is known of $NAME (above); is it PROJECT=$PROJECT ZONE=$ZONE, and are you logged in?"
fi
watched=""     # whether an ending of the command that we see now is one of a run that we know of
mixed_since="" # when some workers had ended and others not
unreachable=0
before=""
while true; do
  now="$REQUEST $NODES $(summary)"
  [ "$now" = "$before" ] || say "$NAME: $now"
  before=$now
  case $REQUEST in
    "") # gcloud has bad minutes; it has answered before
      cat "$LOOK/err" >&2
      failure "gcloud could not tell the state of $NAME"
      ;;
    MISSING)
      [ -z "$watched" ] || say "$NAME is gone; making it again"
      watched="" mixed_since=""
      tpu create || failure "$NAME could not be created"
      ;;
    SUSPENDED | FAILED)
      if [ "$REQUEST" = FAILED ]; then failure "the request for $NAME failed: $(tail -n 1 "$LOOK/err")"; fi
      say "$NAME was preempted or is of no use any more ($REQUEST); making it again"
      recreate
      look
      continue
      ;;
    ACTIVE)
      if grep -qwE 'PREEMPTED|TERMINATED|STOPPED|STOPPING|DELETING' <<<"$NODES"; then
        say "$NAME was preempted; making it again"
        recreate
        look
        continue
      fi
      if grep -qwE 'CREATING|STARTING|RESTARTING|REIMAGING|REPAIRING' <<<"$NODES"; then
        unreachable=0 # its machines are being put right; what ran there will be lost or running
      elif [ -z "$REACHED" ] || [ -z "$WORKERS" ]; then
        unreachable=$((unreachable + 1))
        say "$NAME does not answer ($unreachable): $(tail -n 1 "$LOOK/err")"
        if [ "$unreachable" -ge "$UNREACHABLE_LOOKS" ]; then
          failure "$NAME is ACTIVE and does not answer; making it again"
          unreachable=0
          recreate
        fi
      else
        unreachable=0
        running=$(count ' running ')
        all=$(count '^worker ')
        ours=$(count " job=$JOB ")
        finished=$(grep -- " job=$JOB " <<<"$WORKERS" | grep -c ' exited code=0 ' || true)
        saved=$(grep -- " job=$JOB " <<<"$WORKERS" | grep -c " exited code=$PREEMPTED " || true)
        if [ "$running" -gt 0 ]; then
          other=$(grep ' running ' <<<"$WORKERS" | grep -v -- " job=$JOB " | head -n 1 || true)
          [ -z "$other" ] || fail "another command runs on $NAME ($other); bash launch/tpu.sh stop ends it"
          watched=1
          if [ "$running" -eq "$all" ]; then
            mixed_since=""
          elif [ -z "$mixed_since" ]; then
            mixed_since=$(date +%s)
          elif [ $(($(date +%s) - mixed_since)) -ge "$STRAGGLER_SECONDS" ]; then
            say "only $running of $all workers run since $STRAGGLER_SECONDS s; stopping them"
            tpu stop --seconds=60 || true
            mixed_since=""
            look
            continue
          fi
        elif [ "$finished" -eq "$all" ]; then
          say "done: the command ended with exit code 0 on all $all workers"
          if [ -n "$DELETE" ]; then
            tpu delete --yes
          else
            say "$NAME is left as it is and costs; bash launch/tpu.sh delete gives it back"
          fi
          exit 0
        else
          mixed_since=""
          if [ -n "$watched" ]; then
            watched=""
            if [ "$ours" -ne "$all" ]; then
              say "a machine of $NAME is a new one; starting the command again"
            elif [ $((finished + saved)) -eq "$all" ]; then
              say "preempted: the command saved itself; starting it again"
            else
              first=$(first_to_fail)
              failure "$first" "$(cut -d ' ' -f 2 <<<"$first")"
              pause
            fi
          elif [ "$ours" -gt 0 ]; then
            say "the command has run here before; starting it again"
          fi
          if [ "$(count " commit=$COMMIT\$")" -ne "$all" ] && ! tpu setup --commit="$COMMIT"; then
            not_started "the code could not be installed on $NAME"
          elif tpu run -- "$@"; then
            watched=1
          else
            not_started "the command could not be started on $NAME"
          fi
        fi
      fi
      ;;
    *) ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
  esac
  pause
  look
done
