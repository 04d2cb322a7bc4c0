"""A model directory, loaded to look at: one call gives what it is, where it is, and its parameters."""

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax.weights.huggingface import load_weights
from tests.places import GOLDEN


def test_a_directory_is_loaded_on_all_devices():
    directory = GOLDEN / "trl/tiny"
    policy, layout, params = dpo_jax.load_policy(directory)
    assert policy.directory == directory
    assert policy.tokenizer.decode(policy.tokenizer.encode("good")).strip() == "good"
    assert layout.mesh.shape == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    expected = load_weights(directory, policy.config, layout.shardings, "float32")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {x.sharding.mesh for x in jax.tree.leaves(params)} == {layout.mesh}


@pytest.mark.parametrize(
    ("model", "words"), [("tiny", "give the export/ of its run"), ("/nowhere", "no such directory")]
)
def test_what_cannot_be_loaded_is_refused(model, words):
    with pytest.raises(dpo_jax.UserError, match=words):
        dpo_jax.load_policy(model)
