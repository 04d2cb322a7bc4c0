"""How much memory a process has used at most."""

import resource
import sys

import jax


def peak_gb() -> float:
    """The most memory used so far, in GB (1e9 bytes).

    Of this process's devices the fullest one counts, by what its allocator says; where devices do not say (CPU), it is
    the resident set of the whole process.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [held["peak_bytes_in_use"] for held in stats if "peak_bytes_in_use" in held]
    if peaks:
        return max(peaks) / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / 1e9  # Linux counts KiB
