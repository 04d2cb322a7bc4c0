"""Every kind of end becomes a line and an exit code: in processes of their own, with real pipes, disks and signals."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.entry import EntryPoint, print_error_line, run_entry_point
from dpo_jax.errors import NOT_FINITE, Stopped, UserError

DOOR = """
import os, signal, sys, threading, time
from dpo_jax.entry import exit_within_a_limit, run_entry_point
from dpo_jax.errors import Stopped, UserError
def do(entry):
{body}
if __name__ == "__main__":
    exit_within_a_limit(lambda: run_entry_point(do))
"""


def program(*lines):
    return [sys.executable, "-c", DOOR.format(body="\n".join(f"    {line}" for line in lines))]


def finish(command, **options):
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def unread(command):
    """Run a program whose reader goes away after its first line."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        return first, process.wait(timeout=60), err


def refused(number, name="records", name2=None):
    return OSError(number, os.strerror(number), name, None, name2)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x\nerror: forged \x1b[2J\u202e"), 2, r"error: x\nerror: forged \x1b[2J\u202e"),
        (UserError("bad numbers", code=NOT_FINITE), 65, "error: bad numbers"),
        (Stopped(), 143, "stopped by SIGTERM; everything is saved, the same command resumes the run"),
        (KeyboardInterrupt(), 130, "interrupted; what is written stays, and the same command resumes it"),
        (refused(errno.ENOSPC), 74, "error: records: No space left on device; make room; what is written stays"),
        (OSError(errno.ENOSPC, "No space left on device"), 74, "error: /runs/one: No space left on device; make room"),
        (refused(errno.EACCES), 74, "error: records: Permission denied; make it writable"),
        (refused(errno.EPERM), 74, "error: records: Operation not permitted"),
        (refused(errno.EROFS, "scratch", "records"), 74, "error: records: Read-only file system"),
        (refused(errno.EISDIR), 74, "error: records: Is a directory"),
        (refused(errno.ENOTDIR), 74, "error: records: Not a directory"),
        (refused(errno.EIO), 74, "error: records: Input/output error"),
        (refused(errno.ENOENT, "/runs/one/tensorboard/x"), 74, "error: /runs/one/tensorboard/x: No such file"),
        (BrokenPipeError(), 0, ""),
    ],
    ids=lambda value: None,
)
def test_an_end_is_one_line_and_its_code(error, code, line, capsys):
    def do(entry):
        entry.place = "/runs/one"
        raise error

    assert run_entry_point(do) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == (1 if line else 0)


@pytest.mark.parametrize(
    "error", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "gone", "elsewhere"), ConnectionResetError()], ids=str
)
def test_what_is_a_mistake_of_ours_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_entry_point(lambda entry: (_ for _ in ()).throw(error))
    assert capsys.readouterr().err == ""


def test_a_save_that_found_no_room_is_74_although_it_was_said_as_bad_input(capsys):
    def do(entry):
        raise UserError("the file is not written") from OSError(errno.ENOSPC, "No space left on device")

    assert run_entry_point(do) == 74
    assert capsys.readouterr().err == "error: the file is not written\n"


def test_a_line_for_a_terminal_that_is_gone_is_no_error(monkeypatch):
    with open(os.devnull) as nowhere:
        monkeypatch.setattr(sys, "stderr", nowhere)
        print_error_line("unheard")
    assert EntryPoint().needs_output


# ---- standard output


@pytest.mark.parametrize(("needs_output", "code"), [(True, 0), (False, 3)])
def test_a_reader_that_goes_away(needs_output, code, tmp_path):
    """What only prints ends, quietly; training says so and continues to its end, here a refusal with the code 3."""
    body = [
        f"entry.needs_output = {needs_output}",
        "for i in range(100_000): print('line', i)",
        f"open({str(tmp_path / 'done')!r}, 'w').close()",
        "raise UserError('the end', code=3)",
    ]
    first, ended, err = unread(program(*body))
    assert (first, ended) == ("line 0\n", code)
    assert (tmp_path / "done").exists() == (not needs_output)
    gone = "warning: nobody reads standard output any more; this continues without it, and its records are in files\n"
    assert err == ("" if needs_output else gone + "error: the end\n")


def test_a_progress_bar_or_a_table_for_a_reader_that_is_gone_is_no_code_1():
    """Rich would end the process on a broken pipe."""
    lines = ["entry.needs_output = False", "from rich.console import Console", "c = Console()"]
    body = [*lines, "for i in range(2_000): c.print('line', i)", "raise UserError('the end', code=3)"]
    _, code, err = unread(program(*body))
    assert code == 3
    assert "error: the end" in err


@pytest.mark.parametrize("needs_output", [True, False])
def test_a_log_on_a_full_disk_is_named_and_not_the_workdir(needs_output):
    body = [f"entry.needs_output = {needs_output}", "entry.place = '/runs/one'", "print('x' * 100_000)", "print('y')"]
    with open("/dev/full", "w") as full:
        code, err = finish(program(*body), stdout=full)
    assert code == (74 if needs_output else 0)
    assert "standard output cannot be written (No space left on device)" in err
    assert err.count("\n") == 1
    assert "/runs/one" not in err


def test_both_outputs_on_a_full_disk():
    body = ["entry.needs_output = False", "print('x')", "print('y', file=sys.stderr)", "raise UserError('z', code=3)"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program(*body), stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == 3


def test_an_output_that_is_closed_from_the_start():
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "_", *program("print('x')", "raise UserError('z', code=3)")],
        stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "error: z\n")


# ---- signals, and what comes after the last line


def test_ctrl_c_is_a_line():
    # A shell's background job ignores Ctrl-C, and what it starts inherits that.
    body = ["signal.signal(signal.SIGINT, signal.default_int_handler)", "print('up', flush=True)", "time.sleep(60)"]
    process = subprocess.Popen(program(*body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; what is written stays, and the same command resumes it\n"


@pytest.mark.parametrize("code", [2, 74])
def test_threads_that_never_end_do_not_keep_a_process_that_has_said_its_last_line(code):
    body = [
        "import dpo_jax.entry as e; e.LEAVE_SECONDS = 1.0",
        "threading.Thread(target=time.sleep, args=(300,)).start()",
        f"raise UserError('said', code={code})",
    ]
    began = time.monotonic()
    assert finish(program(*body)) == (code, "error: said\n")
    assert time.monotonic() - began < 20


def test_nor_one_that_has_printed_a_traceback():
    body = [
        "import dpo_jax.entry as e; e.LEAVE_SECONDS = 1.0",
        "threading.Thread(target=time.sleep, args=(300,)).start()",
        "raise KeyError('ours')",
    ]
    done = subprocess.run(program(*body), stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "KeyError: 'ours'")


def test_a_broken_pipe_of_a_library_does_not_end_training_in_silence():
    def train(entry):
        entry.needs_output = False
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_entry_point(train)


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (" dpo_jax\n", -signal.SIGINT),  # its command is not imported yet: Python's own traceback would be all it says
        (" jax._src.config\n", 130),
    ],
)
def test_ctrl_c_while_modules_are_imported_has_no_traceback(seen, code, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "dpo_jax.train", "--config=configs/hhh.py:tiny"]
    command += [f"--workdir={tmp_path}/run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            if line.endswith(seen):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    if code == 130:
        assert [one for one in rest.splitlines() if not one.startswith("import time:")] == [
            "interrupted; checkpoints that are there are kept, and the same command resumes the run"
        ]
