"""The user's own rows: every accepted form of columns, told apart by the column names.

Each form is one function `row -> LabeledComparison | Skip`; `parse_own` picks the form. Contents are kept letter for
letter (only Anthropic's transcripts are stripped), so the rendered ids are those that TRL makes from the same row.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.data.comparison import Comparison, Label, LabeledComparison, Message, Skip, checked

Row = Mapping[str, Any]
Parser = Callable[[Row], LabeledComparison | Skip]

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPELLINGS = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "bot", "model"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation"),
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_score", "rejected_score"),
)


def parse_hh(row: Row) -> LabeledComparison | Skip:
    r"""Anthropic's HH-RLHF: `chosen` and `rejected` are whole transcripts that differ in the last turn only.

    The split is anchored on the blank line: "Human:" inside a turn is text (49 rows of harmless-base test have it). The
    prompt is compared before the order of turns, so a row with both faults counts as `prompts_differ`.

    >>> start = "\n\nHuman: Hi\n\nAssistant:"
    >>> parse_hh({"chosen": start + " Hello!", "rejected": start + " What?"}).chosen
    ({'role': 'assistant', 'content': 'Hello!'},)
    """
    turns = []
    for key in ("chosen", "rejected"):
        text = row.get(key)
        if text is None:
            return _missing(row, key)
        if not isinstance(text, str):
            return Skip("not_text", f"{key} is a {type(text).__name__}, needed is a transcript")
        turns.append(_transcript(text))
        if not turns[-1]:
            return Skip("no_transcript", f"{key} does not begin with a '\\n\\nHuman:' turn")
    chosen, rejected = turns
    if chosen[:-1] != rejected[:-1]:
        return Skip("prompts_differ")
    for transcript in turns:
        if not _alternates(transcript):
            return Skip("not_alternating", " ".join(message["role"] for message in transcript))
    return checked(LabeledComparison(Comparison(chosen[:-1], chosen[-1:], rejected[-1:]), "A"))


def parse_helpsteer3(row: Row) -> LabeledComparison | Skip:
    """HelpSteer3 preference: `context`, `response1`, `response2`, `overall_preference` -3..3; negative: response1 wins.

    The preference is compared as an integer: as text "-2" > "0", and the label flips. 0 is label "Tie".

    >>> row = {"context": [{"role": "user", "content": "Hi"}], "response1": "Hello!", "response2": "What?"}
    >>> [parse_helpsteer3({**row, "overall_preference": value}).label for value in (-3, -1, 0, 1, 3)]
    ['A', 'A', 'Tie', 'B', 'B']
    """
    for key in ("context", "response1", "response2", "overall_preference"):
        if row.get(key) is None:
            return _missing(row, key)
    preference = _integer(value := row["overall_preference"])
    if preference is None or not -3 <= preference <= 3:
        return Skip("bad_preference", f"overall_preference is {value!r:.40}, needed is an integer from -3 to 3")
    label: Label = "Tie" if preference == 0 else "A" if preference < 0 else "B"
    return _labeled(row["context"], row["response1"], row["response2"], label)


def parse_chosen_rejected(row: Row) -> LabeledComparison | Skip:
    r"""`chosen` and `rejected`, with `prompt` or without; strings or message lists, the prompt inside the lists or not.

    Where the lists hold the conversation (UltraFeedback), all but the last message is the prompt and must be equal in
    both; a `prompt` string beside them is then only its first words. Two transcripts without `prompt` are HH-RLHF, and
    a `prompt` that is a transcript up to its last "\n\nAssistant:" becomes the turns that it holds.

    >>> parse_chosen_rejected({"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}).comparison.prompt_conversation
    ({'role': 'user', 'content': 'Hi'},)
    """
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if chosen is None or rejected is None:
        return _missing(row, "chosen" if chosen is None else "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        return parse_hh(row)
    stated = () if prompt is None else _transcript_prompt(prompt) or conversation(prompt)
    if isinstance(stated, Skip):
        return stated
    first, second = conversation(chosen, role="assistant"), conversation(rejected, role="assistant")
    if isinstance(first, Skip):
        return first
    if isinstance(second, Skip):
        return second
    if first and second and (len(first) > 1 or len(second) > 1 or first[0]["role"] != "assistant"):
        if first[:-1] != second[:-1]:
            return Skip("prompts_differ", "the message lists differ before their last message")
        inside, first, second = first[:-1], first[-1:], second[-1:]
        if not isinstance(prompt, str) and stated and inside[: len(stated)] != stated:
            return Skip("prompts_differ", "prompt is not the beginning of the message lists")
        stated = inside
    if not stated:
        return Skip("empty_prompt", "no prompt, and the message lists hold none")
    return checked(LabeledComparison(Comparison(stated, first, second), "A"))


def parse_argilla(row: Row) -> LabeledComparison | Skip:
    """argilla/ultrafeedback-binarized-preferences: `instruction`, `chosen_response`, `rejected_response`."""
    return _parse_renamed(row.get("instruction"), row.get("chosen_response"), row.get("rejected_response"))


def parse_instruction(row: Row) -> LabeledComparison | Skip:
    r"""Alpaca tasks: `instruction`, perhaps `input`, `chosen`, `rejected`; the user turn is both, a blank line between.

    >>> row = {"instruction": "Correct it.", "input": "freind", "chosen": "friend", "rejected": "no"}
    >>> parse_instruction(row).comparison.prompt_conversation[0]["content"]
    'Correct it.\n\nfreind'
    """
    instruction, extra = row.get("instruction"), row.get("input")
    if not isinstance(instruction, str) or not isinstance(extra, str | None):
        return Skip("not_text", "instruction and input must be text")
    prompt = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return _parse_renamed(prompt, row.get("chosen"), row.get("rejected"))


def parse_ranking(row: Row) -> LabeledComparison | Skip:
    """ShareGPT ranking rows: `conversations` with `from`/`value`, `chosen` and `rejected` one such message each.

    >>> human, good, bad = ({"from": who, "value": text} for who, text in (("human", "Hi"), ("gpt", "a"), ("gpt", "b")))
    >>> parse_ranking({"conversations": [human], "chosen": good, "rejected": bad}).chosen[0]
    {'role': 'assistant', 'content': 'a'}
    """
    system, turns = row.get("system"), row.get("conversations")
    if isinstance(system, str) and system and isinstance(turns, list):
        turns = [{"role": "system", "content": system}, *turns]
    return _parse_renamed(turns or None, row.get("chosen"), row.get("rejected"))


def parse_comparison(row: Row) -> LabeledComparison | Skip:
    """The preference API's columns: `prompt_conversation`, `completion_a`, `completion_b`, `label` (A, B or Tie)."""
    label = row.get("label")
    if label not in ("A", "B", "Tie"):
        return Skip("bad_label", f"label is {label!r:.40}, needed is A, B or Tie")
    return _labeled(row.get("prompt_conversation"), row.get("completion_a"), row.get("completion_b"), label)


# The first match counts, so a form is listed before every form whose columns are a part of its own.
FORMS: tuple[tuple[tuple[str, ...], Parser], ...] = (
    (("prompt_conversation", "completion_a", "completion_b", "label"), parse_comparison),
    (("context", "response1", "response2", "overall_preference"), parse_helpsteer3),
    (("conversations", "chosen", "rejected"), parse_ranking),
    (("instruction", "chosen_response", "rejected_response"), parse_argilla),
    (("prompt", "chosen", "rejected"), parse_chosen_rejected),
    (("instruction", "chosen", "rejected"), parse_instruction),
    (("chosen", "rejected"), parse_chosen_rejected),
)


def parse_own(row: Row) -> LabeledComparison | Skip:
    """A row of any accepted form; `unknown_columns` (with its columns and the accepted ones) if it is of none.

    >>> parse_own({"question": "Hi", "answer": "Hello!"}).reason
    'unknown_columns'
    """
    for columns, parse in FORMS:
        if all(column in row for column in columns):
            return parse(row)
    accepted = "; ".join("+".join(columns) for columns, _ in FORMS)
    return Skip("unknown_columns", f"found {', '.join(map(str, row)) or 'none'}; accepted are {accepted}")


def score_tie(row: Row) -> bool:
    """True if the row's own scores call its answers equal; the four spellings of UltraFeedback, or inside `metadata`.

    >>> score_tie({"score_chosen": 7.0, "score_rejected": 7.0}), score_tie({"chosen-rating": 5, "rejected-rating": 4})
    (True, False)
    """
    metadata = row.get("metadata")
    for place in (row, metadata) if isinstance(metadata, Mapping) else (row,):
        for chosen, rejected in _SCORES:
            if place.get(chosen) is not None and place.get(rejected) is not None:
                return bool(place[chosen] == place[rejected])
    return False


def conversation(value: Any, role: str = "user") -> tuple[Message, ...] | Skip:
    """Messages from a string (one turn of `role`), one message, or a list of them; role/content or from/value."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return Skip("not_text", f"needed is text or messages, found {type(value).__name__}")
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, Mapping):
            return Skip("not_text", f"a message is a {type(item).__name__}, needed is {{role, content}}")
        who, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(content, str):
            return Skip("not_text", f"a message's content is a {type(content).__name__}, needed is text")
        if not isinstance(who, str) or who.lower() not in _ROLES:
            return Skip("unknown_role", f"role {who!r:.40}; known are {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[who.lower()], "content": content})
    return tuple(messages)


def _transcript_prompt(prompt: Any) -> tuple[Message, ...] | None:
    r"""The turns of a prompt in HH's own writing, `\n\nHuman: ...\n\nAssistant:`; None for every other prompt."""
    if not isinstance(prompt, str) or not prompt.rstrip().endswith("\n\nAssistant:"):
        return None
    turns = _transcript(prompt)
    return turns[:-1] if turns and _alternates(turns) and not turns[-1]["content"] else None


def _transcript(text: str) -> tuple[Message, ...]:
    """The turns of HH's own writing; none if the text does not begin with one."""
    before, *parts = _TURN.split(text)
    if before.strip():
        return ()
    return tuple(
        {"role": _HH_ROLES[who], "content": turn.strip()} for who, turn in zip(parts[::2], parts[1::2], strict=True)
    )


def _alternates(turns: Sequence[Message]) -> bool:
    return [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)


def _parse_renamed(prompt: Any, chosen: Any, rejected: Any) -> LabeledComparison | Skip:
    return parse_chosen_rejected({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _labeled(prompt: Any, a: Any, b: Any, label: Label) -> LabeledComparison | Skip:
    parts = []
    for value, role in ((prompt, "user"), (a, "assistant"), (b, "assistant")):
        messages = conversation(value, role)
        if isinstance(messages, Skip):
            return messages
        parts.append(messages)
    return checked(LabeledComparison(Comparison(*parts), label))


def _missing(row: Row, column: str) -> Skip:
    filled = ", ".join(key for key, value in row.items() if value is not None) or "none"
    return Skip("missing_column", f"no value in {column}; found {filled}")


def _integer(value: Any) -> int | None:
    """The integer that JSON, Parquet (a column with nulls is float) or CSV-like text means; None for anything else."""
    if isinstance(value, str):
        whole = re.fullmatch(r"[+-]?[0-9]", value.strip()) is not None
    else:
        whole = value.is_integer() if isinstance(value, float) else type(value) is int
    return int(value) if whole else None
