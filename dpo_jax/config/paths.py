"""Refuse models and data that are not on this disk before anything is imported that takes seconds.

Only what costs no download: what is on the hub, or in a bucket, is looked for when it is needed.
"""

from collections.abc import Mapping
from typing import Any

from dpo_jax.data.files import is_remote
from dpo_jax.data.sources import find_sources, hub_dataset, parse_mixture
from dpo_jax.weights.hub import local_model


def check_paths(config: Mapping[str, Any]) -> None:
    """Look for a config's model, reference and data, where they are local.

    Raises:
      UserError: one of them is not there; says what to give.
    """
    for what in ("model", "reference"):
        if config[what] and config[what] != "tiny":
            local_model(config[what], what=what)
    dataset, path, held_out = config["dataset"], config["dataset_path"], config["eval_path"]
    names = [name for name, _ in parse_mixture(dataset)]
    elsewhere = any(map(is_remote, (*names, *path.split(","), held_out)))
    made = not path and any(name == "synthetic" or hub_dataset(name) for name in names)
    if not elsewhere and not made:
        find_sources(dataset, path, held_out, config["split"])
