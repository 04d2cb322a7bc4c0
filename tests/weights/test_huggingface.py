"""Weights: files and trees agree exactly in both directions, on any mesh, with logits equal to transformers'."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.model import tensors
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import hf_config
from dpo_jax.model.forward import ModelOptions, hidden_states, init_params, unembedding
from dpo_jax.parallel.mesh import host_shardings
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape
from dpo_jax.weights import hub as hub_module
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights import stored as stored_tensors
from dpo_jax.weights.find import find_policy
from tests import places
from tests.data.test_render import bpe_tokenizer
from tests.fakes.hub import closed_port, use_hub

GOLDEN = places.GOLDEN / "transformers"
STORIES = places.SHARED / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260k lies beside the project, not in it")

UNTIED = ModelConfig("llama", 96, 32, 48, 2, 4, 2, 8)
TIED = dataclasses.replace(UNTIED, head_dim=12, num_key_value_heads=1, tie_word_embeddings=True)


def shapes(config: ModelConfig) -> dict:
    return jax.eval_shape(lambda: nn.meta.unbox(init_params(jax.random.key(0), config)))


def random_params(config: ModelConfig) -> dict:
    """Every number another one, so that no exchange goes unseen."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), shapes(config))


def one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load(directory: Path, config: ModelConfig, dtype=jnp.float32) -> dict:
    return weights.load_weights(directory, config, one_device(), dtype)


def assert_same(a: dict, b: dict) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def logits(params: dict, config: ModelConfig, ids: np.ndarray) -> np.ndarray:
    """Logits `[B, T, V]` of plain sequences: rows that are all prompt."""
    B, T = ids.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    ones, none = jnp.ones((B, T), jnp.int32), jnp.zeros((B, 0), jnp.int32)
    batch = Batch(jnp.asarray(ids), ones, positions, none, none, none)
    forward = jax.jit(lambda p, rows: hidden_states(p, rows, RowShape(T, (0,)), ModelOptions(config))[0])
    hidden = forward(params, batch)
    found = np.asarray(jnp.einsum("BTD,VD->BTV", hidden, unembedding(params), precision="highest"))
    cap = config.final_logit_softcapping
    return cap * np.tanh(found / cap) if cap else found


