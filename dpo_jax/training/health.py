"""Whether a phase is well: updates that are skipped because they are not finite, and losses far above those before.

Many skipped updates in a row end the run; a spike is only reported.
"""

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.errors import NOT_FINITE, UserError
from dpo_jax.model.config import Params
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.weights.huggingface import gather_to_host

SKIPPED = "skipped"  # the metric that is 1 where the update was not made
WINDOW = 64  # finite losses that one is compared with
ENOUGH = 16  # before there are so many, nothing is a spike
SIGMAS = 6.0  # how far above their median
LEAST = 1e-3  # what counts as a sigma at least: losses of RL are rounding around 0
FLOOR = 0.05  # of the median: where losses hardly differ (at the start all are ln 2), the least that counts as a sigma


@dataclasses.dataclass
class Health:
    """What the updates of a phase were like so far.

    Attributes:
      split: of the phase's records.
      max_bad_steps: more skipped updates in a row than this end the run.
      keep_bad_batch: (split, update, examples of its batch) → the file that names them.
      losses: the last ones that were finite.
      in_a_row: skipped updates up to now, without a good one between them.
      since_record: updates skipped since the last record.
    """

    split: str
    max_bad_steps: int
    keep_bad_batch: Callable[[str, int, np.ndarray], Path]
    losses: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=WINDOW))
    in_a_row: int = 0
    since_record: int = 0

    @property
    def over(self) -> bool:
        """Whether too many updates in a row were skipped."""
        return self.in_a_row > self.max_bad_steps

    def spike_over(self, loss: float) -> float | None:
        """The median of the losses before if `loss` is a spike over them, else None. `loss` is then one of them.

        A sigma is estimated by 1.4826 times the median distance from the median: a spike does not hide the next one.
        """
        if not math.isfinite(loss):  # its update is skipped and reported as such
            return None
        spiked = None
        if len(self.losses) >= ENOUGH:
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            if loss > median + SIGMAS * max(spread, FLOOR * abs(median), LEAST):
                spiked = median
        self.losses.append(loss)
        return spiked

    def check(self, n: int, loss: float, values: Mapping[str, float], examples: np.ndarray, log: MetricsWriter) -> None:
        """Count and report a skipped update and a loss spike of update `n`.

        Raises:
          UserError: too many updates in a row were skipped; the batch is written out.
        """
        event = {"step": n, "split": self.split, "loss": loss, "grad_norm": values["grad_norm"]}
        if (median := self.spike_over(loss)) is not None:
            log.event(
                {**event, "event": "spike", "median": median, "pairs": examples.tolist()},
                f"warning: {self.split} step {n}: the loss is {loss:.4g}, the median before it {median:.4g} (a spike)",
            )
        if not values.get(SKIPPED):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.since_record += 1
        update = f"{self.split} step {n}: loss {loss:.4g}, gradient norm {values['grad_norm']:.4g}"
        log.event(
            {**event, "event": "skipped", "pairs": examples.tolist()},
            f"warning: {update}: not finite, the update is skipped ({self.in_a_row} in a row)",
        )
        if self.over:
            where = self.keep_bad_batch(self.split, n, examples)
            raise UserError(
                f"{update}: not finite {self.in_a_row} times in a row, more than max_bad_steps={self.max_bad_steps}; "
                f"the pairs of the last batch are in {where}; mend them, or lower the learning rate in a new workdir; "
                "checkpoints from before are kept",
                code=NOT_FINITE,
            )

    def take(self) -> int:
        """Updates skipped since the last call."""
        skipped, self.since_record = self.since_record, 0
        return skipped


def check_evaluation(values: Mapping[str, float], *, first: bool) -> None:
    """Refuse, with a UserError, numbers that are not finite: to train from them, or to end with them.

    A win rate may be none: it is a judge's, not the model's.

    Args:
      first: before any update; else after all of them.
    """
    bad = [
        name for name, x in values.items() if x is not None and not name.startswith("win_rate") and not math.isfinite(x)
    ]
    if bad and first:
        raise UserError(
            "the evaluation before any update is not finite: the weights of the model or the reference are damaged, "
            "or compute_dtype is too narrow for them"
        )
    if bad:
        raise UserError(
            f"the evaluation after training is not finite ({', '.join(bad[:3])}); {_DIVERGED}", code=NOT_FINITE
        )


def check_trained(params: Params, dtype: str) -> None:
    """Refuse, with a UserError, to call a run done whose parameters are not finite in the dtype of its export."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sound = gather_to_host(_finite([leaf for _, leaf in leaves], dtype=dtype)) if leaves else np.ones(0, bool)
    bad = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    bad = [name for name, fine in zip(bad, sound, strict=True) if not fine]
    if bad:
        raise UserError(f"the parameters after training are not finite ({bad[0]}); {_DIVERGED}", code=NOT_FINITE)


_DIVERGED = (
    "nothing is exported: lower the learning rate, or mend the rows, in a new workdir; checkpoints from before are kept"
)


@functools.partial(jax.jit, static_argnames="dtype")
def _finite(leaves: Sequence[jax.Array], *, dtype: str) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf.astype(dtype)).all() for leaf in leaves])
