"""The choice of the next token: the most likely one, or a draw at a temperature from the nucleus."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    Attributes:
      temperature: what logits are divided by before a draw; 0 is greedy.
      top_p: mass of the nucleus that is drawn from; 1 is the whole vocabulary.
    """

    temperature: float = 0.0
    top_p: float = 1.0


def pick(key: jax.Array, logits_BV: jax.Array, choice: Choice) -> jax.Array:
    """Next tokens `[B]`: the most likely one at temperature 0, else a draw from the nucleus.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the smallest set of most likely tokens whose
    probabilities sum to at least `top_p`; its most likely token always belongs to it.
    """
    if choice.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / choice.temperature
    if choice.top_p < 1:
        falling = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more likely tokens
        least = jnp.min(jnp.where(before < choice.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1)
