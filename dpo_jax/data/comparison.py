"""The types of the preference API: what every dataset becomes before it is rendered to tokens.

    >>> user = {"role": "user", "content": "Name a colour."}
    >>> red, shrug = {"role": "assistant", "content": "Red."}, {"role": "assistant", "content": "No."}
    >>> comparison = Comparison(prompt_conversation=[user], completion_a=[red], completion_b=[shrug])
    >>> labeled = LabeledComparison(comparison, label="A")
    >>> labeled.chosen[0]["content"], labeled.rejected[0]["content"]
    ('Red.', 'No.')

A dataset is one function `row -> LabeledComparison | Skip`:

    >>> def parse(row):
    ...     if not row["better"]:
    ...         return Skip("empty_chosen")
    ...     answers = [[{"role": "assistant", "content": row[key]}] for key in ("better", "worse")]
    ...     return LabeledComparison(Comparison([{"role": "user", "content": row["question"]}], *answers), "A")
    >>> parse({"question": "Name a colour.", "better": "Red.", "worse": "No."}).label
    'A'
    >>> parse({"question": "Name a colour.", "better": "", "worse": "No."})
    Skip(reason='empty_chosen', detail='')
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, get_args

Label = Literal["A", "B", "Tie"]
ROLES = ("system", "user", "assistant", "tool")

# Reasons that a sound row is left out on purpose: counted, but neither quarantined nor held against the file. Every
# other reason means that the row does not say what its format promises.
DELIBERATE = frozenset({"tie", "identical_answers", "identical_after_truncation", "too_long", "unpaired"})


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it; further keys (`tool_calls`, ...) are the template's."""

    role: str
    content: str


@dataclass(frozen=True)
class Comparison:
    """Two completions of one conversation; a completion is a list of messages, mostly one assistant turn.

    `tools` and `chat_template_kwargs` are for the chat template, as transformers' `apply_chat_template` takes them.
    `texts` are prompt, completion A and completion B letter for letter, where the row has them as strings: what is
    tokenised in place of the messages if the strings are templated already, or the format is `text`.
    """

    prompt_conversation: Sequence[Message]
    completion_a: Sequence[Message]
    completion_b: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    texts: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class LabeledComparison:
    """A comparison and which completion is better: "A", "B" or "Tie"."""

    comparison: Comparison
    label: Label

    def __post_init__(self) -> None:
        if self.label not in get_args(Label):
            raise ValueError(f"label={self.label!r}; a label is one of {', '.join(get_args(Label))}")

    @property
    def chosen(self) -> Sequence[Message]:
        """The better completion; ValueError for a tie, which has none."""
        return self.comparison.completion_a if self._a_wins() else self.comparison.completion_b

    @property
    def rejected(self) -> Sequence[Message]:
        """The worse completion; ValueError for a tie, which has none."""
        return self.comparison.completion_b if self._a_wins() else self.comparison.completion_a

    def swap(self) -> "LabeledComparison":
        """The same judgement with A and B exchanged: swapping twice changes nothing."""
        swapped: dict[Label, Label] = {"A": "B", "B": "A", "Tie": "Tie"}
        old = self.comparison
        texts = None if old.texts is None else (old.texts[0], old.texts[2], old.texts[1])
        turned = replace(old, completion_a=old.completion_b, completion_b=old.completion_a, texts=texts)
        return LabeledComparison(turned, swapped[self.label])

    def _a_wins(self) -> bool:
        if self.label == "Tie":
            raise ValueError("a tie has no chosen completion; drop it or break it before training")
        return self.label == "A"


@dataclass(frozen=True)
class RatedAnswer:
    """One answer that is good or not; it becomes a pair with one of the same prompt that is rated otherwise (KTO).

    `texts` are prompt and answer letter for letter, see `Comparison`.
    """

    prompt_conversation: Sequence[Message]
    completion: Sequence[Message]
    good: bool
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    texts: tuple[str, str] | None = None

    def against(self, other: "RatedAnswer") -> LabeledComparison:
        """This answer as A and the other as B; the good one is better."""
        texts = (*self.texts, other.texts[1]) if self.texts and other.texts else None
        comparison = Comparison(
            self.prompt_conversation, self.completion, other.completion, self.tools, self.chat_template_kwargs, texts
        )
        return LabeledComparison(comparison, "A" if self.good else "B")


