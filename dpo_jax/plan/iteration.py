"""An iteration of RL on slices that are not there: answers are drawn and scored, and an update is made.

Each part is a program that is compiled: the sampler's with the parameters as they are trained, a forward pass for a
reward model of the policy's size, and the step.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.config.settings import Settings
from dpo_jax.model.config import ModelConfig
from dpo_jax.parallel.mesh import row_shards
from dpo_jax.plan.compile import held_by
from dpo_jax.plan.draft import Draft
from dpo_jax.plan.lengths import Lengths
from dpo_jax.plan.request import SampleRequest
from dpo_jax.plan.sampling import draft_sampling, estimate_sampling
from dpo_jax.sampling.params import SamplingParams


def estimate_iteration(s: Settings, model: ModelConfig, draft: Draft, lengths: Lengths, step: Mapping[str, Any]) -> Any:
    """What an iteration takes at the bounds, see `text.iteration_lines`; None where a part of it does not fit alone.

    Args:
      step: the report of its update.
    """
    if not step["fits"]:
        return None
    means = np.asarray(lengths.lengths, float).mean(0)
    prompt, answer = max(1, round(means[0])), float(means[1:].mean())
    answers, shards = s.batch.size * s.rl.minibatches * s.rl.n, row_shards(draft.layout.mesh)
    asked = SamplingParams(n=s.rl.n, temperature=s.rl.temperature, top_p=s.rl.top_p, max_tokens=s.rl.options.max_tokens)
    request = SampleRequest(0, prompt, asked, parameters="training")
    sampler = draft_sampling(s, model, draft.topology, request)
    if sampler.rows > answers:  # an iteration has no more
        sampler = sampler.with_rows(-(-answers // shards))
    sampling = estimate_sampling(sampler)
    if "seconds_per_token" not in sampling:
        return None
    drawing = answers * answer / sampling["tokens_per_second_with_prefill"]
    scoring = s.batch.size * s.rl.minibatches / step["evaluation_pairs_per_second"]
    update = s.rl.updates * s.batch.size / step["pairs_per_second"]
    memory = held_by(draft)
    memory["reward model"] = memory["parameters"] * draft.layout.dtype.itemsize / draft.layout.param_dtype.itemsize
    cache = sampling["memory"]
    memory["cache"] = cache["prompts"] + cache["pages"]
    memory["temporaries"] = cache["temporaries"]
    memory["total"] = sum(memory.values())
    return {
        "prompts": s.batch.size * s.rl.minibatches,
        "n": s.rl.n,
        "answer": answer,
        "seconds": {"drawing": drawing, "scoring": scoring, "updating": update},
        "answers_per_second": answers / (drawing + scoring + update),
        "memory": memory,
        "hbm_available": draft.topology.generation.hbm_bytes,
        "fits": memory["total"] <= draft.topology.generation.hbm_bytes,
        "sampling": sampling,
    }
