"""Raw files to training and evaluation pairs, with a report of every row that was read and of every one left out."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.cache.fingerprint import identity
from dpo_jax.data.cache.manifest import QUARANTINE
from dpo_jax.data.cache.shared import open_or_build
from dpo_jax.data.comparison import DELIBERATE
from dpo_jax.data.lengths import length_report, token_table
from dpo_jax.data.mixture import apportion
from dpo_jax.data.notes import sentences
from dpo_jax.data.prompts import with_prompts
from dpo_jax.data.render import Renderer, make_renderer
from dpo_jax.data.sources import DataSources, find_sources
from dpo_jax.data.split import Pairs, Split, split
from dpo_jax.data.tokenise import Recast, copy_bad_rows, tokenise
from dpo_jax.errors import UserError, escaped


@dataclass(frozen=True)
class DataRequest:
    """What to prepare; the fields are the configuration's keys. Lengths in tokens, `eval_pairs` -1 = all of a split.

    `drop_ties` drops rows whose scores are equal; a row labelled a tie names no winner and is always dropped.
    """

    dataset: str
    dataset_path: str = ""
    dataset_revision: str = ""
    split: str = ""
    eval_path: str = ""
    columns: str = ""
    eval_pairs: int = 512
    seed: int = 0
    prompt_format: str = "auto"
    chat_template: str = ""
    template_date: str = ""
    max_prompt_length: int = 512
    max_completion_length: int = 512
    overlong: str = "truncate"
    drop_ties: bool = True
    max_bad_fraction: float = 0.1
    cache_dir: str = ""
    batch_size: int = 1  # this and the next: what an epoch of a mixture is, for the report
    drop_remainder: bool = False
    reward_margin: str = ""
    prompts: bool = False  # whether rows of a prompt alone will do; no key


@dataclass(frozen=True)
class Prepared:
    """Training and evaluation pairs (of one cache) and the report that a run keeps as data.json."""

    split: Split
    report: dict[str, Any]
    form: str = ""  # of prompts, as they were rendered: chat, plain or text
    built: bool = False  # by this call; the cache was not there

    @property
    def train(self) -> Pairs:
        return self.split.train

    @property
    def evaluation(self) -> Pairs:
        return self.split.evaluation


@dataclass(frozen=True)
class Reading:
    """How far building a cache has come: bytes of the source files read (packed as they are) and in all, and rows."""

    bytes: int
    total_bytes: int
    rows: int
    kept: int


Progress = Callable[[Reading], None]


def sources_for(r: DataRequest) -> DataSources:
    """Where the rows of a request are; raises as `find_sources`."""
    at = (r.dataset, r.dataset_path, r.eval_path, r.split)
    found = find_sources(*at, columns=r.columns, revision=r.dataset_revision)
    return with_prompts(found) if r.prompts else found


def prepare(
    request: DataRequest,
    tokenizer: Any,
    quarantine: Path | None = None,
    progress: Progress | None = None,
    recasting: Callable[[Renderer], Recast] | None = None,
) -> Prepared:
    """Pairs for `request`, from the cache if it holds exactly these.

    Args:
      request, tokenizer: what to prepare, and for which model.
      quarantine: JSONL of the bad rows; None leaves them in the cache, and the report's `quarantine` names that file.
      recasting: what makes of a renderer what pairs become before they are rendered; None: they stay pairs.
      progress: is told now and then how far building has come; never if the cache is there.

    UserError if the data cannot be found or read, too many rows are bad, or no pair is left.
    """
    if request.eval_pairs < -1:
        raise UserError(f"eval_pairs={request.eval_pairs}; use a number of pairs, 0 for none, or -1 for all")
    data = sources_for(request)
    renderer = make_renderer(
        tokenizer,
        request.prompt_format,
        request.max_prompt_length,
        request.max_completion_length,
        request.overlong,
        request.chat_template,
        request.template_date,
    )
    recast = None if recasting is None else recasting(renderer)
    decides = identity(data, renderer, request.drop_ties, request.reward_margin)
    decides |= {} if recast is None else {"recast": recast.identity}
    decides |= {"prompts": True} if request.prompts else {}
    total = sum(file["bytes"] or 0 for source in decides["sources"] for file in source["files"])
    so_far = np.zeros(3, np.int64)  # bytes, rows, pairs

    def tell(*more: int) -> None:
        so_far[:] += more
        if progress is not None and more[1]:
            read, rows, kept = so_far.tolist()
            progress(Reading(min(read, total), total, rows, kept))

    more: dict[str, Any] = {"margin": request.reward_margin, "recast": recast}
    produce = functools.partial(
        tokenise, data.sources, renderer, request.drop_ties, quarantine=quarantine, tell=tell, **more
    )
    cache, built = open_or_build(request.cache_dir, decides, produce)
    written = copy_bad_rows(Path(cache.directory) / QUARANTINE, quarantine)
    for entry in cache.manifest["sources"]:
        bad = {reason: count for reason, count in entry["dropped"].items() if reason not in DELIBERATE}
        if sum(bad.values()) > request.max_bad_fraction * entry["read"]:
            reasons = ", ".join(f"{bad[reason]} {reason} (first {entry['examples'][reason]})" for reason in bad)
            raise UserError(
                f"{entry['name']}: {sum(bad.values())} of {entry['read']} rows are bad, more than max_bad_fraction="
                f"{request.max_bad_fraction}: {reasons}; mend them"
                f"{f' (they are in {written})' if written else ''} or raise it"
            )
    divided = split(cache, data, request.eval_pairs, request.seed)
    sizes = [len(divided.train)] if divided.mixture is None else divided.mixture.sizes
    if empty := [part.name for part, size in zip(data.parts, sizes, strict=True) if not size]:
        counts = "; ".join(
            f"{entry['name']} ({entry['split']}): {entry['read']} rows read, {entry['kept']} kept, dropped "
            + (", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items()) or "none")
            for entry in cache.manifest["sources"]
        )
        raise UserError(f"dataset={empty[0]}: no training pair is left; {counts}")
    report = _report(request, renderer, data, divided) | {"quarantine": written}
    return Prepared(divided, report, renderer.form, built)


# What a source's entry says of its rows' forms and fields.
_OF_FORMS = ("forms", "to_template", "unused", "answers_of_several_turns")


def _report(request: DataRequest, renderer: Renderer, data: DataSources, divided: Split) -> dict[str, Any]:
    cache = divided.train.cache
    shown = (
        "name",
        "split",
        "files",
        "read",
        "kept",
        "dropped",
        "truncated",
        "boundary_moved",
        "left_out",
        "notes",
        "examples",
        *_OF_FORMS,
    )
    report = {
        "dataset": escaped(request.dataset),  # a path may be no UTF-8
        "prompt_format": renderer.form,
        "template_date": renderer.template.day,
        "notes": [
            *sentences(cache.manifest["sources"], renderer.form, renderer.template.day),
            *data.passed_over,
        ],
        "held_out": escaped(" ".join(divided.notes)),
        "source_names": cache.manifest["source_names"],
        "sources": [{key: entry[key] for key in shown} for entry in cache.manifest["sources"]],
        "splits": {
            name: {"pairs": len(pairs), "tokens": token_table(pairs.lengths)} | length_report(pairs.lengths)
            for name, pairs in (("train", divided.train), ("eval", divided.evaluation))
        },
        "fingerprint": Path(cache.directory).name,
    }
    if (mixture := divided.mixture) is not None:
        epoch = apportion(mixture.epoch_size(request.batch_size, request.drop_remainder), mixture.weights)
        numbers = zip(data.parts, mixture.sizes.tolist(), epoch.tolist(), strict=True)
        report["mixture"] = [
            {"name": escaped(part.name), "weight": part.weight / sum(mixture.weights), "pairs": pairs, "epoch": taken}
            for part, pairs, taken in numbers
        ]
    return report
