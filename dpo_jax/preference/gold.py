"""The gold rule: what the grammar of the dataset `synthetic` says of an answer. Nothing is trained against it. No JAX.

It takes an answer sentence by sentence. A sentence is recognised if the grammar makes the very same one, with whatever
it puts in the slots; to a prompt that asks a certain question about a certain thing it is then worth:

| points | sentence |
|---:|---|
| 3 | advice for the question, about its thing, with one of its tips |
| 1.5 | the same with another thing or another tip: one still sees what is meant |
| -1 to 3 | a courtesy: as much as the best other sentence of the answer, and -1 where there is none |
| 0 | plain, about this thing and with this question's tips: on the topic, but lazy |
| -1 | beside the point: advice for another question; with another thing or tip, any other sentence that is not rude |
| -1 | in excess: of two openings, middles or ends the one that is worth less |
| -2 | garbled: what the grammar never says, such as a sentence cut off, words said twice, or the question itself |
| -3 | rude, or the same sentence again |

An answer has the mean of its sentences, less 0.5 where the order is not opening, middle, end, and less 0.5 where just
the last full stop is missing. An empty one has -6. So a clean answer of the grammar has 3 (helpful), 0 (plain) or -3
(rude), however long it is, and nothing has more than 3: what is put on top of a good answer can only thin it out.
Verdicts are tanh(difference / 2): 0.905 a grade apart, 0.995 two grades apart, exactly 0 between equals.

Why in this order. The grades are the dataset's. Advice that is beside the point answers less than a plain sentence,
which at least names a tip that helps; the dataset, too, counts "beside the point" to its lowest grade, yet such advice
has none of the hostility. Garbled is below both, as it helps nobody. It is above rude because every pair of the dataset
puts rude last; no policy gains by it, as it is far below anything that its dataset ever preferred to something else.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.data.comparison import Message
from dpo_jax.disk import read_json
from dpo_jax.preference.models import Answered, Pointwise

ADVICE, SLIP, PLAIN, BESIDE, EXCESS, GARBLED, RUDE, REPEATED = 3.0, 1.5, 0.0, -1.0, -1.0, -2.0, -3.0, -3.0
UNORDERED, NO_FULL_STOP = -0.5, -0.5
EMPTY = -6.0

_STOPS = ".!?"
_BETWEEN = re.compile(r"(?<=[.!?])\s+")
_REMEMBERED = 1 << 14  # sentences


@dataclass(frozen=True)
class _Kind:
    """Of which grade a sentence is, at which place of an answer (0, 1, 2), and of advice: for which ask."""

    grade: str
    place: int
    ask: int | None = None


@dataclass(frozen=True)
class _Asked:
    """What a prompt asks: the number of the ask among all, its thing, and the tips that answer it."""

    ask: int
    thing: str
    tips: frozenset[str]


@dataclass(frozen=True)
class _Grammar:
    """What recognises sentences.

    Keys of `said` and `questions` and the `scenes` are sentences with names in place of the slots' values, their first
    letter small. Asks are numbered through all topics.
    """

    said: dict[str, _Kind]
    questions: dict[str, int]  # to asks
    openings: frozenset[str]  # of prompts
    scenes: tuple[str, ...]  # of the asks' topics
    things: tuple[frozenset[str], ...]  # of the asks' topics
    tips: tuple[frozenset[str], ...]  # of the asks
    in_answers: re.Pattern[str]
    in_prompts: re.Pattern[str]


@dataclass(frozen=True)
class _Sentence:
    """A sentence of an answer; `kind` is None if it is garbled."""

    text: str
    kind: _Kind | None
    things: frozenset[str] = frozenset()
    tips: frozenset[str] = frozenset()


def gold() -> Pointwise:
    """The gold rule as a judge and a scorer.

    The last turn of a conversation decides what is asked; if the grammar does not make such a turn, there is no score
    (NaN), hence no verdict. Of a completion all that the assistant says counts, without special tokens.
    """
    return Pointwise("gold", _scores)


def _scores(answered: Sequence[Answered]) -> np.ndarray:
    return np.array([_score(one.conversation, one.completion) for one in answered], np.float64)


def _score(conversation: Sequence[Message], completion: Sequence[Message]) -> float:
    last = conversation[-1] if conversation else None
    asked = _asked(last["content"]) if last and last["role"] == "user" else None
    if asked is None:
        return math.nan
    text = " ".join(turn["content"] for turn in completion if turn["role"] == "assistant").strip()
    if not text:
        return EMPTY
    sentences, stopped = _sentences(text)
    places = [one.kind.place for one in sentences if one.kind]
    mean = sum(_worths(sentences, asked)) / len(sentences)
    return mean + (0 if stopped else NO_FULL_STOP) + (0 if places == sorted(places) else UNORDERED)


def _worths(sentences: Sequence[_Sentence], asked: _Asked) -> list[float]:
    """The points of an answer's sentences (the table above)."""
    alone = [_worth(one, asked) for one in sentences]
    courtesy = max([BESIDE, *(worth for worth in alone if worth is not None)])
    worths = [courtesy if worth is None else worth for worth in alone]
    best: dict[int, int] = {}  # of every place the sentence that is worth most, the first of several
    for i, one in enumerate(sentences):
        if one.kind and worths[i] > worths[best.setdefault(one.kind.place, i)]:
            best[one.kind.place] = i
    seen: set[str] = set()
    for i, one in enumerate(sentences):
        if one.kind and best[one.kind.place] != i:
            worths[i] = min(worths[i], EXCESS)
        if one.text in seen:
            worths[i] = REPEATED
        seen.add(one.text)
    return worths


