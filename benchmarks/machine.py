"""What this machine is, and how fast it multiplies matrices right now."""

import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp

# Of a transformer's size and square: the best of them is the peak.
MATMULS = ((2048, 2048, 2048), (4096, 1024, 4096), (4096, 576, 1536))

# Flags in /proc/cpuinfo of what floats can be multiplied at once, widest first.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}


def name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor, and how many of its cores and how much memory this process may use.

    In clouds two generations of a processor have one name: what tells them apart is said too.
    """
    processor = platform.processor() or platform.machine()
    if cpuinfo.exists():
        first = cpuinfo.read_text().partition("\n\n")[0]
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        processor = facts.get("model name", processor)
        known = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
        known += [vectors for flag, vectors in VECTORS.items() if flag in facts.get("flags", "").split()][:1]
        processor += f" ({', '.join(known)})" if known else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {cores} cores, {memory:.0f} GiB"


def matmul_gflops(repeats: int = 4) -> float:
    """Billions of float32 operations a second: the fastest of a few matrix products, each run a few times."""
    best = 0.0
    multiply = jax.jit(lambda a, b: a @ b)
    for m, k, n in MATMULS:
        a, b = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
        multiply(a, b).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            multiply(a, b).block_until_ready()
            best = max(best, 2 * m * k * n / (time.perf_counter() - start) / 1e9)
    return best
