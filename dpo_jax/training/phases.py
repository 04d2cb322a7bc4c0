"""The phases of a run: a light SFT, if any, then DPO on the data's pairs or in rounds; and what held-out pairs say."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batches import loaded, once_through, passed, step_source
from dpo_jax.model.config import Params
from dpo_jax.objective.logps import Logps
from dpo_jax.objective.objective import Objective, SetValues, make_set_values, sft_objective
from dpo_jax.records.length_bias import length_correlation, length_groups
from dpo_jax.rows.build import FirstOnly, GroupSource
from dpo_jax.rows.pipeline import StepSource
from dpo_jax.rows.schedule import Schedule, make_schedule
from dpo_jax.training import checkpoint, setup
from dpo_jax.training.loop import Phase, State, run_phase
from dpo_jax.training.own_answers import kl_measures, measure_answers, off_policy_words, sample_measures
from dpo_jax.training.reference import (
    abstract_reference,
    followed,
    given_reference,
    held_out_reference,
    kept_reference,
    moving_step,
    reference_params,
)
from dpo_jax.training.rounds import RoundCollector, best_answers
from dpo_jax.training.setup import Run
from dpo_jax.training.step import TrainState
from dpo_jax.training.winning import make_contest, win_rate_measures
from dpo_jax.weights.load import load_params

# What an evaluation tells of every group of pairs (by source, by length) apart.
BY_GROUP = ("accuracy", "margin")


def params_after_sft(run: Run) -> Params:
    """What is trained, when DPO starts: as loaded or fresh, after what is left of the SFT phase."""
    s, layout, steps = run.settings, run.layout, run.settings.sft_steps
    if not steps:
        return load_params(run.policy, layout, s.seed)
    tx, rate = setup.make_optimizer(s.sft_optimizer, steps)
    if run.done:
        state = checkpoint.restore(run.checkpoints, run.done, setup.abstract_state(tx, layout))
    else:
        state = setup.start_state(load_params(run.policy, layout, s.seed), tx, layout)
    if run.done < steps:
        limits = layout.row_limits(s.batch.microbatches)
        if s.rounds.sft_on == "best_of_n":
            schedule = best_answers(run, lambda: load_params(run.policy, layout, s.seed), limits)
        else:
            pairs: GroupSource = run.data.train if s.rounds.sft_on == "both" else FirstOnly(run.data.train)
            schedule = make_schedule(pairs, s.batch.size, limits, s.batch.order, run.data.split.mixture)
        source = step_source(schedule, layout.mesh, steps, s.batch.microbatches)
        objective = sft_objective()
        update = functools.partial(setup.train_step_on(layout, run.models, objective, tx, rate), base=run.base)
        step = lambda state, batch, shape: update(state, None, batch, shape)
        state = run_updates(run, "sft", objective.loss, source, step, state)
    return state.params


@dataclasses.dataclass(frozen=True)
class DpoPhase:
    """What updates of DPO are made of.

    Attributes:
      tree: the state where the phase begins or is resumed, with the reference where that moves.
      step: (tree, batch, shape) → tree, metrics.
      parts: a tree to its state and the reference in it, or beside it.
      evaluate: see `Phase`.
      values: the reference's for every pair, where they are kept.
    """

    tree: Any
    step: Callable[..., Any]
    parts: Callable[[Any], tuple[TrainState, Params | None]]
    evaluate: Callable[[Any, int], dict[str, Any]] | None
    objective: Objective
    values: np.ndarray | None


def params_after_dpo(run: Run, schedule: Schedule, steps: int) -> Params:
    """What is trained, after `steps` updates of DPO over the schedule's pairs, begun or resumed."""
    s = run.settings
    dpo = begin_dpo(run, steps, schedule)
    given = given_reference(dpo.values, run.data.train)
    source = step_source(schedule, run.layout.mesh, steps, s.batch.microbatches, given)
    before = s.sft_steps, 0
    tree = run_updates(run, "train", dpo.objective.loss, source, dpo.step, dpo.tree, before, dpo.evaluate)
    return dpo.parts(tree)[0].params


