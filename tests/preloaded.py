"""What programs that tests start have imported when they begin (tests/programs.py): nothing of it starts a backend."""

import gc

import jax._src.xla_bridge

import dpo_jax.answering.draw
import dpo_jax.collecting.run
import dpo_jax.rl.phase
import dpo_jax.rl.pipeline
import dpo_jax.training.rounds
import dpo_jax.training.run  # noqa: F401

assert not jax._src.xla_bridge._backends
gc.set_threshold(100_000, 20, 20)  # as in tests/conftest.py
gc.freeze()
