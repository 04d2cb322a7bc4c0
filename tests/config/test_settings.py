"""A config's keys as typed values: every key arrives, nothing can be changed, and no JAX is needed."""

import dataclasses
import subprocess
import sys

import pytest

from configs import common, hhh
from dpo_jax.config.settings import read_settings
from dpo_jax.rows.shape import Order

CHANGED = {
    "seed": 3,
    "shuffle": False,
    "batch_size": 16,
    "microbatches": 2,
    "loss": "sigmoid:0.8,sft:0.2",
    "lora_rank": 8,
    "lora_targets": "q_proj,v",
    "compiler_options": "xla_a=1,xla_b=two",
    "sft_learning_rate": 5e-5,
    "reference_sync_steps": 4,
    "mesh_tensor": 2,
    "max_prompt_length": 100,
    "max_completion_length": 50,
}


def _settings(**changed):
    return read_settings(common.get_config().to_dict() | changed)


def test_keys_that_belong_together_are_groups_and_texts_are_parsed():
    s = _settings(**CHANGED)
    assert (s.batch.size, s.batch.microbatches, s.batch.order) == (16, 2, Order(3, shuffle=False, drop_remainder=True))
    assert s.objective.parts == {"sigmoid": 0.8, "sft": 0.2}
    assert s.lora is not None
    assert (s.lora.rank, s.lora.targets) == (8, ("q", "v"))
    assert s.layout.compiler_options == {"xla_a": "1", "xla_b": "two"}
    assert s.layout.longest == 150
    assert s.reference.moves
    assert s.mesh == (1, -1, 2)
    assert (s.data.seed, s.data.batch_size, s.data.max_prompt_length) == (3, 16, 100)
    assert s.whole == common.get_config().to_dict() | CHANGED
    assert _settings().lora is None
    assert not _settings().reference.moves


def test_sft_has_the_optimizer_of_dpo_at_its_own_constant_rate():
    s = _settings(optimizer="rmsprop", sft_learning_rate=5e-5, weight_decay=0.1)
    assert (s.optimizer.kind, s.optimizer.schedule) == ("rmsprop", "linear")
    assert s.sft_optimizer == dataclasses.replace(s.optimizer, peak=5e-5, schedule="constant")


def test_other_batches_change_what_depends_on_them_and_nothing_else():
    s = _settings(**CHANGED).with_batch_size(48)
    assert s == _settings(**CHANGED | {"batch_size": 48})
    assert (s.batch.size, s.data.batch_size, s.whole["batch_size"]) == (48, 48, 48)


def test_hosts_may_have_files_in_different_places_and_nothing_else():
    here, there = _settings(cache_dir="/a", model="/b"), _settings(cache_dir="/c", model="/d")
    assert here.same_on_all_hosts == there.same_on_all_hosts
    assert here.same_on_all_hosts != _settings(seed=1).same_on_all_hosts


def test_they_are_frozen():
    s = read_settings(hhh.get_config("tiny"))
    for group in (s, s.batch, s.objective, s.reference, s.optimizer, s.layout, s.data):
        with pytest.raises(dataclasses.FrozenInstanceError):
            group.seed = 1


def test_they_need_no_jax():
    code = (
        "import sys; from configs import hhh; from dpo_jax.config.settings import read_settings; "
        "read_settings(hhh.get_config('tiny')); assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
