"""Config files: found from everywhere, and whatever is wrong with one is said in one line without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_jax
from configs import hhh
from dpo_jax.config.file import get_config
from dpo_jax.errors import UserError


def test_defaults_a_file_and_a_preset():
    assert get_config().batch_size == 64
    assert get_config("configs/hhh.py").batch_size == 128
    assert get_config("configs/hhh.py:tiny").to_dict() == hhh.get_config("tiny").to_dict()


def test_our_files_are_found_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_config("configs/hhh.py:tiny").to_dict() == hhh.get_config("tiny").to_dict()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/hhh.py").write_text(
        "import dpo_jax\n\n\ndef get_config():\n    c = dpo_jax.get_config()\n    c.seed = 5\n    return c\n"
    )
    assert get_config("configs/hhh.py").seed == 5  # one's own comes first


def test_a_file_of_ones_own_builds_on_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dpo_jax\n\n\ndef get_config(preset=''):\n"
        "    c = dpo_jax.get_config(f'configs/hhh.py:{preset}')\n    c.batch_size = 3\n    return c\n"
    )
    command = "import dpo_jax; c = dpo_jax.get_config('mine.py:tiny'); print(c.batch_size, c.model)"
    environment = os.environ | {"PYTHONPATH": str(Path(dpo_jax.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["3", "tiny"], done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def get_config(arg=''):\n    return missing\n",
            "NameError: name 'missing' is not defined (line 2)",
        ),
        ("def get_config(\n", "SyntaxError: '(' was never closed (mine.py, line 1)"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
        ("from configs.none import x\n", "begin with `c = dpo_jax.get_config()`"),
        ("x = 1\n", "has no attribute 'get_config'"),
        ("def get_config():\n    return {'seed': 1}\n", "get_config() must return a ConfigDict"),
        ("def get_config():\n    raise ValueError('one\\ntwo')\n", "ValueError: one two (line 2)"),
        ("def get_config():\n    raise OSError('no disk')\n", "OSError: no disk (line 2)"),
        ("def get_config():\n    raise SystemExit('bye')\n", "SystemExit: bye (line 2)"),
        ("import dpo_jax\n\n\ndef get_config():\n    dpo_jax.get_config().seed = 'x'\n", "TypeError"),
        ("\0", "null bytes"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        get_config(str(path))
    said = str(e.value)
    assert said.startswith(f"--config={path}")
    assert words in said
    assert "Traceback" not in said
    assert "\n" not in said


@pytest.mark.parametrize("file", ["configs/hhh.py:huge", "configs/ultrafeedback.py:huge", "configs/helpsteer3.py:x:y"])
def test_an_unknown_preset_is_said_without_a_traceback(file):
    with pytest.raises(UserError) as e:
        get_config(file)
    said, preset = str(e.value), file.partition(":")[2]
    assert said.startswith(f"--config={file}: preset {preset!r} does not exist; there are configs/")
    assert "Traceback" not in said
    assert str(Path.cwd()) not in said
    assert "\n" not in said


def test_what_is_no_file_is_refused_with_those_that_are(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"configs: a directory, not a file; there are configs/helpsteer3.py"):
        get_config("configs")
    with pytest.raises(UserError, match=r"configs/none.py:tiny: no such file; there are configs/helpsteer3.py"):
        get_config("configs/none.py:tiny")
    with pytest.raises(UserError, match=r"no such file; give FILE.py or FILE.py:PRESET"):
        get_config(str(tmp_path / "none.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"configs/none.py: no such file; there are configs/helpsteer3.py, configs/hhh.py"
    ):
        get_config("configs/none.py")
