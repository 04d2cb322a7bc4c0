"""The one table of config keys, `keys.toml`: defaults, legal values, what each means and why a value is refused.

Checks, `--help`, `configs/common.py` and `docs/configuration.md` are made from it. A new key is an entry there.
"""

import dataclasses
import math
import operator
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.config.values import check_digits, check_name, parse_bind, parse_day, parse_options, parse_targets
from dpo_jax.data.forms.rename import parse_columns
from dpo_jax.errors import UserError
from dpo_jax.objective.rl_table import parse_kl, parse_unfinished
from dpo_jax.objective.table import parse_loss

Value = bool | int | float | str
# What a number may be unless its key says another bound: steps, tokens and devices are int32, all else float32.
LARGEST_INT, LARGEST_FLOAT, SMALLEST_FLOAT = 2**31 - 1, 3.4e38, 1.2e-38


@dataclasses.dataclass(frozen=True)
class Legal:
    """The values that a key may have.

    Attributes:
      words: what a value must be, with the reason in brackets where it is not plain.
      holds: whether a value is one; it may raise a UserError that says more than `words` can.
    """

    words: str = ""
    holds: Callable[[Any], bool] = lambda value: True


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
      name: on the command line `--config.NAME`.
      default: its value if nothing else is asked for; its type is the key's.
      meaning: what it is, with its unit.
      legal: the values that it may have; a tuple of texts is a choice of these.
      bounded: whether `legal` has its largest value.
      is_name: whether it is a text that names something: a file, a model, a project.
    """

    name: str
    default: Value
    meaning: str
    legal: Legal | tuple[str, ...] = Legal()
    bounded: bool = False
    is_name: bool = False

    @property
    def values(self) -> str:
        """The legal values in words."""
        if isinstance(self.legal, tuple):
            return ", ".join(self.legal)
        return self.legal.words or {bool: "True, False", int: "whole number", float: "number", str: "text"}[self.type]

    @property
    def type(self) -> type:
        return type(self.default)

    def check(self, value: Any) -> None:
        """Refuse a value of another type or one that is not legal.

        Raises:
          UserError: with what it must be.
        """
        given = f"{self.name}={value!r}"
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.type is bool):
            an = "an" if self.type is int else "a"
            raise UserError(f"{given}: must be {an} {self.type.__name__}, such as {self.default!r}")
        if self.is_name:
            check_name(self.name, str(value))
        elif isinstance(value, str):
            check_digits(given, value)
        elif isinstance(value, int | float):
            self._check_size(value)
        if isinstance(self.legal, tuple):
            if value not in self.legal:
                raise UserError(f"{given} does not exist; choose from {', '.join(self.legal)}")
        elif not self.legal.holds(value):
            raise UserError(f"{given}: must be {self.legal.words}")

    def _check_size(self, value: float) -> None:
        """Refuse a number that is another one, or none, in the arithmetic that it is for."""
        given = f"{self.name}={value if isinstance(value, float) or abs(value) < 10**30 else 'a huge number'}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{given}: must be finite")
        largest = LARGEST_INT if self.type is int and not self.bounded else LARGEST_FLOAT
        if abs(value) > largest:
            raise UserError(f"{given}: must be at most {largest:.10g}")
        if self.type is float and 0 < abs(value) < SMALLEST_FLOAT:
            raise UserError(f"{given}: would be 0 in float32; use 0, or at least {SMALLEST_FLOAT:.3g}")


def named_model(text: str) -> str:
    """A model's name, which must not be empty."""
    if not text:
        raise UserError("model is empty; name a Hugging Face id, a directory, or tiny")
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {
    parser.__name__: parser
    for parser in (
        named_model,
        parse_bind,
        parse_columns,
        parse_day,
        parse_kl,
        parse_loss,
        parse_options,
        parse_targets,
        parse_unfinished,
    )
}
_BOUNDS = {"least": operator.ge, "above": operator.gt, "most": operator.le, "below": operator.lt}


def legal_values(entry: Mapping[str, Any]) -> Legal | tuple[str, ...]:
    """The legal values of an entry of `keys.toml`, as its first lines explain them."""
    if "choices" in entry:
        return tuple(entry["choices"])
    if "parser" in entry:
        parse = _PARSERS[entry["parser"]]
        return Legal(entry["must_be"], lambda text: parse(text) is not None)
    bounds = [(_BOUNDS[name], entry[name]) for name in _BOUNDS if name in entry]
    holds = lambda value: value == entry.get("also") or all(compare(value, bound) for compare, bound in bounds)
    return Legal(entry.get("must_be", ""), holds)


def _sections() -> dict[str, tuple[Key, ...]]:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {title: tuple(_key(*item) for item in entries.items()) for title, entries in table.items()}


def _key(name: str, entry: Mapping[str, Any]) -> Key:
    default, bounded = entry["default"], "below" in entry or "most" in entry
    names = "parser" not in entry or name in ("model", "columns")
    is_name = isinstance(default, str) and names and "choices" not in entry
    return Key(name, default, entry["meaning"], legal_values(entry), bounded, is_name)


SECTIONS = _sections()
KEYS: dict[str, Key] = {key.name: key for keys in SECTIONS.values() for key in keys}


def describe() -> str:
    """Every key with its default and its meaning, for `--help`."""
    lines = ["Keys of the config, --config.KEY=VALUE:"]
    for title, keys in SECTIONS.items():
        lines.append(f"\n{title}")
        for key in keys:
            lines += textwrap.wrap(
                f"{key.name}={key.default}: {key.meaning}", 118, initial_indent="  ", subsequent_indent="      "
            )
    return "\n".join(lines)
