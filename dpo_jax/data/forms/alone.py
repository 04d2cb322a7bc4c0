"""Rows of a prompt alone, whatever stands beside it; and prompts of pairs, without their answers.

Prompts are rendered by what renders pairs, so answers that stand for any take the places of real ones.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message, RatedAnswer, Skip, checked
from dpo_jax.data.forms.beside import with_beside
from dpo_jax.data.forms.chosen import pair_of
from dpo_jax.data.forms.families import Form, prompts_among
from dpo_jax.data.forms.fields import CARRIED
from dpo_jax.data.forms.messages import conversation
from dpo_jax.data.forms.reader import Read, make_reader
from dpo_jax.data.forms.rename import KNOWN

# Numbers say nothing to any check.
ANSWERS = ("1", "2")
_COMPLETIONS: tuple[list[Message], list[Message]] = (
    [{"role": "assistant", "content": ANSWERS[0]}],
    [{"role": "assistant", "content": ANSWERS[1]}],
)
# Columns of whole conversations, whose last turns are the assistant's in files for SFT.
_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue")
PROMPT_ALONE = "a prompt"  # the form's name


def without_answers(one: LabeledComparison | RatedAnswer) -> Comparison:
    """The prompt, with answers that stand for any; the pair itself where only the tokenizer can find the prompt."""
    if isinstance(one, RatedAnswer):
        texts = None if one.texts is None else (one.texts[0], *ANSWERS)
        return Comparison(one.prompt_conversation, *_COMPLETIONS, one.tools, one.chat_template_kwargs, texts)
    what = one.comparison
    if what.texts is None:
        return replace(what, completion_a=_COMPLETIONS[0], completion_b=_COMPLETIONS[1])
    if not what.prompt_conversation:
        return what
    return replace(what, completion_a=_COMPLETIONS[0], completion_b=_COMPLETIONS[1], texts=(what.texts[0], *ANSWERS))


def of_equal_answers(row: Mapping[str, Any], read: Read) -> Comparison | None:
    """The prompt of a sound row that gives no pair, as its answers are the same or tie."""
    form, outcomes = read
    if form is None or not all(isinstance(one, Skip) and one.deliberate for one in outcomes):
        return None
    parsed = form.parse(row)
    one = with_beside(row, form.beside, parsed[0] if isinstance(parsed, list) else parsed)
    if not isinstance(one, LabeledComparison) or not one.comparison.prompt_conversation:
        return None
    sound = checked(LabeledComparison(without_answers(one), "A"))
    return None if isinstance(sound, Skip) else sound.comparison


def _prompts_alone(there: set[str]) -> list[Form]:
    """Forms that read nothing but a prompt; answers and what is said of them may stand beside it."""
    ways = prompts_among(there)
    inputs = {name for way in ways for name in way.reads}  # those that are not the prompt might change it
    beside = dict.fromkeys(sorted((there & KNOWN) - inputs - {*CARRIED}), "not read")
    return [
        Form(
            PROMPT_ALONE,
            {**way.reads, **beside},
            lambda row, way=way: _alone_parsed(way.value(row), next(iter(way.reads))),  # type: ignore[misc]
            (*way.may_lack, *beside),
        )
        for way in ways
    ]


def _alone_parsed(value: Any, column: str) -> Any:
    if column in _CONVERSATIONS and not isinstance(value, str):
        turns = conversation(value)
        if not isinstance(turns, Skip):
            said = len(list(itertools.takewhile(lambda turn: turn["role"] == "assistant", reversed(turns))))
            value = turns[: len(turns) - said] or turns
    return pair_of(value, *ANSWERS)


read_alone = make_reader((_prompts_alone,))
