"""`python -m dpo_jax.train`, stopped at a gate before every step: dpo_jax's part of `compare.py`.

Everything is the product's: its command line, data, plan, feed, loop and step. Only the step that the loop calls is
wrapped, to wait for its turn and to wait for its result. Before the first step the pairs of the first steps are written
to `--steps-file`: the peers train on the same batches.

    python -m benchmarks.own_worker --gate IN,OUT --steps-file FILE --steps N -- --config=... --workdir=... [FLAGS]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.gate import Gate
from dpo_jax import train
from dpo_jax.batches import Item
from dpo_jax.rows.pipeline import StepSource
from dpo_jax.training import phases
from dpo_jax.training.loop import Phase

LOGGED = ("dpo_loss", "loss", "margin", "chosen_logp", "rejected_logp", "grad_norm")


def write_steps(source: StepSource, path: Path, steps: int) -> None:
    """The pairs of the first steps as `gate.read_steps` reads them, those of a step in random order.

    In the plan's order, pairs of one row come together, which says something about their lengths.
    """
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as f:
        for step in range(steps):
            _, placed = source.schedule.place(step)
            ids = rng.permutation(placed[placed >= 0])
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            pairs = [dict(zip(names, (x.tolist() for x in source.schedule.groups[int(i)]), strict=True)) for i in ids]
            f.write(json.dumps(pairs) + "\n")


def gated(phase: Phase[Any], batches: Iterator[Item], gate: Gate, longest: list[int]) -> tuple[Any, Iterator[Item]]:
    """The phase with a step that takes its turn, and its batches."""
    facts: dict[str, Any] = {"longest": longest[:2], "pairs": longest[2]}
    compiled: set[Any] = set()
    running: dict[str, Any] = {}  # the metrics of the step before
    current: list[Item] = []

    def passed() -> Iterator[Item]:
        for item in batches:
            current[:] = [item]
            yield item

    def step(state: Any, batch: Any, shape: Any) -> Any:
        jax.block_until_ready((state, running))
        facts.update({name: float(running[name]) for name in LOGGED if name in running})
        gate.boundary(**facts)
        state, metrics = phase.step(state, batch, shape)
        facts.clear()
        fill = current[0].facts["useful_token_fraction"]
        facts.update(compiled=shape not in compiled, fill=fill, shape=dataclasses.astuple(shape))
        running.update(metrics)
        compiled.add(shape)
        return state, metrics

    return dataclasses.replace(phase, step=step), passed()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", required=True)
    parser.add_argument("--steps-file", required=True, type=Path)
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument("flags", nargs="+")
    a = parser.parse_args()
    gate = Gate(a.gate)

    load, run_phase, longest = phases.loaded, phases.run_phase, []

    def loaded(source: StepSource, *rest: Any) -> Iterator[Item]:
        write_steps(source, a.steps_file, a.steps)
        lengths = source.schedule.lengths
        longest[:] = [int(lengths[:, 0].max()), int(lengths[:, 1:].max()), len(lengths)]
        return load(source, *rest)

    def run_gated(phase: Phase[Any], batches: Iterator[Item], *args: Any, **kwargs: Any) -> Any:
        return run_phase(*gated(phase, batches, gate, longest), *args, **kwargs)

    phases.loaded, phases.run_phase = loaded, run_gated
    return train.main(["dpo_jax.train", *a.flags])


if __name__ == "__main__":
    sys.exit(main())
