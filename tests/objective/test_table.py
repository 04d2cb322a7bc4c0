"""The table of losses says what the functions are: config checks read it without JAX."""

import inspect

import pytest

from dpo_jax.objective import losses
from dpo_jax.objective.table import LOSS_FACTS


@pytest.mark.parametrize("name", LOSS_FACTS)
def test_a_loss_takes_the_hyperparameters_of_its_line(name):
    _, *taken = inspect.signature(losses.LOSSES[name]).parameters
    assert tuple(taken) == LOSS_FACTS[name].hyperparameters
    assert losses.LOSSES[name].__module__ == losses.__name__, "a function of losses.py, not something it imports"


def test_every_public_function_of_pairs_is_a_loss():
    takes_pairs = {
        name
        for name, it in vars(losses).items()
        if inspect.isfunction(it) and not name.startswith("_") and "pairs" in inspect.signature(it).parameters
    }
    assert takes_pairs == set(LOSS_FACTS)
