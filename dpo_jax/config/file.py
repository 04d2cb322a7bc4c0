"""Config files: Python files with a `get_config(preset="")` that returns a ConfigDict with the keys of `keys.py`."""

import contextlib
import importlib.metadata
import sys
import traceback
from pathlib import Path
from types import ModuleType

import ml_collections

from dpo_jax.config.keys import KEYS
from dpo_jax.config.values import check_name
from dpo_jax.errors import UserError

OURS = "configs/common.py"


def get_config(file: str = "") -> ml_collections.ConfigDict:
    """A config to change and run: every key at its default, or as a config file sets it.

    Args:
      file: FILE.py or FILE.py:PRESET, as `--config` takes it; empty for the defaults.

    Raises:
      UserError: the file or the preset does not exist, or the file is wrong; in one line.

    >>> get_config().dpo_beta
    0.1
    """
    if not file:
        return ml_collections.ConfigDict({name: key.default for name, key in KEYS.items()})
    check_name("--config", file)
    name, colon, preset = file.partition(":")
    path, ours, given = Path(name), _home() / name, f"--config={file}"
    if not path.exists() and ours.is_file():
        path = ours
    if not path.is_file():
        _refuse_path(path, given)
    try:
        config = _load(path).get_config(*([preset] if colon else []))
    except UserError as e:
        raise UserError(f"{given}: {e}") from None
    except (Exception, SystemExit) as e:  # the user's own code: whatever is wrong in it is one line
        raise UserError(f"{given}: {_described(e, path)}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{given} cannot be read: get_config() must return a ConfigDict")
    return config


def _home() -> Path:
    """The directory that holds our `configs/`: a checkout, or where a wheel puts them as data."""
    checkout = Path(__file__).parents[2]
    if not (checkout / OURS).is_file():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files("dpo_jax") or ():
                if file.as_posix().endswith(OURS):
                    return Path(str(file.locate())).resolve().parents[1]
    return checkout


def _refuse_path(path: Path, given: str) -> None:
    directory = path if path.is_dir() else path.parent
    home = Path() if directory.is_dir() or path.is_absolute() else _home()
    files = sorted(p.relative_to(home) if home != Path() else p for p in (home / directory).glob("*.py"))
    names = ", ".join(str(p) for p in files if p.name not in ("__init__.py", "common.py"))
    hint = f"there are {names}" if names else "give FILE.py or FILE.py:PRESET"
    raise UserError(f"{given}: {'a directory, not a file' if path.is_dir() else 'no such file'}; {hint}")


def _load(path: Path) -> ModuleType:
    # A config imports its neighbours as `configs.NAME`, wherever the command is run from.
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    module = ModuleType("config_file")
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def _described(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the file where it came from."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "configs":
        return f"{words}; begin with `c = dpo_jax.get_config()`, which has every key at its default"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{words} (line {lines[-1]})" if lines else words