@contextlib.contextmanager
def counted_reads(monkeypatch):
    """The sizes in bytes of all slices read from files."""
    sizes: list[int] = []

    class Counted:
        def __init__(self, tensor):
            self.tensor, self.get_shape, self.get_dtype = tensor, tensor.get_shape, tensor.get_dtype

        def __getitem__(self, index):
            value = self.tensor[index]
            sizes.append(value.nbytes)
            return value

    opened = stored_tensors.open_tensors
    with monkeypatch.context() as m:
        m.setattr(stored_tensors, "open_tensors", lambda *a: {k: Counted(v) for k, v in opened(*a).items()})
        yield sizes


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_table_covers_the_tree(config):
    tree = {path: x.shape for path, x in flax.traverse_util.flatten_dict(shapes(config)).items()}
    sizes = tensors.sizes(config)
    assert tree == {leaf.path: leaf.shape(sizes) for leaf in tensors.model_leaves(config)}
    assert sum(np.prod(shape) for shape in tree.values()) == config.parameter_count()


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20e3], ids=["one file", "shards"])
def test_round_trip_is_exact(tmp_path, config, max_shard_bytes):
    params = random_params(config)
    weights.save_weights(params, config, tmp_path / "m", dtype=jnp.float32, max_shard_bytes=max_shard_bytes)
    found, _ = weights.read_config(tmp_path / "m")
    assert found == config
    assert_same(load(tmp_path / "m", config), params)
    files = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    stored = {name: x for file in files for name, x in load_file(tmp_path / "m" / file).items()}
    assert ("lm_head.weight" in stored) is not config.tie_word_embeddings
    if max_shard_bytes == 5e9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored.values())
    assert all(sum(x.nbytes for x in load_file(tmp_path / "m" / file).values()) <= 20e3 for file in files)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_files(tmp_path, dtype):
    params = random_params(UNTIED)
    weights.save_weights(params, UNTIED, tmp_path / "m", dtype=dtype)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == jnp.dtype(dtype).name
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    assert_same(load(tmp_path / "m", UNTIED, dtype), rounded)
    back = load(tmp_path / "m", UNTIED)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(back))
    assert_same(back, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_large_tables_are_gathered_in_runs_of_rows(tmp_path, monkeypatch):
    params = random_params(UNTIED)
    monkeypatch.setattr(weights, "PIECE_BYTES", 4 * 32 * 7)  # 96 rows in runs of 7
    weights.save_weights(params, UNTIED, tmp_path / "m", dtype=jnp.float32)
    assert_same(load(tmp_path / "m", UNTIED), params)


@needs_stories
def test_a_real_checkpoint_comes_back_bit_by_bit(tmp_path):
    config, hf = weights.read_config(STORIES)
    weights.save_weights(load(STORIES, config), hf, tmp_path / "m", dtype=jnp.float32, tokenizer_from=STORIES)
    before, after = load_file(STORIES / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    before.pop("lm_head.weight", None)
    assert set(before) == set(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == hf
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == (STORIES / "tokenizer.model").read_bytes()


def test_every_named_chat_template_is_exported(tmp_path):
    source, templates = tmp_path / "source", {"default": "{{ messages }}", "tool_use": "t", "rag": "r"}
    tokenizer = bpe_tokenizer(templates)
    tokenizer.save_pretrained(source)
    named = sorted(file.name for file in (source / "additional_chat_templates").iterdir())
    assert named == ["rag.jinja", "tool_use.jinja"]
    weights.save_weights(random_params(UNTIED), UNTIED, tmp_path / "m", dtype=jnp.float32, tokenizer_from=source)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == templates


# ------------------------------------------------------------------------------------------------------- meshes

SPECS = {
    ("embedding",): P("tensor", "fsdp"),
    ("lm_head",): P("tensor", "fsdp"),
    ("layers", "attention", "q"): P(None, "fsdp", "tensor", None),
    ("layers", "attention", "k"): P(None, "fsdp", "tensor", None),
    ("layers", "attention", "v"): P(None, "fsdp", None, "tensor"),  # heads cut across, as nobody should
    ("layers", "attention", "o"): P(None, "tensor", None, "fsdp"),
    ("layers", "mlp", "gate"): P(None, "fsdp", "tensor"),
    ("layers", "mlp", "up"): P("tensor", "fsdp", None),  # layers over devices
    ("layers", "mlp", "down"): P(None, "tensor", ("data", "fsdp")),
}


def mesh_shardings(config: ModelConfig) -> dict:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    flat = {leaf.path: NamedSharding(mesh, SPECS.get(leaf.path, P())) for leaf in tensors.model_leaves(config)}
    return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_eight_devices_read_their_own_parts_once(tmp_path, monkeypatch):
    params, shardings = random_params(UNTIED), mesh_shardings(UNTIED)
    weights.save_weights(params, UNTIED, tmp_path / "m", dtype=jnp.float32)
    with counted_reads(monkeypatch) as sizes:
        sharded = weights.load_weights(tmp_path / "m", UNTIED, shardings, jnp.float32)
    assert_same(sharded, params)
    jax.tree.map(
        lambda x, s: s.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(f"{x.sharding}"), sharded, shardings
    )
    # `data` replicates almost everything, and yet nothing is read twice, but for the cut heads of v (whole, twice).
    cut = params["layers"]["attention"]["v"].nbytes
    assert sum(sizes) == 4 * UNTIED.parameter_count() + cut
    with jax.set_mesh(shardings["embedding"].mesh), jax.transfer_guard("disallow"):  # as in the trainer
        weights.save_weights(sharded, UNTIED, tmp_path / "again", dtype=jnp.float32)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_reference_is_read_into_the_hosts_memory(tmp_path):
    params, shardings = random_params(UNTIED), host_shardings(mesh_shardings(UNTIED))
    weights.save_weights(params, UNTIED, tmp_path / "m", dtype=jnp.float32)
    held = weights.load_weights(tmp_path / "m", UNTIED, shardings, jnp.float32)
    assert_same(held, params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(held)} == {"pinned_host"}


def test_host_memory_is_bounded_by_one_leaf(tmp_path, monkeypatch):
    config = dataclasses.replace(UNTIED, hidden_size=256, intermediate_size=512, num_hidden_layers=6, vocab_size=512)
    params = random_params(config)
    # Warm up: what is traced and compiled once is no copy of the model.
    weights.save_weights(params, config, tmp_path / "m", dtype=jnp.float32, max_shard_bytes=4e6)
    load(tmp_path / "m", config)
    leaf, tensor = 6 * 256 * 512 * 4, 256 * 512 * 4
    assert 4 * config.parameter_count() > 3.5 * leaf
    tracemalloc.start()
    try:
        weights.save_weights(params, config, tmp_path / "m", dtype=jnp.float32, max_shard_bytes=4e6)
        saving = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with counted_reads(monkeypatch) as sizes:
            load(tmp_path / "m", config)
        loading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # On a CPU the arrays may lie in our own host memory (jax aliases it), so the model itself counts once.
    assert max(sizes) <= tensor
    assert loading < 4 * config.parameter_count() + leaf + 2 * tensor
    assert saving < 4 * tensor


@pytest.mark.slow
def test_two_processes_write_one_export(tmp_path):
    """Parameters spread over two processes: both gather, the first one writes."""
    params = random_params(UNTIED)
    weights.save_weights(params, UNTIED, tmp_path / "m", dtype=jnp.float32)
    program = """
import sys, jax, jax.numpy as jnp
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from dpo_jax.model import tensors
from dpo_jax.weights import huggingface as weights
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
config, hf = weights.read_config(sys.argv[3])
specs = {"D": P("fsdp"), "VD": P(None, "fsdp")}
import flax.traverse_util as t
shardings = {x.path: NamedSharding(mesh, specs.get(x.ours, P(None, "fsdp"))) for x in tensors.model_leaves(config)}
params = weights.load_weights(sys.argv[3], config, t.unflatten_dict(shardings), jnp.float32)
assert not params["embedding"].is_fully_addressable
weights.save_weights(params, hf, sys.argv[4], dtype=jnp.float32, max_shard_bytes=20e3)
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = [str(tmp_path / "m"), str(tmp_path / "export")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, str(i), *arguments],
            env=environment,
            cwd=places.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert_same(load(tmp_path / "export", UNTIED), params)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def saved(tmp_path) -> Path:
    weights.save_weights(random_params(UNTIED), UNTIED, tmp_path / "m", dtype=jnp.float32)
    return tmp_path / "m"


def edit(directory: Path, **tensors: np.ndarray | None) -> None:
    """Replace, add or (None) remove tensors of model.safetensors."""
    stored = load_file(directory / "model.safetensors")
    stored = {k: v for k, v in (stored | tensors).items() if v is not None}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
ROW = np.zeros((3, 3), np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({K_PROJ: None}, [K_PROJ, "(16, 32)", "missing"]),
        ({K_PROJ: None, "lm_head.weight": None}, [K_PROJ, "and 1 more"]),
        ({K_PROJ: ROW}, [K_PROJ, "(3, 3)", "(16, 32)"]),
        ({"model.layers.2.mlp.up_proj.weight": ROW}, ["model.layers.2.mlp.up_proj.weight", "(3, 3)", "2 layers"]),
        ({K_PROJ: np.zeros((16, 32), np.int8)}, [K_PROJ, "I8", "float32"]),
    ],
    ids=["missing", "two missing", "shape", "extra", "dtype"],
)
def test_wrong_tensors_are_named(saved, tensors, words):
    edit(saved, **tensors)
    with pytest.raises(UserError) as caught:
        load(saved, UNTIED)
    assert all(word in str(caught.value) for word in [str(saved), *words]), caught.value
    assert "\n" not in str(caught.value)


def test_known_buffers_and_a_second_copy_of_a_tied_table_are_harmless(tmp_path):
    params = random_params(TIED)
    weights.save_weights(params, TIED, tmp_path, dtype=jnp.float32)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, **{"lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)})
    assert_same(load(tmp_path, TIED), params)
    edit(tmp_path, **{"lm_head.weight": table + 1})
    with pytest.raises(UserError, match=r"tie_word_embeddings is true but 'lm_head\.weight' is not"):
        load(tmp_path, TIED)


def test_damaged_directories(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load(saved, UNTIED)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="damaged or incomplete"):
        load(saved, UNTIED)
    file.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load(saved, UNTIED)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {K_PROJ: "model-00001-of-00001.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors, which is not there"):
        load(saved, UNTIED)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json is not valid JSON"):
        load(saved, UNTIED)
    (saved / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds list, needs an object"):
        weights.read_config(saved)


def test_a_failed_export_leaves_the_old_one(saved, monkeypatch):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(weights, "_write_file", full)
        with pytest.raises(UserError, match="No space left"):
            weights.save_weights(random_params(TIED), TIED, saved, dtype=jnp.float32)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    weights.save_weights(random_params(TIED), TIED, saved, dtype=jnp.float32)
    assert weights.read_config(saved)[0] == TIED
    assert [f.name for f in saved.parent.iterdir()] == ["m"]


# ---------------------------------------------------------------------------------------------------------- hub


def test_resolve_local(saved, tmp_path, monkeypatch):
    assert hub_module.resolve_model(str(saved)) == hub_module.ModelFiles(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"reference='.*empty': the directory has no config\.json"):
        hub_module.resolve_model(str(tmp_path / "empty"), what="reference")
    for missing in (str(tmp_path / "none"), "./none", "~/none/at/all", "a/b/c", "s3://bucket/model", ""):
        with pytest.raises(UserError, match="no such directory"):
            hub_module.resolve_model(missing)
    with pytest.raises(UserError, match="is a file"):
        hub_module.resolve_model(str(saved / "config.json"))
    with pytest.raises(UserError, match="not a hub id"):
        hub_module.resolve_model("two words")


def test_download_from_a_hub(hub, saved, tmp_path, monkeypatch):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tokenizer.json", "README.md"):
        (saved / name).write_text("x")
    shutil.copytree(saved, hub.root / "someone" / "small")
    directory = hub_module.resolve_model("someone/small").directory
    assert {f.name for f in directory.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    config, hf = weights.read_config(directory)
    params = load(directory, config)
    assert_same(params, random_params(UNTIED))
    # Files of the cache are links: an export of a downloaded model holds real ones.
    weights.save_weights(params, hf, tmp_path / "export", dtype=jnp.float32, tokenizer_from=directory)
    assert not (tmp_path / "export" / "tokenizer.json").is_symlink()
    # Once downloaded, no hub is needed.
    use_hub(monkeypatch, tmp_path, closed_port())
    assert hub_module.resolve_model("someone/small").directory == directory


def test_a_revision_is_what_its_branch_or_commit_holds(hub, saved, monkeypatch, tmp_path):
    shutil.copytree(saved, hub.root / "someone" / "small")
    shutil.copytree(saved, hub.root / "someone" / "small@tuned")
    weights.save_weights(random_params(TIED), TIED, hub.root / "someone" / "small@tuned", dtype=jnp.float32)
    main, tuned = (hub_module.resolve_model("someone/small", revision=name).directory for name in ("", "tuned"))
    assert weights.read_config(main)[0] == UNTIED
    assert weights.read_config(tuned)[0] == TIED
    of_main, of_tuned = map(hub_module.snapshot_of, (main, tuned / "config.json"))
    assert of_main == {"repository": "someone/small", "commit": hub.sha}
    assert of_tuned["repository"] == "someone/small"
    assert of_tuned["commit"] == tuned.name != hub.sha
    assert hub_module.resolve_model("someone/small", revision=tuned.name).directory == tuned
    assert hub_module.snapshot_of(saved) is None
    with pytest.raises(UserError, match=r"reference='someone/small' at 'gone': .* no such branch, tag or commit"):
        hub_module.resolve_model("someone/small", what="reference", revision="gone")
    with pytest.raises(UserError, match=r"reference_revision='tuned': reference='.*' is a local directory"):
        hub_module.resolve_model(str(saved), what="reference", revision="tuned")
    with pytest.raises(UserError, match=r"^revision='x': model='tiny' is made here"):
        find_policy("tiny", tmp_path, 0, revision="x")
    use_hub(monkeypatch, tmp_path, closed_port())
    assert hub_module.resolve_model("someone/small", revision="tuned").directory == tuned


def test_the_tokenizer_can_come_alone(hub, saved):
    (saved / "tokenizer.json").write_text("x")
    (saved / "additional_chat_templates").mkdir()
    (saved / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    shutil.copytree(saved, hub.root / "someone" / "small")
    directory = hub_module.resolve_model("someone/small", with_weights=False).directory
    assert {f.name for f in directory.iterdir()} == {"config.json", "tokenizer.json", "additional_chat_templates"}
    assert (directory / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    assert (hub_module.resolve_model("someone/small").directory / "model.safetensors").is_file()


def test_what_a_hub_refuses(hub, saved):
    with pytest.raises(UserError, match=r"has no such model .*hf auth login.*--config\.model=DIRECTORY"):
        hub_module.resolve_model("nobody/nothing")
    shutil.copytree(saved, hub.root / "someone" / "gated")
    with pytest.raises(UserError, match=r"gated: .*someone/gated, then `hf auth login`") as caught:
        hub_module.resolve_model("someone/gated")
    assert "\n" not in str(caught.value)
    (hub.root / "someone" / "gguf").mkdir()
    (hub.root / "someone" / "gguf" / "model.gguf").write_text("x")
    with pytest.raises(UserError, match=r"has no config\.json"):
        hub_module.resolve_model("someone/gguf")


def test_unreachable_hub(tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path, closed_port())
    with pytest.raises(UserError) as caught:
        hub_module.resolve_model("someone/small", what="reference")
    for word in ("someone/small", "127.0.0.1", "--config.reference=DIRECTORY", "configs/hhh.py:tiny", "ConnectError"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded"):
        hub_module.resolve_model("someone/small")
    huggingface_hub.close_session()


# ------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", sorted(d.name for d in GOLDEN.iterdir()))
def test_logits_of_transformers(name):
    config, _ = weights.read_config(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    params = load(GOLDEN / name, config)
    np.testing.assert_allclose(logits(params, config, expected["ids"]), expected["logits"], atol=1e-4, rtol=0)
    if config.rope_scaling:  # the comparison sees it
        plain = logits(params, dataclasses.replace(config, rope_scaling=()), expected["ids"])
        assert np.abs(plain - expected["logits"]).max() > 0.1


@pytest.fixture(scope="module")
def torch_logits():
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers")

    def run(directory: Path, ids: np.ndarray) -> np.ndarray:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()

    return run


@pytest.mark.extras
@needs_stories
def test_stories_both_ways(torch_logits, tmp_path):
    """We read a real checkpoint as transformers does, and transformers reads our export as we do."""
    config, hf = weights.read_config(STORIES)
    params = load(STORIES, config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64), dtype=np.int32)
    np.testing.assert_allclose(logits(params, config, ids), torch_logits(STORIES, ids), atol=1e-4, rtol=0)
    params = jax.tree.map(lambda x: x * 1.01, params)  # as after training
    weights.save_weights(
        params, hf, tmp_path / "export", dtype=jnp.float32, tokenizer_from=STORIES, max_shard_bytes=3e5
    )
    np.testing.assert_allclose(logits(params, config, ids), torch_logits(tmp_path / "export", ids), atol=1e-4, rtol=0)


ROPES = {
    "default": (),
    "linear": (("factor", 4.0), ("rope_type", "linear")),
    "llama3": (
        ("factor", 8.0),
        ("high_freq_factor", 4.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 64),
        ("rope_type", "llama3"),
    ),
}


@pytest.mark.extras
@pytest.mark.parametrize(
    ("base", "rope"),
    [
        (UNTIED, "linear"),
        (TIED, "llama3"),
        (dataclasses.replace(UNTIED, model_type="mistral"), "default"),
    ],
    ids=["llama", "llama tied", "mistral"],
)
def test_transformers_loads_what_we_made_from_scratch(torch_logits, tmp_path, base, rope):
    config = dataclasses.replace(base, rope_scaling=ROPES[rope])
    params = jax.tree.map(lambda x: 0.2 * x, random_params(config))
    hf = hf_config(config, bos_token_id=1, eos_token_id=2)
    weights.save_weights(params, hf, tmp_path / "m", dtype=jnp.float32)
    found, stored = weights.read_config(tmp_path / "m")
    assert found == config
    assert stored == hf
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64), dtype=np.int32)
    np.testing.assert_allclose(logits(params, config, ids), torch_logits(tmp_path / "m", ids), atol=1e-4, rtol=0)
