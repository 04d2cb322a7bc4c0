"""How much memory there is for the cache."""

from pathlib import Path

import numpy as np

from dpo_jax.model.placement import Layout
from dpo_jax.parallel.mesh import from_first

# The cache may take so much of what is free: activations and the programs' temporaries need the rest.
SHARE = 0.8
# While a cache moves to another rung, the old one is still there, and is at most half as large.
MOVING = 1.5


def free_bytes(layout: Layout) -> float:
    """Bytes of a device's memory that a cache may take; the same number in all processes.

    On CPU the devices share what the host has left, after what the kernel could give back.
    """
    device = layout.mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 / len(layout.mesh.local_devices)
    return float(from_first(np.asarray(SHARE * free, np.float32)))
