"""What the user says of a file's columns: `columns=prompt:question,chosen:better,notes:`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.data.forms.families import ANSWERS, PROMPTS
from dpo_jax.data.forms.fields import CARRIED
from dpo_jax.data.forms.ranked import LISTS, ONE_ANSWER, RATINGS
from dpo_jax.data.forms.ranked import SCORES as RANK_SCORES
from dpo_jax.data.forms.scores import SCORES
from dpo_jax.data.forms.winners import ENDINGS, STEMS, WINNERS
from dpo_jax.data.raw import ColumnarRow
from dpo_jax.errors import UserError

_COMMON = ("prompt", "chosen", "rejected", "system", "history", "tools", "response_a", "response_b", "winner")
# Every column that a form reads by its name.
KNOWN = frozenset(
    [
        *PROMPTS,
        *CARRIED,
        *WINNERS,
        *LISTS,
        *ONE_ANSWER,
        *RATINGS,
        *RANK_SCORES,
        "rejected_response",
        "rejected_messages",
    ]
    + [name for pair in (*ANSWERS, *SCORES) for name in pair]
    + [f"{stem}{join}{end}" for stem in STEMS for join in ("", "_") for ends in ENDINGS for end in ends]
    + [f"{name}_{end}" for name in ("score", "winner_model") for ends in ENDINGS for end in ends]
)


@dataclass(frozen=True)
class Columns:
    """New names of columns, columns that are left out, and how the messages of a file spell role and content.

    Attributes:
      names: a file's column -> the name that a form knows.
      ignored: columns of the file that nothing reads, because the user says so.
      turns: keys and roles of messages in the file's spelling -> ours; empty where they are as usual.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    turns: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.names or self.ignored or self.turns)

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under its new names; a column that had such a name before gives way."""
        new = {name: value for name, value in row.items() if name not in self.ignored and name not in self.names}
        for old, name in self.names.items():
            if old in row:
                new[name] = row[old]
        if self.turns:
            new = {name: self._spelt(value) for name, value in new.items()}
        return ColumnarRow(new) if isinstance(row, ColumnarRow) else new

    def absent(self, seen: Iterable[str]) -> list[str]:
        """Columns that were named and that no row has."""
        return sorted({*self.names, *self.ignored} - set(seen))

    def __str__(self) -> str:
        turns = [f"{theirs}={ours}" for theirs, ours in sorted(self.turns.items())]
        names = sorted(f"{name}={old}" for old, name in self.names.items())
        return ",".join([*names, *(f"{name}=" for name in sorted(self.ignored)), *turns])

    def _spelt(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._spelt(one) for one in value]
        if not isinstance(value, Mapping):
            return value
        turn = {self.turns.get(key, key): one for key, one in value.items()}
        who = turn.get("role")
        return turn | {"role": self.turns.get(f"role {who}", who)} if isinstance(who, str) else turn


NO_CHANGES = Columns()


def parse_columns(text: str) -> Columns:
    """What `NAME:COLUMN,COLUMN:` means: a form reads COLUMN as NAME; a COLUMN with nothing behind it is left out.

    >>> str(parse_columns("prompt:question, notes:"))
    'prompt=question,notes='

    UserError if it cannot be read, if no form has such a name, or if a name or column stands there twice.
    """
    names: dict[str, str] = {}
    ignored: list[str] = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        match = re.fullmatch(r"([^:]+):([^:]*)", part)
        if match is None:
            raise UserError(f"columns={text}: {part!r} is not NAME:COLUMN, as in prompt:question,chosen:better,notes:")
        name, column = (one.strip() for one in match.groups())
        if not column:
            ignored.append(name)
        elif name not in KNOWN:
            raise UserError(f"columns={text}: no form reads a column {name}; use one such as {', '.join(_COMMON)}")
        elif column in names or name in names.values():
            raise UserError(f"columns={text}: {column if column in names else name} stands there twice; name it once")
        else:
            names[column] = name
    if twice := sorted({*names} & {*ignored}):
        raise UserError(f"columns={text}: {twice[0]} is read and left out; choose one")
    return Columns(names, frozenset(ignored))
