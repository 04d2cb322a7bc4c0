"""A model on its mesh as the step sees it: (parameters, one microbatch, widths) → log-probabilities by pair."""

import dataclasses

import flax.linen as nn
import jax

from dpo_jax.model.attention.dense import Slots
from dpo_jax.model.experts import Grouped
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.model.params import Params
from dpo_jax.model.placement import Layout
from dpo_jax.model.remat import to_device
from dpo_jax.model.sharding import axis_rules
from dpo_jax.objective.logps import Logps, LogpsFn, pair_logps
from dpo_jax.objective.token_logps import LogpOptions, on_platform


def logp_options(layout: Layout) -> LogpOptions:
    """How log-probabilities of this model are computed on these devices."""
    options = on_platform(layout.platform)
    return dataclasses.replace(options, softcap=layout.config.final_logit_softcapping)


def model_options(layout: Layout, *, remat: str, from_host: bool = False) -> ModelOptions:
    """How rows of this model are computed on these devices; see `ModelOptions`."""
    grouped = Grouped() if layout.platform == "tpu" else None
    return ModelOptions(layout.config, layout.dtype, remat, layout.tiling, from_host, layout.longest, grouped)


def logps_fn(
    layout: Layout,
    *,
    remat: str,
    ld_alpha: float = 1.0,
    log_sum_sq: bool = False,
    balance: bool = False,
    from_host: bool = False,
) -> LogpsFn:
    """The function of a model that the step is made with.

    `ld_alpha` as in `logps.pair_logps`, `log_sum_sq` as in `LogpOptions`; `balance`: with `Logps.balance`;
    `from_host`: the parameters are in the host's memory and come to the device a layer at a time.
    """
    rules = axis_rules(layout.config, layout.mesh)
    vocabulary = dataclasses.replace(logp_options(layout), log_sum_sq=log_sum_sq)
    model = model_options(layout, remat=remat, from_host=from_host)

    def logps_of(params: Params, micro: dict[str, jax.Array], slots: Slots) -> Logps:
        with nn.logical_axis_rules(rules):
            if from_host:
                params = params | to_device({name: p for name, p in params.items() if name != "layers"})
            hidden, sums = hidden_states(params, micro, slots, model, balance=balance)
            logps = pair_logps(
                hidden,
                micro,
                unembedding(params),
                slots=slots,
                pairs_per_row=micro["is_pair"].shape[-1],
                options=vocabulary,
                ld_alpha=ld_alpha,
            )
            return dataclasses.replace(logps, balance=sums)

    return logps_of
