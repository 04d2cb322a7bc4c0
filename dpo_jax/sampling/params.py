"""What a user asks of answers, under the names that vLLM uses."""

import dataclasses
import math

from dpo_jax.errors import UserError

LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn, and when they end.

    Attributes:
      n: answers to a prompt.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_p: draw from the fewest most likely tokens whose probabilities sum to it (Holtzman et al. 2020, arXiv
        1904.09751); 1 is all.
      top_k: draw from so many most likely tokens; 0 is all.
      min_p: draw from tokens at least so likely, as a share of the most likely one (Nguyen et al. 2024, arXiv
        2407.01082); 0 is all.
      max_tokens: the most tokens of an answer.
      min_tokens: nothing ends an answer before it has so many.
      stop: texts that end an answer; they are cut off.
      stop_token_ids: tokens that end an answer, besides those of the model.
      seed: of the draws.
      round: one more number that the draws depend on, for those who ask the same prompts again.
      logprobs: whether log-probabilities of every token are asked for.

    Filters are applied in the order temperature, top_k, top_p, min_p, as in transformers; tokens that are equally
    likely are ranked by their id.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    round: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
          UserError: names the field.
        """
        for name in ("n", "max_tokens", "top_k", "min_tokens", "seed", "round"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{name}={value!r}; needs a whole number")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name}={value!r}; needs a finite number")
        for name, is_right, needs in (
            ("n", self.n >= 1, "at least 1 answer"),
            ("temperature", self.temperature >= 0, "0 (the most likely token) or more; 1 is the model's distribution"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1, which is the whole vocabulary"),
            ("top_k", self.top_k >= 0, "0, which is the whole vocabulary, or more"),
            ("min_p", 0 <= self.min_p <= 1, "0, which is the whole vocabulary, to 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1 token"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens={self.max_tokens}"),
            ("seed", 0 <= self.seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}"),
            ("round", 0 <= self.round <= LARGEST_SEED, f"0 to {LARGEST_SEED}"),
            ("stop", not isinstance(self.stop, str) and all(isinstance(x, str) for x in self.stop), "a list of texts"),
            ("stop", "" not in self.stop, "texts of at least one character"),
            (
                "stop_token_ids",
                not isinstance(self.stop_token_ids, int)
                and all(type(x) is int and x >= 0 for x in self.stop_token_ids),
                "a list of token ids",
            ),
        ):
            if not is_right:
                raise UserError(f"{name}={getattr(self, name)!r}; needs {needs}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes:
      text: without the stop token or the stop text.
      token_ids: with the stop token, or all tokens up to the one that completes the stop text.
      finish_reason: "stop" or "length".
      stop_reason: the stop token's id, or the stop text; None after "length".
      logprob: sum of `logprobs`.
      logprobs: of every token, under the distribution that it was drawn from (0 where temperature is 0).
      full_logprobs: of every token, under the model's own: temperature 1 and the whole vocabulary.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprob: float
    logprobs: list[float]
    full_logprobs: list[float]