@dataclass(frozen=True)
class Skip:
    """A row that gives no pair. `reason` is a short stable word that is counted, `detail` is for the reader.

    >>> Skip("tie").deliberate, Skip("no_transcript").deliberate
    (True, False)
    """

    reason: str
    detail: str = ""

    @property
    def deliberate(self) -> bool:
        """True if the row is sound and left out on purpose (see `DELIBERATE`)."""
        return self.reason in DELIBERATE


def checked(labeled: LabeledComparison) -> LabeledComparison | Skip:
    """The comparison if a model can learn from it, else why not; every parser's last step.

    Messages must have a known role and text that UTF-8 can hold; the prompt must say something and must not end with
    the assistant; each completion begins and ends with the assistant, is not empty (a tool call or another key of the
    message is something, too), and is not the same as the other. White space around a text is no difference.

    A comparison of `texts` alone, whose prompt only the tokenizer can tell from its answers, has no messages to check.
    """
    comparison = labeled.comparison
    for message in (*comparison.prompt_conversation, *comparison.completion_a, *comparison.completion_b):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return Skip("not_text", f"a message is {message!r:.80}, needed is {{role, content}} with text")
        if message.get("role") not in ROLES:
            return Skip("unknown_role", f"role {message.get('role')!r}; known are {', '.join(ROLES)}")
        if (wrong := _not_utf8(message["content"] if len(message) == 2 else message)) is not None:
            return Skip("invalid_text", wrong)
    prompt = comparison.prompt_conversation
    named = {"completion_a": comparison.completion_a, "completion_b": comparison.completion_b}
    if labeled.label != "Tie":
        named = {"chosen": labeled.chosen, "rejected": labeled.rejected}
    if comparison.texts is not None and not prompt and not any(named.values()):
        return _checked_texts(labeled, comparison.texts)
    if not any(message["content"].strip() for message in prompt):
        return Skip("empty_prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        return Skip("prompt_not_user_last", f"the prompt ends with a {prompt[-1]['role']} turn")
    for name, completion in named.items():
        if not completion or not completion[0]["role"] == completion[-1]["role"] == "assistant":
            roles = [message["role"] for message in completion]
            return Skip("answer_not_assistant", f"{name} must begin and end with the assistant, and has roles {roles}")
        if not completion[-1]["content"].strip() and not completion[-1].get("tool_calls"):
            return Skip(f"empty_{name}")
    first, second = named.values()
    same = len(first) == len(second) and all(map(_alike, first, second))
    return Skip("identical_answers") if same else labeled


def _not_utf8(value: Any) -> str | None:
    """What UTF-8 cannot hold in any text of a value: half a character, legal in JSON, fatal in a tokenizer."""
    try:
        if isinstance(value, str):
            value.encode()
        else:
            json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        return str(error)
    return None


def _alike(one: Message, two: Message) -> bool:
    """True of messages that differ by no more than white space around their texts."""
    if one["content"].strip() != two["content"].strip():
        return False
    return one["role"] == two["role"] and (
        len(one) == len(two) == 2 or {**one, "content": ""} == {**two, "content": ""}
    )


def _checked_texts(labeled: LabeledComparison, texts: tuple[str, str, str]) -> LabeledComparison | Skip:
    if (wrong := _not_utf8(list(texts))) is not None:
        return Skip("invalid_text", wrong)
    one, two = (text.strip() for text in texts[1:])
    if not one or not two:
        better_is_empty = not one if labeled.label != "B" else not two
        return Skip("empty_chosen" if better_is_empty else "empty_rejected")
    return Skip("identical_answers") if one == two else labeled
