"""The house rules: imports go one way between packages, sizes are bounded, names are used once, the map is true."""

import ast
import collections
import functools
import re
from pathlib import Path

import pytest

# Lowest first: a package may import those before it and itself. From `train` on they are doors, which wire the others.
ORDER = """
scripts errors bucket disk records data rows parallel entry model batches objective weights sampling config preference
report training rl inspection plan answering judging collecting train rlhf sample judge collect __main__
""".split()
# These run where there is no JAX, or before anybody has waited for it.
WITHOUT_JAX = "errors bucket disk records data rows entry config report inspection answering judging collecting".split()
JAX = ("jax", "flax", "optax", "orbax", "chex")
MESH_AXES = {"fsdp", "tensor"}  # the axis "data" is a word with other meanings too

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 90, 8
# What may be larger, with the reason.
LARGER: dict[str, str] = {}
# Public names that several modules have, with the reason.
SHARED_NAMES = {"main": "the entry of every command", "run": "the Python call of what a door trains"}
# Parameters that have a name of their own in place of `Any`.
NAMED = {"params", "ref_params", "base", "batch", "micro", "config", "c", "state"}

FILES = sorted(Path("dpo_jax").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def package_of(path):
    """The room that a file is in: a package, a module of the top level, or `__main__` for the door of a package."""
    return "__main__" if path.name == "__main__.py" else path.with_suffix("").parts[1]


def imported(tree):
    """Dotted names that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def arrows():
    """Which packages each package imports, from the code."""
    found = collections.defaultdict(set)
    for path, tree in TREES.items():
        for name in imported(tree):
            first, *rest = name.split(".")
            if first == "dpo_jax" and rest:
                found[package_of(path)].add(rest[0])
    return {name: to - {name} for name, to in found.items()}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function):
    """All parameters but `self` and `cls`; of those that stand for several (`*args`) none."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return named[1:] if named and named[0].arg in ("self", "cls") else named


def test_every_package_has_its_place():
    assert {package_of(path) for path in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package):
    allowed = ORDER[: ORDER.index(package)]
    assert sorted(arrows().get(package, set()) - set(allowed)) == []


@pytest.mark.parametrize("package", WITHOUT_JAX)
def test_no_jax_where_it_is_not_needed(package):
    for path, tree in TREES.items():
        if package_of(path) == package:
            assert {name.split(".")[0] for name in imported(tree)} & set(JAX) == set(), path


def test_the_step_knows_no_model_and_models_know_no_mesh_axis():
    step = set(imported(TREES[Path("dpo_jax/training/step.py")]))
    assert not [name for name in step if name.startswith(("dpo_jax.model.decoder", "dpo_jax.parallel.mesh"))]
    for path, tree in TREES.items():
        if package_of(path) in ("objective", "model") and path.name not in ("sharding.py", "placement.py"):
            texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert texts & MESH_AXES == set(), path


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_read_in_one_sitting(path):
    large = {}
    if (lines := len(path.read_text().splitlines())) > MOST_LINES:
        large[str(path)] = f"{lines} lines"
    for function in functions(TREES[path]):
        lines, arguments = function.end_lineno - function.lineno + 1, len(parameters(function))
        if lines > MOST_FUNCTION_LINES or arguments > MOST_PARAMETERS:
            large[f"{path}:{function.name}"] = f"{lines} lines, {arguments} parameters"
    assert {name: size for name, size in large.items() if name not in LARGER} == {}


def test_every_exception_is_needed():
    for name in LARGER:
        path, _, function = name.partition(":")
        tree = TREES[Path(path)]
        sizes = [(f.end_lineno - f.lineno + 1, len(parameters(f))) for f in functions(tree) if f.name == function] or [
            (len(Path(path).read_text().splitlines()), 0)
        ]
        over = MOST_FUNCTION_LINES if function else MOST_LINES
        assert any(lines > over or count > MOST_PARAMETERS for lines, count in sizes), f"{name} needs no exception"


def test_public_names_are_used_once():
    homes = collections.defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path))
    assert {name: at for name, at in homes.items() if len(at) > 1 and name not in SHARED_NAMES} == {}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_parameters_batches_and_configs_have_a_type(path):
    untyped = [
        f"{function.name}({argument.arg})"
        for function in functions(TREES[path])
        for argument in parameters(function)
        if argument.arg in NAMED and isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
    ]
    assert untyped == []


# ------------------------------------------------------------------------------------------------------------ the map

MAP = Path("docs/architecture.md")


def test_every_path_of_the_map_exists():
    paths = re.findall(r"`((?:dpo_jax|tests|configs|docs|notebooks|benchmarks|launch)/[\w./-]*)`", MAP.read_text())
    assert len(paths) > 20
    assert [path for path in paths if not Path(path).exists()] == []


def test_every_room_is_on_the_map():
    text = MAP.read_text()
    rooms = {name for name in ORDER if name != "__main__"}
    rooms = {f"dpo_jax/{name}.py" if Path(f"dpo_jax/{name}.py").exists() else f"dpo_jax/{name}/" for name in rooms}
    assert [room for room in sorted(rooms) if f"`{room}`" not in text] == []


def test_the_arrows_of_the_map_are_the_codes(request):
    """`--write-docs` draws them anew."""
    lines = ["| package | imports |", "|---|---|"]
    for name in ORDER[:-1]:
        to = [other for other in ORDER if other in arrows().get(name, set())]
        lines.append(f"| `{name}` | {', '.join(to) or '–'} |")
    before, rest = MAP.read_text().split("<!-- imports -->\n")
    drawn, after = "\n".join(lines) + "\n", rest.split("<!-- end -->", 1)[1]
    page = f"{before}<!-- imports -->\n{drawn}<!-- end -->{after}"
    if request.config.getoption("--write-docs"):
        MAP.write_text(page)
    assert MAP.read_text() == page, "run this test with --write-docs"
