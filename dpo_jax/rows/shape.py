"""The row: `[ prompt | completion 1 | ... | completion n ]`, shared by several groups; and what is asked of rows.

A group is a prompt with its n completions; a pair is a group of two, and n is the same in all of a run. Group k of a
row has its prompt somewhere in the prompt slot and one completion in every other slot, all with segment id k+1; 0 is
padding.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class RowShape:
    """A compiled shape; hashable, so that it is a static argument of what is compiled for it.

    Attributes:
      prompt: width of the prompt slot in tokens; widths may be 0.
      completions: widths of the n completion slots.
      rows: of a whole step.
      places: how many groups a row can hold.
    """

    prompt: int
    completions: tuple[int, ...]
    rows: int = 1
    places: int = 1

    def __post_init__(self) -> None:
        assert self.completions, "a row has at least one completion slot"

    @property
    def n(self) -> int:
        """Completions of a group."""
        return len(self.completions)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all slots, the prompt's first."""
        return (self.prompt, *self.completions)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first column of every slot."""
        return tuple(itertools.accumulate(self.widths[:-1], initial=0))

    @property
    def borders(self) -> tuple[int, ...]:
        """The columns where one completion slot ends and the next begins."""
        return self.starts[2:]

    @property
    def targets(self) -> int:
        """Columns of a row that hold completions: those with a log-probability."""
        return sum(self.completions)

    @property
    def length(self) -> int:
        """Columns of a row."""
        return sum(self.widths)

    @property
    def tokens(self) -> int:
        """Computed tokens of a step, padding included."""
        return self.rows * self.length

    def reach(self, longest: int | None = None) -> int:
        """No sequence of the row has more tokens, nor more than `longest` where that is known."""
        room = self.prompt + max(self.completions)
        return room if longest is None else min(room, longest)


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What the hardware and the model ask of rows.

    Attributes:
      row_multiple: rows of a step divide by it (data shards x microbatches).
      width_multiple: slot widths divide by it.
      key_cost: cost of letting one token look at one key, in units of the token's own matrix products.
    """

    row_multiple: int = 1
    width_multiple: int = 8
    key_cost: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order groups come.

    Attributes:
      seed: the order and every exchange are a function of it and the epoch.
      shuffle: a new random order every epoch, and balanced batches; False keeps file order and the batches it gives.
      drop_remainder: leave out the last, short batch of an epoch.
    """

    seed: int = 0
    shuffle: bool = True
    drop_remainder: bool = True
