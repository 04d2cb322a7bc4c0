#!/usr/bin/env bash
# Train on Cloud TPU: creates or reuses a slice, ships the committed tree, runs it on all workers, follows the log and goes
# on after preemptions. docs/launch.md is the manual. On this machine it needs bash 4.4, git and gcloud, nothing else.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old, 4.4 is needed (macOS: brew install bash)" >&2
  exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/said.sh
source "$here/launch/said.sh"
# shellcheck source=launch/cloud.sh
source "$here/launch/cloud.sh"
# shellcheck source=launch/workers.sh
source "$here/launch/workers.sh"
# shellcheck source=launch/watch.sh
source "$here/launch/watch.sh"
# shellcheck source=launch/xpk.sh
source "$here/launch/xpk.sh"

usage() {
  cat <<'USAGE'
usage: ./launch_tpu.sh VERB --name=NAME --zone=ZONE [OPTION ...] [-- ARG ...]

  up        create or reuse the slice, ship, install, train, follow; after a preemption create again and resume
  create    create or reuse the slice and wait until it is ready
  setup     ship the committed tree and install it on every worker
  run       start training on all workers, detached, and return
  logs      follow a worker's log until the run ends
  status    states of the request, of the node and of the run on every worker
  stop      end the run on all workers: it saves and ends with 143
  delete    delete the slice, and with it what is billed

where
  --name=NAME              of the slice and of its queued resource
  --zone=ZONE              such as us-east5-b (default: $CLOUDSDK_COMPUTE_ZONE)
  --project=PROJECT        default: gcloud's own
  --type=TYPE              v5e-N or v5litepod-N (N chips), v5p-N (N cores, two a chip), v6e-N (N chips)
  --spot | --reserved      preemptible and cheap, or from a reservation; otherwise on demand
  --runtime-version=IMAGE  default: the generation's own
  --create-flag=FLAG       one more flag of `gcloud compute tpus queued-resources create`; may be repeated
what
  --config=FILE[:PRESET]   such as configs/hhh.py:llama3.1-8b
  --workdir=gs://B/DIR     the run's directory: the same one resumes the run
  -- ARG ...               everything after it goes to `python -m dpo_jax.train` as it is
  --no-mount | --mount     hand gs:// to the trainer (default), or mount the bucket on the workers with gcsfuse
  --allow-dirty            ship the last commit although files differ from it
secrets (HF_TOKEN and WANDB_API_KEY go along when set; only a file of mode 600 carries them)
  --pass-env=NAME          send this variable of the environment too; may be repeated
  --env-file=FILE          NAME=VALUE lines for the trainer's environment
how long
  --max-retries=N          slices lost or failed before giving up (default 10)
  --backoff=SECONDS        before the first retry; doubles, half an hour at most (default 60)
  --poll=SECONDS           between questions to the API (default 20)
  --settle=SECONDS         how long a failed run is watched for a preemption behind it (default 90)
  --timeout=SECONDS        for gcloud to answer a question (default 180); installing may take 20 times as long
others
  --worker=N               of logs (default 0)
  --grace=SECONDS          of stop: before it insists (default 300)
  --delete-when-done       of up: delete the slice after a run that succeeded
  --yes                    of delete: do not ask
  --backend=xpk            print the commands for GKE (any generation, TPU7x too), run nothing
  --dry-run                print the commands, run nothing

  ./launch_tpu.sh up --name=hhh --zone=us-east5-b --type=v6e-8 --spot \
      --config=configs/hhh.py --workdir=gs://my-bucket/runs/hhh -- --config.dpo_beta=0.1
  ./launch_tpu.sh logs --name=hhh --zone=us-east5-b
  ./launch_tpu.sh delete --name=hhh --zone=us-east5-b

Exit codes: the trainer's own; 2 bad input or a refused request; 74 the log cannot be written; 75 retries used up, or
gcloud or the workers do not answer; 129, 130, 141 and 143 by a signal, while the run continues.
USAGE
}

# ---- what to say, and how it ends

