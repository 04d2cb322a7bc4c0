"""The reference's log-probabilities, computed once and kept by pair: training then needs no reference in memory.

A file holds float32 `[pairs of the cache of pairs, 2, F]`: chosen and rejected, F values each (`REFERENCE_FIELDS`), NaN
where not computed yet. Its name is a hash of all that decides the values: the reference's files, the pairs' cache,
the dtype of the computation. What differs in any of these is another file, so an old one is never read by mistake.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.data.cache.store import PairCache
from dpo_jax.data.files import fingerprint
from dpo_jax.disk import digest, whole_file
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.rows.batch import REFERENCE_FIELDS
from dpo_jax.rows.pipeline import StepSource
from dpo_jax.training.batches import loaded


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the values of one reference for one cache of pairs are kept.

    Attributes:
      path: the file.
      pairs: how many pairs the cache of pairs has.
      fields: F, how many values a completion has.
    """

    path: Path
    pairs: int
    fields: int


def find_place(
    cache: PairCache, model: Path | None, workdir: Path, *, dtypes: str, ld_alpha: float, start_anew: bool
) -> Place:
    """The file for a reference.

    Args:
      cache: the pairs.
      model: the reference's Hugging Face directory; None: the run made it, and its values stay in the run's directory.
      workdir: the run's directory.
      dtypes: that it is computed in.
      ld_alpha: of LD-DPO, which weighs tokens; 1 is off.
      start_anew: whether a reference that the run made is another one than before; its old values go.

    Raises:
      UserError: the model's files cannot be read.
    """
    who: Any = "this run"
    if model is not None:
        files = sorted([*model.glob("*.safetensors"), model / "config.json"])
        who = [{**fingerprint(str(file)), "path": file.name} for file in files]
    decides = {"model": who, "pairs": cache.manifest["id"], "dtypes": dtypes, "ld_alpha": ld_alpha}
    key = digest(json.dumps(decides, sort_keys=True))
    directory = workdir if model is None else Path(cache.directory)
    place = Place(directory / f"reference-{key}.npy", len(cache), 1 if ld_alpha == 1 else len(REFERENCE_FIELDS))
    if model is None and start_anew and jax.process_index() == 0:
        place.path.unlink(missing_ok=True)
    return place


def read_values(where: Place) -> np.ndarray:
    """What is known, `[pairs, 2, F]`; NaN for the rest. A file that is cut off or of another shape counts as none."""
    shape = (where.pairs, 2, where.fields)
    try:
        values = np.load(where.path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        values = None
    known = values is not None and values.shape == shape and values.dtype == np.float32
    return values if known else np.full(shape, np.nan, np.float32)


def write_values(where: Place, values: np.ndarray) -> bool:
    """Keep the values, whole or not at all; False where the directory cannot be written."""
    try:
        with whole_file(where.path) as file:
            np.save(file, values)
    except OSError:
        return False
    return True


def computed_values(
    logps_step: Callable[[Any, Any], Any], source: StepSource, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the values of one pass, step by step: the next step runs while one is taken.

    Args:
      logps_step: (batch, shape) → the values, see `step.make_logps_step`.
      source: the rows of the pass.
      mesh: where they are computed.

    Yields:
      Positions in the source's pairs, int64 `[n]`, and their values, float32 `[n, 2, F]`.
    """
    pending: list[tuple[Any, np.ndarray]] = []

    def fetched() -> tuple[np.ndarray, np.ndarray]:
        result, placed = pending.pop(0)
        return placed[placed >= 0], np.stack(jax.device_get(result), axis=-1)[placed >= 0]

    compiled: set[Any] = set()
    for item in loaded(source, mesh, "rows for the reference"):
        beat("computing the reference", 1.0 if item.shape in compiled else LONGER)
        compiled.add(item.shape)
        pending.append((logps_step(item.batch, item.shape), item.examples))
        if len(pending) > 1:
            yield fetched()
    yield fetched()
