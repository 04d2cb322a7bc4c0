"""What is measured and shown of the policy's own answers; those of one evaluation are drawn in one call.

Answers are asked for by what measures them: the KL divergence, the win rate, the samples that a run keeps. An answer is
the same whatever else is drawn with it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.split import Pairs
from dpo_jax.model.config import Params
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.sampling import answers, divergence
from dpo_jax.sampling.engine import AnswerRequest
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.training.setup import Run

MODES = ("greedy", "sampled")  # of the answers that a run keeps
FAR = 1.0  # nats a token between own and chosen answers, from which the data is called far from the policy
Drawn = Sequence[Sequence[Answer]]  # to each prompt of a request


@dataclasses.dataclass(frozen=True)
class Measure:
    """Something that is known from the policy's answers.

    Attributes:
      requests: the answers that it needs.
      of: (parameters, reference, updates done, answers to each request) → values of an `eval` record.
      needs_reference: it is left out where there is none.
    """

    requests: Sequence[AnswerRequest]
    of: Callable[[Params, Params | None, int, Sequence[Drawn]], dict[str, Any]]
    needs_reference: bool = False


def measure_answers(
    run: Run, params: Params, reference: Params | None, updates: int, measures: Sequence[Measure]
) -> dict[str, Any]:
    """The values of all measures. Every process of several must call it.

    Evaluations with the same measures ask for the same, so that they run the same programs and a run that goes on has
    the numbers of one that was never stopped.
    """
    measures = [one for one in measures if reference is not None or not one.needs_reference]
    requests = [request for one in measures for request in one.requests]
    if not requests:
        return {}
    beat("drawing the policy's answers", LONGER)
    drawn = run.sampler.together(run.base | params, requests)
    values: dict[str, Any] = {}
    for one in measures:
        values |= one.of(params, reference, updates, drawn[: len(one.requests)])
        drawn = drawn[len(one.requests) :]
    return values


def kl_measures(run: Run) -> list[Measure]:
    """The KL divergence of the policy's answers from the reference, see `divergence.py`.

    None where there is no reference on the devices to ask: a loss without one, one that was computed before and is
    freed, or one in the host's memory.
    """
    s, held_out, base = run.settings, run.data.evaluation, run.base
    pairs = dataclasses.replace(held_out, index=held_out.index[: s.kl_prompts])
    if not len(pairs) or run.layout.options.reference_offload:
        return []
    prompts = [pairs[i][0].tolist() for i in range(len(pairs))]
    request = divergence.kl_request(prompts, new_tokens=s.sample_tokens, seed=s.seed)
    estimate = divergence.make_on_policy_kl(run.layout, request)

    def of(params: Params, reference: Params | None, updates: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        assert reference is not None
        logps = [answer.full_logprobs for answers in drawn[0] for answer in answers if answer.full_logprobs]
        own = {"own_logp_per_token": float(np.mean([np.mean(one) for one in logps]))} if logps else {}
        return estimate(base | params, base | reference, drawn[0]) | own

    return [Measure([request], of, needs_reference=True)]


def off_policy_words(values: Mapping[str, Any]) -> str | None:
    """How likely the policy finds the data's answers against its own, before any update; None where it is not known."""
    own, chosen, rejected = (values.get(f"{name}_logp_per_token") for name in ("own", "chosen", "rejected"))
    if own is None or chosen is None or rejected is None:
        return None
    words = (
        f"nats a token, before any update: {own:.2f} for the policy's own answers, {chosen:.2f} for chosen ones, "
        f"{rejected:.2f} for rejected ones"
    )
    if own - chosen < FAR:
        return words
    return (
        f"warning: {words}: it would hardly ever say what it is to learn from; begin with light SFT "
        "(--config.sft_steps) or train on its own answers (--config.rounds, docs/collecting.md)"
    )


def sample_measures(run: Run, steps: int) -> list[Measure]:
    """Answers to the first held-out prompts, greedy and drawn; no values.

    Those before training and after all its `steps` are appended to samples.jsonl.
    """
    s, shown = run.settings, _shown(run)
    if not len(shown):
        return []
    greedy = SamplingParams(temperature=0.0, max_tokens=s.sample_tokens, seed=s.seed)
    drawn_at = dataclasses.replace(greedy, temperature=s.sample_temperature, top_p=s.sample_top_p)
    modes = dict(zip(MODES, (greedy, drawn_at), strict=True))
    prompts = [shown[i][0].tolist() for i in range(len(shown))]

    def of(params: Params, reference: Params | None, updates: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        when = {0: "before", steps: "after"}.get(updates)
        if when is None:
            return {}
        records = answers.sample_records(run.policy.tokenizer, shown, dict(zip(modes, drawn, strict=True)))
        run.writer.samples([{"when": when, "step": updates} | r for r in records])
        return {}

    return [Measure([AnswerRequest(prompts, asked) for asked in modes.values()], of)]


def final_samples(run: Run) -> int:
    """How many records samples.jsonl has of the answers after training, when all are there."""
    return len(MODES) * len(_shown(run))


def _shown(run: Run) -> Pairs:
    """The pairs whose prompts are answered: the first that are held out, or else trained on."""
    pairs = run.data.evaluation if len(run.data.evaluation) else run.data.train
    return dataclasses.replace(pairs, index=pairs.index[: run.settings.sample_prompts])
