"""Rounds of on-policy preferences: pairs are collected with the policy as it is, and trained on, again and again.

RUN/rounds/N.jsonl has the pairs of round N (from 1; `sft` are those that SFT takes the best answers of), in the
preference API's form and with the token ids that were drawn, which are what is trained on: nothing is tokenised again.
While a round is collected, RUN/rounds/N.parts/ has a file for each block of prompts that is done.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.disk import read_json, remove_tree, write_json, write_whole
from dpo_jax.errors import Stopped, UserError
from dpo_jax.model.config import Params
from dpo_jax.parallel.mesh import any_process
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.preference.load import load_preference_model
from dpo_jax.preference.models import PreferenceModel
from dpo_jax.records.records import read_records
from dpo_jax.records.shapes import RoundAbout, RoundBlock, RoundPair
from dpo_jax.rows.build import FirstOnly, Group
from dpo_jax.rows.schedule import Schedule, fitted, make_schedule
from dpo_jax.rows.shape import RowLimits
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.training.on_policy import Collected, check_judged, collect_pairs, pair_record
from dpo_jax.training.own_prompts import OwnPrompts
from dpo_jax.training.setup import Run

BLOCK = 64  # prompts that are drawn and judged together, and done again at most where a run was stopped
SFT = "sft"
_IDS = ("prompt_token_ids", "token_ids_a", "token_ids_b")


@dataclass(frozen=True)
class RoundPairs:
    """The pairs of a round as a schedule takes them: token ids of prompt, better and worse answer."""

    groups: tuple[Group, ...]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lengths = np.array([[len(ids) for ids in group] for group in self.groups], np.int32).reshape(-1, 3)
        object.__setattr__(self, "lengths", lengths)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> Group:
        return self.groups[i]


class RoundCollector:
    """Collects the pairs of rounds, or reads those that were collected before, and schedules them.

    Args:
      limits: of rows.
    """

    def __init__(self, run: Run, limits: RowLimits):
        self.run, self.limits = run, limits
        self.prompts = OwnPrompts(run, run.settings.rounds.prompts)
        self._judge: PreferenceModel | None = None
        self._schedule: Schedule | None = None
        self._scheduled = 0

    def schedule(self, number: int, updates: int, params: Params) -> Schedule:
        """The schedule of round `number` (from 0), for the policy as it is after so many updates of DPO.

        Rows keep the shapes of the round before, for which steps are compiled, unless the new pairs would waste them.

        Raises:
          UserError: the judge does not answer, or no pair could be made.
          Stopped: a signal came; the blocks that are done are kept.
        """
        for earlier in range(
            self._scheduled, number
        ):  # of a run that is resumed: their shapes decide those of this one
            self._add(read_pairs(self._path(str(earlier + 1))))
        pairs = self.pairs(str(number + 1), lambda: params, self.prompts.places(number), updates)
        self._scheduled = number
        return self._add(pairs)

    def _add(self, pairs: RoundPairs) -> Schedule:
        s, before = self.run.settings, self._schedule
        order = s.batch.order if len(pairs) >= s.batch.size else replace(s.batch.order, drop_remainder=False)
        train, answer = self.run.data.train, s.data.max_completion_length
        longest = np.array([train.lengths[:, 0].max(), answer, answer])  # of any round
        ladder = None if before is None else before.ladder
        schedule = fitted(pairs, s.batch.size, self.limits, order, longest=longest, before=ladder)
        self._schedule, self._scheduled = schedule, self._scheduled + 1
        return schedule

    def pairs(self, name: str, params: Callable[[], Params], prompts: np.ndarray, updates: int) -> RoundPairs:
        """The pairs of a round by its name: collected for these training prompts, or read if they are there.

        Args:
          prompts: their places among the training pairs.
          updates: of DPO, before the round.
        """
        path = self._path(name)
        s = self.run.settings
        mid_round = self.run.done > (0 if name == SFT else s.sft_steps + updates)
        # Every process has its own file: where one lacks it, all collect again what is the same for all.
        if not mid_round and any_process(not (path.is_file() and _about(path).is_file())):
            self._collect(name, path, params(), prompts)
        if not mid_round:
            about = read_json(_about(path), f"remove it and {path.name}, and they are collected again", RoundAbout)
            self.run.writer.write({"step": updates, "split": "collect", "round": name} | about)
        return read_pairs(path)

    def _path(self, name: str) -> Path:
        """Of this process: hosts may have disks of their own, or share one."""
        rounds, process = self.run.workdir / "rounds", jax.process_index()
        return (rounds / f"process-{process}" if process else rounds) / f"{name}.jsonl"

    def _collect(self, name: str, path: Path, params: Params, places: np.ndarray) -> None:
        """Collect a round, block by block, and write its file."""
        run, s = self.run, self.run.settings
        if self._judge is None:
            self._judge = load_preference_model(s.rounds.judge)
        prompts = [asked for asked, _ in self.prompts.read(places.tolist()).values()]
        if not prompts:
            raise UserError(
                f"collect_judge={s.rounds.judge}: no training prompt is a conversation that a judge can be shown"
            )
        number = 0 if name == SFT else int(name)
        rules = replace(s.rounds.rules, mode="best_worst") if name == SFT else s.rounds.rules  # the best, once each
        asked = SamplingParams(
            n=s.rounds.n,
            temperature=s.rounds.temperature,
            max_tokens=s.data.max_completion_length,
            seed=s.seed,
            round=number,
        )
        parts = path.with_suffix(".parts")
        parts.mkdir(parents=True, exist_ok=True)
        run.writer.message(f"round {name}: collecting {s.rounds.n} answers to each of {len(prompts):,} prompts")
        say = lambda what: beat(what, LONGER)
        every_line = {"model": s.model, "judge": s.rounds.judge, "seed": s.seed, "round": number}
        for at in range(0, len(prompts), BLOCK):
            part = parts / f"{at // BLOCK:06}.json"
            if not any_process(not part.is_file()):
                continue
            block = prompts[at : at + BLOCK]
            collected = collect_pairs(run.sampler, run.base | params, self._judge, block, asked, rules, say)
            if not at:
                check_judged(self._judge, collected)
            write_json(part, _kept(collected, every_line, len(block) * s.rounds.n))
            if any_process(run.stop.is_set()):
                raise Stopped
        mend = "remove it, and its prompts are answered again"
        blocks = [read_json(part, mend, RoundBlock) for part in sorted(parts.glob("*.json"))]
        about = _summed(blocks, len(places) - len(prompts))
        if not about["pairs"]:
            why = ", ".join(f"{key.removeprefix('dropped/')} {n}" for key, n in about.items() if "dropped/" in key)
            raise UserError(f"round {name}: no pair could be made of its answers ({why}); docs/collecting.md says more")
        write_json(_about(path), about)
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for block in blocks for line in block["lines"])
        write_whole(path, "".join(lines))
        remove_tree(parts)


def best_answers(run: Run, params: Callable[[], Params], limits: RowLimits) -> Schedule:
    """The schedule of SFT on the best of n answers to `round_prompts` training prompts, drawn by the model as it is."""
    collector, s = RoundCollector(run, limits), run.settings
    pairs = FirstOnly(collector.pairs(SFT, params, collector.prompts.places(0), 0))
    order = s.batch.order if len(pairs) >= s.batch.size else replace(s.batch.order, drop_remainder=False)
    return make_schedule(pairs, s.batch.size, limits, order)


def read_pairs(path: Path) -> RoundPairs:
    """The token ids of a round's file.

    Raises:
      UserError: it is gone, or not as it was written.
    """
    records = read_records(path, RoundPair)
    groups = [tuple(np.asarray(record[key], np.int32) for key in _IDS) for record in records]
    if not groups:
        raise UserError(f"{path} is gone, the pairs that this run was trained on; put it back, or begin the run anew")
    return RoundPairs(tuple(groups))


def _about(path: Path) -> Path:
    return path.with_suffix(".json")


def _kept(collected: Collected, every_line: dict[str, Any], answers: int) -> dict[str, Any]:
    """A block as its file holds it."""
    lines = []
    for pair in collected.pairs:
        ids = (list(pair.asked.ids), *(answer.token_ids for answer in pair.answers))
        tokens = {key: list(map(int, one)) for key, one in zip(_IDS, ids, strict=True)}
        lines.append(pair_record(pair, every_line) | tokens)
    scores = np.concatenate(collected.scores)
    there = scores[~np.isnan(scores)]
    return {
        "lines": lines,
        "dropped": dict(collected.dropped),
        "counts": {"answers": answers, "tokens": collected.tokens, "scored": len(there)},
        "score": float(there.sum()),
        "sampling_seconds": collected.sampling_seconds,
        "judging_seconds": collected.judging_seconds,
    }


def _summed(blocks: Sequence[dict[str, Any]], without_conversation: int) -> dict[str, Any]:
    """What the record of a round says of its blocks."""
    lines = [line for block in blocks for line in block["lines"]]
    dropped: Counter[str] = Counter({"no_conversation": without_conversation})
    totals: Counter[str] = Counter()
    for block in blocks:
        dropped.update(block["dropped"])
        totals.update(block["counts"])
    seconds = {key: sum(block[key] for block in blocks) for key in ("sampling_seconds", "judging_seconds")}
    about: dict[str, Any] = {"pairs": len(lines), "answers": totals["answers"], "tokens": totals["tokens"]}
    about["score"] = sum(block["score"] for block in blocks) / max(1, totals["scored"])
    for said, side in (("better", "a"), ("worse", "b")):
        for name in ("score", "tokens"):
            about[f"{name}_{said}"] = float(np.mean([line[f"{name}_{side}"] for line in lines])) if lines else None
    about["tokens_per_second"] = totals["tokens"] / max(seconds["sampling_seconds"], 1e-9)
    return about | seconds | {f"dropped/{reason}": n for reason, n in dropped.items() if n}
