# shellcheck shell=bash
# Sourced by tpu.sh, babysit.sh and xpk.sh: the settings of a pod, their checks, and how commands
# are shown and run. Settings are environment variables; put yours into a file and source it.
#
#   PROJECT            Google Cloud project
#   ZONE               such as us-east5-a
#   NAME               of the queued resource or the workload        (diffucoder)
#   ACCELERATOR_TYPE   v4-64, v5e-256, v5p-64, v6e-64: as people say, not as the API does
#   SLICES             how many such slices, joined by the data-centre network   (1)
#   PROVISIONING       spot, on-demand or reserved                   (spot)
#   RUNTIME_VERSION    of the TPU VM                                 (from the accelerator)
#   BUCKET             gs://..., where compiled programs are kept between restarts   (none)
#   SSH_VIA            external, internal or iap                     (external)
#   EXTRAS             what pip installs of the project              (tpu,gcs)
#   PREPARE            a line of shell that each worker runs, in the code's folder, before a command:
#                      to mount or copy data; it runs again after every restart   (none)
#   CLUSTER, IMAGE     of GKE, for xpk.sh: the cluster's name, the container's image
# On macOS as well: nothing here needs more than bash 3.2.

PROJECT=${PROJECT:-}
ZONE=${ZONE:-}
NAME=${NAME:-diffucoder}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-}
SLICES=${SLICES:-1}
PROVISIONING=${PROVISIONING:-spot}
RUNTIME_VERSION=${RUNTIME_VERSION:-}
BUCKET=${BUCKET:-}
SSH_VIA=${SSH_VIA:-external}
EXTRAS=${EXTRAS:-tpu,gcs}
PREPARE=${PREPARE:-}
CLUSTER=${CLUSTER:-}
IMAGE=${IMAGE:-}
DRY_RUN=${DRY_RUN:-}

# shellcheck disable=SC2034 # of babysit.sh
PREEMPTED=42 # the exit code of a program that saved itself: start the same command again

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# usage: the comment at the head of the script that was called.
usage() {
  awk 'NR > 1 && /^#/ {sub(/^# ?/, ""); print; next} NR > 1 {exit}' "$0"
}

# --- Arguments.

# read_word WORDS ARGUMENTS...: sets WORD to the first argument, which has to be one of WORDS, and REST to
# what follows. --dry-run and --help may stand before it and right behind it.
read_word() {
  local known=$1
  shift
  WORD=""
  while [ $# -gt 0 ] && { [ "$1" = --dry-run ] || [ "$1" = --help ] || [ -z "$WORD" ]; }; do
    case $1 in
      --dry-run) DRY_RUN=1 ;;
      --help)
        usage
        exit
        ;;
      *)
        [[ " $known " == *" $1 "* ]] || fail "'$1' is none of ${known// /, }; see --help"
        WORD=$1
        ;;
    esac
    shift
  done
  [ -n "$WORD" ] || fail "say what to do, one of ${known// /, }; see --help"
  # shellcheck disable=SC2034 # of the script that sources this
  REST=("$@")
}

# confirm WHAT ARGUMENTS...: asks before something is deleted, unless the arguments say --yes.
confirm() {
  local what=$1 answer=""
  shift
  [ $# -eq 0 ] || [ "$*" = --yes ] || fail "delete does not know '$*'"
  if [ $# -eq 0 ] && [ -z "$DRY_RUN" ]; then
    read -r -p "delete $what? [y/N] " answer || true
    [[ $answer == [yY]* ]] || fail "not deleted"
  fi
}

# --- Showing and running commands.

# quote WORDS...: the words as a line that a shell reads as the same words.
quote() {
  local word line="" escaped="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/$escaped}'"
    fi
    line+="${line:+ }$word"
  done
  echo "$line"
}

# show WORDS...: says what is about to run. To stderr, since some output is read by programs; a dry
# run has no other output.
show() {
  if [ -n "$DRY_RUN" ]; then
    echo "+ $(quote "$@")"
  else
    echo "+ $(quote "$@")" >&2
  fi
}

# run WORDS...: shows a command and, without --dry-run, runs it.
run() {
  show "$@"
  [ -n "$DRY_RUN" ] || "$@"
}

# --- Checks. Each prints nothing and returns, or ends with a line that names setting and remedy.

# check SETTING PATTERN EXAMPLE
check() {
  local value=${!1}
  [ -n "$value" ] || fail "$1 is not set; for example: export $1=$3"
  [[ $value =~ ^$2$ ]] || fail "$1='$value' is not allowed; it looks like $3"
}

check_name() {
  check NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'adapt-7b (at most 40 of a-z, 0-9 and -, a letter first)'
}

check_place() {
  check PROJECT '[a-z][-a-z0-9.:]*[a-z0-9]' my-project
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-a
  check_name
  check SSH_VIA 'external|internal|iap' 'external, internal or iap'
  check SLICES '[1-9][0-9]*' 1
  check EXTRAS '[a-z,]+' tpu,gcs
  [ -z "$BUCKET" ] || check BUCKET 'gs://[a-z0-9][-a-z0-9_.]+(/[-A-Za-z0-9_./]*)?' gs://my-bucket
}

# check_accelerator: a size that does not exist would wait in the queue, or fail there.
check_accelerator() {
  local size
  check ACCELERATOR_TYPE '[a-z0-9]+-[1-9][0-9]*' 'v5p-64 or v5e-256'
  size=${ACCELERATOR_TYPE##*-}
  case $ACCELERATOR_TYPE in
    v5e-* | v5litepod-* | v6e-*)
      [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] ||
        fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: ${ACCELERATOR_TYPE%-*} has 1, 4, 8, 16, 32, 64, 128 or 256 chips"
      ;;
    v2-* | v3-* | v4-* | v5p-* | tpu7x-*)
      [ $((size % 8)) -eq 0 ] ||
        fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: the number of ${ACCELERATOR_TYPE%-*} counts cores, a multiple of 8"
      ;;
    *) fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is not known; v4, v5e, v5p and v6e are, and tpu7x for xpk.sh" ;;
  esac
}

# accelerator_type: the name that gcloud and xpk know.
accelerator_type() {
  echo "${ACCELERATOR_TYPE/#v5e-/v5litepod-}"
}

# runtime_version: the software of a TPU VM (cloud.google.com/tpu/docs/runtimes).
runtime_version() {
  if [ -n "$RUNTIME_VERSION" ]; then
    echo "$RUNTIME_VERSION"
    return
  fi
  case $ACCELERATOR_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5e-* | v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "the Cloud TPU API has no $ACCELERATOR_TYPE; use launch/xpk.sh for it" ;;
  esac
}

# job_of WORDS...: a short name of a command, to see whether it is the one that runs.
job_of() {
  printf '%s\0' "$@" | git hash-object --stdin | cut -c 1-12
}
