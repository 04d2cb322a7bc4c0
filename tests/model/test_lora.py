"""Adapters: what they compute and how they are trained. Without them the base is the reference, and it never moves.

`tests/weights/test_peft.py` has the exports and whole runs.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config.values import parse_targets
from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.forward import init_params
from dpo_jax.model.lora import Lora, init_adapters, on_model
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import place_model
from dpo_jax.objective.objective import make_set_values, preference_objective
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.parallel.mesh import make_mesh, to_global
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.optimizer import optimizer, rate_schedule
from dpo_jax.training.setup import abstract_state, start_state
from dpo_jax.training.step import make_eval_step, make_train_step
from tests.oracles import oracle
from tests.oracles.oracle import CONFIG

SHAPE = RowShape(12, (8, 8), 8, 2)
PAIRS = oracle.RandomGroups(np.random.default_rng(0).integers(1, 5, (14, 3)))
PLACED = np.append(np.arange(14), [-1, -1]).reshape(8, 2)
OBJECTIVE = preference_objective({"sigmoid": 1.0}, beta=0.1)
RATE = rate_schedule("constant", peak=1e-2, warmup_steps=0, total_steps=10)
TX = optimizer("adamw", RATE, weight_decay=0.01, max_grad_norm=1.0)
LORA = on_model(CONFIG, Lora(3, 6.0, ("all",)))
SMOLLM2_135M = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


@functools.cache
def _fresh():
    base = nn.meta.unbox(jax.jit(functools.partial(init_params, config=CONFIG))(jax.random.key(0)))
    return jax.device_get(jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, base))


def _adapters(lora=LORA, b=0.0):
    """Fresh adapters, with B drawn (it begins as zeros)."""
    tree = nn.meta.unbox(init_adapters(jax.random.key(1), CONFIG, lora))
    rng = np.random.default_rng(2)
    draw = lambda path, x: np.asarray(x if path[-1].key == "a" else b * rng.normal(size=x.shape), np.float32)
    return jax.tree_util.tree_map_with_path(draw, tree)


def _merged(base, adapters, scale):
    """W + scale · A·B in float64."""
    flat = {k: np.asarray(v, np.float64) for k, v in flax.traverse_util.flatten_dict(base).items()}
    pairs = flax.traverse_util.flatten_dict(adapters["lora"])
    for path in {path[:-1] for path in pairs}:
        a, b = (np.asarray(pairs[(*path, ab)], np.float64) for ab in "ab")
        flat[path] = flat[path] + scale * np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
    return flax.traverse_util.unflatten_dict(flat)


def _layout(sizes=(1, 1, 1), lora=LORA, config=CONFIG, **changed):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    return place_model(config, mesh, LayoutOptions(**{"compute_dtype": "float32"} | changed), lora)


def _run(sizes=(1, 1, 1), adapters=None, reference=None, steps=2, microbatches=1, remat="dots", **changed):
    """Train adapters on a mesh: (state, base, metrics of each step). The reference is the base, unless one is given."""
    layout = _layout(sizes, **changed)
    with jax.set_mesh(layout.mesh):
        base = jax.device_put(jax.tree.map(lambda x: x.astype(layout.base_dtype), _fresh()), layout.shardings)
        state = start_state(jax.device_put(adapters or _adapters(), layout.trained), TX, layout)
        step = make_train_step(logps_fn(layout, remat=remat), OBJECTIVE, TX, RATE, compute_dtype=layout.dtype)
        batch = to_global(oracle.rows(PAIRS, PLACED, SHAPE, microbatches), layout.mesh, 8 // microbatches)
        metrics = []
        for _ in range(steps):
            state, values = step(state, reference or {}, batch, SHAPE, base=base)
            metrics.append(jax.device_get(values))
    return state, base, metrics


def _close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol, rtol=1e-4), a, b)


def _logps(params):
    return np.array([[oracle.completion_logp(params, p, x, CONFIG) for x in xs] for p, *xs in PAIRS.ids])


@pytest.mark.slow
def test_the_first_step_sees_the_base_twice_and_trains_nothing_else():
    state, base, metrics = _run(steps=3)
    assert float(metrics[0]["dpo_loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics[0]["accuracy"]) == 0
    assert float(metrics[2]["dpo_loss"]) < 0.688
    jax.tree.map(np.testing.assert_array_equal, base, _fresh())  # bit for bit, after three donated steps
    trained = jax.tree.structure(state.params)
    assert trained == jax.tree.structure(_adapters())
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(x.shape for x in moments) == sorted(2 * [x.shape for x in jax.tree.leaves(_adapters())])


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_b_the_policy_is_the_base_exactly(dtype):
    layout = _layout(compute_dtype=dtype)
    assert layout.base_dtype == dtype
    logps = jax.jit(logps_fn(layout, remat="none"), static_argnums=2)
    micro = oracle.rows(PAIRS, PLACED, SHAPE).map(lambda x: jnp.asarray(x[0]))
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    with jax.set_mesh(layout.mesh):
        found = [logps(cast(_fresh() | x), micro, SHAPE).logps for x in (_adapters(), {})]
        other = logps(cast(_fresh() | _adapters(b=0.3)), micro, SHAPE).logps
    np.testing.assert_array_equal(*found)
    assert np.abs(np.asarray(other - found[0])).max() > 0.1


@pytest.mark.sweep
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj", "o,gate,up,down"])
def test_the_step_is_float64s_with_merged_kernels(targets):
    lora = on_model(CONFIG, Lora(3, 6.0, parse_targets(targets), rslora=True))
    adapters = _adapters(lora, b=0.3)
    assert lora.scale == pytest.approx(6 / math.sqrt(3))
    rewards = 0.1 * (_logps(_merged(_fresh(), adapters, lora.scale)) - _logps(_fresh()))
    margin = rewards[:, 0] - rewards[:, 1]
    _, _, (first,) = _run(adapters=adapters, lora=lora, steps=1)
    assert float(first["dpo_loss"]) == pytest.approx(np.logaddexp(0, -margin).mean(), abs=1e-4)
    assert float(first["margin"]) == pytest.approx(margin.mean(), abs=1e-4)
    assert abs(margin).max() > 0.02


@pytest.mark.slow
def test_gradients_are_the_chain_rule_on_full_fine_tunings():
    """dA = scale · dW·Bᵀ and dB = scale · Aᵀ·dW, where dW is the merged kernel's gradient."""
    adapters, layout = _adapters(b=0.3), _layout()
    logps = logps_fn(layout, remat="full")
    micro = oracle.rows(PAIRS, PLACED, SHAPE).map(lambda x: jnp.asarray(x[0]))
    weights = np.random.default_rng(3).normal(size=(8, 2, 2)).astype(np.float32)

    def loss(params):
        return jnp.sum(jnp.where(micro.is_group[..., None], logps(params, micro, SHAPE).logps, 0) * weights)

    merged = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), _merged(_fresh(), adapters, LORA.scale))
    with jax.set_mesh(layout.mesh):
        found = jax.jit(jax.grad(lambda x: loss(_fresh() | x)))(adapters)
        whole = jax.jit(jax.grad(loss))(merged)
    whole = flax.traverse_util.flatten_dict(whole)
    found, pairs = (flax.traverse_util.flatten_dict(x["lora"]) for x in (found, adapters))
    for path in {path[:-1] for path in pairs}:
        a, b = (np.asarray(pairs[(*path, ab)], np.float64) for ab in "ab")
        for layer in range(CONFIG.num_hidden_layers):
            inner = math.prod(a.shape[1:-1])
            dw = np.asarray(whole[path][layer], np.float64).reshape(inner, -1)
            a_IR, b_RO = a[layer].reshape(inner, -1), b[layer].reshape(LORA.rank, -1)
            for ab, expected in (("a", LORA.scale * dw @ b_RO.T), ("b", LORA.scale * a_IR.T @ dw)):
                ours = np.asarray(found[(*path, ab)][layer]).reshape(expected.shape)
                np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max(), err_msg=f"{path} {ab}")


