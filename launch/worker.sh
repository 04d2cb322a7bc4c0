#!/usr/bin/env bash
# Runs on every worker of a slice, where launch_tpu.sh copies it; called over ssh as `bash .dpo_jax/worker.sh VERB ...`.
# Answers for the launcher begin with "@ HOST". gcloud repeats a command whose connection broke, so each may come twice.
set -euo pipefail

base=$HOME/.dpo_jax # 700
host=$(hostname)
export PATH="$HOME/.local/bin:$PATH"

answer() { echo "@ $host $*"; }

# Files may be empty or half-written where the disk was full: what is in them counts only when it looks as it should.
from() { # FILE PATTERN: its first line, or -
  local line=''
  [[ ! -f $1 ]] || IFS= read -r -n 200 line <"$1" || :
  if [[ $line =~ ^($2)$ ]]; then echo "$line"; else echo -; fi
}
process_pattern='[1-9][0-9]{0,9}'

fail() {
  echo "error: $host: $*" >&2
  exit 1
}

# A run holds a lock on a file for as long as any of its processes lives: the kernel lets go of it at any kind of death,
# and unlike a process id it is never somebody else's.
live() { # RUN
  [[ -e $base/runs/$1/alive ]] && ! flock -n "$base/runs/$1/alive" true
}

current() { # the id of the newest run, or -
  local target=-
  [[ ! -L $base/run ]] || target=$(readlink "$base/run")
  echo "${target##*/}"
}

one_at_a_time() {
  exec 8>"$base/lock"
  flock -w 1800 8 || fail "another launcher has held $base/lock for half an hour"
}

# ---- setup SHA mount|direct

setup() {
  local sha=$1 mount=$2
  one_at_a_time
  if [[ $(from "$base/stamp" '[0-9a-f]+') != "$sha" ]]; then
    ! live "$(current)" || fail "run $(current) is live with another commit; stop it first, or wait"
    rm -f "$base/stamp"
    install_tree "$sha" 2>&1
    echo "$sha" >"$base/stamp"
  fi
  command -v tmux >/dev/null || install_package tmux
  [[ $mount == direct ]] || command -v gcsfuse >/dev/null || install_gcsfuse
  answer installed "$sha"
}

install_tree() {
  local tree=$base/trees/$1
  rm -rf "$tree" # of an unpacking that was cut short
  mkdir -p "$tree"
  tar -xzf "$base/$1.tar.gz" -C "$tree"
  ln -sfn "$tree" "$base/src"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x $base/venv/bin/python ]] || uv venv --python 3.12 "$base/venv"
  (cd "$tree" && uv pip install --python "$base/venv/bin/python" --reinstall-package dpo_jax '.[tpu,gcs]')
  uv pip freeze --python "$base/venv/bin/python" >"$base/installed.txt"
}

install_package() { # a fresh machine updates itself for minutes and holds apt's lock meanwhile
  sudo apt-get -o DPkg::Lock::Timeout=900 update -q
  sudo apt-get -o DPkg::Lock::Timeout=900 install -y -q "$1"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  install_package gcsfuse
}

# ---- start RUN mount|direct gs://BUCKET/DIR ARG...

start() {
  local run=$1 mount=$2 workdir=$3 directory=$base/runs/$1
  shift 3
  one_at_a_time
  if [[ $(current) != "$run" ]]; then
    ! live "$(current)" || fail "run $(current) is live; stop it first"
    mkdir -p "$directory"
    printf '%s\0' "$mount" "$workdir" "$@" | cksum | tr ' ' - >"$directory/command"
    [[ $mount == direct ]] || workdir=$(mounted "$workdir")
    printf '%s\0' "$@" "--workdir=$workdir" >"$directory/argv"
    cp /proc/sys/kernel/random/boot_id "$directory/boot"
    chmod 600 "$base/env"
    touch "$directory/log"
    ln -sfn "$directory" "$base/run"
    tmux -L dpo_jax new-session -d -s "$run" "exec bash $(printf %q "$base/worker.sh") main $(printf %q "$run")" 8>&-
  fi
  for _ in {1..300}; do
    [[ $(from "$directory/pid" "$process_pattern") == - ]] || { answer started "$run" && return; }
    sleep 0.1
  done
  fail "run $run did not begin within 30 s"
}

