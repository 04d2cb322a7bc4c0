"""Answers of the policy to held-out prompts, before and after training."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.records.writer import MetricsWriter
from dpo_jax.rows.build import GroupSource
from dpo_jax.sampling.params import Answer


def sample_records(
    tokenizer: Any, pairs: GroupSource, answers: Mapping[str, Sequence[Sequence[Answer]]]
) -> list[dict[str, Any]]:
    """Records with `mode`, `prompt`, `answer`, `chosen`, `rejected`.

    Args:
      pairs: whose prompts were answered; their own answers stand beside.
      answers: to each prompt, by how tokens were chosen.
    """
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()
    records = []
    for mode, drawn in answers.items():
        for i, (answer, *_) in enumerate(drawn):
            prompt, chosen, rejected = pairs[i]
            theirs = {"chosen": text(chosen), "rejected": text(rejected)}
            records.append({"mode": mode, "prompt": text(prompt), "answer": answer.text.strip()} | theirs)
    return records


def show_answers(records: Sequence[Mapping[str, Any]], writer: MetricsWriter) -> None:
    """Print the greedy answers before and after, side by side."""
    greedy = [r for r in records if r["mode"] == "greedy"]
    before, after = ({r["prompt"]: r["answer"] for r in greedy if r["when"] == when} for when in ("before", "after"))
    rows = [(prompt, before[prompt], after[prompt]) for prompt in before if prompt in after]
    if rows:
        writer.console.side_by_side("Answers (greedy)", ("prompt", "before", "after"), rows)
