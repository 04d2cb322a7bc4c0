"""With what a run was made: run.json, for the report and the model card."""

import importlib.metadata
import platform
from pathlib import Path

import jax

from dpo_jax.disk import write_json
from dpo_jax.model.placement import Layout
from dpo_jax.rows.schedule import Schedule

PACKAGES = ("dpo_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def write_about(path: Path, layout: Layout, schedule: Schedule, steps: int) -> None:
    """Write run.json: versions, devices, the model's size, and the rows that these devices ask for.

    A run that is resumed elsewhere writes that of where it is now.
    """
    first = layout.mesh.devices.flat[0]
    about = {
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": first.platform,
        "device": first.device_kind,
        "devices": layout.mesh.size,
        "processes": jax.process_count(),
        "mesh": dict(layout.mesh.shape),
        "parameters": layout.config.parameter_count(),
        "trained_parameters": layout.trained_count,
        "compute_dtype": layout.dtype.name,
        "steps": steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "rows": [
            {"rows": shape.rows, "widths": list(shape.widths), "pairs_per_row": shape.places}
            for shape in schedule.shapes
        ],
    }
    write_json(path, about)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # libtpu away from a TPU; ours if it is not installed
            continue
    return versions
