"""What every config begins with: all keys at their defaults, from the table in dpo_jax/config/keys.toml.

What each key means, its default and its legal values: that table, docs/configuration.md made from it, or
`python -m dpo_jax.train --help`. The files beside this one change what differs for their dataset; keys are flat.
"""

import ml_collections

import dpo_jax
from dpo_jax import UserError


def get_config() -> ml_collections.ConfigDict:
    return dpo_jax.get_config()


def choose(presets: dict, name: str, file: str) -> dict:
    """The preset `name` ("" = the default one)."""
    if name not in presets:
        known = ", ".join(f"{file}:{p}" if p else file for p in presets)
        raise UserError(f"preset {name!r} does not exist; there are {known}")
    return presets[name]
