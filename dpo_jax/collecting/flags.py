"""The command line of `python -m dpo_jax.collect`: a table of flags, and what was asked for as typed values. No JAX."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.answering.flags import FLAGS as ANSWERING
from dpo_jax.answering.flags import Flag, Request, check_out, parse_command, request_of
from dpo_jax.config.judges import FORMS
from dpo_jax.data.datasets import DATASETS
from dpo_jax.data.sources import hub_dataset
from dpo_jax.errors import UserError
from dpo_jax.judging.flags import read_options
from dpo_jax.sampling.selection import MODES, Selection

USAGE = "python -m dpo_jax.collect --policy=RUN|DIR --prompts=FILE|DATASET --judge=J --n=8 --out=pairs.jsonl"
NOTHING = "none"
_ABOUT = (
    "Preference pairs of a policy's own answers: prompts are answered n times, a judge scores the answers, and pairs "
    "are made of them. The same command resumes a file that was not finished; the file then ends byte for byte as if "
    "it had never stopped. docs/collecting.md has the modes and what a line holds."
)
_OF_SAMPLE = ANSWERING["What answers"] | ANSWERING["What is answered"]


def _of_sample(*names: str) -> dict[str, Flag]:
    return {name: _OF_SAMPLE[name] for name in names}


FLAGS: dict[str, dict[str, Flag]] = {
    "What answers": {
        "policy": Flag("", "a run's directory (its export, else its newest checkpoint), a Hugging Face directory or "
                       "id, or a PEFT directory"),
        **_of_sample("revision", "config", "dtype", "cache_dtype", "rows"),
    },
    "What is answered": {
        "prompts": Flag("", "a file, glob or directory of prompts or pairs (docs/sampling.md), or a dataset by its "
                        "name as for training, of which the training split is taken"),
        **_of_sample("dataset_path", "dataset_revision"),
        "split": Flag("", "another split of a dataset; one that is held out is refused"),
        "held_out": Flag("", "prompts for which no pairs are made: a file or a dataset. Empty = those that the "
                         f"policy's run holds out, and the test split of --prompts; {NOTHING} = no prompt"),
        **_of_sample("columns", "limit", "prompt_format", "chat_template"),
    },
    "How answers are drawn": ANSWERING["How answers are drawn"] | {"n": Flag(8, "answers to a prompt")},
    "How answers are judged": {
        "judge": Flag("", f"what scores the answers: {FORMS}"),
        "option": Flag("", "NAME=VALUE for the judge, such as concurrency=4 of a server; may be given several times",
                       several=True),
    },
    "Which answers become pairs": {
        "mode": Flag("best_worst", "best_worst; best_random: the best with any that is worse; mu_2sigma: with the one "
                     "nearest to the mean less two standard deviations; all: every two", MODES),
        "length_penalty": Flag(0.0, "taken from a score for each token of the answer"),
        "min_margin": Flag(0.0, "the least difference of the scores of a pair"),
        "keep_unfinished": Flag(False, "answers that --max_tokens has cut off may be in pairs"),
    },
    "What is written": {
        "out": Flag("", "the file of pairs, a line each, for --config.dataset; the same command resumes it"),
        "overwrite": Flag(False, "begin --out anew, whatever is there"),
        "html": Flag("", "a page to look at: scores and lengths of both sides, what was dropped, examples"),
        "shown": Flag(100, "pairs on that page, spread over all; 0 = all"),
        "distributed": ANSWERING["What is written"]["distributed"],
    },
}  # fmt: skip
_OWN = ("policy", "held_out", "judge", "html", "shown")


@dataclasses.dataclass(frozen=True)
class CollectRequest:
    """What was asked for.

    Attributes:
      answering: what is answered and how; its `dataset` is what --prompts names where that is one.
      options: of the judge.
      rules: which answers become pairs.
      held_out, html, shown: the flags of these names.
    """

    answering: Request
    judge: str
    options: Mapping[str, Any]
    rules: Selection
    held_out: str
    html: str
    shown: int

    @property
    def decides(self) -> dict[str, Any]:
        """What pairs depend on, beside the policy, the prompts and the judge."""
        return self.answering.decides | dataclasses.asdict(self.rules) | {"held_out": self.held_out}


def parse_collecting(argv: Sequence[str]) -> CollectRequest:
    """The command line as a request.

    Raises:
      UserError: anything wrong with it, in one line.
      SystemExit: 0 after `--help`.
    """
    given = parse_command(argv, USAGE, _ABOUT, FLAGS)
    for name in ("policy", "prompts", "judge", "out"):
        if not given[name]:
            raise UserError(f"--{name} is missing; usage: {USAGE}")
    rules = Selection(**{field.name: given.pop(field.name) for field in dataclasses.fields(Selection)})
    options = read_options(given.pop("option") or [])
    own = {name: given.pop(name) for name in _OWN}
    dataset = given["prompts"] if is_dataset(given["prompts"]) or _is_several(given["prompts"]) else ""
    request = request_of(given | {"model": own.pop("policy"), "dataset": dataset, "logprobs": False})
    if dataset.startswith("hf:") and request.split:  # its own splits are a part of its name
        request = dataclasses.replace(request, dataset=f"{dataset}:{request.split}", split="")
    found = CollectRequest(request, options=options, rules=rules, **own)
    _check(found)
    return found


def is_dataset(name: str) -> bool:
    """Whether a name is that of a dataset or of one's own parser; a file or directory of that name comes first."""
    function = ":" in name and "/" not in name
    return not Path(name).exists() and (name in DATASETS or function or bool(hub_dataset(name)))


def _is_several(prompts: str) -> bool:
    """Whether these are a directory or a glob, whose files may be of several splits, as a dataset's are."""
    return Path(prompts).is_dir() or (any(c in prompts for c in "*?[") and not Path(prompts).exists())


def _check(r: CollectRequest) -> None:
    asked = r.answering.asked
    if asked.n < 2:
        raise UserError(f"--n={asked.n}: a pair needs two answers to a prompt; use 2 or more")
    if asked.temperature == 0:
        raise UserError("--temperature=0 draws the same answer every time; use a temperature above 0")
    if r.shown < 0:
        raise UserError(f"--shown={r.shown}; needs 0 or more")
    for name in () if r.answering.dataset else ("dataset_path", "dataset_revision", "split"):
        if given := getattr(r.answering, name):
            raise UserError(f"--{name}={given} has no meaning with prompts of a file; leave it out")
    split = r.answering.split or (r.answering.dataset.rpartition(":")[2] if r.answering.dataset[:3] == "hf:" else "")
    if is_held_out(split):
        raise UserError(f"--split={split} is held out, to evaluate on; collect for training prompts")
    check_out(r.answering.out, r.answering.prompts)
    if r.html:
        path = Path(r.html)
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise UserError(f"--html={r.html} cannot be written; choose a file in a directory that is writable")
        if path.absolute() == Path(r.answering.out).absolute():
            raise UserError(f"--html={r.html} is --out, too; choose another file")


def is_held_out(split: str) -> bool:
    """Whether a split's name says that it is there to evaluate on.

    >>> [is_held_out(name) for name in ("test", "test_prefs", "validation", "train_prefs", "")]
    [True, True, True, False, False]
    """
    return split.lower().split("_")[0] in ("test", "eval", "evaluation", "validation", "valid", "val", "dev")
