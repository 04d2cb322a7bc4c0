"""Throughput counts training alone."""

from dpo_jax.training.throughput import Throughput


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
