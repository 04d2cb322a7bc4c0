"""Sampling on the mesh: many answers at once, from the parameters as they lie, over a cache in pages.

A prompt is computed once, packed in a row with others, and all its answers read its keys and values. Decoding runs in
chunks, each one loop on the devices; between chunks answers that have ended leave, and others take their places.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.model.placement import Layout
from dpo_jax.parallel.mesh import row_shards
from dpo_jax.sampling.board import Question
from dpo_jax.sampling.drawing import Capacity, Drawing, Sampled
from dpo_jax.sampling.draws import Filters
from dpo_jax.sampling.endings import Ending
from dpo_jax.sampling.ladder import power_of_two
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.sampling.programs import Programs

SUITS = {"cpu": Capacity(128, 32, 1024), "gpu": Capacity(256, 32, 4096), "tpu": Capacity(256, 32, 4096)}


def suited(layout: Layout) -> Capacity:
    """What suits these devices: those of a tensor axis have as many rows together as each would have alone."""
    suits = SUITS[layout.platform]
    return dataclasses.replace(suits, rows=suits.rows * (layout.mesh.size // row_shards(layout.mesh)))


Name = str | int | tuple[int, ...]


def prompt_identity(value: Name) -> np.ndarray:
    """Two uint32 numbers for a prompt's id, or for its tokens where it has none: what its draws depend on."""
    text = str(value) if isinstance(value, str | int) else "tokens " + " ".join(map(str, value))
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4").copy()


def draw_names(prompts: Sequence[Sequence[int]], ids: Sequence[Name | None] | None) -> list[Name]:
    """What the draws of each prompt depend on: its id, or its tokens where it has none.

    Equal prompts without ids are told apart by how many of them came before. Names of prompts that are answered in
    several calls are made of all of them, and given as `ids`.
    """
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    found: list[Name] = []
    for prompt, one in zip(map(tuple, prompts), [None] * len(prompts) if ids is None else ids, strict=True):
        if one is not None:
            found.append(one)
            continue
        found.append((*prompt, -1 - seen[prompt]) if seen[prompt] else prompt)
        seen[prompt] += 1
    return found


@dataclasses.dataclass(frozen=True)
class AnswerRequest:
    """Prompts, and how they are to be answered.

    Attributes:
      prompts: token ids, at least one each.
      asked: of every prompt.
      ids: of prompts, which draws depend on, or names by `draw_names`; None: on a prompt's tokens.
    """

    prompts: Sequence[Sequence[int]]
    asked: SamplingParams
    ids: Sequence[Name | None] | None = None


class Sampler:
    """Draws answers of one model on its mesh. What was compiled serves every later call.

    Args:
      layout: of the model.
      tokenizer: for texts; None leaves them empty, and texts cannot stop an answer.
      stops: token ids that end an answer, -1 for none.
      capacity: how much is done at once; None is what suits the devices.
      longest: the most tokens of a prompt with its answer; 0 is what the model says that it has positions for.
    """

    def __init__(
        self,
        layout: Layout,
        tokenizer: Any,
        stops: Sequence[int],
        capacity: Capacity | None = None,
        *,
        longest: int = 0,
    ):
        self.layout, self.tokenizer, self.stops = layout, tokenizer, tuple(stops)
        self.longest = longest or layout.config.max_position_embeddings
        suits, capacity = suited(layout), capacity or Capacity()
        self._fewer = capacity.rows == 0
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
        ids: Sequence[Name | None] | None = None,
    ) -> Iterator[Sampled]:
        """Answers as they end; every process of several must take all of them.

        Args:
          params: the model's, of any dtype; adapters among them or not.
          prompts, asked, ids: see `AnswerRequest`.

        Raises:
          UserError: a prompt is empty or leaves no room for an answer, or the cache does not fit.
        """
        return self._drawn(params, [AnswerRequest(prompts, asked, ids)])

    def _drawn(self, params: Params, requests: Sequence[AnswerRequest]) -> Iterator[Sampled]:
        """Answers to the prompts of all requests, which are counted through."""
        waiting: list[Question] = []
        for one in requests:
            whos = map(prompt_identity, draw_names(one.prompts, one.ids))
            for prompt, who, limit in zip(one.prompts, whos, self.check(one.prompts, one.asked), strict=True):
                waiting.append(Question(len(waiting), np.asarray(prompt, np.int32), who, limit, one.asked))
        if not waiting:
            return
        # Longest first: prompts that are there together are of about one length.
        waiting.sort(key=lambda q: -len(q.ids))
        ways = list(dict.fromkeys(one.asked for one in requests if len(one.prompts)))
        reach = max(len(q.ids) + q.limit for q in waiting)
        ending = Ending(tuple(dict.fromkeys((*self.stops, *ways[0].stop_token_ids))), self.tokenizer)
        programs = self.programs(reach, Filters.of(*ways))
        yield from Drawing(programs, params, waiting, ending, self.capacity, self._fewer).answers()

    def together(self, params: Params, requests: Sequence[AnswerRequest]) -> list[list[list[Answer]]]:
        """All n answers to every prompt of every request, drawn in one call: the same as each request alone would get.

        Args:
          params: the model's.
          requests: of one `seed`, `round`, `min_tokens` and one set of `stop_token_ids`; all else may differ.

        Raises:
          UserError: as `sample` does.
          ValueError: they differ in what one call shares.
        """
        shared = {(p.seed, p.round, p.min_tokens, p.stop_token_ids) for p in (one.asked for one in requests)}
        if len(shared) > 1:
            raise ValueError(f"requests of one call differ in seed, round, min_tokens or stop_token_ids: {shared}")
        drawn = {(one.prompt, one.sample): one.answer for one in self._drawn(params, requests)}
        first = itertools.accumulate((len(one.prompts) for one in requests), initial=0)
        return [
            [[drawn[at + i, k] for k in range(one.asked.n)] for i in range(len(one.prompts))]
            for at, one in zip(first, requests, strict=False)  # the last sum is behind all of them
        ]

    def answers(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        asked: SamplingParams,
        ids: Sequence[Name | None] | None = None,
    ) -> list[list[Answer]]:
        """All n answers to every prompt, in order; see `sample`."""
        return self.together(params, [AnswerRequest(prompts, asked, ids)])[0]

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
                    f"prompt {i + 1} has {len(prompt):,} tokens, and the model has {self.longest:,} positions for a"
                    " prompt and its answer; shorten the prompt"
                )
            limits.append(min(asked.max_tokens, room))
        return limits
