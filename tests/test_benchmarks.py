"""The benchmark's own arithmetic, and trainers that take turns."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import tables, turns
from benchmarks.gate import Gate

MODEL = {"body": 100, "projection": 10}
LENGTHS = [[[5, 2, 3]], [[10, 4, 6]], [[10, 4, 6]], [[20, 8, 12]]]


def cell(ours, theirs):
    records = {
        "dpo_jax": [{"seconds": s, "peak_gb": 2.0, "compiled": i == 2, "fill": 1.0} for i, s in enumerate(ours)],
        "trl": [{"seconds": s, "peak_gb": p} for s, p in zip(theirs, (1.0, 4.0, 4.0, 3.0), strict=True)],
    }
    for record in [r for rs in records.values() for r in rs]:
        record |= {"dpo_loss": 0.5, "chosen_logp": -1.0, "rejected_logp": -2.0}
    return {"records": records, "lengths": LENGTHS, "peak_gflops": [1e-6] * 4, "load": [0.1, 0.2], "began": "then"}


def test_work_counts_a_shared_prompt_once_and_projects_completions_only():
    assert tables.work([[5, 2, 3]], MODEL, shared=True) == (10, 8 * (100 * 10 + 10 * 5))
    assert tables.work([[5, 2, 3]], MODEL, shared=False) == (15, 8 * (100 * 15 + 10 * 5))


def test_first_step_and_compiled_steps_are_not_timed():
    made = tables.judge(cell([99, 2, 99, 4], [99, 10, 10, 20]), "dpo_jax", MODEL)
    assert made["steps"] == 2
    assert made["seconds"] == 3  # of 2 and 4
    assert made["pairs"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert made["tokens"] == pytest.approx(10)
    assert made["share"] == pytest.approx(8 * (100 * 20 + 10 * 10) / 2 / 1e3)
    assert made["memory"] == 2


def test_the_table_has_the_ratio_to_the_peer_of_the_same_run():
    results = {"cells": {"hh 16 512+512 dpo_jax:16 trl:4": cell([99, 2, 99, 2], [99, 10, 10, 10])}, "model": MODEL}
    ours, theirs = tables.comparison(results).splitlines()[2:]
    assert ours.startswith("| HH harmless-base, 512+512, 16 | dpo_jax | 16 | 2.0 | 0.500 |")
    assert theirs.startswith("|  | TRL float32 | 4 | 10.0 | 0.100 |")
    assert theirs.endswith("| 4.0 GB | **5.00x** | 0.50x |")


def test_the_page_takes_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(Path("docs/benchmarks.md").read_text())
    facts = {"model": MODEL, "machine": "a machine", "system": "a system", "versions": {"trl": {"torch": "2"}}}
    variants = {name: {"seconds": s, "temporary_gb": 1.0, "fill": 0.5} for name, s in (("full", [1, 2]), ("x", [3, 4]))}
    cells = {"hh 16 512+512 dpo_jax:16 trl:4": cell([9, 2, 9, 2], [9, 10, 10, 10])}
    cells["hh 16 512+512 dpo_jax:16 ablation"] = {"variants": variants, "load": [0.0]}
    cells["hh 16 512+512 dpo_jax:8/attention trl:1"] = cell([9, 4, 9, 4], [9, 10, 10, 10])
    compiled = {"topology": "v6e:2x4 (v6e-8)", "remat": "dots"}
    fits = compiled | {"layout": "rows", "pairs": 64, "flops": 2e12, "of_8n": 1.01, "hbm_bytes": 3e9, "gib": 28.1}
    tpu = [fits, compiled | {"layout": "padded", "pairs": 16, "error": "needs 40G of 31G"}]
    tables.write(page, facts | {"cells": cells, "tpu": tpu})
    text = page.read_text()
    assert "a machine, a system." in text
    assert "**5.00x**" in text
    assert "| dpo_jax | 8, remat=attention | 4.0 |" in text
    assert "| x | 3.5 | 2.50x | 1.00 GB | 50% |" in text
    assert "| v6e:2x4 (v6e-8) | rows | 64 | dots | 2.0 | 1.01x | 3.0 | 28.1 |" in text
    assert "| v6e:2x4 (v6e-8) | padded | 16 | dots | does not fit: needs 40G of 31G |" in text


def test_a_worker_waits_at_its_gate(monkeypatch):
    """It tells seconds and facts, goes on when told to, and ends when the other side does."""
    come, there = os.pipe()
    here, go = os.pipe()
    gate = Gate(f"{here},{there}")
    with os.fdopen(go, "w") as let:
        let.write("go\n")
    gate.boundary(dpo_loss=0.5)
    with pytest.raises(SystemExit):
        gate.boundary()
    first, second = os.read(come, 1000).decode().splitlines()
    assert json.loads(first)["dpo_loss"] == 0.5
    assert 0 <= json.loads(second)["seconds"] < 60
    os.close(come)
    gate._come.close()
    gate._go.close()


def test_a_worker_that_ends_says_why(tmp_path):
    command = [sys.executable, "-m", "benchmarks.no_such_worker"]
    with turns.Worker(command, tmp_path / "log.txt") as worker, pytest.raises(turns.Failed, match="no_such_worker"):
        worker.step()
