"""What goes wrong in long runs, each done to a real run in processes of its own. docs/faults.md is the list."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax import train
from dpo_jax.records.records import read_records
from tests import processes, programs
from tests.disks import grow, small_disk
from tests.end_to_end.test_processes import _same
from tests.end_to_end.test_train import SMALL, _command, _finish, _values, environment  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

FAST = SMALL | {
    "batch_size": 4,
    "sft_steps": 0,
    "num_steps": 8,
    "eval_pairs": 0,
    "checkpoint_every": 2,
    "sample_prompts": 0,
    "export": False,
}

# The same run with something done to it first.
BROKEN = """
import os, signal, sys, time
import dataclasses
from dpo_jax import train
from dpo_jax.data.cache.store import PairCache
from dpo_jax.training import checkpoint, integrity, phases
{fault}
sys.exit(train.main(sys.argv))
"""


def _broken(fault, workdir, **changed):
    return [sys.executable, "-c", BROKEN.format(fault=fault), *_command(workdir, **(FAST | changed))[3:]]


def _run(command, env, timeout=300):
    done = programs.run(command, env, capture_output=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def _refused(command, env):
    """The one line on standard error of a command that is bad input, said before anything is compiled."""
    code, out, err = _run(command, env)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(said), out) == (2, 1, ""), err + out
    return said[0]


def _refused_here(workdir, capsys, **changed):
    """The same in this process, for a line that needs no process of its own."""
    code = train.main(_command(workdir, **changed)[2:])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(said), out) == (2, 1, ""), err + out
    return said[0]


def _wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):  # noqa: F811
    """A run to which nothing happened."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    _finish(workdir, environment, **FAST)
    assert _checkpoints(workdir) == [6, 8]
    return workdir


@pytest.fixture
def work(tmp_path):
    """A new run's directory."""
    return tmp_path / "run"


def test_killed_during_a_save_goes_on_from_the_one_before_on_other_devices(whole, environment, work):  # noqa: F811
    """All of checkpoint 4 is written, only the rename is missing: it does not count, and 2 is there."""
    fault = """
write = integrity.write_checksums
def kill(directory, **options):
    write(directory, **options)
    if directory.name.startswith("4."):
        os.kill(os.getpid(), signal.SIGKILL)
integrity.write_checksums = kill
"""
    code, _, err = _run(_broken(fault, work), environment)
    assert code == -signal.SIGKILL, err
    assert _checkpoints(work) == [2]
    assert (work / "checkpoints" / "4.orbax-checkpoint-tmp" / "checksums.json").exists()
    four = {"XLA_FLAGS": processes.quick_to_compile(devices=4)["XLA_FLAGS"]}
    printed = _finish(work, environment | four, **FAST)
    assert "fsdp 4" in printed
    assert "resuming from checkpoint 2" in printed
    _same(_values(whole), _values(work))
    assert _checkpoints(work) == [6, 8]
    assert not list((work / "checkpoints").glob("*tmp*"))


def test_a_damaged_checkpoint_is_named_and_the_newest_sound_one_used(whole, environment, tmp_path):  # noqa: F811
    """A bit of it; `tests/training/test_checkpoint.py` damages every file in every way."""
    work = tmp_path / "run"
    shutil.copytree(whole, work)
    largest = max((work / "checkpoints" / "8").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    printed = _finish(work, environment, **FAST)
    name = largest.relative_to(work / "checkpoints" / "8")
    assert f"checkpoint 8 is damaged ({name} " in printed
    assert "resuming from checkpoint 6" in printed
    assert _values(work) == _values(whole)
    assert _checkpoints(work) == [6, 8]
    assert (work / "damaged" / "8").is_dir()  # nothing is thrown away


def test_a_full_disk_at_a_save_ends_the_run_in_a_line_and_going_on_needs_only_room(whole, environment, tmp_path):  # noqa: F811
    with small_disk(tmp_path / "disk", "1200k"):  # a checkpoint takes 800k: the second one does not fit
        work = tmp_path / "disk" / "run"
        code, out, err = _run(_command(work, **FAST), environment)
        assert code == 74, out + err
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert "could not be saved" in said[0]
        assert "No space left" in said[0]
        assert "Traceback" not in err
        there = _checkpoints(work)
        assert there
        assert not list((work / "checkpoints").glob("*tmp*"))
        grow(tmp_path / "disk", "200m")
        assert f"resuming from checkpoint {there[-1]}" in _finish(work, environment, **FAST)
        assert _values(work) == _values(whole)


# Some batches are made bad: the reference said something that is no number, or was sure of the wrong answer.
SPOILT = """
loaded = phases.loaded
def spoil(*arguments):
    import jax
    for item in loaded(*arguments):
        factor = {factors}.get(item.update)
        if factor is not None:
            with jax.transfer_guard("allow"):
                batch = item.batch._replace(ref_logps=item.batch.ref_logps * factor)
                item = dataclasses.replace(item, batch=batch)
        yield item
phases.loaded = spoil
"""
NAN = "float('nan')"


def _rows(path):
    """24 dialogues of one's own, of which a few lines are no pairs."""
    lines = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i} times"} for i in range(24)]
    text = [json.dumps(line) for line in lines]
    path.write_text("\n".join([*text[:5], json.dumps(lines[0] | {"rejected": "yes 0"}), *text[5:]]) + "\n")
    return {"dataset": path, "max_bad_fraction": 0.5}


