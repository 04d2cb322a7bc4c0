"""One call of the sampler: what waits, what is being drawn, and what has ended.

Decoding runs in chunks, each one loop on the devices; between chunks answers that have ended leave, and others take
their places.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Hashable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.model.tuning import exact_products
from dpo_jax.parallel.mesh import ROW_AXES, local_rows, row_shards, to_global
from dpo_jax.rows.build import build_rows
from dpo_jax.sampling.board import Question, Row, Seats, numbers_of
from dpo_jax.sampling.draws import Choice, Numbers
from dpo_jax.sampling.endings import Ending
from dpo_jax.sampling.ladder import (
    COUNTS,
    ROWS,
    at_least,
    first_rung,
    grown,
    packed_size,
    prompts_shape,
    shrunk,
)
from dpo_jax.sampling.memory import MOVING, free_bytes
from dpo_jax.sampling.params import Answer
from dpo_jax.sampling.programs import Cache, Programs, Rung
from dpo_jax.sampling.sizes import WORTH_COMPILING, Sizes


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How much is done at once; what is drawn does not depend on it.

    Attributes:
      rows: the most answers at once of a data shard: a device, or those of a tensor axis; 0 is what suits it.
      page: tokens of a page of the cache, and the most of a chunk.
      prefill: tokens of prompts that a device computes at once.
      cache_dtype: "int8", or empty for the compute dtype.
      compact: whether rows are given up as answers end and none wait.
      memory: MiB of a device that the cache may take; 0 is what is free.
    """

    rows: int = 0
    page: int = 0
    prefill: int = 0
    cache_dtype: str = ""
    compact: bool = True
    memory: int = 0


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An answer, and which prompt (by its place among those given) and which of its n it is."""

    prompt: int
    sample: int
    answer: Answer


class Drawing:
    """All answers of one call.

    Args:
      programs, params: of the model.
      waiting: the prompts, longest first. All are asked for with the same seed, round and `min_tokens`.
      ending: tells when an answer has ended.
      capacity: how much is done at once.
      fewer: whether fewer rows will do where memory is short.

    Raises:
      UserError: the cache does not fit the memory.
    """

    def __init__(
        self,
        programs: Programs,
        params: Params,
        waiting: list[Question],
        ending: Ending,
        capacity: Capacity,
        fewer: bool,
    ):
        self.programs, self.ending, self.capacity = programs, ending, capacity
        self.layout, self.mesh = programs.layout, programs.layout.mesh
        self.numbers = Numbers.of(waiting[0].asked, sorted(ending.stops))
        self.waiting = collections.deque(waiting)
        self._chosen: dict[Hashable, Sizes] = {}
        self.shards = row_shards(self.mesh)
        with self._on_mesh():
            self.rung, self.most_pages = self._first_rung(fewer)
        self.params, self.apart = params, programs.parameters(params)
        self.seats = [Seats(self.rung, capacity.page) for _ in range(self.shards)]
        with self._on_mesh():
            self.cache: Cache = programs.empty(rung=self.rung)

    def _first_rung(self, fewer: bool) -> tuple[Rung, int]:
        """Where to begin, and the most pages that there may ever be; with fewer rows than would suit, if need be."""
        share, limit = -(-len(self.waiting) // self.shards), max(q.limit for q in self.waiting)
        longest, needed = len(self.waiting[0].ids), -(-(limit - 1) // self.capacity.page)
        answers = max(q.asked.n for q in self.waiting)
        free = float(self.capacity.memory << 20) or free_bytes(self.layout)
        fit = [x for x in ROWS[::-1] if x < self.capacity.rows] if fewer else []
        for rows in (self.capacity.rows, *fit):
            rung = first_rung(rows, answers, share, longest, limit, self.capacity.page)
            most = self.programs.most_pages(rung, free)
            if most >= max(needed, rung.pages):
                return rung, most
        least = self.programs.bytes_of(dataclasses.replace(rung, pages=max(needed, rung.pages)))
        raise UserError(
            f"rows={rung.rows}: the cache for prompts of {longest:,} and answers of {limit:,} tokens needs "
            f"{least * MOVING / 2**30:.2f} GiB, and {free / 2**30:.2f} are free; use fewer rows, a smaller max_tokens, "
            "or cache_dtype=int8"
        )

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        exact = exact_products(self.layout.dtype, self.layout.platform)
        with jax.set_mesh(self.mesh), exact, jax.transfer_guard_host_to_device("allow"):
            yield

    def answers(self) -> Iterator[Sampled]:
        """All of them, as they end."""
        while self.waiting or any(seat.free_prompts < len(seat.prompts) for seat in self.seats):
            ended = []
            with self._on_mesh():
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
        return any(self._has_room(seat) and seat.ready for seat in self.seats)

    def _has_room(self, seat: Seats) -> bool:
        """Whether another answer may begin: where pages are no longer added, those there are must last for a while."""
        rows = len(seat.rows) - seat.free_rows
        return seat.free_rows > 0 and (2 * self.rung.pages <= self.most_pages or len(seat.free_pages) > rows)

    def _prefill(self) -> None:
        """Compute waiting prompts until every device has answers to begin in its free rows."""
        while self.waiting and any(self._lacks_prompts(seat) for seat in self.seats):
            self._compute(self._packed())

    def _sizes(self, program: str, of: Hashable) -> Sizes:
        """The sizes that `program` runs in where all else that its shapes depend on is `of`.

        They are of this call alone: what is computed must not depend on the calls before, which another process that
        goes on has not made.
        """
        return self._chosen.setdefault((program, of), Sizes(WORTH_COMPILING[self.layout.platform]))

    def _lacks_prompts(self, seat: Seats) -> bool:
        """Whether a device has more free rows than answers that could begin, and room for another prompt."""
        return seat.ready < seat.free_rows and seat.free_prompts > 0

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
        used = max(sum(len(q.ids) for q in questions) for questions in packed)
        flops = 2 * self.layout.config.active_parameter_count() * self.shards
        wanted = packed_size(max(map(len, packed)), used)
        width, count = self._sizes("prefill", self.rung).choose(wanted, lambda size: flops * size[0])
        shape = prompts_shape(self.shards, width, count)
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
            while seat.ready and self._has_room(seat):
                rows.append((d, seat.begin(self.rung)))
        flops = 2 * self.layout.config.vocab_size * self.layout.config.hidden_size
        sizes = self._sizes("begin", self.rung.prompts)
        for start in range(0, len(rows), COUNTS[-1]):
            some = rows[start : start + COUNTS[-1]]
            (count,) = sizes.choose((at_least(COUNTS, len(some)),), lambda size: flops * size[0])
            slots, who, choice = np.zeros(count, np.int32), np.zeros((count, 3), np.uint32), Choice.empty(count)
            for i, (d, row) in enumerate(some):
                slots[i] = d * self.rung.prompts + row.question.slot
                who[i] = (*row.question.who, row.sample)
                choice.put(i, Choice.of(row.question.asked))
            told = jax.tree.map(self._same, (slots, who, choice))
            drawn = self.programs.begin(self.params, self.cache.hidden, *told, self._numbers())
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
        return bool(self.waiting) or any(seat.ready for seat in self.seats)

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
            seat.leave()
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
        added = rung.pages - self.rung.pages
        missing = max(seat.missing_pages() for seat in self.seats) - added
        row_pages = max(seat.most_row_pages() for seat in self.seats)
        if missing > 0 or row_pages > rung.row_pages:
            rung = grown(rung, max(0, missing), row_pages)
        if rung.pages > self.most_pages:
            # The youngest answers are given up for now, and come again with the same draws.
            rung = dataclasses.replace(rung, pages=max(self.rung.pages, self.most_pages))
            for seat in self.seats:
                seat.give_up(seat.missing_pages() - (rung.pages - self.rung.pages))
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
