"""The sampler against the whole model run again for every token, and against itself done in other ways."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from dpo_jax.errors import UserError
from dpo_jax.model.forward import init_params
from dpo_jax.model.lora import init_adapters
from dpo_jax.model.options import LayoutOptions, Lora
from dpo_jax.model.placement import place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.sampling import board, drawing, programs
from dpo_jax.sampling.draws import Filters
from dpo_jax.sampling.engine import AnswerRequest, Capacity, Sampler
from dpo_jax.sampling.ladder import first_rung
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.sampling.programs import Programs
from tests.oracles import oracle

CONFIG = oracle.CONFIG
WINDOW = dataclasses.replace(CONFIG, sliding_window=8, sliding_layers=(True, False))
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 11], [1, 2, 3, 4] * 9, [4], [4, 4], [4, 5, 6, 7, 8]]
STOP = 58
USUAL = Capacity()
SAMPLERS = {}  # by layout, then by capacity: what was compiled for one test serves the next


@functools.cache
def layout_of(config=CONFIG, sizes=(1, 1, 1), lora=None, **options):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return place_model(config, mesh, LayoutOptions(**{"compute_dtype": "float32"} | options), lora)


@pytest.fixture(scope="module")
def params():
    fresh = nn.meta.unbox(init_params(jax.random.key(0), CONFIG))
    larger = {name: fresh[name] * 30 for name in ("embedding", "lm_head")}  # else every token is about as likely
    return jax.tree.map(
        np.asarray, fresh | {"layers": jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, fresh["layers"])} | larger
    )


def answers(params, layout, prompts=PROMPTS, capacity=USUAL, ids=None, **asked):
    on_mesh = jax.device_put(params, layout.shardings)
    kept = SAMPLERS.setdefault(id(layout), (layout, {}))[1]
    if capacity not in kept:
        kept[capacity] = Sampler(layout, None, [STOP], capacity)
    return kept[capacity].answers(on_mesh, prompts, SamplingParams(**asked), ids)


def tokens(found):
    return [[answer.token_ids for answer in one] for one in found]


def log_probs(params, prompt, ids, config=CONFIG):
    """log p `[tokens, V]` before every token of an answer, float64."""
    z = oracle.logits(params, np.array([*prompt, *ids]), config)[len(prompt) - 1 : -1]
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("config", [CONFIG, WINDOW])
def test_greedy_is_the_most_likely_token_every_time(params, config):
    for prompt, (answer,) in zip(
        PROMPTS, answers(params, layout_of(config), temperature=0.0, max_tokens=40), strict=True
    ):
        logp = log_probs(params, prompt, answer.token_ids, config)
        assert answer.token_ids == logp.argmax(-1).tolist()
        assert answer.logprobs == [0.0] * len(answer.token_ids)  # of what it was drawn from
        np.testing.assert_allclose(answer.full_logprobs, logp.max(-1), atol=1e-5)
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == STOP else "length")
        assert (answer.finish_reason == "length") == (len(answer.token_ids) == 40)


def test_log_probabilities_are_the_whole_models(params):
    """Temperature and filters change what is drawn from; the other value is the model's own whatever they are."""
    asked = {"n": 3, "temperature": 0.7, "top_k": 9, "max_tokens": 40, "seed": 3}
    ends = set()
    for prompt, group in zip(PROMPTS, answers(params, layout_of(), **asked), strict=True):
        for answer in group:
            logp = log_probs(params, prompt, answer.token_ids)
            at = np.arange(len(logp)), answer.token_ids
            np.testing.assert_allclose(answer.full_logprobs, logp[at], atol=1e-5)
            z = logp / 0.7
            kept = z >= np.sort(z, axis=-1)[:, -9:-8]
            drawn = np.where(kept, z, -np.inf)
            drawn -= np.log(np.exp(drawn).sum(-1, keepdims=True))
            np.testing.assert_allclose(answer.logprobs, drawn[at], atol=1e-5)
            assert answer.logprob == pytest.approx(sum(answer.logprobs))
            assert STOP not in answer.token_ids[:-1]
            ends.add(answer.finish_reason)
    assert ends == {"stop", "length"}


@pytest.mark.parametrize(
    "capacity",
    [
        Capacity(rows=1, page=8),
        pytest.param(Capacity(rows=4, page=8, prefill=8), marks=pytest.mark.slow),
        pytest.param(Capacity(rows=16, page=4), marks=pytest.mark.slow),
        pytest.param(Capacity(rows=256, page=64), marks=pytest.mark.slow),
    ],
)
def test_answers_do_not_depend_on_how_many_are_drawn_at_once(params, capacity, monkeypatch):
    monkeypatch.setitem(drawing.WORTH_COMPILING, "cpu", 0)
    whole = tokens(answers(params, layout_of(), n=5, max_tokens=40, seed=3, capacity=Capacity(compact=False)))
    assert len({tuple(ids) for one in whole for ids in one}) > 30  # no two share their draws
    assert tokens(answers(params, layout_of(), n=5, max_tokens=40, seed=3, capacity=capacity)) == whole