def params_after_rounds(run: Run, schedule: Schedule, steps: int) -> Params:
    """What is trained, after rounds of collecting pairs of the policy's own answers and `steps` updates on them in all.

    The schedule is that of the dataset's own pairs, which are not trained on. The policy, its reference and the judge
    stay on the devices.
    """
    s, layout = run.settings, run.layout
    dpo = begin_dpo(run, steps)
    tree, every = dpo.tree, steps // s.rounds.count
    collector = RoundCollector(run, layout.row_limits(s.batch.microbatches))
    for number in range(max(0, run.done - s.sft_steps) // every, s.rounds.count):
        first = number * every
        if s.reference.follows and number and run.done <= s.sft_steps + first:
            tree = followed(tree, layout)
        schedule = collector.schedule(number, first, dpo.parts(tree)[0].params)
        source = step_source(schedule, layout.mesh, every, s.batch.microbatches)
        tree = run_updates(run, "train", dpo.objective.loss, source, dpo.step, tree, (s.sft_steps, first), dpo.evaluate)
    return dpo.parts(tree)[0].params


def begin_dpo(run: Run, steps: int, schedule: Schedule | None = None) -> DpoPhase:
    """A phase of `steps` updates of DPO, where it begins or is resumed.

    Args:
      schedule: of the pairs for which the reference's values may be kept.
    """
    s, layout = run.settings, run.layout
    sft_steps, moves = s.sft_steps, s.reference.moves
    tx, rate = setup.make_optimizer(s.optimizer, steps)
    objective = setup.make_objective(s.objective)
    in_step = objective.needs_reference and not s.reference.cache
    begins = run.done <= sft_steps
    reference = None
    if begins:
        state = setup.start_state(params_after_sft(run), tx, layout)
    elif moves:
        tree: Any = {"state": setup.abstract_state(tx, layout), "reference": abstract_reference(layout)}
        tree = checkpoint.restore(run.checkpoints, run.done, tree)
        state, reference = tree["state"], tree["reference"]
    else:
        state = checkpoint.restore(run.checkpoints, run.done, setup.abstract_state(tx, layout))
    if in_step and reference is None:
        reference = reference_params(run, state.params if begins else None)
    values = None if schedule is None else kept_reference(run, schedule, steps, state.params if begins else None)
    train_step = functools.partial(setup.train_step_on(layout, run.models, objective, tx, rate), base=run.base)
    if moves:  # the reference is a part of the state, here and in checkpoints
        tree = {"state": state, "reference": reference}
        parts = lambda tree: (tree["state"], tree["reference"])
        step = moving_step(s.reference, layout, train_step, start=max(0, run.done - sft_steps))
    else:
        tree = state
        parts = lambda state: (state, reference)
        step = lambda state, batch, shape: train_step(state, reference, batch, shape)
    at: Callable[[Any, int], dict[str, Any]] | None = None
    if len(run.data.evaluation):
        goes_on = run.done < sft_steps + steps  # else nothing is evaluated any more
        contest = make_contest(run, begins=begins) if goes_on else None
        measures = [*kl_measures(run), *win_rate_measures(run, contest, begins=begins), *sample_measures(run, steps)]
        held_out = _evaluator(run, objective, values)

        def at(tree: Any, n: int) -> dict[str, Any]:
            state, reference = parts(tree)
            values = held_out(state, reference)
            values |= measure_answers(run, state.params, reference, n, measures)
            if n == 0 and (words := off_policy_words(values)):
                run.writer.message(words)
            return values

    elif begins:
        measure_answers(run, state.params, None, 0, sample_measures(run, steps))
    return DpoPhase(tree, step, parts, at, objective, values)


def updated(
    run: Run,
    objective: Objective,
    source: StepSource,
    evaluate: Callable[[TrainState, int], dict[str, Any]] | None,
) -> Params:
    """What is trained by an objective without a reference, after one update for each step of a source; or resumed."""
    s, layout = run.settings, run.layout
    tx, rate = setup.make_optimizer(s.optimizer, len(source))
    if run.done:
        state = checkpoint.restore(run.checkpoints, run.done, setup.abstract_state(tx, layout))
    else:
        state = setup.start_state(load_params(run.policy, layout, s.seed), tx, layout)
    update = functools.partial(setup.train_step_on(layout, run.models, objective, tx, rate), base=run.base)
    step = lambda state, batch, shape: update(state, None, batch, shape)
    return run_updates(run, "train", objective.loss, source, step, state, evaluate=evaluate).params


def run_updates(
    run: Run,
    split: str,
    loss: str,
    source: StepSource,
    step: Callable[..., Any],
    state: State,
    before: tuple[int, int] = (0, 0),
    evaluate: Callable[[State, int], dict[str, Any]] | None = None,
) -> State:
    """The loop over a source's steps, from where the run is.

    Args:
      before: updates of other phases, which checkpoints count too, and of this phase before those of the source.
    """
    s = run.settings
    others, first = before
    start = max(first, run.done - others)
    phase = Phase(
        split=split,
        loss=loss,
        updates=first + len(source),
        step=step,
        log_every=s.log_every,
        eval_every=s.eval_every if evaluate else 0,
        checkpoint_every=s.checkpoint_every,
        evaluate=evaluate,
        save=lambda n, state: checkpoint.save_checkpoint(run.checkpoints, others + n, state),
        check_save=functools.partial(checkpoint.check_save, run.checkpoints),
        max_bad_steps=s.max_bad_steps,
        keep_bad_batch=functools.partial(setup.keep_bad_batch, run, source.schedule.groups),
        stuck_after=s.stuck_after_seconds,
    )
    mesh = run.layout.mesh
    items = loaded(source, mesh, f"the rows of a {split} step", start - first)
    batches = (dataclasses.replace(item, update=first + item.update) for item in items)
    return run_phase(phase, batches, state, start, mesh=mesh, writer=run.writer, stop=run.stop)


def _evaluator(
    run: Run, objective: Objective, values: np.ndarray | None
) -> Callable[[TrainState, Params | None], dict[str, Any]]:
    """(state, reference) → the values of held-out pairs.

    A reference that stays is asked once; `values` are its values, where they are known.
    """
    pairs, batch, layout = run.data.evaluation, run.settings.batch, run.layout
    eval_step = setup.eval_step_on(layout, run.models[0], objective)
    moves = run.settings.reference.moves
    set_values = make_set_values(objective)
    source = once_through(pairs, batch.size, batch.microbatches, layout, given_reference(values, pairs))

    def held_out(state: TrainState, reference: Params | None) -> dict[str, Any]:
        nonlocal source
        if objective.needs_reference and not moves and not source.given:
            source = dataclasses.replace(source, given=held_out_reference(run, reference, eval_step))
        asked = reference if moves else None
        step = lambda batch, shape: eval_step(state.params, asked, batch, shape, base=run.base)
        return evaluate(step, set_values, source, layout.mesh, run.data.split.groups)

    return held_out


def evaluate(
    eval_step: Callable[[Any, Any], tuple[Logps, Logps | None]],
    set_values: SetValues,
    source: StepSource,
    mesh: Mesh,
    groups: Mapping[str, np.ndarray] | None = None,
    *,
    with_lengths: bool = True,
) -> dict[str, float]:
    """Means over all pairs of `source`, how many there are (`pairs`), and how their margins depend on length.

    Every value is that of one batch of all the pairs, in their own order: it depends on neither the batches, the rows
    nor the devices that they are computed in. `length_correlation` is left out while no pair is won: margins are then
    what rounding leaves between a policy and its equal.

    Args:
      eval_step: (batch, shape) → log-probabilities `[M, B, K, n]`, see `step.make_eval_step`.
      set_values: those of all pairs → values `[pairs of source]` by name, see `objective.make_set_values`.
      source, mesh: the rows of one pass, and where they are computed.
      groups: bool `[pairs of source]` by name: for these, `accuracy/NAME`, `margin/NAME` and `pairs/NAME` too; those
        of `length_groups` are there, too, `with_lengths`: where completions are answers.
    """
    placed, results = zip(*passed(eval_step, source, mesh, "evaluation"), strict=True)
    pair = np.concatenate([x[x >= 0] for x in placed])
    order, lengths = np.argsort(pair), source.schedule.lengths
    assert np.array_equal(pair[order], np.arange(len(lengths))), "a pass has every pair once"
    parts = [jax.tree.map(lambda v, x=x: v[x >= 0], r) for r, x in zip(results, placed, strict=True)]
    scored = jax.tree.map(lambda *vs: np.concatenate(vs)[order], *parts)
    with jax.transfer_guard_host_to_device("allow"):  # a few numbers of every pair
        values = {
            name: np.asarray(x, np.float64)
            for name, x in set_values(scored[0], scored[1], lengths[:, 1:], source.given.get("margin")).items()
        }
    reduce = {"min_reward": np.min, "max_reward": np.max}
    out = {name: float(reduce.get(name, np.mean)(x)) for name, x in values.items()} | {"pairs": len(pair)}
    if with_lengths and "chosen_logp" in values:
        for side, name in enumerate(("chosen_logp", "rejected_logp"), 1):
            out[f"{name}_per_token"] = float(np.mean(values[name] / lengths[:, side]))
    correlation = length_correlation(lengths, values["margin"]) if with_lengths and out.get("accuracy") else None
    if correlation is not None:
        out["length_correlation"] = correlation
    by_length = length_groups(lengths) if with_lengths and lengths.shape[1] == 3 else {}  # of pairs
    for group, members in {**(groups or {}), **by_length}.items():
        if members.any():
            out |= {f"{name}/{group}": float(values[name][members].mean()) for name in BY_GROUP if name in values}
            out[f"pairs/{group}"] = int(members.sum())
    return out
