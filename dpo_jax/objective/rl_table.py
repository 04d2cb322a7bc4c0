"""What is known of the losses, advantages and KL penalties of RL before anything is computed. No JAX.

Config checks read it; the functions are in `rl/estimators.py` and `rl/objective.py`.
"""

import dataclasses
import math

from dpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RlLoss:
    """What a loss is made of; ratios are of the policy to the policy that the answers were drawn from.

    Attributes:
      ratio: of what there is one: a "token"; an "answer", by its mean over tokens; a "sequence", by its sum.
      clip: "both" sides, as PPO has it (the smaller one counts); the "weight" of log π, above alone; or "none".
      average: over what the sum of the tokens' losses is taken: an "answer", then answers; the "tokens" of the batch;
        the tokens of all that was drawn together ("drawn"); the most tokens of an answer ("most"); or answers alone
        ("sum").
      low, high: the usual clipping: 1 - low and 1 + high ("weight": high itself).
    """

    ratio: str
    clip: str
    average: str
    low: float
    high: float


# grpo: Shao et al. 2024, arXiv 2402.03300, equation 3. bnpo: its average over tokens, as TRL names it. dapo: Yu et al.
# 2025, arXiv 2503.14476, equations 8 and 12. dr_grpo: Liu et al. 2025, arXiv 2503.20783. gspo: Zheng et al. 2025, arXiv
# 2507.18071, equations 5 and 7. cispo: MiniMax 2025, arXiv 2506.13585, equations 4 and 5. importance: tinker's
# importance_sampling. rloo: Ahmadian et al. 2024, arXiv 2402.14740, with TRL's clipping.
RL_LOSSES: dict[str, RlLoss] = {
    "grpo": RlLoss("token", "both", "answer", 0.2, 0.2),
    "bnpo": RlLoss("token", "both", "tokens", 0.2, 0.2),
    "dapo": RlLoss("token", "both", "drawn", 0.2, 0.28),
    "dr_grpo": RlLoss("token", "both", "most", 0.2, 0.2),
    "gspo": RlLoss("answer", "both", "answer", 3e-4, 4e-4),
    "cispo": RlLoss("token", "weight", "drawn", 0.0, 5.0),
    "importance": RlLoss("token", "none", "sum", 0.0, 0.0),
    "rloo": RlLoss("sequence", "both", "sum", 0.2, 0.2),
}
# Which advantages compare groups with each other, so that a batch must be seen at once.
ADVANTAGE_ACROSS = {"group": False, "centred": False, "leave_one_out": False, "batch": True, "whitened": True}
KL_PENALTIES = ("k1", "k2", "k3", "k3_weighted")


@dataclasses.dataclass(frozen=True)
class RlOptions:
    """What a step of RL minimises.

    Attributes:
      loss: a name in `RL_LOSSES`.
      clip_low, clip_high: of its ratio; None is what the loss has.
      advantage: a name in `ADVANTAGE_ACROSS`.
      kl: k1, in the reward; k2, k3 or k3_weighted, in the loss.
      kl_coef: its weight; 0 is none, and no reference is needed.
      correction_cap: the largest weight that corrects for the sampler's probabilities; 0 corrects nothing.
      temperature: at which answers are drawn, and at which every probability is taken.
      max_tokens: the most tokens of an answer.
      balance: weight of the experts' load-balancing loss.
    """

    loss: str = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    advantage: str = "group"
    kl: str = "k1"
    kl_coef: float = 0.0
    correction_cap: float = 0.0
    temperature: float = 1.0
    max_tokens: int = 128
    balance: float = 0.0

    @property
    def across(self) -> bool:
        """Whether a group's loss depends on the other groups of its batch."""
        return ADVANTAGE_ACROSS[self.advantage]


def parse_kl(text: str) -> str:
    """The KL penalty of a name.

    Raises:
      UserError: it is none, or one whose gradient is no penalty.
    """
    if text in KL_PENALTIES:
        return text
    if text in ("k1_loss", "k1_in_loss"):
        raise UserError(
            f"rl_kl={text}: log π - log π_ref in the loss has an expected gradient of zero (that of log π averages out "
            "over the policy's own answers), so nothing would hold the policy; use k1, which is taken from the reward, "
            "or k2"
        )
    raise UserError(
        f"rl_kl={text!r} does not exist; choose k1 (taken from the reward), k2, k3 or k3_weighted (in the loss)"
    )


def parse_unfinished(text: str) -> str | float:
    """What an answer without an end is worth: "score", "drop", or a number.

    Raises:
      UserError: it is none of these.

    >>> parse_unfinished("score"), parse_unfinished("-1")
    ('score', -1.0)
    """
    if text in ("score", "drop"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"rl_unfinished={text!r}: needed is score (as it is judged), drop (nothing is learned from it), or a "
            "number, such as -1"
        )
    return value
