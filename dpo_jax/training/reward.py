"""The phase of a preference model.

Of a reward model: pairs in, a score of every completion, and Bradley and Terry's loss of the difference. Of one that
compares in words: comparisons in, and the likelihood of the right label.

It is the phase of DPO without a reference: the same rows, step, loop and checkpoints. An evaluation of a reward model
leaves the scores themselves in scores.json, which the report draws.
"""

from typing import Any

import jax
import numpy as np

from dpo_jax.batches import Given, once_through, step_source
from dpo_jax.config.saved import writing
from dpo_jax.data.split import Pairs
from dpo_jax.disk import write_json
from dpo_jax.model.config import Params
from dpo_jax.objective.objective import make_set_values
from dpo_jax.records.scores import SCORES
from dpo_jax.rows.schedule import Schedule
from dpo_jax.training import setup
from dpo_jax.training.phases import evaluate, updated
from dpo_jax.training.setup import Run
from dpo_jax.training.step import TrainState


def params_after_pairs(run: Run, schedule: Schedule, steps: int) -> Params:
    """What is trained, after `steps` updates over the schedule's pairs, begun or resumed."""
    microbatches = run.settings.batch.microbatches
    source = step_source(schedule, run.layout.mesh, steps, microbatches, margins(run.data.train))
    held_out = _evaluator(run) if len(run.data.evaluation) else None
    return updated(run, setup.make_objective(run.settings.objective), source, held_out)


def margins(pairs: Pairs) -> Given:
    """What batches hold besides the pairs' tokens: their margins, where they have some."""
    return {} if pairs.margin is None else {"margin": np.asarray(pairs.margin, np.float32)}


def _evaluator(run: Run) -> Any:
    """A state → the values of an evaluation; the scores are written beside."""
    pairs, batch, layout = run.data.evaluation, run.settings.batch, run.layout
    objective = setup.make_objective(run.settings.objective)
    score = setup.eval_step_on(layout, run.models[0], objective)
    source = once_through(pairs, batch.size, batch.microbatches, layout, margins(pairs))
    set_values = make_set_values(objective)

    def kept(*scored: Any) -> Any:
        """The values; the scores among them are written."""
        values = set_values(*scored)
        if jax.process_index() == 0 and run.settings.task == "reward":
            rounded = lambda x: round(float(x), 6) if np.isfinite(x) else None
            held = {name: [rounded(x) for x in values[f"{name}_reward"]] for name in SCORES}
            tokens = dict(zip(SCORES, pairs.lengths[:, 1:].T.tolist(), strict=True))
            with writing(run.workdir):
                write_json(run.workdir / "scores.json", held | {f"{name}_tokens": tokens[name] for name in SCORES})
        return values

    def held_out(state: TrainState, _: int) -> dict[str, Any]:
        step = lambda rows, shape: score(state.params, None, rows, shape, base=run.base)
        answers = run.settings.task == "reward"
        return evaluate(step, kept, source, layout.mesh, run.data.split.groups, with_lengths=answers)

    return held_out
