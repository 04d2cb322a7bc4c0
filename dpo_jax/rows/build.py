"""Groups of token ids → the arrays of rows.

Shapes: B rows, K groups in a row, n completions of a group.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpo_jax.rows.batch import Batch, batch_spec
from dpo_jax.rows.shape import RowShape
from dpo_jax.rows.slots import assign_slots

Group = tuple[np.ndarray, ...]  # token ids of a prompt and of its n completions, int32


class GroupSource(Protocol):
    """Tokenised groups by index: `lengths` int `[N, 1+n]`, and the token ids of group i."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Group: ...


@dataclasses.dataclass(frozen=True)
class FirstOnly:
    """The same groups with their first completion alone: of pairs the chosen ones, which SFT trains on."""

    groups: GroupSource

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.groups.lengths)[:, :2]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> Group:
        return self.groups[i][:2]


def build_rows(groups: GroupSource | Sequence[Group], placed: np.ndarray, shape: RowShape) -> Batch[np.ndarray]:
    """The rows `[B, ...]` of groups; `placed` are their indices, int `[B, K]`, -1 in an empty place."""
    B, K = placed.shape
    spec = batch_spec(dataclasses.replace(shape, places=K), (B,))
    out: Batch[np.ndarray] = spec.map(lambda x: np.zeros(x.shape, x.dtype))
    out.is_group[:] = placed >= 0
    for b in np.flatnonzero((placed >= 0).any(1)):
        here = np.flatnonzero(placed[b] >= 0)
        held = [groups[int(placed[b, k])] for k in here]
        assert all(len(ids) == 1 + shape.n for ids in held), f"groups of other than {shape.n} completions for {shape}"
        out.completion_tokens[b, here] = [[len(ids) for ids in completions] for _, *completions in held]
        slots = np.broadcast_to(np.arange(shape.n), (len(here), shape.n))
        if out.slots is not None:
            (slots,) = assign_slots(out.completion_tokens[b, here][None], shape.completions)
            out.slots[b, here] = slots
        used = list(shape.starts)
        for k, (prompt, *completions), mine in zip(here, held, slots, strict=True):
            prompt_end = used[0] + len(prompt)
            for slot, ids in [(0, prompt), *((1 + s, ids) for s, ids in zip(mine, completions, strict=True))]:
                a, z = used[slot], used[slot] + len(ids)
                used[slot] = z
                if z > shape.starts[slot] + shape.widths[slot]:
                    raise AssertionError(f"group {placed[b, k]} overflows slot {slot} of {shape}")
                first = 0 if slot == 0 else len(prompt)
                out.tokens[b, a:z] = ids
                out.segments[b, a:z] = k + 1
                out.positions[b, a:z] = np.arange(first, first + len(ids))
                if slot > 0 and z > a:
                    n = a - shape.prompt
                    out.source[b, n : n + z - a] = np.arange(a - 1, z - 1)
                    out.source[b, n] = prompt_end - 1
    return out


def token_rows(
    values: Sequence[Sequence[np.ndarray]], placed: np.ndarray, batch: Batch[np.ndarray], shape: RowShape
) -> tuple[np.ndarray, np.ndarray]:
    """Values of every completion token where `build_rows` put the token, float32 `[B, N]`, and whose each token is.

    Args:
      values: of each group, by its number in `placed`: of each of its completions one array, as long as it is.
      placed, batch, shape: the groups `[B, K]`, and their rows.

    Returns:
      The values, 0 for padding; and int32 `[B, N]`, group in the row · n + completion, -1 for padding.
    """
    found = np.zeros((len(placed), shape.targets), np.float32)
    owner = np.full(found.shape, -1, np.int32)
    for b, k in np.argwhere(placed >= 0):
        slots = np.arange(shape.n) if batch.slots is None else batch.slots[b, k]
        for j, (slot, mine) in enumerate(zip(slots, values[placed[b, k]], strict=True)):
            start, width = shape.starts[slot + 1], shape.completions[slot]
            (here,) = np.nonzero(batch.segments[b, start : start + width] == k + 1)
            assert len(here) == len(mine), f"group {placed[b, k]}: {len(mine)} values for {len(here)} tokens"
            found[b, start - shape.prompt + here] = mine
            owner[b, start - shape.prompt + here] = k * shape.n + j
    return found, owner