@pytest.mark.slow
def test_answers_do_not_depend_on_the_other_prompts(params):
    whole = tokens(answers(params, layout_of(), n=3, max_tokens=40, seed=3))
    some = tokens(answers(params, layout_of(), PROMPTS[::-2], n=2, max_tokens=40, seed=3))
    assert some == [one[:2] for one in whole[::-2]]
    assert tokens(answers(params, layout_of(), n=3, max_tokens=40, seed=4)) != whole
    assert tokens(answers(params, layout_of(), n=3, max_tokens=40, seed=3, round=1)) != whole
    named = tokens(answers(params, layout_of(), [PROMPTS[0]] * 2, max_tokens=40, ids=["a", "b"]))
    assert named[0] != named[1]
    assert tokens(answers(params, layout_of(), [PROMPTS[0]], max_tokens=40, ids=["b"])) == [named[1]]
    twice = tokens(answers(params, layout_of(), [PROMPTS[0]] * 2, max_tokens=40, seed=3))
    assert twice[0] != twice[1]
    assert twice[0] == whole[0][:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sizes"),
    [(CONFIG, (2, 2, 2)), (CONFIG, (8, 1, 1)), (CONFIG, (1, 2, 4)), (WINDOW, (1, 8, 1)), (WINDOW, (2, 2, 2))],
)
def test_answers_do_not_depend_on_the_devices(params, config, sizes):
    """Also with more devices than kv-heads along an axis, and with rows that are refilled."""
    whole = tokens(answers(params, layout_of(config), n=3, max_tokens=24, seed=3))
    for capacity in (Capacity(), Capacity(rows=1, page=8)):
        assert tokens(answers(params, layout_of(config, sizes), n=3, max_tokens=24, seed=3, capacity=capacity)) == whole


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_requests_are_answered_together_as_alone(params, sizes):
    """Greedy, filtered, texts of several lengths and numbers of answers; two requests share prompts."""
    layout = layout_of(sizes=sizes)
    requests = [
        AnswerRequest(PROMPTS[:3], SamplingParams(n=2, max_tokens=20, seed=4)),
        AnswerRequest([], SamplingParams(max_tokens=3, seed=4)),
        AnswerRequest(PROMPTS[1:], SamplingParams(temperature=0.0, max_tokens=33, seed=4)),
        AnswerRequest(PROMPTS, SamplingParams(temperature=0.8, top_p=0.9, max_tokens=9, seed=4), list("abcdefg")),
    ]
    found = Sampler(layout, None, [STOP]).together(jax.device_put(params, layout.shardings), requests)
    assert [[len(one) for one in group] for group in found] == [[2] * 3, [], [1] * 6, [1] * 7]
    for request, group in zip(requests, found, strict=True):
        alone = answers(params, layout, request.prompts, ids=request.ids, **dataclasses.asdict(request.asked))
        assert tokens(group) == tokens(alone)


def test_requests_of_one_call_share_their_seed(params):
    sampler = Sampler(layout_of(), None, [STOP])
    with pytest.raises(ValueError, match="differ in seed"):
        sampler.together(params, [AnswerRequest([[1]], SamplingParams(seed=seed)) for seed in (1, 2)])


@pytest.mark.slow
def test_layers_apart_are_the_stacked_layers(params, monkeypatch):
    """As larger models are computed on a CPU, with windows, int8 and adapters too."""
    stacked = tokens(answers(params, layout_of(WINDOW), n=2, max_tokens=24, seed=3))
    monkeypatch.setattr(programs, "APART_FROM", 0)
    windows, whole = layout_of.__wrapped__(WINDOW), layout_of.__wrapped__()
    assert tokens(answers(params, windows, n=2, max_tokens=24, seed=3)) == stacked
    rows = Capacity(rows=4, page=8, cache_dtype="int8")
    assert len(answers(params, windows, n=2, max_tokens=24, seed=3, capacity=rows)) == len(PROMPTS)
    for prompt, (answer,) in zip(PROMPTS, answers(params, whole, temperature=0.0, max_tokens=24), strict=True):
        assert answer.token_ids == log_probs(params, prompt, answer.token_ids).argmax(-1).tolist()


