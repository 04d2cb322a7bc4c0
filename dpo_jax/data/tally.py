"""What becomes of a source's rows: counts by form, by reason and by column."""

import collections
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip
from dpo_jax.data.forms.families import Form
from dpo_jax.data.forms.reader import Read
from dpo_jax.data.lengths import PARTS
from dpo_jax.data.notes import Notes
from dpo_jax.data.pairing import Pairing
from dpo_jax.data.sources import Source
from dpo_jax.errors import escaped

_NAME, _EXAMPLE = 100, 1000  # characters that are kept of a column's name, of a bad row's detail
_OWN_FUNCTION = "a function of one's own"


@dataclass
class Tally:
    """Counts of one source's rows, and the first bad row of each reason. `bad_rows` has all of them."""

    source: Source
    bad_rows: IO[str]
    read: int = 0
    kept: int = 0
    notes: Notes = field(default_factory=Notes)
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    truncated: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, str] = field(default_factory=dict)
    forms: collections.Counter[int] = field(default_factory=collections.Counter)  # rows by the form's id
    by_id: dict[int, Form] = field(default_factory=dict)
    to_template: collections.Counter[str] = field(default_factory=collections.Counter)
    several_turns: int = 0
    seen: set[str] = field(default_factory=set)  # columns, where the user named some
    pairing: Pairing = field(default_factory=Pairing)

    def drop(self, location: str, skip: Skip, row: Any) -> None:
        """Count a row that gives no pair; a bad one is written down, too."""
        self.dropped[skip.reason] += 1
        if skip.deliberate:
            return
        self.examples.setdefault(skip.reason, f"{location}: {skip.detail}" if skip.detail else location)
        line = {"location": location, "reason": skip.reason, "detail": skip.detail, "row": row}
        self.bad_rows.write(json.dumps(line, default=str) + "\n")

    def pairs(self, location: str, row: Mapping[str, Any], read: Read) -> list[LabeledComparison]:
        """The pairs that a row gives, or completes; what it does not give is counted, a bad reason once a row."""
        form, outcomes = read
        if form is not None:
            self.by_id.setdefault(id(form), form)
            self.forms[id(form)] += 1
        if self.source.spec.columns:
            self.seen.update(row)
        found: list[LabeledComparison] = []
        reasons: set[str] = set()
        for one in outcomes:
            matched = self.pairing.add(one) if isinstance(one, RatedAnswer) else one
            if isinstance(matched, Skip):
                if matched.deliberate or matched.reason not in reasons:
                    self.drop(location, matched, row)
                reasons.add(matched.reason)
            elif matched is not None:
                found.append(matched)
        return found

    def keep(self, pair: LabeledComparison) -> None:
        """Count a pair that is trained on, and what it gives to the chat template beside texts."""
        self.kept += 1
        comparison = pair.comparison
        answers = (comparison.completion_a, comparison.completion_b)
        self.several_turns += any(len(answer) > 1 for answer in answers)
        if comparison.tools:
            self.to_template["tools"] += 1
        for name in comparison.chat_template_kwargs or ():
            self.to_template[f"chat_template_kwargs.{name}"] += 1
        keys: set[str] = set()
        for part in (comparison.prompt_conversation, *answers):
            for message in part:
                if len(message) > 2:
                    keys.update(message)
        self.to_template.update(keys - {"role", "content"})

    def end(self) -> None:
        """Count the rated answers that no other was found for."""
        if left := self.pairing.unpaired():
            self.dropped["unpaired"] += left

    def entry(self, start: int) -> dict[str, Any]:
        """For the manifest; `start` is the cache's first pair of this source.

        All that files say of themselves, names of columns too, is text here that pages and terminals can show.
        """
        return {
            "name": escaped(self.source.name),
            "split": self.source.split,
            "files": [escaped(path) for path in self.source.files],
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "truncated": {part: self.truncated[part] for part in PARTS},
            **self.notes.entry(),
            "forms": self._forms(),
            "to_template": _shown(self.to_template),
            "unused": self._unused(),
            "answers_of_several_turns": self.several_turns,
            "examples": {reason: escaped(text[:_EXAMPLE]) for reason, text in self.examples.items()},
            "start": start,
            "stop": start + self.kept,
        }

    def _forms(self) -> list[dict[str, Any]]:
        """Each form with its rows, and what its columns, by the names in the file, were read as."""
        old = {new: name for name, new in self.source.spec.columns.names.items()}
        merged: dict[tuple[str, tuple[tuple[str, str], ...]], int] = collections.Counter()
        for key, rows in self.forms.items():
            form = self.by_id[key]
            beside = {name: _BESIDE.get(name, "a system turn") for name in form.beside}
            reads = {escaped(old.get(name, name)): what for name, what in {**form.reads, **beside}.items()}
            merged[form.name, tuple(reads.items())] += rows
        known = [{"form": name, "rows": rows, "reads": dict(reads)} for (name, reads), rows in merged.items()]
        rest = self.read - sum(self.forms.values())
        if not known and rest and ":" in self.source.parser:
            known.append({"form": _OWN_FUNCTION, "rows": rest, "reads": {}})
        return sorted(known, key=lambda form: -int(form["rows"]))

    def _unused(self) -> dict[str, int]:
        """Columns that no form reads, with the rows that have them."""
        unused: collections.Counter[str] = collections.Counter()
        for key, rows in self.forms.items():
            form = self.by_id[key]
            for name in (*form.harmless, *form.suspicious):
                unused[str(name)] += rows
            for name in self.source.spec.columns.ignored:
                unused[name] += rows
        return _shown(unused)


def _shown(counts: collections.Counter[str]) -> dict[str, int]:
    """Counts by name, the highest first, with names as they can be shown: two may become one."""
    shown: collections.Counter[str] = collections.Counter()
    for name, number in counts.items():
        shown[escaped(name[:_NAME])] += number
    return dict(shown.most_common())


_BESIDE = {
    "history": "earlier turns",
    "tools": "tools of the template",
    "functions": "tools of the template",
    "chat_template_kwargs": "arguments of the template",
}
