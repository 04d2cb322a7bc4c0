"""Sampling on the mesh: many answers at once, from the parameters as they lie, over a cache in pages.

A prompt is computed once, packed in a row with others, and all its answers read its keys and values. Decoding runs in
chunks, each one loop on the devices; between chunks answers that have ended leave, and others take their places.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.model.placement import Layout
from dpo_jax.parallel.mesh import ROW_AXES, local_rows, row_shards, to_global
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.board import Question, Row, Seats, numbers_of
from dpo_jax.sampling.draws import Filters, Numbers
from dpo_jax.sampling.endings import Ending
from dpo_jax.sampling.ladder import (
    COUNTS,
    ROWS,
    WORTH_COMPILING,
    at_least,
    first_rung,
    grown,
    power_of_two,
    shrunk,
    width_of,
)
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.sampling.programs import Cache, Programs


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How much is done at once; what is drawn does not depend on it.

    Attributes:
      rows: the most answers that a device decodes at once; 0 is what suits it.
      page: tokens of a page of the cache, and the most of a chunk.
      prefill: tokens of prompts that a device computes at once.
      cache_dtype: "int8", or empty for the compute dtype.
      compact: whether rows are given up as answers end and none wait.
    """

    rows: int = 0
    page: int = 0
    prefill: int = 0
    cache_dtype: str = ""
    compact: bool = True


SUITS = {"cpu": Capacity(128, 32, 1024), "gpu": Capacity(256, 32, 4096), "tpu": Capacity(256, 32, 4096)}


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An answer, and which prompt (by its place among those given) and which of its n it is."""

    prompt: int
    sample: int
    answer: Answer


def prompt_identity(value: str | int | Sequence[int]) -> np.ndarray:
    """Two uint32 numbers for a prompt's id, or for its tokens where it has none: what its draws depend on."""
    text = str(value) if isinstance(value, str | int) else "tokens " + " ".join(map(str, value))
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4").copy()


def identities(prompts: Sequence[Sequence[int]], ids: Sequence[str | int] | None) -> list[np.ndarray]:
    """`prompt_identity` of every prompt. Equal prompts without ids are told apart by how many of them came before."""
    if ids is not None:
        return [prompt_identity(one) for one in ids]
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(prompt_identity((*prompt, -1 - seen[prompt]) if seen[prompt] else prompt))
        seen[prompt] += 1
    return found


