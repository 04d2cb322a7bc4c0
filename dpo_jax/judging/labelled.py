"""Labelled pairs and benchmarks from files, from a dataset with a name, or from the hub. No JAX."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_jax.data.comparison import Skip
from dpo_jax.data.containers import read_rows
from dpo_jax.data.raw import BadLine
from dpo_jax.data.sources import Source, find_sources
from dpo_jax.data.tally import Tally
from dpo_jax.errors import UserError
from dpo_jax.judging.benchmarks.benchmark import Benchmark
from dpo_jax.judging.benchmarks.table import BENCHMARKS, PAIRS
from dpo_jax.judging.tasks import Task, pair_task

PARTS = ("source", "subset", "domain", "category")  # columns that tell parts of labelled pairs apart
MOST_PARTS = 50  # more are no parts, but names of single rows


@dataclass(frozen=True)
class Labelled:
    """What a judge is measured on.

    Attributes:
      form: the name of the benchmark, see `BENCHMARKS`.
      left_out: rows or pairs by the reason that they are left out.
      first: where the first of each reason is, and why, in words.
    """

    form: str
    tasks: tuple[Task, ...]
    left_out: Mapping[str, int]
    first: Mapping[str, str]


def read_labelled(
    dataset: str,
    path: str = "",
    split: str = "",
    *,
    form: str = "auto",
    columns: str = "",
    revision: str = "",
    limit: int = 0,
) -> Labelled:
    """The tasks of a file, a dataset with a name, or a benchmark, told by its columns unless `form` says which.

    Args:
      dataset, path, columns, revision: as for training, see `find_sources`.
      split: train or test (of a `hf:` dataset: any split of its own); empty: test if there is one, else train.
      limit: the first so many rows, or pairs; 0: all.

    Raises:
      UserError: nothing can be read, or no row has what is needed.
    """
    try:
        sources = _of_split(dataset, path, split, columns, revision)
        benchmark = _benchmark(sources, form)
        found = _pairs(sources, limit) if benchmark is None else _rows(sources, benchmark, limit)
    except UserError as error:
        raise UserError(_as_flags(str(error)), code=error.code) from error
    found = replace(found, first={reason: _as_flags(text) for reason, text in found.first.items()})
    if not found.tasks:
        reasons = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in found.left_out.items())
        first = next(iter(found.first.values()), "")
        raise UserError(f"{dataset}: nothing to judge in it ({reasons}){f'; first {first}' if first else ''}")
    return found


def _as_flags(text: str) -> str:
    """The readers' hints name training's keys, which are flags here, and the dataset an argument."""
    return text.replace("--config.dataset=", "").replace("--config.", "--")


def _of_split(dataset: str, path: str, split: str, columns: str, revision: str) -> list[Source]:
    own = split if dataset.startswith("hf:") and split not in ("train", "test") else ""
    sources = find_sources(dataset, path, "", own, columns=columns, revision=revision).sources
    there = sorted({source.split for source in sources})
    wanted = "train" if own else split or ("test" if "test" in there else "train")
    if wanted not in there:
        raise UserError(f"split={split}: {dataset} has {' and '.join(there)}")
    return [source for source in sources if source.split == wanted]


def _benchmark(sources: Sequence[Source], form: str) -> Benchmark | None:
    """Of which form the rows are; None for pairs in any form that training reads."""
    if form != "auto":
        return None if form == PAIRS else BENCHMARKS[form]
    if not sources[0].parser.startswith("own"):  # a dataset that is named, or a function that reads its rows
        return None
    row = next((row for _, row in _each(sources[:1]) if not isinstance(row, BadLine)), None)
    return None if row is None else next((one for one in BENCHMARKS.values() if one.is_row(row)), None)


def _each(sources: Sequence[Source]) -> Iterator[tuple[str, dict[str, Any] | BadLine]]:
    for source in sources:
        for file in source.files:
            for where, row in read_rows(file):
                yield where, row if isinstance(row, BadLine) else source.spec.columns.apply(row)


def _rows(sources: Sequence[Source], benchmark: Benchmark, limit: int) -> Labelled:
    tasks: list[Task] = []
    left_out: dict[str, int] = {}
    first: dict[str, str] = {}
    for where, row in _each(sources):
        if isinstance(row, BadLine):
            one: Task | Skip = Skip(row.reason, repr(row.text[:60]))
        else:
            one = _task(benchmark, row, where)
        if isinstance(one, Skip):
            left_out[one.reason] = left_out.get(one.reason, 0) + 1
            first.setdefault(one.reason, f"{where}: {one.detail or one.reason.replace('_', ' ')}")
            continue
        tasks.append(one)
        if len(tasks) == limit:
            break
    return Labelled(benchmark.name, tuple(tasks), left_out, first)


def _task(benchmark: Benchmark, row: Mapping[str, Any], where: str) -> Task | Skip:
    if missing := [name for name in benchmark.columns if row.get(name) is None]:
        return Skip("missing_column", f"no value in {missing[0]}; a row of {benchmark.name} has it")
    try:
        return benchmark.task(row, where)
    except UserError as error:
        return Skip("bad_prompt", str(error).removeprefix(f"{where}: "))


def _pairs(sources: Sequence[Source], limit: int) -> Labelled:
    tasks: list[Task] = []
    left_out: dict[str, int] = {}
    first: dict[str, str] = {}
    with open(os.devnull, "w") as nowhere:  # bad rows are told by their first of each reason, not written down
        for source in sources:
            tally = Tally(source, nowhere)
            for task in _of_source(source, tally):
                tasks.append(task)
                if len(tasks) == limit:
                    break
            tally.end()
            for reason, n in tally.dropped.items():
                left_out[reason] = left_out.get(reason, 0) + n
            first = {**tally.examples, **first}
            if len(tasks) == limit > 0:
                break
    if len({task.part for task in tasks}) > MOST_PARTS:
        tasks = [replace(task, part="all") for task in tasks]
    return Labelled(PAIRS, tuple(tasks), left_out, first)


def _of_source(source: Source, tally: Tally) -> Iterator[Task]:
    for file in source.files:
        for where, row in read_rows(file):
            if isinstance(row, BadLine):
                tally.drop(where, Skip(row.reason), row.text)
                continue
            named = source.spec.columns.apply(row) if source.spec.columns else row
            for pair in tally.pairs(where, row, source.spec.read(named)):
                if pair.label == "Tie" or source.spec.tied(named):
                    tally.drop(where, Skip("tie"), row)
                    continue
                yield pair_task(where, str(row.get("id", "")), _part(named, source), pair)


def _part(row: Mapping[str, Any], source: Source) -> str:
    """The part of a pair: what its row calls its source; of a dataset the subset."""
    told = next((row[name] for name in PARTS if isinstance(row.get(name), str) and row[name]), "")
    return told or source.name.rpartition(os.sep)[2] or source.name
