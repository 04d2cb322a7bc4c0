"""`python -m dpo_jax.plan`, as users run it; compiling itself needs the TPU compiler."""

import json
import re

import numpy as np
import pytest

from dpo_jax.model.families import config_from_hf
from tests.plan.runs import EXPERTS, SMALL, TINY, all_refused, compiler, planned, refused, run_plan, small_run
from tests.plan.traced import traced_flops


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=configs/hhh.py"], "--topology is missing; usage"),
        (["--config=configs/hhh.py", "--topology=v7:2x2"], "topology 'v7:2x2' does not exist; there are v5e:"),
        (["--config=configs/hhh.py", "--topology=v6e:5x5"], "of v6e there are 1x1, 2x2, 2x4"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--lengths=missing.npy"], "--lengths=missing.npy cannot"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--config.compiler_options=x"], "must be NAME=VALUE"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--json=missing/a.json"], "--json=missing/a.json cannot"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--json=tests"], "--json=tests cannot be written"),
        (["--sample", "--config=configs/hhh.py", "--topology=v6e:2x4", "--sample_n=0"], "--sample_n=0; needs at least"),
        (["--sample", "--config=configs/hhh.py"], "--topology is missing; usage"),
    ],
)
def test_bad_input_is_one_line(args, words):
    assert words in refused(*args)


# A pair a row and two rows a chip, which are compiled sooner than more.
FEW = ("batch_size=8", "max_prompt_length=64", "max_completion_length=64")

REFUSED = [
    (["--config.batch_size=60"], "batch_size=60 does not divide over 8 data shards"),
    (["--config.router_aux_loss_coef=0.01"], "has no experts; leave it at 0"),
    (["--config.compiler_options=xla_tpu_typo=true"], "compiler_options: .*xla_tpu_typo"),
    (["--lengths={}"], "batch_size=32 is more than the 7 training pairs"),
    (["--config.num_steps=50", "--config.warmup_steps=60"], "warmup_steps=60 leaves nothing of the 50 updates"),
    (["--config.reference=/nowhere/model"], "reference='/nowhere/model': no such directory"),
    (["--config.reference=Qwen/Qwen2.5-7B"], "Qwen/Qwen2.5-7B is another architecture than the policy .*hidden_si"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What is said of every command of `REFUSED`."""
    lengths = tmp_path_factory.mktemp("lengths") / "lengths.npy"
    np.save(lengths, np.full((7, 3), 5))
    return all_refused([[*TINY, "--topology=v5e:2x4", *(x.format(lengths) for x in changed)] for changed, _ in REFUSED])


@compiler
@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[changed[0] for changed, _ in REFUSED])
def test_what_training_refuses_is_refused_before_compiling_in_one_line(number, lines):
    assert re.search(REFUSED[number][1], lines[number]), lines[number]


@compiler
def test_it_reports_what_the_step_needs_and_could_do(tmp_path):
    """On two slices: gradients cross the network between them."""
    run = (SMALL, "v5e:2x2*2", "mesh_data=2", *FEW)
    (asked,) = traced_flops(*small_run(tmp_path, *run))
    r, printed = planned(tmp_path, *run)
    assert r["topology"] == "v5e:2x2*2"
    assert f"{r['topology']} ({r['accelerator_type']}, {r['chips']} chips" in printed
    assert r["fits"]
    assert r["not_counted"] == []
    # The compiled program does what the traced one asks for; XLA drops or repeats a few per cent.
    assert r["flops"] == pytest.approx(asked, rel=0.12)
    memory, count = r["memory"], config_from_hf(SMALL, "small").parameter_count()
    # float32 parameters and two moments, a bfloat16 reference, over a slice's chips; small ones are on all of them.
    for name, size in (("parameters", 4), ("optimizer", 8), ("reference", 2)):
        assert memory[name] == pytest.approx(size * count / 4, rel=0.02), name
    assert sum(memory[n] for n in ("parameters", "optimizer", "reference", "activations")) == memory["total"]
    assert r["seconds"][r["binds"]] == max(r["seconds"].values())
    assert r["pairs_per_second"] == pytest.approx(8 / max(r["seconds"].values()), rel=0.1)
    assert r["hours"] == pytest.approx(32 / r["pairs_per_second"] / 3600)
    assert r["headroom"] == r["hbm_available"] - max(memory["total"], memory["largest_shape_total"])
    assert f"headroom {r['headroom'] / 2**30:.2f}" in printed
    # Each device sums its share of the gradients with one other: it receives as much as it has, in 16 or 32 bits.
    (crossing,) = r["network_bytes"].values()
    assert 2 * count / 4 < crossing < 4.1 * count / 4
    assert r["seconds"]["network"] == pytest.approx(crossing / 3.125e9)
    assert "network between slices: all-reduce" in printed
    # A forward pass of the policy alone: a third of its gradient, less the reference's.
    assert r["evaluation_pairs_per_second"] > 2 * r["pairs_per_second"]


@compiler
def test_what_does_not_fit_is_named(tmp_path):
    """On any of several topologies."""
    large = ["--config=configs/hhh.py:llama3.1-8b", "--config.batch_size=8", "--topology=v5e:2x2,v6e:2x2"]
    done = run_plan(*large, f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    r, larger = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    assert (r["topology"], larger["topology"]) == ("v5e:2x2", "v6e:2x2")
    assert larger["hbm_available"] > r["hbm_available"]
    for one in (r, larger):
        assert f"{one['topology']} ({one['accelerator_type']}, {one['chips']} chips" in done.stdout
        assert one["fits"] is False
    (rows, *_) = sorted(r["rows"], key=lambda row: -row["share"])
    assert re.fullmatch(
        rf"step with rows of \[{rows['prompt']}\|{rows['chosen']}\|{rows['rejected']}\]: needs .*G of 15.75G", r["why"]
    )
    assert r["memory"]["optimizer"] == pytest.approx(8 * 8_030_261_248 / 4, rel=0.01)
    assert f"too large     {r['why']} (more than there is before any activation)" in done.stdout
    assert "optimizer most" in done.stdout


@compiler
def test_experts_multiply_their_own_rows_whatever_attention_runs(tmp_path):
    """XLA's gradient of their weights would do more than the traced program asks for: every row for every expert."""
    run = (EXPERTS, "v5e:2x2", "attention=dense", *FEW)
    r, _ = planned(tmp_path, *run)
    assert [r["flops"]] == pytest.approx(traced_flops(*small_run(tmp_path, *run)), rel=0.12)


@compiler
def test_all_offloads_together_compile(tmp_path):
    """A layer at a time comes from the host's memory, in a loop over layers inside one over microbatches."""
    offloads = ["reference_offload=True", "optimizer_offload=True", "remat=attention_offload", "microbatches=2"]
    r, _ = planned(tmp_path, SMALL, "v5e:2x2", *offloads, *FEW)
    count = config_from_hf(SMALL, "small").parameter_count()
    # Norms are small, and alone stay on the devices: of the moments only the count of updates.
    assert r["memory"]["optimizer"] < 100
    assert r["memory"]["reference"] < 0.02 * 2 * count / r["chips"]
    assert r["memory"]["host"] > (8 + 2) * count / r["chips"]
    assert r["seconds"]["host"] > 0
    assert r["network_bytes"] == {}
