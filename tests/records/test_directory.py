"""Which checkpoints a run's directory has."""

from dpo_jax.records.directory import checkpoint_directories


def test_only_what_a_run_of_ours_names_is_a_checkpoint(tmp_path):
    for name in ("10", "2", "08", "-1", "²", "１２", "٣", "99999999999999999999", "4.orbax-checkpoint-tmp", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "5").write_text("a file")
    assert list(checkpoint_directories(tmp_path)) == [2, 10]
    assert checkpoint_directories(tmp_path)[10] == tmp_path / "checkpoints" / "10"


def test_none_where_there_is_no_such_directory(tmp_path):
    assert checkpoint_directories(tmp_path) == {}
    (tmp_path / "checkpoints").write_text("a file")
    assert checkpoint_directories(tmp_path) == {}
