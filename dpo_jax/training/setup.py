"""What the phases of a run share: its model, its data, its checkpoints, and the pieces that are made of them.

Only here, in `reference.py`, `inputs.py` and `train.py` is the config read; everything below takes named values.
"""

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax.config.values import parse_options, parse_targets
from dpo_jax.data.cache.store import cache_root
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.prepare import Prepared
from dpo_jax.data.split import Pairs
from dpo_jax.model import lora
from dpo_jax.model import placement as policy
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.params import Params
from dpo_jax.model.placement import Layout, Policy
from dpo_jax.objective.logps import LogpsFn
from dpo_jax.objective.objective import Objective, preference_objective
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.objective.table import parse_loss
from dpo_jax.parallel.mesh import local_rows
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.rows.pipeline import PairSource, Schedule, StepSource, make_schedule
from dpo_jax.rows.schedule import Order
from dpo_jax.sampling import answers
from dpo_jax.sampling import divergence as kl
from dpo_jax.training import about, inputs
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.loop import slots_of
from dpo_jax.training.optimizer import optimizer, schedule
from dpo_jax.training.step import TrainState, make_train_step

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the phases of a run share."""

    c: Config
    workdir: Path
    policy: Policy
    layout: Layout
    data: Prepared
    logps: LogpsFn
    reference_logps: LogpsFn  # the same model, with the reference's parameters where they lie
    checkpoints: Checkpoints
    writer: MetricsWriter
    stop: threading.Event
    done: int  # updates, of SFT and DPO together, that the newest checkpoint holds
    base: Params  # under the adapters, never trained; {} if all parameters are


def keep_compiled(c: Config) -> None:
    """Keep compiled programs for the next run on this machine, unless jax is configured for it already."""
    if c["compilation_cache"] != "off" and not jax.config.values["jax_compilation_cache_dir"]:
        directory = c["compilation_cache"] or str(cache_root(c["cache_dir"]) / "compiled")
        jax.config.update("jax_compilation_cache_dir", directory)


def lay_out(c: Config, config: ModelConfig, mesh: Mesh) -> Layout:
    """The model on the mesh as the config asks for it, adapters included.

    Raises:
      UserError: the model does not divide over the mesh, or the compiler does not know an option.
    """
    options = parse_options(c["compiler_options"])
    if options:
        policy.check_compiler_options(options, mesh)
    adapters = None
    if c["lora_rank"]:
        targets = parse_targets(c["lora_targets"])
        adapters = lora.on_model(config, c["lora_rank"], c["lora_alpha"], targets, rslora=c["lora_rslora"])
    return policy.lay_out(
        config,
        mesh,
        param_dtype=c["param_dtype"],
        compute_dtype=c["compute_dtype"],
        lora=adapters,
        base_dtype=c["lora_base_dtype"],
        attention=c["attention"],
        optimizer_offload=c["optimizer_offload"],
        reference_offload=c["reference_offload"],
        compiler_options=options,
        longest=c["max_prompt_length"] + c["max_completion_length"],
    )


def make_models(c: Config, layout: Layout) -> tuple[LogpsFn, LogpsFn]:
    """The policy and the reference as the steps see them."""
    options = {"remat": c["remat"], "ld_alpha": c["ld_alpha"], "log_sum_sq": c["wpo"]}
    logps = logps_fn(layout, balance=c["router_aux_loss_coef"] > 0, **options)
    if not layout.reference_offload:
        return logps, logps
    return logps, logps_fn(layout, from_host=True, **options)


def plan_of(c: Config, pairs: PairSource, layout: Layout, mixture: Mixture | None) -> Schedule:
    """Every step over these pairs, in rows that this mesh takes."""
    return inputs.plan(c, pairs, policy.row_limits(layout, c["microbatches"]), mixture)


def step_source(
    plan: Schedule, mesh: Mesh, steps: int, microbatches: int, given: Mapping[str, np.ndarray] | None = None
) -> StepSource:
    """The rows of `steps` steps that this process loads; `given` is more of every pair."""
    rows: dict[int, np.ndarray] = {}
    for shape in plan.shapes:
        n = shape.rows // microbatches
        rows[n] = local_rows(mesh, n)
    return StepSource(plan, microbatches, rows, steps, given or {})


def once_through(run: Run, pairs: Pairs, given: Mapping[str, np.ndarray] | None = None) -> StepSource:
    """Every one of `pairs` once."""
    microbatches = run.c["microbatches"]
    limits = policy.row_limits(run.layout, microbatches)
    plan = make_schedule(pairs, min(run.c["batch_size"], len(pairs)), limits, Order(drop_remainder=False))
    return step_source(plan, run.layout.mesh, plan.steps_per_epoch, microbatches, given)


def train_step(run: Run, objective: Objective, tx: optax.GradientTransformation, rate: optax.Schedule) -> Any:
    """The step over the run's base."""
    layout = run.layout
    step = make_train_step(
        run.logps,
        objective,
        tx,
        rate,
        compute_dtype=layout.dtype,
        reference_logps=run.reference_logps,
        optimizer_offload=layout.optimizer_offload,
        compiler_options=layout.compiler_options,
    )
    return functools.partial(step, base=run.base)


