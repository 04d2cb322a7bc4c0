r"""What a judge server replied: the body of a chat completion, and the verdict in it. No JAX.

A verdict is read from the label tokens' log-probabilities where there are any, else from the text. Neither guesses: a
reply that does not say clearly which completion is better is no verdict, and has a reason, which is counted.

    >>> [label_in(text) for text in ("B", "Preference: **A**", "It is hard to say.", "A and B are good.")]
    [('B', 0), ('A', 14), 'no_label', 'several_labels']
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_jax.data.comparison import Label
from dpo_jax.preference.comparing import VALUES

Read = Literal["auto", "logprobs", "text"]

# What may stand around a label, such as markdown's; no colon after one, where it is the head of a list.
_BEFORE, _AFTER = r"[\s*_`'\"\[\](){}<>.:=\\$|-]{0,20}", r"[\s*_`'\"\[\](){}<>.=\\$|!-]{0,20}"
_NOUN = r"(?:(?:completion|response|answer|option|assistant)\s+)?"
_ANSWER = (
    r"(?:(?:my|the|final|overall)\s+){0,3}"
    r"(?:answer|preference|verdict|choice|label|judge?ment|winner|decision|better\s+completion)"
    rf"(?:\s+(?:is|would\s+be))?{_BEFORE}"
)
_LABEL = r"(?P<label>A|B|Tie)"
_ALONE = re.compile(rf"{_BEFORE}(?:{_ANSWER})?{_NOUN}(?:{_BEFORE}boxed)?{_BEFORE}{_LABEL}{_AFTER}", re.IGNORECASE)
_LONGEST_LINE, _LONGEST_SENTENCE = 120, 1000  # characters of what can be a label alone, or a sentence about one
# A label in a sentence. "A" before a small letter is the article, but for a few words.
_MENTION = re.compile(
    r"(?<![\w'’-])(?:(?:[Cc]ompletion|[Rr]esponse|[Aa]nswer|[Oo]ption|[Aa]ssistant)\s+[*_`'\"(\[]{0,4}(?P<named>A|B)"
    r"|(?P<bare>A(?!\s+(?!is\b|was\b|wins\b|because\b|since\b|over\b|and\b|or\b|to\b)[a-z])|B|Tie|TIE))(?![\w'’-])"
)
_GOOD = r"(?:better|best|preferred|preferable|superior|stronger|the\s+winner)"
_PREFERS = re.compile(
    rf"^\W*{_NOUN}\W*(?:A|B|Tie)\W*(?:[,.;—–]|\bbecause\b|\bsince\b)"
    rf"|\b(?:A|B)\W*\s(?:(?:is|was)\s+(?:(?:clearly|slightly|much|the)\s+)*{_GOOD}|wins)\b"
    rf"|\b(?:prefer|choose|pick|select|favou?r|{_GOOD}(?:\s+\w+)?\s+is)\W+{_NOUN}\W*(?:A|B)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(r"\b(?:not|never|neither|nor|cannot|less|worse|worst|unless|if)\b|n['’]t\b", re.IGNORECASE)
# Tokens that are a label; in full, or what can only begin one.
_WORDS: dict[str, Label] = {"A": "A", "B": "B", **dict.fromkeys(("T", "Ti", "Tie", "TIE", "tie"), "Tie")}
_AROUND = " \t\r\n*_`'\"[](){}<>.:▁Ġ"
_THOUGHT_ENDS, _THOUGHT_BEGINS = "</think>", "<think>"


@dataclass(frozen=True)
class Token:
    """A token of a reply.

    Attributes:
      text: of it.
      tops: it and the likeliest tokens of its place by text, with their probabilities; of equal texts their sum.
    """

    text: str
    tops: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """A sound chat completion: its first choice.

    Attributes:
      text: what the model said.
      finish: why it ended, as the server says (`stop`, `length`, `content_filter`); empty where it does not.
      refused: the model refused, in the field that is for that.
      tokens: with log-probabilities; empty where the server sends none.
      usage: tokens of the prompt and of the reply; None where the server does not say.
    """

    text: str
    finish: str
    refused: bool
    tokens: tuple[Token, ...]
    usage: tuple[int, int] | None


def parse_reply(body: str) -> Reply | str:
    """The body of a chat completion; why it is none (`not_json`, `wrong_shape`)."""
    try:
        held = json.loads(body)
    except (ValueError, RecursionError):
        return "not_json"
    try:
        choice = held["choices"][0]
        message = choice["message"]
        text, refusal = _text(message.get("content")), message.get("refusal")
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return "wrong_shape"
    finish = finish if isinstance(finish, str) else ""
    return Reply(text, finish, bool(refusal), _tokens(choice.get("logprobs")), _usage(held.get("usage")))


def verdict_in(reply: Reply, read: Read) -> tuple[float, str]:
    """The verdict of one order, and an empty text; NaN, and why there is none.

    From log-probabilities it is p(B) - p(A) over the mass of the labels at the token that is the label; a token that
    can only begin "Tie" counts to it. From the text it is -1, 0 or 1.

    Args:
      read: `text`; `logprobs`, and no verdict without them; `auto`: log-probabilities where there are any.
    """
    found = label_in(reply.text)
    if isinstance(found, str):
        # With room for a single token "Tie" may be cut; nothing else begins so.
        if not (reply.finish == "length" and reply.text.strip() in ("T", "Ti")):
            return math.nan, _why_none(reply, found)
        label: Label = "Tie"
    else:
        label = found[0]
    if read == "text":
        return VALUES[label], ""
    masses = _masses(reply, label)
    if masses is None:
        return (VALUES[label], "") if read == "auto" else (math.nan, "no_logprobs")
    return (masses["B"] - masses["A"]) / sum(masses.values()), ""


def label_in(text: str) -> tuple[Label, int] | str:
    """The label that a text says, and where it stands; else why it says none (`no_label`, `several_labels`, `unclear`).

    All lines that are a label and little else must agree. Without such a line the text must name one label only, and
    clearly for the better one. What a model thought before (`<think>`) is passed over.
    """
    start = text.rfind(_THOUGHT_ENDS) + len(_THOUGHT_ENDS) if _THOUGHT_ENDS in text else 0
    if _THOUGHT_BEGINS in text[start:]:
        return "no_label"  # its thoughts have no end
    alone = []
    for line in re.finditer(r"[^\n]+", text[start:]):
        match = _ALONE.fullmatch(line[0].strip()) if len(line[0]) <= _LONGEST_LINE else None
        if match:
            at = start + line.start() + (len(line[0]) - len(line[0].lstrip())) + match.start("label")
            alone.append((_label(match["label"]), at))
    if alone:
        return alone[0] if len({label for label, _ in alone}) == 1 else "several_labels"
    said = text[start:]
    named = [(_label(match["named"] or match["bare"]), match) for match in _MENTION.finditer(said)]
    if len({label for label, _ in named}) != 1:
        return "several_labels" if named else "no_label"
    if len(said) > _LONGEST_SENTENCE or not _PREFERS.search(said) or _DENIES.search(said):
        return "unclear"
    label, match = named[0]
    return label, start + match.start("named" if match["named"] else "bare")


def _label(text: str) -> Label:
    return "Tie" if len(text) == 3 else "A" if text in "Aa" else "B"


def _why_none(reply: Reply, found: str) -> str:
    if reply.refused or reply.finish == "content_filter":
        return "refused"
    if reply.finish == "length":
        return "cut_off"
    return found if reply.text.strip() else "empty"


def _masses(reply: Reply, label: Label) -> dict[Label, float] | None:
    """The labels' probabilities where the reply has its label; None where the server says no alternatives there."""
    joined = "".join(token.text for token in reply.tokens)
    found = label_in(joined)
    if isinstance(found, str):
        found = ("Tie", len(joined) - len(joined.lstrip())) if joined.strip() in ("T", "Ti") else found
    if isinstance(found, str) or found[0] != label:  # tokens of something else than the text
        return None
    end = 0
    for token in reply.tokens:
        end += len(token.text)
        if end > found[1]:
            break
    masses: dict[Label, float] = {"A": 0.0, "B": 0.0, "Tie": 0.0}
    for text, probability in token.tops.items():
        if one := _WORDS.get(text.strip(_AROUND)):
            masses[one] += probability
    return masses if len(token.tops) > 1 and masses[label] > 0 else None


def _text(content: Any) -> str:
    """A text, or the texts among parts (thoughts are other parts)."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise TypeError
    return content


def _usage(usage: Any) -> tuple[int, int] | None:
    try:
        prompt, completion = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (prompt, completion) if min(prompt, completion) >= 0 else None


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    """Tokens with log-probabilities; none where they are not as they should be, which is as if there were none."""
    try:
        return tuple(_token(one) for one in logprobs["content"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _token(one: Any) -> Token:
    tops: dict[str, float] = {}
    for top in one.get("top_logprobs") or []:
        text, probability = _text(top["token"]), math.exp(min(top["logprob"], 0.0))
        if math.isnan(probability):
            raise ValueError
        tops[text] = tops.get(text, 0.0) + probability
    tops.setdefault(_text(one["token"]), math.exp(min(one["logprob"], 0.0)))
    return Token(one["token"], tops)
