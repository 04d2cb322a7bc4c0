"""Checkpoints: what comes back is what was saved, on any mesh; what was cut off is not there."""

import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.model.forward import init_params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.training import checkpoint
from dpo_jax.training.optimizer import optimizer
from dpo_jax.training.reference import own_reference
from dpo_jax.training.setup import abstract_state, start_state
from tests.oracles.oracle import CONFIG

TX = optimizer("adamw", lambda _: 0.1, weight_decay=0.0, max_grad_norm=0.0)


def _layout(sizes, param_dtype="float32"):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return place_model(CONFIG, mesh, LayoutOptions(param_dtype, "float32"))


def _state(layout):
    fresh = jax.jit(lambda k: nn.meta.unbox(init_params(k, CONFIG)), out_shardings=layout.shardings)
    return start_state(fresh(jax.random.key(0)), TX, layout)


@functools.partial(jax.jit, donate_argnums=0)
def _changed(state):
    return state.replace(step=state.step + 1, params=jax.tree.map(lambda p: p * 1.5, state.params))


def _host(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


@pytest.mark.slow
def test_states_come_back_on_another_mesh_although_the_next_step_took_their_memory(tmp_path):
    layout = _layout((1, 4, 2))
    state, kept = _state(layout), {}
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoint.latest_step(checkpoints) is None
        for n in (1, 2, 3):
            state = _changed(state)
            kept[n] = _host(state)
            checkpoint.save_checkpoint(checkpoints, n, state)  # goes on while the next step donates the arrays
    other = _layout((2, 1, 1))
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 3
        assert [int(c.step) for c in checkpoints.orbax.checkpoints] == [2, 3]
        for n in (2, 3):
            restored = checkpoint.restore(checkpoints, n, abstract_state(TX, other))
            jax.tree.map(np.testing.assert_array_equal, _host(restored), kept[n])
            assert restored.params["embedding"].sharding.mesh.devices.size == 2


def test_a_save_that_was_cut_off_is_not_there(tmp_path):
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoint.save_checkpoint(checkpoints, 1, _state(_layout((1, 1, 1))))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 1


def test_another_models_checkpoint_is_refused_in_one_line(tmp_path):
    layout = _layout((1, 1, 1))
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoint.save_checkpoint(checkpoints, 1, {"something": jnp.ones(3)})
    with (
        checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(UserError, match=r"checkpoint 1 in .* cannot be restored") as caught,
    ):
        checkpoint.restore(checkpoints, 1, abstract_state(TX, layout))
    assert "\n" not in str(caught.value)


def test_the_reference_is_saved_once_and_missed_when_gone(tmp_path):
    layout = _layout((1, 2, 1))
    params = _state(layout).params
    reference = own_reference(tmp_path / "reference", params, layout)
    jax.tree.map(np.testing.assert_array_equal, _host(reference), _host(params))
    again = own_reference(tmp_path / "reference", None, layout)
    jax.tree.map(np.testing.assert_array_equal, _host(again), _host(params))
    with pytest.raises(UserError, match="is gone; start again"):
        own_reference(tmp_path / "elsewhere", None, layout)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run's directory with checkpoints 1, 2, 3, and their states."""
    work, layout = tmp_path_factory.mktemp("three"), _layout((1, 1, 1))
    state, kept = _state(layout), {}
    with checkpoint.open_checkpoints(work / "checkpoints", keep=3) as checkpoints:
        for n in (1, 2, 3):
            state = _changed(state)
            kept[n] = _host(state)
            checkpoint.save_checkpoint(checkpoints, n, state)
    return work, kept


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _files(directory):
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def test_whatever_file_is_damaged_the_newest_sound_checkpoint_is_found_and_read(three, tmp_path):
    saved, kept = three
    abstract = abstract_state(TX, _layout((1, 1, 1)))
    restored = 0
    for name in _files(saved / "checkpoints" / "3"):
        for damage in (_flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()):
            shutil.rmtree(tmp_path)
            shutil.copytree(saved, tmp_path)
            damage(tmp_path / "checkpoints" / "3" / name)
            told = checkpoint.set_aside_damaged(tmp_path / "checkpoints")
            with checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
                newest = checkpoint.latest_step(checkpoints)
                assert newest == (2 if told else 3), name
                if told:
                    assert str(name) in told[0] or name.name == "checksums.json"
                    assert _files(tmp_path / "damaged" / "3")
                else:  # what orbax wrote last holds times and a mark, no numbers
                    assert name.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
                if not told or restored == 0:
                    state = checkpoint.restore(checkpoints, newest, abstract)
                    jax.tree.map(np.testing.assert_array_equal, _host(state), kept[newest])
                    restored += 1


def test_checksums_that_list_nothing_or_not_all_vouch_for_nothing(three, tmp_path):
    for text, said in (
        ("{}", "is not in checksums.json"),
        ("null", "checksums.json cannot be read"),
        ('{"x": 3}', "checksums.json cannot be read"),
        ('{"x": {"bytes": Infinity, "sha256": ""}}', "checksums.json cannot be read"),
        ('{"../../x": {"bytes": 1, "sha256": ""}}', "../../x is missing"),
    ):
        work = shutil.copytree(three[0], tmp_path / "run")
        (work / "checkpoints" / "3" / "checksums.json").write_text(text)
        (told,) = checkpoint.set_aside_damaged(work / "checkpoints")
        assert said in told
        shutil.rmtree(work)


def test_what_only_looks_like_a_checkpoint_is_set_aside(three, tmp_path):
    work = shutil.copytree(three[0], tmp_path / "run")
    odd = ("²", "１２", "٣", "-1", "08", "99999999999999999999")
    for name in odd:
        (work / "checkpoints" / name).mkdir()
    (work / "checkpoints" / "7").write_text("a file")
    (work / "checkpoints" / "notes.txt").write_text("mine")
    shutil.copytree(work / "checkpoints" / "3", work / "checkpoints" / "9")  # a copy under another number
    told = checkpoint.set_aside_damaged(work / "checkpoints")
    assert len(told) == len(odd) + 2
    assert any("checkpoint 9 is damaged (it was written as checkpoint 3)" in line for line in told)
    assert sorted(p.name for p in (work / "damaged").iterdir()) == sorted([*odd, "7", "9"])
    with checkpoint.open_checkpoints(work / "checkpoints", keep=3) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 3
    assert (work / "checkpoints" / "notes.txt").exists()


@pytest.mark.parametrize("text", ["null", "[]", "3", '{"item_handlers": 3}', '{"init_timestamp_nsecs": "x"}', ""])
def test_metadata_of_another_shape_hides_no_sound_checkpoint(text, three, tmp_path):
    """Of the newest or of an older one."""
    for number, newest in ((3, 2), (1, 3)):
        work = shutil.copytree(three[0], tmp_path / f"run{number}")
        (work / "checkpoints" / str(number) / "_CHECKPOINT_METADATA").write_text(text)
        told = checkpoint.set_aside_damaged(work / "checkpoints")
        assert [line.split(" (")[0] for line in told] == [f"checkpoint {number} is damaged"]
        with checkpoint.open_checkpoints(work / "checkpoints", keep=3) as checkpoints:
            assert checkpoint.latest_step(checkpoints) == newest


def test_a_checkpoint_knows_what_it_was_made_with(tmp_path):
    state = _state(_layout((1, 1, 1)))
    held = {"metrics.jsonl": {"records": 3, "digest": "aa"}}
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.made_with = lambda: {"config": {"seed": 1}, "records": held}
        checkpoint.save_checkpoint(checkpoints, 5, state)
        checkpoint.finish_saving(checkpoints, 0.0)
        assert checkpoint.records_made_with(tmp_path / "checkpoints" / "5") == held
    assert checkpoint.set_aside_damaged(tmp_path / "checkpoints") == []


def test_a_file_in_place_of_the_directory_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    assert checkpoint.set_aside_damaged(tmp_path / "checkpoints") == []
    with (
        pytest.raises(UserError, match=r"checkpoints is a file"),
        checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=2),
    ):
        pass


def test_damaged_checkpoints_do_not_push_out_the_last_sound_one(three, tmp_path):
    work = shutil.copytree(three[0], tmp_path / "run")
    for n in (2, 3):
        _flip(max((work / "checkpoints" / str(n)).rglob("*"), key=lambda p: p.stat().st_size))
    told = checkpoint.set_aside_damaged(work / "checkpoints")
    assert [line.split(" is damaged")[0] for line in told] == ["checkpoint 3", "checkpoint 2"]
    with checkpoint.open_checkpoints(work / "checkpoints", keep=2) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 1
        checkpoint.save_checkpoint(checkpoints, 2, _state(_layout((1, 1, 1))))
    assert sorted(p.name for p in (work / "checkpoints").iterdir()) == ["1", "2"]
    assert checkpoint.set_aside_damaged(work / "checkpoints") == []


def test_a_damaged_reference_is_named(tmp_path):
    layout = _layout((1, 1, 1))
    own_reference(tmp_path / "reference", _state(layout).params, layout)
    _flip(max((tmp_path / "reference").rglob("*"), key=lambda p: p.stat().st_size))
    with pytest.raises(UserError, match=r"reference is damaged \(.* is not what was written\)"):
        own_reference(tmp_path / "reference", None, layout)
