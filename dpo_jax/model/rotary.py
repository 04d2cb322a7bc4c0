"""Rotary position embedding: angles by position, with the checkpoints' ways to stretch them, and the rotation.

Shapes: B rows, T tokens of a row, H heads, E head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


@functools.cache
def _inverse_frequencies(head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    """Rotary inverse frequencies with the checkpoint's rope scaling (`linear`, `llama3` or none), in float64."""
    freqs = [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
    options = dict(scaling)
    kind = options.get("rope_type", "default")
    if kind == "linear":
        return tuple(f / float(options["factor"]) for f in freqs)
    if kind == "llama3":
        factor, low, high = (float(options[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        old_context = float(options["original_max_position_embeddings"])
        scaled = []
        for f in freqs:
            wavelength = 2 * math.pi / f
            smooth = min(max((old_context / wavelength - low) / (high - low), 0.0), 1.0)
            scaled.append((1 - smooth) * f / factor + smooth * f)
        return tuple(scaled)
    return tuple(freqs)


def rotary_angles(
    positions_BT: jax.Array,
    *,
    head_dim: int,
    theta: float,
    scaling: tuple[tuple[str, Any], ...] = (),
    last_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, E/2]` in float32 of rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    LongRoPE (Ding et al. 2024, arXiv 2402.13753) has two sets of frequencies. The long ones count in a sequence whose
    last position, `last_BT` at each of its tokens, is outside of the original context; None: there is no such one.
    """
    options = dict(scaling)
    freqs = jnp.asarray(_inverse_frequencies(head_dim, theta, scaling), jnp.float32)[None, None, :]
    size = 1.0
    if options.get("rope_type") == "longrope":
        short, long = (jnp.asarray(options[k], jnp.float32)[None, None, :] for k in ("short_factor", "long_factor"))
        if last_BT is not None:
            short = jnp.where(last_BT[..., None] >= options["original_max_position_embeddings"], long, short)
        freqs = freqs / short
        size = float(options["attention_factor"])
    angles_BTe = positions_BT[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles_BTe), jnp.sin(angles_BTe)
    return (cos, sin) if size == 1.0 else (cos * size, sin * size)


def apply_rotary(x_BTHE: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the two halves of each head (Hugging Face's layout); what is wider than the angles stays as it is."""
    cos, sin = (a[:, :, None, :] for a in angles)
    width = 2 * cos.shape[-1]
    x, rest = x_BTHE[..., :width].astype(jnp.float32), x_BTHE[..., width:]
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHE.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
