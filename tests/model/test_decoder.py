"""Every family without torch: recorded models in packed rows, in the sampler, in bfloat16, under remat, on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.model.placement import axis_rules, param_shardings
from dpo_jax.objective.logps import group_logps
from dpo_jax.objective.objective import preference_objective
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.training.step import init_state, make_train_step
from dpo_jax.weights import huggingface as weights
from tests.model import families
from tests.model.families import (
    GOLDEN,
    TextPairs,
    difference,
    greedy,
    load,
    row_logits,
    sequence_logits,
    sweep,
    unpacked,
)

# One of each kind; `test_families.py` has packed rows of every family, and greedy answers, beside transformers.
NAMES = ["qwen2_window", "gemma3_text", "phi3_longrope", "mixtral"]
PAIRS = TextPairs(96)


def golden(name: str) -> tuple[ModelConfig, dict]:
    config, _ = weights.read_config(GOLDEN / name)
    return config, load(GOLDEN / name, config)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_are_plain_sequences(name):
    config, params = golden(name)
    rows, slots = families.batch(PAIRS)
    packed = unpacked(row_logits(params, rows, config, slots), rows, slots)
    assert difference(packed, sequence_logits(params, config, PAIRS.sequences())) < 2e-5


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_the_sampler_is_the_whole_model_run_again(name):
    config, params = golden(name)
    prompts = [PAIRS.ids[0][0][:n].tolist() for n in (30, 3, 26)]
    answers = greedy(config, params, prompts, 8)
    whole = sequence_logits(params, config, [np.array(p + a) for p, a in zip(prompts, answers, strict=True)])
    for prompt, answer, logits in zip(prompts, answers, whole, strict=True):
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("mistral_window", {"sliding_window": 0}),
        ("mistral_window", {"sliding_window": 8}),
        ("qwen2_window", {"sliding_layers": (True, True)}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": None}),
        ("gemma2", {"hidden_act": "gelu"}),
        ("gemma2", {"sliding_layers": (False, True, True)}),
        ("gemma3_text", {"rope_local_theta": 1000.0}),
        ("gemma3_text", {"rope_scaling": ()}),
        ("phi3_longrope", {"partial_rotary_factor": 0.5}),
        ("mixtral", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
    ],
)
def test_every_number_of_a_family_matters(name, without):
    config, params = golden(name)
    changed = dataclasses.replace(config, **without)
    if name == "phi3_longrope":  # as many factors as are rotated
        cut = {k: v[:4] if isinstance(v, tuple) else v for k, v in config.rope_scaling}
        changed = dataclasses.replace(changed, rope_scaling=tuple(sorted(cut.items())))
    ids = PAIRS.sequences()[:1]
    least = 1e-6 if "hidden_act" in without else 1e-2  # the two kinds of gelu are close
    assert difference(sequence_logits(params, config, ids), sequence_logits(params, changed, ids)) > least


@pytest.mark.parametrize("window", [5, 200])
def test_a_window_that_no_row_reaches_costs_nothing(window):
    """Decided by the row's widths: the mask has no term for it."""
    config, params = golden("mistral_window")
    config = dataclasses.replace(config, sliding_window=window)
    rows, slots = families.batch(PAIRS)
    forward = jax.make_jaxpr(lambda p: hidden_states(p, rows, slots, ModelOptions(config))[0])
    no_window = ModelOptions(dataclasses.replace(config, sliding_window=0, sliding_layers=()))
    plain = jax.make_jaxpr(lambda p: hidden_states(p, rows, slots, no_window)[0])
    same = str(forward(params)).count(" lt ") == str(plain(params)).count(" lt ")
    assert same is (window > slots.prompt + slots.completions[0])
    # Rows of several pairs have more room than a sequence has tokens.
    known = jax.make_jaxpr(lambda p: hidden_states(p, rows, slots, ModelOptions(config, longest=5))[0])
    assert str(known(params)).count(" lt ") == str(plain(params)).count(" lt ")


def test_longrope_looks_at_each_pair_alone():
    """The long factors count in pairs longer than the original context, whatever else is in the batch."""
    config, params = golden("phi3_longrope")
    short = [PAIRS.ids[0][0][:9], PAIRS.ids[1][0][:20]]
    alone = [sequence_logits(params, config, [ids])[0] for ids in short]
    together = sequence_logits(params, config, [*short, PAIRS.sequences()[0]])
    assert difference(together[:2], alone) < 2e-5
    no_scaling = dataclasses.replace(config, rope_scaling=())
    assert difference(sequence_logits(params, no_scaling, short), alone) > 1e-2


@pytest.mark.sweep
@pytest.mark.parametrize("name", sweep(["gemma2", "phi3", "qwen3_moe"], "gemma2"))
def test_bfloat16(name):
    config, params = golden(name)
    rows, slots = families.batch(PAIRS)
    exact = row_logits(params, rows, config, slots)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    half = row_logits(params, rows, config, slots, jnp.bfloat16)
    assert difference([np.concatenate(unpacked(half, rows, slots))], [np.concatenate(unpacked(exact, rows, slots))]) < 1


