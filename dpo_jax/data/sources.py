"""From the `dataset` string to the files to read: named datasets, a user's files, the hub, one's own parser."""

import fnmatch
import os
import re
from dataclasses import dataclass, replace
from typing import Literal

from dpo_jax.data import files
from dpo_jax.data.dataset_info import Entry, find_entry
from dpo_jax.data.datasets import DATASETS, OWN, DatasetSpec, load_parser, read_with
from dpo_jax.data.forms.rename import Columns, parse_columns
from dpo_jax.errors import UserError

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# A part of a mixture; its name may itself have commas and colons.
_PART = re.compile(r"\s*(.+?):((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?:,|$)", re.ASCII)
# Split names in the hub's file names: data/train_prefs-00000-of-00001.parquet.
_SHARD = re.compile(r"(?:^|/)([\w.]+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.")
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
# Words in a file's path that name its split; validation comes before test, which is kept for the end.
_SPLIT_WORDS = (("train", "training"), ("validation", "valid", "val", "dev", "eval"), ("test",))
_NONE_PUBLISHED = "no published evaluation split was found"


@dataclass(frozen=True)
class Source:
    """Files that are read alike and reported together.

    `parser` names the parse function in the cache's fingerprint; `part` is the number of the mixture's part that the
    files belong to (0 where nothing is mixed), or `EXTRA` for those of `eval_path`.
    """

    name: str
    split: Literal["train", "test"]
    files: tuple[str, ...]
    spec: DatasetSpec
    parser: str
    part: int = 0


