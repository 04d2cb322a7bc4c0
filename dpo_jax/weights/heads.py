"""The head of a reward model: where a directory has it, and under which name. A causal model has none.

transformers' `AutoModelForSequenceClassification` with one label calls it `score.weight`, of shape `[1, hidden]`; other
trainers have names of their own for the same tensor.
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.model.tensors import SCORE
from dpo_jax.weights.hub import CONFIG, ModelFiles
from dpo_jax.weights.merged import read_adapter
from dpo_jax.weights.model_files import read_model_json
from dpo_jax.weights.stored import HEAD_NAMES, open_tensors

# What a head is called anywhere: a tensor with one of these words in its name and no place in the model is one.
_LIKE_A_HEAD = re.compile(r"(^|\.)(score|scores|v_head|value_head|reward_head|regression_head|classifier|rm_head)\.")


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a reward model on disk.

    Attributes:
      name: of its tensor; empty: the directory has none, and a fresh one is drawn.
      bias: that moves all scores alike. It is left out: no difference of two scores has it.
    """

    name: str = ""
    bias: float = 0.0


def find_head(files: ModelFiles) -> Head:
    """The head that a directory has, or none.

    Raises:
      UserError: it has another number of labels, more layers than one, or the directory says that there is one and
        there is none.
    """
    directory = files.directory
    hf = read_model_json(directory / CONFIG)
    with contextlib.ExitStack() as stack:
        stored = open_tensors(directory, stack)
        if files.adapter is not None and SCORE.name in read_adapter(files.adapter, stack).whole:
            return Head(SCORE.name)  # of the adapter: its shape is checked where it is read
        names = [name for name in HEAD_NAMES if name in stored]
        if len(names) > 1:
            raise UserError(f"{directory}: two heads, {names[0]!r} and {names[1]!r}; leave the one that is meant")
        if not names:
            return _no_head(directory, hf, stored)
        shape = tuple(stored[names[0]].get_shape())
        if len(shape) != 2 or shape[0] != 1:
            labels = shape[0] if shape else 0
            raise UserError(
                f"{directory}: the head {names[0]!r} has {labels} labels (its shape is {shape}), and a reward model "
                "has one (num_labels=1); give a reward model, or a causal one to train"
            )
        bias = names[0].removesuffix("weight") + "bias"
        return Head(names[0], float(np.asarray(stored[bias][:], np.float32).sum()) if bias in stored else 0.0)


def _no_head(directory: Path, hf: Mapping[str, Any], stored: Mapping[str, Any]) -> Head:
    other = [name for name in stored if _LIKE_A_HEAD.search(name)]
    if other:
        shape = tuple(stored[other[0]].get_shape())
        raise UserError(
            f"{directory}: {other[0]!r} of shape {shape} is not a head that is known; one linear layer to one number "
            f"is needed, called {' or '.join(HEAD_NAMES)}"
        )
    if is_classifier(hf):
        raise UserError(
            f"{directory}: {CONFIG} says {hf['architectures'][0]}, and no tensor is its head ({HEAD_NAMES[0]}); fetch "
            "the model again, or give a causal one"
        )
    return Head()


def is_classifier(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json says that it is of a sequence classifier, as reward models are."""
    named = hf.get("architectures")
    return isinstance(named, list) and bool(named) and "ForSequenceClassification" in str(named[0])
