"""Why an answer ends: a stop token, a stop text, or its length."""

from collections.abc import Sequence
from typing import Any

from dpo_jax.sampling.board import Row
from dpo_jax.sampling.params import Answer, SamplingParams


class Ending:
    """Tells whether an answer has ended, and makes it.

    Args:
      stops: token ids that end it.
      tokenizer: for texts; None leaves them empty.
    """

    def __init__(self, stops: Sequence[int], tokenizer: Any):
        self.stops, self.tokenizer = frozenset(stops), tokenizer

    def of(self, row: Row) -> Answer | None:
        """The answer if it has ended, without what was drawn behind its end; None if it goes on."""
        tokens, limit, asked = row.tokens, row.question.limit, row.question.asked
        first = max(row.checked, asked.min_tokens)
        end = next((i + 1 for i in range(first, len(tokens)) if tokens[i] in self.stops), None)
        cut = self._stop_text(asked, tokens[:end], row.checked)
        row.checked = len(tokens)
        if cut is not None and cut[0] <= limit and (end is None or cut[0] < end):
            return self._answer(row, *cut)
        if end is not None and end <= limit:
            return self._answer(row, end, self._text(tokens[: end - 1]), tokens[end - 1])
        return self._answer(row, limit, self._text(tokens[:limit]), None) if len(tokens) >= limit else None

    def _text(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _stop_text(self, asked: SamplingParams, tokens: list[int], checked: int) -> tuple[int, str, str] | None:
        """After how many tokens a stop text is there, the text before it, and the stop text.

        A stop text may lie across tokens, and a token may hold more than it: the text of all tokens decides.
        """
        least = max(asked.min_tokens, 1)
        if not asked.stop or len(tokens) < least:
            return None
        if _found(asked.stop, self._text(tokens), 0) is None:
            return None
        passed = len(self._text(tokens[: least - 1]))  # what ends in there came too early
        for count in range(max(checked + 1, least), len(tokens) + 1):
            text = self._text(tokens[:count])
            found = _found(asked.stop, text, passed)
            if found is not None:
                return count, text[: found[0]], found[1]
        return None

    def _answer(self, row: Row, count: int, text: str, reason: int | str | None) -> Answer:
        logprobs, full = row.logprobs[:count], row.full_logprobs[:count]
        finish = "length" if reason is None else "stop"
        return Answer(text, row.tokens[:count], finish, reason, float(sum(logprobs)), logprobs, full)


def _found(stops: Sequence[str], text: str, passed: int) -> tuple[int, str] | None:
    """The first stop text in `text` that ends behind its first `passed` characters, and where it begins."""
    at = []
    for stop in stops:
        where = text.find(stop, max(0, passed - len(stop) + 1))
        if where >= 0:
            at.append((where, stop))
    return min(at, default=None)
