"""What workers and gcloud may answer to the launcher: each field of each answer with hostile text.

A stand-in for gcloud gives the hostile answer three times and a sound one from then on, so that whoever waits for a
better one gets it. Nothing that a worker says may run on the user's machine, nor drive the terminal.
"""

import os
import stat
from collections.abc import Iterator

from tests.fuzz import bases
from tests.fuzz.cases import Case, Command, Place

GCLOUD = r"""#!/usr/bin/env bash
case " $* " in
  *" queued-resources describe "*) what=request ;;
  *" queued-resources create "*) what=create ;;
  *" tpu-vm describe "*) what=node ;;
  *"worker.sh state"*) what=state ;;
  *"worker.sh follow"*) what=follow ;;
  *"worker.sh last"*) what=last ;;
  *"worker.sh setup"*) what=setup ;;
  *"worker.sh start"*) what=start ;;
  *"worker.sh stop"*) what=stop ;;
  *) what=other ;;
esac
count=$(cat "$ANSWERS/count.$what" 2>/dev/null || echo 0)
echo $((count + 1)) >"$ANSWERS/count.$what"
[ "$count" -ge 3 ] && [ -e "$ANSWERS/$what.later" ] && what=$what.later
cat "$ANSWERS/$what" 2>/dev/null
cat "$ANSWERS/$what.err" >&2 2>/dev/null
exit "$(cat "$ANSWERS/$what.code" 2>/dev/null || echo 0)"
"""
RUN, SHA = "20260101-000000-abcdefa-0001", "0" * 40
SOUND = {
    "request": "ACTIVE|v6e-8|",
    "node": "READY",
    "state": f"@ t1v-n-w-0 ended {RUN} 0 {SHA} 1-2",
    "follow": "\n7\tstep 1\n",
    "last": "[t1v-n-w-0] step 1",
    "setup": "@ t1v-n-w-0 installed",
    "start": "@ t1v-n-w-0 started",
    "stop": "@ t1v-n-w-0 stopped",
}
FIELDS = {
    "host": "@ {} ended RUN 1 SHA 1-2",
    "state": "@ t1v-n-w-0 {} RUN 1 SHA 1-2",
    "run": "@ t1v-n-w-0 ended {} 1 SHA 1-2",
    "code": "@ t1v-n-w-0 ended RUN {} SHA 1-2",
    "code-running": "@ t1v-n-w-0 running RUN {} SHA 1-2",
    "commit": "@ t1v-n-w-0 running RUN - {} 1-2",
    "command": "@ t1v-n-w-0 running RUN - SHA {}",
    "rest": "@ t1v-n-w-0 ended RUN 1 SHA 1-2 {}",
    "line": "{}",
    "line-before": "{}\n@ t1v-n-w-0 ended RUN 1 SHA 1-2",
    # Codes are compared with each other, which is where a shell computes.
    "first-code": "@ w-0 ended RUN {} SHA 1-2\n@ w-1 ended RUN 137 SHA 1-2",
    "second-code": "@ w-0 ended RUN 137 SHA 1-2\n@ w-1 ended RUN {} SHA 1-2",
    "many-hosts": "@ w-0 ended RUN 1 SHA 1-2\n@ {} ended RUN {} SHA 1-2\n@ w-2 running RUN - SHA 1-2",
}
FOLLOWED = {
    "offset": "\n{}\tstep 1\n",
    "text": "\n{length}\t{}\n",
    "no-tab": "\n{}\n",
    "no-end": "\n7\t{}",
    "second-offset": "\n7\tstep 1\n{}\tstep 2\n",
}
REQUESTED = {"state": "{}|v6e-8|", "type": "ACTIVE|{}|", "error": "FAILED|v6e-8|{}", "all": "{}"}
HOSTILE: dict[str, str | bytes] = {
    "index": "states[$(TOUCH)]",
    "index-of-code": "crash_code[$(TOUCH)]",
    "index-quoted": "a[0$(TOUCH)]",
    "index-in-index": "x[y[`TOUCH`]]",
    "substitution": "$(TOUCH)",
    "back-ticks": "`TOUCH`",
    "semicolon": ";TOUCH;",
    "pipe": "|TOUCH",
    "and": "&&TOUCH",
    "quote": "'$(TOUCH)'",
    "double-quote": '"$(TOUCH)"',
    "close": "]];TOUCH;[[",
    "arithmetic": "1+1",
    "assignment": "bad=0",
    "variable": "running",
    "path": "PATH",
    "octal": "08",
    "hexadecimal": "0x7f",
    "base": "64#zz",
    "negative": "-1",
    "256": "256",
    "huge": "9" * 40,
    "two-to-63": "9223372036854775808",
    "empty": "",
    "star": "*",
    "question": "?",
    "tilde": "~",
    "dash-n": "-n",
    "help": "--help",
    "equals": "=",
    "percent": "%s%n%99999999d",
    "back-slash": "\\",
    "escapes-in-words": "\\033[31m\\x1b",
    "escape": "\x1b[31mred\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "osc-52": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "csi-in-one": b"\x9b31m",
    "bell": "\x07",
    "back-space": "ok\x08\x08no",
    "return": "ok\rerror:forged",
    "not-utf8": b"\xff\xfe",
    "right-to-left": "\u202egpj",
    "forged-error": "error:forged",
    "forged-line": "ok\nerror: forged\nlaunch: done: gs://b/x",
    "forged-answer": "ok\n@ other ended RUN 0 SHA 1-2",
    "tab": "a\tb",
    "null-byte": b"a\0b",
    "long": "x" * 100_000,
    "sound": "7",
}
VERBS: dict[str, list[str]] = {
    "logs": [],
    "status": [],
    "stop": ["--grace=1"],
    "run": ["--config=configs/hhh.py", "--workdir=gs://bucket/runs/hhh"],
    "up": ["--type=v6e-8", "--config=configs/hhh.py", "--workdir=gs://bucket/runs/hhh"],
    "delete": ["--yes"],
    "create": ["--type=v6e-8"],
}


