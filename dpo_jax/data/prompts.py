"""Prompts to answer: from texts, messages, rows of prompts or of pairs.

A row of any accepted form of pairs gives its prompt; so does one with a prompt alone, whatever stands beside it.
"""

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip, checked
from dpo_jax.data.containers import read_rows
from dpo_jax.data.files import find_files, one_line, open_data
from dpo_jax.data.forms.alone import ANSWERS, of_equal_answers, read_alone, without_answers
from dpo_jax.data.forms.chosen import pair_of
from dpo_jax.data.forms.reader import Read, Reader, read_own
from dpo_jax.data.forms.rename import Columns, parse_columns
from dpo_jax.data.json_rows import bounded_lines, json_rows
from dpo_jax.data.raw import TOO_LONG, BadLine
from dpo_jax.data.sources import DataSources, Source, find_sources
from dpo_jax.data.tokenise import PLAINLY
from dpo_jax.disk import digest
from dpo_jax.errors import UserError

_WORDS = {"empty_prompt": "the prompt is empty or blank"}
TEXTS = ".txt"  # of a file with a prompt a line


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Attributes:
      id: as the row has it; None if it has none.
      number: of the line, or of the row, from 1; stands for the id where there is none.
      where: for messages.
      comparison: its prompt is what is answered; where only the tokenizer can tell it from the answers, these are real.
    """

    id: str | int | None
    number: int
    where: str
    comparison: Comparison

    @property
    def given(self) -> str | list[dict[str, Any]] | None:
        """The text, or the messages; None where only the tokenizer can tell the prompt from its answers."""
        texts, turns = self.comparison.texts, self.comparison.prompt_conversation
        if texts is not None:
            return texts[0] if turns else None
        return [dict(message) for message in turns]

    @property
    def name(self) -> str | int:
        """The id, or what stands for it."""
        return self.number if self.id is None else self.id


def prompt_of(value: str | Sequence[Mapping[str, Any]], number: int = 1, where: str = "") -> Prompt:
    """A prompt from a text or from messages.

    Raises:
      UserError: it says nothing, or is no conversation that a model can answer.
    """
    where = where or f"prompt {number}"
    pair = pair_of(value, *ANSWERS)
    return Prompt(None, number, where, _sound(pair, where))


def read_prompts(path: str, columns: str = "", limit: int = 0) -> list[Prompt]:
    """The prompts of a file, a glob or a directory; of a .txt file a prompt a line.

    Args:
      path: as for data of one's own.
      columns: new names of columns, see `parse_columns`.
      limit: the first so many; 0: all.

    Raises:
      UserError: nothing can be read, or a row is no prompt; with its line. An id is there twice.
    """
    return _listed(each_prompt(path, columns), limit, path)


def each_prompt(path: str, columns: str = "") -> Iterator[Prompt]:
    """The prompts that `read_prompts` reads, one at a time; ids may be there twice.

    Raises:
      UserError: nothing can be read; later, a row is no prompt.
    """
    renamed, files = parse_columns(columns), find_files(path)
    prompts = _rows_of_files(files, renamed)
    # Lines do not tell the rows of several files apart.
    return prompts if len(files) == 1 else (replace(one, number=at) for at, one in enumerate(prompts, 1))


def _rows_of_files(files: Sequence[str], renamed: Columns) -> Iterator[Prompt]:
    seen: set[str] = set()
    for file in files:
        if file.endswith(TEXTS):
            yield from _lines_of_file(file)
            continue
        for where, row in read_rows(file):
            if not isinstance(row, BadLine):
                seen.update(row)
            yield _prompt_in(row, where, renamed)
    if seen and (absent := renamed.absent(seen)):
        raise UserError(
            f"columns: no row has a column {absent[0]}; found {', '.join(n[:40] for n in sorted(seen)[:20])}"
        )


def prompts_in(content: bytes, columns: str = "", limit: int = 0, name: str = "standard input") -> list[Prompt]:
    """The prompts of a stream's content: rows as JSON, or a text a line.

    Raises:
      UserError: as `read_prompts` does.
    """
    renamed = parse_columns(columns)
    if content.lstrip()[:1] not in (b"{", b"["):
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 ({error})") from None
        return _listed(_lines_of_text(text, name), limit, name)
    try:
        rows = json_rows(io.BytesIO(content))
        return _listed((_prompt_in(row, f"{name}:{at}", renamed) for at, row in rows), limit, name)
    except ValueError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None


def dataset_prompts(
    dataset: str, path: str = "", split: str = "", *, columns: str = "", revision: str = "", limit: int = 0
) -> tuple[list[Prompt], list[str]]:
    """The prompts of a dataset's split, and what is to be said of it; rows without one are left out.

    Args:
      dataset, path, columns, revision: as for training, see `find_sources`.
      split: train or test (of a `hf:` dataset: any split of its own); empty: test if there is one, else train.
      limit: the first so many; 0: all.

    Raises:
      UserError: there is no such dataset or split, or no prompt in it.
    """
    found: list[Prompt] = []
    skipped: list[str] = []
    wanted, rows = split_prompts(dataset, path, split, columns=columns, revision=revision)
    for one in rows:
        if isinstance(one, Prompt):
            found.append(one)
            if len(found) == limit:
                break
            continue
        skipped.append(one.detail)
        if not found and len(skipped) > PLAINLY:
            break
    if not found:
        raise UserError(f"{dataset}: no row gives a prompt{f'; first {skipped[0]}' if skipped else ''}")
    said = [f"{dataset}: {len(found):,} prompts of its {wanted} split"]
    if skipped:
        said.append(f"{dataset}: {len(skipped):,} rows give no prompt, first {skipped[0]}")
    if len({str(prompt.name) for prompt in found}) < len(found):  # several pairs of a prompt, each with its id
        said.append(f"{dataset}: ids are there twice, so the number of a prompt stands for its id")
        found = [replace(prompt, id=None) for prompt in found]
    return found, said


def split_prompts(
    dataset: str, path: str = "", split: str = "", *, columns: str = "", revision: str = "", default: str = "test"
) -> tuple[str, Iterator[Prompt | Skip]]:
    """The name of a dataset's split, and its prompts one at a time; for a row without one why, with its place.

    Args:
      dataset, path, split, columns, revision: see `dataset_prompts`.
      default: the split that an empty one means where there is one; else train.

    Raises:
      UserError: there is no such dataset or split.
    """
    own = split if dataset.startswith("hf:") and split not in ("train", "test") else ""
    sources = find_sources(dataset, path, "", own, columns=columns, revision=revision).sources
    there = sorted({source.split for source in sources})
    wanted = "train" if own else split or (default if default in there else "train")
    if wanted not in there:
        raise UserError(f"split={split}: {dataset} has {' and '.join(there)}")
    return split or wanted, _prompts_of([source for source in sources if source.split == wanted])


def _prompts_of(sources: Sequence[Source]) -> Iterator[Prompt | Skip]:
    count = 0
    for source, file in ((one, file) for one in sources for file in one.files):
        for where, row in read_rows(file):
            named = row if isinstance(row, BadLine) else source.spec.columns.apply(row)
            one = _read(named, source.spec.read)
            if isinstance(one, Skip):
                yield Skip(one.reason, str(prompt_refusal(where, one)))
                continue
            count += 1
            yield Prompt(_id_in(row, where), count, where, one)


def with_prompts(data: DataSources) -> DataSources:
    """The same rows, of which those of a prompt alone are read, too: as pairs whose answers stand for any.

    For what answers the prompts itself, and needs no pairs.
    """
    # A parser with a name, or of the user's own, answers for all of its rows.
    own = lambda source: source.spec.read is read_own
    return replace(data, sources=tuple(_with_prompts(one) if own(one) else one for one in data.sources))


def _with_prompts(source: Source) -> Source:
    def read(row: Mapping[str, Any]) -> Read:
        found = source.spec.read(row)
        if found[0] is not None:  # a pair's columns: what becomes of it is as in the stages that train on pairs
            return found
        form, outcomes = read_alone(row)
        if form is None:
            return found
        first = outcomes[0]
        return form, (first if isinstance(first, Skip) else LabeledComparison(without_answers(first), "A"),)

    return replace(source, spec=replace(source.spec, read=read))


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """What tells these prompts, in this order, from others."""
    parts = (
        json.dumps([p.name, p.id is None, p.given, p.comparison.tools, p.comparison.chat_template_kwargs, _whole(p)])
        for p in prompts
    )
    return digest(part.encode() + b"\n" for part in parts)


def _whole(prompt: Prompt) -> Any:
    """The texts that only a tokenizer can divide; None of any other prompt."""
    return prompt.comparison.texts if prompt.given is None else None


def _listed(prompts: Iterable[Prompt], limit: int, name: str) -> list[Prompt]:
    """The first prompts; refuses ids that are there twice."""
    found = list(itertools.islice(prompts, limit or None))
    if not found:
        raise UserError(f"{name}: no prompts in it; give a row or a line for each")
    seen: dict[str, Prompt] = {}
    for prompt in found:
        other = seen.setdefault(str(prompt.name), prompt)
        if other is not prompt:
            of = "" if None not in (prompt.id, other.id) else ", where the number of a row stands for its id"
            mend = "give every row an id of its own"
            raise UserError(f"{prompt.where}: the id {prompt.name!r} is that of {other.where} too{of}; {mend}")
    return found


def _lines_of_file(file: str) -> Iterator[Prompt]:
    try:
        with open_data(file) as stream:
            for at, line in enumerate(bounded_lines(stream), 1):
                if line is None:
                    raise UserError(f"{file}:{at}: this line {TOO_LONG}; a prompt is shorter")
                text = line.decode("utf-8-sig" if at == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield prompt_of(text, at, f"{file}:{at}")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); check the path") from None


def _lines_of_text(text: str, name: str) -> Iterator[Prompt]:
    lines = enumerate(text.split("\n"), 1)
    return (prompt_of(line.removesuffix("\r"), at, f"{name}:{at}") for at, line in lines if line.strip())


def _prompt_in(row: dict[str, Any] | BadLine, where: str, renamed: Columns) -> Prompt:
    named = renamed.apply(row) if renamed and not isinstance(row, BadLine) else row
    found = _read(named, read_own)
    if isinstance(found, Skip):
        raise prompt_refusal(where, found)
    return Prompt(_id_in(row, where), int(where.rpartition(":")[2]), where, found)


def _id_in(row: Mapping[str, Any] | BadLine, where: str) -> str | int | None:
    one = None if isinstance(row, BadLine) else row.get("id")
    if one is not None and (isinstance(one, bool) or not isinstance(one, str | int)):
        raise UserError(f"{where}: id is {one!r:.40}; needed is a text or a whole number")
    return one


def _read(row: Mapping[str, Any] | BadLine, reader: Reader) -> Comparison | Skip:
    """The prompt of a row, with answers that stand for any; why it has none."""
    if isinstance(row, BadLine):
        return Skip(row.reason, f"{row.reason.replace('_', ' ')}: {row.text[:60]!r}")
    read = reader(row)
    for one in read[1]:
        if not isinstance(one, Skip):
            return without_answers(one)
    if (found := of_equal_answers(row, read)) is not None:
        return found
    if reader is not read_own:
        return next(one for one in read[1] if isinstance(one, Skip))
    form, (first, *_) = read_alone(row)
    if form is None:  # no column that may be a prompt
        return (
            next(one for one in read[1] if isinstance(one, Skip))
            if read[0]
            else Skip("missing_column", _no_prompt(row))
        )
    return first if isinstance(first, Skip) else without_answers(first)


def _no_prompt(row: Mapping[str, Any]) -> str:
    columns = ", ".join(str(name)[:40] for name in list(row)[:30]) or "none"
    return (
        f"found {columns}; needed is prompt (text or messages), or a form of pairs (docs/data.md); "
        "--columns=prompt:NAME says which column it is"
    )


def _sound(pair: Any, where: str) -> Comparison:
    one = pair if isinstance(pair, Skip) else checked(pair)
    if isinstance(one, Skip):
        raise prompt_refusal(where, one)
    return without_answers(one)


def prompt_refusal(where: str, skip: Skip) -> UserError:
    """What is said of a prompt that cannot be answered, with its place."""
    said = _WORDS.get(skip.reason) or skip.detail or skip.reason.replace("_", " ")
    # The reader's hints name training's keys, which are flags of their own here.
    return UserError(f"{where}: {said.replace('--config.', '--')}")
