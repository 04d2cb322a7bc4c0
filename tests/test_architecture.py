"""Imports go one way, and only the trainer reads the config."""

import ast
from pathlib import Path

import pytest

# Lowest first: a module may import those before it, nothing after it.
ORDER = """
errors integrity watchdog processes
data.preference data.columns data.datasets data.files data.mixture data.sources data.render data.cache data.shared_store
data.remote_cache data.split data.identity data.lengths data.prepare
data.balance data.packing data.pipeline data.synthetic
architecture attention spread heads vocabulary splash tiles experts remat logprobs losses objective optim model step tpu
hlo_text hlo_loops hlo_flops hlo_bytes hlo jaxpr_costs
hub tensors lora sharding checkpoint weights peft_files sample tiny policy about
length_bias memory events metrics trackers page charts runs compare lengths_page sections card report answers kl
spikes loop reference_cache config inputs phases reference claim
inspection inspection_text inspection_page data_command data.__main__
known bounds compile_only plan_lengths plan_search plan_text plan
train
""".split()
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


def test_every_module_has_its_place():
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_one_way(module):
    before = ORDER[: ORDER.index(module)]
    for imported in set(_imports(FILES[module])):
        assert imported == "jax" or imported in before, f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in sorted(FILES) if m.startswith("data.")])
def test_the_data_side_has_no_jax(module):
    assert "jax" not in set(_imports(FILES[module]))


def test_the_step_knows_no_model_and_the_core_no_mesh():
    assert not {"model", "sharding", "policy"} & set(_imports(FILES["step"]))
    for module in (
        "architecture",
        "attention",
        "experts",
        "remat",
        "losses",
        "logprobs",
        "model",
        "step",
        "optim",
        "tensors",
    ):
        text = FILES[module].read_text()
        assert not {'"fsdp"', '"tensor"', '"data"'} & set(text.split()), module
        assert "sharding" not in set(_imports(FILES[module]))


@pytest.mark.parametrize("module", [m for m in sorted(FILES) if m not in ("train", "config")])
def test_only_the_trainer_reads_the_config(module):
    assert "ml_collections" not in FILES[module].read_text()
