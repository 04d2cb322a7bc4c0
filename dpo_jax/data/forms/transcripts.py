r"""Anthropic's own writing of a dialogue: `\n\nHuman: ...\n\nAssistant: ...`, without blanks around a turn."""

import re
from collections.abc import Sequence
from typing import Any

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message, Skip

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_LAST = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript_pair(chosen: str, rejected: str) -> LabeledComparison | Skip:
    r"""Two whole transcripts that differ in the last turn only, not yet checked.

    The split is anchored on the blank line: "Human:" inside a turn is text (49 rows of harmless-base test have it). The
    prompt is compared before the order of turns, so a row with both faults counts as `prompts_differ`.

    >>> start = "\n\nHuman: Hi\n\nAssistant:"
    >>> transcript_pair(start + " Hello!", start + " What?").chosen
    ({'role': 'assistant', 'content': 'Hello!'},)
    """
    turns = []
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        turns.append(transcript(text))
        if not turns[-1]:
            return Skip("no_transcript", f"{key} does not begin with a '\\n\\nHuman:' turn")
    first, second = turns
    if first[:-1] != second[:-1]:
        return Skip("prompts_differ")
    for one in turns:
        if not _alternates(one):
            return Skip("not_alternating", " ".join(message["role"] for message in one))
    cut, other = (text.rfind(_LAST) + len(_LAST) for text in (chosen, rejected))
    texts = (chosen[:cut], chosen[cut:], rejected[other:]) if chosen[:cut] == rejected[:other] else None
    return LabeledComparison(Comparison(first[:-1], first[-1:], second[-1:], texts=texts), "A")


def transcript_prompt(prompt: Any) -> tuple[Message, ...] | None:
    r"""The turns of a prompt in HH's own writing, `\n\nHuman: ...\n\nAssistant:`; None for every other prompt."""
    if not isinstance(prompt, str) or not prompt.rstrip().endswith(_LAST):
        return None
    turns = transcript(prompt)
    return turns[:-1] if turns and _alternates(turns) and not turns[-1]["content"] else None


def transcript(text: str) -> tuple[Message, ...]:
    """The turns of HH's own writing; none if the text does not begin with one."""
    before, *parts = _TURN.split(text)
    if before.strip():
        return ()
    return tuple(
        {"role": _ROLES[who], "content": turn.strip()} for who, turn in zip(parts[::2], parts[1::2], strict=True)
    )


def _alternates(turns: Sequence[Message]) -> bool:
    return [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
