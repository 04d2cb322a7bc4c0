"""Train a policy on preferences: `python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR`.

Exit codes (docs/faults.md): 0 done; 2 bad input, one line on standard error, before anything is compiled; 65 more than
`max_bad_steps` updates in a row were not finite; 70 nothing moved for `stuck_after_seconds`, or another process is
gone; 74 a checkpoint could not be saved, or the disk is full; 143 stopped by SIGTERM after saving (a second SIGTERM
ends the process at once). After 70, 74 and 143 the same command goes on.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dpo_jax.config.check import check
from dpo_jax.config.command_line import claim_workdir, parse
from dpo_jax.config.values import check_workdir
from dpo_jax.data.prepare import Prepared
from dpo_jax.errors import SAVE_FAILED, SIGTERM, UserError
from dpo_jax.model import placement as policy
from dpo_jax.model.params import Params
from dpo_jax.model.placement import Policy
from dpo_jax.objective.objective import Objective, sft_objective
from dpo_jax.parallel import processes
from dpo_jax.parallel.mesh import agreed, first_process_first, make_mesh, replicated, row_shards
from dpo_jax.records import trackers
from dpo_jax.records.records import EVENTS, before_after, read_records, truncate_records
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.report import card
from dpo_jax.report import command as report
from dpo_jax.report.runs import EXPORTS, load_run
from dpo_jax.rows.pipeline import ChosenOnly, Schedule
from dpo_jax.sampling import answers
from dpo_jax.training import checkpoint, inputs
from dpo_jax.training import workdir as claim
from dpo_jax.training.loop import Phase, Stopped, evaluate, run_phase, stop_signal
from dpo_jax.training.reference import given_reference, held_out_reference, kept_reference, load_reference
from dpo_jax.training.setup import (
    Config,
    Run,
    answer,
    introduce,
    keep_bad_batch,
    keep_compiled,
    lay_out,
    make_kl,
    make_models,
    make_objective,
    once_through,
    plan_of,
    step_source,
    train_step,
    transformation,
)
from dpo_jax.training.step import TrainState, make_eval_step, make_reference_sync
from dpo_jax.weights import hub
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights import peft as peft_files


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
    projects = {"wandb": c["wandb_project"], "trackio": c["trackio_project"]}
    trackers.check_packages(projects)
    claim_workdir(workdir, c, write=False)
    keep_compiled(c)
    with claim.locked(workdir):
        return _run(c, workdir, projects)


def _run(c: Config, workdir: Path, projects: dict[str, str]) -> dict[str, float]:
    mesh = make_mesh(c["mesh_data"], c["mesh_fsdp"], c["mesh_tensor"])
    inputs.check_division(c["batch_size"], row_shards(mesh), c["microbatches"])
    main_process = jax.process_index() == 0
    with first_process_first("dpo_jax model files"):
        found = policy.find(c["model"], workdir, c["seed"])
    inputs.check_experts(c, found.config.num_experts)
    layout = lay_out(c, found.config, mesh)
    if c["reference"]:
        reference = hub.resolve_model(c["reference"], what="reference")
        policy.check_reference(weights.read_config(reference)[0], layout, str(reference))
    with first_process_first("dpo_jax data"):  # with a cache that all share, the others find it whole
        data = _prepare(c, found, workdir)
    inputs.check_enough(c, len(data.train))
    damaged = checkpoint.set_aside_damaged(workdir / "checkpoints")
    with (
        jax.set_mesh(mesh),
        policy.exact_products(layout),
        stop_signal() as stop,
        checkpoint.open_checkpoints(workdir / "checkpoints", c["keep_checkpoints"]) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        plan = plan_of(c, data.train, layout, data.split.mixture)
        steps = inputs.run_steps(c, plan.steps_per_epoch)
        identity = _identify(c, found, data, plan)
        claim_workdir(workdir, c, write=main_process)  # only now: a refused command leaves no config behind
        done = checkpoint.latest_step(checkpoints) or 0
        claim.first_only(lambda: claim.compare(workdir, identity, goes_on=done > 0))
        if main_process:
            _forget_after(workdir, c["sft_steps"], done)
        totals = {"sft": c["sft_steps"], "train": steps}
        logs = stack.enter_context(trackers.open_trackers(workdir, projects, c)) if main_process else []
        writer = MetricsWriter(workdir if main_process else None, total_steps=totals, quiet=not main_process, logs=logs)
        logps, reference_logps = make_models(c, layout)
        with writer:
            for line in damaged:
                writer.message(f"warning: {line}")
            base = policy.load_base(found, layout, c["seed"])
            return _train(
                Run(c, workdir, found, layout, data, logps, reference_logps, checkpoints, writer, stop, done, base),
                plan,
                steps,
            )


def _identify(c: Config, found: Policy, data: Prepared, plan: Schedule) -> dict[str, Any]:
    """What the run is begun with, the same in all processes."""
    reference = hub.resolve_model(c["reference"], what="reference") if c["reference"] else None
    identity = claim.identify(data.split, {"model": found.directory, "reference": reference})
    # Where files lie may differ between hosts.
    places = ("model", "reference", "dataset_path", "eval_path", "cache_dir", "compilation_cache")
    claim.same_everywhere(
        {
            "config": {key: value for key, value in c.items() if key not in places},
            "training or held-out pairs": identity["data"]["pairs"],
            "row shapes": [dataclasses.asdict(shape) for shape in plan.shapes],
            "model files": [identity.get(key) for key in ("model", "reference")],
        }
    )
    return identity


def _train(run: Run, plan: Schedule, steps: int) -> dict[str, float]:
    """SFT if any, then DPO, then everything that is written at the end."""
    c, sft_steps = run.c, run.c["sft_steps"]
    introduce(run, plan, steps)
    tx, rate = transformation(c, c["learning_rate"], c["lr_schedule"], steps)
    objective, moves = make_objective(c), c["reference_sync_steps"] > 0
    in_step = objective.needs_reference and not c["reference_cache"]
    state, ref_params = _start(run, tx, in_step)
    starts = run.done <= sft_steps
    values = kept_reference(run, plan, steps, state.params if starts else None)
    if starts:
        answer(run, state, "before", 0)

    def save(n: int, state: TrainState, reference: Params | None) -> None:
        tree = {"state": state, "reference": reference} if moves else state
        checkpoint.save(run.checkpoints, sft_steps + n, tree)

    phase = Phase(
        "train",
        step_source(plan, run.layout.mesh, steps, c["microbatches"], given_reference(values, run.data.train)),
        train_step(run, objective, tx, rate),
        log_every=c["log_every"],
        eval_every=c["eval_every"],
        checkpoint_every=c["checkpoint_every"],
        evaluate=_evaluator(run, objective, values),
        save=save,
        **_guards(run),
        sync=make_reference_sync(c["reference_sync_alpha"], shardings=run.layout.shardings) if moves else None,
        sync_every=c["reference_sync_steps"],
    )
    state = _run_phase(run, phase, state, ref_params, max(0, run.done - sft_steps))
    del ref_params, phase
    return _finish(run, state, steps)


def _guards(run: Run) -> dict[str, Any]:
    """What every phase does about faults."""
    return {
        "check_save": functools.partial(checkpoint.check_save, run.checkpoints),
        "max_bad_steps": run.c["max_bad_steps"],
        "keep_bad_batch": functools.partial(keep_bad_batch, run),
        "stuck_after": run.c["stuck_after_seconds"],
    }


def _run_phase(run: Run, phase: Phase, state: TrainState, ref_params: Params | None, start: int) -> TrainState:
    # Arrays reach the devices by explicit placement only: an implicit transfer in the loop is a bug that costs time.
    with jax.transfer_guard_host_to_device("disallow"):
        return run_phase(phase, state, ref_params, start, mesh=run.layout.mesh, writer=run.writer, stop=run.stop)


def _params_after_sft(run: Run) -> Params:
    """What is trained, when DPO starts: as loaded or fresh, after what is left of the SFT phase."""
    c, steps = run.c, run.c["sft_steps"]
    if not steps:
        return policy.load_params(run.policy, run.layout, c["seed"])
    tx, rate = transformation(c, c["sft_learning_rate"], "constant", steps)
    if run.done:
        state = checkpoint.restore(run.checkpoints, run.done, policy.abstract_state(tx, run.layout))
    else:
        state = policy.start_state(policy.load_params(run.policy, run.layout, c["seed"]), tx, run.layout)
    if run.done < steps:
        plan = plan_of(c, ChosenOnly(run.data.train), run.layout, run.data.split.mixture)
        phase = Phase(
            "sft",
            step_source(plan, run.layout.mesh, steps, c["microbatches"]),
            train_step(run, sft_objective(), tx, rate),
            log_every=c["log_every"],
            eval_every=0,
            checkpoint_every=c["checkpoint_every"],
            evaluate=None,
            save=lambda n, s, _: checkpoint.save(run.checkpoints, n, s),
            **_guards(run),
        )
        state = _run_phase(run, phase, state, None, run.done)
    return state.params


def _start(run: Run, tx: optax.GradientTransformation, needs_reference: bool) -> tuple[TrainState, Params | None]:
    """State and reference of DPO when it starts, or as the newest checkpoint has them."""
    c = run.c
    if run.done <= c["sft_steps"]:
        state = policy.start_state(_params_after_sft(run), tx, run.layout)
        return state, load_reference(run, state.params) if needs_reference else None
    saved = policy.abstract_state(tx, run.layout)
    if c["reference_sync_steps"]:
        both = {"state": saved, "reference": policy.abstract_reference(run.layout)}
        both = checkpoint.restore(run.checkpoints, run.done, both)
        return both["state"], both["reference"]
    state = checkpoint.restore(run.checkpoints, run.done, saved)
    return state, load_reference(run, None) if needs_reference else None


def _evaluator(
    run: Run, objective: Objective, values: np.ndarray | None
) -> Callable[[TrainState, Params | None], dict[str, Any]] | None:
    held_out = run.data.evaluation
    if not len(held_out):
        return None
    layout, groups = run.layout, run.data.split.groups
    eval_step = make_eval_step(
        run.logps,
        objective,
        compute_dtype=layout.dtype,
        out_shardings=replicated(layout.mesh),
        compiler_options=layout.compiler_options,
    )
    eval_step = functools.partial(eval_step, base=run.base)
    moves, estimate_kl = run.c["reference_sync_steps"] > 0, make_kl(run)
    known = given_reference(values, held_out)
    source = once_through(run, held_out, known)

    def at(state: TrainState, reference: Params | None) -> dict[str, Any]:
        nonlocal source
        if objective.needs_reference and not moves and not source.given:
            source = dataclasses.replace(source, given=held_out_reference(run, reference))
        found = evaluate(eval_step, state.params, reference if moves else None, source, layout.mesh, groups)
        return found | estimate_kl(state, reference)

    return at


def _finish(run: Run, state: TrainState, steps: int) -> dict[str, float]:
    """Answers after training, the export, the report and the final table. Done again, it changes nothing."""
    c, workdir, layout, samples = run.c, run.workdir, run.layout, run.workdir / "samples.jsonl"
    if not agreed(any(r["when"] == "after" for r in read_records(samples))):
        answer(run, state, "after", steps)
    export = workdir / "export"
    if c["export"] and not agreed((export / "config.json").exists()):
        if layout.lora is not None:
            peft_files.save_adapters(
                state.params, layout.config, layout.lora, workdir / "export-adapter", base=c["model"]
            )
        weights.save_weights(
            run.base | state.params,
            run.policy.hf_config(),
            export,
            dtype=c["param_dtype"],
            tokenizer_from=run.policy.tokenizer_directory,
            lora_scale=layout.config.lora_scale,
        )
    records = read_records(workdir / "metrics.jsonl")
    if jax.process_index() == 0:
        for name in EXPORTS:
            if (workdir / name).is_dir():
                card.write_card(load_run(workdir), workdir / name, base=run.policy.directory)
        report.write_report(workdir)
        answers.show_answers(read_records(samples), run.writer)
        if held_out := before_after(records):
            run.writer.console.before_after_table("Held-out pairs", held_out)
        run.writer.message(f"report {workdir / 'report.html'}" + (f", policy {export}" if c["export"] else ""))
    last = [r for r in records if r["split"] == ("eval" if len(run.data.evaluation) else "train")]
    return {k: v for k, v in last[-1].items() if k != "split"} if last else {}


def _prepare(c: Config, found: Policy, workdir: Path) -> Prepared:
    main_process = jax.process_index() == 0
    quarantine = workdir / "quarantine.jsonl" if main_process else None
    prepared = inputs.prepare_pairs(c, found.tokenizer, workdir, quarantine)
    if main_process:
        (workdir / "data.json").write_text(json.dumps(prepared.report, indent=1, ensure_ascii=False) + "\n")
    return prepared


def _forget_after(workdir: Path, sft_steps: int, done: int) -> None:
    """Drop the records of what the newest checkpoint does not hold: it comes again.

    At the boundary of SFT and DPO, DPO starts anew, with its answers and its evaluation at step 0.
    """

    def keep(record: dict[str, Any]) -> bool:
        if record.get("split") == "sft":
            return record["step"] <= done
        return done > sft_steps and record["step"] <= done - sft_steps

    for name in ("metrics.jsonl", "samples.jsonl", EVENTS):
        truncate_records(workdir / name, keep)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        config, workdir, distributed = parse(sys.argv if argv is None else argv)
        if distributed:
            processes.join()
        run(config, workdir)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return processes.leave(e.code)
    except Stopped:
        print("stopped by SIGTERM; everything is saved, the same command goes on", file=sys.stderr)
        return SIGTERM
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            print(
                f"error: {e.filename or workdir}: {e.strerror}; the checkpoints that are there are kept: make room, "
                "then the same command goes on from the newest",
                file=sys.stderr,
                flush=True,
            )
            return processes.leave(SAVE_FAILED)
        processes.end_if_a_peer_is_gone(e)
        processes.leave(1)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
