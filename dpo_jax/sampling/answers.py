"""Answers of the policy to held-out prompts, before and after training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dpo_jax.model.config import Params
from dpo_jax.model.forward import ModelOptions
from dpo_jax.model.placement import Layout
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.rows.build import GroupSource
from dpo_jax.sampling.engine import Choice, generate


def answer_prompts(
    params: Params,
    pairs: GroupSource,
    tokenizer: Any,
    layout: Layout,
    *,
    modes: Mapping[str, Choice],
    stop: Sequence[int],
    new_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Answer the prompts of `pairs`.

    Args:
      params, tokenizer, layout: the policy's.
      pairs: whose prompts are answered; their own answers stand beside.
      modes: how tokens are chosen, by name.
      stop: token ids that end an answer.
      new_tokens: most tokens of an answer.
      seed: of the draws.

    Returns:
      Records with `mode`, `prompt`, `answer`, `chosen`, `rejected`.
    """
    shown = [pairs[i] for i in range(len(pairs))]
    model, records = ModelOptions(layout.config, layout.dtype), []
    for mode, choice in modes.items():
        prompts = [prompt.tolist() for prompt, _, _ in shown]
        answers = generate(params, prompts, model, stop=stop, new_tokens=new_tokens, choice=choice, seed=seed)
        for (prompt, chosen, rejected), ids in zip(shown, answers, strict=True):
            parts = {"prompt": prompt, "answer": ids, "chosen": chosen, "rejected": rejected}
            texts = {name: tokenizer.decode(x, skip_special_tokens=True).strip() for name, x in parts.items()}
            records.append({"mode": mode} | texts)
    return records


def append_samples(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records to samples.jsonl; only the first process does."""
    if jax.process_index() == 0:
        with path.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def show_answers(records: Sequence[Mapping[str, Any]], writer: MetricsWriter) -> None:
    """Print the greedy answers before and after, side by side."""
    greedy = [r for r in records if r["mode"] == "greedy"]
    before, after = ({r["prompt"]: r["answer"] for r in greedy if r["when"] == when} for when in ("before", "after"))
    rows = [(prompt, before[prompt], after[prompt]) for prompt in before if prompt in after]
    if rows:
        writer.console.side_by_side("Answers (greedy)", ("prompt", "before", "after"), rows)
