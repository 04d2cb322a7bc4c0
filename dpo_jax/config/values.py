"""Values of keys that are texts of several parts, read without JAX: for the checks, and for training."""

import datetime
import difflib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_jax.bucket.path import as_path
from dpo_jax.errors import UserError
from dpo_jax.parallel.address import host_and_port

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux and most of its file systems
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
# Hugging Face's names; where it has several of our projections in one, it names them all.
_ALIASES: dict[str, tuple[str, ...]] = {
    **{f"{name}_proj": (name,) for name in PROJECTIONS},
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    "all-linear": ("all",),
}


def parse_targets(text: str) -> tuple[str, ...]:
    """`all`, or projections by our names or Hugging Face's, with commas between → our names, each once.

    >>> parse_targets("q_proj,v")
    ('q', 'v')

    Raises:
      UserError: an unknown name.
    """
    known = ("all", *PROJECTIONS)
    targets: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in known and name not in _ALIASES:
            hint = "".join(f"did you mean {x}? " for x in difflib.get_close_matches(name, [*known, *_ALIASES], 1))
            raise UserError(
                f"lora_targets={text!r}: {name!r} is no projection; {hint}there are {', '.join(known)}, with or "
                "without _proj"
            )
        targets += _ALIASES.get(name, (name,))
    return tuple(dict.fromkeys(targets))


def parse_day(text: str) -> str:
    """A day as YYYY-MM-DD, or nothing.

    >>> parse_day("2026-07-26")
    '2026-07-26'

    Raises:
      UserError: it is no such day.
    """
    try:
        return text and datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise UserError(f"template_date={text!r}: must be a day such as 2026-07-26, or empty") from None


def parse_options(text: str) -> dict[str, str]:
    """`NAME=VALUE,NAME=VALUE` → compiler options; a UserError for what is not of this form."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not (name and equals and value) for name, equals, value in pairs):
        raise UserError(f"compiler_options={text!r}: must be NAME=VALUE,NAME=VALUE, such as xla_tpu_...=true")
    return {name.strip().lstrip("-"): value.strip() for name, _, value in pairs}


def check_name(what: str, name: str) -> None:
    """Refuse, with a UserError, a text that cannot name a file here, although it may name something else.

    Between two slashes (or the commas and bars of a list) a system takes `LONGEST_NAME` bytes, in all `LONGEST_PATH`.
    """
    if "\0" in name:
        raise UserError(f"{what}={name[:40]!r}: holds a NUL character, which no name may; leave it out")
    long = max((len(os.fsencode(part)) for part in re.split(r"[/,|]", name)), default=0)
    whole, shown = len(os.fsencode(name)), f"{what}={name[:40]}..."
    if long > LONGEST_NAME:
        raise UserError(f"{shown}: a name of {long:,} bytes, and systems take {LONGEST_NAME}; give a shorter one")
    if whole > LONGEST_PATH:
        raise UserError(f"{shown}: a path of {whole:,} bytes, and systems take {LONGEST_PATH}; give a shorter one")


def check_digits(what: str, text: str) -> None:
    """Refuse, with a UserError, digits other than 0 to 9: Python reads those of every script as numbers."""
    if other := [c for c in text if c.isdecimal() and not c.isascii()]:
        raise UserError(f"{what}: {other[0]!r} is a digit of another script; write it as {int(other[0])}")


def check_numbers(arguments: Sequence[str], is_number: Callable[[str], bool]) -> None:
    """Refuse numbers with other digits on a command line of `--NAME=VALUE` and `--NAME VALUE`; see `check_digits`.

    Args:
      is_number: of a flag's name, whether its value is a number.
    """
    for argument, after in itertools.pairwise([*arguments, ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and is_number(name):
            check_digits(f"--{name}={value if equals else after}", value if equals else after)


def parse_bind(text: str) -> tuple[str, int | None]:
    """Where the first of several processes listens: host (empty: everywhere) and port; None: no port is said."""
    return host_and_port("coordinator_bind", text) if text else ("", None)


def check_workdir(workdir: str | os.PathLike[str]) -> Path:
    """A run's directory: a local one, or gs://BUCKET/DIR; a UserError for what is neither."""
    check_name("workdir", str(workdir))
    try:
        return as_path(workdir)
    except UserError as error:
        raise UserError(f"workdir={error}") from None
