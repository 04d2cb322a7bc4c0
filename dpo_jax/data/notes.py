"""What a reader of the counts should know of how rows became tokens: counted by source, said once in sentences."""

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.data.render import Rendered, Renderer

_UNREAD = "unread "
_SENTENCES = {
    "templated": "{n} prompts hold the tokenizer's own special tokens and are taken as text that is templated already "
    "(prompt_format=chat or plain would put them into a user's turn)",
    "templated_inside": "{n} prompts hold the tokenizer's own special tokens and stand in a user's turn, as the rows' "
    "messages or prompt_format={form} say; of rows of strings, prompt_format=auto takes them as text",
    "bos_twice": "{n} prompts begin with the token that the tokenizer puts before every text, which stands there twice "
    "then, as in TRL; take it out of the rows' text",
    "eos_twice": "{n} pairs have the end token twice in an answer, as in TRL, since blanks follow the one in the text "
    "or the tokenizer writes one itself; take the blanks out of the rows' text, or that rule out of the tokenizer",
}
_BOUNDARY = (
    "{n} prompts are no beginning of prompt and answer in tokens: completions begin where the tokens part, as in TRL, "
    "and the prompt's own end is left out, such as {end!r}"
)
_DAY = "the chat template writes a date: these token ids are of {day}; --config.template_date gives another"


@dataclass
class Notes:
    """The notes of one source's pairs."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    moved: int = 0
    left_out: str = ""  # the text of the first end of a prompt that was left out

    def add(self, renderer: Renderer, rendered: Rendered) -> None:
        self.counts.update(rendered.notes)
        if rendered.left_out:
            self.moved += 1
            self.left_out = self.left_out or renderer.tokenizer.decode(list(rendered.left_out))

    def entry(self) -> dict[str, Any]:
        """For the manifest."""
        return {"boundary_moved": self.moved, "left_out": self.left_out, "notes": dict(self.counts)}


def sentences(sources: Iterable[Mapping[str, Any]], form: str, day: str) -> list[str]:
    """What is to be said of the entries of a manifest's sources, a sentence for each kind of note.

    Args:
      form: the form of the pairs, for the reader.
      day: the date that the template writes, or empty.
    """
    counts: collections.Counter[str] = collections.Counter()
    moved, end = 0, ""
    for source in sources:
        counts.update(source["notes"])
        moved, end = moved + source["boundary_moved"], end or source["left_out"]
    said = [text.format(n=f"{counts[name]:,}", form=form) for name, text in _SENTENCES.items() if counts[name]]
    said += [
        f"{n:,} rows have {name.removeprefix(_UNREAD)}, of which the chat template writes nothing, as in TRL"
        for name, n in sorted(counts.items())
        if name.startswith(_UNREAD)
    ]
    if moved:
        said.append(_BOUNDARY.format(n=f"{moved:,}", end=end))
    return [*said, _DAY.format(day=day)] if day else said
