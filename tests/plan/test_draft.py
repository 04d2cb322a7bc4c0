"""A run on a topology before anything is compiled."""

import dataclasses

import jax
import pytest

from dpo_jax.model.placement import place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.plan.draft import find_model
from dpo_jax.plan.known import MODELS
from dpo_jax.rows.shape import RowShape
from tests.plan.runs import settings


def test_known_models_have_their_published_sizes():
    sizes = {name.split("/")[1]: find_model(name).parameter_count() for name in MODELS}
    assert sizes == {
        "SmolLM2-135M-Instruct": 134_515_008,
        "SmolLM2-1.7B-Instruct": 1_711_376_384,
        "Llama-3.1-8B-Instruct": 8_030_261_248,
        "Llama-3.1-70B-Instruct": 70_553_706_496,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen3-32B": 32_762_123_264,
    }


@pytest.mark.parametrize(("limits", "kernel"), [((1024, 512), True), ((2048, 512), False)])
def test_the_kernel_attends_unless_a_sequence_goes_beyond_a_window(limits, kernel):
    """Not because rows of several pairs are wide."""
    c = settings(attention="splash", max_prompt_length=limits[0], max_completion_length=limits[1])
    model = dataclasses.replace(find_model(c.model), sliding_window=2047, sliding_layers=(True,) * 30)
    layout = place_model(model, make_mesh(1, 1, 1, jax.devices()[:1]), c.layout, c.lora)
    assert layout.uses_kernel(RowShape(4096, (2048, 2048))) is kernel
    assert dataclasses.replace(layout, config=find_model(c.model)).uses_kernel(RowShape(4096, (2048, 2048)))
