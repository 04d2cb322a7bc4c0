"""The conversations behind tokenised pairs: their rows are read again, as a cache holds token ids alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_jax.data.comparison import Comparison, LabeledComparison, RatedAnswer, Skip
from dpo_jax.data.containers import read_rows
from dpo_jax.data.raw import BadLine
from dpo_jax.data.sources import DataSources
from dpo_jax.data.split import Pairs


@dataclass(frozen=True)
class Original:
    """What a tokenised prompt is made of: a comparison with its conversation, and the row that this was read from."""

    comparison: Comparison
    row: Mapping[str, Any]


def originals(pairs: Pairs, data: DataSources, most: int) -> list[tuple[int, Original]]:
    """The first pairs of different prompts that have a conversation: their places in `pairs`, and what each is made of.

    Prompts that only a tokenizer can tell from their answers have none, and are left out.

    Args:
      pairs: tokenised, of a cache that was built from `data`.
      data: where its rows are.
      most: how many prompts.
    """
    seen: set[int] = set()
    chosen: list[int] = []
    for place, index in enumerate(pairs.index.tolist()):
        prompt = int(pairs.cache.prompt_hash[index])
        if prompt not in seen and len(chosen) < 2 * most:  # as some may have no conversation
            seen.add(prompt)
            chosen.append(place)
    return originals_at(pairs, data, chosen)[:most]


def originals_at(pairs: Pairs, data: DataSources, places: Sequence[int]) -> list[tuple[int, Original]]:
    """Those of these places whose prompt is a conversation, with what each is made of, see `originals`."""
    rows = _rows(pairs, data, places)
    return [(place, rows[place]) for place in places if place in rows and rows[place].comparison.prompt_conversation]


def _comparison(one: LabeledComparison | RatedAnswer) -> Comparison:
    if isinstance(one, LabeledComparison):
        return one.comparison
    return Comparison(one.prompt_conversation, one.completion, one.completion, one.tools, one.chat_template_kwargs)


def _rows(pairs: Pairs, data: DataSources, places: Sequence[int]) -> dict[int, Original]:
    """The row of each of these places, and its first pair."""
    wanted: dict[tuple[int, int], dict[int, list[int]]] = {}  # (source, file) → line → places
    for place in places:
        index = int(pairs.index[place])
        entries = pairs.cache.manifest["sources"]
        number = next(n for n, entry in enumerate(entries) if entry["start"] <= index < entry["stop"])
        file, line = map(int, pairs.cache.origin[index])
        wanted.setdefault((number, file), {}).setdefault(line, []).append(place)
    found: dict[int, Original] = {}
    for (number, file), lines in wanted.items():
        source, left = data.sources[number], set(lines)
        for location, row in read_rows(source.files[file]):
            line = int(location.rpartition(":")[2])
            if line not in left or isinstance(row, BadLine):
                continue
            left.remove(line)
            named = source.spec.columns.apply(row) if source.spec.columns else row
            read = [_comparison(one) for one in source.spec.read(named)[1] if not isinstance(one, Skip)]
            found |= {place: Original(read[0], row) for place in lines[line] if read}
            if not left:
                break
    return found
