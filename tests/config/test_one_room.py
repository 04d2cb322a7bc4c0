"""Only `dpo_jax/config/` reads a config's keys; all else takes typed values. Proven on the syntax tree of each file."""

import ast
from pathlib import Path

import pytest

from dpo_jax.config.keys import KEYS

FILES = sorted(p for p in Path("dpo_jax").rglob("*.py") if p.parts[1] != "config")
# What is no config although its items have names that keys have too: records, entries of data.json, PEFT's file, ...
OTHERS = {
    "record",
    "r",
    "first",
    "last",
    "row",
    "values",
    "entry",
    "source",
    "data",
    "bad",
    "about",
    "peft",
    "tree",
    "options",
    "line",
    "beside",
}
CONFIGS = {"c", "cfg", "conf", "config", "configs"}  # what a config is called where one is at hand
MAPPINGS = {"Any", "Config", "ConfigDict", "Dict", "Mapping", "MutableMapping", "dict"}
# A config passes through these without being read: from the command line or a notebook, to where it is shown.
WHOLE = {
    "dpo_jax/train.py": {"run"},
    "dpo_jax/rlhf.py": {"run"},
    "dpo_jax/plan/command.py": {"_plan_stages"},
    "dpo_jax/records/trackers.py": {"open_trackers", "_wandb", "_trackio"},
}


def _name(node):
    """The last name of what is read: `config` of `self.config["seed"]` and of `config[0]["seed"]`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _outer(annotation):
    """The outer names of an annotation: Mapping of `Mapping[str, Any] | None`."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return _outer(annotation.left) | _outer(annotation.right)
    if isinstance(annotation, ast.Subscript):
        return _outer(annotation.value)
    return {_name(annotation)}


def reads(source, file=""):
    """What a file does with a config: a line and words for each."""
    tree = ast.parse(source)
    typed = set()  # names that an annotation in this file gives a class: `config: ModelConfig` is no config of ours
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.split(".")[0] == "ml_collections" for name in names):
                yield node.lineno, "imports ml_collections"
        parameters = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            parameters = [
                (x.arg, x.annotation) for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
        elif isinstance(node, ast.AnnAssign):
            parameters = [(_name(node.target), node.annotation)]
        for name, annotation in parameters:
            outer = _outer(annotation) if annotation is not None else set()
            if outer & {"Config", "ConfigDict"}:
                yield node.lineno, f"{name} is annotated as a config"
            elif name in CONFIGS and outer & MAPPINGS and not outer - MAPPINGS - {""}:
                if getattr(node, "name", "") not in WHOLE.get(file, ()):
                    yield node.lineno, f"{name} is annotated as a mapping"
            elif name in CONFIGS and outer:
                typed.add(name)
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key, base = node.slice.value, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr in ("get", "pop", "setdefault") and isinstance(node.args[0], ast.Constant):
                key, base = node.args[0].value, node.func.value
        elif isinstance(node, ast.Call) and _name(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
            key, base = node.args[1].value, node.args[0]
        if isinstance(key, str) and key in KEYS and _name(base) not in OTHERS:
            yield node.lineno, f"reads key {key!r}"
        if isinstance(node, ast.Attribute) and node.attr in KEYS and _name(node.value) in CONFIGS - typed:
            yield node.lineno, f"reads key {node.attr!r} as an attribute"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_other_room_reads_the_config(path):
    assert list(reads(path.read_text(), str(path))) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import ml_collections", "imports ml_collections"),
        ("from ml_collections import config_flags", "imports ml_collections"),
        ("def f():\n    import ml_collections.config_dict as d", "imports ml_collections"),
        ("def f(c: Mapping[str, Any]): ...", "is annotated as a mapping"),
        ("def f(*, config: dict | None = None): ...", "is annotated as a mapping"),
        ("def f(it: 'Config'): ...", "is annotated as a config"),
        ("class Run:\n    whole: ml.ConfigDict", "is annotated as a config"),
        ("x = c['seed']", "reads key 'seed'"),
        ("x = it.anything['dpo_beta'] + 1", "reads key 'dpo_beta'"),
        ("x = f(y)['batch_size']", "reads key 'batch_size'"),
        ("c['loss'] = 'ipo'", "reads key 'loss'"),
        ("x = run.config.get('lora_rank', 0)", "reads key 'lora_rank'"),
        ("x = getattr(whatever, 'num_steps')", "reads key 'num_steps'"),
        ("x = config.learning_rate", "reads key 'learning_rate' as an attribute"),
        ("x = self.c.model", "reads key 'model' as an attribute"),
        ("f = lambda cfg: cfg.remat", "reads key 'remat' as an attribute"),
    ],
)
def test_a_read_would_be_seen(source, words):
    assert any(words in found for _, found in reads(source))


@pytest.mark.parametrize(
    "source",
    [
        "x = record['loss']",  # a metric
        "x = s.data.dataset",  # a typed value
        "def f(config: ModelConfig): return config.router_aux_loss_coef",  # a model's
        "x = values['microbatch']",
    ],
)
def test_what_is_no_read_passes(source):
    assert list(reads(source)) == []
