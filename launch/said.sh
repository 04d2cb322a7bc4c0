# shellcheck shell=bash disable=SC2034,SC2154  # sourced by launch_tpu.sh: variables cross files
# What others say: gcloud, ssh, and the workers, where whoever is root may answer anything. A value of theirs is used only
# after it has matched a pattern below, as bash evaluates what stands in an index or in arithmetic. A text of theirs is
# shown only after `make_visible`, as it may hold what drives a terminal. Each call has a limit in time and size.

host_pattern='[A-Za-z0-9][A-Za-z0-9._-]{0,62}'
run_pattern='[0-9]{8}-[0-9]{6}-[0-9a-f]{7}-[0-9a-f]{4}'
code_pattern='([1-9]?[0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])'
rest_pattern='(-|[0-9a-f]{40}|[0-9a-f]{64}) (-|[0-9]{1,10}-[0-9]{1,12})' # the commit, and the checksum of the command
state_pattern="^@ ($host_pattern) (ended $run_pattern $code_pattern|(running|rebooted|died) $run_pattern -|none - -) $rest_pattern\$"
offset_pattern='^(0|[1-9][0-9]{0,14})$'
api_state_pattern='^[A-Z][A-Z_]{0,39}$'
api_type_pattern='^[A-Za-z0-9-]{0,40}$'

longest_line=65536 # bytes of a worker's log that are shown at once
longest_answer=102400 # KiB of an answer or of complaints, as a worker may never stop talking

# ---- texts

make_visible() { # TEXT: sets `visible`, one line in which control characters and turned-round writing show as such
  local LC_ALL=C code byte symbol # patterns are of bytes
  visible=${1//$'\n'/ }
  [[ $visible == *[$'\001'-$'\010'$'\013'-$'\037'$'\177'$'\302'$'\342']* ]] || return 0
  for code in {1..8} {11..31}; do
    printf -v byte '\\x%x' "$code"
    printf -v byte %b "$byte"
    [[ $visible == *"$byte"* ]] || continue
    printf -v symbol '\\xe2\\x90\\x%x' "$((128 + code))" # U+2400 and on: ␛ for escape
    printf -v symbol %b "$symbol"
    visible=${visible//"$byte"/$symbol}
  done
  visible=${visible//$'\177'/$'\342\220\241'}
  visible=${visible//$'\302'[$'\200'-$'\237']/$'\357\277\275'}
  visible=${visible//$'\342\200'[$'\216'$'\217'$'\250'-$'\256']/$'\357\277\275'}
  visible=${visible//$'\342\201'[$'\246'-$'\251']/$'\357\277\275'}
}

attribute() { # TEXT: `make_visible`, and what could be taken for words of this launcher says that it is none of them
  make_visible "$1"
  if [[ $visible =~ ^[[:space:]]*([Ee][Rr][Rr][Oo][Rr]|launch|[Ww][Aa][Rr][Nn][Ii][Nn][Gg]): ]]; then
    visible="[from a worker] $visible"
  fi
}

relay() { # what workers say, line by line, from standard input to standard output
  local line visible
  while IFS= read -r -n "$longest_line" line || [[ $line ]]; do
    attribute "$line"
    printf '%s\n' "$visible"
  done
}

# ---- calls

limited() { # SECONDS COMMAND...: at most so long (0: for ever); then all of it is ended, and the answer is 124
  local pid code=0 until=$((SECONDS + $1))
  (
    ulimit -S -f "$longest_answer" 2>/dev/null || :
    exec "${@:2}"
  ) &
  pid=$!
  : >"$temporary/asked.$pid" # so that the end of this launcher is theirs too: Ctrl-C does not reach what bash runs behind
  if (($1 > 0)); then
    while kill -0 "$pid" 2>/dev/null; do
      if ((SECONDS >= until)); then
        : >"$temporary/late.$pid"
        end_tree "$pid"
      fi
      sleep 0.5
    done >/dev/null 2>&1 </dev/null &
  fi
  wait "$pid" 2>/dev/null || code=$?
  if [[ -e $temporary/late.$pid ]]; then
    echo "ERROR: there was no answer within $1 s" >"$temporary/errors"
    code=124
  fi
  rm -f "$temporary/asked.$pid" "$temporary/late.$pid"
  return "$code"
}

end_tree() { # PID: that process and all below it, by their ids
  local all
  mapfile -t all < <(ps -A -o pid= -o ppid= 2>/dev/null | awk -v top="$1" '
    { above[$1] = $2 }
    END { for (p in above) { for (q = p; q in above && q != top; q = above[q]); if (q == top) print p } }')
  ((${#all[@]})) || all=("$1")
  kill -TERM "${all[@]}" 2>/dev/null || :
  sleep 1
  kill -KILL "${all[@]}" 2>/dev/null || :
}

end_calls() { # whatever is still being asked
  local file
  for file in "$temporary"/asked.*; do
    [[ ! -e $file ]] || end_tree "${file##*.}"
  done
}
