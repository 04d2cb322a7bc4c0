"""From the `dataset` string to the files to read: named datasets, a user's files, the hub, one's own parser."""

import fnmatch
import os
import re
from dataclasses import dataclass, replace
from typing import Literal

from dpo_jax.data import files
from dpo_jax.data.datasets import DATASETS, OWN, DatasetSpec, known_datasets, load_parser
from dpo_jax.errors import UserError

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
# Words in a file's path that name its split; validation comes before test, which is kept for the end.
_EVAL_WORDS = (("validation", "valid", "val", "dev", "eval"), ("test",))


@dataclass(frozen=True)
class Source:
    """Files that are read alike and reported together. `parser` names the parse function in the cache's fingerprint."""

    name: str
    split: Literal["train", "test"]
    files: tuple[str, ...]
    spec: DatasetSpec
    parser: str


@dataclass(frozen=True)
class Found:
    """All sources of a run, training first. `note` says where the evaluation pairs come from, as a sentence's start."""

    sources: tuple[Source, ...]
    note: str

    @property
    def published_split(self) -> bool:
        """True if some source is there for evaluation only; else pairs must be held out."""
        return any(source.split == "test" for source in self.sources)


def resolve(dataset: str, dataset_path: str = "", eval_path: str = "") -> Found:
    """What to read for `dataset` (see `datasets.known_datasets`), from `dataset_path` if given.

    `eval_path` (files in any accepted form, or the form that one's own parser reads) replaces a published split.

    Raises:
      UserError: the dataset is unknown, its files are not there, or a subset is missing.
    """
    found = _find(dataset, dataset_path)
    if not eval_path:
        return found
    train = tuple(source for source in found.sources if source.split == "train")
    own_parser = train[0] if _FUNCTION.fullmatch(dataset) else None
    spec, parser = (own_parser.spec, own_parser.parser) if own_parser else (OWN, "own")
    held = tuple(files.find_files(eval_path))
    both = sorted(set(held) & {path for source in train for path in source.files})
    if both:
        raise UserError(f"eval_path={eval_path}: {both[0]} is training data too; give other files, or no eval_path")
    return Found((*train, Source(eval_path, "test", held, spec, parser)), f"eval_path={eval_path}")


def _find(dataset: str, dataset_path: str) -> Found:
    name, _, subsets = dataset.partition("/")
    if name in DATASETS and (not subsets or DATASETS[name].subsets or name == "synthetic"):
        return _named(name, tuple(filter(None, subsets.split(","))), dataset_path)
    if (match := _HUB.fullmatch(dataset)) is not None:
        return _hub(dataset, match.group(1), match.group(2) or "", dataset_path)
    if _FUNCTION.fullmatch(dataset) and not dataset.startswith("hf:"):
        if not dataset_path:
            raise UserError(f"dataset={dataset}: needs --config.dataset_path=FILES, the rows to give to this function")
        spec = replace(OWN, parse=load_parser(dataset), tied=lambda row: False)
        return _directory(dataset, dataset_path, spec, parser=dataset)
    if (re.search(r"[/*?\\]|\.\w+$", dataset) and ":" not in dataset.replace("://", "")) or os.path.exists(dataset):
        if dataset_path:
            raise UserError(f"dataset={dataset} is a path, and so is dataset_path={dataset_path}; give one of them")
        return _directory(dataset, dataset, OWN, parser="own")
    raise UserError(f"dataset={dataset or '(empty)'} is unknown; known are {known_datasets()}")


def _named(name: str, subsets: tuple[str, ...], path: str) -> Found:
    spec = DATASETS[name]
    unknown = [subset for subset in subsets if spec.subsets and subset not in spec.subsets]
    if unknown and not path:
        raise UserError(f"dataset={name}: unknown subset {unknown[0]}; known are {', '.join(spec.subsets)}")
    if path:
        return _directory(name, path, spec, parser=name, subsets=subsets)
    if not spec.hub:
        raise UserError(f"dataset={name}: needs dataset_path=DIR, where its files lie")
    wanted = subsets or spec.subsets or ("",)
    heads = [f"{subset}/" if subset else "" for subset in wanted]
    patterns = [
        head + (split.removeprefix("*/") if head else split) for head in heads for split in (spec.train, spec.test)
    ]
    found = _directory(
        name, files.download(spec.hub, patterns), spec, parser=name, subsets=wanted if spec.subsets else ()
    )
    splits = {source.split for source in found.sources}
    if splits != {"train", "test"} or len(found.sources) != 2 * len(
        wanted
    ):  # an old, partial local copy, found offline
        raise UserError(
            f"dataset={name}: the local copy of {spec.hub} is not whole; fetch it with `hf download {spec.hub} "
            "--repo-type dataset`, or give --config.dataset_path=DIR"
        )
    return found


