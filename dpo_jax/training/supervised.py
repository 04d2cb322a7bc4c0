"""The phase of SFT as a task of its own: the likelihood of chosen answers, or of both, is raised, and measured."""

from typing import Any

from dpo_jax.batches import once_through, step_source
from dpo_jax.model.config import Params
from dpo_jax.objective.objective import make_set_values, sft_objective
from dpo_jax.rows.build import FirstOnly, GroupSource
from dpo_jax.rows.schedule import Schedule, make_schedule
from dpo_jax.training import setup
from dpo_jax.training.own_answers import measure_answers, sample_measures
from dpo_jax.training.phases import evaluate, updated
from dpo_jax.training.setup import Run
from dpo_jax.training.step import TrainState
from dpo_jax.training.winning import make_contest, win_rate_measures


def params_of_sft(run: Run, schedule: Schedule, steps: int) -> Params:
    """What is trained, after `steps` updates of SFT on the schedule's pairs, begun or resumed."""
    s, layout = run.settings, run.layout
    if s.rounds.sft_on != "both":
        groups, limits = FirstOnly(schedule.groups), layout.row_limits(s.batch.microbatches)
        schedule = make_schedule(groups, s.batch.size, limits, s.batch.order, run.data.split.mixture)
    source = step_source(schedule, layout.mesh, steps, s.batch.microbatches)
    held_out = _evaluator(run, steps) if len(run.data.evaluation) else None
    return updated(run, sft_objective(), source, held_out)


def _evaluator(run: Run, steps: int) -> Any:
    """(state, updates done) → the mean loss of the held-out answers that are trained on, and what own answers say."""
    s, layout, pairs = run.settings, run.layout, run.data.evaluation
    objective = sft_objective()
    groups: GroupSource = pairs if s.rounds.sft_on == "both" else FirstOnly(pairs)
    score = setup.eval_step_on(layout, run.models[0], objective)
    source = once_through(groups, s.batch.size, s.batch.microbatches, layout)
    set_values = make_set_values(objective)
    begins = not run.done
    contest = make_contest(run, begins=begins) if run.done < steps else None
    measures = [*win_rate_measures(run, contest, begins=begins), *sample_measures(run, steps)]

    def at(state: TrainState, n: int) -> dict[str, Any]:
        step = lambda rows, shape: score(state.params, None, rows, shape, base=run.base)
        values = evaluate(step, set_values, source, layout.mesh, with_lengths=False)
        return values | measure_answers(run, state.params, None, n, measures)

    return at
