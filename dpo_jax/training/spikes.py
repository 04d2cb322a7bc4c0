"""Loss spikes: a loss far above those of the updates before it."""

import collections
import dataclasses
import math
import statistics

WINDOW = 64  # finite losses that one is compared with
ENOUGH = 16  # before there are so many, nothing is a spike
SIGMAS = 6.0  # how far above their median
FLOOR = 0.05  # of the median: where losses hardly differ (at the start all are ln 2), the least that counts as a sigma


@dataclasses.dataclass
class Losses:
    """The last losses of a phase."""

    last: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=WINDOW))

    def spike_over(self, loss: float) -> float | None:
        """The median of the losses before, if `loss` is a spike over them, else None; then it is one of them.

        A sigma is estimated by 1.4826 times the median distance from the median: a spike does not hide the next one.
        """
        if not math.isfinite(loss):  # skipped, and said so
            return None
        found = None
        if len(self.last) >= ENOUGH:
            median = statistics.median(self.last)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.last)
            if loss > median + SIGMAS * max(spread, FLOOR * abs(median)):
                found = median
        self.last.append(loss)
        return found
