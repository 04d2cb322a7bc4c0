"""Plans of sampling: its own programs are what is compiled, and what their loops over tokens do and do not."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import hhh
from dpo_jax.config.settings import read_settings
from dpo_jax.errors import UserError
from dpo_jax.model.forward import init_params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import abstract_whole, place_model
from dpo_jax.parallel.mesh import make_mesh, replicated
from dpo_jax.parallel.tpu import parse_topology
from dpo_jax.plan import sampling
from dpo_jax.plan.compile import Program
from dpo_jax.plan.draft import find_model
from dpo_jax.plan.hlo.count import Costs
from dpo_jax.plan.request import SampleRequest, read_request
from dpo_jax.sampling.abstract import abstract_cache, decode_arguments, prefill_arguments
from dpo_jax.sampling.draws import Filters
from dpo_jax.sampling.engine import Capacity, Sampler
from dpo_jax.sampling.ladder import first_rung, width_of
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.sampling.programs import Programs
from tests import processes
from tests.oracles import oracle
from tests.plan.decoding import copies, transfers
from tests.plan.runs import SMALL, compiler, refused, run_plan, small_run

USUAL = {
    "sample_rows": 0, "sample_n": 8, "sample_prompt": 256, "sample_tokens": 256, "cache_dtype": "",
    "sample_params": "export",
}  # fmt: skip


def layout_of(sizes=(1, 1, 1), **options):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return place_model(oracle.CONFIG, mesh, LayoutOptions(**{"compute_dtype": "float32"} | options))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sample_n": 0}, "--sample_n=0; needs at least 1 answer"),
        ({"sample_rows": -8}, "--sample_rows=-8; needs 0 or more"),
        ({"sample_prompt": 0}, "--sample_prompt=0; needs 1 or more"),
        ({"sample_tokens": 0}, "--sample_tokens=0; needs 1 or more"),
        ({"cache_dtype": "int4"}, "--cache_dtype=int4; needs nothing or int8"),
        ({"sample_params": "x"}, "--sample_params=x; needs export or training"),
    ],
)
def test_what_means_nothing_is_refused(changed, words):
    with pytest.raises(UserError, match=words):
        read_request(USUAL | changed)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache_dtype", ["", pytest.param("int8", marks=pytest.mark.slow)])
def test_what_is_compiled_is_what_the_sampler_runs(sizes, cache_dtype):
    """Shapes, dtypes and shardings of everything that it gives its programs."""
    layout, asked, given = layout_of(sizes), SamplingParams(n=3, max_tokens=20), {}
    sampler = Sampler(layout, None, [58, 59], Capacity(page=8, cache_dtype=cache_dtype))
    programs = sampler.programs(24, Filters.of(asked))

    def watch(name):
        program = getattr(programs, name)

        def seen(*args, **kwargs):
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), args)
            given.setdefault(name, (abstract, kwargs))  # before what is donated is gone
            return program(*args, **kwargs)

        setattr(programs, name, seen)

    watch("prefill")
    watch("decode")
    params = jax.device_put(nn.meta.unbox(init_params(jax.random.key(0), oracle.CONFIG)), layout.shardings)
    sampler.answers(params, [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]] * 4, asked)
    args, kwargs = given["decode"]
    _same(decode_arguments(programs, args[0], **kwargs, asked=asked, stops=2), args)
    args, shape = given["prefill"]
    pages = (args[1].pages[0] if programs.apart else args[1].pages).v.shape[-4] // programs.shards
    _same(prefill_arguments(programs, args[0], dataclasses.replace(kwargs["rung"], pages=pages), **shape), args)


def _same(abstract, real):
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert 0 in x.shape or x.sharding.is_equivalent_to(y.sharding, len(x.shape)), (x.shape, x.sharding, y.sharding)


def _cache_shapes(programs, rung):
    """Of a device's keys and values: of all layers, of one, and the numbers of their buffer."""
    leaves = jax.tree.leaves(abstract_cache(programs, rung)[:2])
    local = [x.sharding.shard_shape(x.shape) for x in leaves if len(x.shape) > 3]
    return [shape for x in local for shape in (x, x[1:] if len(x) == 5 else x)]


