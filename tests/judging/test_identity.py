"""What tells judges apart: models by their files, functions by their code, others by what they say of themselves."""

import shutil

import numpy as np
import pytest

from dpo_jax.judging.identity import judge_identity
from dpo_jax.preference.models import Ensemble, Function, Pointwise
from tests.judging import judges
from tests.places import GOLDEN

MODEL = Pointwise("model", lambda answered: np.zeros(len(answered)))


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(GOLDEN / "trl/tiny", tmp_path / "model")


def test_a_model_by_its_files_and_how_it_is_read(directory):
    name = str(directory)
    before = judge_identity(name, MODEL, {})
    assert judge_identity(name, MODEL, {}) == before
    assert judge_identity(name, MODEL, {"dtype": "float32"}) != before
    two = judge_identity(f"implicit:{name},{GOLDEN / 'trl/tiny'}", MODEL, {})
    assert two["files"] == before["files"] * 2  # the same files elsewhere
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert judge_identity(name, MODEL, {}) != before


def test_each_of_several(directory):
    class Server:
        name = "server"

        def __call__(self, comparisons):
            return np.zeros(len(comparisons))

        def about(self):
            return {"url": "http://127.0.0.1", "fields": ("a", "b")}

    both = Ensemble((Function("f", judges.shorter), Server(), MODEL))
    found = judge_identity(f"f:f,http://127.0.0.1|m,{directory}", both, {"concurrency": 3})
    function, server, model = found["members"]
    assert len(function["code"]) == 24
    assert server == {"name": "http://127.0.0.1|m", "url": "http://127.0.0.1", "fields": ["a", "b"]}
    assert model["options"] == {"concurrency": 3}


def test_what_has_no_code_of_its_own():
    assert judge_identity("len", Function("len", len), {}) == {"name": "len", "code": ""}
    assert judge_identity("gold", MODEL, {}) == {"name": "gold"}
