# shellcheck shell=bash disable=SC2034,SC2154  # sourced by launch_tpu.sh: variables cross files
# The slice: one queued resource with one node of the same name. Every call of gcloud is here.

request='' request_type='' request_error='' node='' slice='' known=0 attempts=0 temporary=''

make_temporary() {
  if ((dry_run)); then temporary=/tmp/dpo_jax.XXXXXX && return; fi
  temporary=$(mktemp -d "${TMPDIR:-/tmp}/dpo_jax.XXXXXX") # mktemp's directory is 700: secrets pass through it
  trap 'end_calls; rm -rf "$temporary"' EXIT
}

tpus() { # SECONDS ARG...: gcloud compute tpus ARG...; what it says on standard error is kept for messages, not shown
  local command=(gcloud compute tpus "${@:2}" --zone="$zone")
  [[ ! $project ]] || command+=(--project="$project")
  command+=(--quiet)
  if ((dry_run)); then shown "${command[@]}"; else limited "$1" "${command[@]}" 2>"$temporary/errors"; fi
}

telling() { # COMMAND...: what it says on standard output is shown as `relay` does
  local code=0
  if ((dry_run)); then "$@" && return; fi
  "$@" >"$temporary/said" || code=$?
  relay <"$temporary/said"
  return "$code"
}

last_error() { # gcloud's own complaint, on the same line as ours
  [[ -s $temporary/errors ]] || return 0
  local line
  tr -d '\000' <"$temporary/errors" >"$temporary/complaint" # which no variable holds
  line=$(awk 'tolower($0) ~ /^error:/ { on = 1 } on && /^(- |$)/ { exit } on { print; if (++n == 3) exit }' "$temporary/complaint")
  line=${line:-$(tail -n 1 "$temporary/complaint")}
  line=${line//$'\n'/ }
  line=${line#[Ee][Rr][Rr][Oo][Rr]: }
  printf ': %s' "${line:0:500}"
}

unanswered_code() { # 75 where gcloud said nothing at all, 2 where it complained
  if grep -q '^ERROR: there was no answer within' "$temporary/errors"; then echo 75; else echo 2; fi
}

# ---- asking

describe_request() { # request: its state, ABSENT, or UNKNOWN when gcloud has no answer
  local first='' code=0
  request_type='' request_error=''
  if ((dry_run)); then
    tpus "$timeout" queued-resources describe "$name" --format="$request_format"
    request=${request:+ACTIVE}
    request=${request:-ABSENT} request_type=$type
    return
  fi
  tpus "$timeout" queued-resources describe "$name" --format="$request_format" >"$temporary/answer" || code=$?
  if ((code == 0)); then
    IFS= read -r -n "$longest_line" first <"$temporary/answer" || :
    IFS='|' read -r request request_type request_error <<<"$first"
    [[ $request =~ $api_state_pattern && $request_type =~ $api_type_pattern ]] || request=UNKNOWN request_type=''
  elif ((code == 124)); then
    request=UNKNOWN
  elif grep -q 'NOT_FOUND\|was not found' "$temporary/errors"; then
    request=ABSENT
  else
    request=UNKNOWN
  fi
}
request_format='value[separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,state.failedData.error.message)'

describe_node() { # node: its state, ABSENT or UNKNOWN
  local code=0
  if ((dry_run)); then
    tpus "$timeout" tpu-vm describe "$name" --format='value(state)'
    node=READY
    return
  fi
  tpus "$timeout" tpu-vm describe "$name" --format='value(state)' >"$temporary/answer" || code=$?
  if ((code == 0)); then
    IFS= read -r -n "$longest_line" node <"$temporary/answer" || :
    [[ $node =~ $api_state_pattern ]] || node=UNKNOWN
  elif ((code == 124)); then
    node=UNKNOWN
  elif grep -q 'NOT_FOUND\|was not found' "$temporary/errors"; then
    node=ABSENT
  else
    node=UNKNOWN
  fi
}

# What both states mean for a run: ready, moving (wait and see), lost (it will not come back), unknown (we could not ask:
# never a reason to create anything, as our own network may be what is down).
describe_slice() {
  node='-'
  describe_request
  case $request in
    ACTIVE) ;;
    ABSENT | FAILED | SUSPENDING | SUSPENDED | DELETING) slice=lost && return ;;
    UNKNOWN) slice=unknown && return ;;
    *) slice=moving && return ;;
  esac
  describe_node
  case $node in
    READY) slice=ready ;;
    ABSENT | PREEMPTED | TERMINATED | DELETING) slice=lost ;;
    STOPPING | STOPPED) slice=halted ;;
    UNKNOWN) slice=unknown ;;
    *) slice=moving ;; # CREATING, STARTING, RESTARTING, REPAIRING, ...
  esac
}