@pytest.mark.slow
def test_unmerged_adapters_are_the_merged_model(params):
    lora = Lora(2, 4.0, ("all",))
    layout = layout_of(lora=lora)
    fresh = nn.meta.unbox(init_adapters(jax.random.key(1), layout.config, layout.lora))
    adapters = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), fresh)
    merged = jax.tree.map(np.copy, params)
    for block, names in adapters["lora"]["layers"].items():
        for name, pair in names.items():
            a, b = (np.asarray(x) for x in (pair["a"], pair["b"]))
            kernel = merged["layers"][block][name]
            product = a.reshape(len(a), -1, 2) @ b.reshape(len(b), 2, -1)
            kernel += layout.config.lora_scale * product.reshape(kernel.shape)
    asked = SamplingParams(n=2, max_tokens=24)
    unmerged = Sampler(layout, None, [STOP]).answers(params | adapters, PROMPTS, asked)
    assert tokens(unmerged) == tokens(answers(merged, layout_of(), n=2, max_tokens=24))
    assert tokens(unmerged) != tokens(answers(params, layout_of(), n=2, max_tokens=24))


def test_int8_keys_and_values_are_near(params):
    exact = answers(params, layout_of(), temperature=0.0, max_tokens=40)
    rounded = answers(params, layout_of(), temperature=0.0, max_tokens=40, capacity=Capacity(cache_dtype="int8"))
    differences = [
        abs(a - b)
        for (one,), (other,) in zip(exact, rounded, strict=True)
        if one.token_ids[:8] == other.token_ids[:8]
        for a, b in zip(one.full_logprobs[:8], other.full_logprobs[:8], strict=True)
    ]
    assert len(differences) >= 4 * 8
    assert 1e-5 < max(differences) < 0.1


def test_bfloat16_parameters_are_computed_in_the_layouts_numbers(params):
    rounded = jax.tree.map(lambda p: p.astype(jax.numpy.bfloat16), params)
    back = jax.tree.map(lambda p: np.asarray(p, np.float32), rounded)
    assert tokens(answers(rounded, layout_of(), max_tokens=24)) == tokens(answers(back, layout_of(), max_tokens=24))


@pytest.mark.slow
def test_a_stop_token_comes_no_sooner_than_asked(params):
    free = answers(params, layout_of(), n=8, max_tokens=40, seed=1)
    assert any(len(answer.token_ids) < 12 for one in free for answer in one)
    late = answers(params, layout_of(), n=8, max_tokens=40, min_tokens=12, seed=1)
    assert all(len(answer.token_ids) > 12 for one in late for answer in one)
    assert any(answer.stop_reason == STOP for one in late for answer in one)
    first = answers(params, layout_of(), n=8, max_tokens=40, seed=1, stop_token_ids=(7, 8))
    for free_one, one in zip(free, first, strict=True):
        for before, answer in zip(free_one, one, strict=True):
            end = next((i + 1 for i, t in enumerate(before.token_ids) if t in (7, 8, STOP)), 40)
            assert answer.token_ids == before.token_ids[:end]


def test_what_cannot_be_answered_is_refused_before_anything_is_compiled(params):
    with pytest.raises(UserError, match="prompt 2 has no tokens"):
        answers(params, layout_of(), [[1], []])
    short = dataclasses.replace(CONFIG, max_position_embeddings=8)
    with pytest.raises(UserError, match="prompt 1 has 8 tokens, and the model has 8 positions"):
        answers(params, layout_of(short), [[1] * 8])
    ((answer,),) = answers(params, layout_of(short), [[1] * 6], temperature=0.0, max_tokens=40)
    assert len(answer.token_ids) <= 2  # as many as there are positions for
    with pytest.raises(UserError, match="use stop_token_ids"):
        answers(params, layout_of(), stop=("x",))
    assert answers(params, layout_of(), []) == []


@pytest.mark.slow
def test_too_little_memory_is_refused_or_made_do_with(params, monkeypatch):
    """Fewer rows, then answers that are given up and come again: the same answers. Asked for by number: one line."""
    whole = tokens(answers(params, layout_of(), n=3, max_tokens=40, seed=3))
    page = Capacity(page=8)
    monkeypatch.setattr(drawing, "free_bytes", lambda layout: 1.0)
    with pytest.raises(UserError, match=r"rows=1: the cache for prompts of 36 and answers of 40 tokens needs 0.00 GiB"):
        answers(params, layout_of(), n=3, max_tokens=40, capacity=page)
    with pytest.raises(UserError, match=r"rows=32: the cache .* use fewer rows, a smaller max_tokens"):
        answers(params, layout_of(), n=3, max_tokens=40, capacity=Capacity(rows=64, page=8))
    given_up, give_up = [], board.Seats.give_up
    monkeypatch.setattr(
        board.Seats, "give_up", lambda seat, missing: given_up.append(missing) or give_up(seat, missing)
    )
    sizes = {rows: Programs(layout_of(), page=8, cache_dtype=None, reach=128, filters=Filters()).bytes_of(
        first_rung(rows, 3, 7, 36, 40, 8)) for rows in (4, 32)}  # fmt: skip
    for bytes_of in sizes.values():
        monkeypatch.setattr(drawing, "free_bytes", lambda layout, b=bytes_of: 1.6 * b)
        assert tokens(answers(params, layout_of(), n=3, max_tokens=40, seed=3, capacity=page)) == whole
    assert max(given_up) > 0