@pytest.mark.parametrize("n", [1, 3])
def test_the_loop_on_this_machine_copies_no_cache_and_asks_no_host(n, monkeypatch):
    """Of layers that lie apart, as those of all but tiny models do on a CPU."""
    monkeypatch.setattr("dpo_jax.sampling.programs.APART_FROM", 0)
    layout = layout_of()
    programs = Programs(layout, page=8, cache_dtype=None, reach=64, filters=Filters())
    rung = first_rung(16, n, 64, 40, 33, 8)
    params = abstract_whole(layout, layout.dtype)
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=replicated(layout.mesh)), params["layers"]
    )
    apart = (one,) * oracle.CONFIG.num_hidden_layers
    arguments = decode_arguments(programs, params | {"layers": apart}, rung, SamplingParams(n=n), 1)
    with jax.set_mesh(layout.mesh):
        text = programs.decode.trace(*arguments, rung=rung).lower().compile().as_text()
    assert copies(text, _cache_shapes(programs, rung)) == []
    assert transfers(text) == []


def test_a_copy_and_a_question_to_the_host_would_be_found():
    def loop(one, x):
        more = lambda carry: carry[0] < jnp.sum(carry[1])
        text = jax.jit(lambda x: jax.lax.while_loop(more, lambda c: (c[0] + 1, one(c[1])), (0.0, x))).lower(x)
        return text.compile().as_text()

    x = jnp.ones((24, 40))
    assert copies(loop(lambda x: x.at[3].set(0), x), [x.shape]) == []
    assert len(copies(loop(lambda x: jnp.flip(x, 0) * 2, x), [x.shape])) >= 1
    assert transfers(loop(lambda x: x.at[3].set(0), x)) == []
    ask = lambda x: x.at[0].set(jax.pure_callback(np.sin, jax.ShapeDtypeStruct((40,), jnp.float32), x[0]))
    assert len(transfers(loop(ask, x))) >= 1


def test_a_cache_is_planned_full():
    """Pages for all tokens of an answer but the last, whose keys nobody reads."""
    of = functools.partial(SampleRequest, 0, 256)
    rung = sampling.full_rung(of(SamplingParams(n=8, max_tokens=256)), 32, 32)
    assert (rung.rows, rung.prompts, rung.width, rung.pages, rung.row_pages) == (32, 8, 256, 32 * 8, 8)
    assert sampling.full_rung(of(SamplingParams(n=8, max_tokens=257)), 32, 32).pages == 32 * 8
    assert sampling.full_rung(of(SamplingParams(n=1, max_tokens=1)), 32, 32).pages == 0


@compiler
def test_a_step_of_a_large_model_reads_its_weights_and_its_cache_and_little_else():
    processes.run_all(_compile_a_large_model, [()])  # of its own: libtpu puts handlers on signals


def _compile_a_large_model():
    s = read_settings(dict(hhh.get_config("llama3.1-8b")))
    request = SampleRequest(256, 256, SamplingParams(n=8, max_tokens=256))
    draft = sampling.draft_sampling(s, find_model(s.model), parse_topology("v6e:2x4"), request)
    texts, compile_for = [], sampling.compile_for

    def kept(*args):
        compiled, seconds = compile_for(*args)
        texts.append(compiled.as_text())
        return compiled, seconds

    sampling.compile_for = kept
    _, turn = sampling.decode_program(draft)
    needed = draft.weights_read + draft.programs.bytes_of(draft.rung)
    assert needed < turn.hbm_bytes <= 1.15 * needed
    assert turn.unknown_loops == turn.unknown_kernels == ()
    assert copies(texts[0], _cache_shapes(draft.programs, draft.rung)) == []
    assert transfers(texts[0]) == []


