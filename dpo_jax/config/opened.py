"""Settings from where a user has them: a config file, or the directory of a run."""

from pathlib import Path

from dpo_jax.bucket.client import BucketError
from dpo_jax.bucket.path import as_path
from dpo_jax.config.check import check
from dpo_jax.config.file import get_config
from dpo_jax.config.keys import KEYS
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.disk import read_json
from dpo_jax.errors import UserError
from dpo_jax.records.directory import CONFIG


def is_run(directory: Path) -> bool:
    """Whether a directory is a training run's: its config.json has our keys, not a model's."""
    try:
        held = read_json(directory / CONFIG)
    except BucketError:  # which says nothing about the directory
        raise
    except UserError:
        return False
    return "dpo_beta" in held and "model_type" not in held


def run_settings(directory: Path) -> Settings:
    """The settings that a run was begun with; keys that another version had are left out.

    Raises:
      UserError: its config.json cannot be read, or has values that are not legal any more.
    """
    path = directory / CONFIG
    held = read_json(path)
    table = {name: held.get(name, key.default) for name, key in KEYS.items()}
    try:
        check(table)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return read_settings(table)


def settings_of(source: str) -> Settings:
    """The settings of FILE.py or FILE.py:PRESET, of a run's directory, or of its config.json.

    Raises:
      UserError: there are none, or they are not legal.
    """
    path = as_path(source)
    if path.name == CONFIG and path.is_file():
        path = path.parent
    if path.is_dir():
        if not is_run(path):
            raise UserError(f"--config={source}: no run's directory, which has a {CONFIG}; give one, or FILE.py")
        return run_settings(path)
    table = dict(get_config(source))
    check(table)
    return read_settings(table)
