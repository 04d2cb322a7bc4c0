"""A run from its settings to its report: model and data are opened and checked, then trained, then exported."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dpo_jax.config.rewards import weighted_names
from dpo_jax.config.saved import claim_workdir, writing
from dpo_jax.config.settings import Settings
from dpo_jax.data.prepare import Prepared
from dpo_jax.disk import write_whole
from dpo_jax.errors import Stopped
from dpo_jax.model.config import Params
from dpo_jax.model.placement import place_model
from dpo_jax.model.tuning import exact_products
from dpo_jax.parallel.mesh import agreed, any_process, first_process_first, make_mesh, row_shards
from dpo_jax.preference.load import directory_of, model_names
from dpo_jax.records import trackers
from dpo_jax.records.directory import CHECKPOINTS, EVENTS, METRICS, ROUNDS, SAMPLES
from dpo_jax.records.record_file import lost_records
from dpo_jax.records.records import before_after, read_metrics, read_records, truncate_records
from dpo_jax.records.shapes import Event, MetricRecord, Sample
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.report.card import write_card
from dpo_jax.report.command import write_report
from dpo_jax.report.runs import EXPORTS, load_run
from dpo_jax.rows.schedule import Schedule, make_schedule
from dpo_jax.sampling import answers
from dpo_jax.training import checkpoint, inputs
from dpo_jax.training import workdir as claim
from dpo_jax.training.about import introduce
from dpo_jax.training.health import check_trained
from dpo_jax.training.loop import stop_signal
from dpo_jax.training.own_answers import final_samples, measure_answers, sample_measures
from dpo_jax.training.phases import params_after_dpo, params_after_rounds
from dpo_jax.training.reward import params_after_pairs
from dpo_jax.training.setup import Run, keep_compiled, make_models
from dpo_jax.training.supervised import params_of_sft
from dpo_jax.weights.find import check_reference, find_policy
from dpo_jax.weights.hub import ModelFiles, resolve_model
from dpo_jax.weights.huggingface import read_config, save_weights
from dpo_jax.weights.load import load_base
from dpo_jax.weights.peft import save_adapters
from dpo_jax.weights.stored import check_weights

# (the run, the schedule of its pairs, updates) → what is trained after them
Training = Callable[[Run, Schedule, int], Params]


def train_policy(settings: Settings, workdir: Path, training: Training | None = None) -> dict[str, float]:
    """Train in `workdir`, or resume the run that is there; returns the held-out metrics at the end.

    Args:
      training: of a task that is none of this package's; None: that of the settings' task.

    Raises:
      UserError: bad input, in one line.
      Stopped: a signal came; the state is saved and the same call resumes it.
    """
    keep_compiled(settings)
    with claim.locked(workdir):
        return _train(settings, workdir, training or _training_of(settings))


def _training_of(settings: Settings) -> Training:
    if settings.task == "dpo":
        return params_after_rounds if settings.rounds.count else params_after_dpo
    return params_of_sft if settings.task == "sft" else params_after_pairs


def _train(settings: Settings, workdir: Path, training: Training) -> dict[str, float]:
    s, main_process = settings, jax.process_index() == 0
    # What a person can have wrong is refused first, the cheapest to check before the rest.
    mesh = make_mesh(*s.mesh)
    inputs.check_division(s.batch, row_shards(mesh))
    with first_process_first("dpo_jax model files"):
        policy = find_policy(s.model, workdir, s.seed, revision=s.revision, scalar_head=s.task == "reward")
    inputs.check_experts(s, policy.config.num_experts)
    layout = place_model(policy.config, mesh, s.layout, s.lora)
    reference = None
    if s.reference.name:
        reference = resolve_model(s.reference.name, what="reference", revision=s.reference.revision)
    if reference is not None:
        numbers = read_config(reference.directory)[0]
        check_reference(numbers, layout.config, s.reference.name)
        check_weights(reference.directory, numbers, adapter=reference.adapter)
    day = claim.first_day(workdir)
    with first_process_first("dpo_jax data"):  # with a cache that all share, the others find it whole
        quarantine = workdir / "quarantine.jsonl" if main_process else None
        data = inputs.prepare_pairs(s, policy.tokenizer, workdir, quarantine, day=day)
        if main_process:
            with writing(workdir):
                write_whole(workdir / "data.json", json.dumps(data.report, indent=1, ensure_ascii=False) + "\n")
    inputs.check_tokens(data.split, policy)
    inputs.check_enough(s.batch, len(data.train))
    damaged = checkpoint.set_aside_damaged(workdir / CHECKPOINTS)
    with (
        jax.set_mesh(mesh),
        exact_products(layout.dtype, layout.platform),
        stop_signal() as stop,
        checkpoint.open_checkpoints(workdir / CHECKPOINTS, s.keep_checkpoints, s.stuck_after_seconds) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        limits = layout.row_limits(s.batch.microbatches)
        schedule = make_schedule(data.train, s.batch.size, limits, s.batch.order, data.split.mixture)
        steps = inputs.run_steps(s, schedule.steps_per_epoch)
        models_read = {"model": policy.files, "reference": reference} | _judges(s)
        identity = _identify(s, models_read, data, schedule)
        claim_workdir(workdir, s.whole, write=main_process)  # only now: a refused command leaves no config behind
        done = checkpoint.latest_step(checkpoints) or 0
        begun = done > 0 or (workdir / ROUNDS).exists()  # pairs of a round, of these data and models
        claim.first_only(lambda: claim.keep_identity(workdir, identity, resumed=begun, whole=s.whole))
        logs = []
        if main_process:
            _forget_after(workdir, s.sft_steps, done)
            logs = stack.enter_context(trackers.open_trackers(workdir, s.trackers, s.whole))
        total, where = {"sft": s.sft_steps, "train": steps}, workdir if main_process else None
        writer = MetricsWriter(where, total_steps=total, quiet=not main_process, logs=logs)
        with writer:
            for line in (*damaged, *_lost(workdir, writer, done)):
                writer.message(f"warning: {line}")
            checkpoints.made_with = functools.partial(_made_with, s, writer)
            pad = policy.pad if s.task == "reward" else None
            models, base = make_models(s, layout, pad), load_base(policy, layout, s.seed)
            run = Run(s, workdir, policy, layout, reference, data, models, base, checkpoints, writer, stop, done)
            introduce(run, schedule, steps)
            return _finish(run, training(run, schedule, steps), steps)


def _judges(settings: Settings) -> dict[str, ModelFiles | None]:
    """The files of the models that say what answers are trained on, by key and name."""
    named = [("collect_judge", name) for name in model_names(settings.rounds.judge)]
    rewards = weighted_names(settings.rl.reward) if settings.rl.reward else []
    named += [("rl_reward", name) for part, _ in rewards for name in model_names(part)]
    return {f"{key} {name}": resolve_model(directory_of(name), what=key) for key, name in named}


def _identify(
    settings: Settings, models: dict[str, ModelFiles | None], data: Prepared, schedule: Schedule
) -> dict[str, Any]:
    """What the run is begun with, the same in all processes; `models` are files by their config key."""
    identity = claim.identify(data.split, models)
    parts = {
        "config": settings.same_on_all_hosts,
        "training or held-out pairs": identity["data"]["pairs"],
        "row shapes": [dataclasses.asdict(shape) for shape in schedule.shapes],
        "model files": [identity.get(key) for key in models],
    }
    claim.same_everywhere(parts)
    return identity


def _forget_after(workdir: Path, sft_steps: int, done: int) -> None:
    """Drop the records of what the newest checkpoint does not hold: it comes again.

    At the boundary of SFT and DPO, DPO starts anew, with its answers and its evaluation at step 0.
    """

    def keep(record: dict[str, Any]) -> bool:
        if record.get("split") == "sft":
            return record["step"] <= done
        if record.get("split") == "collect":  # written anew where the round begins
            return record["step"] < done - sft_steps or (record.get("round") == "sft" and done > 0)
        return done > sft_steps and record["step"] <= done - sft_steps

    for name, shape in {METRICS: MetricRecord, SAMPLES: Sample, EVENTS: Event}.items():
        truncate_records(workdir / name, keep, shape)


def _lost(workdir: Path, writer: MetricsWriter, done: int) -> list[str]:
    """What the records lack of those that the newest checkpoint was made with, a line for each file."""
    if not done or not writer.held:
        return []
    known = checkpoint.records_made_with(workdir / CHECKPOINTS / str(done))
    if not known and not writer.held[METRICS]["records"]:  # made by a version that did not count them
        return [f"{METRICS} is gone or empty: the run's page and its curves begin after checkpoint {done}"]
    lost = (lost_records(name, held, known.get(name), done) for name, held in writer.held.items())
    return [line for line in lost if line]


def _made_with(settings: Settings, writer: MetricsWriter) -> dict[str, Any]:
    """What a checkpoint is made with, for its made_with.json. The records before it are on disk first."""
    writer.sync()
    return {"config": dict(settings.whole), "records": writer.held}


def _stop_if_asked(run: Run) -> None:
    if any_process(run.stop.is_set()):
        raise Stopped


def _finish(run: Run, params: Params, steps: int) -> dict[str, float]:
    """Answers after training, the export, the report and the final table. Done again, it changes nothing.

    Raises:
      Stopped: a signal came; what is missing is made by the same command.
    """
    _stop_if_asked(run)
    s, workdir, layout, samples = run.settings, run.workdir, run.layout, run.workdir / SAMPLES
    check_trained(params, s.layout.param_dtype)
    after = [r for r in read_records(samples, Sample) if r["when"] == "after"]
    if s.trains_policy and not agreed(len(after) >= final_samples(run)):
        run.writer.forget_samples("after")  # some of them, where a kill came between
        measure_answers(run, params, None, steps, sample_measures(run, steps))
        _stop_if_asked(run)
    export = workdir / "export"
    if s.export and not agreed((export / "config.json").exists()):
        if layout.lora is not None:
            under = None if run.policy.files is None else run.policy.files.adapter
            save_adapters(params, layout.config, layout.lora, workdir / "export-adapter", base=s.model, under=under)
        save_weights(
            run.base | params,
            run.policy.hf_config(),
            export,
            dtype=s.layout.param_dtype,
            tokenizer_from=run.policy.tokenizer_directory,
            lora_scale=layout.config.lora_scale,
            stops=() if s.task == "reward" else run.policy.stop_tokens(),
        )
    # Which removes older checkpoints: the page lists those that stay.
    checkpoint.finish_saving(run.checkpoints, s.stuck_after_seconds)
    records = read_metrics(workdir / METRICS)
    if jax.process_index() == 0:
        for name in EXPORTS:
            if (workdir / name).is_dir():
                write_card(load_run(workdir), workdir / name, base=run.policy.directory)
        write_report(workdir)
        answers.show_answers(read_records(samples, Sample), run.writer)
        if held_out := before_after(records):
            run.writer.console.before_after_table("Held-out pairs", held_out)
        run.writer.message(f"report {workdir / 'report.html'}" + (f", policy {export}" if s.export else ""))
    last = [r for r in records if r["split"] == ("eval" if len(run.data.evaluation) else "train")]
    return {k: v for k, v in last[-1].items() if k != "split"} if last else {}
