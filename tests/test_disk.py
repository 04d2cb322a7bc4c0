"""Files on disk are whole or not there, and JSON that cannot be used is one line that says how to mend it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from dpo_jax.disk import read_json, whole_file, write_json, write_whole
from dpo_jax.errors import UserError
from tests import places


def test_a_file_appears_with_all_its_content(tmp_path):
    path = tmp_path / "numbers"
    with whole_file(path) as file:
        file.write(b"one ")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    write_whole(path, "vier, fünf")
    assert path.read_text(encoding="utf-8") == "vier, fünf"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "file", "before")

    def fail():
        with whole_file(tmp_path / "file") as file:
            file.write(b"after")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail()
    assert (tmp_path / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_of_several_exclusive_writers_the_first_succeeds(tmp_path):
    together, won = threading.Barrier(8), []

    def write(name):
        together.wait(30)
        with contextlib.suppress(FileExistsError), whole_file(tmp_path / "file", exclusive=True) as file:
            file.write(name)
        if (tmp_path / "file").read_bytes() == name:
            won.append(name)

    threads = [threading.Thread(target=write, args=(bytes([65 + n]),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_kill_leaves_what_was_there(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from dpo_jax.disk import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file:\n"
        "  file.write(b'after'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    write_whole(tmp_path / "file", "before")
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=places.ROOT, env=os.environ, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "before"


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"c": "ü"}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    write_json(tmp_path / "file.json", value, sort_keys=True)
    assert list(read_json(tmp_path / "file.json")) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"file\.json: cannot be read \(No such file or directory\); restore or remove it"),
        (b'{"a": 1', r"file\.json is not valid JSON \(.*\); restore or remove it"),
        (b"\xff", r"file\.json is not valid JSON \(.*\); restore or remove it"),
        (b"[1]", r"file\.json: holds list, needs an object; restore or remove it"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(tmp_path, content, words):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"; make another one$"):
        read_json(path, "make another one")
