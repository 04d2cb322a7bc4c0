"""Names of rewards, as `rl_reward` gives them: a preference model or a verifier each, with its weight. No JAX."""

import math

from dpo_jax.config.judges import divided
from dpo_jax.errors import UserError


def weighted_names(spec: str) -> list[tuple[str, float]]:
    """The parts of a weighted sum and their weights; 1 where none is given.

    Raises:
      UserError: a name is empty, twice there, or its weight is no number other than 0.

    >>> weighted_names("runs/reward,my:verifier*0.5")
    [('runs/reward', 1.0), ('my:verifier', 0.5)]
    """
    parts: dict[str, float] = {}
    for part in divided(spec):
        name, star, number = part.rpartition("*")
        try:
            name, weight = (name.strip(), float(number.encode("ascii"))) if star else (part, 1.0)
        except ValueError:  # also of digits of another script
            weight = math.nan
        if not name or not math.isfinite(weight) or not weight:
            raise UserError(f"rl_reward={spec!r}: {part!r} has no weight other than 0 behind the *; write NAME*0.5")
        if name in parts:
            raise UserError(f"rl_reward={spec!r} names {name} twice; give it one weight")
        parts[name] = weight
    return list(parts.items())
