"""The phase of RL: answers are drawn and rewarded, and the policy updated: on one mesh, from one set of parameters."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.data.originals import originals
from dpo_jax.disk import remove_tree
from dpo_jax.model.config import Params
from dpo_jax.model.placement import abstract_trained
from dpo_jax.parallel.mesh import agreed, from_first
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.records.records import best_evaluation, read_metrics
from dpo_jax.rl.objective import rl_objective
from dpo_jax.rl.rewards import Reward, adjusted
from dpo_jax.rl.rollouts import Rollouts
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.schedule import Schedule
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.engine import AnswerRequest
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.training import checkpoint, setup
from dpo_jax.training.inputs import sources_of
from dpo_jax.training.loop import Phase, run_phase
from dpo_jax.training.own_answers import Drawn, Measure, kl_measures, measure_answers, sample_measures
from dpo_jax.training.own_prompts import asked_prompt
from dpo_jax.training.phases import params_after_sft
from dpo_jax.training.reference import reference_params
from dpo_jax.training.setup import Run
from dpo_jax.training.step import TrainState, make_eval_step
from dpo_jax.training.winning import make_contest, win_rate_measures

BEST = "best"  # RUN/best/STEP/ has the parameters of the evaluation with the highest win rate


def params_after_rl(run: Run, schedule: Schedule, steps: int) -> Params:
    """What is exported after `steps` updates of RL, begun or resumed: the best or the last policy.

    The schedule is that of the dataset's own pairs, whose prompts alone are used.

    Raises:
      UserError: a reward or a judge cannot be had.
      Stopped: a signal came; everything up to the last update is saved.
    """
    s, layout = run.settings, run.layout
    tx, rate = setup.make_optimizer(s.optimizer, steps)
    objective = rl_objective(s.rl.options)
    rollouts = Rollouts(run, steps, old_logps_of(run))
    begins = run.done <= s.sft_steps
    if begins:
        state = setup.start_state(params_after_sft(run), tx, layout)
    else:
        state = checkpoint.restore(run.checkpoints, run.done, setup.abstract_state(tx, layout))
    reference = None
    if objective.needs_reference or s.kl_prompts:
        reference = reference_params(run, state.params if begins else None)
    update = functools.partial(setup.train_step_on(layout, run.models, objective, tx, rate), base=run.base)
    in_step = reference if objective.needs_reference else None
    latest = [state]  # that the rollouts see: the loop holds it, and gives the old one's memory away

    def step(state: TrainState, batch: Batch[jax.Array], shape: RowShape) -> tuple[TrainState, Any]:
        latest[0], metrics = update(state, in_step, batch, shape)
        return latest[0], metrics

    start = max(0, run.done - s.sft_steps)
    evaluate = _evaluator(run, rollouts.reward, reference, steps, begins=begins)
    phase = Phase(
        split="train",
        loss="loss",
        updates=steps,
        step=step,
        log_every=s.log_every,
        eval_every=s.eval_every if evaluate else 0,
        checkpoint_every=s.checkpoint_every,
        evaluate=evaluate,
        save=lambda n, state: checkpoint.save_checkpoint(run.checkpoints, s.sft_steps + n, state),
        check_save=functools.partial(checkpoint.check_save, run.checkpoints),
        max_bad_steps=s.max_bad_steps,
        keep_bad_batch=rollouts.keep_bad_batch,
        stuck_after=s.stuck_after_seconds,
        whole=s.rl.updates,
    )
    batches = rollouts.batches(lambda: latest[0].params, start)
    state = run_phase(phase, batches, state, start, mesh=layout.mesh, writer=run.writer, stop=run.stop)
    return _exported(run, state.params)


def old_logps_of(run: Run) -> Callable[[Params, Batch[jax.Array], RowShape], jax.Array]:
    """Build (parameters, batch, shape) → the policy's log-probabilities of its completion tokens, `[M, B, N]`."""
    step = make_eval_step(run.models[0], rl_objective(dataclasses.replace(run.settings.rl.options, kl_coef=0.0)),
                          **run.layout.step_options)  # fmt: skip

    def old_logps(params: Params, batch: Batch[jax.Array], shape: RowShape) -> jax.Array:
        policy, _ = step(params, None, batch, shape, base=run.base)
        assert policy.of_tokens is not None
        return policy.of_tokens

    return old_logps


