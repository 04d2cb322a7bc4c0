"""The table of keys: its names are those of the real tables, its defaults are legal, its refusals say why."""

import re

import pytest

from configs import common
from dpo_jax.config import keys, values
from dpo_jax.config.keys import KEYS, SECTIONS, Key, Legal
from dpo_jax.errors import UserError
from dpo_jax.model import lora
from dpo_jax.model.options import ATTENTION
from dpo_jax.model.remat import REMAT_POLICIES
from dpo_jax.objective.objective import DIVERGENCES
from dpo_jax.training.optimizer import OPTIMIZERS, SCHEDULES

FRACTION = keys.legal_values({"must_be": "in [0, 1]", "least": 0, "most": 1})


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("f_divergence", DIVERGENCES),
        ("remat", REMAT_POLICIES),
        ("optimizer", OPTIMIZERS),
        ("lr_schedule", SCHEDULES),
        ("attention", ATTENTION),
    ],
)
def test_choices_are_those_of_the_table_that_is_used(name, table):
    assert KEYS[name].legal == tuple(table)


def test_projections_are_those_of_the_model():
    assert (*lora.ATTENTION, *lora.MLP) == values.PROJECTIONS
    assert values.parse_targets("all-linear") == (lora.ALL,)


def test_a_config_is_the_table():
    assert common.get_config().to_dict() == {key.name: key.default for key in KEYS.values()}
    assert len(KEYS) == sum(map(len, SECTIONS.values())), "a name stands twice"


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_has_a_meaning_and_a_legal_default(key):
    assert len(key.meaning) > 10
    assert key.values
    if key.name != "model":  # nothing is trained unless it is asked for
        key.check(key.default)


def test_every_key_is_in_the_help_with_its_meaning():
    words = " ".join(keys.describe().split())
    for key in KEYS.values():
        assert f"{key.name}={key.default}: {key.meaning}" in words


@pytest.mark.parametrize(
    ("default", "legal", "value", "words"),
    [
        (1, Legal(), 1.5, "k=1.5: must be an int, such as 1"),
        (1, Legal(), True, "k=True: must be an int"),
        (False, Legal(), 1, "k=1: must be a bool"),
        (1.0, Legal(), "1", "k='1': must be a float"),
        (1.0, Legal(), float("nan"), "k=nan: must be finite"),
        (1.0, FRACTION, 1.5, "k=1.5: must be in [0, 1]"),
        (1, keys.legal_values({"must_be": "0 (off) or more", "least": 0}), -1, "k=-1: must be 0 (off) or more"),
        ("a", ("a", "b"), "c", "k='c' does not exist; choose from a, b"),
    ],
)
def test_a_value_is_refused_with_the_reason(default, legal, value, words):
    with pytest.raises(UserError, match=re.escape(words)):
        Key("k", default, "a key of this test", legal).check(value)


def test_a_whole_number_is_a_number():
    Key("k", 1.0, "a key of this test", FRACTION).check(1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", -1, "must be 0 or more, below 4294967296"),
        ("seed", 2**32, "must be 0 or more, below 4294967296"),
        ("num_steps", 2**31, "must be at most 2147483647"),
        ("batch_size", 10**400, "batch_size=a huge number: must be at most"),
        ("learning_rate", 1e39, "must be at most 3.4e[+]38"),
        ("learning_rate", 10**400, "must be at most 3.4e[+]38"),
        ("learning_rate", 1e-50, "would be 0 in float32"),
        ("learning_rate", float("nan"), "must be finite"),
        ("model", "a" * 256, "a name of 256 bytes, and systems take 255"),
        ("model", "é" * 128, "a name of 256 bytes"),
        ("dataset", "a/" * 2048, "a path of 4,096 bytes"),
        ("cache_dir", "a\0b", "holds a NUL character"),
        ("loss", "sigmoid:０.5,ipo:1", "'０' is a digit of another script; write it as 0"),
        ("template_date", "2026-07-２6", "'２' is a digit of another script"),
    ],
)
def test_what_no_system_or_arithmetic_takes_is_refused(name, value, words):
    with pytest.raises(UserError, match=words) as caught:
        KEYS[name].check(value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("columns", "prompt:प्रश्न१"),
        ("seed", 2**32 - 1),
        ("learning_rate", 0),
        ("learning_rate", 1e38),
        ("model", "a" * 255 + "/" + "b" * 255),
    ],
)
def test_what_is_just_within_the_bounds_is_not(name, value):
    KEYS[name].check(value)


@pytest.mark.parametrize("argv", [["--config.seed=１２"], ["--config.seed", "1２"], ["-config.dpo_beta=٠.1"]])
def test_digits_of_another_script_are_no_number(argv):
    numbers = {"config.seed", "config.dpo_beta"}
    with pytest.raises(UserError, match="is a digit of another script; write it as"):
        values.check_numbers(argv, numbers.__contains__)
    values.check_numbers(["--config.model=１２", "--config.seed=12"], numbers.__contains__)
