"""The data side in figures: packing, preparing, planning, and how much faster rows come than a model trains on them.

    python benchmarks/data.py --model DIR --hh FILE [--ultrafeedback FILE] [--polite FILE] [--rows 160800]

FILEs are raw ones, such as harmless-base/test.jsonl.gz; `--model` is a Hugging Face directory: its tokenizer decides
the lengths, and it is trained for a few steps at the end (`--train-steps 0` leaves that out). What is printed:

    packing      real tokens / computed tokens of an epoch at batch 16, 64 and 256, as the plan places the sample's own
                 pairs, and as it places 20,000 pairs drawn from it (a sample of 1,000 pairs is four batches of 256,
                 and the one that collects the long pairs weighs too much); length limits of the dataset's config
    preparing    seconds and peak memory of a process that reads, parses, tokenises and caches N rows (HH repeated, no
                 two alike), for a quarter of them and for all: memory must not grow
    planning     seconds for the shapes and the first epoch of a million pairs
    feeding      pairs/s of the input pipeline alone against pairs/s of training, with the same rows

Everything runs on one machine in separate processes, one after the other.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCHES = (16, 64, 256)
DRAWN = 20_000


def peak_mb() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepared(model: str, dataset: str, path: str, cache: str, file: str = ""):
    """The pairs of a config's dataset."""
    import transformers

    import dpo_jax
    from dpo_jax.data.prepare import DataRequest, prepare

    config = dpo_jax.get_config(file)
    limits = {name: config[name] for name in ("max_prompt_length", "max_completion_length")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    return prepare(DataRequest(dataset, path, eval_pairs=0, cache_dir=cache, **limits), tokenizer)


def packing(args: argparse.Namespace, cache: str) -> None:
    from dpo_jax.rows.ladder import choose_ladder
    from dpo_jax.rows.schedule import efficiency, schedule_epoch
    from dpo_jax.rows.shape import Order, RowLimits

    def fill(lengths: np.ndarray, batch: int) -> float:
        ladder = choose_ladder(lengths, batch, RowLimits(), Order())
        plan = schedule_epoch(lengths, batch, ladder, Order())
        assert len(ladder.shapes) <= 4
        return efficiency(plan, lengths)

    print("\npacking: real / computed tokens" + "".join(f"{f'batch {b}':>20}" for b in BATCHES))
    for name, dataset, path, file in (
        ("HH", "hhh", args.hh, "configs/hhh.py"),
        ("UltraFeedback", "ultrafeedback", args.ultrafeedback, "configs/ultrafeedback.py"),
        ("polite", args.polite, "", ""),
    ):
        if not (path or dataset):
            continue
        lengths = np.asarray(prepared(args.model, dataset, path, cache, file).train.lengths)
        drawn = lengths[np.random.default_rng(0).integers(0, len(lengths), DRAWN)]
        cells = [f"{fill(lengths, b):.1%} / {fill(drawn, b):.1%}" for b in BATCHES]
        print(f"{f'{name} ({len(lengths):,} / {DRAWN:,} pairs)':31}" + "".join(f"{cell:>20}" for cell in cells))


def repeated(source: Path, target: Path, rows: int) -> None:
    """`rows` rows of HH with no two alike: a number goes into every first turn."""
    with gzip.open(source, "rt", encoding="utf-8") as f:
        sample = [json.loads(line) for line in f]
    with gzip.open(target, "wt", encoding="utf-8", compresslevel=1) as f:
        for i in range(rows):
            row = sample[i % len(sample)]
            mark = {k: row[k].replace("\n\nHuman: ", f"\n\nHuman: ({i}) ", 1) for k in ("chosen", "rejected")}
            f.write(json.dumps(mark) + "\n")


def preparing(args: argparse.Namespace, base: Path) -> None:
    print("\npreparing       rows      kept   seconds   rows/s   peak MB")
    for rows in (args.rows // 4, args.rows):
        file = base / f"{rows}.jsonl.gz"
        repeated(Path(args.hh), file, rows)
        command = [
            sys.executable,
            __file__,
            "--model",
            args.model,
            "--hh",
            str(file),
            "--worker",
            str(base / f"c{rows}"),
        ]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"{rows:20,}{done['kept']:10,}{done['seconds']:10.1f}{rows / done['seconds']:9.0f}{done['peak_mb']:10.0f}"
        )


def worker(args: argparse.Namespace) -> None:
    """One process that prepares `--hh` and says what it took."""
    start = time.perf_counter()
    kept = len(prepared(args.model, "hhh", args.hh, args.worker).train)
    print(json.dumps({"kept": kept, "seconds": time.perf_counter() - start, "peak_mb": peak_mb()}))


def planning(args: argparse.Namespace, cache: str) -> None:
    from dpo_jax.rows.ladder import choose_ladder
    from dpo_jax.rows.schedule import schedule_epoch
    from dpo_jax.rows.shape import Order, RowLimits

    lengths = np.asarray(prepared(args.model, "hhh", args.hh, cache).train.lengths)
    million = lengths[np.random.default_rng(0).integers(0, len(lengths), 1_000_000)]
    start = time.perf_counter()
    ladder = choose_ladder(million, 64, RowLimits(8), Order())
    plan = schedule_epoch(million, 64, ladder, Order())
    print(f"\nplanning: {len(million):,} pairs in {len(plan.placed):,} steps, {time.perf_counter() - start:.1f} s")


def feeding(args: argparse.Namespace, base: Path, cache: str) -> None:
    from dpo_jax.rows.pipeline import StepSource, batches
    from dpo_jax.rows.schedule import make_schedule
    from dpo_jax.rows.shape import Order, RowLimits

    data = prepared(args.model, "hhh", args.hh, cache, "configs/hhh.py")
    schedule = make_schedule(data.train, 16, RowLimits(), Order())
    rows = {s.rows: np.arange(s.rows) for s in schedule.shapes}
    feed = batches(StepSource(schedule, 1, rows, 40 + 400), 0)
    for _ in range(40):  # the threads have started, the plan is there
        next(feed)
    start = time.perf_counter()
    pairs = sum(item["info"]["pairs"] for item in feed)
    fed = pairs / (time.perf_counter() - start)
    workdir = base / "run"
    keys = {
        "model": args.model,
        "dataset_path": args.hh,
        "num_steps": args.train_steps,
        "log_every": 1,
        "eval_pairs": 0,
    }
    keys |= {"sample_prompts": 0, "export": False, "checkpoint_every": 0, "cache_dir": cache}
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py:smollm2-135m", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[1])
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = float(np.median([r["pairs_per_second"] for r in records if r.get("pairs_per_second")]))
    print(f"\nfeeding: {fed:,.0f} pairs/s, training: {trained:.2f} pairs/s, {fed / trained:,.0f}x (batch 16, HH)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--hh", required=True, help="HH transcripts, .jsonl.gz")
    parser.add_argument("--ultrafeedback", default="", help="UltraFeedback rows")
    parser.add_argument("--polite", default="", help="instruction rows with chosen and rejected")
    parser.add_argument("--rows", type=int, default=160_800, help="rows to prepare (default: all of HH)")
    parser.add_argument("--train-steps", type=int, default=6, help="training steps to compare the pipeline with")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        packing(args, str(base / "cache"))
        planning(args, str(base / "cache"))
        preparing(args, base)
        if args.train_steps:
            feeding(args, base, str(base / "cache"))
    return None


if __name__ == "__main__":
    main()
