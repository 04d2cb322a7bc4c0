# shellcheck shell=bash disable=SC2034,SC2154  # sourced by launch_tpu.sh: variables cross files
# The machines of the slice: what is copied to them and what is asked of launch/worker.sh there.

states=() # of every worker: "HOST STATE RUN CODE COMMIT COMMAND", the last a checksum
follow_id='' # the run that `begin` started, or found live

on() { # SECONDS WORKER|all VERB ARG...: launch/worker.sh over there
  local command
  command=$(printf ' %q' "${@:3}")
  reach "$1" "$2" "bash .dpo_jax/worker.sh$command"
}

ask_all() { # SECONDS VERB ARG...: what the workers answer is shown, beside the log
  if ((dry_run)); then on "$1" all "${@:2}"; else on "$1" all "${@:2}" | relay >&2; fi
}

reach() { # SECONDS WORKER|all COMMAND; a connection without an answer is given up after a minute
  tpus "$1" tpu-vm ssh "$name" --worker="$2" --command="$3" \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4
}

copy() { # FILE...: into the private directory of every worker; -p keeps a mode of 600
  tpus "$((5 * timeout))" tpu-vm scp "$@" "$name:.dpo_jax/" --worker=all --scp-flag=-p
}

# ---- setup

install() { # the committed tree on every worker, once: a worker that has this commit installs nothing
  local archive=$temporary/$sha.tar.gz
  say "shipping commit ${sha:0:12} to every worker of $name and installing it there"
  if ((dry_run)); then
    echo "git archive --format=tar $sha | gzip -n >$archive"
  else
    git -C "$here" archive --format=tar "$sha" | gzip -n >"$archive" || return
  fi
  reach "$timeout" all 'mkdir -p -m 700 .dpo_jax' && copy "$archive" "$here/launch/worker.sh" &&
    ask_all "$((20 * timeout))" setup "$sha" "$mount"
}

# ---- run