def _evaluator(
    run: Run, reward: Reward, reference: Params | None, steps: int, *, begins: bool
) -> Callable[[TrainState, int], dict[str, Any]] | None:
    """(state, updates done) → the values of an evaluation, of the policy's own answers alone.

    The policy with the highest win rate so far is kept, where there is a judge.
    """
    s = run.settings
    if not len(run.data.evaluation) or run.done >= s.sft_steps + steps:
        return None
    contest = make_contest(run, begins=begins)
    measures = [
        *kl_measures(run),
        *win_rate_measures(run, contest, begins=begins),
        *_reward_measures(run, reward),
        *sample_measures(run, steps),
    ]

    def at(state: TrainState, n: int) -> dict[str, Any]:
        values = measure_answers(run, state.params, reference, n, measures)
        if n and s.rl.keeps_best and values.get("win_rate") is not None:
            _keep_best(run, state.params, n, values["win_rate"])
        return values

    return at


def _reward_measures(run: Run, reward: Reward) -> list[Measure]:
    """`reward` of the policy's answers to held-out prompts, with its standard error by prompts.

    It is what is trained for: beside a win rate under a judge that is not, it shows where the one stops to help the
    other. A reward that only compares answers with each other has none of one alone.
    """
    s, pairs = run.settings, run.data.evaluation
    if not s.win_rate_prompts or not reward.scores_alone:
        return []
    found = originals(pairs, sources_of(s, run.workdir), s.win_rate_prompts)
    prompts = [(asked_prompt(pairs, run.data.form, place, one.comparison), one.row) for place, one in found]
    if not prompts:
        return []

    def of(params: Params, _: Params | None, updates: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        beat("asking the judge", LONGER)
        rewards = adjusted(reward(prompts, drawn[0]).total, drawn[0], s.rl.unfinished, s.rl.length_penalty)[:, 0]
        there = rewards[np.isfinite(rewards)]
        if len(there) < 2:
            return {}
        tokens = [len(answers[0].token_ids) for answers in drawn[0]]
        error = float(there.std(ddof=1) / len(there) ** 0.5)
        return {"reward": float(there.mean()), "reward_error": error, "mean_length": float(np.mean(tokens))}

    asked = SamplingParams(
        temperature=s.rl.temperature, top_p=s.rl.top_p, max_tokens=s.data.max_completion_length, seed=s.seed
    )
    return [Measure([AnswerRequest([one.ids for one, _ in prompts], asked)], of)]


def _keep_best(run: Run, params: Params, step: int, win_rate: float) -> None:
    """Keep the policy of this evaluation if none before has as high a win rate."""
    best = best_evaluation(read_metrics(run.workdir / "metrics.jsonl"))
    if agreed(best is not None and win_rate <= best["win_rate"]):
        return
    checkpoint.save_tree(run.workdir / BEST / str(step), params)
    if jax.process_index() == 0:
        for other in (run.workdir / BEST).glob("*"):
            if other.name != str(step):
                remove_tree(other)


def _exported(run: Run, last: Params) -> Params:
    """What is exported, with a line that says so."""
    s, best = run.settings, best_evaluation(read_metrics(run.workdir / "metrics.jsonl"))
    step = int(from_first(np.asarray(best["step"] if best and s.rl.keeps_best else -1, np.int32)))
    where = run.workdir / BEST / str(step)
    if step < 0 or not agreed(where.is_dir()):
        return last
    if best is not None:
        run.writer.message(
            f"exported: the policy after update {step}, whose win rate of {best['win_rate']:.3f} is best"
        )
    return checkpoint.restore_tree(where, abstract_trained(run.layout, run.layout.param_dtype))
