"""A finished run whose files were damaged, deleted or changed, and the same command again."""

import json
import shutil

import pytest

from dpo_jax import train
from tests.end_to_end.test_train import SMALL, _command, _values

pytestmark = pytest.mark.slow

TINY = SMALL | {
    "batch_size": 8,
    "sft_steps": 0,
    "num_steps": 2,
    "checkpoint_every": 1,
    "eval_pairs": 0,
    "sample_tokens": 4,
    "kl_prompts": 0,
}


def _run(workdir, capsys, **changed):
    """The exit code, what was printed and the lines on standard error."""
    code = train.main(_command(workdir, **(TINY | changed))[2:])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, " ".join(out.split()), err.splitlines()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(_command(workdir, **TINY)[2:]) == 0
    return workdir


@pytest.fixture
def work(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_records_that_are_lost_beside_a_checkpoint_are_told(work, capsys):
    lines = (work / "metrics.jsonl").read_text().splitlines(keepends=True)
    (work / "metrics.jsonl").write_text("".join(lines[:1]))
    (work / "samples.jsonl").unlink()
    code, said, _ = _run(work, capsys)
    assert code == 0
    assert "resuming from checkpoint 2" in said
    assert (
        f"warning: metrics.jsonl has 1 of the {len(lines)} records that were there when checkpoint 2 was made" in said
    )
    assert "warning: samples.jsonl has none of the 2 records" in said
    code, said, _ = _run(work, capsys)
    assert "metrics.jsonl has 1 of" in said, "as long as the newest checkpoint is the one that has more"


def test_without_its_config_a_run_goes_on_with_no_other(work, finished, capsys):
    (work / "config.json").unlink()
    code, out, said = _run(work, capsys, dpo_beta=0.9)
    assert (code, out, len(said)) == (2, "", 1)
    assert "checkpoints/1 holds a run of another config (dpo_beta: 0.1 there, 0.9 asked)" in said[0]
    code, _, _ = _run(work, capsys)
    assert code == 0
    assert json.loads((work / "config.json").read_text()) == json.loads((finished / "config.json").read_text())
    assert _values(work) == _values(finished)


def test_answers_after_training_that_are_not_all_there_are_made_again(work, finished, capsys):
    """As where the process was killed, or the disk was full, between two of them."""
    whole = (finished / "samples.jsonl").read_text()
    (work / "samples.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]) + '{"when": "af')
    assert _run(work, capsys)[0] == 0
    assert (work / "samples.jsonl").read_text() == whole


def test_an_update_that_loses_all_numbers_exports_nothing(tmp_path, capsys):
    """The one update itself was finite: nothing but what it left behind is not."""
    changed = {"num_steps": 1, "warmup_steps": 0, "learning_rate": 1e30, "eval_pairs": 8, "sample_prompts": 0}
    code, _, said = _run(tmp_path / "run", capsys, **changed)
    assert code == 65, said
    assert "not finite" in said[-1]
    assert "nothing is exported" in said[-1]
    assert not (tmp_path / "run" / "export").exists()
