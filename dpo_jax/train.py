"""Train a policy on preferences: `python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR`.

The reader of the config, with `inputs`: everything else takes named values. Exit codes: 0 done, 2 bad input (one line
on standard error, before anything is compiled), 143 stopped by SIGTERM after saving (the same command goes on).
"""

import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax import answers, checkpoint, hub, inputs, metrics, policy, reference_cache, report, weights
from dpo_jax.config import check, check_workdir, claim_workdir, parse
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.packing import Order
from dpo_jax.data.pipeline import ChosenOnly, PairSource, Schedule, StepSource, make_schedule
from dpo_jax.data.prepare import Prepared
from dpo_jax.data.split import Pairs
from dpo_jax.errors import UserError
from dpo_jax.loop import Phase, Stopped, evaluate, run_phase, stop_signal
from dpo_jax.model import Params
from dpo_jax.objective import Objective, parse_loss, preference_objective, sft_objective
from dpo_jax.optim import optimizer, schedule
from dpo_jax.policy import Layout, Policy
from dpo_jax.sharding import agreed, first_process_first, local_rows, make_mesh, replicated, row_shards
from dpo_jax.step import (
    REFERENCE_FIELDS,
    LogpsFn,
    TrainState,
    make_eval_step,
    make_logps_step,
    make_reference_sync,
    make_train_step,
)

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
    checkpoints: Any
    writer: metrics.MetricsWriter
    stop: threading.Event
    done: int  # updates, of SFT and DPO together, that the newest checkpoint holds


