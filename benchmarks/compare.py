"""dpo_jax against TRL 1.16 and google-tunix 0.1.7 on this machine, and what each part of dpo_jax's own step is worth.

    python benchmarks/compare.py --model DIR --hh FILE [--ultrafeedback FILE]
        [--peers trl:4,trl:1,trl-reward:1,...] [--own PAIRS] [--remat POLICY] [--batch-sizes 16,64] [--steps 5]
        [--no-ablation] [--no-tpu] [--out DIR] [--json FILE] [--write-docs]

DIR is a Hugging Face directory (a Llama in float32, such as SmolLM2-135M-Instruct), FILEs are raw ones, such as
harmless-base/test.jsonl.gz. A cell is dpo_jax and one peer over one dataset and batch size: both processes stay alive
and take turns, one step each, so that whatever else the machine does meets both. The first step of each (and any step
for which dpo_jax compiles) is not timed. Both train on the same batches, those of dpo_jax's plan, with the same token
ids, so their losses can be compared. dpo_jax runs as `python -m dpo_jax.train` does; the peers run in environments of
their own, which are made beside --out. All compute in float32 but `trl-bf16` (autocast), keep parameters in float32,
and have AdamW at 1e-5. `trl:4` computes 4 pairs at once and accumulates their gradients to a step's: fewer at once is
less padding and less memory; `--own` is the same of dpo_jax (its key `microbatches`), `--remat` its key of that name.

A finished cell is kept in --json (results.json in --out; with --write-docs docs/benchmarks.json) and not measured again
on the same machine: an interrupted run goes on, and flags choose a part of the whole for now. The tables are printed
from everything that is there, machine by machine. `--write-docs` puts them into docs/benchmarks.md, which also says
what the columns are.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import machine, tables, turns  # noqa: E402
from benchmarks.gate import read_steps  # noqa: E402
from dpo_jax.model.remat import REMAT_POLICIES  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Data:
    """A dataset, and how many of its pairs dpo_jax computes at once unless told."""

    dataset: str
    own: int


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer: its environment, the worker that runs it, and the length limits with which it and dpo_jax then run."""

    environment: str
    python: tuple[int, int]
    requirements: tuple[str, ...]
    worker: str
    flags: tuple[str, ...] = ()
    limits: tuple[int, int] = (512, 512)  # tokens of a prompt, of a completion
    task: str = "dpo"  # or "reward", of which both trainers begin with the same head


DATA = {"hh": Data("hhh", 8), "ultrafeedback": Data("ultrafeedback", 4)}
TRL = ("torch==2.13.0", "trl==1.16.0", "safetensors", "jinja2", "sentencepiece", "protobuf")
PEERS = {
    "trl": Peer("trl-environment", (3, 11), TRL, "benchmarks.trl_worker"),
    "trl-bf16": Peer("trl-environment", (3, 11), TRL, "benchmarks.trl_worker", ("--bf16",)),
    "trl-reward": Peer("trl-environment", (3, 11), TRL, "benchmarks.trl_worker", ("--reward",), task="reward"),
    # Every pair is padded to the limits: at 512 + 512 one pair at once took more than 17 GB.
    "tunix": Peer("tunix-environment", (3, 12), ("google-tunix==0.1.7",), "benchmarks.tunix_worker", (), (256, 256)),
}
OURS = ("jax", "jaxlib", "flax")
THEIRS = {"trl-environment": ("trl", "torch", "transformers"), "tunix-environment": ("google-tunix", "jax", "flax")}
DEFAULT_PEERS = "trl:1,trl-bf16:1,tunix:1"  # one pair at once is the peers' fastest on CPU (docs/benchmarks.md)
SPARE = 8  # steps there are beyond those asked for: warm-up, and steps for which dpo_jax compiles