mounted() { # the local path of gs://BUCKET/DIR, after mounting the bucket
  local path=${1#gs://}
  local bucket=${path%%/*}
  local point=$base/gcs/$bucket
  mkdir -p "$point"
  # The same path on every worker, as one user runs them all: orbax insists on it. They all write there, so nothing is
  # remembered about files. A checkpoint is made whole by renaming its directory, which is refused by default on buckets
  # without a hierarchical namespace.
  mountpoint -q "$point" ||
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      "$bucket" "$point" >&2 8>&-
  echo "$point/${path#*/}"
}

main() { # RUN, inside tmux: the run itself
  local directory=$base/runs/$1 argv code=0
  exec 9>"$directory/alive"
  flock -n 9 || fail "run $1 is live already"
  # A machine that shuts down signals everybody: the trainer saves, and we note how it ended. It must not hear that its
  # terminal is gone too, which ends a process at once.
  trap : TERM INT
  trap '' HUP
  echo $$ >"$directory/main"
  # shellcheck disable=SC1091
  source "$base/env"
  mapfile -d '' -t argv <"$directory/argv"
  cd "$base/src"
  PYTHONUNBUFFERED=1 "$base/venv/bin/python" -m dpo_jax.train "${argv[@]}" >"$directory/log" 2>&1 </dev/null &
  echo $! >"$directory/pid"
  wait $! || code=$?
  while kill -0 $! 2>/dev/null; do # the wait was cut short by a signal
    code=0
    wait $! || code=$?
  done
  echo "$code" >"$directory/exit.new"
  mv "$directory/exit.new" "$directory/exit"
}

# ---- questions

state() { # @ HOST none|running|ended|rebooted|died RUN CODE COMMIT COMMAND
  local run code=- word sha command
  run=$(current)
  sha=$(from "$base/stamp" '[0-9a-f]+')
  if [[ $run == - ]]; then
    word=none
  elif live "$run"; then
    word=running
  elif code=$(from "$base/run/exit" '[0-9]{1,3}') && [[ $code != - ]]; then
    word=ended
  elif [[ $(cat /proc/sys/kernel/random/boot_id) != "$(from "$base/run/boot" '.+')" ]]; then
    word=rebooted
  else
    word=died # nobody was left to write the exit code
  fi
  command=$(from "$base/run/command" '[0-9]+-[0-9]+')
  answer "$word" "$run" "$code" "$sha" "$command"
}

# The log from a byte on, each line after the number of the byte where the next one begins: so the launcher resumes where
# it was and knows what it has seen already. An empty line comes first: it ends what a broken connection left half. A line
# that is very long comes in pieces, and bash cannot read NUL. Ends with the run.
follow() { # RUN OFFSET
  local log=$base/runs/$1/log end=$2 line options=() longest=65536 process
  local LC_ALL=C # lengths in bytes
  [[ -e $log ]] || fail "there is no run $1 here"
  echo
  process=$(from "$base/runs/$1/main" "$process_pattern")
  if live "$1" && [[ $process != - ]]; then options=(-f -s 0.2 --pid="$process"); fi
  tail -c "+$((end + 1))" "${options[@]}" "$log" | stdbuf -o0 tr '\000' '\001' |
    while IFS= read -r -n "$longest" line || [[ $line ]]; do
      end=$((end + ${#line} + (${#line} < longest)))
      printf '%s\t%s\n' "$end" "$line"
    done
}

last() { # N: the last lines of the newest log
  tail -n "$1" "$base/run/log" | awk -v host="$host" '{ print "[" host "] " $0 }'
}

stop() { # GRACE: seconds until it insists
  local run pid grace=$1 insist=$(($1 < 10 ? $1 + 1 : 10))
  run=$(current)
  if ! live "$run"; then answer idle "$run" && return; fi
  pid=$(from "$base/run/pid" "$process_pattern")
  [[ $pid != - ]] || fail "run $run is live, but $base/run/pid does not name its process"
  kill -TERM "$pid" # it saves, and ends with 143
  gone "$run" "$grace" || { kill -TERM "$pid" && gone "$run" "$insist"; } ||
    { kill -KILL "$pid" && gone "$run" 10; } ||
    fail "run $run does not end (process $pid)"
  answer stopped "$run" "$(from "$base/run/exit" '[0-9]{1,3}')"
}

gone() { # RUN SECONDS
  local tenths=$(($2 * 10))
  while live "$1"; do
    ((tenths-- > 0)) || return 1
    sleep 0.1
  done
}

{ # read as a whole: this file is copied anew while a run of it still waits for the trainer
  verb=$1
  shift
  case $verb in
    setup) setup "$@" ;;
    start) start "$@" ;;
    main) main "$@" ;;
    state) state ;;
    follow) follow "$@" ;;
    last) last "$@" ;;
    stop) stop "$@" ;;
    *) fail "$verb is not a verb of mine" ;;
  esac
  exit
}
