"""Every model family against transformers, live: small random models read, exported, differentiated and sampled from.

`pytest tests/model/test_families.py --write-docs` puts what it measured into docs/models.md. Without torch, the
recorded models of `tests/golden/transformers` stand in for logits (`tests/weights/test_huggingface.py`,
`tests/model/test_decoder.py`).
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax.model.experts import balance_loss
from dpo_jax.model.families import hf_config
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.objective.logps import group_logps
from dpo_jax.objective.token_logps import LogpOptions
from dpo_jax.weights import huggingface as weights
from tests.golden import record_transformers
from tests.model import families
from tests.model.families import (
    PLACED,
    TextPairs,
    difference,
    greedy,
    load,
    row_logits,
    sequence_logits,
    sweep,
    unpacked,
)

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.extras

VOCAB = 512
BETA = 0.1
NOISE = np.random.default_rng(0).normal(size=(3, 2))
# One of everything that a cached layer has to get right: the others' layers are made of the same parts.
ANSWERED = (
    "gemma2",  # scores that are capped
    "gemma3_text",  # windows and whole attention, each with its own rope
    "llama_biases",
    "llama3_rope",  # and the other ropes that scale by a fixed factor
    "mistral_window",  # and every window
    "olmo2",  # norms after the blocks, and of whole queries and keys
    "phi3_longrope",  # a rope that changes with the length, and joined projections
    "qwen3_moe",  # experts, and norms of every head
)
EXPERTS = [name for name, (kind, *_) in record_transformers.MODELS.items() if kind in ("mixtral", "qwen3_moe")]


@pytest.fixture(scope="module", params=sweep(record_transformers.MODELS, "gemma3_text"))
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@functools.cache
def make_family(name, directory):
    model = record_transformers.make(name, seed=0, vocab_size=VOCAB).eval()
    model.save_pretrained(directory)
    config, hf = weights.read_config(directory)
    return name, model, directory, config, hf, load(directory, config)


def torch_logits(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids)[None], dtype=torch.long)).logits[0].numpy()


def read_by_transformers(directory):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def test_logits(family, measured):
    name, model, _, config, _, params = family
    sequences = TextPairs(VOCAB).sequences()
    expected = [torch_logits(model, ids) for ids in sequences]
    found = difference(sequence_logits(params, config, sequences), expected)
    rows, slots = families.batch(TextPairs(VOCAB))
    packed = difference(unpacked(row_logits(params, rows, config, slots), rows, slots), expected)
    measured("models", "logits", name, found)
    measured("models", "packed rows", name, packed)
    assert found < 1e-4
    assert packed < 1e-4


def test_exports_are_read_as_they_were(family, measured, tmp_path):
    """With the config.json that came with the model, and with one made from our numbers alone."""
    name, _, _, config, hf, params = family
    params = jax.tree.map(lambda x: x * 1.01, params)  # as after training
    sequences = TextPairs(VOCAB).sequences()
    ours = sequence_logits(params, config, sequences)
    for i, numbers in enumerate((hf, hf_config(config))):
        weights.save_weights(params, numbers, tmp_path / str(i), dtype=jnp.float32, max_shard_bytes=3e5 if i else 5e9)
        assert weights.read_config(tmp_path / str(i))[0] == config
        model = read_by_transformers(tmp_path / str(i))
        found = difference(ours, [torch_logits(model, ids) for ids in sequences])
        measured("models", "export", name, found)
        assert found < 1e-4


def dpo_gradient(config, pairs):
    """A jitted (params, noise) → ((loss, reference logps), gradient); the reference is the model itself plus noise."""
    rows, slots = families.batch(pairs)
    places = {int(pair): at for at, pair in np.ndenumerate(PLACED)}

    def loss(params, noise):
        hidden, _ = hidden_states(params, rows, slots, ModelOptions(config, remat="dots"))
        cap, table = config.final_logit_softcapping, unembedding(params)
        options = LogpOptions(16, softcap=cap)
        logps = group_logps(hidden, rows, table, slots, options=options).logps
        logps = jnp.stack([logps[places[i]] for i in range(len(pairs))])
        reference = jax.lax.stop_gradient(logps) + noise
        rewards = BETA * (logps - reference)
        return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]).mean(), reference

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def torch_dpo(model, pairs, reference) -> float:
    """The loss; gradients are left in the model."""
    logps = []
    for prompt, *completions in pairs.ids:
        for completion in completions:
            ids = torch.tensor(np.concatenate([prompt, completion]), dtype=torch.long)
            log_probs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])
            logps.append(log_probs[len(prompt) - 1 :].sum())
    rewards = BETA * (torch.stack(logps).reshape(-1, 2) - torch.tensor(np.asarray(reference)))
    loss = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    model.zero_grad()
    loss.backward()
    return float(loss.detach())


def as_tensors(grads, config, directory):
    weights.save_weights(grads, config, directory, dtype=jnp.float32)
    return load_file(directory / "model.safetensors")


def torch_tensors(model, directory):
    """A model's gradients by the names of its checkpoint, as transformers itself writes them."""
    kept = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.grad
    model.save_pretrained(directory)
    for name, p in model.named_parameters():
        p.data = kept[name]
    return load_file(directory / "model.safetensors")


