"""How rows and the vocabulary are sharded over a mesh, and the sums that follow from it.

A device has some rows and some part of the vocabulary's tables. Along a mesh axis devices differ in their rows, in
their part of the vocabulary, or in both, and that decides what they exchange where rows meet the vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Axes = tuple[str, ...]


def mesh_axes(name: str) -> Axes:
    """The axes of the current mesh over which a logical axis is sharded; none without a mesh.

    Looked up one name at a time: flax gives each mesh axis to only one of several names.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return ()
    (axes,) = nn.logical_to_mesh_axes((name,)) or (None,)
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def per_device(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`fn` on every device's own parts of its arguments; `fn` itself without a mesh.

    Sums over devices are `fn`'s own, forward and backward: neither kernels nor grouped products tell JAX over which
    axes their results vary, so it cannot check or add them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Over which mesh axes rows and the vocabulary are sharded; axes of one device are left out.

    `of` and `on_mesh` are called for the whole mesh, all other methods inside `on_mesh`, for one device.

    Attributes:
      rows, vocab: mesh axes.
      width: those over which the tables are sharded by width, as the vocabulary does not divide: the last of `vocab`.
      devices: how many devices each axis has.
    """

    rows: Axes
    vocab: Axes
    width: Axes
    devices: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, rows: int) -> "Spread":
        """How the current mesh and the logical-axis rules spread `rows` rows and the vocabulary."""
        mesh = jax.sharding.get_abstract_mesh()
        row_axes, vocab_axes, width_axes = (
            tuple(a for a in mesh_axes(name) if mesh.shape[a] > 1) for name in ("rows", "vocab_parts", "table")
        )
        devices = tuple((a, mesh.shape[a]) for a in dict.fromkeys(row_axes + vocab_axes))
        spread = cls(row_axes, vocab_axes, width_axes, devices)
        # A few prompts to answer need not divide over the devices: then every device has all of them.
        return spread if rows % spread.size(row_axes) == 0 else dataclasses.replace(spread, rows=())

    @property
    def gathered(self) -> Axes:
        """Axes over which devices have other rows and other parts of the vocabulary: rows must meet all parts."""
        return tuple(a for a in self.vocab if a in self.rows)

    @property
    def shared(self) -> Axes:
        """Axes over which devices have the same rows and other parts of the vocabulary."""
        return tuple(a for a in self.vocab if a not in self.rows)

    @property
    def copies(self) -> Axes:
        """Axes over which devices have other rows and the same part of the vocabulary."""
        return tuple(a for a in self.rows if a not in self.vocab)

    def size(self, axes: Axes) -> int:
        """How many devices these axes have together."""
        return math.prod(dict(self.devices)[a] for a in axes)

    def on_mesh(self, fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`fn` of every device's own parts; `fn` itself where there is no mesh of several devices."""
        return per_device(fn, in_specs, out_specs) if self.devices else fn

    @property
    def whole(self) -> Axes:
        """Axes over which the vocabulary is sharded but not the tables' width: devices along them hold the same."""
        return tuple(a for a in self.vocab if a not in self.width)

    def parts(self, x_VD: jax.Array) -> jax.Array:
        """This device's part of whole rows of a table of which it has all rows, cut over `width`."""
        if self.whole:
            part = len(x_VD) // self.size(self.whole)
            x_VD = jax.lax.dynamic_slice_in_dim(x_VD, jax.lax.axis_index(self.whole) * part, part)
        return jax.lax.all_to_all(x_VD, self.width, 0, 1, tiled=True) if self.width else x_VD

    def widths(self, x_vD: jax.Array) -> jax.Array:
        """The way back from `parts`."""
        x = jax.lax.all_to_all(x_vD, self.width, 1, 0, tiled=True) if self.width else x_vD
        return jax.lax.all_gather(x, self.whole, axis=0, tiled=True) if self.whole else x

    def gather(self, x: jax.Array) -> jax.Array:
        """The rows of all devices whose part of the vocabulary is another."""
        return jax.lax.all_gather(x, self.gathered, axis=0, tiled=True) if self.gathered else x

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """The sum over all parts of the vocabulary, of this device's own rows."""
        x = jax.lax.psum(x, self.shared) if self.shared else x
        return jax.lax.psum_scatter(x, self.gathered, scatter_dimension=0, tiled=True) if self.gathered else x

    def copies_sum(self, x: jax.Array) -> jax.Array:
        """The sum over the devices that have the same part of the vocabulary."""
        return jax.lax.psum(x, self.copies) if self.copies else x

    def vocab_max(self, x: jax.Array) -> jax.Array:
        """The largest over all parts of the vocabulary, of the gathered rows."""
        return jax.lax.pmax(x, self.vocab) if self.vocab else x

    def vocab_sum(self, x: Any) -> Any:
        """The sum over all parts of the vocabulary, of the gathered rows; of a tree of arrays."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def own_rows(self, x: jax.Array, rows: int) -> jax.Array:
        """Of values that all devices have for the gathered rows, those of this device's own `rows`."""
        if not self.gathered:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.gathered) * rows, rows)

    def offset(self, part: int) -> Any:
        """The first token of this device's part of the vocabulary, which has `part` tokens."""
        return jax.lax.axis_index(self.vocab) * part if self.vocab else 0
