"""Train a policy on preferences: `python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR`.

The reader of the config, with `inputs`: everything else takes named values. Exit codes: 0 done, 2 bad input (one line
on standard error, before anything is compiled), 143 stopped by SIGTERM after saving (the same command goes on).
"""

import dataclasses
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax import answers, checkpoint, hub, inputs, lora, metrics, peft_files, policy, report, weights
from dpo_jax.config import check, check_workdir, claim_workdir, parse
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.packing import Order
from dpo_jax.data.pipeline import ChosenOnly, PairSource, Schedule, StepSource, make_schedule
from dpo_jax.data.prepare import Prepared
from dpo_jax.errors import UserError
from dpo_jax.loop import Phase, Stopped, evaluate, run_phase, stop_signal
from dpo_jax.model import Params
from dpo_jax.objective import Objective, parse_loss, preference_objective, sft_objective
from dpo_jax.optim import optimizer, schedule
from dpo_jax.policy import Layout, Policy
from dpo_jax.sharding import agreed, first_process_first, local_rows, make_mesh, replicated, row_shards
from dpo_jax.step import LogpsFn, TrainState, make_eval_step, make_reference_sync, make_train_step

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
    base: Params  # under the adapters, never trained; {} if all parameters are


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
    layout = policy.lay_out(
        found.config,
        mesh,
        param_dtype=c["param_dtype"],
        compute_dtype=c["compute_dtype"],
        lora=_adapters(c, found),
        base_dtype=c["lora_base_dtype"],
    )
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
        logps = policy.logps_fn(layout, remat=c["remat"], ld_alpha=c["ld_alpha"], log_sum_sq=c["wpo"])
        with writer:
            base = policy.load_base(found, layout, c["seed"])
            return _train(
                Run(c, workdir, found, layout, data, logps, checkpoints, writer, stop, done, base), plan, steps
            )


def _adapters(c: Config, found: Policy) -> lora.Lora | None:
    if not c["lora_rank"]:
        return None
    targets = lora.parse_targets(c["lora_targets"])
    return lora.on_model(found.config, c["lora_rank"], c["lora_alpha"], targets, rslora=c["lora_rslora"])


def _train(run: Run, plan: Schedule, steps: int) -> dict[str, float]:
    """SFT if any, then DPO, then everything that is written at the end."""
    c, sft_steps = run.c, run.c["sft_steps"]
    _introduce(run, plan)
    tx, rate = _transformation(c, c["learning_rate"], c["lr_schedule"], steps)
    objective, moves = _objective(c), c["reference_sync_steps"] > 0
    ref_params = None
    if run.done > sft_steps:
        saved: Any = policy.abstract_state(tx, run.layout)
        if moves:
            saved = {"state": saved, "reference": policy.abstract_reference(run.layout)}
            both = checkpoint.restore(run.checkpoints, run.done, saved)
            state, ref_params = both["state"], both["reference"]
        else:
            state = checkpoint.restore(run.checkpoints, run.done, saved)
            ref_params = _reference(run, None) if objective.needs_reference else None
    else:
        state = policy.start_state(_params_after_sft(run), tx, run.layout)
        ref_params = _reference(run, state.params) if objective.needs_reference else None
        _answer(run, state, "before", 0)

    def save(n: int, state: TrainState, reference: Params | None) -> None:
        tree = {"state": state, "reference": reference} if moves else state
        checkpoint.save(run.checkpoints, sft_steps + n, tree)

    phase = Phase(
        "train",
        _source(plan, run.layout.mesh, steps, c["microbatches"]),
        _train_step(run, objective, tx, rate),
        log_every=c["log_every"],
        eval_every=c["eval_every"],
        checkpoint_every=c["checkpoint_every"],
        evaluate=_evaluator(run, objective),
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


def _train_step(run: Run, objective: Objective, tx: optax.GradientTransformation, rate: optax.Schedule) -> Any:
    step = make_train_step(run.logps, objective, tx, rate, compute_dtype=run.layout.dtype)
    return functools.partial(step, base=run.base)


def _params_after_sft(run: Run) -> Params:
    """What is trained, when DPO starts: as loaded or fresh, after what is left of the SFT phase."""
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
            _train_step(run, sft_objective(), tx, rate),
            log_every=c["log_every"],
            eval_every=0,
            checkpoint_every=c["checkpoint_every"],
            evaluate=None,
            save=lambda n, s, _: checkpoint.save(run.checkpoints, n, s),
        )
        state = _run_phase(run, phase, state, None, run.done)
    return state.params


