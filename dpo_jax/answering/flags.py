"""The command line of `python -m dpo_jax.sample`: a table of flags, and what was asked for as typed values. No JAX."""

import dataclasses
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dpo_jax.config.values import check_name, check_numbers
from dpo_jax.data.render import FORMATS
from dpo_jax.errors import UserError
from dpo_jax.sampling.params import SamplingParams

USAGE = "python -m dpo_jax.sample --model=DIR|RUN|ID --prompts=FILE --out=answers.jsonl [--n=4] [--FLAG=VALUE ...]"
DTYPES, CACHE_DTYPES = ("auto", "bfloat16", "float32"), ("auto", "int8")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag: its default, whose type is its own, and what it means. A `several` may stand there more than once."""

    default: str | int | float | bool
    meaning: str
    choices: tuple[str, ...] = ()
    several: bool = False


FLAGS: dict[str, dict[str, Flag]] = {
    "What answers": {
        "model": Flag("", "a Hugging Face directory or id, a PEFT directory, or the --workdir of a training run: its "
                      "export, else its newest checkpoint"),
        "revision": Flag("", "the hub's branch, tag or commit of the model; empty = its main branch"),
        "config": Flag("", "FILE.py[:PRESET], or a run's directory, whose mesh and number formats are taken"),
        "dtype": Flag("auto", "number format of the model and its products: auto is bfloat16, on CPU float32, or what "
                      "--config says", DTYPES),
        "cache_dtype": Flag("auto", "number format of keys and values: auto is the model's; int8 is half of bfloat16",
                            CACHE_DTYPES),
        "rows": Flag(0, "answers that a device draws at once; 0 = what suits it"),
    },
    "What is answered": {
        "prompts": Flag("", "a file, glob or directory: rows with a prompt or pairs (docs/sampling.md), or .txt with a "
                        "prompt a line; empty or - = standard input, typed prompts on a terminal"),
        "dataset": Flag("", "a dataset by its name as for training (hhh, hf:OWNER/NAME, ...) in place of --prompts"),
        "dataset_path": Flag("", "where the dataset's raw files are; empty = from the hub"),
        "dataset_revision": Flag("", "the hub's branch, tag or commit of the dataset; empty = its main branch"),
        "split": Flag("", "the dataset's split: test (the default where there is one), train, or an hf: dataset's own"),
        "columns": Flag("", "names of the files' columns, and columns to leave out: prompt:question,notes:"),
        "limit": Flag(0, "the first so many prompts; 0 = all"),
        "prompt_format": Flag("auto", "auto, chat, plain or text, as the config's prompt_format", FORMATS),
        "chat_template": Flag("", "the name of one of the tokenizer's chat templates; empty = the default"),
    },
    "How answers are drawn": {
        "n": Flag(1, "answers to a prompt"),
        "temperature": Flag(1.0, "logits are divided by it; 0 = the most likely token"),
        "top_p": Flag(1.0, "the fewest most likely tokens with this sum of probabilities; 1 = all"),
        "top_k": Flag(0, "so many most likely tokens; 0 = all"),
        "min_p": Flag(0.0, "tokens at least so likely, as a share of the most likely one; 0 = all"),
        "max_tokens": Flag(128, "the most tokens of an answer"),
        "min_tokens": Flag(0, "nothing ends an answer before it has so many"),
        "stop": Flag("", "a text that ends an answer and is cut off; may be given several times", several=True),
        "stop_token_ids": Flag("", "token ids that end an answer besides the model's own, with commas between"),
        "seed": Flag(0, "seed of the draws"),
        "round": Flag(0, "another number that draws depend on, to ask the same prompts again"),
    },
    "What is written": {
        "out": Flag("", "the file of answers, a line a prompt; empty = standard output. The same command resumes it"),
        "overwrite": Flag(False, "begin --out anew, whatever is there"),
        "logprobs": Flag(False, "with logprobs and full_logprobs of every token"),
        "distributed": Flag(False, "one process of several: join the others first (also with JAX_COORDINATOR_ADDRESS)"),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for: the flags of `FLAGS` by their names, those of sampling as `asked`."""

    model: str
    revision: str
    config: str
    dtype: str
    cache_dtype: str
    rows: int
    prompts: str
    dataset: str
    dataset_path: str
    dataset_revision: str
    split: str
    columns: str
    limit: int
    prompt_format: str
    chat_template: str
    out: str
    overwrite: bool
    distributed: bool
    asked: SamplingParams

    @property
    def decides(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the prompts."""
        names = ("dtype", "cache_dtype", "rows", "config", "prompt_format", "chat_template")
        asked = dataclasses.asdict(self.asked)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()} | {
            name: getattr(self, name) for name in names
        }


def parse_request(argv: Sequence[str]) -> Request:
    """The command line of `python -m dpo_jax.sample` as a request.

    Raises:
      UserError: anything wrong with it, in one line.
      SystemExit: 0 after `--help`.
    """
    request = request_of(parse_command(argv, USAGE, _ABOUT, FLAGS))
    _check(request)
    return request


def parse_command(
    argv: Sequence[str], usage: str, about: str, table: Mapping[str, Mapping[str, Flag]]
) -> dict[str, Any]:
    """The flags of a command that has nothing else, by name; raises as `parse_request` does."""
    if asks_help(argv):
        print(help_text(usage, about, table))
        raise SystemExit(0)
    given, rest = parse_values(argv, {name: flag for group in table.values() for name, flag in group.items()})
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; usage: {usage}")
    return given


def asks_help(argv: Sequence[str]) -> bool:
    """Whether `--help` is among the arguments."""
    return any(argument in ("--help", "-h", "--helpfull", "-help") for argument in argv[1:])


def parse_values(argv: Sequence[str], table: Mapping[str, Flag]) -> tuple[dict[str, Any], list[str]]:
    """The flags of a command line by name, and its other arguments.

    Raises:
      UserError: a flag is unknown, or its value is of another type or no choice of it.
    """
    values = flags.FlagValues()  # not absl's own registry, which holds the flags of every library that is imported
    for name, flag in table.items():
        _define(values, name, flag)
    check_numbers(argv[1:], lambda name: name in table and type(table[name].default) in (int, float))
    try:
        _, *rest = values(list(argv))
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    given: dict[str, Any] = {name: values[name].value for name in table}
    for name, flag in table.items():
        if type(flag.default) is str and not flag.several:
            check_name(f"--{name}", given[name])
        if flag.choices and given[name] not in flag.choices:
            raise UserError(f"--{name}={given[name]} does not exist; choose from {', '.join(flag.choices)}")
    return given, rest


def request_of(given: Mapping[str, Any]) -> Request:
    """The request of the flags of `FLAGS`.

    Raises:
      UserError: a value of sampling means nothing, or a count is below 0.
    """
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    asked: dict[str, Any] = {name: value for name, value in given.items() if name in fields}
    asked["stop"] = tuple(asked["stop"] or ())
    asked["stop_token_ids"] = _ids(asked["stop_token_ids"])
    for name in ("rows", "limit"):
        if given[name] < 0:
            raise UserError(f"--{name}={given[name]}; needs 0 or more")
    return Request(
        **{name: value for name, value in given.items() if name not in fields}, asked=SamplingParams(**asked)
    )


def _define(values: flags.FlagValues, name: str, flag: Flag) -> None:
    define: Any = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(
        type(flag.default), flags.DEFINE_bool
    )
    if flag.several:
        flags.DEFINE_multi_string(name, None, flag.meaning, flag_values=values)
    else:
        define(name, flag.default, flag.meaning, flag_values=values)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"stop_token_ids={text!r}; needs token ids with commas between, such as 2,13") from None


def _check(r: Request) -> None:
    if not r.model:
        raise UserError(f"--model is missing; usage: {USAGE}")
    if r.prompts and r.dataset:
        raise UserError(f"--prompts={r.prompts} and --dataset={r.dataset} are both prompts; give one of them")
    for name in () if r.dataset else ("dataset_path", "dataset_revision", "split"):
        if getattr(r, name):
            raise UserError(f"--{name}={getattr(r, name)} has no meaning without --dataset; leave it out")
    if r.overwrite and not r.out:
        raise UserError("--overwrite has no meaning without --out; leave it out")
    if r.out:
        check_out(r.out, r.prompts)


def check_out(out: str, prompts: str) -> None:
    """Refuse, with a UserError, an --out that cannot be written or is the file of the prompts."""
    path = Path(out)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out={out} cannot be written; choose a file in a directory that is there and writable")
    if prompts and path.exists() and Path(prompts).exists() and path.samefile(prompts):
        raise UserError(f"--out={out} is the file of the prompts; choose another one")


_ABOUT = (
    "Answers prompts with a model, many at once. The same command resumes a file that was not finished; the file then "
    "ends byte for byte as if it had never stopped. Without --prompts on a terminal, prompts are typed. "
    "docs/sampling.md has the forms of prompts and answers."
)


def help_text(usage: str, about: str, table: Mapping[str, Mapping[str, Flag]]) -> str:
    """What `--help` prints of a command: its flags in groups."""
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, 118)]
    for title, group in table.items():
        lines.append(f"\n{title}")
        for name, flag in group.items():
            default = "" if isinstance(flag.default, bool) or flag.several else flag.default
            shown = f"--{name}" + ("" if isinstance(flag.default, bool) else f"={default}")
            lines += textwrap.wrap(f"{shown}: {flag.meaning}", 118, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def is_typed(r: Request) -> bool:
    """Whether prompts are typed on a terminal."""
    return r.prompts in ("", "-") and not r.dataset and sys.stdin is not None and sys.stdin.isatty()
