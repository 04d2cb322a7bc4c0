"""launch_tpu.sh among workers that answer anything, a gcloud that answers nothing, and readers that go away."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fakes.launching import ACTIVE, FAST, ROOT, RUN, SLICE, steps, wait_for

READY = {**ACTIVE, "type": "v6e-8"}
RAN = "20260101-000000-abcdef0-0123"
SHA = "0123456789" * 4
STATE = ["t1v-n-w-0", "ended", RAN, "0", SHA, "123-45"]  # HOST STATE RUN CODE COMMIT COMMAND
# Each would run `touch HACKED` where bash evaluates it, or drives a terminal, or is no number.
HOSTILE = [
    "$(touch HACKED)",
    "`touch HACKED`",
    "states[$(touch HACKED)]",
    "a[$(touch${IFS}HACKED)]",
    "x=1;touch${IFS}HACKED",
    "'$(touch HACKED)'",
    '"$(touch HACKED)"',
    "08",
    "-1",
    "256",
    "99999999999999999999",
    "1+1",
    "crash_code=0",
    "PATH",
    "*",
    "../../x",
    "-",
    "",
    "\x1b[2J\x1b]0;title\x07",
    "\u009b31m",
    "e\u202eror",
    "a\rerror: forged",
    "0 1",
    "\\$(touch HACKED)",
    "{1..9}",
    "%s%n",
    "a" * 100_000,
]


def answers(field):
    """What a worker may answer when one field of its state is hostile."""
    for word in HOSTILE:
        yield "@ " + " ".join([*STATE[:field], word, *STATE[field + 1 :]])


def bash(script, tmp_path, **options):
    """Run a script with the launcher's functions at hand, in a directory of its own."""
    sources = "".join(f"source {ROOT}/launch/{name}.sh; " for name in ("said", "cloud", "workers", "watch"))
    start = f"set -euo pipefail; dry_run=0 timeout=5 poll=0 settle=0 name=n zone=z project='' temporary={tmp_path}; "
    command = ["bash", "-c", sources + start + script]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, **options)


@pytest.mark.parametrize("field", range(6), ids="host state run code commit command".split())
def test_no_field_of_a_workers_answer_is_evaluated(field, tmp_path):
    """The functions that use them, on every hostile word; what is no state counts as no answer."""
    lines = list(answers(field))
    (tmp_path / "lines").write_text("\n".join(lines) + "\n", encoding="utf-8")
    script = """
    on() { cat "$temporary/answer.now"; }
    accepted=0
    while IFS= read -r line; do
      printf '%s\\n' "$line" >"$temporary/answer.now"
      if worker_states; then
        count_states "${states[0]#* * }"
        count_states RUN
        run_id >/dev/null
        accepted=$((accepted + 1))
      fi
    done <lines
    echo "accepted $accepted, code $crash_code"
    """
    done = bash(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    # "-" is legal for commit and checksum; "PATH" looks like a host's name.
    legal = {"host": {"08", "256", "99999999999999999999", "PATH"}, "commit": {"-"}, "command": {"-"}}
    expected = len(legal.get("host state run code commit command".split()[field], ()))
    assert done.stdout.startswith(f"accepted {expected}, code ".encode())
    assert not list(tmp_path.rglob("HACKED*"))


def test_what_a_hostile_worker_says_is_refused_by_the_whole_launcher(cloud):
    states = f"@ t1v-n-w-0 ended {RAN} states[$(touch HACKED)] {SHA} 1-1\n"
    cloud.world(current=READY, said={"state": states})
    out, err = cloud.launch("status", *SLICE, code=75)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the workers of hhh did not answer: a worker answers what is no state: " in line
    assert not list(cloud.root.rglob("HACKED")) + list(cloud.repo.rglob("HACKED"))
    assert "HACKED" not in out


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (f"@ w-0 ended {RAN} 7 - -\n", 7),
        (f"@ w-0 ended {RAN} 256 - -\n", 75),
    ],
)
def test_the_exit_code_is_a_workers_only_where_it_is_one(cloud, states, code):
    cloud.world(current=READY, said={"state": states, "follow": "\n", "last": "x\n"})
    _, err = cloud.launch("logs", *SLICE, *FAST, code=code)
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_logs_and_last_lines_drive_no_terminal_and_forge_no_line(cloud):
    lines = ["\x1b[2Jclear\x07", "error: forged", "launch: forged", "a\rerror: b", "\u009b31m \u202e \x7f", "ä ✓ 漢"]
    log, end = "\n", 0
    for line in lines:
        end += len(line.encode()) + 1
        log += f"{end}\t{line}\n"
    log += f"08\tno number\n{end + 5}\tx[$(touch HACKED)]\na[$(touch HACKED)]\tx\n"
    state = f"@ t1v-n-w-0 ended {RAN} 3 {SHA} 1-1\n"
    cloud.world(current=READY, said={"state": state, "follow": log, "last": "error: \x1b[31mforged\n\x9d0;t\n"})
    out, err = cloud.launch("logs", *SLICE, *FAST, code=3)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err)
    assert out.splitlines() == [
        "␛[2Jclear␇",
        "[from a worker] error: forged",
        "[from a worker] launch: forged",
        "a␍error: b",
        "\ufffd31m \ufffd ␡",
        "ä ✓ 漢",
    ]
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: the run crashed with exit code 3; it is not started again. The last lines of each worker:"
    ]
    assert "[from a worker] error: ␛[31mforged" in err
    assert not list(cloud.repo.rglob("HACKED"))