def _objective(c: Config) -> Objective:
    names = ("f_divergence", "f_alpha", "wpo", "label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")
    return preference_objective(parse_loss(c["loss"]), beta=c["dpo_beta"], **{name: c[name] for name in names})


def _reference(run: Run, start: Params | None) -> Params:
    """The reference's parameters: those named, else the policy's when DPO starts (`start`, None in a resumed run).

    Over a frozen base only what differs from it is needed: nothing, or the adapters after the SFT phase.
    """
    c, moves = run.c, run.c["reference_sync_steps"] > 0
    if c["reference"]:
        return policy.load_reference(hub.resolve(c["reference"], what="reference"), run.layout, moves=moves)
    if run.base and not c["sft_steps"]:
        return {}
    if run.policy.directory is not None and not c["sft_steps"]:
        return policy.load_reference(run.policy.directory, run.layout, moves=moves)
    if moves:  # only asked for when DPO starts: checkpoints hold it afterwards
        return policy.moving_reference(start)
    return policy.own_reference(run.workdir / "reference", start, run.layout)


def _evaluator(run: Run, objective: Objective) -> Callable[[TrainState, Params | None], dict[str, Any]] | None:
    held_out = run.data.evaluation
    if not len(held_out):
        return None
    microbatches = run.c["microbatches"]
    limits = policy.row_limits(run.layout, microbatches)
    plan = make_schedule(held_out, min(run.c["batch_size"], len(held_out)), limits, Order(drop_remainder=False))
    source = _source(plan, run.layout.mesh, plan.steps_per_epoch, microbatches)
    eval_step = make_eval_step(
        run.logps, objective, compute_dtype=run.layout.dtype, out_shardings=replicated(run.layout.mesh)
    )
    groups = run.data.split.groups
    eval_step = functools.partial(eval_step, base=run.base)
    return lambda state, reference: evaluate(eval_step, state.params, reference, source, run.layout.mesh, groups)


def _answer(run: Run, state: TrainState, when: str, step: int) -> None:
    """Answer the first held-out prompts and append the answers to samples.jsonl."""
    c = run.c
    pairs = run.data.evaluation if len(run.data.evaluation) else run.data.train
    shown = dataclasses.replace(pairs, index=pairs.index[: c["sample_prompts"]])
    if not len(shown):
        return
    records = answers.answer(
        run.base | state.params,
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
    c, workdir, layout, samples = run.c, run.workdir, run.layout, run.workdir / "samples.jsonl"
    if not agreed(any(r["when"] == "after" for r in _read(samples))):
        _answer(run, state, "after", steps)
    export = workdir / "export"
    if c["export"] and not agreed((export / "config.json").exists()):
        if layout.lora is not None:
            peft_files.save(state.params, layout.config, layout.lora, workdir / "export-adapter", base=c["model"])
        weights.save(
            run.base | state.params,
            run.policy.hf_config(),
            export,
            dtype=c["param_dtype"],
            tokenizer_from=run.policy.tokenizer_directory,
            lora_scale=layout.config.lora_scale,
        )
    records = _read(workdir / "metrics.jsonl")
    if jax.process_index() == 0:
        report.write(workdir)
        answers.show(_read(samples), run.writer)
        run.writer.table("Held-out pairs", metrics.before_after(records))
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
    if layout.lora is not None:
        adapters, targets = policy.trained_count(layout), ",".join(layout.lora.targets)
        say(f"LoRA of rank {layout.lora.rank} on {targets}: {adapters:,} parameters are trained")
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


def _source(plan: Schedule, mesh: Mesh, steps: int, microbatches: int) -> StepSource:
    rows: dict[int, np.ndarray] = {}
    for shape in plan.shapes:
        n = shape.rows // microbatches
        rows[n] = local_rows(mesh, n)
    return StepSource(plan, microbatches, rows, steps)


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