EXTRA = -1
_HEAVIEST = 1e12  # a weight; more is a mistake, and would overflow their sum
_PartSources = tuple[list[Source], str]  # and the note


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture: its name, its weight, and where its evaluation pairs come from (a sentence's start)."""

    name: str
    weight: float
    note: str


@dataclass(frozen=True)
class DataSources:
    """All sources of a run, training first within a part, and its parts (one where nothing is mixed)."""

    sources: tuple[Source, ...]
    parts: tuple[Part, ...]

    def published(self, part: int) -> bool:
        """True if some source of this part is there for evaluation only; else pairs must be held out."""
        return any(source.split == "test" and source.part == part for source in self.sources)


def find_sources(
    dataset: str,
    dataset_path: str = "",
    eval_path: str = "",
    split: str = "",
    *,
    columns: str = "",
    revision: str = "",
) -> DataSources:
    """What to read for `dataset`, from `dataset_path` if given.

    Args:
      dataset: one of `DATASETS`, files, hf:OWNER/NAME or module:function, or a mixture `NAME:WEIGHT,NAME:WEIGHT`.
      dataset_path: where the raw files are; of a mixture, one path for each part, with commas between (empty: the
        hub), or one directory that holds a directory for each part, by name.
      eval_path: files in any accepted form, or the form that one's own parser reads; replaces every held-out split.
      split: the split of an `hf:` dataset to train on; empty: told by the file names.
      columns: new names of the files' columns, see `parse_columns`.
      revision: the hub's branch, tag or commit; of a mixture, one for each part, with commas between.

    UserError if the dataset is unknown, its files are not there, or a subset is missing.
    """
    named = parse_mixture(dataset)
    paths = _paths(dataset_path, [name for name, _ in named])
    sources: list[Source] = []
    parts: list[Part] = []
    revisions = _revisions(revision, [name for name, _ in named], paths)
    for number, ((name, weight), path) in enumerate(zip(named, paths, strict=True)):
        own, note = _find(name, path, split, revisions[number])
        parts.append(Part(name, weight, note))
        sources += [replace(source, part=number) for source in own]
    if split and not any(_HUB.fullmatch(name) for name, _ in named):
        raise UserError(f"split={split}: only an hf: dataset has splits to choose from; leave it out for {dataset}")
    owner: dict[str, int] = {}
    for path, part in ((path, source.part) for source in sources for path in source.files):
        real = path if files.is_remote(path) else os.path.realpath(path)  # whatever path leads to it
        if owner.setdefault(real, part) != part:
            raise UserError(f"dataset: {path} is in two parts of the mixture; give it to one")
    if eval_path:
        sources = [source for source in sources if source.split == "train"]
        held = tuple(files.find_files(eval_path))
        if both := sorted(set(held) & {path for source in sources for path in source.files}):
            raise UserError(f"eval_path={eval_path}: {both[0]} is training data too; give other files, or no eval_path")
        like = replace(sources[0], part=EXTRA, name=eval_path, split="test", files=held)
        own_parser = len(named) == 1 and _FUNCTION.fullmatch(dataset)
        sources.append(like if own_parser else replace(like, spec=OWN, parser="own"))
    if columns:
        sources = [_with_columns(source, parse_columns(columns), dataset) for source in sources]
    return DataSources(tuple(sources), tuple(parts))


def _with_columns(source: Source, columns: Columns, dataset: str) -> Source:
    """The source with columns renamed; UserError if a function of one's own reads its rows as they are."""
    if _FUNCTION.fullmatch(source.parser):
        raise UserError(
            f"columns={columns}: {dataset} reads its rows itself; rename them there, and leave columns empty"
        )
    before = source.spec.columns
    both = Columns({**before.names, **columns.names}, columns.ignored, {**before.turns, **columns.turns})
    return replace(source, spec=replace(source.spec, columns=both), parser=f"{source.parser}({both})")


def parse_mixture(dataset: str) -> list[tuple[str, float]]:
    """The parts of `NAME:WEIGHT,NAME:WEIGHT` with their weights; any other text is one part.

    >>> parse_mixture("hhh/harmless-base,helpful-base:7,ultrafeedback:3")
    [('hhh/harmless-base,helpful-base', 7.0), ('ultrafeedback', 3.0)]
    >>> parse_mixture("hhh/harmless-base,helpful-base")
    [('hhh/harmless-base,helpful-base', 1.0)]

    UserError if a part has no weight or 0, or is named twice.
    """
    matches = list(_PART.finditer(dataset))
    if not matches or _HUB.fullmatch(dataset):  # hf:OWNER/NAME:2024 is a split
        return [(dataset, 1.0)]
    parts = [(match[1], float(match[2])) for match in matches]
    rest = dataset[matches[-1].end() :].strip() or ("," if dataset.rstrip().endswith(",") else "")
    wrong = [f"{name}:{weight:g}" for name, weight in parts if not 0 < weight <= _HEAVIEST or name.startswith(",")]
    if rest or wrong or len(parts) == 1:
        raise UserError(
            f"dataset={dataset}: a mixture has two parts or more, each with a weight above 0 (at most {_HEAVIEST:g}), "
            f"as in hhh:0.7,ultrafeedback:0.3; found {(rest or ', '.join(wrong) or 'one part')!r}"
        )
    if twice := sorted({name for name, _ in parts if [one for one, _ in parts].count(name) > 1}):
        raise UserError(f"dataset={dataset}: {twice[0]} stands there twice; give it the sum of its weights")
    return parts


def hub_dataset(dataset: str) -> str:
    """The hub's name of one dataset (not of a mixture), OWNER/NAME; empty for files and parsers of one's own.

    >>> hub_dataset("hhh/harmless-base"), hub_dataset("hf:owner/name:train"), hub_dataset("pairs.jsonl")
    ('Anthropic/hh-rlhf', 'owner/name', '')
    """
    name = dataset.partition("/")[0]
    match = _HUB.fullmatch(dataset)
    return match.group(1) if match else DATASETS[name].hub if name in DATASETS else ""


def _paths(dataset_path: str, names: list[str]) -> list[str]:
    """A path for each part."""
    given = dataset_path.split(",")
    if len(names) == 1 or not dataset_path:
        return [dataset_path] * len(names)
    if len(given) == len(names):
        return [path.strip() for path in given]
    heads = [re.split("[/:]", name)[0] for name in names]
    known = [f"{dataset_path.rstrip('/')}/{head}" if head in DATASETS else "" for head in heads]
    missing = [path for path in known if path and not files.is_remote(path) and not os.path.isdir(path)]
    if len(given) > 1 or missing:
        there = f"found {len(given)} paths" if len(given) > 1 else f"there is no {missing[0]}"
        raise UserError(
            f"dataset_path={dataset_path}: a mixture of {len(names)} needs {len(names)} paths with commas between, in "
            f"its order (empty: from the hub), or one directory that holds a directory for each named part; {there}"
        )
    return known


def _revisions(revision: str, names: list[str], paths: list[str]) -> list[str]:
    """The hub's revision of each part; UserError for one of what is not on the hub."""
    given = [one.strip() for one in revision.split(",")] if revision else [""] * len(names)
    if len(given) != len(names):
        raise UserError(
            f"dataset_revision={revision}: {len(names)} datasets and {len(given)} revisions; give one for each, in the "
            "order of the mixture (empty: the main branch)"
        )
    for one, name, path in zip(given, names, paths, strict=True):
        if one and (path or not hub_dataset(name)):
            raise UserError(f"dataset_revision={revision}: {path or name} is not on the hub; leave its revision empty")
    return given


def _find(dataset: str, dataset_path: str, split: str, revision: str) -> _PartSources:
    name, _, subsets = dataset.partition("/")
    if name in DATASETS and (not subsets or DATASETS[name].subsets or name == "synthetic"):
        return _named(name, tuple(filter(None, subsets.split(","))), dataset_path, revision)
    if (entry := find_entry(dataset)) is not None:
        return _described(dataset, dataset_path, entry)
    if (match := _HUB.fullmatch(dataset)) is not None:
        return _hub(dataset, match.group(1), match.group(2) or split, dataset_path, revision)
    if _FUNCTION.fullmatch(dataset) and not dataset.startswith("hf:"):
        if not dataset_path:
            raise UserError(f"dataset={dataset}: needs --config.dataset_path=FILES, the rows to give to this function")
        return _directory(
            dataset, dataset_path, DatasetSpec(read_with(load_parser(dataset)), "", "", OWN.licence), parser=dataset
        )
    like_path = re.search(r"[/*?\\]|\.\w+$", dataset) and ":" not in dataset
    if like_path or files.is_remote(dataset) or os.path.exists(dataset):
        if dataset_path:
            raise UserError(f"dataset={dataset} is a path, and so is dataset_path={dataset_path}; give one of them")
        return _directory(dataset, dataset, OWN, parser="own")
    raise UserError(
        f"dataset={dataset or '(empty)'} is unknown; known are {', '.join(DATASETS)} (hhh/SUBSET,SUBSET with "
        f"{', '.join(DATASETS['hhh'].subsets)}), a path or glob of JSONL, JSON, CSV, Parquet or Arrow files, "
        "DIR/dataset_info.json:NAME, hf:OWNER/NAME[:SPLIT], or my_module:my_function"
    )


def _described(dataset: str, dataset_path: str, entry: Entry) -> _PartSources:
    """The sources of a dataset that LLaMA-Factory's file describes."""
    if dataset_path:
        raise UserError(
            f"dataset={dataset} says where its files are, and so does dataset_path={dataset_path}; drop one"
        )
    if entry.hub:
        sources, note = _hub(dataset, entry.hub, entry.split, "", "")
    else:
        sources, note = _directory(dataset, entry.path, OWN, parser="own")
    return [_with_columns(source, entry.columns, dataset) if entry.columns else source for source in sources], note


def _named(name: str, subsets: tuple[str, ...], path: str, revision: str) -> _PartSources:
    spec = DATASETS[name]
    if path:
        return _directory(name, path, spec, parser=name, subsets=subsets)
    if unknown := [subset for subset in subsets if spec.subsets and subset not in spec.subsets]:
        raise UserError(f"dataset={name}: unknown subset {unknown[0]}; known are {', '.join(spec.subsets)}")
    if not spec.hub:
        raise UserError(f"dataset={name}: needs dataset_path=DIR, the directory of its files")
    wanted = subsets or spec.subsets or ("",)
    patterns = [split.replace("*", one, 1) if one else split for one in wanted for split in (spec.train, spec.test)]
    local = files.download(spec.hub, patterns, revision)
    sources, note = _directory(name, local, spec, parser=name, subsets=wanted if spec.subsets else ())
    splits = {source.split for source in sources}
    if splits != {"train", "test"} or len(sources) != 2 * len(wanted):  # an old, partial local copy, used offline
        raise UserError(
            f"dataset={name}: the local copy of {spec.hub} is not whole; fetch it with `hf download {spec.hub} "
            "--repo-type dataset`, or give --config.dataset_path=DIR"
        )
    return sources, note


def _hub(dataset: str, repository: str, split: str, dataset_path: str, revision: str) -> _PartSources:
    patterns = [f"*{suffix}{packed}" for suffix in files.SUFFIXES for packed in ("", ".gz")]
    directory = dataset_path or files.download(repository, patterns, revision)
    listed = files.find_files(directory)
    if not split:
        splits = {shard[1] for path in listed if (shard := _SHARD.search(_relative(path, directory)))}
        several = sorted(name for name in splits if name.startswith("train"))
        if len(several) > 1:
            raise UserError(
                f"dataset={dataset}: there are several training splits ({', '.join(several)}); choose one by "
                f"--config.split={several[0]}"
            )
        return _directory(dataset, directory, OWN, parser="own")

    def of_split(name: str) -> tuple[str, ...]:
        return tuple(path for path in listed if name in re.split(r"[^\w]+|-", _relative(path, directory)))

    chosen = of_split(split)
    if not chosen:
        names = ", ".join(_relative(path, directory) for path in listed[:10])
        raise UserError(f"dataset={dataset}: no file of split {split}; the repository has {names}")
    train = Source(dataset, "train", chosen, OWN, "own")
    for word in ("test", "validation"):  # the split of the same kind: test_prefs for train_prefs
        if split.startswith("train") and (twin := of_split(split.replace("train", word, 1))):
            return [train, Source(dataset, "test", twin, OWN, "own")], "the published held-out split"
    rest, note = _directory(dataset, directory, OWN, parser="own")
    held = [source for source in rest if source.split == "test" and not set(source.files) & set(chosen)]
    return [train, *held], note if held else _NONE_PUBLISHED


def _directory(name: str, path: str, spec: DatasetSpec, parser: str, subsets: tuple[str, ...] = ()) -> _PartSources:
    """The sources under `path`: one for each subset directory and split where `spec` has them, else one per split."""
    listed = files.find_files(path)
    inside = {one: _relative(one, path) for one in listed}
    by_split = {
        split: [one for one, relative in inside.items() if pattern and fnmatch.fnmatchcase(relative, pattern)]
        for split, pattern in (("train", spec.train), ("test", spec.test))
    }
    as_on_the_hub = any(by_split.values())
    if not as_on_the_hub:
        by_split = _split_by_words(inside)
    grouped: dict[tuple[str, str], list[str]] = {}
    for split, paths in by_split.items():
        for one in paths:
            subset = inside[one].split("/")[0] if as_on_the_hub and spec.train.startswith("*/") else ""
            if not subsets or subset in subsets or (not subset and set(inside[one].split("/")) & set(subsets)):
                grouped.setdefault((f"{name}/{subset}" if subset else name, split), []).append(one)
    present = {name.partition("/")[2] for name, _ in grouped}
    missing = [subset for subset in subsets if subset not in present and "" not in present]
    if missing or not grouped:
        there = sorted({text.split("/")[0] for text in inside.values()})
        raise UserError(
            f"dataset={name}: no subset {', '.join(missing or subsets)} in {path}; found {', '.join(there)}"
        )
    splits = {split for _, split in grouped}
    sources = [
        Source(label, "test" if split == "test" and "train" in splits else "train", tuple(paths), spec, parser)
        for (label, split), paths in sorted(grouped.items(), key=lambda item: item[0][1] == "test")
    ]
    if splits == {"test"}:
        return sources, "only a published test split was found, so it is divided again"
    return sources, "the published held-out split" if "test" in splits else _NONE_PUBLISHED


def _split_by_words(inside: dict[str, str]) -> dict[str, list[str]]:
    """Training and evaluation files, told by words in their paths; one that names no split is for training."""
    known = {word: kind for kind, names in enumerate(_SPLIT_WORDS) for word in names}
    kinds: dict[str, int] = {}
    for path, relative in inside.items():  # the last known word counts: validation/train.jsonl is training data
        words = reversed(re.findall(r"[a-z]+", relative.lower()))
        kinds[path] = next((known[word] for word in words if word in known), 0)
    best = min(filter(None, kinds.values()), default=-1)
    return {split: [path for path, kind in kinds.items() if kind == n] for split, n in (("train", 0), ("test", best))}


def _relative(path: str, root: str) -> str:
    """The part of `path` below the directory `root`; the bare file name where `root` is a file or a glob."""
    if files.is_remote(root):
        inner, top = (address.split("://", 1)[1].strip("/") for address in (path, root))
        return inner.removeprefix(top + "/") if inner.startswith(top + "/") else inner.rsplit("/", 1)[-1]
    root = os.path.expanduser(root)
    return os.path.relpath(path, root).replace(os.sep, "/") if os.path.isdir(root) else os.path.basename(path)
