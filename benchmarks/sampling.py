"""Answers drawn by dpo_jax against other engines on this machine: tokens a second and memory.

    python benchmarks/sampling.py --model DIR --hh FILE [--prompts 64] [--max-tokens 128] [--n 1,4,8] [--rounds 3]
        [--peers transformers,continuous,tunix,llama] [--tunix-python P] [--llama-python P] [--json FILE]

DIR is a Hugging Face directory (a Llama in float32, such as SmolLM2-135M-Instruct), FILE a raw one of HH, such as
harmless-base/test.jsonl.gz, whose prompts are rendered as for training. The engines:

    dpo_jax       its `Sampler`
    transformers  `generate`, left-padded batches of prompts of about one length
    continuous    transformers' continuous batching, `generate_batch`
    tunix         google-tunix's `Sampler`
    llama         llama-cpp-python's `Llama`, one answer at a time

Each has a process and, by the options, an interpreter of its own; one that is not installed is left out, and how it is
installed is printed. All processes stay alive and take turns on the same cores, one at work while the others wait, in
alternating order. OMP_WAIT_POLICY is PASSIVE unless the environment says something else: where cores are shared, torch
is up to ten times as fast with it; where they are idle, ACTIVE may be faster, so try both. All answer the same token
ids at temperature 1 from the whole vocabulary, in float32, until a token that ends an answer or
`--max-tokens`. Every engine meets a case once before it is timed: the JAX ones with all of it, for they compile, the
others with a prompt. `--peers transformers:32` decodes 32 answers at once. Of an engine that draws one answer at a time
`--single-prompts` prompts stand for all, short and long ones as among all: a token takes as long with many of them as
with few. First every engine says the most likely 16 tokens behind one prompt, which should be the same. Tokens are
those of the engine's own output, the ones that end answers with them.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import turns  # noqa: E402

GREEDY = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Peer:
    """An engine: what it needs, and how many answers it decodes at once unless told (0: its own choice)."""

    imports: str
    install: str
    at_once: int
    python: str = ""  # the option that names its interpreter
    compiles: bool = False


PEERS = {
    "dpo_jax": Peer("dpo_jax", "pip install -e .", 0, compiles=True),
    "transformers": Peer("torch, transformers", "pip install torch==2.13.0 transformers", 64),
    "continuous": Peer("torch, transformers, psutil", "pip install torch==2.13.0 transformers psutil", 16),
    "tunix": Peer("tunix", "pip install google-tunix==0.1.7 (Python 3.12)", 16, "tunix_python", compiles=True),
    "llama": Peer("llama_cpp, gguf, safetensors", "pip install llama-cpp-python gguf safetensors", 1, "llama_python"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Which prompts (by position) are answered, and how often each."""

    name: str
    prompts: tuple[int, ...]
    n: int


def write_prompts(a: argparse.Namespace, path: Path) -> list[int]:
    """Prompts of HH as training renders them, and what ends answers; the prompts' lengths, shortest first.

    Which prompts of the file they are is drawn.
    """
    import numpy as np

    from dpo_jax.data.prepare import DataRequest, prepare
    from dpo_jax.weights.find import find_policy

    policy = find_policy(a.model, Path(), 0)
    request = DataRequest("hhh", a.hh, eval_pairs=0, cache_dir=str(path.parent / "cache"))
    pairs = prepare(request, policy.tokenizer).split.train
    chosen = np.random.default_rng(0).permutation(len(pairs))[: a.prompts]
    prompts = sorted((pairs[int(i)][0].tolist() for i in chosen), key=len)
    path.write_text(json.dumps({"prompts": prompts, "stops": policy.stop_tokens()}))
    return list(map(len, prompts))


def spread(count: int, some: int) -> tuple[int, ...]:
    """`some` of `count` positions, as far from the ends as from each other."""
    some = min(count, some)
    return tuple(int((i + 0.5) * count / some) for i in range(some))


