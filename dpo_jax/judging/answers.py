"""Files of answers, as `python -m dpo_jax.sample` writes them: reading, and matching two of them. No JAX."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.data.containers import read_rows
from dpo_jax.data.forms.transcripts import transcript_prompt
from dpo_jax.data.prompts import prompt_of
from dpo_jax.data.raw import BadLine
from dpo_jax.disk import digest
from dpo_jax.errors import UserError

UNITS = ("tokens", "characters")
_FORM = "needed is a line of python -m dpo_jax.sample: id, prompt and answers, each with a text"


@dataclass(frozen=True)
class GivenAnswer:
    """One answer of a line: its text, and how many tokens it has, if the line says."""

    text: str
    tokens: int | None

    def length(self, unit: str) -> int:
        """In tokens or in characters, see `UNITS`."""
        return len(self.text) if unit == "characters" or self.tokens is None else self.tokens


@dataclass(frozen=True)
class AnsweredPrompt:
    """A line of a file of answers.

    Attributes:
      where: file and line, for messages.
      id: the prompt's, as in the line.
      prompt: as in the line, a text or messages.
      asked: a comparison whose prompt this is.
      strips: blanks around an answer are none of it, as the prompt is a transcript (see `pair_of`).
      source: where the prompt is from, if the line says.
      line: all of it.
    """

    where: str
    id: str | int
    prompt: Any
    asked: Comparison
    strips: bool
    answers: tuple[GivenAnswer, ...]
    source: str
    line: Mapping[str, Any]

    def completion(self, text: str) -> list[Message]:
        return [{"role": "assistant", "content": text.strip() if self.strips else text}]

    def against(self, a: str, b: str) -> Comparison:
        """The comparison of two answers to this prompt."""
        texts = self.asked.texts and (self.asked.texts[0], a, b)
        return replace(self.asked, completion_a=self.completion(a), completion_b=self.completion(b), texts=texts)


@dataclass(frozen=True)
class Match:
    """Two answers to one prompt: the number of the prompt among those that match, and which answer of the line."""

    prompt: int
    sample: int
    a: AnsweredPrompt
    b: AnsweredPrompt

    @property
    def texts(self) -> tuple[str, str]:
        return self.a.answers[self.sample].text, self.b.answers[self.sample].text

    @property
    def comparison(self) -> Comparison:
        return self.a.against(*self.texts)

    def lengths(self, unit: str) -> tuple[int, int]:
        """Of A's answer and of B's, see `UNITS`."""
        a, b = (line.answers[self.sample].length(unit) for line in (self.a, self.b))
        return a, b


@dataclass(frozen=True)
class Matched:
    """All answers of two files that can be compared.

    Attributes:
      matches: in the order of the first file.
      prompts: that both have.
      only_a, only_b: prompts of one file.
      unpaired: answers of a prompt that both have, beyond the fewer of the two lines.
    """

    matches: tuple[Match, ...]
    prompts: int
    only_a: int
    only_b: int
    unpaired: int

    def first(self, limit: int) -> "Matched":
        """The answers to the first so many prompts; 0: all."""
        if not 0 < limit < self.prompts:
            return self
        return replace(self, matches=tuple(one for one in self.matches if one.prompt < limit), prompts=limit)

    def said(self, a: str, b: str) -> list[str]:
        """What is left out, in words."""
        lines = [f"{n:,} prompts are in {name} alone, and left out" for n, name in ((self.only_a, a), (self.only_b, b))]
        lines = [line for line, n in zip(lines, (self.only_a, self.only_b), strict=True) if n]
        if self.unpaired:
            lines.append(f"{self.unpaired:,} answers have none of their number in the other file, and are left out")
        return lines


def read_answers(path: str | Path, limit: int = 0) -> list[AnsweredPrompt]:
    """The lines of a file of answers, or the first `limit` of them.

    Raises:
      UserError: it cannot be read, or a line is none of that form; an id that is there twice.
    """
    return answers_among(((where, row) for where, row in read_rows(str(path))), str(path), limit)


def answers_among(rows: Iterable[tuple[str, Any]], name: str, limit: int = 0) -> list[AnsweredPrompt]:
    """Lines of answers from rows, each with where it stands; raises as `read_answers` does."""
    found: dict[str, AnsweredPrompt] = {}
    for where, row in rows:
        if len(found) == limit > 0:
            break
        if isinstance(row, BadLine):
            what = f"{row.reason.replace('_', ' ')}: {row.text[:60]!r}"
            raise UserError(f"{where}: {what}; the same command of dpo_jax.sample finishes a file that was stopped")
        one = _answered(row, where)
        if other := found.get(str(one.id)):
            raise UserError(f"{where}: the id {one.id!r} is that of {other.where} too; give every prompt its own")
        found[str(one.id)] = one
    if not found:
        raise UserError(f"{name}: no answers in it; {_FORM}")
    return list(found.values())


def match_answers(a: Sequence[AnsweredPrompt], b: Sequence[AnsweredPrompt]) -> Matched:
    """The i-th answer to each prompt of A against the i-th of B; prompts are matched by their ids.

    Raises:
      UserError: no id is in both, or one stands for different prompts.
    """
    of_b = {str(line.id): line for line in b}
    matches: list[Match] = []
    prompts = unpaired = 0
    for line in a:
        other = of_b.get(str(line.id))
        if other is None:
            continue
        for key in ("prompt", "source"):
            here, there = getattr(line, key), getattr(other, key)
            if here != there and (key == "prompt" or (here and there)):
                raise UserError(
                    f"{other.where}: the {key} of id {line.id!r} is {there!r:.60}, and {here!r:.60} in {line.where}; "
                    "compare answers to the same prompts"
                )
        both = sorted((len(line.answers), len(other.answers)))
        matches += [Match(prompts, i, line, other) for i in range(both[0])]
        prompts, unpaired = prompts + 1, unpaired + both[1] - both[0]
    if not matches:
        raise UserError(
            f"no id of {a[0].where.rpartition(':')[0]} ({a[0].id!r}, ...) is in {b[0].where.rpartition(':')[0]} "
            f"({b[0].id!r}, ...); compare answers to the same prompts"
        )
    return Matched(tuple(matches), prompts, len(a) - prompts, len(b) - prompts, unpaired)


def length_unit(lines: Iterable[AnsweredPrompt], wanted: str = "auto") -> str:
    """In what lengths are counted: tokens where every answer's are known, else characters.

    Raises:
      UserError: tokens are wanted, and an answer has none.
    """
    without = next((line for line in lines if any(one.tokens is None for one in line.answers)), None)
    if wanted == "tokens" and without is not None:
        raise UserError(f"--lengths=tokens: {without.where} has an answer without token_ids; use --lengths=characters")
    return wanted if wanted in UNITS else UNITS[0] if without is None else UNITS[1]


def answers_digest(lines: Iterable[AnsweredPrompt]) -> str:
    """What tells these prompts and answers, in this order, from others."""
    parts = (json.dumps([line.id, line.prompt, [one.text for one in line.answers]]) for line in lines)
    return digest(part.encode() + b"\n" for part in parts)


def _answered(row: Mapping[str, Any], where: str) -> AnsweredPrompt:
    answers = row.get("answers")
    if not isinstance(answers, list) or "prompt" not in row or "id" not in row:
        found = ", ".join(str(name)[:40] for name in list(row)[:10]) or "nothing"
        raise UserError(f"{where}: found {found}; {_FORM}")
    given, source, prompt = row["id"], row.get("source"), row["prompt"]
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise UserError(f"{where}: id is {given!r:.40}; needed is a text or a whole number")
    if source is not None and not isinstance(source, str):
        raise UserError(f"{where}: source is {source!r:.40}; needed is a text")
    if not isinstance(prompt, str | list):
        raise UserError(f"{where}: prompt is {prompt!r:.40}; needed is a text, or a list of messages")
    if not answers:
        raise UserError(f"{where}: answers is empty; needed is at least one")
    asked = prompt_of(prompt, where=where).comparison
    strips = isinstance(prompt, str) and transcript_prompt(prompt) is not None
    read = tuple(_answer(one, where) for one in answers)
    return AnsweredPrompt(where, given, prompt, asked, strips, read, source or "", row)


def _answer(one: Any, where: str) -> GivenAnswer:
    text = one.get("text") if isinstance(one, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: an answer is {one!r:.60}; {_FORM}")
    tokens = one.get("token_ids")
    return GivenAnswer(text, len(tokens) if isinstance(tokens, list) else None)
