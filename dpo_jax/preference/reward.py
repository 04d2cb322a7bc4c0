"""A reward model as a judge: the score of an answer at its last token, by a directory in Hugging Face's layout."""

from pathlib import Path
from typing import Any

from dpo_jax.data.render import Renderer
from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import Layout
from dpo_jax.objective.policy_logps import scores_fn
from dpo_jax.preference.models import Pointwise
from dpo_jax.preference.scoring import answer_renderer, judge_mesh, make_score, scores_of
from dpo_jax.weights.find import Policy, find_policy
from dpo_jax.weights.load import load_whole


def load_reward_model(
    directory: str, *, dtype: str = "auto", revision: str = "", prompt_format: str = "auto", chat_template: str = ""
) -> Pointwise:
    """The judge that a reward model is.

    Args:
      directory: one that `AutoModelForSequenceClassification` loads, a PEFT directory of one, or a hub's id.
      dtype: number format of the model and its products; auto is bfloat16, on CPU float32.
      revision: the hub's.
      prompt_format, chat_template: as the config's keys.

    Raises:
      UserError: there is none, or it has no head of one label.
    """
    policy = find_policy(directory, Path(), 0, revision=revision, scalar_head=True)
    if not policy.head.name:
        raise UserError(
            f"judge {directory}: a causal model, which has no head to score with; train one (task=reward), or compare "
            f"it with its reference (implicit:{directory},REFERENCE)"
        )
    formats: dict[str, Any] = {} if dtype == "auto" else {"compute_dtype": dtype, "base_dtype": dtype}
    options = LayoutOptions(param_dtype=dtype, **formats)
    layout, params = load_whole(policy, judge_mesh(policy.config), options)
    return reward_judge(
        directory, policy, layout, params, answer_renderer(policy.tokenizer, prompt_format, chat_template)
    )


def reward_judge(name: str, policy: Policy, layout: Layout, params: Params, renderer: Renderer) -> Pointwise:
    """The judge of a reward model that is on the mesh already."""
    score = make_score(layout, params, scores_fn(layout, remat="none", pad=policy.pad))
    return Pointwise(name, scores_of(renderer, score))
