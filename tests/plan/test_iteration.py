"""What is planned for an iteration of RL, as text and as lengths."""

import numpy as np
import pytest

from dpo_jax import get_config
from dpo_jax.config.settings import read_settings
from dpo_jax.plan import draft
from dpo_jax.plan.iteration import work_of
from dpo_jax.plan.lengths import completions_of, find_lengths
from dpo_jax.plan.text import iteration_lines
from dpo_jax.rows.batch import batch_spec
from dpo_jax.rows.schedule import efficiency, schedule_epoch
from dpo_jax.rows.shape import RowLimits, RowShape
from dpo_jax.training.rounds import BLOCK


def settings(**changed):
    c = get_config()
    c.update({"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "dataset": "hhh"} | changed)
    return read_settings(c)


@pytest.mark.parametrize(
    ("changed", "completions"),
    [({}, 2), ({"task": "rl", "rl_n": 8}, 8), ({"task": "sft"}, 1), ({"task": "sft", "sft_on": "both"}, 2)],
)
def test_groups_are_as_large_as_the_task_has_them(changed, completions):
    s = settings(**changed)
    assert completions_of(s) == completions
    assert np.asarray(find_lengths(s).lengths).shape[1] == 1 + completions


def test_rows_of_rl_are_chosen_as_its_rollouts_choose_them():
    s = settings(task="rl", rl_n=4, batch_size=8)
    lengths = find_lengths(s)
    schedule = draft._schedule(s, lengths, RowLimits())
    assert not schedule.order.shuffle
    assert schedule.ladder.home == ()
    sure = RowShape(int(lengths.lengths[:, 0].max()), (s.data.max_completion_length,) * 4, 8, 1)
    assert schedule.shapes[-1].rows == sure.rows
    assert all(0 <= ours - least < 8 for ours, least in zip(schedule.shapes[-1].widths, sure.widths, strict=True))
    some = np.asarray(lengths.lengths[: 8 * 40])
    assert efficiency(schedule_epoch(some, 8, schedule.ladder, schedule.order), some) > 0.7


def test_a_rewarded_batch_has_what_the_objective_reads():
    spec = batch_spec(RowShape(64, (16,) * 4, 2, 3), (1, 2), rewarded=True)
    assert spec.owner.shape == spec.drawn_logps.shape == (1, 2, 64)
    assert spec.rewards.shape == (1, 2, 3, 4)
    assert spec.drawn_tokens.shape == (1, 2, 3)
    assert spec.old_logps is None
    assert batch_spec(RowShape(64, (16,) * 4, 2, 3), (1, 2)).owner is None


def test_what_a_run_does_in_turns():
    rounds = {"rounds": 3, "round_prompts": 64, "collect_n": 6, "collect_judge": "gold", "max_completion_length": 96}
    found = work_of(settings(**rounds), 45)
    assert (found.name, found.prompts, found.groups, found.updates) == ("round", 64, 192, 15)
    assert work_of(settings(**rounds | {"round_prompts": 1000}), 45).at_once == BLOCK < 1000
    assert (found.asked.n, found.asked.max_tokens) == (6, 96)
    found = work_of(settings(task="rl", rl_n=4, batch_size=8, rl_minibatches=2, rl_epochs=2), 45)
    assert (found.name, found.prompts, found.groups, found.updates) == ("iteration", 16, 16, 4)
    assert work_of(settings(), 45) is None


def test_what_is_said_of_an_iteration():
    gib = 2**30
    report = {
        "name": "iteration", "updates": 1, "prompts": 32, "n": 8, "answer": 47.2,
        "answers_per_second": 100.0, "hbm_available": 32 * gib, "fits": False,
        "seconds": {"drawing": 1.0, "scoring": 0.5, "updating": 1.06},
        "sampling": {"step": {"interconnect_bytes": {"all-gather": 2.5e6}, "network_bytes": {}}},
        "memory": {"parameters": 4 * gib, "cache": 30 * gib, "total": 34 * gib},
    }  # fmt: skip
    head, memory, moved = iteration_lines(report)
    assert "32 prompts x 8 answers of 47 tokens, 1 update: drawing 1.00 s, scoring 0.50 s, updating 1.06 s" in head
    assert "a device receives all-gather 2.5 MB a token's step" in moved
    assert "total 34.00 of 32.00 GiB: DOES NOT FIT" in memory
