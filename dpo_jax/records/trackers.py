"""Copies of a run's records for Weights & Biases and for trackio: off unless the config names a project.

The packages themselves decide where they go, and whether over a network: WANDB_MODE=offline, WANDB_BASE_URL,
TRACKIO_DIR, TRACKIO_SPACE_ID and so on. metrics.jsonl stays the truth.
"""

import importlib.util
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dpo_jax.bucket.local import local_twin
from dpo_jax.disk import read_json, write_json
from dpo_jax.errors import UserError
from dpo_jax.records.records import Record

FINISH_SECONDS = 300.0  # for a service to take the last records, after which the run ends without its answer
Log = Callable[[Record], None]
Tracker = tuple[Log, Callable[[bool], None]]  # what takes a record, and what ends it (True: the run failed)


def check_packages(projects: Mapping[str, str]) -> None:
    """Refuse a tracker whose package is not installed, before anything is loaded.

    Args:
      projects: the project in each of `TRACKERS`; empty is off.

    Raises:
      UserError: with the command that installs it.
    """
    for package, project in projects.items():
        if project and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package}_project={project!r} needs the package {package}, which is not installed: "
                f"pip install {package}, or leave the key empty"
            )


@contextmanager
def open_trackers(workdir: Path, projects: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[list[Log]]:
    """The trackers that are asked for; a resumed run continues the tracker's run that it began.

    Its records since the checkpoint are sent again, with the values they had: they fall on the same points.

    Args:
      workdir: of the run, whose name the trackers show; ids are kept in its trackers.json.
      projects: as in `check_packages`.
      config: of the run, for them to show.

    Yields:
      Functions that take a record; called by one process only.

    Raises:
      UserError: a tracker cannot start.
    """
    wanted = {package: project for package, project in projects.items() if project}
    path = workdir / "trackers.json"
    ids = read_json(path, shape=dict[str, str]) if path.exists() else {}
    if new := {package: secrets.token_hex(4) for package in wanted if package not in ids}:
        ids |= new
        write_json(path, ids)
    with ExitStack() as stack:
        logs = []
        for package, project in wanted.items():
            try:
                log, finish = TRACKERS[package](project, workdir, ids[package], dict(config))
            except Exception as error:  # not logged in, no network, a project's name that is not allowed
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"{package}_project={project!r}: {package} cannot start ({reason:.300}); mend that, or leave the "
                    "key empty" + (" (WANDB_MODE=offline needs no login)" if package == "wandb" else "")
                ) from error
            stack.push(
                lambda kind, *_, package=package, finish=finish: _finish_in_time(package, finish, kind is not None)
            )
            logs.append(log)
        yield logs


def _finish_in_time(package: str, finish: Callable[[bool], None], failed: bool) -> None:
    """End a tracker's run: a service that fails or does not answer is no reason for a sound run to fail, or to stay."""
    said = f"it has not ended within {FINISH_SECONDS:.0f} s"

    def end() -> None:
        nonlocal said
        try:
            finish(failed)
            said = ""
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__

    thread = threading.Thread(target=end, name=package, daemon=True)
    thread.start()
    thread.join(FINISH_SECONDS)
    if said:
        print(f"warning: {package} could not be finished ({said}); its last records may be missing there", flush=True)


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """`train/dpo_loss` and so on, as TensorBoard has them; the step among them, each split having its own."""
    return {f"{record['split']}/{name}": v for name, v in record.items() if not isinstance(v, str)}


def _wandb(project: str, workdir: Path, run_id: str, config: dict[str, Any]) -> Tracker:
    import wandb  # an extra, slow to import

    local = local_twin(workdir)
    local.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project, name=workdir.resolve().name, id=run_id, resume="allow", dir=str(local), config=config,
        settings=wandb.Settings(console="off"),
    )  # fmt: skip
    # SFT and DPO both count from 1, and wandb's own step never goes back.
    for split in ("sft", "train", "eval"):
        run.define_metric(f"{split}/*", step_metric=f"{split}/step")
    return lambda record: run.log(_numbers(record)), lambda failed: run.finish(exit_code=int(failed))


def _trackio(project: str, workdir: Path, run_id: str, config: dict[str, Any]) -> Tracker:
    import trackio  # an extra, slow to import

    # A run is known by its name there, so that of the directory alone could be another run's.
    run = trackio.init(project=project, name=f"{workdir.resolve().name}-{run_id}", config=config, resume="allow")
    return lambda record: run.log(_numbers(record), step=record["step"]), lambda failed: run.finish()


TRACKERS = {"wandb": _wandb, "trackio": _trackio}  # called with project, workdir, the run's id there, config
