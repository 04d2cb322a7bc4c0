"""The command line of `python -m dpo_jax.judge`: a table of flags, and what was asked for as typed values. No JAX."""

import dataclasses
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.answering.flags import Flag, asks_help, parse_values
from dpo_jax.errors import UserError
from dpo_jax.judging.answers import UNITS

COMMANDS = {
    "compare": (
        "A.jsonl B.jsonl",
        "The win rate of the answers in A over those in B, with its error, raw and at equal lengths. Both are files as "
        "python -m dpo_jax.sample writes them; prompts are matched by their ids.",
    ),
    "benchmark": (
        "FILE|NAME",
        "How often a judge prefers the better answer: of labelled pairs in any form that training reads, or of "
        "RewardBench, RewardBench 2, RM-Bench, JudgeBench and LLMBar, each in its own aggregation.",
    ),
    "score": ("A.jsonl", "A score for every answer of a file, which is written again with them."),
}
_OUT = "the file of what was judged, which the same command resumes: nothing that is in it is asked again"
_FORMATS = ("auto", "pairs", "rewardbench", "rewardbench2", "rm-bench", "judgebench", "llmbar")
# Each flag with the commands that have it.
FLAGS: dict[str, tuple[Flag, tuple[str, ...]]] = {
    "judge": (
        Flag("", "a reward model or generative preference model (a directory or a run), http://HOST/v1|MODEL, "
             "implicit:POLICY,REFERENCE, module:function, gold, or several with commas"),
        ("compare", "benchmark", "score"),
    ),
    "option": (
        Flag("", "NAME=VALUE for the judge, such as concurrency=4 of a server; may be given several times",
             several=True),
        ("compare", "benchmark", "score"),
    ),
    "limit": (Flag(0, "the first so many prompts, rows or pairs; 0 = all"), ("compare", "benchmark", "score")),
    "lengths": (
        Flag("auto", "in what lengths are counted; auto is tokens, where every answer has them", ("auto", *UNITS)),
        ("compare",),
    ),
    "format": (Flag("auto", "the benchmark; auto tells it by the columns", _FORMATS), ("benchmark",)),
    "dataset_path": (Flag("", "where the raw files of a dataset with a name are; empty = from the hub"),
                     ("benchmark",)),
    "dataset_revision": (Flag("", "the hub's branch, tag or commit of the dataset; empty = its main branch"),
                         ("benchmark",)),
    "split": (Flag("", "test (the default where there is one), train, or an hf: dataset's own"), ("benchmark",)),
    "columns": (Flag("", "names of the files' columns, and columns to leave out: prompt:question,notes:"),
                ("benchmark",)),
    "json": (Flag("", "a file for the figures"), ("compare", "benchmark")),
    "html": (Flag("", "a page to look at, with the answers side by side"), ("compare", "benchmark")),
    "shown": (Flag(200, "comparisons on that page, spread over all; 0 = all"), ("compare", "benchmark")),
    "out": (Flag("", _OUT), ("compare", "score")),
    "overwrite": (Flag(False, "begin --out anew, whatever is there"), ("compare", "score")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """What was asked for: the command, its files, and the flags of `FLAGS` by their names (`option` as `options`)."""

    command: str
    files: tuple[str, ...]
    judge: str
    options: Mapping[str, Any]
    limit: int = 0
    lengths: str = "auto"
    format: str = "auto"
    dataset_path: str = ""
    dataset_revision: str = ""
    split: str = ""
    columns: str = ""
    json: str = ""
    html: str = ""
    shown: int = 0
    out: str = ""
    overwrite: bool = False


def usage(command: str) -> str:
    return f"python -m dpo_jax.judge {command} {COMMANDS[command][0]} --judge=J [--FLAG=VALUE ...]"


def flags_of(command: str) -> dict[str, Flag]:
    return {name: flag for name, (flag, commands) in FLAGS.items() if command in commands}


def parse_judging(argv: Sequence[str]) -> JudgeRequest:
    """The command line as a request.

    Raises:
      UserError: anything wrong with it, in one line.
      SystemExit: 0 after `--help`.
    """
    command = next((argument for argument in argv[1:2] if not argument.startswith("-")), "")
    if asks_help(argv):
        print(_help(command if command in COMMANDS else ""))
        raise SystemExit(0)
    if command not in COMMANDS:
        found = f"unknown command {command!r}" if command else "a command is missing"
        raise UserError(f"{found}; use {', '.join(COMMANDS)} (--help says more)")
    given, files = parse_values([argv[0], *argv[2:]], flags_of(command))
    request = JudgeRequest(command, tuple(files), options=read_options(given.pop("option") or []), **given)
    _check(request)
    return request


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """Names and values; a value is a number or a truth if it is written as JSON has it, else a text."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--option={text}; needed is NAME=VALUE, such as --option=concurrency=4")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        found[name] = read if isinstance(read, int | float) else value
    return found


def _check(r: JudgeRequest) -> None:
    needed = len(COMMANDS[r.command][0].split())
    if len(r.files) != needed:
        raise UserError(f"{r.command} takes {needed}, found {len(r.files)} files or names; usage: {usage(r.command)}")
    if not r.judge:
        raise UserError(f"--judge is missing; usage: {usage(r.command)}")
    for name in ("limit", "shown"):
        if getattr(r, name) < 0:
            raise UserError(f"--{name}={getattr(r, name)}; needs 0 or more")
    if r.command == "score" and not r.out:
        raise UserError(f"--out is missing; usage: {usage('score')}")
    if r.overwrite and not r.out:
        raise UserError("--overwrite has no meaning without --out; leave it out")
    for name in ("out", "json", "html"):
        if getattr(r, name):
            _check_place(name, getattr(r, name), r)


def _check_place(name: str, place: str, r: JudgeRequest) -> None:
    path = Path(place)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--{name}={place} cannot be written; choose a file in a directory that is there and writable")
    others = [*r.files, *(getattr(r, other) for other in ("out", "json", "html") if other != name)]
    for other in filter(None, others):
        if path.absolute() == Path(other).absolute() or (
            path.exists() and Path(other).exists() and path.samefile(other)
        ):
            raise UserError(f"--{name}={place} is {other}, too; choose another file")


def _help(command: str) -> str:
    lines = []
    for name, (_, about) in COMMANDS.items() if not command else [(command, COMMANDS[command])]:
        lines += [f"usage: {usage(name)}", "", *textwrap.wrap(about, 118), ""]
        for flag_name, flag in flags_of(name).items():
            default = "" if isinstance(flag.default, bool) or flag.several else f"={flag.default}"
            shown = f"--{flag_name}{default}: {flag.meaning}"
            lines += textwrap.wrap(shown, 118, initial_indent="  ", subsequent_indent="      ")
        lines.append("")
    return "\n".join([*lines, "docs/judging.md has what each figure means."])
