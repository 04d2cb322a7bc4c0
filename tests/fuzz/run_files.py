"""Every file of a finished run, damaged or of another shape, then the run is resumed, reported, or answered with."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import bases
from tests.fuzz.cases import Case, Command, Place, sample, train
from tests.fuzz.damage import ANY_FILE, GONE, VALUES, WHOLE, paths_of, put, whole, write_json

OBJECTS = (
    "config.json",
    "identity.json",
    "data.json",
    "run.json",
    "checkpoints/6/checksums.json",
    "checkpoints/6/_CHECKPOINT_METADATA",
    "checkpoints/6/state/_METADATA",
    "reference/checksums.json",
    "export/config.json",
    "export/generation_config.json",
    "export/tokenizer.json",
    "export/tokenizer_config.json",
)
LINES = ("metrics.jsonl", "samples.jsonl", "events.jsonl")
# What a line of those files can be besides a record.
LINE: dict[str, str | bytes] = {
    "null": "null",
    "number": "3",
    "list": "[1]",
    "empty-object": "{}",
    "half": '{"step": 1',
    "blank": "",
    "binary": bytes(range(128, 256)),
    "step-of-text": '{"step": "one", "split": "train", "loss": 1.0}',
    "step-of-null": '{"step": null, "split": "eval", "loss": 1.0}',
    "step-of-list": '{"step": [], "split": "train"}',
    "step-huge": '{"step": 1e400, "split": "train", "loss": 0.1}',
    "split-of-list": '{"step": 1, "split": ["train"], "loss": 0.1}',
    "split-of-null": '{"step": 1, "split": null}',
    "value-of-text": '{"step": 1, "split": "train", "loss": "x", "dpo_loss": "y"}',
    "value-of-list": '{"step": 1, "split": "eval", "accuracy": [1], "margin": {}}',
    "value-of-nan": '{"step": 2, "split": "train", "dpo_loss": NaN, "margin": Infinity}',
    "pairs-of-text": '{"step": 2, "split": "eval", "pairs": "many", "accuracy": 0.5, "margin": 1}',
    "when-of-number": '{"when": 3, "step": 0, "mode": "greedy", "prompt": 1, "answer": null}',
    "answer-of-list": '{"when": "after", "step": 4, "mode": ["greedy"], "prompt": [], "answer": {}}',
    "markup": '{"when": "after", "step": 4, "mode": "<script>", "prompt": "</script><b>", "answer": "\\u001b[2J"}',
    "name-with-escape": '{"step": 2, "split": "train", "accuracy/\\u001b[31m": 0.5, "\\nerror: x": 1}',
    "surrogate": '{"step": 2, "split": "train", "accuracy/\\ud800": 0.5}',
    "deep": '{"step": ' + "[" * 100_000,
    "long": '{"step": 1, "split": "' + "x" * 5_000_000 + '"}',
}
NAMES = (
    "abc",
    "-1",
    "007",
    "0",
    "\uff11\uff12",
    "\u00b2",
    "99999999999999999999999",
    "9223372036854775808",
    "2147483648",
    "12.orbax-checkpoint-tmp",
    "6 (copy)",
    ".hidden",
    "6.old",
    "a\nerror: forged",
    "\x1b[31m",
)
DOORS: dict[str, Callable[[Place], Command]] = {
    "resume": lambda place: train(place),
    "longer": lambda place: train(place),  # with a checkpoint less: some of the run is done again
    "report": lambda place: Command("dpo_jax.report", [str(place.work / "run")]),
    "compare": lambda place: Command(
        "dpo_jax.report", [str(place.work / "run"), str(place.work / "other"), f"--out={place.work}/compare.html"]
    ),
    "sample": lambda place: sample(place, place.work / "run"),
}


def cases() -> Iterator[Case]:
    for name in OBJECTS:
        for door in _doors(name):
            for how in WHOLE:
                yield _case(name, door, how, lambda path, how=how: whole(path, how))
            for how, do in ANY_FILE.items():
                yield _case(name, door, how, do, must_say=name.endswith("checksums.json"))
    for name in LINES:
        for door in ("resume", "longer", "report", "compare"):
            for how, do in ANY_FILE.items():
                lost = name != "events.jsonl" and how in ("gone", "emptied", "cut", "zeros")
                yield _case(name, door, how, do, must_say=lost)
            for how, line in LINE.items():
                for where in ("first", "middle", "last"):
                    yield _case(name, door, f"{where}-{how}", lambda path, a=where, b=line: _insert(path, a, b))
    yield from _values()
    for name in NAMES:
        for door in ("resume", "report", "sample"):
            for what in ("file", "empty", "copy"):
                yield _case("checkpoints", door, f"{name!a}-{what}", lambda path, n=name, w=what: _odd(path, n, w))
    for name in (
        "checkpoints",
        "export",
        ".lock",
        "report.html",
        "checkpoints/6",
        "checkpoints/6/state",
        "reference",
        "tensorboard",
    ):
        for how in ("gone", "fifo", "file", "linked"):
            for door in ("resume", "report", "sample"):
                yield _case(name, door, how, lambda path, how=how: _replaced(path, how))


def _doors(name: str) -> tuple[str, ...]:
    if name.startswith("checkpoints"):
        return ("resume", "sample")
    return ("resume", "sample", "report") if name.startswith("export") else ("resume", "report", "sample", "compare")


def _values() -> Iterator[Case]:
    """Single values of the objects, of another type. What there is to change, a run of the same keys has: by name."""
    for name, places in _places().items():
        doors = ("resume",) if name.startswith("checkpoints") else ("resume", "report")
        for at in places:
            for how in (*VALUES, "gone"):
                for door in doors:
                    new = GONE if how == "gone" else VALUES[how]

                    def change(path: Path, at=at, new=new) -> None:
                        read = json.loads(path.read_text())
                        write_json(path, put(read, at, new))

                    yield _case(name, door, f"{'.'.join(map(str, at))}-{how}", change)


def _places() -> dict[str, list[tuple[str | int, ...]]]:
    """Where there are values in the objects of the finished run; none without it."""
    names = ("config.json", "identity.json", "data.json", "run.json", "checkpoints/6/checksums.json")
    if not bases.run().exists():
        return {}
    return {name: list(paths_of(json.loads((bases.run() / name).read_text()), 3)) for name in names}


def _case(name: str, door: str, how: str, do: Callable[[Path], None], must_say: bool = False) -> Case:
    def prepare(place: Place) -> Command:
        run = bases.copy_run(place)
        if door == "longer":  # the run was killed after its second checkpoint
            shutil.rmtree(run / "checkpoints/6")
            shutil.rmtree(run / "export")
        if door == "compare":
            shutil.copytree(run, place.work / "other")
        path = run / name
        if name in LINES and not path.exists():
            path.write_text("")
        do(path)
        return DOORS[door](place)

    said = Path(name).name if name in LINES or not name.startswith("checkpoints") else "damaged|checksums"
    return Case(f"run/{name}/{door}/{how}", prepare, says=said if must_say and door in ("resume", "longer") else "")


def _insert(path: Path, where: str, line: str | bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    at = {"first": 0, "middle": len(lines) // 2, "last": len(lines)}[where]
    lines.insert(at, (line if isinstance(line, bytes) else line.encode()) + b"\n")
    path.write_bytes(b"".join(lines))


def _odd(directory: Path, name: str, what: str) -> None:
    path = directory / name
    if what == "file":
        path.write_text("x")
    elif what == "empty":
        path.mkdir(exist_ok=True)
    else:
        shutil.copytree(directory / "6", path, dirs_exist_ok=True)


def _replaced(path: Path, how: str) -> None:
    aside = path.with_name(f"{path.name}-aside")
    if path.is_dir():
        shutil.move(path, aside) if how == "linked" else shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        aside.write_text("")
    if how == "fifo":
        os.mkfifo(path)
    elif how == "file":
        path.write_text("x")
    elif how == "linked":
        path.symlink_to(aside)
