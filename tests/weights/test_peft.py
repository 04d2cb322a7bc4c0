"""What a LoRA run leaves: exports that are the policy, adapters that PEFT loads; a stopped run resumes unchanged."""

import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from dpo_jax.config.values import parse_targets
from dpo_jax.model.lora import init_adapters, on_model
from dpo_jax.model.options import LayoutOptions, Lora
from dpo_jax.model.placement import place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.records.records import read_records
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights import load
from dpo_jax.weights import peft as peft_files
from dpo_jax.weights.find import Policy
from tests.end_to_end import test_train
from tests.model import families
from tests.model.families import GOLDEN, TextPairs, difference, sequence_logits
from tests.oracles.oracle import CONFIG

environment = test_train.environment
LORA_RUN = test_train.SMALL | {
    "lora_rank": 32,  # so many that what a checkpoint has beside its numbers is little
    "lora_alpha": 64,
    "learning_rate": 3e-3,
    "num_steps": 6,
    "eval_every": 3,
    "sample_prompts": 1,
}


def _adapters(config, lora, b=0.3):
    """Adapters with B drawn (it begins as zeros)."""
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, _fresh_adapters(config, lora)))
    rng = np.random.default_rng(2)
    drawn = {k: v if k[-1] == "a" else np.asarray(b * rng.normal(size=v.shape), np.float32) for k, v in flat.items()}
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(drawn))


def _fresh_adapters(config, lora):
    boxed = init_adapters(jax.random.key(1), config, lora)
    return jax.tree.map(lambda x: x.value, boxed, is_leaf=lambda x: hasattr(x, "names"))


