"""The compile-only plan, run as users run it; compiling itself needs the TPU compiler."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hhh
from dpo_jax.config.settings import read_settings
from dpo_jax.errors import UserError
from dpo_jax.model.attention.dense import Slots
from dpo_jax.model.families import config_from_hf
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import abstract_whole, place_model
from dpo_jax.model.tuning import exact_products, passes
from dpo_jax.parallel.mesh import make_mesh, replicated
from dpo_jax.parallel.tpu import GENERATIONS, parse_topology, quiet
from dpo_jax.plan import command as plan
from dpo_jax.plan import compile as compile_only
from dpo_jax.plan.known import LENGTHS, MODELS, PAIRS, draw_lengths
from dpo_jax.plan.lengths import DRAWN_PAIRS, find_lengths
from dpo_jax.plan.search import largest_batch
from dpo_jax.rows.schedule import RowShape
from dpo_jax.training.setup import make_layout, make_models, make_objective, make_optimizer
from dpo_jax.training.step import make_logps_step
from tests import processes
from tests.oracles import oracle
from tests.plan.traced import traced_flops

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'"
)


def compiler(test):
    """A test that compiles for TPUs, or asks their compiler."""
    return pytest.mark.slow(needs_compiler(test))


COUNT = 134_515_008  # parameters of SmolLM2-135M
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
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--json=missing/a.json"], "--json=missing/a.json cannot"),
        (["--config=configs/hhh.py", "--topology=v6e:2x4", "--json=tests"], "--json=tests cannot be written"),
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
    traced = traced_flops(*TINY, "--topology=v5e:2x4,v5p:2x2x1")
    done = _plan(*TINY, "--topology=v5e:2x4,v5p:2x2x1", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    assert (first["topology"], second["topology"]) == ("v5e:2x4", "v5p:2x2x1")
    for r, asked in zip((first, second), traced, strict=True):
        assert f"{r['topology']} ({r['accelerator_type']}, {r['chips']} chips" in done.stdout
        assert r["fits"]
        assert r["not_counted"] == []
        # The compiled program does what the traced one asks for; XLA drops or repeats a few per cent.
        assert r["flops"] == pytest.approx(asked, rel=0.12)
        memory, parameters = r["memory"], MODELS["HuggingFaceTB/SmolLM2-135M-Instruct"]
        assert parameters["num_hidden_layers"] == 30
        # float32 parameters and two moments, a bfloat16 reference, over the chips; norms and counts lie everywhere.
        for name, size in (("parameters", 4), ("optimizer", 8), ("reference", 2)):
            assert memory[name] == pytest.approx(size * COUNT / r["chips"], rel=0.01), name
        assert sum(memory[n] for n in ("parameters", "optimizer", "reference", "activations")) == memory["total"]
        assert r["seconds"][r["binds"]] == max(r["seconds"].values())
        assert r["pairs_per_second"] == pytest.approx(32 / max(r["seconds"].values()), rel=0.1)
        assert r["hours"] == pytest.approx(160_800 / r["pairs_per_second"] / 3600)
        assert r["headroom"] == r["hbm_available"] - max(memory["total"], memory["largest_shape_total"])
        assert f"headroom {r['headroom'] / 2**30:.2f}" in done.stdout
        assert r["network_bytes"] == {}
    # A forward pass of the policy alone: a third of its gradient, less the reference's.
    assert first["evaluation_pairs_per_second"] > 2 * first["pairs_per_second"]


@compiler
def test_what_does_not_fit_is_named(tmp_path):
    large = ["--config=configs/hhh.py:llama3.1-8b", "--config.batch_size=8", "--topology=v5e:2x2"]
    done = _plan(*large, f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    (r,) = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    assert r["fits"] is False
    (rows, *_) = sorted(r["rows"], key=lambda row: -row["share"])
    assert re.fullmatch(
        rf"step with rows of \[{rows['prompt']}\|{rows['chosen']}\|{rows['rejected']}\]: needs .*G of 15.75G", r["why"]
    )
    assert r["memory"]["optimizer"] == pytest.approx(8 * 8_030_261_248 / 4, rel=0.01)
    assert f"too large     {r['why']} (more than there is before any activation)" in done.stdout
    assert "optimizer most" in done.stdout


def _small(directory, model, topology, *options):
    """The arguments for a model given by its config, over 32 pairs of one length: rows of one shape."""
    (directory / "config.json").write_text(json.dumps(model))
    np.save(directory / "lengths.npy", np.full((32, 3), 60))
    files = [f"--config.model={directory}", f"--lengths={directory / 'lengths.npy'}"]
    return [*TINY, *files, f"--topology={topology}", *(f"--config.{x}" for x in options)]


def _planned(directory, *model_topology_options):
    """What is reported of a `_small` model, and what is printed."""
    done = _plan(*_small(directory, *model_topology_options), f"--json={directory / 'a.json'}")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((directory / "a.json").read_text())["topologies"]
    return report, done.stdout


EXPERTS = {
    "model_type": "qwen3_moe", "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 16,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip


@compiler
def test_experts_multiply_their_own_rows_whatever_attention_runs(tmp_path):
    """XLA's gradient of their weights would do more than the traced program asks for: every row for every expert."""
    planned = (EXPERTS, "v5e:2x2", "attention=dense")
    r, _ = _planned(tmp_path, *planned)
    assert [r["flops"]] == pytest.approx(traced_flops(*_small(tmp_path, *planned)), rel=0.12)


