"""The page and the card of a reward model: its scores drawn, its words its own."""

import json

from dpo_jax.disk import write_json
from dpo_jax.report.card import write_card
from dpo_jax.report.command import write_report
from dpo_jax.report.runs import load_run
from tests.report.test_page import Page

RECORD = {"margin": 1.25, "chosen_reward": 0.75, "rejected_reward": -0.5, "mean_reward": 0.125, "min_reward": -2.0,
          "max_reward": 2.5}  # fmt: skip
SCORES = {"chosen": [1.0, 2.0, -1.0, 0.5], "rejected": [0.0, -1.0, 0.0, 0.5],
          "chosen_tokens": [5, 6, 7, 8], "rejected_tokens": [5, 5, 5, 5]}  # fmt: skip


def make(directory):
    directory.mkdir()
    write_json(directory / "config.json", {"task": "reward", "model": "tiny", "dataset": "synthetic", "num_steps": 10,
               "reward_center": 0.01, "dpo_beta": 0.1, "loss": "sigmoid"})  # fmt: skip
    records = [
        {"step": 0, "split": "eval", "loss": 0.6931, "accuracy": 0.484, "pairs": 256, **RECORD, "margin": 0.003},
        {"step": 5, "split": "train", "loss": 0.31, "accuracy": 0.875, "learning_rate": 1e-4, **RECORD},
        {"step": 10, "split": "eval", "loss": 0.2137, "accuracy": 0.9375, "pairs": 256, **RECORD},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_json(directory / "scores.json", SCORES)
    return directory


def test_the_page_shows_scores_and_how_sure_they_are(tmp_path):
    page = Page(write_report(make(tmp_path / "run")))
    text = " ".join(page.text.split())
    assert "tiny: reward model on synthetic" in text
    assert "Bradley-Terry, centring 0.01" in text
    assert "Scores of held-out pairs" in text
    assert "Calibration" in text
    # Margins 1 and -1 say 0.7311 and are right in a half, 3 says 0.9526 and is right, 0 says 0.5 and is half right.
    error = (2 * (0.7311 - 0.5) + (1 - 0.9526) + 0) / 4
    assert f"differs from the share that is right by {error:.3f}" in text
    assert "dpo_beta" not in text.split("Full configuration")[0]
    assert "AutoModelForSequenceClassification loads it" in text or "Checkpoints" not in text


def test_a_score_that_is_not_finite_is_left_out(tmp_path):
    run = make(tmp_path / "run")
    write_json(run / "scores.json", {**SCORES, "chosen": [None, 2.0, -1.0, 0.5]})
    assert "over 3 held-out pairs" in " ".join(Page(write_report(run)).text.split())
    write_json(run / "scores.json", {**SCORES, "chosen": [None] * 4})
    assert "Calibration" not in Page(write_report(run)).text


def test_the_card_says_how_it_scores(tmp_path):
    run = make(tmp_path / "run")
    (run / "export").mkdir()
    write_card(load_run(run), run / "export", base=None)
    text = (run / "export" / "README.md").read_text()
    assert "as a reward model of preferences (Bradley-Terry)" in text
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    assert "1 / (1 + exp(score A − score B))" in text
    assert "`dpo_beta`" not in text
    assert "pipeline_tag: text-classification" in text
