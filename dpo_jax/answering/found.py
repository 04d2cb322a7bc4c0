"""The model that is asked for, found on disk: a run's export or checkpoint, a directory, or a hub's id. No JAX."""

import dataclasses
import json
from pathlib import Path

from dpo_jax.bucket.path import as_path
from dpo_jax.config.opened import is_run, run_settings
from dpo_jax.config.settings import Settings
from dpo_jax.disk import digest, file_digest
from dpo_jax.errors import UserError
from dpo_jax.records.directory import checkpoint_directories
from dpo_jax.weights.hub import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, local_model, resolve_model


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a model is.

    Attributes:
      name: as it was asked for.
      model: a directory, or a hub's id: what the policy is made of; of a run what it began with.
      revision: the hub's.
      run: the directory of the run that trained it; None: of none that is known.
      settings: of that run.
      checkpoint: of that run; None: `model` has the weights.
    """

    name: str
    model: str
    revision: str = ""
    run: Path | None = None
    settings: Settings | None = None
    checkpoint: Path | None = None


def locate_model(model: str, revision: str = "") -> Found:
    """Find what `--model` means; a hub's id is not looked for yet.

    Raises:
      UserError: there is no such model, or a run has neither an export nor a checkpoint.
    """
    path = as_path(model).expanduser()
    if model == "tiny":
        raise UserError("model 'tiny' has no weights before it is trained; give the directory of its run")
    if not (path.is_dir() and is_run(path)):
        here = local_model(model)
        if here is not None and revision:
            raise UserError(f"--revision={revision}: {model} is a local directory, which has none; leave it out")
        return Found(model, model, revision)
    if revision:
        raise UserError(f"--revision={revision}: {model} is a run, which has none; leave it out")
    settings = run_settings(path)
    if (path / "export" / CONFIG).is_file():
        return Found(model, str(path / "export"), run=path, settings=settings)
    if settings.task == "reward":
        raise UserError(f"model={model!r} is a reward model's run, which says no words; use it as a judge (--judge=)")
    steps = checkpoint_directories(path)
    if not steps:
        raise UserError(
            f"model={model!r}: the run has no export/ and no checkpoint yet; give it time, or another model"
        )
    return Found(model, settings.model, settings.revision, path, settings, steps[max(steps)])


def model_digest(found: Found) -> str:
    """What tells a model from others: the content of its files, wherever they are. A hub's are downloaded.

    Raises:
      UserError: it is not there, or cannot be downloaded.
    """
    parts: dict[str, object] = {}
    if found.model != "tiny":
        files = resolve_model(found.model, revision=found.revision)
        named = [path for pattern in TOKENIZER_FILES for path in files.tokenizer.glob(pattern)]
        paths = [*files.deciding(), *named, files.directory / GENERATION_CONFIG]
        for at, path in enumerate(sorted({p for p in paths if p.is_file()}, key=lambda p: (p.name, str(p)))):
            parts[f"{at} {path.name}"] = _without_place(path) if path.name == ADAPTER_CONFIG else file_digest(path)
    if found.checkpoint is not None and found.settings is not None:
        s = found.settings
        sums = found.checkpoint / "checksums.json"
        parts["checkpoint"] = file_digest(sums) if sums.is_file() else None
        parts["run"] = [s.seed, s.model if s.model == "tiny" else "", str(s.lora)]
    return digest(json.dumps(parts, sort_keys=True))


def _without_place(path: Path) -> object:
    """An adapter's numbers, whose base may be anywhere: it is known by its own files."""
    held = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in held.items() if key != "base_model_name_or_path"}