# ---- creating

ensure_slice() { # create or reuse, and wait until it is ready
  local before='' silent=0 ours=0
  while :; do
    describe_slice
    if [[ $slice != unknown ]]; then silent=0 known=1; fi
    if [[ "$request $node" != "$before" ]] && ! ((dry_run)); then say "$name: request $request, node $node"; fi
    before="$request $node"
    case $slice in
      ready)
        [[ ! $request_type || $request_type == "$type" ]] ||
          die 2 "$name is a $request_type, not a $type; use another --name, or delete it"
        return
        ;;
      halted) die 2 "the node of $name is $node: somebody halted it; start it (gcloud compute tpus tpu-vm start), or delete it" ;;
      unknown)
        # No login, no project: waiting would not help.
        ((known)) || die "$(unanswered_code)" "gcloud has no answer about $name$(last_error)"
        silent=$((silent + 1))
        ((silent < 10)) || die 75 "the state of $name cannot be asked$(last_error)"
        sleep "$poll"
        ;;
      moving) sleep "$poll" ;;
      lost)
        # What dead requests are left from before costs no attempt; one that we made does.
        case $request in
          ABSENT) create_request && ours=1 ;;
          SUSPENDING | DELETING) sleep "$poll" ;;
          *) bury_request "$ours" ;;
        esac
        ;;
    esac
  done
}

create_request() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime_version")
  [[ $capacity == on-demand ]] || flags+=("--$capacity")
  say "creating $type ($capacity) in $zone; it is billed from ACTIVE until \`delete\`"
  if telling tpus "$((5 * timeout))" queued-resources create "$name" "${flags[@]}" "${create_flags[@]}"; then
    request=CREATED
  elif grep -qi quota "$temporary/errors"; then
    refuse_quota
  elif grep -q 'ALREADY_EXISTS\|already exists' "$temporary/errors"; then
    describe_request
    [[ $request != ABSENT ]] || die 2 "a TPU $name exists that no queued resource made; use another --name, or delete it"
  elif grep -q 'UNAVAILABLE\|INTERNAL\|DEADLINE_EXCEEDED\|timed out\|Connection\|HTTPError 5\|no answer within' "$temporary/errors"; then
    spend "the API did not answer$(last_error)"
  else
    die 2 "the request for $type in $zone was refused$(last_error)"
  fi
}

refuse_quota() {
  die 2 "no quota for $type ($capacity) in $zone$(last_error)${request_error:+: $request_error}; ask for it (IAM & Admin, Quotas), or use another zone, type or capacity"
}

bury_request() { # 1 if this launch made it: the one thing that `up` deletes by itself, and only when nothing of it lives
  [[ ! $request_error =~ [Qq]uota ]] || refuse_quota
  if (($1)); then spend "$name is $request${request_error:+ ($request_error)}"; fi
  say "deleting the dead request (request $request, node $node)"
  telling tpus "$((5 * timeout))" queued-resources delete "$name" --force || spend "it could not be deleted$(last_error)"
}

spend() { # one of --max-retries, with a pause that doubles
  local pause=$((attempts < 12 ? backoff << attempts : 1800))
  ((pause <= 1800)) || pause=1800
  ((attempts < max_retries)) || die 75 "$1, and --max-retries=$max_retries are used up; the same command resumes ${workdir:-later}"
  attempts=$((attempts + 1))
  say "$1; attempt $attempts of $max_retries in $pause s"
  sleep "$pause"
}

delete_slice() {
  local answer=''
  describe_request
  if [[ $request == ABSENT ]] && ! ((dry_run)); then say "there is no $name in $zone" && return; fi
  [[ $request != UNKNOWN ]] || die "$(unanswered_code)" "gcloud has no answer about $name$(last_error)"
  if ! ((yes || dry_run)); then
    [[ -t 0 ]] || die 2 "delete asks first, and there is nobody to ask; give --yes"
    read -r -p "Delete $name ($request) and all that is on its disks? [y/N] " answer
    [[ $answer == [yY]* ]] || die 2 "nothing was deleted"
  fi
  telling tpus "$((5 * timeout))" queued-resources delete "$name" --force || die 1 "$name was not deleted$(last_error)"
  say "$name is deleted; the run's directory on gs:// stays"
}
