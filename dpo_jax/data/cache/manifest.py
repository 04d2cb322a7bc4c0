"""The manifest of a cache of pairs: what it holds, and a checksum of every file, itself among them.

A file is known by its size and SHA-256 (`sha256sum` gives the same), the manifest by that of its own JSON without the
key `checksum`. What a manifest says is checked before any of it is used: a shared one is written by whoever can write
to its address.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from dpo_jax.errors import escaped

FORMAT = 3  # raise it when the files of a cache change; older caches are then made anew
MANIFEST, RECORDS, QUARANTINE, MARGIN = "manifest.json", "pairs.array_record", "quarantine.jsonl", "margin.npy"
ARRAYS = ("lengths", "source", "prompt_hash", "origin")  # that every cache has, as NAME.npy
FILES = frozenset({RECORDS, QUARANTINE, MARGIN, *(f"{name}.npy" for name in ARRAYS)})  # and no other
LARGEST_ID = "largest_id"  # of the token ids of all pairs, in the manifest
IDS_DIGEST = "ids"  # of the token ids of all pairs, in the manifest
CONTENT = "content"  # of all that is known of all pairs, in the manifest: equal for two builds of the same
COMPUTED = "reference-*.npz"  # what was computed for the pairs of a cache, kept in its directory beside its files
_SEAL = "checksum"
_MOST_BYTES = 64 << 20  # of a manifest


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Source(BaseModel):
    """What `Tally.entry` says of a source, as far as it is read again."""

    model_config = ConfigDict(strict=True)

    name: str
    split: Literal["train", "test"]
    files: list[str]
    read: NonNegativeInt
    kept: NonNegativeInt
    dropped: dict[str, int]
    truncated: dict[str, int]
    boundary_moved: NonNegativeInt
    left_out: str
    notes: dict[str, int]
    forms: list[dict[str, Any]]
    to_template: dict[str, int]
    unused: dict[str, int]
    answers_of_several_turns: NonNegativeInt
    examples: dict[str, str]
    start: NonNegativeInt
    stop: NonNegativeInt


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    format: int
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    fingerprint: dict[str, Any]
    pairs: NonNegativeInt
    largest_id: int
    ids: str
    content: str
    files: dict[str, _File]
    sources: list[_Source] = []
    source_names: list[str] = []

    @model_validator(mode="after")
    def _is_sound(self) -> "_Manifest":
        if odd := sorted(self.files.keys() - FILES):
            raise ValueError(f"{odd[0]!r:.100} is no file of a cache")
        if missing := sorted(FILES - {MARGIN} - self.files.keys()):
            raise ValueError(f"{missing[0]} is not listed")
        ends = [0, *(source.stop for source in self.sources)]
        if self.sources and (ends[-1] != self.pairs or [source.start for source in self.sources] != ends[:-1]):
            raise ValueError("its sources do not have its pairs")
        return self


class OtherFormatError(ValueError):
    """The manifest is that of another version of this package."""


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own checksum."""
    return manifest | {_SEAL: _checksum(manifest)}


def parse_manifest(content: bytes | str) -> dict[str, Any]:
    """The manifest that `sealed` made and that was kept as JSON.

    Raises:
      OtherFormatError: another version wrote it.
      ValueError: it is no manifest, was changed, or names what is no file of a cache.
    """
    if len(content) > _MOST_BYTES:
        raise ValueError(f"its {MANIFEST} has {len(content):,} bytes")
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"its {MANIFEST} is no JSON") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"its {MANIFEST} holds a {type(manifest).__name__}, not an object")
    if isinstance(manifest.get("format"), int) and manifest["format"] != FORMAT:
        raise OtherFormatError(f"another version of this package made it (format {manifest['format']}, not {FORMAT})")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(escaped(f"its {MANIFEST} is damaged: {where}{': ' if where else ''}{first['msg']}")) from None
    if manifest.get(_SEAL) != _checksum(manifest):
        raise ValueError(f"its {MANIFEST} is not what was written")
    return manifest


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in `directory`, for the manifest's `files`."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _file_checksum(path)}
        for path in sorted(directory.iterdir())
    }


def find_damage(directory: Path, manifest: dict[str, Any], *, contents: bool = True) -> str:
    """What is wrong with the first file that is not as the manifest has it; empty if nothing is.

    `contents`: read and compare them, not only their sizes.
    """
    for name, wanted in manifest["files"].items():
        path = directory / name
        try:
            if not path.is_file():
                return f"{name} is {'no regular file' if path.exists() else 'missing'}"
            if (size := path.stat().st_size) != wanted["bytes"]:
                return f"{name} has {size:,} bytes, {wanted['bytes']:,} were written"
            if contents and _file_checksum(path) != wanted["sha256"]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    kept = {key: value for key, value in manifest.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
