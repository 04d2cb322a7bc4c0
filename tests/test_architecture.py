"""Imports go one way. That only one package reads the config: tests/config/test_one_room.py."""

import ast
from pathlib import Path

import pytest

# Lowest first: a package may import those before it, nothing after it.
ORDER = """
errors disk records data rows parallel model objective weights sampling config report training inspection plan
""".split()
DOORS = ("train", "__main__")  # what a person starts may import anything
# Until these are moved to where they belong.
PENDING = {
    ("config.command_line", "training"), ("model.placement", "training"), ("model.placement", "weights"),
    ("parallel.mesh", "model"),
}  # fmt: skip
FILES = {".".join(p.with_suffix("").parts[1:]): p for p in Path("dpo_jax").rglob("*.py") if p.name != "__init__.py"}


def _imports(path):
    """Modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            ours = name.removeprefix("dpo_jax.")
            if name.startswith("dpo_jax.") and ours in FILES:
                yield ours
            elif name.split(".")[0] in ("jax", "flax", "optax"):
                yield "jax"


def test_every_package_has_its_place():
    assert {m.split(".")[0] for m in FILES} - set(DOORS) <= set(ORDER)


@pytest.mark.parametrize("module", [m for m in sorted(FILES) if m.split(".")[-1] not in DOORS])
def test_imports_go_one_way(module):
    package = module.split(".")[0]
    for imported in set(_imports(FILES[module])) - {"jax"}:
        other = imported.split(".")[0]
        allowed = other in ORDER[: ORDER.index(package) + 1] or (module, other) in PENDING
        assert allowed, f"{module} imports {imported}"


@pytest.mark.parametrize(
    "module", [m for m in sorted(FILES) if (m.startswith("data.") and m != "data.__main__") or m.startswith("rows.")]
)
def test_the_data_side_has_no_jax(module):
    assert "jax" not in set(_imports(FILES[module]))


def test_the_step_knows_no_model_and_the_core_no_mesh():
    assert not {"model.decoder", "model.forward", "parallel.mesh"} & set(_imports(FILES["training.step"]))
    for module in (
        "model.config",
        "model.attention.dense",
        "model.experts",
        "model.remat",
        "objective.losses",
        "objective.logps",
        "model.decoder",
        "model.forward",
        "training.step",
        "training.optimizer",
        "model.tensors",
    ):
        text = FILES[module].read_text()
        assert not {'"fsdp"', '"tensor"', '"data"'} & set(text.split()), module
        assert "parallel.mesh" not in set(_imports(FILES[module]))