def _loss(params, rows, config, slots, remat="none"):
    """A number that every hidden state matters to; the hidden states, and the load-balancing sums if there are any."""
    model = ModelOptions(config, remat=remat)
    hidden, sums = hidden_states(params, rows, slots, model, balance=config.num_experts > 0)
    return jnp.sum(jnp.sin(hidden) * (rows.segments != 0)[..., None]), (hidden, sums or {})


_grad = jax.jit(jax.grad(_loss, has_aux=True), static_argnums=(2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "mixtral"])
def test_remat_changes_no_gradient(name):
    config, params = golden(name)
    rows, slots = families.batch(PAIRS)
    grads = [_grad(params, rows, config, slots, remat)[0] for remat in ("none", "dots", "full")]
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), other, grads[0])


@pytest.mark.sweep
@pytest.mark.parametrize("name", sweep(["gemma3_text", "mixtral", "phi3_longrope"], "mixtral"))
def test_gradients_of_microbatches_add_up(name):
    """Added where they arise, whatever a family's layers are handed. The update is the gradient itself."""
    config, params = golden(name)
    rows, slots = families.batch(PAIRS)
    reference = jax.tree.map(lambda p: p * 1.05, params)

    def logps(params, micro, slots):
        hidden, _ = hidden_states(params, micro, slots, ModelOptions(config, remat="dots"))
        return group_logps(hidden, micro, unembedding(params), slots)

    objective = preference_objective({"sigmoid": 1.0}, beta=0.1)
    step = make_train_step(logps, objective, optax.sgd(1.0), lambda _: 1.0, compute_dtype=jnp.float32)
    updated = []
    for microbatches in (1, 2):
        batch = rows.map(lambda x, m=microbatches: x.reshape(m, -1, *x.shape[1:]))
        state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(1.0))
        updated.append(step(state, reference, batch, slots)[0].params)
    gradients = [jax.tree.map(lambda after, before: np.asarray(after - before), tree, params) for tree in updated]
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients[0]))
    assert largest > 1e-3
    close = functools.partial(np.testing.assert_allclose, atol=2e-6 * max(1.0, largest), rtol=1e-4)
    jax.tree.map(close, gradients[1], gradients[0])


@functools.cache
def on_one_device(name: str):
    config, params = golden("mixtral" if name == "three experts" else name)
    if name == "three experts":
        config = dataclasses.replace(config, num_experts=3)
        cut = {k: v[:, :, :3] if k == "router" else v[:, :3] for k, v in params["layers"]["mlp"].items()}
        params = params | {"layers": params["layers"] | {"mlp": cut}}
    rows, slots = families.batch(PAIRS)
    rows = rows.map(lambda x: jnp.tile(x, (4,) + (1,) * (x.ndim - 1)))
    return config, params, rows, slots, jax.device_get(_grad(params, rows, config, slots))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gemma3_text", (2, 2, 2)),
        ("three experts", (2, 2, 2)),  # they do not divide: the ffn of each is spread
        ("mixtral", (1, 8, 1)),
        ("olmo2", (2, 2, 2)),
        ("qwen3_moe", (2, 2, 2)),
    ],
)
def test_a_mesh_changes_nothing(name, sizes):
    """Hidden states, gradients and the load-balancing sums."""
    config, params, rows, slots, (grads, (hidden, sums)) = on_one_device(name)
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    shardings = param_shardings(config, mesh)
    if name in ("mixtral", "qwen3_moe"):
        assert shardings["layers"]["mlp"]["gate"].spec[1] == "tensor"
    with jax.set_mesh(mesh), nn.logical_axis_rules(axis_rules(config, mesh)):
        # Its own jit: the rules are no argument, and what is compiled without them must not be found.
        run = jax.jit(lambda p, rows: jax.grad(_loss, has_aux=True)(p, rows, config, slots))
        found_grads, (found, found_sums) = jax.device_get(run(jax.device_put(params, shardings), rows))
    real = np.asarray(rows.segments != 0)
    np.testing.assert_allclose(found[real], hidden[real], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found_sums, sums)
    jax.tree.map(lambda a, b: np.testing.assert_array_less(np.linalg.norm(a - b), 1e-4 * np.linalg.norm(b) + 1e-9),
                 found_grads, grads)  # fmt: skip


@pytest.mark.slow
def test_packed_rows_count_every_real_token_once():
    config, params = golden("qwen3_moe")
    rows, slots = families.batch(PAIRS)
    sums_of = lambda rows: hidden_states(params, rows, slots, ModelOptions(config), balance=True)[1]
    sums = sums_of(rows)
    real = int((rows.segments != 0).sum())
    assert sums["tokens"] == real * config.num_hidden_layers
    np.testing.assert_allclose(sums["assigned"].sum(), real * config.num_hidden_layers * config.num_experts_per_tok)
    parts = [sums_of(rows.map(lambda x, b=b: x[b : b + 1])) for b in range(2)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5), *parts, sums)


def test_a_window_counts_positions():
    """The rejected completion's tokens are columns behind the chosen one's and see the prompt all the same."""
    config, params = golden("mistral_window")
    rows, slots = families.batch(PAIRS)
    wrong = rows._replace(positions=jnp.broadcast_to(jnp.arange(slots.length), rows.positions.shape))
    exact = unpacked(row_logits(params, rows, config, slots), rows, slots)
    columns = unpacked(row_logits(params, wrong, config, slots), rows, slots)
    assert difference(exact[1::2], columns[1::2]) > 0.1
