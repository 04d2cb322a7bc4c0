"""What `import dpo_jax` gives: every name is there, is the one it says, and costs nothing before it is used."""

import ast
import importlib
from pathlib import Path

import pytest

import dpo_jax


@pytest.mark.parametrize("name", dpo_jax.__all__)
def test_a_public_name_is_the_one_of_its_module(name):
    module = importlib.import_module(f"dpo_jax.{dpo_jax._MODULES[name]}")
    public = getattr(dpo_jax, name)
    assert getattr(public, "__wrapped__", public) is getattr(module, name)  # `sample` is a module that is callable, too
    assert name in dir(dpo_jax)


def test_type_checkers_see_the_names_from_the_same_modules():
    tree = ast.parse(Path(dpo_jax.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"dpo_jax.{module}" for name, module in dpo_jax._MODULES.items()}
    assert sorted(dpo_jax.__all__) == sorted(seen)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="'dpo_jax' has no attribute 'Trainer'"):
        dpo_jax.Trainer  # noqa: B018