def missing(a: argparse.Namespace, name: str) -> str:
    """Why an engine cannot run here; empty if it can."""
    command = [python_of(a, name), "-c", f"import {PEERS[name].imports}"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    why = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
    option = f", and --{PEERS[name].python.replace('_', '-')}" if PEERS[name].python else ""
    return f"not installed: {PEERS[name].install}{option} ({why[0]})"


def python_of(a: argparse.Namespace, name: str) -> str:
    return getattr(a, PEERS[name].python or "python") or sys.executable


def worker_command(a: argparse.Namespace, name: str, prompts: Path, scratch: Path) -> list[str]:
    """What runs an engine; llama.cpp's file is made first, in a process that is gone when memory is measured.

    Raises:
      turns.Failed: the file could not be made.
    """
    command = [python_of(a, name), "-m", "benchmarks.sampling_worker", "--engine", name, "--model", a.model]
    command += ["--prompts", str(prompts), "--threads", str(a.threads), "--max-tokens", str(max(a.max_tokens, GREEDY))]
    command += ["--at-once", str(a.peers[name])]
    if name == "llama":
        file = scratch / "model.gguf"
        made = [python_of(a, name), "-m", "benchmarks.gguf_file", a.model, str(file)]
        done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise turns.Failed(f"the GGUF could not be made: {done.stderr.strip()[-500:]}")
        command += ["--gguf", str(file)]
    return command


class Engines:
    """The processes that are alive. One that fails is said, and gone."""

    def __init__(self) -> None:
        self.alive: dict[str, turns.Worker] = {}
        self.peak_gb: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def ask(self, name: str, case: Case, *, max_tokens: int, temperature: int = 1, seed: int = 0) -> turns.Record:
        """What an engine tells of a case; nothing if it failed."""
        asked = {"prompts": case.prompts, "n": case.n, "max_tokens": max_tokens}
        try:
            told = self.alive[name].step(json.dumps(asked | {"temperature": temperature, "seed": seed}))
        except turns.Failed as e:
            self.fail(name, f"{case.name}: {e}")
            return {}
        self.peak_gb[name] = told["peak_gb"]
        return told

    def fail(self, name: str, why: str) -> None:
        print(f"{name}: {why}", flush=True)
        self.alive.pop(name, None)
        self.failed[name] = why


def start(a: argparse.Namespace, stack: ExitStack, prompts: Path) -> Engines:
    """All engines that can run, loaded one after the other."""
    engines = Engines()
    for name in a.peers:
        if why := missing(a, name):
            engines.fail(name, why)
            continue
        try:
            command = worker_command(a, name, prompts, prompts.parent)
            worker = stack.enter_context(turns.Worker(command, a.logs / f"sampling-{name}.log"))
            told = worker.wait()
        except turns.Failed as e:
            engines.fail(name, str(e))
            continue
        engines.alive[name], engines.peak_gb[name] = worker, told["peak_gb"]
        print(f"{name}: loaded in {told['seconds']:.1f} s, {told['peak_gb']:.2f} GB", flush=True)
    return engines


def agreement(engines: Engines, prompt: int) -> dict[str, str]:
    """Whether the most likely tokens behind a prompt are those of transformers, or of the first engine without it."""
    case = Case("greedy", (prompt,), 1)
    asked = {name: engines.ask(name, case, max_tokens=GREEDY, temperature=0) for name in list(engines.alive)}
    found = {name: told["first"] for name, told in asked.items() if told}
    first = "transformers" if "transformers" in found else next(iter(found), "")
    said = {}
    for name, ids in found.items():
        same = next((i for i, (x, y) in enumerate(zip(ids, found[first], strict=False)) if x != y), len(ids))
        agrees = ids == found[first]
        said[name] = f"{len(ids)} tokens as {first}" if agrees else f"as {first} for {same} tokens: {ids}"
        print(f"greedy, {name}: {said[name]}", flush=True)
    return said


def measure(a: argparse.Namespace, engines: Engines, case: Case) -> dict[str, list[turns.Record]]:
    """The timed rounds of every engine."""
    records: dict[str, list[turns.Record]] = {name: [] for name in engines.alive}
    one_by_one = dataclasses.replace(case, prompts=tuple(case.prompts[i] for i in spread(len(case.prompts), a.single)))
    cases = {name: one_by_one if a.peers[name] == 1 else case for name in records}
    for name in records:
        short = Case(case.name, case.prompts[:1], 1)
        warm = (cases[name], a.max_tokens) if PEERS[name].compiles else (short, min(8, a.max_tokens))
        if told := engines.ask(name, warm[0], max_tokens=warm[1]):
            print(f"{case.name}: {name} first {told['seconds']:.1f} s, {told['compile_s']:.1f} s compiling", flush=True)
    for turn in range(a.rounds):
        for name in list(records)[:: 1 if turn % 2 else -1]:
            if name not in engines.alive:
                continue
            if told := engines.ask(name, cases[name], max_tokens=a.max_tokens, seed=turn + 1):
                told |= {"prompts": len(cases[name].prompts)}
                records[name].append({key: value for key, value in told.items() if key != "first"})
                speed = f"{told['tokens']:,} tokens, {told['tokens'] / told['seconds']:.1f}/s{late(told['compile_s'])}"
                print(f"{case.name}: {name} round {turn + 1}: {told['seconds']:.1f} s, {speed}", flush=True)
    return records


def judge(records: list[turns.Record]) -> dict[str, float]:
    """Medians of an engine's rounds, and means over all answers."""
    answers = sum(r["answers"] for r in records)
    return {
        "speed": statistics.median(r["tokens"] / r["seconds"] for r in records),
        "seconds": statistics.median(r["seconds"] for r in records),
        "length": sum(r["tokens"] for r in records) / answers,
        "stopped": sum(r["stopped"] for r in records) / answers,
        "compile_s": sum(r["compile_s"] for r in records),
        "prompts": records[0]["prompts"],
    }


def late(seconds: float) -> str:
    """What is said where a timed round compiled."""
    return f", {seconds:.1f} s compiling" if seconds > 0.1 else ""


def table(results: dict[str, Any]) -> str:
    """Markdown: an engine's row for every case, with dpo_jax's tokens a second by its own."""
    head = "| case | engine | at once | tokens/s | seconds | tokens an answer | ended by stop | dpo_jax: tokens/s |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for case, engines in results["cases"].items():
        ours = judge(engines["dpo_jax"])["speed"] if engines.get("dpo_jax") else 0.0
        most = max((r[0]["prompts"] for r in engines.values() if r), default=0)
        for i, (name, records) in enumerate((name, records) for name, records in engines.items() if records):
            m = judge(records)
            ratio = f"**{ours / m['speed']:.2f}x**" if ours and name != "dpo_jax" else ""
            few = f" ({m['prompts']} prompts)" if m["prompts"] < most else ""
            seconds = f"{m['seconds']:.1f}{few}{late(m['compile_s'])}"
            numbers = f"{m['speed']:,.1f} | {seconds} | {m['length']:.1f} | {m['stopped']:.0%}"
            at_once = results["at_once"][name] or "own"
            lines.append(f"| {case if not i else ''} | {name} | {at_once} | {numbers} | {ratio} |")
    lines += ["", "| engine | peak memory | the most likely tokens |", "| --- | --- | --- |"]
    lines += [f"| {x} | {gb:.2f} GB | {results['greedy'].get(x, '')} |" for x, gb in results["peak_gb"].items()]
    lines += [f"| {x} failed |  | {why.splitlines()[0]} |" for x, why in results["failed"].items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--hh", required=True, help="HH transcripts, .jsonl.gz")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128, help="the most tokens of an answer")
    parser.add_argument("--n", default="1,4,8", help="answers to a prompt")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns a case, of each engine")
    parser.add_argument("--peers", default="transformers,continuous,tunix,llama", metavar="NAME[:ANSWERS],...")
    parser.add_argument("--threads", type=int, default=2, help="cores, of those that there are")
    parser.add_argument(
        "--single-prompts", dest="single", type=int, default=8, help="of engines with one answer at a time"
    )
    parser.add_argument("--python", default="", help="of transformers and continuous; default: this one")
    parser.add_argument("--tunix-python", default="", help="an interpreter with google-tunix; default: this one")
    parser.add_argument("--llama-python", default="", help="an interpreter with llama-cpp-python; default: this one")
    parser.add_argument("--logs", type=Path, default=Path("runs/benchmarks"), help="what engines print goes there")
    parser.add_argument("--json", type=Path, help="every round's numbers, written after each case")
    a = parser.parse_args()
    a.model, a.hh, a.logs = os.path.abspath(a.model), os.path.abspath(a.hh), a.logs.resolve()
    for name in ("model", "hh"):
        if not os.path.exists(getattr(a, name)):
            parser.error(f"--{name}={getattr(a, name)}: not there")
    peers = {}
    for spec in ["dpo_jax", *(x for x in a.peers.split(",") if x)]:
        name, _, rows = spec.partition(":")
        if name not in PEERS or not (rows.isdecimal() or spec == name):
            parser.error(f"--peers: {spec!r} is no NAME or NAME:ANSWERS; there are {', '.join(PEERS)}")
        peers[name] = int(rows) if rows else PEERS[name].at_once
    a.peers = peers
    if not all(x.isdecimal() and int(x) for x in a.n.split(",")):
        parser.error(f"--n={a.n} are no numbers, such as 1,4,8")
    a.n = sorted(map(int, a.n.split(",")), reverse=True)
    return a


def main() -> int:
    a = parse()
    a.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        prompts = Path(scratch) / "prompts.json"
        lengths = write_prompts(a, prompts)
        everything, median = tuple(range(len(lengths))), len(lengths) // 2
        tokens = f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[median]}"
        load = f"load average {os.getloadavg()[0]:.1f}"
        print(f"{len(lengths)} prompts of {tokens}; at most {a.max_tokens} tokens an answer; {load}", flush=True)
        engines = start(a, stack, prompts)
        results: dict[str, Any] = {"at_once": a.peers, "lengths": lengths, "max_tokens": a.max_tokens, "cases": {}}
        results |= {"greedy": agreement(engines, median), "peak_gb": engines.peak_gb, "failed": engines.failed}
        cases = [Case(f"{len(lengths)} prompts, n={n}", everything, n) for n in a.n]
        for case in [*cases, Case(f"one prompt of {lengths[median]} tokens, n=1", (median,), 1)]:
            results["cases"][case.name] = measure(a, engines, case)
            if a.json:
                a.json.write_text(json.dumps(results) + "\n")
    print(f"\n{table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