class Sampler:
    """Draws answers of one model on its mesh. What was compiled serves every later call.

    Args:
      layout: of the model.
      tokenizer: for texts; None leaves them empty, and texts cannot stop an answer.
      stops: token ids that end an answer, -1 for none.
      capacity: how much is done at once.
      longest: the most tokens of a prompt with its answer; 0 is what the model says that it has positions for.
    """

    def __init__(
        self, layout: Layout, tokenizer: Any, stops: Sequence[int], capacity: Capacity = Capacity(), *, longest: int = 0
    ):
        self.layout, self.tokenizer, self.stops = layout, tokenizer, tuple(stops)
        self.longest = longest or layout.config.max_position_embeddings
        suits = SUITS[layout.platform]
        given = {f.name: getattr(capacity, f.name) or getattr(suits, f.name) for f in dataclasses.fields(Capacity)}
        self.capacity = Capacity(**given | {"compact": capacity.compact})
        self._programs: dict[Any, Programs] = {}

    def programs(self, reach: int, filters: Filters) -> Programs:
        """The programs for sequences of at most `reach` tokens, a power of two, so that few are compiled."""
        key = power_of_two(reach), filters
        if key not in self._programs:
            c = self.capacity
            dtype = c.cache_dtype or None
            self._programs[key] = Programs(self.layout, page=c.page, cache_dtype=dtype, reach=key[0], filters=filters)
        return self._programs[key]

    def sample(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        asked: SamplingParams,
        ids: Sequence[str | int] | None = None,
    ) -> Iterator[Sampled]:
        """Answers as they end; every process of several must take all of them.

        Args:
          params: the model's, of any dtype; adapters among them or not.
          prompts: token ids, at least one each.
          ids: of prompts, which draws depend on; None: on their tokens.

        Raises:
          UserError: a prompt is empty or leaves no room for an answer, or the cache does not fit.
        """
        limits = self.check(prompts, asked)
        if not prompts:
            return
        reach = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
        whos = identities(prompts, ids)
        waiting = [
            Question(i, np.asarray(p, np.int32), w, n)
            for i, (p, w, n) in enumerate(zip(prompts, whos, limits, strict=True))
        ]
        # Longest first: prompts that are there together are of about one length.
        waiting.sort(key=lambda q: -len(q.ids))
        yield from _Run(self, self.programs(reach, Filters.of(asked)), params, waiting, asked).answers()

    def answers(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        asked: SamplingParams,
        ids: Sequence[str | int] | None = None,
    ) -> list[list[Answer]]:
        """All n answers to every prompt, in order; see `sample`."""
        found = {(one.prompt, one.sample): one.answer for one in self.sample(params, prompts, asked, ids)}
        return [[found[i, k] for k in range(asked.n)] for i in range(len(prompts))]

    def check(self, prompts: Sequence[Sequence[int]], asked: SamplingParams) -> list[int]:
        """The most tokens of every prompt's answers: `max_tokens`, or what there is room for.

        Raises:
          UserError: as `sample` does.
        """
        limits = []
        if asked.stop and self.tokenizer is None:
            raise UserError("stop: texts end an answer only where there is a tokenizer; use stop_token_ids")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {i + 1} has no tokens; give at least one")
            room = self.longest - len(prompt)
            if room < 1:
                raise UserError(
                    f"prompt {i + 1} has {len(prompt):,} tokens, and the model has {self.longest:,} positions for prompt and"
                    " answer together; shorten the prompt"
                )
            limits.append(min(asked.max_tokens, room))
        return limits


