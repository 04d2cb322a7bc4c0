"""The mesh, and host arrays → global arrays. Mesh axis names occur here and in `model/placement.py`, nowhere else."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.errors import UserError
from dpo_jax.rows.batch import Batch

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
VOCAB_AXES = ("tensor", "fsdp")


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as data x fsdp x tensor; at most one size may be -1 (whatever is left).

    Several slices of a TPU pod are copies of each other: the data axis is divided into whole slices, so that only the
    sum of the gradients crosses the network between them.

    Raises:
      UserError: the product does not use the devices exactly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    asked = f"mesh_data={data} mesh_fsdp={fsdp} mesh_tensor={tensor}"
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{asked}: sizes are positive, and at most one of them -1 (all devices that are left)")
    fixed = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        if len(devices) % fixed:
            raise UserError(f"{asked}: {fixed} does not divide the {len(devices)} devices; use a divisor")
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"{asked} is a mesh of {fixed} devices, but there are {len(devices)} ({devices[0].platform}); make the "
            f"product {len(devices)}, or leave one of the three at -1"
        )
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"{asked}: the devices are {slices} slices with a slow network between them, over which only rows are "
            f"spread; make mesh_data a multiple of {slices}"
        )
    # An axis of the mesh takes whole axes of the torus where it can, else a part of one: 2 of the 4 chips in a line.
    inside = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """Over how many parts the rows of a batch divide."""
    return math.prod(mesh.shape[a] for a in ROW_AXES)


def host_shardings(shardings: Any) -> Any:
    """The same shardings in the memory of each device's host."""
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are `[microbatches, rows, ...]`, rows over the data shards."""
    return NamedSharding(mesh, P(None, ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def make_any(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """A function of this process's flag → whether any process's is set: a replicated array, computed asynchronously.

    Every process must call it equally often. It is how processes agree on something that only one of them knows.
    """
    sharding = NamedSharding(mesh, P(AXES))
    local = len(mesh.local_devices)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def largest(flags: jax.Array) -> jax.Array:
        return jnp.max(flags)

    def any_of(flag: bool) -> jax.Array:
        with jax.transfer_guard_host_to_device("allow"):
            flags = jax.make_array_from_process_local_data(sharding, np.full(local, flag, np.int32), (mesh.size,))
        return largest(flags)

    return any_of


def agreed(flag: bool) -> bool:
    """The first process's flag: files that it writes may look half-written to others. Every process calls it."""
    return bool(from_first(np.asarray(flag, np.int32)))


def any_process(flag: bool) -> bool:
    """Whether any process's flag is set. Every process calls it."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard_host_to_device("allow"):
        return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, of the same shape in all. Every process calls it."""
    if jax.process_count() == 1:
        return array
    with jax.transfer_guard_host_to_device("allow"):
        return np.array(multihost_utils.broadcast_one_to_all(array))


@contextlib.contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """The first process does it alone, the others after it: for files that one makes and all read."""
    others = jax.process_count() > 1 and jax.process_index() > 0
    if others:
        multihost_utils.sync_global_devices(what)
    try:
        yield
    finally:
        if jax.process_count() > 1 and not others:
            multihost_utils.sync_global_devices(what)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of `rows` rows of a microbatch this process holds, ascending."""
    held = batch_sharding(mesh).addressable_devices_indices_map((1, rows)).values()
    return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in held if index is not None]))


def to_global(batch: Batch[np.ndarray], mesh: Mesh, rows: int) -> Batch[jax.Array]:
    """This process's rows `[microbatches, local rows, ...]` → global arrays `[microbatches, rows, ...]`."""
    sharding = batch_sharding(mesh)
    # With several processes JAX takes even this for an implicit transfer; it is the one place that is meant.
    with jax.transfer_guard_host_to_device("allow"):
        whole = lambda x: jax.make_array_from_process_local_data(sharding, x, (x.shape[0], rows, *x.shape[2:]))
        return jax.tree.map(whole, batch)