read_env_file() { # fills `env_names` and `env_values`, before anything is created and billed
  local line number=0
  [[ $env_file ]] || return 0
  [[ -e $env_file ]] || die 2 "--env-file=$env_file cannot be read: it is not there"
  # A shell's <(COMMAND) is fine; another pipe or a device might never end.
  [[ -f $env_file || $env_file == /dev/null || $env_file == /dev/fd/* ]] ||
    die 2 "--env-file=$env_file is not a regular file; give a file of NAME=VALUE lines"
  [[ -r $env_file ]] || die 2 "--env-file=$env_file cannot be read: permission denied"
  while IFS= read -r -n "$longest_line" line || [[ $line ]]; do
    line=${line%$'\r'} line=${line#export } number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    ((${#line} < longest_line)) || die 2 "$env_file: line $number is too long; $longest_line bytes are the limit"
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die 2 "$env_file: line $number is not NAME=VALUE"
    ! is_readonly "${line%%=*}" || die 2 "$env_file: line $number sets ${line%%=*}, which bash keeps for itself; remove it"
    env_names+=("${line%%=*}") env_values+=("$(unquoted "${line#*=}")")
  done <"$env_file"
}

is_readonly() { # NAME: bash on the workers refuses to set it, and with that to start the run
  case $1 in BASHOPTS | BASH_VERSINFO | EUID | PPID | SHELLOPTS | UID) return 0 ;; *) return 1 ;; esac
}

unquoted() { # a value of a NAME=VALUE file: as it is, without one pair of quotes around it
  if [[ $1 =~ ^\"(.*)\"$ || $1 =~ ^\'(.*)\'$ ]]; then printf %s "${BASH_REMATCH[1]}"; else printf %s "$1"; fi
}

write_secrets() { # the trainer's environment as a file for bash; nothing of it is ever an argument
  local variable i file=$temporary/env names=()
  ((dry_run)) || (umask 077 && : >"$file")
  for variable in HF_TOKEN WANDB_API_KEY "${pass_env[@]}"; do
    [[ ${!variable+set} ]] || continue
    names+=("$variable")
    ((dry_run)) || printf 'export %s=%q\n' "$variable" "${!variable}" >>"$file"
  done
  for i in "${!env_names[@]}"; do
    names+=("${env_names[i]}")
    ((dry_run)) || printf 'export %s=%q\n' "${env_names[i]}" "${env_values[i]}" >>"$file"
  done
  say "the trainer's environment goes along in a file of mode 600: ${names[*]:-nothing is set}"
}

begin() { # refuse|adopt: start a run everywhere; a live one is refused, or followed when it is the same
  local live live_sha live_command ours command=("$mount" "$workdir" "--config=$config" --distributed "${train_args[@]}")
  # Never an earlier run's: a worker takes a second start of a run for gcloud's repetition.
  printf -v follow_id '%s-%s-%04x' "$(date -u +%Y%m%d-%H%M%S)" "${sha:0:7}" "$RANDOM"
  worker_states || return 1
  read -r live live_sha live_command <<<"$(printf '%s\n' "${states[@]}" | awk '$2 == "running" { print $3, $5, $6; exit }')"
  if [[ $live ]]; then
    ours=$(printf '%s\0' "${command[@]}" | cksum | tr ' ' -)
    [[ $1 == adopt && "$live_sha $live_command" == "$sha $ours" ]] ||
      die 2 "run $live is live on $name (commit ${live_sha:0:12}); \`logs\` follows it, \`stop\` ends it"
    follow_id=$live
    say "run $follow_id of the same command is live already: following it, starting nothing"
    return
  fi
  write_secrets
  # --distributed also on one host: a slice knows its hosts, be it one.
  copy "$temporary/env" &&
    ask_all "$((2 * timeout))" start "$follow_id" "${command[@]}" &&
    say "run $follow_id is started on all workers of $name: ./launch_tpu.sh logs --name=$name --zone=$zone"
}

# ---- questions

worker_states() { # fills `states`; fails unless every worker answers, and with nothing but its state
  local code=0 line
  local -A seen=()
  states=()
  if ((dry_run)); then on "$timeout" all state && return; fi
  on "$timeout" all state >"$temporary/answer" || code=$?
  # gcloud hands on the exit code of a worker: 127 is bash without the file, so nothing was set up there yet.
  ((code != 127)) || return 0
  ((code == 0)) || return 1
  while IFS= read -r -n "$longest_line" line || [[ $line ]]; do
    [[ $line == @* ]] || continue
    if ! [[ $line =~ $state_pattern ]]; then
      printf 'ERROR: a worker answers what is no state: %q\n' "${line:0:200}" >"$temporary/errors"
      return 1
    fi
    seen[${BASH_REMATCH[1]}]=${line#@ } # gcloud may have asked twice
  done <"$temporary/answer"
  ((${#seen[@]})) || return 1
  mapfile -t states < <(printf '%s\n' "${seen[@]}" | sort -V)
}

run_id() { # of the newest run on the workers, or -
  if ((dry_run)); then echo RUN && return; fi
  printf '%s\n' "${states[@]}" - | awk 'NF > 1 && $3 != "-" { print $3; found = 1; exit } END { if (!found) print "-" }'
}

status() {
  local visible
  describe_slice
  [[ $slice != unknown ]] || ((dry_run)) || die "$(unanswered_code)" "gcloud has no answer about $name$(last_error)"
  make_visible "request $name in $zone: $request${request_type:+ ($request_type)}${request_error:+: $request_error}, node $node"
  ((dry_run)) || printf '%s\n' "$visible"
  [[ $slice == ready ]] || ((dry_run)) || return 0
  worker_states || die 75 "the workers of $name did not answer$(last_error)"
  ((dry_run)) && return
  if ((${#states[@]})); then
    printf '%s\n' "host state run exit commit" "${states[@]}" | cut -d ' ' -f 1-5 | column -t
  else
    echo "nothing is set up on its workers"
  fi
}

stop_run() {
  say "asking the run on all workers of $name to save and end, and waiting up to $grace s"
  ask_all "$((grace + timeout))" stop "$grace" || die 1 "not every worker stopped$(last_error)"
}
