"""A model on its mesh as the step sees it: (parameters, one microbatch, row shape) → what is known of its groups.

That is the log-probabilities of their completions, or the scores that a reward model gives them.
"""

import dataclasses

import flax.linen as nn
import jax

from dpo_jax.model.config import Params
from dpo_jax.model.experts import Grouped
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.model.placement import Layout, axis_rules
from dpo_jax.model.remat import to_device
from dpo_jax.objective.logps import Logps, LogpsFn, TokenWeights, group_logps
from dpo_jax.objective.scores import group_scores
from dpo_jax.objective.token_logps import LogpOptions
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape


def logp_options(layout: Layout) -> LogpOptions:
    """The fastest way through this model's vocabulary on these devices."""
    # Forward and backward of 768 tokens over 49,152 by 576 on two cores: 444 ms in place of 605; 4096 were slower.
    block = 2048 if layout.platform == "cpu" else None
    return LogpOptions(block=block, softcap=layout.config.final_logit_softcapping)


def logps_fn(
    layout: Layout,
    *,
    remat: str,
    weights: TokenWeights | None = None,
    log_sum_sq: bool = False,
    balance: bool = False,
    from_host: bool = False,
    per_token: bool = False,
    temperature: float = 1.0,
) -> LogpsFn:
    """The function of a model that the step is made with.

    `weights` as in `group_logps`, `log_sum_sq` as in `LogpOptions`; `balance`: with `Logps.balance`;
    `from_host`: the parameters are in the host's memory and come to the device a layer at a time; `per_token`: with
    `Logps.of_tokens` and `entropy`; `temperature`: of the distribution that answers were drawn from.
    """
    rules = axis_rules(layout.config, layout.mesh)
    vocabulary = dataclasses.replace(
        logp_options(layout), log_sum_sq=log_sum_sq, entropy=per_token, temperature=temperature
    )
    model = _model_options(layout, remat, from_host)

    def logps_of(params: Params, micro: Batch[jax.Array], shape: RowShape) -> Logps:
        with nn.logical_axis_rules(rules):
            if from_host:
                params = params | to_device({name: p for name, p in params.items() if name != "layers"})
            hidden, sums = hidden_states(params, micro, shape, model, balance=balance)
            table = unembedding(params)
            logps = group_logps(hidden, micro, table, shape, options=vocabulary, weights=weights, per_token=per_token)
            return dataclasses.replace(logps, balance=sums)

    return logps_of


def scores_fn(layout: Layout, *, remat: str, pad: int | None, balance: bool = False) -> LogpsFn:
    """The function of a reward model that the step is made with; `pad` as in `group_scores`, `balance` as above."""
    rules, model = axis_rules(layout.config, layout.mesh), _model_options(layout, remat)

    def scores_of(params: Params, micro: Batch[jax.Array], shape: RowShape) -> Logps:
        with nn.logical_axis_rules(rules):
            hidden, sums = hidden_states(params, micro, shape, model, balance=balance)
            scores = group_scores(hidden, micro, params["score"], shape, pad)
            return dataclasses.replace(scores, balance=sums)

    return scores_of


def _model_options(layout: Layout, remat: str, from_host: bool = False) -> ModelOptions:
    grouped = Grouped() if layout.platform == "tpu" else None
    return ModelOptions(layout.config, layout.dtype, remat, layout.tiling, from_host, layout.options.longest, grouped)
