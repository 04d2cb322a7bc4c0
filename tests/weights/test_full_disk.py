"""An export on a disk without room: one line, nothing half there, and the same call again finishes it."""

import flax.linen as nn
import jax
import pytest

from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.model.forward import init_params
from dpo_jax.model.lora import init_adapters
from dpo_jax.model.options import Lora
from dpo_jax.weights.huggingface import save_weights
from dpo_jax.weights.peft import save_adapters
from tests.disks import grow, small_disk
from tests.oracles.oracle import CONFIG

LORA = Lora(rank=64, alpha=64.0, targets=("q", "down"))


def _export(directory):
    params = jax.jit(lambda key: nn.meta.unbox(init_params(key, CONFIG)))(jax.random.key(0))
    save_weights(params, CONFIG, directory, dtype="float32")


def _export_adapters(directory):
    save_adapters(nn.meta.unbox(init_adapters(jax.random.key(1), CONFIG, LORA)), CONFIG, LORA, directory, base="x")


@pytest.mark.parametrize("export", [_export, _export_adapters])
def test_an_export_on_a_full_disk_is_one_line_and_the_same_call_finishes_it(export, tmp_path):
    with small_disk(tmp_path / "disk", "16k"):
        directory = tmp_path / "disk" / "export"
        with pytest.raises(UserError, match=r"export: the export cannot be written \(.*No space left") as caught:
            export(directory)
        assert caught.value.code == SAVE_FAILED
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "disk").iterdir()) == []
        grow(tmp_path / "disk", "4m")
        export(directory)
        export(tmp_path / "elsewhere")
        for file in (tmp_path / "elsewhere").iterdir():
            assert (directory / file.name).read_bytes() == file.read_bytes()
