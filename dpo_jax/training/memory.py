"""The memory of a process: how much it has used at most, and what it can give back."""

import ctypes
import resource
import sys

import jax


def peak_gb() -> float:
    """The most memory used so far, in GB (1e9 bytes).

    Of this process's devices the fullest one counts, by its allocator's own count; where there is none (CPU), it is
    the resident set of the whole process.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [held["peak_bytes_in_use"] for held in stats if "peak_bytes_in_use" in held]
    if peaks:
        return max(peaks) / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / 1e9  # Linux counts KiB


def give_back() -> None:
    """Return to the system what is free in the C library's heap, where that is glibc (`malloc_trim`, malloc_trim(3)).

    Compiling leaves the heap full of holes: half a gigabyte after a step on CPU that would stay resident to the end.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
