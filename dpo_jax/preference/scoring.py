"""Numbers for answers by a model on the mesh: tokens in, one number for each completion out.

Shapes: n completions of a group, B rows, one group each.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message, Skip
from dpo_jax.data.render import Renderer, make_renderer, render_batch
from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.placement import Layout
from dpo_jax.model.tuning import exact_products
from dpo_jax.objective.logps import LogpsFn
from dpo_jax.parallel.mesh import local_rows, make_mesh, replicated, row_shards, to_global
from dpo_jax.preference.models import Answered
from dpo_jax.rows.build import Group, build_rows
from dpo_jax.rows.shape import RowShape

MOST_COMPLETIONS = 8  # of a group: they share the prompt's computation
TOKENS = {"cpu": 4096, "gpu": 65536, "tpu": 65536}  # of the rows of one batch, for each device that shares them
FEW = 8  # batches that are not worth more than one program
_UNLIMITED = 1 << 30
# Stand beside an answer where two are rendered: any two that differ.
_OTHERS: tuple[list[Message], list[Message]] = (
    [{"role": "assistant", "content": "1"}],
    [{"role": "assistant", "content": "2"}],
)

Ids = tuple[int, ...]
# Token ids of prompts with one completion each to a number for each, NaN where there is none.
Score = Callable[[Sequence[tuple[Ids, Ids] | None]], np.ndarray]


def judge_mesh(config: ModelConfig) -> Mesh:
    """All devices: the parameters over as many as divide the model's width, rows over the rest."""
    fsdp = math.gcd(jax.device_count(), config.hidden_size)
    return make_mesh(-1, fsdp, 1)


def answer_renderer(tokenizer: Any, prompt_format: str = "auto", chat_template: str = "") -> Renderer:
    """What renders conversations with their answers as training does, of any length."""
    return make_renderer(tokenizer, prompt_format, _UNLIMITED, _UNLIMITED, chat_template=chat_template)


def answer_tokens(renderer: Renderer, answered: Sequence[Answered]) -> list[tuple[Ids, Ids] | None]:
    """Token ids of prompt and completion as training has them.

    None where the template refuses the conversation, or where only both texts of a pair tell what its prompt is.
    """
    pairs = [LabeledComparison(_with_another(one), "A") for one in answered]
    return [
        None if isinstance(found, Skip) or not one.conversation else (tuple(found.prompt), tuple(found.chosen))
        for one, found in zip(answered, render_batch(renderer, pairs), strict=True)
    ]


def _with_another(one: Answered) -> Comparison:
    """The answer as A, and any other as B: two are rendered together."""
    said = [str(turn.get("content")).strip() for turn in one.completion]
    other = _OTHERS[said == ["1"]]  # templates may trim what is said
    texts = None if one.texts is None else (*one.texts, str(other[0]["content"]))
    return Comparison(one.conversation, one.completion, other, one.tools, one.chat_template_kwargs, texts)


def make_score(layout: Layout, params: Params, model: LogpsFn) -> Score:
    """Scores by a model as a step sees it (`objective/policy_logps.py`); every process of several calls it alike.

    Answers to one prompt share its computation. Rows are padded to few widths, so that few programs are compiled. An
    answer beyond the model's positions has no number.

    Args:
      layout, params: of the model.
      model: parameters and rows to numbers of completions.
    """
    mesh, shards, most = layout.mesh, row_shards(layout.mesh), layout.config.max_position_embeddings
    compiled = jax.jit(
        lambda params, batch, shape: model(params, batch.map(lambda x: x[0]), shape).logps,
        static_argnums=2,
        out_shardings=replicated(mesh),
        compiler_options=dict(layout.options.compiler_options),
    )

    def numbers(groups: Sequence[Group], shape: RowShape) -> np.ndarray:
        placed = np.pad(np.arange(len(groups)), (0, shape.rows - len(groups)), constant_values=-1)
        mine = local_rows(mesh, shape.rows)
        batch = build_rows(groups, placed[:, None], shape).map(lambda x: x[None, mine])
        with jax.set_mesh(mesh), exact_products(layout.dtype, layout.platform):
            found = compiled(params, to_global(batch, mesh, shape.rows), shape)
        return np.asarray(jax.device_get(found), np.float64)[: len(groups), 0]

    def score(tokens: Sequence[tuple[Ids, Ids] | None]) -> np.ndarray:
        out = np.full(len(tokens), np.nan)
        there = [i for i, one in enumerate(tokens) if one is not None and 0 < sum(map(len, one)) <= most]
        for places, groups, shape in _batches(tokens, there, shards, TOKENS[layout.platform]):
            for where, row in zip(places, numbers(groups, shape), strict=True):
                out[list(where)] = row[: len(where)]
        return out

    return score


def _batches(
    tokens: Sequence[tuple[Ids, Ids] | None], there: Sequence[int], shards: int, most_tokens: int
) -> Iterator[tuple[list[tuple[int, ...]], list[Group], RowShape]]:
    """Groups of answers to one prompt, those of about one size together: their places, their ids, and their rows."""
    by_prompt: dict[Ids, list[int]] = {}
    for i in there:
        by_prompt.setdefault(tokens[i][0], []).append(i)  # type: ignore[index]
    n = 1
    while n < min(MOST_COMPLETIONS, max(map(len, by_prompt.values()), default=1)):
        n *= 2
    groups: list[tuple[tuple[int, ...], Group]] = []
    for prompt, places in by_prompt.items():
        places.sort(key=lambda i: len(tokens[i][1]))  # type: ignore[index]
        for at in range(0, len(places), n):
            some = tuple(places[at : at + n])
            completions = [np.asarray(tokens[i][1], np.int32) for i in some]  # type: ignore[index]
            completions += [np.zeros(0, np.int32)] * (n - len(some))
            groups.append((some, (np.asarray(prompt, np.int32), *completions)))
    sized = [(_width(len(ids[0])), _width(max(map(len, ids[1:]))), at) for at, (_, ids) in enumerate(groups)]
    sized.sort(key=lambda one: (one[0] + n * one[1], *one), reverse=True)
    widest = tuple(max((one[i] for one in sized), default=0) for i in (0, 1))
    few = len(sized) * (widest[0] + n * widest[1]) <= FEW * most_tokens * shards
    while sized:
        # Of few groups all are as wide as the widest: another program for each width would cost more than it saves.
        wide, long = widest if few else sized[0][:2]
        room = max(1, most_tokens // (wide + n * long))
        same = [one for one in sized if one[0] <= wide and one[1] <= long][: room * shards]
        rows = shards
        while rows < (min(room * shards, len(groups)) if few else len(same)):
            rows *= 2
        taken = {one[2] for one in same}
        sized = [one for one in sized if one[2] not in taken]
        chosen = [groups[at] for _, _, at in same]
        shape = RowShape(wide, (long,) * n, rows, 1)
        yield [places for places, _ in chosen], [ids for _, ids in chosen], shape


def _width(tokens: int) -> int:
    """The width for so many tokens: a power of two, or one and a half of it, from 32 on.

    >>> [_width(n) for n in (1, 33, 49, 65, 100)]
    [32, 48, 64, 96, 128]
    """
    width = 32
    while width < tokens:
        if width * 3 // 2 >= tokens:
            return width * 3 // 2
        width *= 2
    return width


def scores_of(renderer: Renderer, score: Score) -> Callable[[Sequence[Answered]], np.ndarray]:
    """Conversations with an answer each to a number for each."""
    return lambda answered: score(answer_tokens(renderer, answered))
