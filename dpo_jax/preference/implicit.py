"""DPO's implicit reward as a judge: β · (log π − log π_ref) of an answer, by a policy and its reference.

Rafailov et al. 2023, arXiv 2305.18290, equation 5, without the term that all answers to a prompt share.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.model.options import LayoutOptions
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.preference.models import Answered, Pointwise
from dpo_jax.preference.scoring import Score, answer_renderer, answer_tokens, judge_mesh, make_score
from dpo_jax.weights.find import check_reference, find_policy
from dpo_jax.weights.load import load_whole

BETA = 0.1


def load_implicit(
    policy: str,
    reference: str,
    *,
    beta: float = BETA,
    dtype: str = "auto",
    prompt_format: str = "auto",
    chat_template: str = "",
) -> Pointwise:
    """The judge that a policy and its reference are.

    Args:
      policy, reference: directories, or the hub's ids, of causal models of one architecture.
      beta: β; it scales all scores, and so how sure verdicts are.
      dtype: number format of both models and their products; auto is bfloat16, on CPU float32.
      prompt_format, chat_template: as the config's keys.

    Raises:
      UserError: a model is not there, or they are of different architectures or tokenizers.
    """
    found = [find_policy(name, Path(), 0) for name in (policy, reference)]
    check_reference(found[1].config, found[0].config, reference)
    if found[0].tokenizer.get_vocab() != found[1].tokenizer.get_vocab():
        raise UserError(
            f"judge implicit:{policy},{reference}: the two have different tokenizers; give the policy's own reference"
        )
    options = LayoutOptions(param_dtype=dtype, compute_dtype=dtype)
    mesh = judge_mesh(found[0].config)
    scores: list[Score] = []
    for one in found:
        layout, params = load_whole(one, mesh, options)
        scores.append(make_score(layout, params, logps_fn(layout, remat="none")))
    renderer = answer_renderer(found[0].tokenizer, prompt_format, chat_template)

    def score(answered: Sequence[Answered]) -> np.ndarray:
        tokens = answer_tokens(renderer, answered)
        ours, theirs = (one(tokens) for one in scores)
        return beta * (ours - theirs)

    return Pointwise(f"implicit:{policy},{reference}", score)