def cases() -> Iterator[Case]:
    for how, text in HOSTILE.items():
        for field, form in FIELDS.items():
            for verb in ("logs", "status", "stop", "run", "up"):
                yield _case("state", field, verb, how, _filled(form, text))
        for field, form in FOLLOWED.items():
            yield _case("follow", field, "logs", how, _filled(form, text))
        for verb in ("status", "up", "create", "delete"):
            for field, form in REQUESTED.items():
                yield _case("request", field, verb, how, _filled(form, text))
            yield _case("node", "state", verb, how, _filled("{}", text))
        for what, verb in (("last", "logs"), ("setup", "up"), ("start", "run"), ("stop", "stop"), ("create", "create")):
            yield _case(what, "answer", verb, how, _filled("{}", text))
        for code in (1, 127, 255):
            for what, verb in (("state", "logs"), ("request", "up"), ("node", "status"), ("create", "create")):
                yield _case(what, f"error-{code}", verb, how, b"", _filled("ERROR: {}", text), code)


def _filled(form: str, text: str | bytes) -> bytes:
    given = text if isinstance(text, bytes) else text.encode()
    length = str(len(given) + 1)
    known = form.replace("RUN", RUN).replace("SHA", SHA).replace("{length}", length)
    return known.encode().replace(b"{}", given.replace(b"RUN", RUN.encode()).replace(b"SHA", SHA.encode())) + b"\n"


def _case(what: str, field: str, verb: str, how: str, answer: bytes, error: bytes = b"", code: int = 0) -> Case:
    def prepare(place: Place) -> Command:
        answers, tools = place.work / "answers", place.work / "tools"
        answers.mkdir()
        tools.mkdir()
        (tools / "gcloud").write_text(GCLOUD)
        (tools / "gcloud").chmod(stat.S_IRWXU)
        touched = lambda text: text.replace(b"TOUCH", b"touch${IFS}" + os.fsencode(place.canary))
        for name, sound in SOUND.items():
            (answers / name).write_text(f"{sound}\n")
        if what == "last":
            (answers / "state").write_text(f"@ t1v-n-w-0 ended {RUN} 1 {SHA} 1-2\n")
        if what == "create" or verb == "create":
            (answers / "request").write_text("ABSENT||\n")
            (answers / "request.later").write_text(f"{SOUND['request']}\n")
        (answers / what).write_bytes(touched(answer))
        if error:
            (answers / f"{what}.err").write_bytes(touched(error))
            (answers / f"{what}.code").write_text(str(code))
        later = f"@ t1v-n-w-0 ended {RUN} 1 {SHA} 1-2" if what == "state" else SOUND.get(what, "")
        (answers / f"{what}.later").write_text(f"{later}\n")
        if verb == "delete" or (what in ("request", "node") and verb != "status"):
            (answers / "other.code").write_text("0")
        script = bases.launch_repository() / "launch_tpu.sh"
        common = ["--name=hhh", "--zone=us-east5-b", "--poll=0", "--settle=0", "--backoff=0", "--max-retries=2"]
        environment = [f"PATH={tools}:{os.environ['PATH']}", f"ANSWERS={answers}"]
        return Command("/usr/bin/env", [*environment, "bash", str(script), verb, *common, *VERBS[verb]])

    # The trainer's own code is handed on, so any number is right; that a shell failed is seen in what it says.
    return Case(f"worker/{what}/{field}/{verb}/{how}", prepare, codes=tuple(range(256)))