say() { # to the user, without mixing into the log that goes to standard output
  local visible
  make_visible "$*"
  if ((dry_run)); then printf '# %s\n' "$visible"; else printf 'launch: %s\n' "$visible" >&2; fi
}

die() { # CODE MESSAGE
  local visible
  make_visible "${*:2}"
  printf 'error: %s\n' "$visible" >&2
  exit "$1"
}

shown() { # the words as one line for a shell, quoted where they must be
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# ---- options

dry_run=0 yes=0 allow_dirty=0 delete_when_done=0
name='' zone=${CLOUDSDK_COMPUTE_ZONE:-} project='' type='' capacity=on-demand runtime_version='' backend=gcloud
config='' workdir='' env_file='' worker=0 grace=300 max_retries=10 backoff=60 poll=20 settle=90 timeout=180
mount=direct
create_flags=() pass_env=() train_args=() env_names=() env_values=()

parse() {
  local word value
  while (($#)); do
    word=$1
    shift
    case $word in
      --spot | --reserved)
        [[ $capacity == on-demand || $capacity == "${word#--}" ]] || die 2 "--spot and --reserved exclude each other"
        capacity=${word#--}
        continue
        ;;
      --mount) mount=mount && continue ;;
      --no-mount) mount=direct && continue ;;
      --help) usage && exit 0 ;;
      --yes) yes=1 && continue ;;
      --delete-when-done) delete_when_done=1 && continue ;;
      --dry-run) dry_run=1 && continue ;;
      --allow-dirty) allow_dirty=1 && continue ;;
      --)
        train_args=("$@")
        return
        ;;
      --*=*) value=${word#*=} word=${word%%=*} ;;
      --*)
        (($#)) || die 2 "$word needs a value, or is not an option; see ./launch_tpu.sh --help"
        value=$1
        shift
        ;;
      *) die 2 "$word: not an option; arguments of the trainer come after --" ;;
    esac
    case $word in
      --name) name=$value ;;
      --zone) zone=$value ;;
      --project) project=$value ;;
      --type) type=$value ;;
      --runtime-version) runtime_version=$value ;;
      --create-flag) create_flags+=("$value") ;;
      --config) config=$value ;;
      --workdir) workdir=$value ;;
      --env-file) env_file=$value ;;
      --pass-env) pass_env+=("$value") ;;
      --backend) backend=$value ;;
      --worker | --grace | --max-retries | --backoff | --poll | --settle | --timeout)
        [[ $value =~ ^[0-9]{1,6}$ ]] || die 2 "$word=$value: a whole number is needed"
        word=${word#--}
        printf -v "${word/-/_}" %d "$((10#$value))"
        ;;
      *) die 2 "$word is not an option; see ./launch_tpu.sh --help" ;;
    esac
  done
}

check_names() {
  [[ $name ]] || die 2 "--name=NAME is needed: the slice's name"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die 2 "--name=$name: lower-case letters, digits and dashes, beginning with a letter, at most 63"
  [[ $zone ]] || die 2 "--zone=ZONE is needed, such as us-east5-b"
  [[ $backend == gcloud || $backend == xpk ]] || die 2 "--backend=$backend: there are gcloud and xpk"
  [[ $backend == gcloud || $verb == up ]] || die 2 "--backend=xpk prints the commands of up; $verb has none"
}

