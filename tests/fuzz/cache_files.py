"""The cache of tokenised pairs, damaged: it is built anew and said, or refused; never believed unread."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import bases
from tests.fuzz.cases import Case, Command, Place, data
from tests.fuzz.damage import ANY_FILE, GONE, VALUES, WHOLE, paths_of, put, whole, write_json

NAMES = (
    "../../home/.profile",
    "../../../home/.profile",
    "/etc/passwd",
    "../x",
    "a/b",
    "..",
    "",
    ".hidden",
    "x" * 300,
    "a\0b",
    "\x1b[31m",
)
# What is right where a file is sound in another way: its bytes are as they were written.
_SAME = ("not-to-be-read",)
_SAID = "damaged|built anew|rebuilt|cannot be read"


def cases() -> Iterator[Case]:
    for name in _files():
        for how, do in ANY_FILE.items():
            says = "" if how in _SAME or name == "quarantine.jsonl" else _SAID
            yield _case(f"{name}/{how}", lambda cache, name=name, do=do: do(cache / name), says)
    for how in WHOLE:
        do = lambda cache, how=how: whole(cache / "manifest.json", how)
        yield _case(f"manifest.json/{how}", do, _SAID)
    manifest = next(iter(bases.cache().glob("*/manifest.json")), None)
    for at in paths_of(json.loads(manifest.read_text()), 3) if manifest else ():
        for how in (*VALUES, "gone"):
            new = GONE if how == "gone" else VALUES[how]
            place = ".".join(map(str, at))
            yield _case(f"manifest.json/{place}-{how}", lambda cache, at=at, new=new: _put(cache, at, new))
    for name in NAMES:
        yield _shared(f"shared/name-{name[:20]!a}".replace("/", "|").replace("shared|", "shared/"), name)


def _files() -> list[str]:
    return sorted(path.name for path in bases.cache().glob("*/*") if path.is_file() and path.parent.name != "xdg")


def _case(name: str, do: Callable[[Path], None], says: str = "") -> Case:
    def prepare(place: Place) -> Command:
        shutil.copytree(bases.cache(), place.cache, dirs_exist_ok=True)
        do(next(place.cache.glob("*/manifest.json")).parent)
        return data("prepare", place)

    return Case(f"cache/{name}", prepare, says)


def _put(cache: Path, at: tuple[str | int, ...], new: object) -> None:
    read = json.loads((cache / "manifest.json").read_text())
    write_json(cache / "manifest.json", put(read, at, new))


def _shared(name: str, file: str) -> Case:
    """A shared cache, at an address, whose manifest names a file elsewhere: nothing is written there."""

    def prepare(place: Place) -> Command:
        found = next(bases.cache().glob("*/manifest.json")).parent
        manifest = json.loads((found / "manifest.json").read_text())
        shared = place.cache / "shared" / found.name
        build = shared / manifest["id"]
        shutil.copytree(found, build)
        (build / "manifest.json").unlink()
        target = build / file.lstrip("/")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("# hostile\n") if not target.exists() else None
        except (OSError, ValueError):
            pass
        # What the manifest says of files, by name, whatever it says of each: of this one the same as of another.
        key = next(key for key, value in manifest.items() if isinstance(value, dict) and "lengths.npy" in value)
        write_json(shared / "manifest.json", manifest | {key: manifest[key] | {file: manifest[key]["lengths.npy"]}})
        return data("prepare", place, cache_dir=f"file://{place.cache}/shared")

    return Case(f"cache/{name}", prepare)
