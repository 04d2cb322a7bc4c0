"""Win rates at evaluations: the policy's answers against a baseline's, under a judge.

The baseline is the policy as it was when the phase began, whose answers are kept in baseline.jsonl, or a file of
answers. Both are drawn with the same random numbers: where two policies are equal, so are their answers, and that is a
tie.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.config.judges import GOLD
from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.data.originals import originals
from dpo_jax.disk import write_whole
from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.preference.load import load_preference_model
from dpo_jax.preference.models import PreferenceModel, swapped
from dpo_jax.preference.statistics import win_rate
from dpo_jax.records.records import read_records
from dpo_jax.sampling.engine import AnswerRequest
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.training.inputs import sources_of
from dpo_jax.training.on_policy import asked_once
from dpo_jax.training.own_answers import Drawn, Measure
from dpo_jax.training.setup import Run

BASELINE = "baseline.jsonl"


@dataclasses.dataclass
class Contest:
    """What is asked of the policy and of the judge.

    Attributes:
      judge: whose verdicts count.
      prompts: token ids, and `asked` the conversations that they are.
      baseline: an answer's text to each; None: what the policy answers at the first evaluation.
    """

    judge: PreferenceModel
    prompts: Sequence[Sequence[int]]
    asked: Sequence[Comparison]
    baseline: Sequence[str] | None


def make_contest(run: Run, *, begins: bool) -> Contest | None:
    """What the policy's answers are compared with; None where there is no judge, or nothing is held out.

    Args:
      begins: the phase has not begun before: else the answers of its first evaluation are kept.

    Raises:
      UserError: the judge cannot be loaded, or the baseline lacks an answer.
    """
    s = run.settings
    if not s.judge or not s.win_rate_prompts or not len(run.data.evaluation):
        return None
    if s.judge == GOLD and s.data.dataset != "synthetic":
        run.writer.message(f"judge={GOLD} judges answers to the dataset synthetic alone: there is no win rate")
        return None
    places = originals(run.data.evaluation, sources_of(s, run.workdir), s.win_rate_prompts)
    if not places:
        raise UserError(
            f"judge={s.judge}: no held-out prompt is a conversation that a judge can be shown; leave the judge out"
        )
    prompts = [run.data.evaluation[place][0].tolist() for place, _ in places]
    asked = [one.comparison for _, one in places]
    judge = load_preference_model(s.judge)
    return Contest(judge, prompts, asked, _baseline(run, asked, begins=begins))


def _baseline(run: Run, asked: Sequence[Comparison], *, begins: bool) -> list[str] | None:
    """An answer to each prompt, of the file that is named or of the policy as it began, if it has."""
    s, kept = run.settings, run.workdir / BASELINE
    if s.win_rate_baseline:
        return answers_in(Path(s.win_rate_baseline).expanduser(), [one.prompt_conversation for one in asked])
    if begins:
        return None
    if not kept.is_file():
        raise UserError(f"{kept} is gone, the answers that this run began with; put it back, or begin the run anew")
    return answers_in(kept, [one.prompt_conversation for one in asked])


def _keep_baseline(run: Run, asked: Sequence[Comparison], texts: Sequence[str]) -> None:
    lines = [
        json.dumps({"prompt": list(one.prompt_conversation), "answers": [{"text": text}]}, ensure_ascii=False)
        for one, text in zip(asked, texts, strict=True)
    ]
    if jax.process_index() == 0:
        write_whole(run.workdir / BASELINE, "\n".join(lines) + "\n")


def answers_in(path: Path, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """The first answer to each conversation in a file of `python -m dpo_jax.sample`; a prompt of text is a user's turn.

    Raises:
      UserError: the file cannot be read, or has no answer to one of them.
    """
    if not path.is_file():
        raise UserError(f"win_rate_baseline={path}: there is no such file; make it with python -m dpo_jax.sample")
    found: dict[str, str] = {}
    for record in read_records(path):
        prompt, answers = record.get("prompt"), record.get("answers")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        first = answers[0] if isinstance(answers, list) and answers else None
        if isinstance(first, dict) and isinstance(first.get("text"), str):
            found.setdefault(json.dumps(turns, sort_keys=True), first["text"])
    keys = [json.dumps(list(one), sort_keys=True) for one in conversations]
    missing = [i for i, key in enumerate(keys) if key not in found]
    if missing:
        said = str(conversations[missing[0]][-1].get("content"))
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(keys)} held-out prompts, first {said!r:.60}; answer the "
            "held-out prompts of this run, or leave win_rate_baseline empty"
        )
    return [found[key] for key in keys]


def win_rate_measures(run: Run, contest: Contest | None, *, begins: bool) -> list[Measure]:
    """`win_rate` of the policy over its baseline, its standard error `win_rate_error`, the share of ties,
    the comparisons without a verdict where there are any, and the mean length of its answers in characters.

    A judge that does not answer ends a run that `begins`; later it is told, and the record has no win rate: training
    goes on. Every process of several must call it.
    """
    if contest is None:
        return []
    held, strict = contest, begins

    def of(params: Params, reference: Params | None, updates: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        texts = [one[0].text.strip() for one in drawn[0]]
        if held.baseline is None:
            held.baseline = texts
            _keep_baseline(run, held.asked, texts)
        pairs = [
            dataclasses.replace(one, completion_a=_said(mine), completion_b=_said(theirs), texts=None)
            for one, mine, theirs in zip(held.asked, texts, held.baseline, strict=True)
        ]
        nonlocal strict
        beat("asking the judge", LONGER)
        try:
            both = [*pairs, *map(swapped, pairs)]
            found = asked_once(held.judge, len(both), lambda: held.judge(both))
        except UserError as error:
            if strict:
                raise
            run.writer.message(f"warning: no win rate at this evaluation: {error}")
            return {}
        rate = win_rate(found[: len(pairs)], found[len(pairs) :], np.arange(len(pairs)))
        if strict and not rate.comparisons:
            raise UserError(
                f"judge={held.judge.name}: no verdict on any of {len(pairs)} answers; is it a judge of this data?"
            )
        strict = False
        values: dict[str, Any] = {"win_rate": rate.rate, "win_rate_error": rate.error, "win_rate_ties": rate.ties}
        values |= {"no_verdict": rate.no_verdict} if rate.no_verdict else {}
        return values | {"answer_characters": float(np.mean([len(text) for text in texts]))}

    s = run.settings
    asked = SamplingParams(
        temperature=s.sample_temperature, top_p=s.sample_top_p, max_tokens=s.sample_tokens, seed=s.seed
    )
    return [Measure([AnswerRequest(held.prompts, asked)], of)]


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
