"""An iteration of RL by dpo_jax against TRL 1.16's GRPOTrainer on this machine: answers drawn, scored, and an update.

    python benchmarks/rl.py --model DIR --hh FILE [--n 8,4] [--prompts 8] [--max-tokens 128] [--iterations 3]
        [--trl-python P] [--logs DIR] [--json FILE]

DIR is a Hugging Face directory (a Llama in float32, such as SmolLM2-135M-Instruct), FILE a raw one of HH. Both
processes stay alive and take turns, one iteration each, in alternating order; the first of each is not timed. Both draw
their own answers to the same prompts at temperature 1, up to --max-tokens, reward shortness, and update once with the
loss grpo, AdamW at 1e-6 and no KL, in float32. dpo_jax is `python -m dpo_jax.train` with task=rl; TRL generates with
transformers and accumulates gradients over parts of --micro-batch answers. The learner's seconds are an iteration's
less those of drawing and scoring. Answers are random, so their lengths differ a little; tokens are printed beside.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine, turns  # noqa: E402

Rounds = list[dict[str, Any]]


def own_command(a: argparse.Namespace, n: int, prompts: Path, workdir: str) -> list[str]:
    """dpo_jax's worker."""
    settings = {
        "task": "rl", "model": a.model, "dataset": "hhh", "dataset_path": a.hh, "eval_pairs": 0,
        "batch_size": a.prompts,
        "cache_dir": a.logs / "cache", "max_prompt_length": 256, "max_completion_length": a.max_tokens,
        "num_steps": a.iterations + 4, "learning_rate": 1e-6, "lr_schedule": "constant", "warmup_steps": 0,
        "max_grad_norm": 0.0, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "sample_prompts": 0,
        "export": False, "stuck_after_seconds": 0.0, "kl_prompts": 0, "rl_n": n, "rl_kl_coef": 0.0,
        "rl_reward": "benchmarks.rl_worker:shortness", "microbatches": a.own_parts,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    worker = [sys.executable, "-m", "benchmarks.rl_own_worker", "--prompts-file", str(prompts), "--"]
    return [*worker, "--config=configs/hhh.py", f"--workdir={workdir}", *flags]


def peer_command(a: argparse.Namespace, n: int, prompts: Path) -> list[str]:
    """TRL's worker."""
    python = a.trl_python or sys.executable
    flags = {"model": a.model, "prompts-file": prompts, "n": n, "max-tokens": a.max_tokens, "prompts": a.prompts,
             "micro-batch": a.micro_batch}  # fmt: skip
    return [python, "-m", "benchmarks.rl_worker", *(str(x) for key, x in flags.items() for x in (f"--{key}", x))]


def measure(a: argparse.Namespace, n: int) -> dict[str, Rounds]:
    """The iterations of both, those that are timed.

    Raises:
      turns.Failed: one of them ended.
    """
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        own = own_command(a, n, prompts, f"{scratch}/run")
        with turns.Worker(own, a.logs / f"rl-dpo_jax-{n}.log") as ours:
            ours.wait()
            with turns.Worker(peer_command(a, n, prompts), a.logs / f"rl-trl-{n}.log") as theirs:
                theirs.wait()
                workers = {"dpo_jax": ours, "trl": theirs}
                found: dict[str, Rounds] = {name: [] for name in workers}
                for turn in range(a.iterations + 1):
                    for name in list(workers)[:: 1 if turn % 2 else -1]:
                        record = workers[name].step()
                        print(f"n={n} {name} iteration {turn + 1}: {shown(record)}", flush=True)
                        if turn:
                            found[name].append(record)
                return found


def shown(record: dict[str, Any]) -> str:
    """An iteration in words."""
    learner = record["seconds"] - record["sampling"] - record["scoring"]
    return (
        f"{record['seconds']:.1f} s (drawing {record['sampling']:.1f}, learner {learner:.1f}), "
        f"{record['tokens']:,} tokens drawn, peak {record['peak_gb']:.2f} GB"
    )


def table(n: int, found: dict[str, Rounds]) -> list[str]:
    """Medians, and dpo_jax's share of TRL's."""
    of = lambda name, key: statistics.median(key(r) for r in found[name])
    keys = {
        "iteration, s": lambda r: r["seconds"],
        "drawing, tokens/s": lambda r: r["tokens"] / r["sampling"],
        "learner, s": lambda r: r["seconds"] - r["sampling"] - r["scoring"],
        "learner, drawn tokens/s": lambda r: r["tokens"] / (r["seconds"] - r["sampling"] - r["scoring"]),
        "peak memory, GB": lambda r: r["peak_gb"],
    }
    lines = [f"| n={n} | dpo_jax | TRL | ratio |", "| --- | --- | --- | --- |"]
    for label, key in keys.items():
        ours, theirs = of("dpo_jax", key), of("trl", key)
        ratio = ours / theirs if label.endswith("/s") or "memory" in label else theirs / ours
        lines.append(f"| {label} | {ours:.2f} | {theirs:.2f} | {ratio:.2f}x |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--hh", required=True)
    parser.add_argument("--n", default="8,4", help="answers to a prompt")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of an iteration")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=3, help="timed ones, of each")
    parser.add_argument("--micro-batch", type=int, default=8, help="answers that TRL computes at once")
    parser.add_argument("--own-parts", type=int, default=1, help="parts in which dpo_jax computes an update")
    parser.add_argument("--trl-python", default="", help="an interpreter with TRL; default: this one")
    parser.add_argument("--logs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--json", type=Path, help="every iteration's numbers")
    a = parser.parse_args()
    a.model, a.hh, a.logs = os.path.abspath(a.model), os.path.abspath(a.hh), a.logs.resolve()
    a.logs.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {"machine": machine.name(), "began": time.strftime("%Y-%m-%d %H:%M"), "cases": {}}
    try:
        for n in map(int, a.n.split(",")):
            whole["cases"][n] = measure(a, n)
            print("\n".join(table(n, whole["cases"][n])), flush=True)
            if a.json:
                a.json.write_text(json.dumps(whole, indent=1) + "\n")
    except turns.Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
