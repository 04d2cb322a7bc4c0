"""What is known of a loss before anything is computed: config checks read it, without JAX.

The functions are in `losses.py`, under the same names.
"""

import dataclasses
import math
from collections.abc import Iterable

from dpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a loss takes and needs.

    Attributes:
      hyperparameters: the names of those it takes.
      reference: whether it compares with a reference; without, none is loaded. None: it makes no difference (`sft`).
      per_token: without a reference, whether rewards are per token: β·log π/|y|, else β·log π.
      divergence: whether another f-divergence may take reverse KL's place (the losses of a score difference).
      across: whether pairs of a batch are compared with each other.
      over: what the loss is a mean over, in a batch as in all held-out pairs: "pairs"; "chosen tokens", so that a long
        completion weighs more; "both", where it is a sum of two such means; "ranks", where it matches all pairs first.
    """

    hyperparameters: tuple[str, ...] = ("beta",)
    reference: bool | None = True
    per_token: bool = False
    divergence: bool = False
    across: bool = False
    over: str = "pairs"


_SMOOTHED = ("beta", "label_smoothing")
LOSS_FACTS: dict[str, Loss] = {
    "sigmoid": Loss(_SMOOTHED, divergence=True),
    "robust": Loss(_SMOOTHED, divergence=True),
    "hinge": Loss(divergence=True),
    "ipo": Loss(divergence=True),
    "exo_pair": Loss(_SMOOTHED, divergence=True),
    "nca_pair": Loss(),
    "bco_pair": Loss(),
    "sppo_hard": Loss(),
    "aot": Loss(_SMOOTHED, across=True, over="ranks"),
    "aot_unpaired": Loss(_SMOOTHED, across=True, over="ranks"),
    "apo_zero": Loss(),
    "apo_down": Loss(),
    "discopop": Loss(("beta", "discopop_tau"), divergence=True),
    "sigmoid_norm": Loss(divergence=True),
    "sft": Loss((), reference=None, divergence=True, over="chosen tokens"),
    "simpo": Loss(("beta", "simpo_gamma", "label_smoothing"), reference=False, per_token=True),
    "cpo": Loss(("beta", "cpo_alpha", "label_smoothing"), reference=False, over="both"),
    "orpo": Loss(reference=False, per_token=True, over="both"),
}


def parse_loss(text: str) -> dict[str, float]:
    """Read a loss or a weighted sum of losses, such as `sigmoid:1.0,sft:0.2`; a weight left out is 1.

    Raises:
      UserError: a name or a weight is wrong.

    >>> parse_loss("sigmoid:0.8,sft:0.2")
    {'sigmoid': 0.8, 'sft': 0.2}
    """
    parts: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (x.strip() for x in part.partition(":"))
        if name not in LOSS_FACTS:
            raise UserError(f"loss={text!r}: {name!r} does not exist; choose from {', '.join(LOSS_FACTS)}")
        if name in parts:
            raise UserError(f"loss={text!r} names {name} twice; give it one weight")
        try:
            parts[name] = float(number) if colon else 1.0
        except ValueError:
            parts[name] = math.nan
        if not 0 < parts[name] < math.inf:
            raise UserError(f"loss={text!r}: weight {number!r} of {name} is not a number above 0; write {name}:0.5")
    return parts


def needs_reference(names: Iterable[str]) -> bool:
    """Whether these losses need a reference. `sft` alone has one, as in TRL, so that its rewards are reported."""
    needs = {LOSS_FACTS[name].reference for name in names}
    return True in needs or False not in needs
