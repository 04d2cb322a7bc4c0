"""Rollouts: prompts are answered by the policy as it is, the answers rewarded, and batches made of them.

A rollout is the work of `RlRun.updates` updates. Its draws depend on the seed, its number and the prompts alone, so
that a run that is stopped and goes on has the rollouts of one that never was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.batches import Item, on_mesh, step_source
from dpo_jax.disk import read_json, write_json
from dpo_jax.errors import Stopped, UserError
from dpo_jax.model.config import Params
from dpo_jax.parallel.mesh import any_process
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.records.shapes import SavedLadders
from dpo_jax.rl.rewards import Prompts, Reward, Rewarded, adjusted
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.build import Group
from dpo_jax.rows.ladder import Ladder
from dpo_jax.rows.schedule import fitted
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.training.on_policy import draw_and_score
from dpo_jax.training.own_prompts import OwnPrompts
from dpo_jax.training.setup import Run

LIKE_BATCHES = 24  # of which row shapes are to hold each
OldLogps = Callable[[Params, Batch[jax.Array], Any], jax.Array]


@dataclass(frozen=True)
class Rollout:
    """Groups of answers as a schedule takes them, with what they are worth.

    Attributes:
      groups: token ids of a prompt and of its n answers.
      drawn_logps: of every token of each answer, as the sampler drew it.
      rewards: float64 `[groups, n]`, NaN for none.
      facts: for the record of an update.
    """

    groups: Sequence[Group]
    drawn_logps: Sequence[Sequence[np.ndarray]]
    rewards: np.ndarray
    facts: Mapping[str, float]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.array([[len(ids) for ids in group] for group in self.groups], np.int32))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> Group:
        return self.groups[i]


class RowShapes:
    """The row shapes that rollouts had, in RUN/row_shapes.json, as they are a part of what later ones get.

    So a run that goes on computes in the same rows as one that was never stopped: to the last bit.
    """

    def __init__(self, workdir: Path):
        process = jax.process_index()  # each has its own file, as hosts may have disks of their own, or share one
        self._path = workdir / (f"row_shapes-{process}.json" if process else "row_shapes.json")
        self._kept = read_json(self._path, shape=SavedLadders)["changes"] if self._path.exists() else []

    def before(self, number: int) -> Ladder | None:
        """Those of the rollout before this one; None: there is none."""
        earlier = [one for one in self._kept if one["rollout"] < number]
        if not earlier:
            return None
        shape = lambda one: RowShape(**one | {"completions": tuple(one["completions"])})
        return Ladder(*(tuple(map(shape, earlier[-1][name])) for name in ("shapes", "home")))

    def keep(self, number: int, ladder: Ladder) -> None:
        """Write down a rollout's, where they are others than those before."""
        if ladder != self.before(number):
            named = {name: [asdict(one) for one in getattr(ladder, name)] for name in ("shapes", "home")}
            self._kept = [one for one in self._kept if one["rollout"] < number] + [{"rollout": number} | named]
            write_json(self._path, {"changes": self._kept})