SMALL = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 576, "num_hidden_layers": 4, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 768, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip


@compiler
def test_all_offloads_together_compile(tmp_path):
    """A layer at a time comes from the host's memory, in a loop over layers inside one over microbatches."""
    offloads = ["reference_offload=True", "optimizer_offload=True", "remat=attention_offload", "microbatches=2"]
    r, _ = _planned(tmp_path, SMALL, "v5e:2x2", *offloads)
    count = config_from_hf(SMALL, "small").parameter_count()
    # Norms are small, and alone stay on the devices: of the moments only the count of updates.
    assert r["memory"]["optimizer"] < 100
    assert r["memory"]["reference"] < 0.02 * 2 * count / r["chips"]
    assert r["memory"]["host"] > (8 + 2) * count / r["chips"]
    assert r["seconds"]["host"] > 0


@compiler
def test_gradients_cross_the_network_between_slices(tmp_path):
    r, printed = _planned(tmp_path, SMALL, "v5e:2x2*2", "mesh_data=2")
    assert r["not_counted"] == []
    # Each device sums its share of them with one other: it receives as much as it has, in bfloat16 or float32.
    (crossing,) = r["network_bytes"].values()
    share = config_from_hf(SMALL, "small").parameter_count() / 4
    assert 2 * share < crossing < 4.1 * share
    assert r["seconds"]["network"] == pytest.approx(crossing / 3.125e9)
    assert "network between slices: all-reduce" in printed


@compiler
def test_a_pass_of_a_reference_in_host_memory_compiles():
    """The one that is made once over the held-out pairs."""
    processes.run_all(_compile_a_pass, [()])  # of its own: libtpu puts handlers on signals


def _compile_a_pass():
    c = _config(reference_offload=True, batch_size=8, compute_dtype="bfloat16")
    mesh = make_mesh(1, -1, 1, parse_topology("v5e:2x2").devices())
    layout = make_layout(c, config_from_hf(SMALL, "small"), mesh)
    step = make_logps_step(
        make_models(c, layout)[1],
        compute_dtype=layout.dtype,
        out_shardings=replicated(mesh),
        compiler_options=layout.compiler_options,
    )
    batch = compile_only.abstract_batch(RowShape(4, 128, 64, 64, 2), layout, 1)
    with jax.set_mesh(mesh), quiet():
        compiled = step.trace(abstract_whole(layout, layout.dtype), batch, Slots(128, 64, 64)).lower().compile()
    assert compiled.memory_analysis().host_argument_size_in_bytes > 0


