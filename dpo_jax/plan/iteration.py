"""An iteration of RL, or a round of on-policy preferences, on slices that are not there: draw, score, update.

Each part is a program that is compiled: the sampler's with the parameters as they are trained, a forward pass for a
reward model of the policy's size, and the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.config.settings import Settings
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.placement import abstract_whole
from dpo_jax.parallel.mesh import row_shards
from dpo_jax.plan.compile import held_by, local_bytes
from dpo_jax.plan.draft import Draft
from dpo_jax.plan.lengths import Lengths
from dpo_jax.plan.request import SampleRequest
from dpo_jax.plan.sampling import draft_sampling, estimate_sampling
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.training.rounds import BLOCK


@dataclass(frozen=True)
class Work:
    """What is done again and again.

    Attributes:
      name: of it, "iteration" or "round".
      prompts: that are answered, each as `asked` says; so many `at_once`.
      groups: that the evaluation's program takes for all answers: one of all n, or pairs of them.
      updates: made of the answers.
      asked: of the sampler.
    """

    name: str
    prompts: int
    at_once: int
    groups: float
    updates: int
    asked: SamplingParams


def work_of(s: Settings, steps: int) -> Work | None:
    """What a run of so many updates does in turns; None: it trains on the pairs that it is given."""
    if s.task == "rl":
        prompts = s.batch.size * s.rl.minibatches
        asked = SamplingParams(
            n=s.rl.n, temperature=s.rl.temperature, top_p=s.rl.top_p, max_tokens=s.rl.options.max_tokens
        )
        return Work("iteration", prompts, prompts, prompts, s.rl.updates, asked)
    if not s.rounds.count:
        return None
    asked = SamplingParams(n=s.rounds.n, temperature=s.rounds.temperature, max_tokens=s.data.max_completion_length)
    groups = s.rounds.prompts * s.rounds.n / 2
    at_once = min(BLOCK, s.rounds.prompts)
    return Work("round", s.rounds.prompts, at_once, groups, -(-steps // s.rounds.count), asked)


def estimate_iteration(s: Settings, model: ModelConfig, draft: Draft, lengths: Lengths, step: Mapping[str, Any]) -> Any:
    """What an iteration or a round takes at the bounds, see `text.iteration_lines`.

    None where the run has none, or a part of it does not fit alone.

    Args:
      step: the report of its update.
    """
    work = work_of(s, draft.steps)
    if work is None or not step["fits"]:
        return None
    means = np.asarray(lengths.lengths, float).mean(0)
    prompt, answer = max(1, round(means[0])), float(means[1:].mean())
    answers, shards = work.prompts * work.asked.n, row_shards(draft.layout.mesh)
    request = SampleRequest(0, prompt, work.asked, parameters="training")
    sampler = draft_sampling(s, model, draft.topology, request)
    if sampler.rows > (at_once := work.at_once * work.asked.n):  # there are no more
        sampler = sampler.with_rows(-(-at_once // shards))
    sampling = estimate_sampling(sampler)
    if "seconds_per_token" not in sampling:
        return None
    prefill, cache = sampling["prefill"], sampling["memory"]
    of_prompts = work.prompts * prompt * prefill["seconds"] / prefill["tokens"]
    seconds = {
        "drawing": answers * answer * sampling["seconds_per_token"] + of_prompts,
        "scoring": work.groups / step["evaluation_pairs_per_second"],
        "updating": work.updates * s.batch.size / step["pairs_per_second"],
    }
    if s.task == "rl" and work.updates > 1:  # a pass for the log-probabilities of the policy that drew
        seconds["old log-probabilities"] = work.updates * s.batch.size / step["evaluation_pairs_per_second"]
    memory = held_by(draft)
    memory["reward model"] = local_bytes(abstract_whole(sampler.layout, draft.layout.dtype))
    memory["cache"] = cache["prompts"] + cache["pages"]
    held = cache["weights"] + memory["cache"]
    memory["temporaries"] = max(cache["temporaries"], prefill["temporaries"], cache["moving"] - held)
    memory["total"] = sum(memory.values())
    return {
        "name": work.name,
        "prompts": work.prompts,
        "n": work.asked.n,
        "updates": work.updates,
        "answer": answer,
        "seconds": seconds,
        "answers_per_second": answers / sum(seconds.values()),
        "memory": memory,
        "hbm_available": draft.topology.generation.hbm_bytes,
        "fits": memory["total"] <= draft.topology.generation.hbm_bytes,
        "sampling": sampling,
    }