def own_flags(
    a: argparse.Namespace, data: str, batch: int, steps: int, limits: tuple[int, int], task: str = "dpo"
) -> list[str]:
    """dpo_jax's command line: a config's defaults, with what makes runs comparable and nothing written at the end."""
    d, source = DATA[data], {"hh": a.hh, "ultrafeedback": a.ultrafeedback}[data]
    settings = {
        "model": a.model, "dataset": d.dataset, "dataset_path": source, "eval_pairs": 0, "cache_dir": a.out / "cache",
        "max_prompt_length": limits[0], "max_completion_length": limits[1],
        "batch_size": batch, "microbatches": max(1, batch // own_pairs(a, data)), "num_steps": steps,
        "learning_rate": 1e-5, "lr_schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "dpo_beta": 0.1,
        "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "sample_prompts": 0, "export": False,
        "stuck_after_seconds": 0.0,  # between its turns it waits for the peer, however slow
    }  # fmt: skip
    if a.remat:
        settings["remat"] = a.remat
    if task == "reward":
        settings |= {"model": classifier(a), "reward_center": 0.0}
        for key in ("dpo_beta", "sample_prompts"):
            del settings[key]
    workdir = a.out / f"run-{data}-{batch}-{time.time_ns()}"
    return [
        f"--config=configs/{'hhh' if task == 'dpo' else 'reward'}.py",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def classifier(a: argparse.Namespace) -> Path:
    """The model with a head for scores, made in TRL's environment if it is not there."""
    path = a.out / "classifier"
    if not (path / "config.json").exists():
        python = turns.make_environment(a.out / "trl-environment", TRL, lambda: turns.find_python((3, 11)))
        command = [python, "-m", "benchmarks.trl_worker", "--model", a.model, "--classifier", str(path)]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise turns.Failed(f"making a classifier ended with {code}")
    return path


def own_pairs(a: argparse.Namespace, data: str) -> int:
    """Pairs that dpo_jax computes at once."""
    return a.own or DATA[data].own


def own_at_once(a: argparse.Namespace, data: str, batch: int) -> str:
    """How dpo_jax computes a step, in a cell's name: `8`, or `8/attention` with a `--remat`."""
    return f"{min(batch, own_pairs(a, data))}" + (f"/{a.remat}" if a.remat else "")


def peer_command(a: argparse.Namespace, spec: str, file: Path, longest: Sequence[int]) -> list[str]:
    """The peer's worker over the batches in `file`, in the peer's environment, which is made if it is not there."""
    name, _, at_once = spec.partition(":")
    peer = PEERS[name]
    python = turns.make_environment(a.out / peer.environment, peer.requirements, lambda: turns.find_python(peer.python))
    model = a.model if peer.task == "dpo" else str(classifier(a))
    command = [python, "-m", peer.worker, "--model", model, "--steps-file", str(file)]
    command += ["--micro-batch", at_once, *peer.flags]
    if name == "tunix":
        command += ["--widths", ",".join(str(-(-x // 8) * 8) for x in longest)]
    return command


def measure(a: argparse.Namespace, data: str, batch: int, spec: str) -> dict[str, Any]:
    """One cell: the seconds of every round of dpo_jax and of the peer `spec` (`trl:4`), and what they logged.

    Raises:
      turns.Failed: one of them ended.
    """
    name, steps = spec.partition(":")[0], a.steps + SPARE
    file = a.out / f"steps-{data}-{batch}.jsonl"
    own = [sys.executable, "-m", "benchmarks.own_worker", "--steps-file", str(file), "--steps", str(steps), "--"]
    own += own_flags(a, data, batch, steps, PEERS[name].limits, PEERS[name].task)
    cell: dict[str, Any] = {"began": time.strftime("%Y-%m-%d %H:%M"), "load": [os.getloadavg()[0]], "peak_gflops": []}
    records: dict[str, list[dict[str, Any]]] = {"dpo_jax": [], name: []}
    with turns.Worker(own, a.out / f"dpo_jax-{data}-{batch}.log") as ours:
        ready = ours.wait()
        command = peer_command(a, spec, file, ready["longest"])
        with turns.Worker(command, a.out / f"{name}-{data}-{batch}.log") as theirs:
            theirs.wait()
            workers = {"dpo_jax": ours, name: theirs}
            timed = 0
            for turn in range(steps):
                if timed == a.steps:
                    break
                cell["peak_gflops"].append(machine.matmul_gflops())
                for trainer in list(workers)[:: 1 if turn % 2 else -1]:
                    record = workers[trainer].step()
                    records[trainer].append(record)
                    print(f"{data} {batch} {trainer} step {turn + 1}: {record['seconds']:.1f} s", flush=True)
                timed += turn > 0 and not records["dpo_jax"][-1]["compiled"]
    batches = read_steps(str(file))[: len(records[name])]
    lengths = [[[len(pair[f"{part}_ids"]) for part in tables.PARTS] for pair in pairs] for pairs in batches]
    cell["load"].append(os.getloadavg()[0])
    facts = {
        "task": PEERS[name].task,
        "limits": PEERS[name].limits,
        "longest": ready["longest"],
        "pairs": ready["pairs"],
    }
    return cell | {"records": records, "lengths": lengths, **facts}


def ablation(a: argparse.Namespace, data: str, batch: int) -> dict[str, Any]:
    """What `ablation.py` says, in a process of its own; all pairs of a step at once."""
    a = argparse.Namespace(**vars(a) | {"own": batch})
    file = a.out / "ablation.json"
    command = [sys.executable, "-m", "benchmarks.ablation", "--out", str(file), "--steps", str(a.steps), "--"]
    print("ablation: compiling every variant", flush=True)
    command += own_flags(a, data, batch, a.steps, (512, 512))
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    if code := subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
        raise turns.Failed(f"the ablation ended with {code}")
    return json.loads(file.read_text())


def compiled_for_tpu(a: argparse.Namespace) -> list[dict[str, Any]]:
    """What `tpu.py` counts, in a process of its own."""
    if importlib.util.find_spec("libtpu") is None:
        raise turns.Failed("libtpu is not installed: pip install -e '.[tpu]', or --no-tpu")
    file = a.out / "tpu.json"
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    command = [sys.executable, "-m", "benchmarks.tpu", "--json", str(file)]
    if code := subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
        raise turns.Failed(f"compiling for TPU ended with {code}")
    return json.loads(file.read_text())


def save(path: Path, results: dict[str, Any]) -> None:
    """All at once or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(results) + "\n")
    os.replace(scratch, path)


def model_size(directory: str) -> dict[str, int]:
    """Parameters of the layers, and of the vocabulary's projection."""
    from dpo_jax.weights.huggingface import read_config

    config, _ = read_config(Path(directory))
    table = config.vocab_size * config.hidden_size
    tables_held = 1 if config.tie_word_embeddings else 2
    return {"body": config.parameter_count() - tables_held * table, "projection": table}


def installed(out: Path) -> dict[str, Any]:
    """The versions that are there, of dpo_jax's environment and the peers'."""
    found = {"dpo_jax": turns.versions(sys.executable, OURS)}
    for name, packages in THEIRS.items():
        python = out / name / "bin" / "python"
        if python.exists():
            found[name.removesuffix("-environment")] = turns.versions(os.path.abspath(python), packages)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--hh", default="", help="HH transcripts, .jsonl.gz")
    parser.add_argument("--ultrafeedback", default="", help="UltraFeedback rows")
    parser.add_argument("--peers", default=DEFAULT_PEERS, metavar="NAME:PAIRS,...", help="against whom; empty: nobody")
    parser.add_argument("--own", type=int, default=0, metavar="PAIRS", help="pairs that dpo_jax computes at once")
    parser.add_argument("--remat", default="", help="what dpo_jax keeps of a layer (its key); default: the config's")
    parser.add_argument("--batch-sizes", default="16,64", help="pairs a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a cell, of each trainer")
    parser.add_argument("--no-ablation", action="store_true", help="leave the ablation out")
    parser.add_argument("--no-tpu", action="store_true", help="leave out what is compiled for TPU")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="environments, logs, cached data")
    parser.add_argument("--json", type=Path, help="results, read and written")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/benchmarks.md")
    a = parser.parse_args()
    a.peers = [x for x in a.peers.split(",") if x]
    for spec in a.peers:
        name, _, pairs = spec.partition(":")
        if name not in PEERS or not pairs.isdecimal() or not int(pairs):
            parser.error(f"--peers: {spec!r} is no NAME:PAIRS, such as trl:4; there are {', '.join(PEERS)}")
    for name in ("model", "hh", "ultrafeedback"):
        path = getattr(a, name)
        if path and not os.path.exists(path):
            parser.error(f"--{name}={path}: not there")
        setattr(a, name, path and os.path.abspath(path))
    if a.remat and a.remat not in REMAT_POLICIES:
        parser.error(f"--remat={a.remat}: there are {', '.join(REMAT_POLICIES)}")
    if not all(x.isdecimal() and int(x) for x in a.batch_sizes.split(",")):
        parser.error(f"--batch-sizes={a.batch_sizes} are no numbers, such as 16,64")
    a.batch_sizes = [int(x) for x in a.batch_sizes.split(",")]
    for spec, batch in ((spec, batch) for spec in [*a.peers, f"own:{a.own or 1}"] for batch in a.batch_sizes):
        if batch % int(spec.partition(":")[2]):
            parser.error(f"{spec}: {batch} pairs a step are no multiple of that; choose a divisor")
    a.out = a.out.resolve()
    # The page shows all that is on record, not only what this run measured.
    a.json = (a.json or (PAGE.with_suffix(".json") if a.write_docs else a.out / "results.json")).resolve()
    return a


def main() -> int:
    a = parse()
    a.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(a.json.read_text()) if a.json.exists() else {"machines": {}}
    model = model_size(a.model)
    if results.setdefault("model", model) != model:
        print(f"error: {a.json} has results of another model; choose another --json or --model", file=sys.stderr)
        return 2
    system = f"{platform.system()} {platform.release()}"
    here = results["machines"].get(machine.name(), {"cells": {}}) | {"system": system}
    jobs: dict[str, Any] = {}
    for batch in a.batch_sizes:
        for data in (name for name in DATA if getattr(a, name)):
            for spec in a.peers:
                peer = PEERS[spec.partition(":")[0]]
                own = f"dpo_jax{'' if peer.task == 'dpo' else f'-{peer.task}'}:{own_at_once(a, data, batch)}"
                key = f"{data} {batch} {'+'.join(map(str, peer.limits))} {own} {spec}"
                jobs[key] = lambda data=data, batch=batch, spec=spec: measure(a, data, batch, spec)
    if a.hh and not a.no_ablation:
        batch = a.batch_sizes[0]
        jobs[f"hh {batch} 512+512 dpo_jax:{batch} ablation"] = lambda: ablation(a, "hh", batch)
    failed = []
    for key, job in jobs.items():
        if key in here["cells"]:
            continue
        try:
            here["cells"][key] = job() | {"versions": installed(a.out)}
        except turns.Failed as e:
            failed.append(f"{key}: {e}")
            continue
        results["machines"][machine.name()] = here
        save(a.json, results)
    if not a.no_tpu and "tpu" not in results:
        try:
            results["tpu"] = compiled_for_tpu(a)
            save(a.json, results)
        except turns.Failed as e:
            failed.append(f"tpu: {e}")
    print("\n" + "\n\n".join(make(results) for make in tables.TABLES.values()))
    if a.write_docs:
        tables.write(PAGE, results)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
