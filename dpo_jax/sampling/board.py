"""What is where on the devices while answers are drawn: rows, prompts and pages, as the host keeps account of them.

One `Seats` is a device's share. Nothing here computes with a model; `engine.py` gives these numbers to the programs.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from dpo_jax.model.attention.paged import Tables
from dpo_jax.sampling.draws import Choice
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.sampling.programs import Going, Rung


@dataclasses.dataclass
class Question:
    """A prompt that is on a device, or waits.

    Attributes:
      index: of the prompt among those that were given.
      who: uint32 `[2]`, what its draws depend on.
      limit: the most tokens of its answers.
      asked: how they are drawn, and when they end.
      todo: which of its answers have not begun, the next one last.
      going: how many are being drawn.
      slot: on its device.
    """

    index: int
    ids: np.ndarray
    who: np.ndarray
    limit: int
    asked: SamplingParams
    todo: list[int] = dataclasses.field(default_factory=list)
    going: int = 0
    slot: int = -1


@dataclasses.dataclass
class Row:
    """An answer that is being drawn.

    Attributes:
      kept: how many of its tokens have their keys in pages: all but the last, between chunks.
      pages: which those are.
      checked: of how many tokens it is known that they do not end it.
    """

    question: Question
    sample: int
    tokens: list[int]
    logprobs: list[float]
    full_logprobs: list[float]
    kept: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    checked: int = 0

    @property
    def last(self) -> int:
        """The last position that it may come to."""
        return len(self.question.ids) + self.question.limit - 1


class Seats:
    """One device's rows, prompts and pages."""

    def __init__(self, rung: Rung, page: int):
        self.page = page
        self.rows: list[Row | None] = [None] * rung.rows
        self.prompts: list[Question | None] = [None] * rung.prompts
        self.free_pages = list(range(rung.pages))[::-1]

    def going(self) -> Iterator[tuple[int, Row]]:
        """Rows that are taken, with their numbers."""
        return ((r, row) for r, row in enumerate(self.rows) if row is not None)

    @property
    def free_rows(self) -> int:
        return self.rows.count(None)

    @property
    def free_prompts(self) -> int:
        return self.prompts.count(None)

    @property
    def ready(self) -> int:
        """How many answers to the prompts here have not begun."""
        return sum(len(question.todo) for question in self.prompts if question is not None)

    def seat(self, question: Question) -> int:
        """Give a prompt a slot."""
        question.slot, question.todo = self.prompts.index(None), list(range(question.asked.n))[::-1]
        self.prompts[question.slot] = question
        return question.slot

    def begin(self, rung: Rung) -> Row:
        """Give the next answer a row."""
        question = next(q for q in self.prompts if q is not None and q.todo)
        row = Row(question, question.todo.pop(), [], [], [])
        at = question.slot if rung.is_plain else self.rows.index(None)
        assert self.rows[at] is None
        self.rows[at] = row
        question.going += 1
        return row

    def give_up(self, missing: int) -> None:
        """Take back answers until so many pages more are free, those with the fewest tokens; they begin again later."""
        while missing > 0:
            held = [(len(row.tokens), r) for r, row in self.going()]
            at = min(held)[1]
            row = self.rows[at]
            assert row is not None
            missing -= max(self.pages_needed(row), len(row.pages))
            self.end(at)
            row.question.todo.append(row.sample)

    def end(self, at: int) -> None:
        """A row's answer has ended: the row and its pages are free."""
        row = self.rows[at]
        assert row is not None
        self.rows[at] = None
        self.free_pages += row.pages[::-1]
        row.question.going -= 1

    def leave(self) -> None:
        """Free the slots of prompts all of whose answers have ended."""
        for slot, q in enumerate(self.prompts):
            if q is not None and not q.todo and not q.going:
                self.prompts[slot] = None

    def pages_needed(self, row: Row) -> int:
        """Pages that a row has to have before a chunk: for a page more of tokens, its last one is never kept."""
        return -(-min(row.kept + self.page, row.question.limit - 1) // self.page)

    def missing_pages(self) -> int:
        """How many pages more than are free the next chunk needs."""
        wanted = sum(max(0, self.pages_needed(row) - len(row.pages)) for _, row in self.going())
        return wanted - len(self.free_pages)

    def most_row_pages(self) -> int:
        """The most pages that a row needs for the next chunk."""
        return max((self.pages_needed(row) for _, row in self.going()), default=0)

    def take_pages(self) -> None:
        """Give every row the pages that it needs."""
        for _, row in self.going():
            while len(row.pages) < self.pages_needed(row):
                row.pages.append(self.free_pages.pop())

    def fill(self, going: Going, rung: Rung) -> None:
        """Write this device's numbers into its part of the arrays."""
        t, plain = going.tables, rung.is_plain
        place = [0] * rung.prompts
        for r, row in self.going():
            q, slot = row.question, row.question.slot
            going.token[r], going.drawn[r] = row.tokens[-1], len(row.tokens)
            going.limit[r], going.last[r] = q.limit, row.last
            going.who[r] = (*q.who, row.sample)
            going.choice.put(r, Choice.of(q.asked))
            first = row.kept // self.page
            for i, page in enumerate(row.pages[first : first + 2]):
                going.targets[r, i] = page
            t.kept[r], t.position[r] = row.kept, len(q.ids) + row.kept
            if not plain:
                t.asks[slot, place[slot]], t.place[r] = r, slot * rung.answers + place[slot]
                place[slot] += 1
            for i, page in enumerate(row.pages):
                t.pages[r, i], t.owner[page], t.start[page] = page, r, i * self.page
        for slot, here in enumerate(self.prompts):
            t.prompt_tokens[slot] = 0 if here is None else len(here.ids)

    def move(self, rung: Rung) -> tuple[np.ndarray, np.ndarray]:
        """Take everything over to another rung: which slots and pages of the old one are at each place of the new."""
        slots, pages = np.full(rung.prompts, len(self.prompts), np.int32), []
        rows: list[Row | None] = [None] * rung.rows
        prompts: list[Question | None] = [None] * rung.prompts
        for new, q in enumerate(q for q in self.prompts if q is not None):
            slots[new], q.slot, prompts[new] = q.slot, new, q
        old_pages = sum(len(row.pages) for _, row in self.going()) + len(self.free_pages)
        for new, (_, row) in enumerate(list(self.going())):
            rows[row.question.slot if rung.is_plain else new] = row
            pages += row.pages
            row.pages = list(range(len(pages) - len(row.pages), len(pages)))
        self.rows, self.prompts = rows, prompts
        self.free_pages = list(range(len(pages), rung.pages))[::-1]
        return slots, np.asarray(pages + [old_pages] * (rung.pages - len(pages)), np.int32)


def numbers_of(seats: list[Seats], rung: Rung) -> Going:
    """The numbers of all devices behind each other, as `Programs.decode` takes them."""
    shares = []
    for seat in seats:
        R, P, N = rung.rows, rung.prompts, rung.pages
        zeros = lambda *shape: np.zeros(shape, np.int32)
        tables = Tables(
            asks=None if rung.is_plain else np.full((P, rung.answers), R, np.int32),
            place=None if rung.is_plain else np.full(R, P * rung.answers, np.int32),
            prompt_tokens=zeros(P),
            owner=np.full(N, R, np.int32),
            start=zeros(N),
            pages=np.full((R, rung.row_pages), N, np.int32),
            kept=zeros(R),
            position=zeros(R),
        )
        going = Going(
            token=zeros(R), drawn=zeros(R), limit=zeros(R), last=zeros(R), who=np.zeros((R, 3), np.uint32),
            choice=Choice.empty(R), targets=np.full((R, 2), N, np.int32), tables=tables,
        )  # fmt: skip
        seat.fill(going, rung)
        shares.append(going)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *shares)