def test_bad_gradients_are_skipped_and_counted_and_spikes_are_reported(environment, work):  # noqa: F811
    fault = SPOILT.format(factors=f"{{3: {NAN}, 20: 100.0}}")
    changed = {"num_steps": 21, "checkpoint_every": 3, "reference_cache": True, "log_every": 2}
    code, out, err = _run(_broken(fault, work, **changed), environment)
    assert code == 0, err
    assert "step 3: loss nan, gradient norm nan: not finite, the update is skipped (1 in a row)" in out
    assert "(a spike)" in out
    records = {r["step"]: r for r in read_records(work / "metrics.jsonl")}
    assert {step: r["skipped"] for step, r in records.items() if r["skipped"]} == {4: 1}
    assert all(r["dpo_loss"] is not None for r in records.values())
    # 3 was not an update: the schedule is one behind from there.
    assert records[4]["learning_rate"] == pytest.approx(2e-4 * 2 / 3, rel=1e-5)
    events = read_records(work / "events.jsonl")
    assert [(e["event"], e["step"], len(e["pairs"])) for e in events] == [("skipped", 3, 4), ("spike", 20, 4)]
    assert events[1]["loss"] > 6 * events[1]["median"]


def test_too_many_bad_updates_stop_the_run_with_the_rows_of_the_batch(environment, work, tmp_path):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    fault = SPOILT.format(factors=f"{{4: {NAN}, 5: {NAN}, 6: {NAN}}}")
    changed = {"max_bad_steps": 1, "reference_cache": True, "num_epochs": 4, "num_steps": 0}
    code, _, err = _run(_broken(fault, work, **changed, **_rows(rows)), environment)
    assert code == 65, err
    assert "train step 5: loss nan, gradient norm nan: not finite 2 times in a row, more than max_bad_steps=1" in err
    assert _checkpoints(work) == [2]  # at 4 there was nothing good to save
    batch = json.loads((work / "bad_batch.json").read_text())
    assert (batch["split"], batch["step"], len(batch["pairs"])) == ("train", 5, 4)
    lines = rows.read_text().splitlines()
    for pair in batch["pairs"]:
        assert pair["file"] == str(rows)
        row = json.loads(lines[pair["line"] - 1])
        assert row["prompt"] in pair["prompt"]
        assert row["chosen"] in pair["chosen"]
        assert row["rejected"] in pair["rejected"]


def test_a_stuck_input_pipeline_ends_the_run_with_stacks(environment, work):  # noqa: F811
    fault = """
read = PairCache.__getitem__
def never_answers(self, index):
    if (checkpoints / "4").exists():
        time.sleep(1000)
    return read(self, index)
from pathlib import Path
checkpoints = Path(sys.argv[2].split("=")[1]) / "checkpoints"
PairCache.__getitem__ = never_answers
"""
    command = _broken(fault, work, num_steps=1000, stuck_after_seconds=8.0, log_every=1)
    code, _, err = _run(command, environment)
    assert code == 70, err
    assert "while waiting for the rows of a train step" in err
    assert "in never_answers" in err
    assert _checkpoints(work)


def test_two_runs_in_one_directory_and_a_second_sigterm(environment, work):  # noqa: F811
    """The first run hangs in its save; a second is refused; two signals end the first at once; a third goes on."""
    fault = """
save = checkpoint.save_checkpoint
def slow(checkpoints, step, state):
    save(checkpoints, step, state)
    print("saving", flush=True)
    if step == 4:
        time.sleep(1000)
checkpoint.save_checkpoint = slow
"""
    hangs = programs.begin(_broken(fault, work), environment, stdout=programs.PIPE)
    _wait_for(lambda: (work / "checkpoints" / "4").exists(), hangs)
    said = _refused(_command(work, **FAST), environment)
    assert f"workdir {work} is in use by process {hangs.pid} on " in said
    hangs.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert hangs.poll() is None  # it would save and end
    hangs.send_signal(signal.SIGTERM)
    hangs.communicate(timeout=5)
    assert hangs.returncode == -signal.SIGTERM
    assert "resuming from checkpoint 4" in _finish(work, environment, **FAST)


def _pair(workdir, environment, **changed):  # noqa: F811
    """Two processes of one run in its first updates."""
    command = [*_command(workdir, **(FAST | {"num_steps": 200_000, "log_every": 1} | changed)), "--distributed"]
    started = processes.start([command] * 2, environment)
    try:
        _wait_for(lambda: len(read_records(workdir / "metrics.jsonl")) > 3, started[0])
    except AssertionError:
        processes.end(started, (0, 0), timeout=1)
        raise
    return started


