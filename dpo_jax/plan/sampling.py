"""Sampling on slices that are not there: its own programs, compiled; what they hold, and what they could do at best."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dpo_jax.config.settings import Settings
from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.placement import Layout, abstract_trained, abstract_whole, place_model
from dpo_jax.model.tuning import passes
from dpo_jax.parallel.mesh import make_mesh, row_shards
from dpo_jax.parallel.tpu import Topology
from dpo_jax.plan.bounds import Bounds, bounds, by_kind, where_it_runs
from dpo_jax.plan.compile import Program, TooLargeError, compile_for, experts_share, local_bytes, program_of
from dpo_jax.plan.hlo.count import Costs, count_costs, count_turn
from dpo_jax.plan.kernels import kernel_formula
from dpo_jax.plan.request import SampleRequest
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.abstract import abstract_cache, decode_arguments, prefill_arguments
from dpo_jax.sampling.draws import Filters
from dpo_jax.sampling.engine import suited
from dpo_jax.sampling.ladder import COUNTS, ROWS, first_rung, grown, packed_shape, power_of_two
from dpo_jax.sampling.memory import MOVING, SHARE
from dpo_jax.sampling.programs import Programs, Rung

STOPS = 2  # tokens that end an answer; a few more cost nothing
Tried = Callable[[int, str], None]  # is told the rows of all devices, and what came of them


@dataclasses.dataclass(frozen=True)
class SampleDraft:
    """Answers to draw on a topology.

    Attributes:
      topology: where.
      request: what is drawn.
      programs: the sampler's, of the model on the topology's mesh.
      params: of the model, by shape and sharding.
      rung: of the cache when every answer has all its tokens.
    """

    topology: Topology
    request: SampleRequest
    programs: Programs
    params: Any
    rung: Rung

    @property
    def layout(self) -> Layout:
        return self.programs.layout

    @property
    def rows(self) -> int:
        """Answers that all devices decode at once."""
        return self.rung.rows * self.programs.shards

    @property
    def weights(self) -> float:
        """Bytes of a device's parameters."""
        return local_bytes(self.params)

    @property
    def weights_read(self) -> float:
        """Bytes of them that a step needs, in the compute dtype; of a table that is not tied it looks up a few rows."""
        read = {name: tree for name, tree in self.params.items() if name != "embedding" or "lm_head" not in self.params}
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, self.layout.dtype, sharding=x.sharding)
        return local_bytes(jax.tree.map(cast, read))

    @property
    def prompts(self) -> int:
        """How many prompts a device computes at once."""
        budget = suited(self.layout).prefill
        return min(self.rung.prompts, max(1, budget // self.request.prompt), COUNTS[-1])

    @property
    def prefill_shape(self) -> RowShape:
        """Rows of so many prompts."""
        return packed_shape(self.programs.shards, self.prompts, self.prompts * self.request.prompt)

    @property
    def prefill_tokens(self) -> int:
        """Real tokens of these rows."""
        return self.programs.shards * self.prompts * self.request.prompt

    def with_rows(self, rows: int) -> "SampleDraft":
        """The same with so many rows on a device."""
        return dataclasses.replace(self, rung=full_rung(self.request, rows, self.programs.page))

    @property
    def moving(self) -> float:
        """Bytes of a device while its cache is moved to its last size."""
        return self.weights + MOVING * self.programs.bytes_of(self.rung)

    @property
    def lets(self) -> bool:
        """Whether the sampler would let the cache grow so far; else answers are given up and begin again later."""
        free = self.topology.generation.hbm_bytes - self.weights
        return self.programs.most_pages(self.rung, SHARE * free) >= self.rung.pages


def full_rung(request: SampleRequest, rows: int, page: int) -> Rung:
    """The sizes of a device's cache when all answers are as long as they may be; there are many prompts."""
    asked = request.asked
    rung = first_rung(rows, asked.n, ROWS[-1], request.prompt, asked.max_tokens, page)
    most = -(-(asked.max_tokens - 1) // page)
    return grown(rung, max(0, rows * most - rung.pages), most) if most else rung


def draft_sampling(s: Settings, model: ModelConfig, topology: Topology, request: SampleRequest) -> SampleDraft:
    """The sampler of these settings on a topology.

    Raises:
      UserError: they do not fit the topology or the model, or the compiler is not installed.
    """
    mesh = make_mesh(*s.mesh, topology.devices())
    shards, asked = row_shards(mesh), request.asked
    if request.rows % shards:
        near = sorted({max(shards, request.rows // shards * shards), -(-request.rows // shards) * shards})
        raise UserError(
            f"--sample_rows={request.rows} does not divide over {shards} data shards; use a multiple of {shards} "
            f"({' or '.join(map(str, near))})"
        )
    if request.prompt + asked.max_tokens > model.max_position_embeddings:
        raise UserError(
            f"--sample_prompt={request.prompt} and --sample_tokens={asked.max_tokens} are more than the "
            f"{model.max_position_embeddings:,} positions of the model; use fewer"
        )
    trains = request.parameters == "training"
    options = dataclasses.replace(s.layout, reference_offload=False)
    layout = place_model(model, mesh, options, s.lora if trains else None)
    if not trains:
        params = abstract_whole(layout, layout.dtype)
    elif layout.lora is None:
        params = abstract_trained(layout, layout.param_dtype)
    else:
        params = abstract_whole(layout, layout.base_dtype) | abstract_trained(layout, layout.param_dtype)
    suits, reach = suited(layout), power_of_two(request.prompt + asked.max_tokens)
    programs = Programs(
        layout, page=suits.page, cache_dtype=request.cache_dtype or None, reach=reach, filters=Filters.of(asked)
    )
    rows = request.rows // shards or suits.rows
    draft = SampleDraft(topology, request, programs, params, full_rung(request, rows, suits.page))
    if request.rows:
        return draft
    fewer = (draft.with_rows(x) for x in (rows, *(x for x in ROWS[::-1] if x < rows)))
    return next((x for x in fewer if x.lets), draft)


def decode_program(draft: SampleDraft) -> tuple[Program, Costs]:
    """A chunk of decoding without its loop's turns, and one turn.

    Raises:
      TooLargeError, UserError: as `compile.train_program`.
    """
    programs, rung, request = draft.programs, draft.rung, draft.request
    arguments = decode_arguments(programs, draft.params, rung, request.asked, STOPS)
    what = f"decoding {draft.rows} rows"
    compiled, seconds = compile_for(draft.layout, what, lambda: programs.decode.trace(*arguments, rung=rung))
    turn, outside = count_turn(compiled.as_text(), _formula(draft))
    return program_of(compiled, outside, seconds), turn


def prefill_program(draft: SampleDraft) -> Program:
    """A row of prompts on every device; raises as `decode_program`."""
    programs, shape = draft.programs, draft.prefill_shape
    arguments = prefill_arguments(programs, draft.params, draft.rung, shape)
    what = f"prompts in rows of {shape.length}"
    compiled, seconds = compile_for(draft.layout, what, lambda: programs.prefill.trace(*arguments, shape=shape))
    return program_of(compiled, count_costs(compiled.as_text(), _formula(draft)), seconds)


def _formula(draft: SampleDraft) -> Any:
    return kernel_formula(draft.prefill_shape, draft.layout.tiling, experts_share(draft.layout))


def estimate_sampling(draft: SampleDraft) -> dict[str, Any]:
    """Compile for one topology and report; see `text.sampling_lines` for what the keys mean."""
    topology, layout, request, rung = draft.topology, draft.layout, draft.request, draft.rung
    cache = abstract_cache(draft.programs, rung)
    memory = {
        "weights": draft.weights,
        "prompts": local_bytes(cache.prompts) + local_bytes(cache.hidden),
        "pages": local_bytes(cache.pages),
    }
    report: dict[str, Any] = {
        **where_it_runs(topology, layout.mesh),
        "rows": draft.rows,
        "rows_per_device": rung.rows,
        "n": request.asked.n,
        "prompt": request.prompt,
        "tokens": request.asked.max_tokens,
        "page": draft.programs.page,
        "cache_dtype": str(draft.programs.dtype),
        "parameters": request.parameters,
        "param_dtype": str(layout.param_dtype if request.parameters == "training" else layout.dtype),
        "hbm_available": topology.generation.hbm_bytes,
        "memory": memory,
    }
    try:
        chunk, turn = decode_program(draft)
        prefill = prefill_program(draft)
    except TooLargeError as e:
        return report | {"fits": False, "why": str(e)}
    held = sum(memory.values())
    measured = _decoding(draft, chunk, turn, memory) | {"prefill": _prefilling(draft, prefill, held)}
    memory |= {"temporaries": chunk.total_bytes - held, "total": chunk.total_bytes, "moving": draft.moving}
    largest = max(chunk.total_bytes, prefill.total_bytes, draft.moving)
    at_both = measured["seconds_per_token"] + measured["prefill"]["seconds"] * request.prompt / (
        draft.prefill_tokens * request.asked.n * request.asked.max_tokens
    )
    return report | measured | {
        "fits": largest <= topology.generation.hbm_bytes,
        "why": f"needs {largest / 2**30:.2f}G of {topology.generation.hbm_gib:.2f}G",
        "sampler_lets": draft.lets,
        "headroom": topology.generation.hbm_bytes - largest,
        "tokens_per_second_with_prefill": 1 / at_both,
        "not_counted": [*chunk.costs.unknown_loops, *turn.unknown_kernels, *turn.unknown_loops],
        "compile_seconds": {"decode": chunk.seconds, "prefill": prefill.seconds},
    }  # fmt: skip


def _decoding(draft: SampleDraft, chunk: Program, turn: Costs, memory: dict[str, float]) -> dict[str, Any]:
    """What a step does, with its share of what a chunk does once: a chunk has as many steps as a page has columns."""
    page, needed = draft.programs.page, draft.weights_read + memory["prompts"] + memory["pages"]
    one, once = _bounds(draft, turn), _bounds(draft, chunk.costs)
    at_best = Bounds(*(a + b / page for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(once), strict=True)))
    inside, between = by_kind(turn, list(draft.layout.mesh.devices.flat))
    return {
        "step": {
            "hbm_bytes": turn.hbm_bytes,
            "needed_bytes": needed,
            "ratio": turn.hbm_bytes / needed,
            "chunk_hbm_bytes": chunk.costs.hbm_bytes,
            "interconnect_bytes": inside,
            "network_bytes": between,
            "collectives": sum(c.times for c in turn.collectives),
            "flops": turn.flops + turn.kernel_flops,
        },
        **_speed(at_best, draft),
    }


def _speed(at_best: Bounds, draft: SampleDraft) -> dict[str, Any]:
    return {
        "seconds": dataclasses.asdict(at_best),
        "binds": at_best.binding,
        "seconds_per_token": at_best.step / draft.rows,
        "tokens_per_second": draft.rows / at_best.step,
        "tokens_per_second_per_chip": draft.rows / at_best.step / draft.topology.chips,
        # Each product waits for the sum of the one before: nothing of a step need be hidden behind the rest.
        "tokens_per_second_in_sequence": draft.rows / (max(at_best.compute, at_best.hbm) + at_best.interconnect),
    }


def _prefilling(draft: SampleDraft, prefill: Program, held: float) -> dict[str, Any]:
    at_best, shape = _bounds(draft, prefill.costs), draft.prefill_shape
    inside, _ = by_kind(prefill.costs, list(draft.layout.mesh.devices.flat))
    return {
        "rows": shape.rows,
        "width": shape.length,
        "tokens": draft.prefill_tokens,
        "total": prefill.total_bytes,
        "temporaries": prefill.total_bytes - held,
        "hbm_bytes": prefill.costs.hbm_bytes,
        "interconnect_bytes": inside,
        "bounds": dataclasses.asdict(at_best),
        "binds": at_best.binding,
        "seconds": at_best.step,
        "tokens_per_second": draft.prefill_tokens / at_best.step,
        "not_counted": [*prefill.costs.unknown_kernels, *prefill.costs.unknown_loops],
    }


def _bounds(draft: SampleDraft, costs: Costs) -> Bounds:
    layout = draft.layout
    precision = passes(layout.dtype, layout.platform)
    return bounds(costs, draft.topology, list(layout.mesh.devices.flat), passes=precision)


def other_mesh(s: Settings, model: ModelConfig, draft: SampleDraft) -> dict[str, Any] | None:
    """A step with all devices of a slice on the tensor axis; None where they are, or the model does not divide."""
    mesh = (draft.topology.slices, 1, -1)
    if row_shards(draft.layout.mesh) == draft.topology.slices:
        return None
    request = dataclasses.replace(draft.request, rows=draft.rows)
    try:
        other = draft_sampling(dataclasses.replace(s, mesh=mesh), model, draft.topology, request)
        chunk, turn = decode_program(other)
    except (UserError, TooLargeError):
        return None
    cache = abstract_cache(other.programs, other.rung)
    memory = {"prompts": local_bytes(cache.prompts) + local_bytes(cache.hidden), "pages": local_bytes(cache.pages)}
    measured = _decoding(other, chunk, turn, memory)
    return measured | {"mesh": dict(other.layout.mesh.shape), "memory": {"total": chunk.total_bytes}}


def search_rows(draft: SampleDraft, tried: Tried) -> int:
    """The largest number of rows on a device that fits, of the sampler's ladder; 0 if none does.

    The sampler's own formula of memory says where to begin, and compiling whether that fits.
    """
    room, shards = draft.topology.generation.hbm_bytes, draft.programs.shards

    def fits(rows: int) -> bool:
        one = draft.with_rows(rows)
        try:
            needed = max(decode_program(one)[0].total_bytes, prefill_program(one).total_bytes, one.moving)
        except TooLargeError as e:
            tried(rows * shards, str(e))
            return False
        tried(rows * shards, f"{needed / 2**30:.2f} GiB")
        return needed <= room

    allowed = [x for x in ROWS if draft.with_rows(x).lets]
    while allowed and not fits(allowed[-1]):
        allowed.pop()
    return allowed[-1] if allowed else 0