def run(config: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Run one config to its end in `workdir`, or go on with the run that is there.

    Args:
      config: the keys of `configs/common.py`, such as `configs.hhh.get_config("tiny")`.
      workdir: the run's directory.

    Returns:
      The held-out metrics at the end (where nothing is held out: the last training record).

    Raises:
      UserError: bad input, said in one line.
      Stopped: SIGTERM came; the state is saved and the same call goes on.
    """
    c, workdir = dict(config), Path(check_workdir(os.fspath(workdir)))
    check(c)
    claim_workdir(workdir, c, write=False)
    mesh = make_mesh(c["mesh_data"], c["mesh_fsdp"], c["mesh_tensor"])
    inputs.check_division(c["batch_size"], row_shards(mesh), c["microbatches"])
    main_process = jax.process_index() == 0
    with first_process_first("dpo_jax model files"):
        found = policy.find(c["model"], workdir, c["seed"])
    if c["router_aux_loss_coef"] and not found.config.num_experts:
        raise UserError(
            f"router_aux_loss_coef={c['router_aux_loss_coef']:g}: {c['model']} has no experts; leave it at 0"
        )
    layout = policy.lay_out(found.config, mesh, param_dtype=c["param_dtype"], compute_dtype=c["compute_dtype"])
    if c["reference"]:
        policy.check_reference(hub.resolve(c["reference"], what="reference"), layout)
    with first_process_first("dpo_jax data"):  # with a cache that all share, the others find it whole
        data = _prepare(c, found, workdir)
    inputs.check_enough(c, len(data.train))
    with (
        jax.set_mesh(mesh),
        stop_signal() as stop,
        checkpoint.open_checkpoints(workdir / "checkpoints", c["keep_checkpoints"]) as checkpoints,
    ):
        plan = _plan(c, data.train, layout, data.split.mixture)
        steps = inputs.run_steps(c, plan.steps_per_epoch)
        if steps > 1 and c["warmup_steps"] >= steps:
            raise UserError(
                f"warmup_steps={c['warmup_steps']:g} leaves nothing of the {steps} updates; use 0.1 (a fraction)"
            )
        claim_workdir(workdir, c, write=main_process)  # only now: a refused command leaves no config behind
        done = checkpoint.latest_step(checkpoints) or 0
        if main_process:
            _forget_after(workdir, c["sft_steps"], done)
        totals = {"sft": c["sft_steps"], "train": steps}
        writer = metrics.MetricsWriter(workdir if main_process else None, total_steps=totals, quiet=not main_process)
        logps = policy.logps_fn(
            layout, remat=c["remat"], ld_alpha=c["ld_alpha"], log_sum_sq=c["wpo"], balance=c["router_aux_loss_coef"] > 0
        )
        with writer:
            return _train(Run(c, workdir, found, layout, data, logps, checkpoints, writer, stop, done), plan, steps)


def _train(run: Run, plan: Schedule, steps: int) -> dict[str, float]:
    """SFT if any, then DPO, then everything that is written at the end."""
    c, sft_steps = run.c, run.c["sft_steps"]
    _introduce(run, plan)
    tx, rate = _transformation(c, c["learning_rate"], c["lr_schedule"], steps)
    objective, moves = _objective(c), c["reference_sync_steps"] > 0
    in_step = objective.needs_reference and not c["reference_cache"]
    state, ref_params = _start(run, tx, in_step)
    starts = run.done <= sft_steps
    values = _kept_reference(run, plan, steps, state.params if starts else None)
    if starts:
        _answer(run, state.params, "before", 0)

    def save(n: int, state: TrainState, reference: Params | None) -> None:
        tree = {"state": state, "reference": reference} if moves else state
        checkpoint.save(run.checkpoints, sft_steps + n, tree)

    phase = Phase(
        "train",
        _source(plan, run.layout.mesh, steps, c["microbatches"], _given(values, run.data.train)),
        make_train_step(run.logps, objective, tx, rate, compute_dtype=run.layout.dtype),
        log_every=c["log_every"],
        eval_every=c["eval_every"],
        checkpoint_every=c["checkpoint_every"],
        evaluate=_evaluator(run, objective, values),
        save=save,
        sync=make_reference_sync(c["reference_sync_alpha"], shardings=run.layout.shardings) if moves else None,
        sync_every=c["reference_sync_steps"],
    )
    state = _run_phase(run, phase, state, ref_params, max(0, run.done - sft_steps))
    del ref_params, phase
    return _finish(run, state, steps)


def _run_phase(run: Run, phase: Phase, state: TrainState, ref_params: Params | None, start: int) -> TrainState:
    # Arrays reach the devices by explicit placement only: an implicit transfer in the loop is a bug that costs time.
    with jax.transfer_guard_host_to_device("disallow"):
        return run_phase(phase, state, ref_params, start, mesh=run.layout.mesh, writer=run.writer, stop=run.stop)


def _params_after_sft(run: Run) -> Params:
    """The policy's parameters when DPO starts: as loaded or fresh, after what is left of the SFT phase."""
    c, steps = run.c, run.c["sft_steps"]
    if not steps:
        return policy.load_params(run.policy, run.layout, c["seed"])
    tx, rate = _transformation(c, c["sft_learning_rate"], "constant", steps)
    if run.done:
        state = checkpoint.restore(run.checkpoints, run.done, policy.abstract_state(tx, run.layout))
    else:
        state = policy.start_state(policy.load_params(run.policy, run.layout, c["seed"]), tx, run.layout)
    if run.done < steps:
        plan = _plan(c, ChosenOnly(run.data.train), run.layout, run.data.split.mixture)
        phase = Phase(
            "sft",
            _source(plan, run.layout.mesh, steps, c["microbatches"]),
            make_train_step(run.logps, sft_objective(), tx, rate, compute_dtype=run.layout.dtype),
            log_every=c["log_every"],
            eval_every=0,
            checkpoint_every=c["checkpoint_every"],
            evaluate=None,
            save=lambda n, s, _: checkpoint.save(run.checkpoints, n, s),
        )
        state = _run_phase(run, phase, state, None, run.done)
    return state.params


def _start(run: Run, tx: optax.GradientTransformation, needs_reference: bool) -> tuple[TrainState, Params | None]:
    """State and reference of DPO when it starts, or as the newest checkpoint has them."""
    c = run.c
    if run.done <= c["sft_steps"]:
        state = policy.start_state(_params_after_sft(run), tx, run.layout)
        return state, _reference(run, state.params) if needs_reference else None
    saved = policy.abstract_state(tx, run.layout)
    if c["reference_sync_steps"]:
        both = {"state": saved, "reference": policy.abstract_reference(run.layout)}
        both = checkpoint.restore(run.checkpoints, run.done, both)
        return both["state"], both["reference"]
    state = checkpoint.restore(run.checkpoints, run.done, saved)
    return state, _reference(run, None) if needs_reference else None


def _objective(c: Config) -> Objective:
    names = ("f_divergence", "f_alpha", "wpo", "label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")
    return preference_objective(
        parse_loss(c["loss"]),
        beta=c["dpo_beta"],
        balance=c["router_aux_loss_coef"],
        **{name: c[name] for name in names},
    )


def _reference(run: Run, start: Params | None) -> Params:
    """The reference's parameters: those named, else the policy's when DPO starts (`start`, None in a resumed run)."""
    c, moves = run.c, run.c["reference_sync_steps"] > 0
    if c["reference"]:
        return policy.load_reference(hub.resolve(c["reference"], what="reference"), run.layout, moves=moves)
    if run.policy.directory is not None and not c["sft_steps"]:
        return policy.load_reference(run.policy.directory, run.layout, moves=moves)
    if moves:  # only asked for when DPO starts: checkpoints hold it afterwards
        return policy.moving_reference(start)
    return policy.own_reference(run.workdir / "reference", start, run.layout)


def _kept_reference(run: Run, plan: Schedule, steps: int, start: Params | None) -> np.ndarray | None:
    """The reference's values for every pair that the run meets, by pair of the cache; None unless `reference_cache`.

    What is not known from an earlier run is computed; the reference's parameters are freed again.
    """
    c = run.c
    if not c["reference_cache"]:
        return None
    named = hub.resolve(c["reference"], what="reference") if c["reference"] else run.policy.directory
    model = None if c["sft_steps"] and not c["reference"] else named
    cache = run.data.train.cache
    where = reference_cache.find_place(
        cache, model, run.workdir, dtype=run.layout.dtype, ld_alpha=c["ld_alpha"], start_anew=start is not None
    )
    met = np.unique(np.concatenate([placed[placed >= 0] for _, placed in map(plan.place, range(steps))]))
    needed = np.union1d(run.data.train.index[met], run.data.evaluation.index)
    values = reference_cache.load(where)
    missing = needed[np.isnan(values[needed]).any((1, 2))]
    run.writer.message(f"reference: {len(needed) - len(missing):,} pairs known, {len(missing):,} to compute")
    if not len(missing):
        return values
    params = _reference(run, start)
    pairs = dataclasses.replace(run.data.train, index=missing)
    step = make_logps_step(run.logps, compute_dtype=run.layout.dtype, out_shardings=replicated(run.layout.mesh))
    began = time.perf_counter()
    ids, computed = reference_cache.compute(step, params, _once_through(run, pairs), run.layout.mesh)
    values[missing[ids]] = computed
    kept = jax.process_index() > 0 or reference_cache.save(where, values)
    seconds = time.perf_counter() - began
    run.writer.message(
        f"reference: {len(missing):,} pairs computed in {seconds:.1f} s"
        + ("" if kept else f"; not kept, {where.path.parent} cannot be written")
    )
    return values


def _given(values: np.ndarray | None, pairs: Pairs) -> dict[str, np.ndarray]:
    """The reference's values of `pairs` as a batch has them."""
    if values is None:
        return {}
    mine = values[pairs.index]
    return {name: mine[..., number] for number, name in enumerate(REFERENCE_FIELDS[: mine.shape[-1]])}


def _once_through(run: Run, pairs: Pairs, given: Mapping[str, np.ndarray] | None = None) -> StepSource:
    """Every one of `pairs` once."""
    microbatches = run.c["microbatches"]
    limits = policy.row_limits(run.layout, microbatches)
    plan = make_schedule(pairs, min(run.c["batch_size"], len(pairs)), limits, Order(drop_remainder=False))
    return _source(plan, run.layout.mesh, plan.steps_per_epoch, microbatches, given)


def _evaluator(
    run: Run, objective: Objective, values: np.ndarray | None
) -> Callable[[TrainState, Params | None], dict[str, Any]] | None:
    held_out = run.data.evaluation
    if not len(held_out):
        return None
    source = _once_through(run, held_out, _given(values, held_out))
    eval_step = make_eval_step(
        run.logps, objective, compute_dtype=run.layout.dtype, out_shardings=replicated(run.layout.mesh)
    )
    groups = run.data.split.groups
    return lambda state, reference: evaluate(eval_step, state.params, reference, source, run.layout.mesh, groups)


def _answer(run: Run, params: Params, when: str, step: int) -> None:
    """Answer the first held-out prompts and append the answers to samples.jsonl."""
    c = run.c
    pairs = run.data.evaluation if len(run.data.evaluation) else run.data.train
    shown = dataclasses.replace(pairs, index=pairs.index[: c["sample_prompts"]])
    if not len(shown):
        return
    records = answers.answer(
        params,
        shown,
        run.policy.tokenizer,
        run.layout,
        modes={"greedy": (0.0, 1.0), "sampled": (c["sample_temperature"], c["sample_top_p"])},
        new_tokens=c["sample_tokens"],
        seed=c["seed"],
    )
    answers.append(run.workdir / "samples.jsonl", [{"when": when, "step": step} | r for r in records])


def _finish(run: Run, state: TrainState, steps: int) -> dict[str, float]:
    """Answers after training, the export, the report and the final table. Done again, it changes nothing."""
    c, workdir, samples = run.c, run.workdir, run.workdir / "samples.jsonl"
    if not agreed(any(r["when"] == "after" for r in _read(samples))):
        _answer(run, state.params, "after", steps)
    export = workdir / "export"
    if c["export"] and not agreed((export / "config.json").exists()):
        weights.save(
            state.params,
            run.policy.hf_config(),
            export,
            dtype=c["param_dtype"],
            tokenizer_from=run.policy.tokenizer_directory,
        )
    records = _read(workdir / "metrics.jsonl")
    if jax.process_index() == 0:
        report.write(workdir)
        answers.show(_read(samples), run.writer)
        if held_out := metrics.before_after(records):
            run.writer.table("Held-out pairs", held_out)
        run.writer.message(f"report {workdir / 'report.html'}" + (f", policy {export}" if c["export"] else ""))
    last = [r for r in records if r["split"] == ("eval" if len(run.data.evaluation) else "train")]
    return {k: v for k, v in last[-1].items() if k != "split"} if last else {}


def _read(path: Path) -> list[dict[str, Any]]:
    return metrics.read(path) if path.exists() else []


def _introduce(run: Run, plan: Schedule) -> None:
    """What is run, on what: the first lines on the console."""
    c, layout, shape = run.c, run.layout, plan.shapes[0]
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    platform = layout.mesh.devices.flat[0].platform
    say = run.writer.message
    say(f"model {c['model']}: {layout.config.parameter_count():,} parameters, {layout.dtype} on {mesh} ({platform})")
    say(f"data {c['dataset']}: {len(run.data.train):,} training pairs, {len(run.data.evaluation):,} held out")
    for part in run.data.report.get("mixture", []):
        say(f"  {part['name']}: {part['weight']:.1%}, {part['epoch']:,} of {part['pairs']:,} pairs an epoch")
    say(f"rows {shape.rows} x [{shape.prompt} | {shape.chosen} | {shape.rejected}] for {c['batch_size']} pairs")
    lengths = run.data.train.lengths
    longest, limit = int((lengths[:, 0] + lengths[:, 1:].max(1)).max()), layout.config.max_position_embeddings
    if longest > limit:
        say(
            f"warning: sequences of up to {longest} tokens, but the model was made for {limit}; lower max_prompt_length"
        )
    if run.done:
        say(f"going on from checkpoint {run.done}")


def _prepare(c: Config, found: Policy, workdir: Path) -> Prepared:
    main_process = jax.process_index() == 0
    quarantine = workdir / "quarantine.jsonl" if main_process else None
    prepared = inputs.prepare_pairs(c, found.tokenizer, workdir, quarantine)
    if main_process:
        (workdir / "data.json").write_text(json.dumps(prepared.report, indent=1, ensure_ascii=False) + "\n")
    return prepared


def _plan(c: Config, pairs: PairSource, layout: Layout, mixture: Mixture | None) -> Schedule:
    return inputs.plan(c, pairs, policy.row_limits(layout, c["microbatches"]), mixture)


def _source(
    plan: Schedule, mesh: Mesh, steps: int, microbatches: int, given: Mapping[str, np.ndarray] | None = None
) -> StepSource:
    rows: dict[int, np.ndarray] = {}
    for shape in plan.shapes:
        n = shape.rows // microbatches
        rows[n] = local_rows(mesh, n)
    return StepSource(plan, microbatches, rows, steps, given or {})


def _transformation(
    c: Config, peak: float, kind: str, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    warmup = c["warmup_steps"]
    warmup = math.ceil(warmup * steps) if warmup < 1 else min(int(warmup), steps)
    rate = schedule(kind, peak=peak, warmup_steps=warmup, total_steps=steps)
    return optimizer(c["optimizer"], rate, weight_decay=c["weight_decay"], max_grad_norm=c["max_grad_norm"]), rate


def _forget_after(workdir: Path, sft_steps: int, done: int) -> None:
    """Drop the records of what the newest checkpoint does not hold: it comes again.

    At the boundary of SFT and DPO, DPO starts anew, with its answers and its evaluation at step 0.
    """

    def keep(record: dict[str, Any]) -> bool:
        if record.get("split") == "sft":
            return record["step"] <= done
        return done > sft_steps and record["step"] <= done - sft_steps

    for name in ("metrics.jsonl", "samples.jsonl"):
        if (workdir / name).exists():
            metrics.truncate(workdir / name, keep)


def _join() -> None:
    """Join the other processes: a TPU pod knows them; elsewhere the environment names them."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        if address:
            count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            jax.distributed.initialize(address, count, index)
        else:
            jax.distributed.initialize()
    except (KeyError, ValueError) as e:
        raise UserError(
            f"--distributed: the other processes are not known ({e}); on a TPU pod they are, elsewhere set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        config, workdir, distributed = parse(sys.argv if argv is None else argv)
        if distributed:
            _join()
        run(config, workdir)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Stopped:
        print("stopped by SIGTERM; everything is saved, the same command goes on", file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