@pytest.mark.slow
def test_adapters_after_sft_are_a_reference_of_their_own():
    """Over the same base: the first loss is ln 2 although the policy is no longer the base."""
    adapters = _adapters(b=0.3)
    _, _, (first,) = _run(adapters=adapters, reference=jax.tree.map(jnp.asarray, adapters), steps=1)
    assert float(first["dpo_loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(first["accuracy"]) == 0
    _, _, (first,) = _run(adapters=adapters, steps=1)
    assert abs(float(first["chosen_reward"])) > 1e-3


@pytest.mark.slow
def test_a_named_reference_is_a_whole_model_without_adapters():
    adapters = _adapters(b=0.3)
    other = jax.tree.map(lambda x: x * 1.1, _fresh())
    rewards = 0.1 * (_logps(_merged(_fresh(), adapters, LORA.scale)) - _logps(other))
    _, _, (first,) = _run(adapters=adapters, reference=jax.tree.map(jnp.asarray, other), steps=1)
    assert float(first["margin"]) == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), abs=1e-4)


@pytest.fixture(scope="module")
def one_device():
    return _run(adapters=_adapters(b=0.1))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "microbatches"), [((2, 2, 2), 1), ((1, 4, 1), 2)])
def test_every_mesh_gives_one_devices_numbers(sizes, microbatches, one_device):
    state, _, metrics = _run(sizes, _adapters(b=0.1), microbatches=microbatches)
    _close(metrics, one_device[2])
    _close(state.params, one_device[0].params, atol=1e-4)
    q, o = (state.params["lora"]["layers"]["attention"][name] for name in "qo")
    fsdp, tensor = sizes[1:]
    assert q["a"].addressable_shards[0].data.shape == (2, 16 // fsdp, 3)
    assert q["b"].addressable_shards[0].data.shape == (2, 3, 4 // tensor, 4)
    assert o["a"].addressable_shards[0].data.shape == (2, 4 // tensor, 4, 3)
    assert state.opt_state[1].mu["lora"]["layers"]["attention"]["q"]["a"].sharding == q["a"].sharding


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("remat", ["none", "attention_offload", "full"])
def test_what_the_backward_pass_keeps_changes_no_number(remat, one_device):
    state, _, metrics = _run(adapters=_adapters(b=0.1), remat=remat)
    _close(metrics, one_device[2])
    _close(state.params, one_device[0].params, atol=1e-4)


@pytest.mark.slow
def test_a_bfloat16_base_under_float32_adapters():
    state, base, metrics = _run(base_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert float(metrics[0]["dpo_loss"]) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_evaluation_is_what_a_training_step_reports(one_device):
    layout = _layout()
    with jax.set_mesh(layout.mesh):
        step = make_eval_step(logps_fn(layout, remat="none"), OBJECTIVE, compute_dtype=jnp.float32)
        batch = to_global(oracle.rows(PAIRS, PLACED, SHAPE, 2), layout.mesh, 4)
        scored = step(_adapters(b=0.1), {}, batch, SHAPE, base=_fresh())
        by_pair = jax.tree.map(lambda x: np.asarray(x).reshape(*PLACED.shape, 2)[PLACED >= 0], scored)
        values = make_set_values(OBJECTIVE)(*by_pair, PAIRS.lengths[:, 1:])
    for name, value in values.items():
        assert value.mean() == pytest.approx(float(one_device[2][0][name]), abs=1e-5), name


def test_a_rank_beyond_the_models_width_is_a_mistake():
    with pytest.raises(UserError, match=r"lora_rank=100000 is more than the model's width"):
        on_model(CONFIG, Lora(100_000, 32.0, ("q",)))


def test_adapters_begin_as_pefts_do():
    """A is torch's kaiming_uniform_(a=√5), ±1/√inputs, another one in every layer; B is zeros."""
    config = dataclasses.replace(CONFIG, hidden_size=64, num_attention_heads=8, head_dim=4, intermediate_size=96)
    lora = Lora(16, 32.0, ("q", "o", "down"))
    tree = nn.meta.unbox(init_adapters(jax.random.key(0), config, lora))["lora"]["layers"]
    for block, name, inputs in (("attention", "q", (64,)), ("attention", "o", (8, 4)), ("mlp", "down", (96,))):
        a, b = tree[block][name]["a"], tree[block][name]["b"]
        bound = 1 / math.sqrt(math.prod(inputs))
        assert a.shape == (2, *inputs, 16)
        assert 0.95 * bound < float(jnp.abs(a).max()) <= bound
        assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert float(jnp.abs(a[0] - a[1]).min()) >= 0 != float(jnp.abs(a[0] - a[1]).mean())
        assert not b.any()
    assert set(tree["attention"]) == {"q", "o"}


def test_targets_by_our_names_and_hugging_faces():
    assert parse_targets("all") == parse_targets("all-linear") == ("all",)
    assert parse_targets(" q_proj, v,q") == ("q", "v")
    assert parse_targets("qkv_proj,o_proj") == ("q", "k", "v", "o")
    assert on_model(CONFIG, Lora(8, 16.0, ("all",))).targets == ("q", "k", "v", "o", "gate", "up", "down")
    with pytest.raises(UserError, match="'embed' is no projection; there are all, q, k, v, o, gate, up, down"):
        parse_targets("q,embed")
    with pytest.raises(UserError, match="'' is no projection"):
        parse_targets("")


def test_experts_have_no_adapters():
    moe = dataclasses.replace(CONFIG, model_type="mixtral", num_experts=4, num_experts_per_tok=2)
    assert on_model(moe, Lora(8, 16.0, ("all",))).targets == ("q", "k", "v", "o")
    with pytest.raises(UserError, match=r"adapters on experts \(up\) are not supported; a mixtral model .* q, k, v, o"):
        on_model(moe, Lora(8, 16.0, ("q", "up")))


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_the_state_of_rank_16_is_a_third_of_full_fine_tunings(compute):
    """Parameters, both moments and the reference of SmolLM2-135M, in bytes."""
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    held = {}
    for name, lora in (("full", None), ("lora", on_model(SMOLLM2_135M, Lora(16, 32.0, ("all",))))):
        layout = _layout(lora=lora, config=SMOLLM2_135M, compute_dtype=compute)
        model = SMOLLM2_135M.parameter_count() * layout.dtype.itemsize  # the reference, or the base that stands for it
        held[name] = size(abstract_state(TX, layout)) + model
    assert layout.trained_count == 4_884_480  # as PEFT counts them
    ratio = held["lora"] / held["full"]
    print(f"{compute}: full {held['full'] / 1e6:.0f} MB, LoRA {held['lora'] / 1e6:.0f} MB, {ratio:.3f}x")
    assert ratio < 0.35
