"""With what a run was made: run.json, for the report and the model card."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from dpo_jax.model import placement as policy
from dpo_jax.model.placement import Layout
from dpo_jax.rows.pipeline import Schedule

PACKAGES = ("dpo_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def about(layout: Layout, plan: Schedule, steps: int) -> dict[str, Any]:
    """What run.json holds: versions, devices, the model's size, and the plan that the devices ask for."""
    first = layout.mesh.devices.flat[0]
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": first.platform,
        "device": first.device_kind,
        "devices": layout.mesh.size,
        "processes": jax.process_count(),
        "mesh": dict(layout.mesh.shape),
        "parameters": layout.config.parameter_count(),
        "trained_parameters": policy.trained_count(layout),
        "compute_dtype": layout.dtype.name,
        "steps": steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "rows": [
            {"rows": shape.rows, "widths": list(shape.widths), "pairs_per_row": shape.pairs} for shape in plan.shapes
        ],
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """Write run.json; a run that goes on elsewhere writes that of where it is now."""
    path.write_text(json.dumps(values, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # libtpu away from a TPU; ours if it is not installed
            continue
    return found