def _hub(dataset: str, repository: str, split: str, dataset_path: str) -> Found:
    patterns = [f"*{suffix}{packed}" for suffix in files.SUFFIXES for packed in ("", ".gz")]
    directory = dataset_path or files.download(repository, patterns)
    if not split:
        return _directory(dataset, directory, OWN, parser="own")
    listed = files.find_files(directory)
    chosen = tuple(path for path in listed if split in re.split(r"[^\w]+|-", _relative(path, directory)))
    if not chosen:
        names = ", ".join(_relative(path, directory) for path in listed[:10])
        raise UserError(f"dataset={dataset}: no file of split {split}; the repository has {names}")
    rest = _directory(dataset, directory, OWN, parser="own")
    held = tuple(source for source in rest.sources if source.split == "test" and not set(source.files) & set(chosen))
    train = Source(dataset, "train", chosen, OWN, "own")
    return Found((train, *held), rest.note if held else "no published evaluation split was found")


def _directory(name: str, path: str, spec: DatasetSpec, parser: str, subsets: tuple[str, ...] = ()) -> Found:
    """The sources under `path`: one for each subset directory and split where `spec` has them, else one per split."""
    listed = files.find_files(path)
    inside = {one: _relative(one, path) for one in listed}
    by_split = {"train": _matching(inside, spec.train), "test": _matching(inside, spec.test)}
    laid_out = bool(by_split["train"] or by_split["test"])
    if not laid_out:
        by_split = _split_by_words(inside)
    grouped: dict[tuple[str, str], list[str]] = {}
    for split, paths in by_split.items():
        for one in paths:
            subset = inside[one].split("/")[0] if laid_out and spec.train.startswith("*/") else ""
            if not subsets or subset in subsets or (not subset and set(inside[one].split("/")) & set(subsets)):
                grouped.setdefault((f"{name}/{subset}" if subset else name, split), []).append(one)
    present = {name.partition("/")[2] for name, _ in grouped}
    missing = [subset for subset in subsets if subset not in present and "" not in present]
    if missing or not grouped:
        there = sorted({text.split("/")[0] for text in inside.values()})
        raise UserError(
            f"dataset={name}: no subset {', '.join(missing or subsets)} in {path}; found {', '.join(there)}"
        )
    if all(split == "test" for _, split in grouped):
        sources = [Source(label, "train", tuple(paths), spec, parser) for (label, _), paths in grouped.items()]
        return Found(tuple(sources), "only a published test split was found, so it is divided again")
    sources = [
        Source(label, "train" if split == "train" else "test", tuple(paths), spec, parser)
        for (label, split), paths in sorted(grouped.items(), key=lambda item: item[0][1] == "test")
    ]
    published = any(source.split == "test" for source in sources)
    return Found(
        tuple(sources), "the published held-out split" if published else "no published evaluation split was found"
    )


def _matching(inside: dict[str, str], pattern: str) -> list[str]:
    return [path for path, relative in inside.items() if pattern and fnmatch.fnmatchcase(relative, pattern)]


def _split_by_words(inside: dict[str, str]) -> dict[str, list[str]]:
    """Training and evaluation files, told by words in their paths; one that names no split is for training."""
    words = {path: re.findall(r"[a-z]+", relative.lower()) for path, relative in inside.items()}
    kinds: dict[str, int | None] = dict.fromkeys(words)
    for path, said in words.items():
        for word in said:  # the last word that names a split counts: validation/train.jsonl is training data
            if word in ("train", "training"):
                kinds[path] = None
            kinds[path] = next((kind for kind, names in enumerate(_EVAL_WORDS) if word in names), kinds[path])
    best = min((kind for kind in kinds.values() if kind is not None), default=None)
    return {
        "train": [path for path, kind in kinds.items() if kind is None],
        "test": [path for path, kind in kinds.items() if kind is not None and kind == best],
    }


def _relative(path: str, root: str) -> str:
    """The part of `path` below the directory `root`; the bare file name where `root` is a file or a glob."""
    if files.is_remote(root):
        inner, top = (address.split("://", 1)[1].strip("/") for address in (path, root))
        return inner.removeprefix(top + "/") if inner.startswith(top + "/") else inner.rsplit("/", 1)[-1]
    root = os.path.expanduser(root)
    return os.path.relpath(path, root).replace(os.sep, "/") if os.path.isdir(root) else os.path.basename(path)
