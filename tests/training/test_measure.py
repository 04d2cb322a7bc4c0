"""Throughput counts training alone; memory is as the kernel and the devices count it, and goes back to the system."""

import platform
from pathlib import Path

import jax
import pytest

from dpo_jax.training import measure
from dpo_jax.training.measure import Throughput


def _status(name: str) -> int:
    """A number of this process's status, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    (kib,) = (int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))
    return kib * 1024


def test_peak_memory_on_cpu_is_what_the_kernel_says():
    assert measure.peak_gb() == pytest.approx(_status("VmHWM") / 1e9, rel=0.02)


def test_what_is_free_in_the_heap_goes_back_to_the_system():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    blocks = [bytearray(100_000) for _ in range(2_000)]  # each small enough to lie in the heap
    last = bytearray(100_000)  # above them: the heap cannot just end earlier
    blocks.clear()
    before = _status("VmRSS")
    measure.give_back()
    assert before - _status("VmRSS") > 150e6
    assert last is not None


def test_a_device_that_tells_its_peak_is_believed(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.memory_stats = lambda: peak and {"bytes_in_use": 1, "peak_bytes_in_use": peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2_000_000_000), Device(3_500_000_000), Device(None)])
    assert measure.peak_gb() == 3.5


def test_throughput_leaves_out_pauses():
    now = [0.0]
    throughput = Throughput(clock=lambda: now[0])
    assert throughput.take() == {}
    throughput.count(8)
    now[0] = 2.0
    with throughput.paused():
        now[0] = 7.0
    throughput.count(8)
    now[0] = 9.0
    assert throughput.take() == {"pairs_per_second": 4.0, "step_seconds": 2.0}
    assert throughput.take() == {}