def relative(ours, theirs) -> float:
    """Per tensor, the norm of the difference by the norm; the largest."""
    assert set(ours) == set(theirs)
    found = {k: np.linalg.norm(ours[k] - theirs[k]) / max(np.linalg.norm(theirs[k]), 1e-12) for k in theirs}
    return float(max(found.values()))


def test_gradients(family, measured, tmp_path):
    name, model, _, config, _, params = family
    pairs = TextPairs(VOCAB)
    (value, reference), grads = dpo_gradient(config, pairs)(params, jnp.asarray(NOISE, jnp.float32))
    assert float(value) == pytest.approx(torch_dpo(model, pairs, reference), abs=1e-5)
    found = relative(as_tensors(grads, config, tmp_path / "ours"), torch_tensors(model, tmp_path / "theirs"))
    measured("models", "gradients", name, found)
    assert found < 1e-4


def test_greedy_answers(family):
    """64 tokens after prompts shorter and longer than the window, and than the original context of longrope.

    All prompts are in one batch here, padded with what may also end an answer there. Where the two most likely tokens
    are within 1e-5 of each other, either is right, and the answers are compared up to there.

    Without DPO_JAX_SWEEP of the families of `ANSWERED`.
    """
    name, model, _, config, _, params = family
    if name not in ANSWERED and not os.environ.get("DPO_JAX_SWEEP"):
        pytest.skip("set DPO_JAX_SWEEP=1: a family of ANSWERED has all parts of its layers")
    prompts = [ids[:n].tolist() for ids, n in zip(TextPairs(VOCAB).sequences()[::2], (5, 17, 30), strict=True)]
    ours = greedy(config, params, prompts, 64)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    compared = 0
    for prompt, answer in zip(prompts, ours, strict=True):
        if name == "phi3_longrope" and len(prompt) < 24 < len(prompt) + 64:
            continue  # on the way into the long context transformers starts again with the other rope, we began with it
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        theirs = out[0, len(prompt) :].tolist()
        top = np.sort(torch_logits(model, prompt + theirs)[len(prompt) - 1 : -1], axis=-1)[:, -2:]
        ties = np.flatnonzero(top[:, 1] - top[:, 0] < 1e-5)
        end = int(ties[0]) if len(ties) else 64
        compared += end
        assert answer[:end] == theirs[:end]
    assert compared >= 64


@pytest.mark.parametrize("name", sweep(EXPERTS, "mixtral"))
def test_load_balancing(name, measured, tmp_path):
    """The loss and its gradient over sequences of different lengths: padding is masked there, segment 0 here."""
    _, model, _, config, _, params = make_family(name, tmp_path)
    rows, slots = families.sequence_rows(TextPairs(VOCAB).sequences())

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return balance_loss(hidden_states(params, rows, slots, ModelOptions(config), balance=True)[1])

    value, grads = loss(params)
    ids, real = (torch.tensor(np.asarray(x), dtype=torch.long) for x in (rows.tokens, rows.segments))
    out = model(ids, attention_mask=real, output_router_logits=True)
    assert float(value) == pytest.approx(float(out.aux_loss.detach()), abs=1e-5)
    model.zero_grad()
    out.aux_loss.backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    ours, theirs = as_tensors(grads, config, tmp_path / "ours"), torch_tensors(model, tmp_path / "theirs")
    assert set(ours) == set(theirs)
    # What comes after the last router has no gradient at all.
    largest = max(np.linalg.norm(x) for x in theirs.values())
    assert max(np.linalg.norm(ours[k] - theirs[k]) for k in theirs) < 1e-4 * largest
