"""A causal model as a judge in words: which label it would write after a comparison, zero-shot or trained to.

The comparison is in tinker-cookbook's format (`comparing.py`), and the verdict is read from the probabilities of the
labels, in both orders: (p(B) - p(A)) of the order given, averaged with that of the other one.

Shapes: n comparisons in both orders, three labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip
from dpo_jax.data.render import Rendered, Renderer, render_batch
from dpo_jax.model.options import LayoutOptions
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.preference.comparing import LABELS, VALUES, both_orders, label_message
from dpo_jax.preference.models import PreferenceModel
from dpo_jax.preference.questions import asking, without_common_end
from dpo_jax.preference.scoring import Ids, Score, answer_renderer, judge_mesh, make_score
from dpo_jax.preference.statistics import both_orders_verdict
from dpo_jax.weights.find import find_policy
from dpo_jax.weights.load import load_whole


class Generative:
    """A preference model that reads a causal model's label.

    Args:
      name: of the judge.
      renderer: of the model.
      score: log-probabilities of completions by the model.
    """

    def __init__(self, name: str, renderer: Renderer, score: Score):
        self.name, self._renderer, self._score = name, renderer, score

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        return both_orders_verdict(*self.orders(comparisons))

    def orders(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """Verdicts on (A, B) and on (B, A), `[2, comparisons]`."""
        asked = [one for comparison in comparisons for one in both_orders(comparison)]
        return self._verdicts(asked).reshape(-1, 2).T

    def _verdicts(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """p(B) - p(A) among the labels, in the order given, `[comparisons]`; NaN where it cannot be asked."""
        tokens = label_tokens(self._renderer, comparisons)
        logp = self._score([one for of in tokens for one in of]).reshape(-1, len(LABELS))
        return verdict_of_labels(logp)


def verdict_of_labels(logp: np.ndarray) -> np.ndarray:
    """Log-probabilities of the labels A, B and Tie, `[n, 3]`, to verdicts `[n]`: means of their values.

    >>> verdict_of_labels(np.log([[0.1, 0.3, 0.1]])).round(3).tolist()
    [0.4]
    """
    p = np.exp(logp - np.max(logp, axis=1, keepdims=True, initial=-np.inf))
    return (p @ np.asarray([VALUES[label] for label in LABELS])) / np.sum(p, axis=1)


def label_tokens(renderer: Renderer, comparisons: Sequence[Comparison]) -> list[list[tuple[Ids, Ids] | None]]:
    """Token ids of the question, and those of each label behind it, without what ends all of them; None: none."""
    ask, said = asking(renderer), [[label_message(label)] for label in LABELS]
    # Two labels are rendered together, so that a question takes two pairs.
    pairs = [LabeledComparison(ask(one, said[0], other), "A") for one in comparisons for other in said[1:]]
    found = render_batch(renderer, pairs)
    return [_labels(found[at : at + 2]) for at in range(0, len(found), 2)]


def _labels(both: Sequence[Rendered | Skip]) -> list[tuple[Ids, Ids] | None]:
    first, second = both
    if isinstance(first, Skip) or isinstance(second, Skip):
        return [None] * len(LABELS)
    labels = without_common_end([first.chosen, first.rejected, second.rejected])
    return [(tuple(first.prompt), tuple(label)) for label in labels]


def load_generative(
    directory: str, *, dtype: str = "auto", revision: str = "", prompt_format: str = "auto", chat_template: str = ""
) -> PreferenceModel:
    """The judge that a causal model is.

    Args:
      directory: in Hugging Face's layout, a PEFT directory, or a hub's id.
      dtype: number format of the model and its products; auto is bfloat16, on CPU float32.
      revision: the hub's.
      prompt_format, chat_template: as the config's keys.

    Raises:
      UserError: there is no such model.
    """
    policy = find_policy(directory, Path(), 0, revision=revision)
    formats: dict[str, Any] = {} if dtype == "auto" else {"compute_dtype": dtype, "base_dtype": dtype}
    layout, params = load_whole(policy, judge_mesh(policy.config), LayoutOptions(param_dtype=dtype, **formats))
    renderer = answer_renderer(policy.tokenizer, prompt_format, chat_template)
    return Generative(directory, renderer, make_score(layout, params, logps_fn(layout, remat="none")))
