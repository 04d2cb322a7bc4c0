"""The reference computed once: the same run, kept by pair, and never another model's or other data's."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from configs import hhh
from dpo_jax import batches, train
from dpo_jax.errors import Stopped
from dpo_jax.parallel import watchdog
from dpo_jax.records.records import read_records
from dpo_jax.training import reference
from tests.end_to_end.test_train import CLOCK, SMALL

CHANGED = SMALL | {  # 24 pairs to train on, 8 held out
    "batch_size": 8,
    "microbatches": 1,
    "sft_steps": 0,
    "num_steps": 2,
    "eval_every": 2,
    "log_every": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0.0,
    "sample_prompts": 0,
    "kl_prompts": 0,
    "sample_tokens": 8,
    "judge": "",
    "attention": "dense",  # what is quickest to compile
}


def _run(workdir, **changed):
    config = hhh.get_config("tiny")
    config.update(CHANGED | changed)
    train.run(config, workdir)
    return read_records(Path(workdir) / "metrics.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The records of a run with the reference in every step."""
    return _run(tmp_path_factory.mktemp("base") / "run")


def _same(ours, theirs):
    assert [(r["split"], r["step"]) for r in ours] == [(r["split"], r["step"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key, value in a.items():
            if key not in CLOCK and not isinstance(value, str):
                # Accuracy aside: a float32 rounding that depends on the compiled program may tie a pair or not.
                assert b[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (a["split"], a["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"ld_alpha": 0.5}, {"microbatches": 2, "batch_size": 16, "loss": "ipo"}])
def test_the_metrics_are_those_of_a_reference_in_the_step(base, tmp_path, more):
    theirs = base if not more else _run(tmp_path / "in-step", **more)
    _same(_run(tmp_path / "kept", reference_cache=True, **more), theirs)


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_another_model_everything(tmp_path, monkeypatch, capsys):
    kept = {"reference_cache": True, "cache_dir": str(tmp_path / "cache")}
    first = _run(tmp_path / "first", kl_prompts=4, **kept)
    assert "reference: 0 pairs known, 24 to compute" in capsys.readouterr().out

    # Nothing is loaded beside the policy now; more steps ask only for the pairs that are new.
    loads = []
    load = reference.read_reference
    monkeypatch.setattr(reference, "read_reference", lambda *a, **k: loads.append(a) or load(*a, **k))
    _same(_run(tmp_path / "second", kl_prompts=4, **kept), first)
    assert "reference: 24 pairs known, 0 to compute" in capsys.readouterr().out
    assert not loads
    # In the host's memory the reference says the same.
    _same(_run(tmp_path / "offload", reference_offload=True), first)
    assert loads
    _run(tmp_path / "longer", num_steps=3, **kept)
    assert "reference: 24 pairs known, 8 to compute" in capsys.readouterr().out

    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(SMALL["model"], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.001)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    _run(tmp_path / "changed", model=str(other), **kept)
    assert "reference: 0 pairs known, 24 to compute" in capsys.readouterr().out
    _run(tmp_path / "limits", max_prompt_length=40, **kept)
    assert "reference: 0 pairs known" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_during_the_pass_ends_it_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    kept = {"reference_cache": True, "ld_alpha": 0.9}
    compute = reference.computed_values

    def interrupted(*arguments):
        for n, found in enumerate(compute(*arguments)):
            if n == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(reference, "computed_values", interrupted)
    with pytest.raises(Stopped):
        _run(tmp_path / "run", **kept)
    monkeypatch.undo()
    assert "reference: 0 pairs known, 24 to compute" in capsys.readouterr().out
    _run(tmp_path / "run", **kept)
    assert "reference: 16 pairs known, 8 to compute" in capsys.readouterr().out


@pytest.mark.slow
def test_every_batch_is_a_sign_of_life(monkeypatch, tmp_path):
    """A pass over many pairs takes longer than a step, and its first batches are compiled."""
    beats = []
    monkeypatch.setattr(batches, "beat", lambda doing, patience=1.0: beats.append(patience))
    _run(tmp_path / "run", reference_cache=True, cache_dir=str(tmp_path / "cache"), eval_pairs=0, num_steps=4)
    assert len(beats) == 4  # of 8 pairs each
    assert beats[0] == watchdog.LONGER
    assert 1.0 in beats


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "no archive"])
def test_a_damaged_file_counts_as_none_and_says_why(tmp_path, damage):
    where = reference.Place(tmp_path / "reference-x.npz", 300, 1)
    values, why = reference.read_values(where)
    assert np.isnan(values).all()
    assert not why
    values = np.arange(600, dtype=np.float32).reshape(300, 2, 1)
    assert not reference.write_values(where, values)
    read, why = reference.read_values(where)
    np.testing.assert_array_equal(read, values)
    assert not why
    content = where.path.read_bytes()
    for place in range(130, len(content) - 200, 97) if damage == "flipped" else [0]:
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        where.path.write_bytes({"cut": content[:-4], "flipped": flipped, "emptied": b""}.get(damage, b"\0" * 5000))
        read, why = reference.read_values(where)
        assert np.isnan(read).all(), place
        assert "damaged" in why


def test_values_of_another_shape_count_as_none(tmp_path):
    where = reference.Place(tmp_path / "reference-x.npz", 3, 1)
    assert not reference.write_values(where, np.zeros((3, 2, 1), np.float32))
    values, why = reference.read_values(reference.Place(where.path, 4, 1))
    assert np.isnan(values).all()
    assert "not float32 [4, 2, 1]" in why
    assert "directory" in reference.write_values(reference.Place(tmp_path / "absent" / "x.npz", 3, 1), values)
