"""How `compare.py` makes trainers take turns: a worker waits at a gate before every step and tells what the last took.

Standard library only: the workers run in the peers' own environments.
"""

import json
import os
import resource
import sys
import time
from typing import Any, TextIO

RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Gate:
    """The worker's side: two pipes, one line each way and step.

    Args:
      descriptors: `IN,OUT`, file descriptors that the worker inherited.
    """

    def __init__(self, descriptors: str):
        come, go = (int(x) for x in descriptors.split(","))
        self._come: TextIO = os.fdopen(come)
        self._go: TextIO = os.fdopen(go, "w")
        self._began = time.perf_counter()

    def boundary(self, **facts: Any) -> None:
        """Between two steps: tell the seconds since the last one was let through, and wait for the next.

        A trainer calls it at the same place of its loop every time, so that the seconds are those of a whole round:
        data, step and logging. Ends the process when there is no more to do.
        """
        if self.turn(**facts) != "go":
            raise SystemExit(0)

    def turn(self, **facts: Any) -> str:
        """`boundary` for a worker that is told more than to go on: what it was told, nothing when there is no more."""
        seconds = time.perf_counter() - self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9
        print(json.dumps({"seconds": seconds, "peak_gb": peak, **facts}), file=self._go, flush=True)
        told = self._come.readline().strip()
        self._began = time.perf_counter()
        return told


def read_steps(path: str) -> list[list[dict[str, list[int]]]]:
    """The pairs of every step: token ids under `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]