class Rollouts:
    """Makes the batches of a run's updates, each from answers of the policy as it is then.

    Args:
      steps: updates of the run.
      old_logps: (parameters, batch, shape) → the policy's log-probabilities of its completion tokens; called where a
        rollout is the work of several updates.
    """

    def __init__(self, run: Run, steps: int, old_logps: OldLogps):
        s = run.settings
        self.run, self.rl, self.old_logps = run, s.rl, old_logps
        self.reward = Reward(s.rl.reward)
        self.count = -(-steps // s.rl.updates)
        self.prompts = OwnPrompts(run, s.batch.size * s.rl.minibatches)
        self._limits = run.layout.row_limits(s.batch.microbatches)
        self._shapes = RowShapes(run.workdir)
        self._rollout: Rollout | None = None  # the latest

    def batches(self, params: Callable[[], Params], start: int) -> Iterator[Item]:
        """The batches of updates `start + 1 ..`, where `start` is a multiple of the updates of a rollout.

        Args:
          params: of the policy as it is when called.

        Raises:
          UserError: a reward cannot be had, or no answer of a rollout has one.
          Stopped: a signal came while answers were drawn or rewarded.
        """
        for number in range(start // self.rl.updates, self.count):
            self._rollout = self.rollout(number, params())
            yield from self._items(self._rollout, number, params)

    def rollout(self, number: int, params: Params) -> Rollout:
        """Draw and reward the answers of a rollout."""
        s, prompts = self.run.settings, self.prompts.block(number, self.count)
        if not prompts:
            raise UserError(f"rl_reward={self.reward.name}: no training prompt is a conversation that can be answered")
        self._check_stop()
        asked = SamplingParams(
            n=self.rl.n,
            temperature=self.rl.temperature,
            top_p=self.rl.top_p,
            max_tokens=s.data.max_completion_length,
            seed=s.seed,
            round=number,
        )
        rewarded: list[Rewarded] = []

        def score(drawn: Sequence[Sequence[Answer]]) -> list[np.ndarray]:
            self._check_stop()
            rewarded.append(self.reward(prompts, drawn))
            return list(rewarded[0].total)

        say = lambda what: beat(what, LONGER)
        whole, alone = self.run.base | params, [one for one, _ in prompts]
        found = draw_and_score(self.run.sampler, whole, score, alone, asked, say)
        rewards = adjusted(rewarded[0].total, found.answers, self.rl.unfinished, self.rl.length_penalty)
        if not np.isfinite(rewards).any():
            raise UserError(
                f"rl_reward={self.reward.name}: none of {rewards.size} answers has a reward; does it judge this data?"
            )
        seconds = {"sampling_seconds": found.sampling_seconds, "judging_seconds": found.judging_seconds}
        rate = {"tokens_per_second": found.tokens / max(found.sampling_seconds, 1e-9)}
        facts = facts_of(rewards, rewarded[0], found.answers) | seconds | rate
        return _assembled(prompts, found.answers, rewards, facts)

    def _items(self, rollout: Rollout, number: int, params: Callable[[], Params]) -> Iterator[Item]:
        """The batches of a rollout; with several updates all of them see the policy as it drew the answers."""
        s, mesh, updates = self.run.settings, self.run.layout.mesh, self.rl.updates
        # The prompts' own order is random. One batch could not be balanced by exchanges with others.
        order = replace(s.batch.order, drop_remainder=False, shuffle=False)
        longest = np.array([int(self.run.data.train.lengths[:, 0].max()), *[s.data.max_completion_length] * self.rl.n])
        before = self._shapes.before(number)
        like = lengths_like(rollout.lengths, self.run.data.train.lengths[:, 0], LIKE_BATCHES * s.batch.size, s.seed)
        schedule = fitted(rollout, s.batch.size, self._limits, order, longest=longest, before=before, like=like)
        self._shapes.keep(number, schedule.ladder)
        share = np.full(len(rollout), rollout.lengths[:, 1:].sum() / len(rollout), np.float32)
        given = {"rewards": rollout.rewards.astype(np.float32), "drawn_tokens": share}
        source = step_source(schedule, mesh, updates, s.batch.microbatches, given, rollout.drawn_logps)
        items = [on_mesh(source[i], s.batch.microbatches, mesh) for i in range(updates)]
        if updates > 1:
            now = params()
            items = [
                replace(one, batch=one.batch._replace(old_logps=self.old_logps(now, one.batch, one.shape)))
                for one in items
            ]
        for i, item in enumerate(items):
            facts = {name: value for name, value in item.facts.items() if name != "pairs"} | dict(rollout.facts)
            yield replace(item, update=number * updates + i + 1, facts=facts)

    def keep_bad_batch(self, split: str, step: int, examples: np.ndarray) -> Path:
        """Write out what a batch is made of: bad_batch.json has the texts of each of its groups, and their rewards."""
        path, decode, rollout = self.run.workdir / "bad_batch.json", self.run.policy.tokenizer.decode, self._rollout
        if jax.process_index() == 0 and rollout is not None:
            named = [
                {
                    "prompt": decode(rollout[i][0]),
                    "answers": [decode(ids) for ids in rollout[i][1:]],
                    "rewards": [float(r) if np.isfinite(r) else None for r in rollout.rewards[i]],
                }
                for i in map(int, examples)
            ]
            write_json(path, {"split": split, "step": step, "groups": named})
        return path

    def _check_stop(self) -> None:
        if any_process(self.run.stop.is_set()):
            raise Stopped


def lengths_like(lengths: np.ndarray, prompts: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Lengths of groups as they may come, from those of one rollout: the bootstrap (Efron, 1979).

    Args:
      lengths: int `[N, 1+n]` of the rollout's prompts and answers.
      prompts: int `[M]` of all training prompts.
      count: groups to make.

    Returns:
      int `[count, 1+n]`: a prompt of any length there is, with answers drawn from those of one group.
    """
    rng, n = np.random.default_rng([seed, 5]), lengths.shape[1] - 1
    answers = lengths[rng.integers(len(lengths), size=count)[:, None], 1 + rng.integers(n, size=(count, n))]
    return np.concatenate([rng.choice(prompts, size=count)[:, None], answers], axis=1).astype(np.int32)


def _assembled(
    prompts: Prompts, answers: Sequence[Sequence[Answer]], rewards: np.ndarray, facts: Mapping[str, float]
) -> Rollout:
    ids = lambda one: np.asarray(one, np.int32)
    groups = [
        (ids(asked.ids), *(ids(answer.token_ids) for answer in of_prompt))
        for (asked, _), of_prompt in zip(prompts, answers, strict=True)
    ]
    drawn = [[np.asarray(answer.logprobs, np.float32) for answer in of_prompt] for of_prompt in answers]
    return Rollout(groups, drawn, rewards, facts)


def facts_of(rewards: np.ndarray, rewarded: Rewarded, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """What the record of an update tells of its answers: TRL's names, over the answers that have a reward.

    `reward`, their mean; `reward_std`, the mean over prompts of their standard deviation; `frac_reward_zero_std`, the
    share of prompts whose answers are all worth the same and teach nothing; `answers`, and `no_verdict` of them without
    a reward; `completions/mean_length` in tokens, and `completions/clipped_ratio`, the share that was cut off.
    """
    there = np.isfinite(rewards)
    stds = [
        float(np.std(r[known], ddof=1)) if known.sum() > 1 else 0.0 for r, known in zip(rewards, there, strict=True)
    ]
    flat = [answer for group in answers for answer in group]
    facts: dict[str, Any] = {
        "reward": float(rewards[there].mean()),
        "reward_std": float(np.mean(stds)),
        "frac_reward_zero_std": float(np.mean(np.isclose(stds, 0.0))),
        "answers": len(flat),
        "completions/mean_length": float(np.mean([len(answer.token_ids) for answer in flat])),
        "completions/clipped_ratio": float(np.mean([answer.finish_reason != "stop" for answer in flat])),
    }
    if not there.all():
        facts["no_verdict"] = int((~there).sum())
    if len(rewarded.parts) > 1:
        facts |= {f"reward/{name}": float(np.nanmean(x)) for name, x in rewarded.parts.items() if np.isfinite(x).any()}
    return facts
