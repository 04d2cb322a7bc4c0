"""Trackers get the records of metrics.jsonl, continue the run they began, and are named when they are not there."""

import json
import math
import sqlite3
import struct
import time

import pytest

from configs import hhh
from dpo_jax import train
from dpo_jax.errors import UserError
from dpo_jax.records import trackers
from dpo_jax.records.records import read_records
from dpo_jax.records.writer import MetricsWriter
from tests.records.test_writer import TOTAL, held_out
from tests.records.test_writer import train as trained

RECORDS = [{"step": 1, "split": "sft", "loss": 3.5}, held_out(0), trained(1), trained(2, margin=math.nan)]
OFF = {"wandb": "", "trackio": ""}
CONFIG = {"seed": 0, "learning_rate": 5e-7}


def _write(workdir, records, **projects):
    with (
        trackers.open_trackers(workdir, OFF | projects, CONFIG) as logs,
        MetricsWriter(workdir, total_steps=TOTAL, quiet=True, logs=logs) as writer,
    ):
        for record in records:
            writer.write(record)


@pytest.fixture
def stub(monkeypatch):
    """A tracker that keeps what it is told: [(project, name, id, config)], [records], [failed]."""
    begun, got, ended = [], [], []

    def start(project, workdir, run_id, config):
        begun.append((project, workdir.name, run_id, config))
        return got.append, ended.append

    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": start, "trackio": start})
    return begun, got, ended


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_an_absent_package_is_named_before_anything_is_done(package, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = hhh.get_config("tiny")
    config[f"{package}_project"] = "mine"
    with pytest.raises(UserError, match=rf"{package}_project='mine'.*pip install {package}"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    trackers.check_packages(OFF)  # nothing is asked for


def test_records_arrive_and_a_run_that_goes_on_keeps_its_id(tmp_path, stub):
    begun, got, ended = stub
    _write(tmp_path, RECORDS, wandb="mine")
    _write(tmp_path, [trained(3)], wandb="mine", trackio="ours")
    assert got[:2] == RECORDS[:2]
    assert len(got) == len(RECORDS) + 2
    (project, name, first, config), (_, _, second, _), (ours, _, other, _) = begun
    assert (project, name, ours, config) == ("mine", tmp_path.name, "ours", CONFIG)
    assert first == second != other
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": first, "trackio": other}
    assert ended == [False] * 3


def test_off_leaves_nothing(tmp_path, stub):
    _write(tmp_path, RECORDS)
    assert stub == ([], [], [])
    assert not (tmp_path / "trackers.json").exists()


def test_a_failed_run_is_told_so(tmp_path, stub):
    with pytest.raises(KeyError), trackers.open_trackers(tmp_path, OFF | {"wandb": "mine"}, CONFIG):
        raise KeyError
    assert stub[2] == [True]


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": refuse, "trackio": refuse})
    with (
        pytest.raises(UserError, match=r"cannot start \(no API key configured\).*WANDB_MODE=offline"),
        trackers.open_trackers(tmp_path, OFF | {"wandb": "mine"}, CONFIG),
    ):
        pass


def test_training_goes_on_without_a_tracker_that_fails(tmp_path):
    got = []

    def log(record):
        got.append(record)
        raise ConnectionError("gone")

    with MetricsWriter(tmp_path, total_steps=TOTAL, quiet=True, logs=[log]) as writer:
        for record in RECORDS:
            writer.write(record)
    assert len(got) == 1
    assert len(read_records(tmp_path / "metrics.jsonl")) == len(RECORDS)


def _wandb_records(path, kind):
    """What an offline run keeps: a header of 7 bytes, then pieces in blocks of 32 KiB, as in LevelDB's logs."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, place = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):  # whole, or the last piece
            yield kind.FromString(whole)
            whole = b""


@pytest.mark.extras
@pytest.mark.filterwarnings("default")  # the package's own
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (an extra)")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    _write(tmp_path, RECORDS, wandb="mine")
    _write(tmp_path, [trained(3)], wandb="mine")
    stored, ids = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in _wandb_records(path, Record):
            if record.run.run_id:
                ids.add((record.run.project, record.run.display_name, record.run.run_id))
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            stored += [{name: json.loads(value) for name, value in items.items() if name[0] != "_"}] * bool(items)
    ((project, name, run_id),) = ids
    assert (project, name) == ("mine", tmp_path.name)
    assert run_id == json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert sorted(s["train/step"] for s in stored if "train/step" in s) == [1, 2, 3]
    assert {"sft/step": 1, "sft/loss": 3.5} in stored
    (first,) = (s for s in stored if s.get("train/step") == 1)
    assert first["train/dpo_loss"] == 0.6512


@pytest.mark.extras
@pytest.mark.filterwarnings("default")
def test_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    pytest.importorskip("trackio", reason="trackio is not installed (an extra)")
    _write(tmp_path, RECORDS, trackio="mine")
    _write(tmp_path, [trained(3)], trackio="mine")
    (path,) = (tmp_path / "trackio").glob("mine*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY rowid").fetchall()
    run_id = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    assert {name for name, _, _ in rows} == {f"{tmp_path.name}-{run_id}"}
    values = [(step, json.loads(stored)) for _, step, stored in rows]
    assert [step for step, stored in values if "train/dpo_loss" in stored] == [1, 2, 3]
    assert values[0][1]["sft/loss"] == 3.5


@pytest.mark.parametrize(
    ("finish", "told"),
    [
        (lambda failed: time.sleep(60), "it has not ended within 0 s"),
        (lambda failed: 1 / 0, "division by zero"),
    ],
)
def test_a_service_that_cannot_be_finished_does_not_keep_a_sound_run(finish, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": lambda *_: ([].append, finish)})
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    _write(tmp_path, RECORDS, wandb="mine")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert line == f"warning: wandb could not be finished ({told}); its last records may be missing there"