def _config(**changed):
    return read_settings(dict(hhh.get_config("smollm2-135m")) | changed)


def test_drawn_lengths_are_those_of_the_quantiles():
    for dataset, quantiles in LENGTHS.items():
        drawn = draw_lengths(dataset, 40_000)
        for column, q in zip(drawn.T, quantiles, strict=True):
            np.testing.assert_allclose(
                np.quantile(column, [0.25, 0.5, 0.75, 0.99]), np.array(q)[[8, 16, 24, 33]], rtol=0.05
            )


def test_published_lengths_are_cut_or_dropped_as_the_data_would_be():
    limits = {"max_prompt_length": 64, "max_completion_length": 32}
    cut = find_lengths(_config(**limits))
    assert cut.lengths.max(0).tolist() == [64, 32, 32]
    assert (len(cut), cut.pairs) == (DRAWN_PAIRS, 160_800)
    kept = find_lengths(_config(overlong="drop", **limits))
    assert kept.lengths.max(0).tolist() == [64, 32, 32]
    within = (draw_lengths("hhh", DRAWN_PAIRS) <= [64, 32, 32]).all(1).mean()
    assert kept.pairs / 160_800 == pytest.approx(within, rel=1e-3)


def test_enough_lengths_are_drawn_for_a_batch():
    """However few pairs the limits keep, and whatever a mixture leaves out."""
    few = {"overlong": "drop", "max_prompt_length": 40, "max_completion_length": 12}
    found = find_lengths(_config(batch_size=128, **few))
    assert len(found) == found.pairs > 128  # a sample would hold a few dozen of them: all were drawn
    assert len(find_lengths(_config(batch_size=16_384))) >= 8 * 16_384
    uneven = find_lengths(_config(dataset="hhh:0.02,ultrafeedback:0.98", batch_size=8192, drop_remainder=False))
    assert uneven.mixture.epoch_size(1, False) >= min(8 * 8192, uneven.pairs)


def test_subsets_and_mixtures_have_their_own_epochs():
    assert find_lengths(_config(dataset="hhh/harmless-base,helpful-online")).pairs == 42_537 + 22_007
    assert sum(PAIRS["hhh"].values()) == 160_800
    found = find_lengths(_config(dataset="hhh:0.5,ultrafeedback:0.5", drop_remainder=False))
    assert found.pairs == 2 * 61_135  # the scarcer part once, as much of the other
    assert found.mixture is not None
    assert found.mixture.sizes.sum() == len(found)
    assert found.mixture.sizes[0] / found.mixture.sizes[1] == pytest.approx(160_800 / 61_135, rel=1e-3)
    # Other lengths than HH's alone: an answer of UltraFeedback is several times as long.
    mixed = found.lengths[found.mixture.members(1000, 0, 0, shuffle=True)]
    assert mixed[:, 1].mean() > 2 * find_lengths(_config()).lengths[:, 1].mean()


def test_lengths_of_a_file(tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words) as e:
            find_lengths(_config(), str(tmp_path / "lengths.npy"))
        assert "\n" not in str(e.value)

    np.save(tmp_path / "lengths.npy", np.full((7, 3), 5, np.int32))
    found = find_lengths(_config(max_completion_length=4), str(tmp_path / "lengths.npy"))
    assert (len(found), found.pairs, found.lengths.max(0).tolist()) == (7, 7, [5, 4, 4])
    with pytest.raises(UserError, match="leaves none of its pairs"):
        find_lengths(_config(max_completion_length=4, overlong="drop"), str(tmp_path / "lengths.npy"))
    np.save(tmp_path / "lengths.npy", np.zeros((7, 2)))
    refused(r"float64 \(7, 2\); needed are integers \[pairs, 3\]")
    np.save(tmp_path / "lengths.npy", np.full((7, 3), -1))
    refused("holds -1; prompts and completions have one token or more")
    for content in (b"", b"PK\x03\x04 no archive", b"no array"):
        (tmp_path / "lengths.npy").write_bytes(content)
        refused("lengths.npy cannot be read")
    with (tmp_path / "lengths.npy").open("wb") as f:
        np.savez(f, lengths=np.ones((7, 3), int))
    refused("an archive of arrays")