def _worth(sentence: _Sentence, asked: _Asked) -> float | None:
    """The points of a sentence by itself; None of a courtesy, which the rest of the answer decides."""
    kind = sentence.kind
    if kind is None:
        return GARBLED
    if kind.grade == "rude":
        return RUDE
    wrong = (not sentence.things <= {asked.thing}) + (not sentence.tips <= asked.tips)
    if kind.ask is not None:
        return (ADVICE, SLIP, BESIDE)[wrong] if kind.ask == asked.ask else BESIDE
    if wrong:
        return BESIDE
    return PLAIN if kind.grade == "plain" else None


def _sentences(text: str) -> tuple[list[_Sentence], bool]:
    """The sentences of an answer, and whether the last one has its full stop (or never was a sentence)."""
    pieces = _BETWEEN.split(text)
    found: list[_Sentence] = []
    at = 0
    while at < len(pieces):
        one = _recognised(pieces[at])
        # Two of the grammar's sentences have a question mark within, so that they come as two pieces.
        if one.kind is None and at + 1 < len(pieces) and (two := _recognised(" ".join(pieces[at : at + 2]))).kind:
            one, at = two, at + 1
        found.append(one)
        at += 1
    if found[-1].kind or text[-1] in _STOPS:
        return found, True
    for stop in _STOPS:
        if (ended := _recognised(pieces[-1] + stop)).kind:
            return [*found[:-1], ended], False
    return found, True


@functools.lru_cache(_REMEMBERED)
def _recognised(text: str) -> _Sentence:
    grammar = _grammar()
    key, slots = _key(text, grammar.in_answers)
    kind = grammar.said.get(key) if key else None
    return _Sentence(text, kind, frozenset(slots.get("thing", ())), frozenset(slots.get("tip", ())))


@functools.lru_cache(_REMEMBERED)
def _asked(turn: str) -> _Asked | None:
    """What a user's turn asks: `[greeting or link] [scene] question`; None if it is no such turn."""
    grammar = _grammar()
    *before, question = _BETWEEN.split(turn.strip())
    key, slots = _key(question, grammar.in_prompts)
    ask = grammar.questions.get(key)
    things = slots.get("thing", [])
    if ask is None or len(things) != 1 or things[0] not in grammar.things[ask]:
        return None
    before = before[1:] if before and before[0] in grammar.openings else before
    if before:
        scene, slots = _key(" ".join(before), grammar.in_prompts)
        if scene != grammar.scenes[ask] or slots["thing"] != things:
            return None
    return _Asked(ask, things[0], grammar.tips[ask])


def _key(sentence: str, slots: re.Pattern[str]) -> tuple[str, dict[str, list[str]]]:
    """A sentence with names in place of the slots' values, and these; no key if it has no capital first letter.

    Nor if it has such a name itself: a policy that says "{thing}" has named nothing.
    """
    if not sentence[:1].isupper() or "{" in sentence:
        return "", {}
    found: dict[str, list[str]] = {}

    def name(match: re.Match[str]) -> str:
        slot = str(match.lastgroup)
        found.setdefault(slot, []).append(match[0])
        return f"{{{slot}}}"

    return slots.sub(name, sentence[0].lower() + sentence[1:]), found


@functools.cache
def _grammar() -> _Grammar:
    from dpo_jax.data.synthetic import GRAMMAR  # with it come the libraries that train tokenizers

    grammar = read_json(GRAMMAR)
    topics, phrases = grammar["topics"], grammar["phrases"]
    asks = [(topic, ask) for topic in topics for ask in topic["asks"]]
    things = [thing for topic in topics for thing in topic["things"]]
    tips = [tip for _, ask in asks for tip in ask["tips"]]
    in_answers = _slots({"thing": things, "tip": tips, "who": phrases["who"], "habit": phrases["habit"]})
    in_prompts = _slots({"thing": things, "when": [when for topic in topics for when in topic["whens"]]})
    said: dict[str, _Kind] = {}
    for grade, kinds in grammar["sentences"].items():
        for place, kind in enumerate(kinds):
            said |= {_small(one): _Kind(grade, place) for one in phrases.get(kind, ())}
            if kind == "advice":
                said |= {_small(a): _Kind(grade, place, i) for i, (_, ask) in enumerate(asks) for a in ask["advice"]}
    return _Grammar(
        said,
        {_small(question): i for i, (_, ask) in enumerate(asks) for question in ask["questions"]},
        frozenset((*phrases["greeting"], *phrases["link"])),
        tuple(_small(topic["scene"]) for topic, _ in asks),
        tuple(frozenset(topic["things"]) for topic, _ in asks),
        tuple(frozenset(ask["tips"]) for _, ask in asks),
        in_answers,
        in_prompts,
    )


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _slots(values: dict[str, Iterable[str]]) -> re.Pattern[str]:
    """Finds the values of slots, each as whole words and in the group that has its slot's name; the longest first."""
    groups = (
        f"(?P<{slot}>{'|'.join(re.escape(one) for one in sorted(ones, key=len, reverse=True))})"
        for slot, ones in values.items()
    )
    return re.compile(rf"\b(?:{'|'.join(groups)})\b")
