"""With what a run is made: run.json, for the report and the model card, and the first lines on the console."""

import importlib.metadata
import platform
from typing import Any

import jax

from dpo_jax.config.saved import writing
from dpo_jax.data.summary import field_lines
from dpo_jax.disk import write_json
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.placement import Layout
from dpo_jax.rows.schedule import Schedule
from dpo_jax.training.inputs import named_tokens
from dpo_jax.training.setup import Run
from dpo_jax.weights.hub import snapshot_of

PACKAGES = ("dpo_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def introduce(run: Run, schedule: Schedule, steps: int) -> None:
    """What is run, on what: run.json and the first lines on the console.

    A run that is resumed elsewhere writes that of where it is now.
    """
    s, layout, shape = run.settings, run.layout, schedule.shapes[0]
    if jax.process_index() == 0:
        with writing(run.workdir):
            write_json(run.workdir / "run.json", _about(layout, schedule, steps) | {"hub": _hub_commits(run)})
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    say, where = run.writer.message, f"{mesh} ({layout.platform})"
    say(f"model {s.model}: {layout.config.parameter_count():,} parameters, {layout.dtype} on {where}")
    if layout.config.scalar_head:
        head = run.policy.head
        say(f"head of the reward model: {head.name or 'drawn by the seed'}")
        if head.bias:
            say(f"its bias of {head.bias:.4g}, which moves all scores alike, is left out")
    if layout.lora is not None:
        targets = ",".join(layout.lora.targets)
        say(f"LoRA of rank {layout.lora.rank} on {targets}: {layout.trained_count:,} parameters are trained")
    if beyond := run.policy.tokens_beyond():
        say(
            f"tokenizer: {len(beyond):,} beyond the model's table of {layout.config.vocab_size:,} rows "
            f"({named_tokens(beyond)}), which no pair has"
        )
    say(f"data {s.data.dataset}: {len(run.data.train):,} training pairs, {len(run.data.evaluation):,} held out")
    for line in field_lines(run.data.report):
        say(line)
    for part in run.data.report.get("mixture", []):
        say(f"  {part['name']}: {part['weight']:.1%}, {part['epoch']:,} of {part['pairs']:,} pairs an epoch")
    for line in run.data.report["notes"]:
        say(f"data: {line}")
    if isinstance(layout.tiling, Tiling) and not all(layout.uses_kernel(s) for s in schedule.shapes):
        say(
            f"attention: dense blocks in place of the kernel, as sequences of up to {layout.options.longest} tokens go "
            f"beyond the model's window of {layout.config.sliding_window}"
        )
    say(f"rows {shape.rows} x [{' | '.join(map(str, shape.widths))}] for {s.batch.size} pairs")
    lengths = run.data.train.lengths
    longest, limit = int((lengths[:, 0] + lengths[:, 1:].max(1)).max()), layout.config.max_position_embeddings
    if longest > limit:
        say(
            f"warning: sequences of up to {longest} tokens, but the model was made for {limit}; lower max_prompt_length"
        )
    if run.done:
        say(f"resuming from checkpoint {run.done}")


def _about(layout: Layout, schedule: Schedule, steps: int) -> dict[str, Any]:
    """Versions, devices, the model's size, and the rows that these devices ask for."""
    first = layout.mesh.devices.flat[0]
    return {
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


def _hub_commits(run: Run) -> dict[str, dict[str, str]]:
    """Repository and commit of what came from the hub, by the config's key, or by the source of a mixture."""
    places: dict[str, Any] = {}
    for key, files in (("model", run.policy.files), ("reference", run.reference_files)):
        if files is not None:
            places |= (
                {key: files.directory}
                if files.adapter is None
                else {key: files.adapter, f"{key}_base": files.directory}
            )
    for source in run.data.train.cache.manifest["sources"]:
        places |= {f"dataset {source['name']}": file for file in source["files"][:1]}
    found = {key: snapshot_of(place) for key, place in places.items()}
    return {key: commit for key, commit in found.items() if commit is not None}


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # libtpu away from a TPU; ours if it is not installed
            continue
    return versions