class _Run:
    """One call of `Sampler.sample`."""

    def __init__(
        self, sampler: Sampler, programs: Programs, params: Params, waiting: list[Question], asked: SamplingParams
    ):
        self.programs, self.asked, self.capacity = programs, asked, sampler.capacity
        self.layout, self.mesh = sampler.layout, sampler.layout.mesh
        self.params, self.apart = params, programs.parameters(params)
        stops = tuple(dict.fromkeys((*sampler.stops, *asked.stop_token_ids)))
        self.ending = Ending(asked, stops, sampler.tokenizer)
        self.numbers = Numbers.of(asked, stops)
        self.waiting = collections.deque(waiting)
        self.shards = row_shards(self.mesh)
        share, limit = -(-len(waiting) // self.shards), max(q.limit for q in waiting)
        longest = len(waiting[0].ids)
        self.rung = first_rung(self.capacity.rows, asked.n, share, longest, limit, self.capacity.page)
        self.seats = [Seats(self.rung, self.capacity.page) for _ in range(self.shards)]
        with self._on_mesh():
            self.cache: Cache = programs.empty(rung=self.rung)

    def _on_mesh(self) -> Any:
        return jax.set_mesh(self.mesh)

    def answers(self) -> Iterator[Sampled]:
        """All of them, as they end."""
        while self.waiting or any(seat.free_prompts < len(seat.prompts) for seat in self.seats):
            ended = []
            with self._on_mesh(), jax.transfer_guard_host_to_device("allow"):
                self._prefill()
                ended += self._begin()
                if self._is_going() and not self._can_begin():
                    self._fit()
                    ended += self._decode()
            yield from ended

    # --------------------------------------------------------------------------------------------------- beginning

    def _is_going(self) -> bool:
        return any(True for seat in self.seats for _ in seat.going())

    def _can_begin(self) -> bool:
        return any(seat.free_rows and any(True for _ in seat.waiting(self.asked.n)) for seat in self.seats)

    def _prefill(self) -> None:
        """Compute waiting prompts until every device has answers to begin in its free rows."""
        while self.waiting and any(self._lacks_prompts(seat) for seat in self.seats):
            self._compute(self._packed())

    def _lacks_prompts(self, seat: Seats) -> bool:
        """Whether a device has more free rows than answers that could begin, and room for another prompt."""
        ready = sum(self.asked.n - question.begun for question in seat.waiting(self.asked.n))
        return ready < seat.free_rows and seat.free_prompts > 0

    def _packed(self) -> list[list[Question]]:
        """Seat as many waiting prompts as are computed at once; which they are, for every device."""
        packed: list[list[Question]] = [[] for _ in self.seats]
        budget = max(self.capacity.prefill, len(self.waiting[0].ids))
        used = [0] * self.shards
        while self.waiting:
            least = budget - len(self.waiting[0].ids)
            fits = [d for d in range(self.shards) if self.seats[d].free_prompts and used[d] <= least]
            fits = [d for d in fits if len(packed[d]) < COUNTS[-1]]
            if not fits:
                break
            at = max(fits, key=lambda d: (self.seats[d].free_prompts, -d))
            question = self.waiting.popleft()
            self.seats[at].seat(question)
            packed[at].append(question)
            used[at] += len(question.ids)
        return packed

    def _compute(self, packed: list[list[Question]]) -> None:
        """Prefill prompts, one row of a device's prompts behind each other."""
        count = at_least(COUNTS, max(map(len, packed)))
        used = max(sum(len(q.ids) for q in questions) for questions in packed)
        shape = RowShape(width_of(used), (0,), self.shards, count)
        groups = [(q.ids, np.zeros(0, np.int32)) for questions in packed for q in questions]
        placed, at = np.full((self.shards, count), -1, np.int64), 0
        new = np.zeros((self.shards, count, 3), np.int32)
        new[:, :, 0] = self.rung.prompts
        last = np.zeros((self.shards, shape.length), np.int32)
        for d, questions in enumerate(packed):
            column = 0
            for k, q in enumerate(questions):
                placed[d, k], at = at, at + 1
                end = column + len(q.ids)
                new[d, k] = q.slot, column, end - 1
                last[d, column:end] = len(q.ids) + q.limit - 1
                column = end
        batch = build_rows(groups, placed, shape)
        mine = local_rows(self.mesh, self.shards)
        rows = to_global(batch.map(lambda x: x[None, mine]), self.mesh, self.shards).map(lambda x: x[0])
        by_row = self._by_row(last), self._by_row(new.reshape(-1, 3))
        self.cache = self.programs.prefill(self.params, self.cache, rows, *by_row, shape=shape)

    def _begin(self) -> list[Sampled]:
        """Draw the first token of answers for which there are rows."""
        rows: list[tuple[int, Row]] = []
        for d, seat in enumerate(self.seats):
            for question in list(seat.waiting(self.asked.n)):
                while question.begun < self.asked.n and seat.free_rows:
                    row = Row(question, question.begun, [], [], [])
                    seat.begin(row, self.rung)
                    question.begun += 1
                    rows.append((d, row))
        for start in range(0, len(rows), COUNTS[-1]):
            some = rows[start : start + COUNTS[-1]]
            count = at_least(COUNTS, len(some))
            slots, who = np.zeros(count, np.int32), np.zeros((count, 3), np.uint32)
            for i, (d, row) in enumerate(some):
                slots[i] = d * self.rung.prompts + row.question.slot
                who[i] = (*row.question.who, row.sample)
            drawn = self.programs.begin(self.params, self.cache, self._same(slots), self._same(who), self._numbers())
            token, logprob, full = (x.tolist() for x in jax.device_get(drawn))
            for i, (_, row) in enumerate(some):
                row.tokens, row.logprobs, row.full_logprobs = [token[i]], [logprob[i]], [full[i]]
        return self._leave()

    # ---------------------------------------------------------------------------------------------------- decoding

    def _decode(self) -> list[Sampled]:
        going = numbers_of(self.seats, self.rung)
        live = int((going.limit > 0).sum())
        floor = max(0, live - max(1, live // 16)) if self._more_come() else self._next_floor(live)
        inputs = jax.tree.map(self._by_row, going), self._numbers(), self._same(np.asarray(floor, np.int32))
        self.cache, chunk = self.programs.decode(self.apart, self.cache, *inputs, rung=self.rung)
        token, logprob, full, steps = jax.device_get(chunk)
        for d, seat in enumerate(self.seats):
            for r, row in seat.going():
                at = d * self.rung.rows + r
                row.tokens += token[at, :steps].tolist()
                row.logprobs += logprob[at, :steps].tolist()
                row.full_logprobs += full[at, :steps].tolist()
                row.kept += int(steps)
        return self._leave()

    def _more_come(self) -> bool:
        return bool(self.waiting) or any(True for seat in self.seats for _ in seat.waiting(self.asked.n))

    def _next_floor(self, live: int) -> int:
        """How many rows must be left for a smaller rung; 0 if there is none, or it is not worth it."""
        if not self.capacity.compact:
            return 0
        fewer = max((x for x in ROWS if x * self.shards < live), default=0) * self.shards
        return fewer if fewer and self._is_worth(live, fewer) else 0

    def _is_worth(self, rows: int, fewer: int) -> bool:
        """Whether going on with fewer rows saves more than it takes to compile for them."""
        left = max(row.question.limit - len(row.tokens) for seat in self.seats for _, row in seat.going())
        saved = (rows - fewer) * left * 2 * self.layout.config.active_parameter_count()
        return saved > WORTH_COMPILING[self.layout.platform]

    def _leave(self) -> list[Sampled]:
        """Take out the answers that have ended."""
        ended = []
        for seat in self.seats:
            for r, row in list(seat.going()):
                answer = self.ending.of(row)
                if answer is not None:
                    ended.append(Sampled(row.question.index, row.sample, answer))
                    seat.end(r)
            seat.leave(self.asked.n)
        return ended

    def _fit(self) -> None:
        """Take another rung where this one has too few pages, or far more rows than are left."""
        rung = self.rung
        if not self._more_come() and self.capacity.compact:
            rows = max(sum(1 for _ in seat.going()) for seat in self.seats)
            if at_least(ROWS, rows) < rung.rows and self._is_worth(rung.rows * self.shards, rows * self.shards):
                prompts = max(len(seat.prompts) - seat.free_prompts for seat in self.seats)
                pages = max(sum(seat.pages_needed(row) for _, row in seat.going()) for seat in self.seats)
                longest = max(len(q.ids) for seat in self.seats for q in seat.prompts if q is not None)
                rung = shrunk(rung, rows, prompts, pages, longest)
        free = rung.pages - self.rung.pages
        missing = max(seat.missing_pages() for seat in self.seats) - free
        row_pages = max(seat.most_row_pages() for seat in self.seats)
        if missing > 0 or row_pages > rung.row_pages:
            rung = grown(rung, max(0, missing), row_pages)
        if rung != self.rung:
            moved = [seat.move(rung) for seat in self.seats]
            taken = (self._by_row(np.concatenate(x)) for x in zip(*moved, strict=True))
            self.cache, self.rung = self.programs.move(self.cache, *taken, rung=rung), rung
        for seat in self.seats:
            seat.take_pages()

    # ---------------------------------------------------------------------------------------------------- to devices

    def _put(self, x: np.ndarray, spec: P) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec)
        if self.mesh.size == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: x[index])

    def _by_row(self, x: np.ndarray) -> jax.Array:
        return self._put(x, P(ROW_AXES))

    def _same(self, x: np.ndarray) -> jax.Array:
        return self._put(np.asarray(x), P())

    def _numbers(self) -> Numbers:
        return Numbers(*map(self._same, self.numbers))