def transformation(
    c: Config, peak: float, kind: str, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a phase of `steps` updates, and its learning rate by update.

    A fraction of warm-up is rounded up, as transformers does it, but leaves an update: one alone is not made at rate 0.
    """
    warmup = c["warmup_steps"]
    warmup = min(math.ceil(warmup * steps), steps - 1) if warmup < 1 else min(int(warmup), steps)
    rate = schedule(kind, peak=peak, warmup_steps=warmup, total_steps=steps)
    return optimizer(c["optimizer"], rate, weight_decay=c["weight_decay"], max_grad_norm=c["max_grad_norm"]), rate


def make_objective(c: Config) -> Objective:
    """What DPO's phase minimises."""
    names = ("f_divergence", "f_alpha", "wpo", "label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")
    return preference_objective(
        parse_loss(c["loss"]),
        beta=c["dpo_beta"],
        balance=c["router_aux_loss_coef"],
        **{name: c[name] for name in names},
    )


def answer(run: Run, state: TrainState, when: str, step: int) -> None:
    """Answer the first held-out prompts and append the answers to samples.jsonl."""
    c = run.c
    pairs = run.data.evaluation if len(run.data.evaluation) else run.data.train
    shown = dataclasses.replace(pairs, index=pairs.index[: c["sample_prompts"]])
    if not len(shown):
        return
    records = answers.answer_prompts(
        run.base | state.params,
        shown,
        run.policy.tokenizer,
        run.layout,
        modes={"greedy": (0.0, 1.0), "sampled": (c["sample_temperature"], c["sample_top_p"])},
        new_tokens=c["sample_tokens"],
        seed=c["seed"],
    )
    answers.append_samples(run.workdir / "samples.jsonl", [{"when": when, "step": step} | r for r in records])


def keep_bad_batch(run: Run, split: str, step: int, pairs: np.ndarray) -> Path:
    """Write out which rows a batch is made of: bad_batch.json names file and line of each, and has its text."""
    path, train = run.workdir / "bad_batch.json", run.data.train
    if jax.process_index() == 0:
        found = []
        for position in map(int, pairs):
            texts = [run.policy.tokenizer.decode(ids) for ids in train[position]]
            number = int(train.index[position])
            row = {"pair": position} | train.cache.row(number)
            found.append(row | dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        path.write_text(json.dumps({"split": split, "step": step, "pairs": found}, indent=1, ensure_ascii=False) + "\n")
    return path


def make_kl(run: Run) -> Callable[[TrainState, Params | None], dict[str, float]]:
    """(state, reference) → the KL divergence of the policy's answers from the reference, see `kl.py`.

    Nothing where there is no reference on the devices to ask: a loss without one, one that was computed before and is
    freed, or one in the host's memory.
    """
    c, held_out = run.c, run.data.evaluation
    asked = dataclasses.replace(held_out, index=held_out.index[: c["kl_prompts"]])
    if not len(asked) or run.layout.reference_offload:
        return lambda state, reference: {}
    prompts = [asked[i][0].tolist() for i in range(len(asked))]
    stop = answers.stop_tokens(asked, run.policy.tokenizer)
    estimate = kl.make_on_policy_kl(run.layout, prompts, stop=stop, new_tokens=c["sample_tokens"], seed=c["seed"])
    base = run.base
    return lambda state, ref: {} if ref is None else estimate(base | state.params, base | ref)


def introduce(run: Run, plan: Schedule, steps: int) -> None:
    """What is run, on what: run.json and the first lines on the console."""
    c, layout, shape = run.c, run.layout, plan.shapes[0]
    if jax.process_index() == 0:
        about.write(run.workdir / "run.json", about.about(layout, plan, steps))
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    say = run.writer.message
    where = f"{mesh} ({layout.platform})"
    say(f"model {c['model']}: {layout.config.parameter_count():,} parameters, {layout.dtype} on {where}")
    if layout.lora is not None:
        adapters, targets = policy.trained_count(layout), ",".join(layout.lora.targets)
        say(f"LoRA of rank {layout.lora.rank} on {targets}: {adapters:,} parameters are trained")
    say(f"data {c['dataset']}: {len(run.data.train):,} training pairs, {len(run.data.evaluation):,} held out")
    for part in run.data.report.get("mixture", []):
        say(f"  {part['name']}: {part['weight']:.1%}, {part['epoch']:,} of {part['pairs']:,} pairs an epoch")
    if isinstance(layout.tiling, Tiling) and not all(policy.uses_kernel(layout, slots_of(s)) for s in plan.shapes):
        say(
            f"attention: dense blocks in place of the kernel, as sequences of up to {layout.longest} tokens go beyond "
            f"the model's window of {layout.config.sliding_window}"
        )
    say(f"rows {shape.rows} x [{shape.prompt} | {shape.chosen} | {shape.rejected}] for {c['batch_size']} pairs")
    lengths = run.data.train.lengths
    longest, limit = int((lengths[:, 0] + lengths[:, 1:].max(1)).max()), layout.config.max_position_embeddings
    if longest > limit:
        say(
            f"warning: sequences of up to {longest} tokens, but the model was made for {limit}; lower max_prompt_length"
        )
    if run.done:
        say(f"going on from checkpoint {run.done}")
