# shellcheck shell=bash disable=SC2034,SC2154  # sourced by launch_tpu.sh: variables cross files
# A run from outside: its log, and at the end what became of it.

outcome='' # done, crash, stopped, lost (the slice, or its machines were started anew), unreachable
running=0 good=0 bad=0 saved=0 gone=0 crash_code=1 # of the workers, by `count_states`

# The connection, the process and the machine can each end without the others. Only the two states and the workers' exit
# codes tell what happened; that a connection broke tells nothing.
watch() { # RUN
  local offset=0 silent=0 cuts=0 before
  say "following the log of worker $worker (run $1)"
  while :; do
    before=$offset
    if follow "$1"; then cuts=0; else cuts=$((offset > before ? 1 : cuts + 1)); fi
    if ((dry_run)); then on "$timeout" all state && outcome='done' && return; fi
    describe_slice
    case $slice in
      lost | halted) outcome=lost && return ;;
      ready)
        if worker_states; then
          silent=0
          # Not before the log was read to its end, unless there is none to be had.
          if ((cuts == 0 || cuts > 3)); then
            judge "$1" && return
          else
            say "the connection broke or is silent; following again from byte $offset of the log"
            sleep "$poll"
          fi
          continue
        fi
        ;;
    esac
    [[ $slice == moving ]] || silent=$((silent + 1)) # a machine under repair takes its time
    if ((silent >= 10)); then outcome=unreachable && return; fi
    say "no connection (request $request, node $node); following again from byte $offset of the log in $poll s"
    sleep "$poll"
  done
}

# Prints what comes after `offset` and moves it, until the run ends. Fails when the connection breaks, or is silent for so
# long that it may be dead: the run itself may well have nothing to say, so then its state is asked.
follow() { # RUN
  local line end log reader visible LC_ALL=C # lengths in bytes
  if ((dry_run)); then on 0 "$worker" follow "$1" "$offset" && return; fi
  exec {log}< <(on 0 "$worker" follow "$1" "$offset")
  reader=$!
  end_when_silent "$reader" >/dev/null 2>&1 </dev/null &
  while IFS= read -r -n "$((longest_line + 20))" -u "$log" line; do
    : >"$temporary/heard"
    end=${line%%$'\t'*}
    line=${line#*$'\t'}
    # Not half a line, and not what gcloud, which repeats a command whose connection broke, brings again. The pieces of a
    # long line have no line end but the last.
    [[ $end =~ $offset_pattern ]] || continue
    if ((end == offset + ${#line} + 1 || (end == offset + ${#line} && end > offset))); then
      attribute "$line"
      if ((end > offset + ${#line})); then visible+=$'\n'; fi
      offset=$end
      printf %s "$visible" 2>/dev/null || unread
    fi
  done
  exec {log}<&-
  wait "$reader" 2>/dev/null
}

# Not by `read -t`: in bash 5.2 its alarm outlives a trap that comes meanwhile.
end_when_silent() { # READER: once nothing was `heard` from it for --timeout, or later five times that
  local quiet=0 patience=$timeout
  while kill -0 "$1"; do
    if [[ -e $temporary/heard ]]; then
      rm "$temporary/heard"
      quiet=0 patience=$((5 * timeout))
    fi
    if ((quiet++ >= patience)); then
      end_tree "$1"
      return
    fi
    sleep 1
  done
}

unread() { # standard output takes nothing any more: who read it is gone (`| head`), or its disk is full
  trap '' PIPE
  if [[ -p /dev/stdout || ! -e /dev/stdout ]]; then
    say "nobody reads the log any more; the run continues (\`logs\` follows it again, \`stop\` ends it)"
    exit 141
  fi
  die 74 "the log cannot be written to standard output (is its disk full?); the run continues, and \`logs\` follows it again"
}

judge() { # RUN: is it over, and how? Fails while some worker still runs and none failed
  count_states "$1"
  if ((running == 0 && good == ${#states[@]})); then outcome='done' && return; fi
  if ((bad == 0 && gone == 0 && saved == 0)); then # our connection broke, or only our worker has ended
    say "it is still running, on $running of ${#states[@]} workers; following again from byte $offset of the log"
    sleep "$poll"
    return 1
  fi
  # A lost slice first looks like a failed run: its machines get SIGTERM, and those that live on miss the others.
  say "the run ended (${gone} gone, ${bad} failed, ${saved} saved on SIGTERM); looking whether the slice was preempted"
  if settles_lost; then outcome=lost && return; fi
  worker_states && count_states "$1"
  if ((gone)); then # its machine was started anew, the slice is still ours
    ((running == 0)) || ask_all "$((30 + timeout))" stop 30 || true
    outcome=lost
  elif ((bad)); then
    outcome=crash
  else
    outcome=stopped
  fi
}

count_states() { # RUN
  local host state run code rest
  running=0 good=0 bad=0 saved=0 gone=0
  while read -r host state run code rest; do
    if [[ $run != "$1" || $state == rebooted ]]; then
      gone=$((gone + 1))
      continue
    fi
    case $state:$code in
      running:*) running=$((running + 1)) ;;
      ended:0) good=$((good + 1)) ;;
      ended:143) saved=$((saved + 1)) ;;
      *)
        [[ $state == ended ]] || code=137 # nobody was left to write it
        # One host's own failure says more than the signals by which the others then end.
        if ((bad == 0 || (crash_code > 128 && code < 128))); then crash_code=$code; fi
        bad=$((bad + 1))
        ;;
    esac
  done < <(printf '%s\n' "${states[@]}")
}

settles_lost() { # within --settle seconds
  local until=$((SECONDS + settle))
  while :; do
    describe_slice
    if [[ $slice == lost ]]; then return 0; fi
    ((SECONDS < until)) || return 1
    sleep "$((poll < settle ? poll : settle))"
  done
}

crashed() { # a crash would come again: say all and stop
  echo "error: the run crashed with exit code $crash_code; it is not started again. The last lines of each worker:" >&2
  ask_all "$timeout" last 20 || say "the workers did not answer$(last_error)"
  echo "The slice is still there and billed: mend and \`up\` again, or \`delete\`." >&2
  exit "$crash_code"
}

out_of_reach() {
  die 75 "$name did not answer ten times$(last_error); what runs there keeps running: \`logs\` follows it, \`status\` asks again"
}

failed_step() { # setup or start failed: because the slice was lost, or for a reason that would come again
  local reason
  reason=$(last_error)
  if settles_lost; then outcome=lost && return; fi
  die 1 "the workers of $name could not be set up or started$reason"
}