@pytest.mark.parametrize("lost", [1, 0])
def test_a_peer_that_is_killed_ends_the_other_with_a_message(lost, environment, work):  # noqa: F811
    # No checkpoints: in a save it would wait for a heartbeat's timeout, a hundred seconds.
    started = _pair(work, environment, checkpoint_every=0)
    started[lost].kill()
    printed, _ = started[1 - lost].communicate(timeout=300)
    started[lost].communicate()
    # JAX aborts as soon as its service lost the first process, or no heartbeat came while a save was waiting.
    if started[1 - lost].returncode == -signal.SIGABRT:
        assert "another task died" in printed
    else:
        assert started[1 - lost].returncode == 70, printed
        assert "error: another process of this run is gone or silent" in printed


def test_a_peer_that_falls_silent_ends_the_other_with_stacks(environment, work):  # noqa: F811
    # No checkpoints: in a save it is given more time. After 30 s Gloo, between CPUs, would have given up first.
    started = _pair(work, environment, stuck_after_seconds=12.0, checkpoint_every=0)
    started[1].send_signal(signal.SIGSTOP)
    printed, _ = started[0].communicate(timeout=300)
    started[1].kill()
    started[1].communicate()
    assert started[0].returncode == 70, printed
    assert "while waiting for the numbers of train update" in printed
    assert "device_get" in printed


def test_changed_data_model_or_config_are_refused_with_the_difference(tmp_path, capsys):
    """In this process, on eight devices."""
    model, rows, work = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copytree(SMALL["model"], model)
    changed = FAST | {"model": model, "num_steps": 2, "batch_size": 8} | _rows(rows)
    command = _command(work, **changed)[2:]
    assert train.main(command) == 0
    capsys.readouterr()
    before, weights = rows.read_text(), model / "model.safetensors"
    rows.write_text(before.replace("yes 7", "yes seven"))
    said = _refused_here(work, capsys, **changed)
    assert "was begun with other files (data: sources" in said
    assert f"rows.jsonl bytes: {len(before)} there, {len(before) + 4} now" in said
    rows.write_text(before)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "(model: model.safetensors digest: " in _refused_here(work, capsys, **changed)
    content[-1] ^= 1
    weights.write_bytes(content)
    said = _refused_here(work, capsys, **changed | {"dpo_beta": 0.2})
    assert "another config (dpo_beta: 0.1 there, 0.2 asked)" in said
    assert train.main(command) == 0
    assert "resuming from checkpoint 2" in capsys.readouterr().out


def test_a_directory_that_cannot_be_written_is_refused_before_compiling(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = _refused_here(tmp_path / "file" / "run", capsys, **FAST)
    assert "cannot be written (Not a directory)" in said
    with small_disk(tmp_path / "disk", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        said = _refused_here(tmp_path / "disk", capsys, **FAST)
        assert "cannot be written (Read-only file system)" in said


def test_ctrl_c_saves_first_and_the_same_command_resumes(whole, environment, work):  # noqa: F811
    script = "import signal, sys; from dpo_jax import train; signal.signal(2, signal.default_int_handler); "
    command = [sys.executable, "-c", script + "sys.exit(train.main(sys.argv))", *_command(work, **FAST)[3:]]
    with programs.begin(command, environment, stdout=programs.PIPE, stderr=programs.PIPE) as run:
        _wait_for(lambda: _steps_in(work), run)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=100)
    assert run.returncode == 130
    assert err == "stopped by SIGINT; everything is saved, the same command resumes the run\n"
    assert _checkpoints(work)[-1] == max(_steps_in(work))
    _finish(work, environment, **FAST)
    assert _values(work) == _values(whole)


def _steps_in(workdir):
    return [r["step"] for r in read_records(workdir / "metrics.jsonl") if r["split"] == "train"]


def test_an_unwritable_directory_ends_an_unread_run_in_time(environment, work):  # noqa: F811
    """Nobody reads its log any more, which is said; then no checkpoint can be written, and it ends soon."""
    command = _command(work, **FAST | {"num_steps": 200_000, "checkpoint_every": 50, "log_every": 1})
    checkpoints = work / "checkpoints"
    with programs.begin(command, environment, stdout=programs.PIPE, stderr=programs.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        _wait_for((checkpoints / "50").exists, run)
        done = subprocess.run(["chattr", "+i", checkpoints], capture_output=True, text=True)
        began = time.monotonic()
        try:
            if done.returncode:
                run.kill()
                pytest.skip(f"nothing can be made immutable here: {done.stderr.strip()}")
            err = run.stderr.read()
            assert run.wait(timeout=100) == 74, err
        finally:
            subprocess.run(["chattr", "-i", checkpoints], capture_output=True)
    assert time.monotonic() - began < 100
    warning, error = err.splitlines()
    assert warning.startswith("warning: nobody reads standard output any more; this continues without it")
    assert "a checkpoint could not be saved ([Errno 1] Operation not permitted: " in error
    assert "make the directory writable, then the same command resumes from the newest" in error