@pytest.mark.slow
def test_a_line_without_end_and_bytes_of_zero_are_followed_byte_for_byte(cloud):
    """In pieces, so that it takes no memory; and after a broken connection from the right byte on."""
    trainer = cloud.root / "later/python"
    trainer.write_text(
        "#!/usr/bin/env bash\n"
        "head -c 200000 /dev/zero | tr '\\0' x; echo; head -c 65536 /dev/zero | tr '\\0' y; echo\n"
        "printf 'a\\0b\\nend\\n'\n"
    )
    cloud.world(current=READY, faults=[{"verb": "follow", "cut_after": 150_000, "again": False}])
    out, _ = cloud.launch("up", *RUN, *FAST)
    assert out == "x" * 200_000 + "\n" + "y" * 65_536 + "\na␁b\nend\n"


# ---- what never answers


def _running():
    """The command and the environment of each process here that may be looked at; other tests have theirs."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            yield " ".join((place / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))


@pytest.mark.slow
@pytest.mark.parametrize("silent", ["describe", "follow"])
def test_a_gcloud_that_never_answers_is_given_up_in_a_line(cloud, silent):
    """Neither it nor what it started is left behind."""
    states = {"state": f"@ t1v-n-w-0 running {RAN} - {SHA} 1-1\n"} if silent == "follow" else {}
    cloud.world(current=READY, silent=[silent], said=states)
    words = ["status" if silent == "describe" else "logs", *SLICE]
    limits = ["--timeout=1", *FAST]
    began = time.monotonic()
    if silent == "follow":  # a silent log is no reason to give up: the run's state is asked, and it still runs
        process = cloud.start(*words, *limits)
        wait_for(lambda: len([c for c in cloud.calls("tpu-vm", "ssh") if any(" follow " in w for w in c)]) > 1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert "the connection broke or is silent" in err.decode()
    else:
        _, err = cloud.launch(*words, *limits, code=75)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "there was no answer within" in line or "did not answer" in line
    assert time.monotonic() - began < 40
    wait_for(lambda: not any(str(cloud.root) in words for words in _running()))


def test_an_env_file_is_read_before_anything_is_created(cloud, tmp_path):
    cases = {"bad": "FINE=1\nnonsense secret\n", "taken": "A=1\nexport UID=5\n", "long": "A=" + "x" * 70_000 + "\n"}
    told = {
        "bad": "line 2 is not NAME=VALUE",
        "taken": "line 2 sets UID, which bash keeps",
        "long": "line 1 is too long",
    }
    cloud.world(slices=[ACTIVE])
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        _, err = cloud.launch("up", *RUN, *FAST, f"--env-file={tmp_path / name}", code=2)
        assert err.startswith(f"error: {tmp_path / name}: {told[name]}")
        assert err.count("\n") == 1
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        _, err = cloud.launch("up", *RUN, *FAST, f"--env-file={place}", code=2)
        assert err == f"error: --env-file={place} is not a regular file; give a file of NAME=VALUE lines\n"
    assert cloud.calls() == []


# ---- who reads the log


def test_a_reader_that_goes_away_ends_the_launcher_and_not_the_run(cloud):
    cloud.world(current=READY, trainers=[{"lines": 3, "end": "hang"}])
    process = cloud.start("up", *RUN, *FAST)
    assert process.stdout.readline().startswith(b"step 1\t")
    process.stdout.close()
    wait_for(lambda: len(cloud.trained()) == 1)
    with open(cloud.home() / ".dpo_jax/run/log", "a") as log:
        log.write("more\n" * 3)
    assert process.wait(timeout=30) == 141
    assert b"nobody reads the log any more; the run continues" in process.stderr.read()
    os.kill(cloud.pid(), 0)  # it lives


def test_a_full_disk_under_the_log_is_said_and_the_run_continues(cloud):
    cloud.world(current=READY, trainers=[{"lines": 3, "end": "hang"}])
    with open("/dev/full", "w") as full:
        process = cloud.start("up", *RUN, *FAST, stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 74
    assert b"error: the log cannot be written to standard output (is its disk full?); the run continues" in err
    os.kill(cloud.pid(), 0)
    assert steps(cloud.home().joinpath(".dpo_jax/run/log").read_text()) == [1, 2, 3]
