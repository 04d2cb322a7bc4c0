"""The notebooks run from top to bottom at a small size, say what is true, and are what their sources make.

Their sources are notebooks/*.py; `python -m pytest tests/end_to_end/test_notebooks.py --write-docs` makes the
.ipynb anew.
"""

import json
import os
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from tests import processes

pytestmark = pytest.mark.slow

SOURCES = sorted(Path("notebooks").glob("*.py"))
SKIPPED = "skip-in-tests"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def _made(source):
    """The notebook that a source makes: the same bytes every time, no outputs."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": KERNEL, "accelerator": "TPU", "colab": {"name": f"{source.stem}.ipynb"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem.replace('_', '-')}-{number}"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def _run(name, directory):
    """Execute a notebook in an empty directory; returns what `expression`s are in its kernel afterwards."""
    notebook = nbformat.read(f"notebooks/{name}.ipynb", as_version=4)
    assert SKIPPED in notebook.cells[1].metadata.tags
    notebook.cells = [cell for cell in notebook.cells if SKIPPED not in cell.metadata.get("tags", [])]
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute()
    return notebook


@pytest.fixture(autouse=True)
def small(monkeypatch):
    root = str(Path.cwd())
    monkeypatch.setenv("DPO_JAX_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    # One device, as the tests' eight share two cores; most of a small run is compiling.
    monkeypatch.setenv("XLA_FLAGS", processes.quick_to_compile()["XLA_FLAGS"])
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")


def _records(workdir, split):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["split"] == split]


def _printed(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs)


def _pictures(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_source_makes(source, request):
    if request.config.getoption("--write-docs"):
        source.with_suffix(".ipynb").write_text(_made(source))
    assert source.with_suffix(".ipynb").read_text() == _made(source), "run this test with --write-docs"


def test_there_is_no_notebook_without_source():
    assert {p.stem for p in Path("notebooks").glob("*.ipynb")} == {p.stem for p in SOURCES}


def test_quickstart(tmp_path):
    notebook = _run("quickstart", tmp_path)
    run = tmp_path / "runs/quickstart"
    first, *_, last = _records(run, "eval")
    assert first["dpo_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["dpo_loss"] < 0.6
    assert last["accuracy"] > 0.6 > first["accuracy"]
    assert (run / "export/model.safetensors").exists()
    assert _pictures(notebook) == 1
    assert "after:" in _printed(notebook)


def test_dpo_tutorial(tmp_path):
    notebook = _run("dpo_tutorial", tmp_path)
    printed = _printed(notebook)
    # beta KL ± error margin accuracy, as the notebook prints them
    rows = [line.split() for line in printed.splitlines() if line.startswith("beta ") and " KL " in line]
    kl = {float(row[1]): (float(row[3]), float(row[5])) for row in rows}
    assert list(kl) == [0.03, 0.3, 3.0]
    assert kl[0.03][0] > kl[3.0][0] + kl[0.03][1] + kl[3.0][1]  # a larger beta stays nearer, beyond both errors
    (by_hand,) = [line.split() for line in printed.splitlines() if line.startswith("by hand")]
    assert float(by_hand[2].rstrip(",")) == pytest.approx(float(by_hand[4]), abs=1e-5)
    assert float(by_hand[4]) != pytest.approx(0.693147, abs=1e-4)  # of a policy that differs from its reference
    wild = _records(tmp_path / "runs/tutorial-wild", "train")
    assert max(r["dpo_loss"] for r in wild) > 1.0
    assert _pictures(notebook) == 2


def test_your_data(tmp_path):
    _run("your_data", tmp_path)
    run = tmp_path / "runs/your_data"
    first, *_, last = _records(run, "eval")
    assert last["accuracy"] > 0.8 > first["accuracy"]
    assert (run / "export/config.json").exists()
    (bad,) = (run / "quarantine.jsonl").read_text().splitlines()
    assert "A row without answers" in bad


def test_rlhf_tutorial(tmp_path):
    notebook = _run("rlhf_tutorial", tmp_path)
    printed = _printed(notebook)
    (apart,) = [line.split() for line in printed.splitlines() if line.startswith("largest difference")]
    assert float(apart[-1]) < 1e-3
    methods = [line for line in printed.splitlines() if line.startswith(("DPO ", "RL "))]
    rows = {line.split()[0]: line.split() for line in methods}
    assert set(rows) == {"DPO", "RL"}
    assert all(0 <= float(row[-4]) <= 1 for row in rows.values())
    assert {p.name for p in (tmp_path / "runs/rlhf").glob("*") if p.is_dir()} == {"sft", "reward", "rl"}
    assert _pictures(notebook) == 2
