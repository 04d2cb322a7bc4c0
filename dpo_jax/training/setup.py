"""What the phases of a run share, and the pieces that its settings ask for: layout, models, optimiser, state, steps."""

import dataclasses
import functools
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax.bucket.local import cache_root
from dpo_jax.bucket.path import SCHEME, as_path
from dpo_jax.config.settings import ObjectiveOptions, OptimizerOptions, Settings
from dpo_jax.data.prepare import Prepared
from dpo_jax.disk import write_whole
from dpo_jax.model.config import Params
from dpo_jax.model.placement import Layout, abstract_trained
from dpo_jax.objective.logps import LogpsFn
from dpo_jax.objective.objective import (
    Objective,
    label_objective,
    ld_weights,
    preference_objective,
    reward_objective,
    sft_objective,
)
from dpo_jax.objective.policy_logps import logps_fn, scores_fn
from dpo_jax.parallel.mesh import host_shardings, replicated
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.rows.build import FirstOnly, GroupSource
from dpo_jax.sampling.engine import Sampler
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.optimizer import optimizer, rate_schedule
from dpo_jax.training.step import TrainState, init_state, make_eval_step, make_train_step
from dpo_jax.weights.find import Policy
from dpo_jax.weights.hub import ModelFiles

Models = tuple[LogpsFn, LogpsFn]  # the policy, and the reference with its parameters where they are kept


@dataclasses.dataclass(frozen=True)
class Run:
    """What the phases of a run share.

    Attributes:
      policy: the model to train; `layout` is it on the mesh, `models` it and the reference as the steps see them.
      reference_files: of the reference that the config names; None: the policy as DPO finds it.
      base: what is under the adapters, never trained; {} if all parameters are.
      stop: set by SIGTERM.
      done: updates, of SFT and DPO together, that the newest checkpoint holds.
    """

    settings: Settings
    workdir: Path
    policy: Policy
    layout: Layout
    reference_files: ModelFiles | None
    data: Prepared
    models: Models
    base: Params
    checkpoints: Checkpoints
    writer: MetricsWriter
    stop: threading.Event
    done: int

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Draws the policy's answers; what was compiled for one evaluation serves the next.

        Rows may be longer than the model says it has positions for (`about.py` warns of it), and so may answers.
        """
        return Sampler(self.layout, self.policy.tokenizer, self.policy.stop_tokens(), longest=sys.maxsize)


def keep_compiled(settings: Settings) -> None:
    """Keep compiled programs for the next run on this machine, unless jax is configured for it already."""
    if settings.compilation_cache != "off" and not jax.config.values["jax_compilation_cache_dir"]:
        directory = settings.compilation_cache or str(cache_root(settings.data.cache_dir) / "compiled")
        if directory.startswith(SCHEME):  # JAX opens it itself, and would only warn of what is wrong with it
            at = as_path(directory)
            next(at.iterdir(), None)
            directory = str(at)
        jax.config.update("jax_compilation_cache_dir", directory)


def make_models(settings: Settings, layout: Layout, pad: int | None = None) -> Models:
    """The policy and the reference as the steps see them; a reward model, whose scores are not read at `pad`."""
    o = settings.objective
    if o.task == "reward":
        scores = scores_fn(layout, remat=settings.remat, pad=pad, balance=o.balance > 0)
        return scores, scores
    make = functools.partial(logps_fn, layout, remat=settings.remat, weights=ld_weights(o.ld_alpha), log_sum_sq=o.wpo)
    if o.task == "rl":
        make = functools.partial(make, per_token=True, temperature=settings.rl.temperature)
    logps = make(balance=o.balance > 0)
    return logps, make(from_host=True) if layout.options.reference_offload else logps


def make_objective(options: ObjectiveOptions) -> Objective:
    """What the phase of pairs minimises."""
    if options.task == "reward":
        return reward_objective(center=options.center, balance=options.balance)
    if options.task == "sft":
        return sft_objective()
    if options.task == "comparison":
        return label_objective(balance=options.balance)
    given: dict[str, Any] = {x: getattr(options, x) for x in ("beta", "wpo", "balance", "f_divergence", "f_alpha")}
    return preference_objective(options.parts, **{**given, **options.hyperparameters})


def make_optimizer(options: OptimizerOptions, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a phase of `steps` updates, and its learning rate by update.

    A fraction of warm-up is rounded up, as transformers does it, but leaves an update: one alone is not made at rate 0.
    """
    o = options
    warmup = min(math.ceil(o.warmup * steps), steps - 1) if o.warmup < 1 else min(int(o.warmup), steps)
    rate = rate_schedule(o.schedule, peak=o.peak, warmup_steps=warmup, total_steps=steps)
    return optimizer(o.kind, rate, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm), rate


def start_state(params: Params, tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """A state at update 0 on the layout's mesh; takes the parameters' memory over."""
    init = jax.jit(init_state, static_argnums=1, donate_argnums=0, out_shardings=_state_shardings(tx, layout))
    return init(params, tx)


def abstract_state(tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of a state: what restoring one needs."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx), abstract_trained(layout, layout.param_dtype))
    shardings = _state_shardings(tx, layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _state_shardings(tx: optax.GradientTransformation, layout: Layout) -> Any:
    held = host_shardings(layout.trained) if layout.options.optimizer_offload else layout.trained
    moments = moment_shardings(tx, abstract_trained(layout, layout.param_dtype), held, layout.mesh)
    return TrainState(step=replicated(layout.mesh), params=layout.trained, opt_state=moments)  # type: ignore[arg-type]


def moment_shardings(tx: optax.GradientTransformation, params: Params, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of `tx.init(params)`: every moment is sharded like its parameter, every scalar is replicated."""
    return optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def train_step_on(
    layout: Layout, models: Models, objective: Objective, tx: optax.GradientTransformation, rate: optax.Schedule
) -> Callable[..., Any]:
    """`make_train_step` for a model on its mesh."""
    logps, reference_logps = models
    options = {"optimizer_offload": layout.options.optimizer_offload} | layout.step_options
    return make_train_step(logps, objective, tx, rate, reference_logps=reference_logps, **options)


def eval_step_on(layout: Layout, logps: LogpsFn, objective: Objective) -> Callable[..., Any]:
    """`make_eval_step` for a model on its mesh."""
    return make_eval_step(logps, objective, out_shardings=replicated(layout.mesh), **layout.step_options)


def keep_bad_batch(run: Run, groups: GroupSource, split: str, step: int, pairs: np.ndarray) -> Path:
    """Write out what a batch is made of: bad_batch.json has the text of each of its `groups`, and names file and line.

    Pairs of a round of the policy's own answers have no line.
    """
    path, train = run.workdir / "bad_batch.json", run.data.train
    groups = groups.groups if isinstance(groups, FirstOnly) else groups
    if jax.process_index() == 0:
        named = []
        for position in map(int, pairs):
            texts = [run.policy.tokenizer.decode(ids) for ids in groups[position]]
            row = {"pair": position} | (train.cache.row(int(train.index[position])) if groups is train else {})
            named.append(row | dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        text = json.dumps({"split": split, "step": step, "pairs": named}, indent=1, ensure_ascii=False)
        write_whole(path, text + "\n")
    return path
