"""The compile-only plan, run as users run it; compiling itself needs the TPU compiler."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax import plan
from dpo_jax.errors import UserError
from dpo_jax.known import LENGTHS, MODELS, draw_lengths
from tests import processes

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'"
)
TINY = [
    "--config=configs/hhh.py:smollm2-135m",
    "--config.max_prompt_length=256",
    "--config.max_completion_length=128",
    "--config.batch_size=32",
]


def _plan(*args):
    command = [sys.executable, "-m", "dpo_jax.plan", *args]
    return subprocess.run(command, env=processes.of_a_user(), capture_output=True, text=True, timeout=600)


def _refused(*args):
    done = _plan(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=configs/hhh.py"], "--topology is missing; usage"),
        (["--config=configs/hhh.py", "--topology=v7:2x2"], "topology 'v7:2x2' does not exist; there are v5e:"),
        (["--config=configs/hhh.py", "--topology=v6e:5x5"], "of v6e there are 1x1, 2x2, 2x4"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--lengths=missing.npy"], "--lengths=missing.npy cannot"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--config.compiler_options=x"], "must be NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line(args, words):
    assert words in _refused(*args)


@compiler
def test_a_batch_that_does_not_divide_is_one_line():
    found = _refused(*TINY, "--topology=v5e:2x4", "--config.batch_size=60")
    assert "batch_size=60 does not divide over 8 data shards" in found


@compiler
def test_it_reports_what_the_step_needs_and_could_do(tmp_path):
    done = _plan(*TINY, "--topology=v5e:2x4,v5p:2x2x1", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    assert (first["topology"], second["topology"]) == ("v5e:2x4", "v5p:2x2x1")
    for r in (first, second):
        assert f"{r['topology']} ({r['accelerator_type']}, {r['chips']} chips" in done.stdout
        assert r["fits"]
        assert r["not_counted"] == []
        # The compiled program does what the traced one asks for; XLA drops or repeats a few per cent.
        assert r["flops"] == pytest.approx(r["flops_traced"], rel=0.12)
        memory, parameters = r["memory"], MODELS["HuggingFaceTB/SmolLM2-135M-Instruct"]
        count = 134_515_008
        assert parameters["num_hidden_layers"] == 30
        # float32 parameters and two moments, a bfloat16 reference, over the chips; norms and counts lie everywhere.
        for name, size in (("parameters", 4), ("optimizer", 8), ("reference", 2)):
            assert memory[name] == pytest.approx(size * count / r["chips"], rel=0.01), name
        assert sum(memory[n] for n in ("parameters", "optimizer", "reference", "activations")) == memory["total"]
        assert r["seconds"][r["binds"]] == max(r["seconds"].values())
        assert r["pairs_per_second"] == pytest.approx(32 / max(r["seconds"].values()), rel=0.1)
        assert r["hours"] == pytest.approx(160_800 / r["pairs_per_second"] / 3600)
    # A forward pass of the policy alone: a third of its gradient, less the reference's.
    assert first["evaluation_pairs_per_second"] > 2 * first["pairs_per_second"]


def test_drawn_lengths_are_those_of_the_quantiles():
    for dataset, (_, quantiles) in LENGTHS.items():
        drawn = draw_lengths(dataset, (10_000, 10_000), 40_000)
        for column, q in zip(drawn.T, quantiles, strict=True):
            np.testing.assert_allclose(
                np.quantile(column, [0.25, 0.5, 0.75, 0.99]), np.array(q)[[8, 16, 24, 33]], rtol=0.05
            )
        assert draw_lengths(dataset, (64, 32), 1000).max(0).tolist() == [64, 32, 32]


def test_lengths_of_a_file(tmp_path):
    np.save(tmp_path / "lengths.npy", np.full((7, 3), 5, np.int32))
    found = plan._read_lengths(str(tmp_path / "lengths.npy"))
    assert (len(found), found.pairs) == (7, 7)
    np.save(tmp_path / "wrong.npy", np.zeros((7, 2)))
    with pytest.raises(UserError, match=r"float64 \(7, 2\); needed are integers \[pairs, 3\]"):
        plan._read_lengths(str(tmp_path / "wrong.npy"))


def test_known_models_have_their_published_sizes():
    sizes = {name.split("/")[1]: plan.find_model({"model": name}).parameter_count() for name in MODELS}
    assert sizes == {
        "SmolLM2-135M-Instruct": 134_515_008,
        "SmolLM2-1.7B-Instruct": 1_711_376_384,
        "Llama-3.1-8B-Instruct": 8_030_261_248,
        "Llama-3.1-70B-Instruct": 70_553_706_496,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen3-32B": 32_762_123_264,
    }


def test_the_search_needs_few_compiles_and_is_exact():
    """Against a made-up memory: what a batch needs, in pairs of one unit."""
    tried = []

    def need(batch):
        tried.append(batch)
        return batch * 1.0 if batch <= 1000 else None

    fitting, too_large = plan._bracket(need, 64, 8, 100_000)
    assert max(fitting) <= 1000
    assert tried[0] == 64
    assert plan._bracket(lambda b: None, 64, 8, 100_000)[0] == {}
    assert plan._bracket(lambda b: b if b <= 16 else None, 64, 8, 100_000) == ({16: 16}, 32)
    assert too_large > max(fitting)