check_type() { # the friendly name becomes the API's, and the image follows from the generation
  [[ $type ]] || die 2 "--type=TYPE is needed, such as v6e-8"
  type=${type/#v5e-/v5litepod-}
  [[ $backend == gcloud ]] || return 0
  local image
  case $type in
    tpu7x-* | v7*) die 2 "--type=$type: the Cloud TPU API does not serve TPU7x; use --backend=xpk" ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    *) die 2 "--type=$type: v5e-N, v5litepod-N, v5p-N or v6e-N is needed; others: --backend=xpk or launch/sky.yaml" ;;
  esac
  [[ ${type##*-} =~ ^[1-9][0-9]*$ ]] || die 2 "--type=$type: a number is needed after the dash, such as v6e-8"
  runtime_version=${runtime_version:-$image}
}

check_run() {
  [[ $config ]] || die 2 "--config=FILE[:PRESET] is needed, such as configs/hhh.py"
  [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]+/.*[^/] ]] ||
    die 2 "--workdir=${workdir:-(none)}: gs://BUCKET/DIR is needed, so that a new slice resumes what a lost one did"
  [[ $(git -C "$here" ls-tree --name-only HEAD -- "${config%%:*}") ]] ||
    die 2 "--config=$config: ${config%%:*} is not in the last commit, and only that is shipped"
  local variable
  for variable in "${pass_env[@]}"; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die 2 "--pass-env=$variable is not a variable's name"
    [[ ${!variable+set} ]] || die 2 "--pass-env=$variable: the variable is not set"
    ! is_readonly "$variable" || die 2 "--pass-env=$variable: bash keeps this variable for itself"
  done
  read_env_file
}

check_tree() {
  sha=$(git -C "$here" rev-parse --verify -q HEAD) || die 2 "$here is not a git repository with a commit: nothing to ship"
  [[ $(git -C "$here" status --porcelain) ]] || return 0
  if ((allow_dirty || dry_run)); then
    echo "WARNING: files differ from the last commit; what is shipped is ${sha:0:12}, without these changes" >&2
  else
    die 2 "files differ from the last commit, and only commits are shipped: commit them, or ship ${sha:0:12} by --allow-dirty"
  fi
}

# ---- verbs

up() {
  while :; do
    ensure_slice
    if install && begin adopt; then
      watch "$follow_id"
    else
      failed_step
    fi
    case $outcome in
      done)
        say "done: $workdir"
        if ((delete_when_done)); then yes=1 && delete_slice && return; fi
        say "the slice is still there and billed: ./launch_tpu.sh delete --name=$name --zone=$zone"
        return
        ;;
      crash) crashed ;;
      stopped) say "stopped on request, and saved; the same command resumes it" && exit 143 ;;
      unreachable) out_of_reach ;;
      lost)
        spend "the slice was lost"
        say "creating again; the run in $workdir resumes from its last checkpoint"
        ;;
    esac
  done
}

logs() {
  worker_states || die 75 "the workers of $name did not answer$(last_error)"
  follow_id=$(run_id)
  [[ $follow_id != - ]] || die 2 "no run was started on $name"
  watch "$follow_id"
  case $outcome in
    done) return 0 ;;
    crash) crashed ;;
    stopped) exit 143 ;;
    unreachable) out_of_reach ;;
    lost) die 75 "the slice was lost; \`up\` with the same options creates it again and resumes" ;;
  esac
}

main() {
  verb=${1:-}
  case $verb in
    up | create | setup | run | logs | status | stop | delete) shift ;;
    -h | --help | help) usage && exit 0 ;;
    '') usage >&2 && exit 2 ;;
    *) die 2 "$verb is not a verb; there are up, create, setup, run, logs, status, stop and delete (--help)" ;;
  esac
  parse "$@"
  check_names
  ((timeout > 0)) || die 2 "--timeout=0: a number of seconds above 0 is needed"
  case $verb in up | create) check_type ;; esac
  case $verb in up | setup | run) check_tree ;; esac
  case $verb in up | run) check_run ;; esac
  if [[ $backend == xpk ]]; then print_xpk && exit 0; fi
  ((dry_run)) || command -v gcloud >/dev/null || die 2 "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  make_temporary
  if ((dry_run)); then
    case $verb in up | create) ;; *) request=ACTIVE ;; esac
  fi
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  trap unread PIPE
  trap 'say "interrupted; what runs on the workers keeps running (logs, stop, delete)"; exit 130' INT
  case $verb in
    create) ensure_slice ;;
    setup) install || die 1 "setup failed$(last_error)" ;;
    run) begin refuse || die 1 "the run did not start$(last_error)" ;;
    stop) stop_run ;;
    delete) delete_slice ;;
    up) up ;;
    logs) logs ;;
    status) status ;;
  esac
}

{ # read as a whole: the repository may change while this waits for days
  main "$@"
  exit
}
