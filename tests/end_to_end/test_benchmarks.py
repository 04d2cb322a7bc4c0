"""The benchmark's own arithmetic, and trainers that take turns."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import compare, machine, sampling, sampling_worker, tables, turns
from benchmarks.gate import Gate

MODEL = {"body": 100, "projection": 10}
FACTS = {"began": "then", "versions": {"trl": {"torch": "2"}}}
LENGTHS = [[[5, 2, 3]], [[10, 4, 6]], [[10, 4, 6]], [[20, 8, 12]]]


def cell(ours, theirs):
    records = {
        "dpo_jax": [{"seconds": s, "peak_gb": 2.0, "compiled": i == 2, "fill": 1.0} for i, s in enumerate(ours)],
        "trl": [{"seconds": s, "peak_gb": p} for s, p in zip(theirs, (1.0, 4.0, 4.0, 3.0), strict=True)],
    }
    for record in [r for rs in records.values() for r in rs]:
        record |= {"dpo_loss": 0.5, "chosen_logp": -1.0, "rejected_logp": -2.0}
    return {"records": records, "lengths": LENGTHS, "peak_gflops": [1e-6] * 4, "load": [0.1, 0.2], **FACTS}


def test_work_counts_a_shared_prompt_once_and_projects_completions_only():
    assert tables.work([[5, 2, 3]], MODEL, shared=True) == (10, 8 * (100 * 10 + 10 * 5))
    assert tables.work([[5, 2, 3]], MODEL, shared=False) == (15, 8 * (100 * 15 + 10 * 5))
    assert tables.work([[5, 2, 3]], MODEL, shared=True, task="reward") == (10, 6 * 100 * 10)


def test_first_step_and_compiled_steps_are_not_timed():
    made = tables.judge(cell([99, 2, 99, 4], [99, 10, 10, 20]), "dpo_jax", MODEL)
    assert made["steps"] == 2
    assert made["seconds"] == 3  # of 2 and 4
    assert made["pairs"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert made["tokens"] == pytest.approx(10)
    assert made["share"] == pytest.approx(8 * (100 * 20 + 10 * 10) / 2 / 1e3)
    assert made["memory"] == 2


def test_the_table_has_the_ratio_to_the_peer_of_the_same_run():
    here = {"cells": {"hh 16 512+512 dpo_jax:16 trl:4": cell([99, 2, 99, 2], [99, 10, 10, 10])}}
    ours, theirs = tables.comparison(here, MODEL).splitlines()[2:]
    assert ours.startswith("| HH harmless-base, 512+512, 16 | dpo_jax | 16 | 2.0 | 0.500 |")
    assert theirs.startswith("|  | TRL float32 | 4 | 10.0 | 0.100 |")
    assert theirs.endswith("| 4.0 GB | **5.00x** | 0.50x |")


def test_reward_models_are_compared_by_what_they_log():
    made = cell([99, 2, 99, 2], [99, 10, 10, 10]) | {"task": "reward"}
    for record in [r for rs in made["records"].values() for r in rs]:
        record |= {"loss": 0.7}
        del record["dpo_loss"], record["chosen_logp"]
    made["records"]["trl-reward"] = made["records"].pop("trl")
    made["records"]["trl-reward"][1]["loss"] = 0.6
    here = {"system": "a system", "cells": {"hh 16 512+512 dpo_jax-reward:16 trl-reward:4": made}}
    ours, theirs = tables.comparison(here, MODEL).splitlines()[2:]
    assert ours.startswith("| HH harmless-base, 512+512, 16 | dpo_jax, reward model | 16 | 2.0 |")
    assert theirs.startswith("|  | TRL RewardTrainer float32 | 4 | 10.0 |")
    assert "largest difference of the loss 1.0e-01; dpo_jax's rows 100% real" in tables.setting(here)


def test_the_page_takes_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(Path("docs/benchmarks.md").read_text())
    facts = {"system": "a system"}
    variants = {name: {"seconds": s, "temporary_gb": 1.0, "fill": 0.5} for name, s in (("full", [1, 2]), ("x", [3, 4]))}
    cells = {"hh 16 512+512 dpo_jax:16 trl:4": cell([9, 2, 9, 2], [9, 10, 10, 10])}
    cells["hh 16 512+512 dpo_jax:16 ablation"] = {"variants": variants, "load": [0.0], **FACTS}
    cells["hh 16 512+512 dpo_jax:8/attention trl:1"] = cell([9, 4, 9, 4], [9, 10, 10, 10])
    compiled = {"topology": "v6e:2x4 (v6e-8)", "remat": "dots"}
    fits = compiled | {"layout": "rows", "pairs": 64, "flops": 2e12, "of_8n": 1.01, "hbm_bytes": 3e9, "gib": 28.1}
    tpu = [fits, compiled | {"layout": "padded", "pairs": 16, "error": "needs 40G of 31G"}]
    other = {"hh 64 512+512 dpo_jax:8 trl:1": cell([9, 3, 9, 3], [9, 7, 7, 7])}
    machines = {"a machine": facts | {"cells": cells}, "another": facts | {"cells": other}}
    tables.write(page, {"model": MODEL, "machines": machines, "tpu": tpu})
    text = page.read_text()
    assert "### a machine\n- a system.\n" in text
    assert text.count("\n- trl: torch 2.\n") == 2  # once a machine, however many cells
    assert text.index("**5.00x**") < text.index("### another") < text.index("**2.33x**")
    assert "a machine; then:\n\n| dpo_jax's step |" in text
    assert "| dpo_jax | 8, remat=attention | 4.0 |" in text
    assert "| x | 3.5 | 2.50x | 1.00 GB | 50% |" in text
    assert "| v6e:2x4 (v6e-8) | rows | 64 | dots | 2.0 | 1.01x | 3.0 | 28.1 |" in text
    assert "| v6e:2x4 (v6e-8) | padded | 16 | dots | does not fit: needs 40G of 31G |" in text


def test_processors_of_one_name_are_told_apart(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    said = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\nflags\t\t: fpu {}\n\n"
    cpuinfo.write_text(said.format(0, 1, "avx2") + said.format(1, 1, "avx2"))
    assert machine.name(cpuinfo).startswith("AMD EPYC (family 25, model 1, AVX2), ")
    cpuinfo.write_text(said.format(0, 17, "avx2 avx512f"))
    assert machine.name(cpuinfo).startswith("AMD EPYC (family 25, model 17, AVX-512), ")
    assert " cores, " in machine.name(tmp_path / "none")


def test_results_on_record_make_the_page(tmp_path):
    """The tables of the page are those of the results beside it."""
    page = tmp_path / "page.md"
    page.write_text(Path("docs/benchmarks.md").read_text())
    tables.write(page, json.loads(Path("docs/benchmarks.json").read_text()))
    assert page.read_text() == Path("docs/benchmarks.md").read_text()


SMOLLM2_135M = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def test_results_of_another_model_are_not_mixed(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "results.json"
    shutil.copy("docs/benchmarks.json", kept)

    def called(name, **changed):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SMOLLM2_135M | changed))
        flags = ["--model", str(tmp_path / name), "--json", str(kept), "--out", str(tmp_path), "--no-tpu"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
        code = compare.main()
        return code, *capsys.readouterr()

    code, printed, _ = called("the same")
    assert code == 0
    assert tables.comparisons(json.loads(kept.read_text())) in printed
    code, _, said = called("deeper", num_hidden_layers=31)
    assert code == 2
    assert said == f"error: {kept} has results of another model; choose another --json or --model\n"


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


def test_a_worker_is_told_what_to_do():
    come, there = os.pipe()
    here, go = os.pipe()
    gate = Gate(f"{here},{there}")
    with os.fdopen(go, "w") as let:
        let.write('{"n": 2}\n')
    assert gate.turn() == '{"n": 2}'
    assert gate.turn(tokens=3) == ""  # the other side has ended
    assert json.loads(os.read(come, 1000).decode().splitlines()[1])["tokens"] == 3
    os.close(come)
    gate._come.close()
    gate._go.close()


def test_tokens_are_counted_up_to_the_first_that_stops():
    assert sampling_worker.counted([5, 6, 2, 2, 7], [2, 3]) == [5, 6, 2]
    assert sampling_worker.counted([5, 6], [2]) == [5, 6]
    assert list(sampling_worker.parts([[1], [1] * 3, [1] * 2], 2)) == [[1, 2], [0]]


class Answering:
    """An engine that says 10 tokens an answer in a second for each of them."""

    def __init__(self, name, ids, heard):
        self.name, self.ids, self.heard = name, ids, heard

    def step(self, told):
        case = json.loads(told)
        self.heard.append((self.name, len(case["prompts"]), case["n"], case["max_tokens"], case["seed"]))
        if self.ids is None and case["seed"] == 2:
            raise turns.Failed("killed")
        answers = len(case["prompts"]) * case["n"]
        told = {"seconds": answers, "peak_gb": 1.5, "answers": answers, "tokens": 10 * answers, "stopped": 0}
        return told | {"compile_s": 0.0, "first": self.ids or [1, 2]}


def test_engines_take_turns_and_one_that_fails_is_left_out(monkeypatch, capsys):
    heard = []
    engines = sampling.Engines()
    for name, ids in (("dpo_jax", [1, 2]), ("transformers", None), ("llama", [1, 3])):
        engines.alive[name] = Answering(name, ids, heard)
    flags = ["--model", ".", "--hh", ".", "--peers", "transformers:4,llama", "--single-prompts", "2", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *flags])
    a = sampling.parse()
    assert a.peers == {"dpo_jax": 0, "transformers": 4, "llama": 1}
    greedy = sampling.agreement(engines, 0)
    assert greedy["dpo_jax"] == "2 tokens as transformers"
    assert greedy["llama"] == "as transformers for 1 tokens: [1, 3]"
    heard.clear()
    records = sampling.measure(a, engines, sampling.Case("4 prompts, n=2", (0, 1, 2, 3), 2))
    assert heard == [
        ("dpo_jax", 4, 2, 128, 0), ("transformers", 1, 1, 8, 0), ("llama", 1, 1, 8, 0),  # nobody times these
        ("llama", 2, 2, 128, 1), ("transformers", 4, 2, 128, 1), ("dpo_jax", 4, 2, 128, 1),
        ("dpo_jax", 4, 2, 128, 2), ("transformers", 4, 2, 128, 2), ("llama", 2, 2, 128, 2),
    ]  # fmt: skip
    assert engines.failed == {"transformers": "4 prompts, n=2: killed"}
    records["dpo_jax"] = [r | {"seconds": r["seconds"] / 4} for r in records["dpo_jax"]]
    results = {"cases": {"4 prompts, n=2": records}, "at_once": a.peers, "greedy": greedy}
    printed = sampling.table(results | {"peak_gb": engines.peak_gb, "failed": engines.failed})
    assert "| 4 prompts, n=2 | dpo_jax | own | 40.0 | 2.0 | 10.0 | 0% |  |" in printed
    assert "|  | llama | 1 | 10.0 | 4.0 (2 prompts) | 10.0 | 0% | **4.00x** |" in printed
    assert "| transformers failed |  | 4 prompts, n=2: killed |" in printed


def test_an_engine_that_is_not_installed_says_how_it_is(monkeypatch):
    monkeypatch.setitem(sampling.PEERS, "tunix", sampling.Peer("no_such_module", "pip install it", 1, "tunix_python"))
    why = sampling.missing(sampling.argparse.Namespace(tunix_python="", python=""), "tunix")
    assert why.startswith("not installed: pip install it, and --tunix-python (ModuleNotFoundError:")


def test_few_prompts_stand_for_all():
    assert sampling.spread(64, 4) == (8, 24, 40, 56)
    assert sampling.spread(3, 8) == (0, 1, 2)