@compiler
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--config.router_aux_loss_coef=0.01"], "has no experts; leave it at 0"),
        (["--config.compiler_options=xla_tpu_typo=true"], "compiler_options: .*xla_tpu_typo"),
        (["--lengths={}"], "batch_size=32 is more than the 7 training pairs"),
        (["--config.num_steps=50", "--config.warmup_steps=60"], "warmup_steps=60 leaves nothing of the 50 updates"),
        (["--config.reference=/nowhere/model"], "reference='/nowhere/model': no such directory"),
        (["--config.reference=Qwen/Qwen2.5-7B"], "Qwen/Qwen2.5-7B is another architecture than the policy .*hidden_si"),
    ],
)
def test_what_training_refuses_is_refused_before_compiling(changed, words, tmp_path):
    np.save(tmp_path / "lengths.npy", np.full((7, 3), 5))
    found = _refused(*TINY, "--topology=v5e:2x4", *(x.format(tmp_path / "lengths.npy") for x in changed))
    assert re.search(words, found), found


@compiler
def test_every_slice_takes_every_mesh():
    """Also those for which an axis of the torus must be cut, as four chips in a line into two and two."""
    processes.run_all(_lay_out_every_mesh, [()])  # of its own: libtpu puts handlers on signals


def _lay_out_every_mesh():
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            topology = parse_topology(f"{generation.name}:{shape}")
            if topology.chips * generation.devices > 256:
                continue
            for several in (topology, dataclasses.replace(topology, slices=2)):
                devices = several.devices()
                for tensor in (2, 4, 8):
                    if len(devices) // several.slices % tensor == 0:
                        mesh = make_mesh(several.slices, -1, tensor, devices)
                        assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}, (several.name, tensor)


def _layout(c):
    return make_layout(c, plan.find_model(c.model), make_mesh(1, 1, 1, jax.devices()[:1]))


ADAPTERS = 4_884_480  # of rank 16, as PEFT counts them
LORA = {"lora_rank": 16, "lora_alpha": 32.0}


@pytest.mark.parametrize(
    ("changed", "parameters", "optimizer", "reference"),
    [
        ({}, 4 * COUNT, 8 * COUNT, 4 * COUNT),
        ({"param_dtype": "bfloat16"}, 2 * COUNT, 8 * COUNT, 4 * COUNT),
        ({"compute_dtype": "bfloat16"}, 4 * COUNT, 8 * COUNT, 2 * COUNT),
        ({"reference_cache": True}, 4 * COUNT, 8 * COUNT, 0),
        ({"loss": "simpo"}, 4 * COUNT, 8 * COUNT, 0),
        (LORA, 4 * ADAPTERS, 8 * ADAPTERS, 4 * COUNT),
        (LORA | {"sft_steps": 5}, 4 * ADAPTERS, 8 * ADAPTERS, 4 * (COUNT + ADAPTERS)),
        (LORA | {"reference": "owner/other"}, 4 * ADAPTERS, 8 * ADAPTERS, 2 * 4 * COUNT),
    ],
)
def test_what_a_run_holds_all_the_time(changed, parameters, optimizer, reference):
    c = _config(**{"sft_steps": 0} | changed)
    tx, _ = make_optimizer(c.optimizer, 10)
    held = compile_only.held_by(c, _layout(c), make_objective(c.objective), tx)
    assert (held.parameters, held.reference) == (parameters, reference)
    assert held.optimizer == pytest.approx(optimizer, abs=16)  # and a count or two


