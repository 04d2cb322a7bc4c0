"""Pairs per second and peak memory of dpo_jax and of TRL's DPOTrainer: same pairs, same model, same batches, on CPU.

    python benchmarks/vs_trl.py --model DIR --pairs FILE --trl-python TRL_ENV/bin/python

Without --trl-python it makes an environment beside --out (torch==2.13.0 trl==1.16.0; about 1 GB) and uses that. FILE is
JSONL (also .gz): {"prompt": [messages], "chosen": [message], "rejected": [message]} or Anthropic HH's transcripts, such
as harmless-base/test.jsonl.gz; its first --num-pairs valid pairs are taken.

How it measures. Each trainer runs in a process of its own, in turns (TRL, dpo_jax, TRL, dpo_jax, ...), so that whatever
else the machine does meets both. Both see the batches in file order, train all parameters in float32 with AdamW at
1e-5, no clipping, no checkpoint on the way, and time every pair exactly once, after a warm-up that is not timed: TRL
one more batch (the first, again), dpo_jax one whole pass, in which every row shape is compiled. dpo_jax runs as its
users run it, `python -m dpo_jax.train`; its times are the `step_seconds` that it records. Peak memory is the largest
resident set of the process from start to end, compiling and dpo_jax's final checkpoint included.

    pairs/s (median)   batch size / median seconds of a step
    pairs/s (all)      pairs / seconds of all timed steps: what a whole epoch sees
    real tokens/s      tokens that the trainer computed and that are not padding, of all timed steps; TRL computes a
                       prompt twice, dpo_jax once, so for the same pairs this is more for TRL

Each cell is the median over --repeats. `largest difference of dpo_loss` compares both trainers' steps over the pass in
which both start from the same weights: if it is not small, they did not do the same work. `--set shuffle=True` measures
dpo_jax's own order, which fills rows better; its batches, and so its losses, are then others than TRL's.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("torch==2.13.0", "trl==1.16.0", "safetensors", "jinja2", "sentencepiece", "protobuf")
COLUMNS = {
    "pairs/s (median)": ("pairs_per_second", "{:.3f}"),
    "pairs/s (all)": ("pairs_per_second_all", "{:.3f}"),
    "real tokens/s": ("tokens_per_second", "{:.0f}"),
    "peak memory GB": ("peak_gb", "{:.2f}"),
}


def read_pairs(path: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` valid pairs as conversations, with dpo_jax's own parsers."""
    from dpo_jax.data.datasets import DATASETS, OWN
    from dpo_jax.data.preference import Skip

    opened = gzip.open if path.suffix == ".gz" else open
    pairs: list[dict[str, Any]] = []
    with opened(path, "rt", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            transcripts = "prompt" not in row and isinstance(row.get("chosen"), str)
            parsed = (DATASETS["hhh"] if transcripts else OWN).parse(row)
            if isinstance(parsed, Skip):
                continue
            prompt = [dict(m) for m in parsed.comparison.prompt_conversation]
            answers = {"chosen": [dict(m) for m in parsed.chosen], "rejected": [dict(m) for m in parsed.rejected]}
            pairs.append({"prompt": prompt, **answers})
            if len(pairs) == count:
                return pairs
    raise SystemExit(
        f"error: {path} holds {len(pairs)} valid pairs, {count} are needed; give another file or --num-pairs"
    )


def measured(command: list[str], log: Path) -> float:
    """Run a command to its end; its peak resident memory in GB. Output goes to `log`."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as f:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"error: {' '.join(command[:3])} ended with {process.returncode}; the end of {log}:\n{tail}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def summary(seconds: list[float], tokens: int, batch_size: int, peak_gb: float) -> dict[str, Any]:
    """What one run is judged by; `tokens` are those of the timed steps."""
    return {
        "pairs_per_second": batch_size / statistics.median(seconds),
        "pairs_per_second_all": batch_size * len(seconds) / sum(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "peak_gb": peak_gb,
        "step_seconds": seconds,
    }


def run_trl(a: argparse.Namespace, pairs: Path, steps: int, work: Path, *, bf16: bool) -> dict[str, Any]:
    """One run of TRL: `steps` steps, then the first batch again; all but the first step are timed."""
    out = work / "trl.json"
    command = [a.trl_python, str(ROOT / "benchmarks" / "trl_worker.py"), "--model", a.model, "--pairs", str(pairs)]
    command += ["--steps", str(steps + 1), "--batch-size", str(a.batch_size), "--out", str(out)]
    peak = measured(command + ["--bf16"] * bf16, work / "log.txt")
    result = json.loads(out.read_text())
    tokens = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in result["lengths"])
    losses = [record["loss"] for record in result["logged"][:steps]]
    facts = summary(result["step_seconds"][1:], tokens, a.batch_size, peak)
    return facts | {"losses": losses, "versions": result["versions"]}


def run_dpo_jax(a: argparse.Namespace, pairs: Path, steps: int, work: Path) -> dict[str, Any]:
    """One run of dpo_jax: two passes over the pairs; the second is timed."""
    settings = {
        "model": a.model, "dataset": pairs, "eval_pairs": 0, "max_prompt_length": 8192, "max_completion_length": 8192,
        "shuffle": False, "batch_size": a.batch_size, "num_steps": 2 * steps, "cache_dir": work / "cache",
        "learning_rate": 1e-5, "lr_schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
        "param_dtype": "float32", "compute_dtype": "float32",
        "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "sample_prompts": 0, "export": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py", f"--workdir={work / 'run'}"]
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    peak = measured([*command, *flags, *(f"--config.{extra}" for extra in a.set)], work / "log.txt")
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    first, timed = records[:steps], records[steps:]
    tokens = sum(record["tokens"] for record in timed)
    facts = summary([record["step_seconds"] for record in timed], tokens, a.batch_size, peak)
    useful = tokens / sum(record["tokens"] / record["useful_token_fraction"] for record in timed)
    return facts | {"losses": [record["dpo_loss"] for record in first], "useful_token_fraction": useful}


def make_trl_environment(directory: Path) -> str:
    """A virtual environment with TRL; the path of its Python."""
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"installing {' '.join(REQUIREMENTS)} into {directory}", flush=True)
        venv.create(directory, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return str(python)


def cpu_name() -> str:
    """The processor and how many of its cores this process may use."""
    names = [platform.processor() or platform.machine()]
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0]}, {cores} cores, load {os.getloadavg()[0]:.1f} at the start"


def print_table(medians: dict[str, dict[str, float]]) -> None:
    """A line for each trainer, and dpo_jax's ratio to each of TRL's."""
    ours = medians["dpo_jax"]
    rows = [["", *COLUMNS]]
    rows += [[name, *(form.format(m[key]) for key, form in COLUMNS.values())] for name, m in medians.items()]
    for name, m in medians.items():
        if m is not ours:
            rows.append([f"dpo_jax / {name}", *(f"{ours[key] / m[key]:.2f}x" for key, _ in COLUMNS.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--pairs", required=True, type=Path, help="pairs as JSONL or HH's raw file")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="also run TRL with bf16 autocast")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a config key of dpo_jax")
    parser.add_argument("--trl-python", default="", help="the Python of an environment with torch and trl")
    parser.add_argument(
        "--out", type=Path, help="where runs and the environment are kept; a temporary directory if empty"
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    a = parser.parse_args()
    if not os.path.isdir(a.model):
        parser.error(f"--model={a.model}: no such directory")
    if a.num_pairs % a.batch_size:
        parser.error(f"--num-pairs={a.num_pairs} is no multiple of --batch-size={a.batch_size}")
    return a


def main() -> None:
    a = parse()
    sys.path.insert(0, str(ROOT))
    kept = a.out or Path(tempfile.mkdtemp(prefix="vs_trl_"))
    kept.mkdir(parents=True, exist_ok=True)
    # Both trainers run in the repository's root. Not resolved: a link is how an environment's Python knows where it is.
    a.model, a.trl_python = (
        os.path.abspath(path) for path in (a.model, a.trl_python or make_trl_environment(kept / "trl_environment"))
    )
    pairs = (kept / "pairs.jsonl").resolve()
    rows = read_pairs(a.pairs, a.num_pairs)
    pairs.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    steps = a.num_pairs // a.batch_size
    trainers = {"TRL": lambda work: run_trl(a, pairs, steps, work, bf16=False)}
    if a.bf16:
        trainers["TRL bf16"] = lambda work: run_trl(a, pairs, steps, work, bf16=True)
    trainers["dpo_jax"] = lambda work: run_dpo_jax(a, pairs, steps, work)
    machine = cpu_name()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}
    for repeat in range(a.repeats):
        for name, trainer in trainers.items():
            with tempfile.TemporaryDirectory(dir=kept) as work:
                result = trainer(Path(work).resolve())
            runs[name].append(result)
            cells = (f"{label} {form.format(result[key])}" for label, (key, form) in COLUMNS.items())
            print(f"run {repeat + 1}/{a.repeats} {name}: {', '.join(cells)}", flush=True)
    medians = {
        name: {key: statistics.median(r[key] for r in results) for key, _ in COLUMNS.values()}
        for name, results in runs.items()
    }
    versions = runs["TRL"][0]["versions"] | {name: version(name) for name in ("jax", "flax")}
    versions["python"] = platform.python_version()
    print(f"\n{machine}\n{', '.join(f'{k} {v}' for k, v in versions.items())}")
    print(f"{a.num_pairs} pairs of {a.pairs.name}, batches of {a.batch_size}, {a.model}, median of {a.repeats}\n")
    print_table(medians)
    difference = max(abs(x - y) for x, y in zip(runs["TRL"][0]["losses"], runs["dpo_jax"][0]["losses"], strict=True))
    print(f"\nlargest difference of dpo_loss: {difference:.1e}")
    print(f"useful fraction of dpo_jax's tokens: {runs['dpo_jax'][0]['useful_token_fraction']:.3f}")
    if a.json:
        facts = {"cpu": machine, "versions": versions, "batch_size": a.batch_size, "num_pairs": a.num_pairs}
        a.json.write_text(json.dumps(facts | {"model": a.model, "medians": medians, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