@compiler
def test_rows_that_do_not_divide_are_one_line():
    line = refused("--sample", "--config=configs/hhh.py:llama3.1-8b", "--topology=v6e:2x4", "--sample_rows=60")
    assert "--sample_rows=60 does not divide over 8 data shards; use a multiple of 8 (56 or 64)" in line
    line = refused("--sample", "--config=configs/hhh.py:llama3.1-8b", "--topology=v6e:2x4", "--sample_tokens=200000")
    assert "--sample_tokens=200000 are more than the 131,072 positions of the model" in line


@compiler
def test_the_command_plans_sampling(tmp_path):
    """As a run of adapters has them while it trains: a float32 adapter beside its bfloat16 base."""
    run = [x for x in small_run(tmp_path, SMALL, "v5e:2x2") if not x.startswith("--lengths")]
    asked = ["--sample_rows=16", "--sample_tokens=64", "--sample_params=training", "--cache_dtype=int8"]
    done = run_plan("--sample", *run, *asked, "--config.lora_rank=4", f"--json={tmp_path / 'a.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (r,) = json.loads((tmp_path / "a.json").read_text())["topologies"]
    assert (r["rows"], r["rows_per_device"], r["cache_dtype"], r["fits"]) == (16, 4, "int8", True)
    assert f"{r['tokens_per_second']:,.0f} tokens/s" in done.stdout
    assert r["seconds"][r["binds"]] == max(r["seconds"].values())
    assert r["tokens_per_second"] == pytest.approx(16 / r["seconds"][r["binds"]])
    assert r["tokens_per_second_with_prefill"] < r["tokens_per_second"]


@pytest.mark.parametrize(
    ("room", "largest", "tried"),
    [
        (900, 256, [256]),  # the formula stops at 256 of 900 / 2.4 rows, and the programs need no more than it says
        (700, 128, [256, 128]),
        (3, 0, [1]),
    ],
)
def test_the_most_rows_that_fit(room, largest, tried, monkeypatch):
    draft = _draft_here()
    need = {1: 10, 128: 600, 256: 800}
    program = lambda one: Program(Costs(), float(need[one.rung.rows]), 0.0, 0.0)
    monkeypatch.setattr(sampling, "decode_program", lambda one: (program(one), Costs()))
    monkeypatch.setattr(sampling, "prefill_program", program)
    monkeypatch.setattr(sampling.SampleDraft, "moving", property(lambda one: 0.0))
    monkeypatch.setattr(sampling.SampleDraft, "lets", property(lambda one: 2.4 * one.rung.rows <= room))
    generation = dataclasses.replace(draft.topology.generation, hbm_gib=room / 2**30)
    draft = dataclasses.replace(draft, topology=dataclasses.replace(draft.topology, generation=generation))
    seen = []
    assert sampling.search_rows(draft, lambda rows, said: seen.append(rows)) == largest
    assert seen == tried


def _draft_here():
    """Of a small model on this machine's first device."""
    layout = layout_of()
    programs = Programs(layout, page=8, cache_dtype=None, reach=64, filters=Filters())
    request = SampleRequest(0, 24, SamplingParams(n=3, max_tokens=33))
    params = abstract_whole(layout, layout.dtype)
    return sampling.SampleDraft(
        parse_topology("v6e:1x1"), request, programs, params, sampling.full_rung(request, 16, 8)
    )


def test_what_a_sampler_holds():
    """A table that is not the projection too is not read; in float32 the rest is, and a cache of 16 rows."""
    draft, c = _draft_here(), oracle.CONFIG
    table = 4 * c.vocab_size * c.hidden_size
    assert draft.weights == 4 * c.parameter_count()
    assert draft.weights_read == draft.weights - (0 if c.tie_word_embeddings else table)
    assert draft.prompts == draft.rung.prompts
    assert (draft.prefill_tokens, draft.prefill_shape.length) == (draft.prompts * 24, width_of(draft.prompts * 24))
    assert draft.lets
    assert draft.moving == draft.weights + 1.5 * draft.programs.bytes_of(draft.rung)