@pytest.mark.parametrize(
    ("changed", "needed"),
    [({}, 8), ({"reference_cache": True}, 6), ({"loss": "simpo"}, 6), (LORA, 6), (LORA | {"reference_cache": True}, 4)],
)
def test_what_a_step_needs_at_least(changed, needed):
    c = _config(**changed)
    assert plan.operations(c, _layout(c), make_objective(c.objective)) == needed


@pytest.mark.parametrize(("experts", "tensor", "share"), [(8, 4, 1 / 4), (6, 4, 1.0), (8, 1, 1.0), (0, 4, 1.0)])
def test_a_device_has_its_share_of_the_experts_rows(experts, tensor, share):
    """Whole experts are spread where their number divides, else a part of each: then every device has all rows."""
    config = dataclasses.replace(oracle.CONFIG, num_attention_heads=4, intermediate_size=32, num_experts=experts)
    mesh = make_mesh(1, 8 // tensor, tensor)
    layout = place_model(config, mesh, LayoutOptions(compute_dtype="float32"))
    assert compile_only.experts_share(layout) == share


@pytest.mark.parametrize(("limits", "kernel"), [((1024, 512), True), ((2048, 512), False)])
def test_the_kernel_attends_unless_a_sequence_goes_beyond_a_window(limits, kernel):
    """Not because rows of several pairs are wide."""
    c = _config(attention="splash", max_prompt_length=limits[0], max_completion_length=limits[1])
    model = dataclasses.replace(plan.find_model(c.model), sliding_window=2047, sliding_layers=(True,) * 30)
    layout = make_layout(c, model, make_mesh(1, 1, 1, jax.devices()[:1]))
    assert layout.uses_kernel(Slots(4096, 2048, 2048)) is kernel
    assert dataclasses.replace(layout, config=plan.find_model(c.model)).uses_kernel(Slots(4096, 2048, 2048))


def test_float32_products_are_not_rounded_on_accelerators():
    product = jax.make_jaxpr(lambda x: x @ x)
    for platform, dtype, exact in (("tpu", "float32", True), ("tpu", "bfloat16", False), ("cpu", "float32", False)):
        with exact_products(jnp.dtype(dtype), platform):
            assert ("HIGHEST" in str(product(jnp.ones((2, 2))))) is exact
        assert passes(jnp.dtype(dtype), platform) == (6 if exact else 1)


def test_known_models_have_their_published_sizes():
    sizes = {name.split("/")[1]: plan.find_model(name).parameter_count() for name in MODELS}
    assert sizes == {
        "SmolLM2-135M-Instruct": 134_515_008,
        "SmolLM2-1.7B-Instruct": 1_711_376_384,
        "Llama-3.1-8B-Instruct": 8_030_261_248,
        "Llama-3.1-70B-Instruct": 70_553_706_496,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen3-32B": 32_762_123_264,
    }


MEMORIES = {
    "even": lambda b: 100 + 0.9 * b,
    "flat, then steep": lambda b: max(500, 1.9 * b),
    "steeper and steeper": lambda b: 300 + 0.3 * b + (b / 50) ** 2,
    "in steps": lambda b: 200 + 100 * (b // 128),
    "never too much": lambda b: 10,
    "always too much": lambda b: 2000,
}


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize(("start", "unit"), [(64, 8), (8, 8), (480, 16), (768, 1)])
def test_the_search_finds_the_largest_batch(name, start, unit):
    memory, room, pairs, tried = MEMORIES[name], 1000.0, 5003, []

    def need(batch):
        tried.append(batch)
        return float(memory(batch)) if memory(batch) <= room else None

    fitting = [b for b in range(unit, pairs + 1, unit) if memory(b) <= room]
    assert largest_batch(need, start, unit, pairs, room) == max(fitting, default=0)
    assert len(tried) == len(set(tried)) <= 20
    assert all(batch % unit == 0 and unit <= batch <= pairs for batch in tried)
