"""Imports go one way, and only the trainer reads the config."""

import ast
from pathlib import Path

import pytest

# Lowest first: a module may import those before it, nothing after it.
ORDER = """
errors disk training.integrity parallel.watchdog parallel.processes
data.comparison data.columns data.datasets data.files data.mixture data.sources data.render data.cache.store
data.cache.lock
data.cache.shared data.split data.cache.fingerprint data.lengths data.prepare
rows.balance rows.schedule rows.pipeline data.synthetic
model.options model.config model.attention.dense parallel.spread model.attention.on_mesh objective.token_logps
model.attention.tpu_splash model.attention.cpu_tiles model.experts model.remat objective.logps objective.losses
objective.objective training.optimizer model.decoder training.step parallel.tpu
plan.hlo.text plan.hlo.loops plan.hlo.flops plan.hlo.bytes plan.hlo.count plan.kernels
weights.hub model.tensors model.lora parallel.mesh training.checkpoint weights.huggingface weights.peft
sampling.engine weights.tiny model.placement training.about
records.length_bias training.memory records.tensorboard records.writer records.trackers report.html report.charts
report.runs report.compare report.lengths report.sections report.card report.command report.__main__ sampling.answers
sampling.divergence
training.spikes training.loop training.reference_cache config.command_line config.settings training.inputs
training.setup training.reference training.workdir
inspection.gather inspection.console inspection.page inspection.command data.__main__
plan.known plan.bounds plan.compile plan.lengths plan.search plan.text plan.command plan.__main__
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


@pytest.mark.parametrize(
    "module", [m for m in sorted(FILES) if (m.startswith("data.") and m != "data.__main__") or m.startswith("rows.")]
)
def test_the_data_side_has_no_jax(module):
    assert "jax" not in set(_imports(FILES[module]))


def test_the_step_knows_no_model_and_the_core_no_mesh():
    assert not {"model.decoder", "parallel.mesh", "model.placement"} & set(_imports(FILES["training.step"]))
    for module in (
        "model.config",
        "model.attention.dense",
        "model.experts",
        "model.remat",
        "objective.losses",
        "objective.logps",
        "model.decoder",
        "training.step",
        "training.optimizer",
        "model.tensors",
    ):
        text = FILES[module].read_text()
        assert not {'"fsdp"', '"tensor"', '"data"'} & set(text.split()), module
        assert "parallel.mesh" not in set(_imports(FILES[module]))


@pytest.mark.parametrize("module", [m for m in sorted(FILES) if m not in ("train", "config.command_line")])
def test_only_the_trainer_reads_the_config(module):
    assert "ml_collections" not in FILES[module].read_text()