@pytest.mark.parametrize("targets", ["all", "q,down"])
@pytest.mark.parametrize("name", ["llama_untied_gqa", "gemma2", "phi3", "qwen3_moe"])
def test_exports_are_the_policy(name, targets, tmp_path):
    """The merged weights give the adapters' logits; so do the base's weights plus what the adapter's files say."""
    if name == "qwen3_moe":
        targets = targets.split(",")[0]
    config, hf = weights.read_config(GOLDEN / name)
    lora = on_model(config, Lora(3, 12.0, parse_targets(targets), rslora=name == "phi3"))
    base, adapters = families.load(GOLDEN / name, config), _adapters(config, lora)
    sequences = TextPairs(config.vocab_size).sequences()
    with_scale = dataclasses.replace(config, lora_scale=lora.scale)
    expected = sequence_logits(base | adapters, with_scale, sequences)
    weights.save_weights(base | adapters, hf, tmp_path / "export", dtype="float32", lora_scale=lora.scale)
    found = sequence_logits(families.load(tmp_path / "export", config), config, sequences)
    assert difference(found, expected) < 1e-4
    assert difference(sequence_logits(base, config, sequences), expected) > 1e-2

    peft_files.save_adapters(adapters, config, lora, tmp_path / "adapter", base="somewhere")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    weights.save_weights(base, hf, tmp_path / "base", dtype="float32")
    kernels, merged = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "export"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = {k for k in merged if not np.array_equal(merged[k], kernels[k])}
    assert {k.split(".")[-2] for k in changed} == set(said["target_modules"])
    assert len(tensors) == 2 * len(changed)
    for key in changed:
        module = "base_model.model." + key.removesuffix(".weight")
        a, b = (tensors[f"{module}.lora_{ab}.weight"] for ab in "AB")
        rank = said["rank_pattern"].get(key.split(".")[-2], said["r"])
        alpha = said["alpha_pattern"].get(key.split(".")[-2], said["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if said["use_rslora"] else rank)
        assert a.shape[0] == b.shape[1] == rank
        np.testing.assert_allclose(kernels[key] + scale * b @ a, merged[key], atol=1e-5)


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
@pytest.mark.parametrize("name", ["llama_untied_gqa", "gemma2", "phi3", "mixtral"])
def test_peft_loads_the_adapter_and_gives_the_same_logits_and_gradients(name, tmp_path):
    peft = pytest.importorskip("peft", reason="needs torch, transformers and peft")
    from tests.model import test_families

    _, model, _, config, _, base = test_families.make_family(name, tmp_path / "base")
    lora = on_model(config, Lora(3, 12.0, ("all",), rslora=name == "phi3"))
    adapters = _adapters(config, lora, 0.1)
    peft_files.save_adapters(adapters, config, lora, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    pairs, with_scale = TextPairs(test_families.VOCAB), dataclasses.replace(config, lora_scale=lora.scale)
    ours = sequence_logits(base | adapters, with_scale, pairs.sequences())
    expected = [test_families.torch_logits(theirs, ids) for ids in pairs.sequences()]
    assert difference(ours, expected) < 1e-4
    assert difference(sequence_logits(base, config, pairs.sequences()), expected) > 1e-2
    if name == "phi3":  # one Linear of theirs is several of ours: off the diagonal its B has gradients, ours has no B
        return
    noise = jnp.asarray(test_families.NOISE, jnp.float32)
    (value, reference), grads = test_families.dpo_gradient(with_scale, pairs)(base | adapters, noise)
    assert float(value) == pytest.approx(test_families.torch_dpo(theirs, pairs, reference), abs=1e-5)
    peft_files.save_adapters({"lora": grads["lora"]}, config, lora, tmp_path / "gradients", base="")
    trained = {k.replace(".default", ""): p for k, p in theirs.named_parameters() if p.requires_grad}
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert test_families.relative(found, {k: p.grad.numpy() for k, p in trained.items()}) < 1e-3


@pytest.mark.slow
def test_a_fresh_base_is_the_same_on_every_mesh():
    """It is saved nowhere: a resumed run, perhaps elsewhere, draws it again."""
    made = Policy(CONFIG, None, GOLDEN, None)
    lora = on_model(CONFIG, Lora(2, 4.0, ("all",)))
    trees = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        layout = place_model(CONFIG, mesh, LayoutOptions(compute_dtype="float32"), lora)
        trees.append([jax.device_get(of(made, layout, 7)) for of in (load.load_base, load.load_params)])
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, test_train._finish(workdir, environment, **LORA_RUN)


@pytest.mark.slow
def test_a_run_holds_the_adapters_alone(finished):
    workdir, printed = finished
    records = {(r["split"], r["step"]): r for r in read_records(workdir / "metrics.jsonl")}
    assert records["sft", 4]["grad_norm"] > 0
    for first in (records["train", 1], records["eval", 0]):  # the reference has the adapters of the SFT phase
        assert first["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert first["accuracy"] == 0
    assert records["train", 6]["dpo_loss"] < 0.69
    lora = on_model(CONFIG, Lora(4, 8.0, ("all",)))
    adapter = load_file(workdir / "export-adapter" / "adapter_model.safetensors")
    count = sum(x.size for x in adapter.values())
    assert f"LoRA of rank 32 on {','.join(lora.targets)}: {count:,} parameters are trained" in printed
    held = sum(p.stat().st_size for p in (workdir / "checkpoints" / "10").rglob("*") if p.is_file())
    assert held < 3.5 * 4 * count  # adapters and two moments, in float32
    reference = sum(p.stat().st_size for p in (workdir / "reference").rglob("*") if p.is_file())
    assert reference < 1.2 * 4 * count  # all of the model would be 1.4
    assert weights.read_config(workdir / "export")[0].lora_scale == 1


@pytest.mark.slow
def test_killed_and_resumed_is_never_stopped(finished, environment, tmp_path):
    code, _ = test_train._stop_at(tmp_path / "run", environment, "train", 3, signal.SIGKILL, **LORA_RUN)
    assert code == -signal.SIGKILL
    test_train._finish(tmp_path / "run", environment, **LORA_RUN)  # from a checkpoint, if one was whole by then
    assert test_train._values(tmp_path / "run") == test_train._values(finished[0])
    for file in ("export/model.safetensors", "export-adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (finished[0] / file).read_bytes()
