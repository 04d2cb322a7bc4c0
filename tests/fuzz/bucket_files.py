"""Every object of a finished run in a bucket, damaged or of another shape; then a command is given it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import bases
from tests.fuzz.cases import Case, Command, Place, sample, train
from tests.fuzz.damage import ANY_FILE, WHOLE, whole
from tests.fuzz.run_files import LINE

CONTENT = ("gone", "emptied", "cut", "flipped", "last-flipped", "shifted", "longer", "zeros")  # that objects can have
NAMES = ("checkpoints/abc", "checkpoints/-1/x", "checkpoints/\uff11\uff12/x", "checkpoints/99999999999999999999/x",
         "metrics.jsonl.parts/abc", "metrics.jsonl.parts/x/y", "checkpoints/6 (copy)/x", "metrics.jsonl", "checkpoints",
         "export/\x1b[31m", "checkpoints/a\nerror: forged/x")  # fmt: skip
DOORS: dict[str, Callable[[Place, str], Command]] = {
    "resume": lambda place, at: train(place, workdir=at),
    "report": lambda place, at: Command("dpo_jax.report", [at]),
    "sample": lambda place, at: sample(place, at),
}


def cases() -> Iterator[Case]:
    if not bases.OBJECTS.direct:
        return
    names = sorted(p.relative_to(bases.bucket_run()).as_posix() for p in bases.bucket_run().rglob("*") if p.is_file())
    for name in names:
        for door in DOORS:
            for how in CONTENT:
                yield _case(name, door, how, ANY_FILE[how])
            if name.endswith(".json"):
                for how in WHOLE:
                    yield _case(name, door, f"whole-{how}", lambda path, how=how: whole(path, how))
            if ".jsonl.parts/" in name and door != "sample":
                for how, line in LINE.items():
                    content = line if isinstance(line, bytes) else line.encode()
                    yield _case(name, door, f"line-{how}", lambda path, new=content: _append(path, new))
    for name in NAMES:
        for door in DOORS:
            yield _case(name, door, "odd", _make)


def _case(name: str, door: str, how: str, do: Callable[[Path], None]) -> Case:
    def prepare(place: Place) -> Command:
        shutil.copytree(bases.cache(), place.cache, dirs_exist_ok=True)
        run = Path(shutil.copytree(bases.bucket_run(), place.tmp / "run"))
        path = run / name
        if path.is_dir():  # a bucket can have an object of that name, too; a disk cannot
            path = run / f"{name}.object"
        do(path)
        at = f"{place.root.parent.name}/run"
        bases.OBJECTS.put_tree(run, at)
        if path.name.endswith(".object"):
            bases.OBJECTS.put(f"{at}/{name}", path.read_bytes())
        shutil.rmtree(run)
        return DOORS[door](place, f"gs://{bases.BUCKET}/{at}")

    says = ""
    if door == "resume" and name == "checkpoints/6/checksums.json":
        says = "damaged|checksums"
    elif door == "resume" and ".jsonl.parts/" in name and how in ("gone", "emptied", "cut", "zeros"):
        says = name.partition(".parts/")[0]
    return Case(f"bucket/{name!a}/{door}/{how}".replace("'", ""), prepare, says=says)


def _append(path: Path, line: bytes) -> None:
    path.write_bytes(path.read_bytes() + line + b"\n")


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
