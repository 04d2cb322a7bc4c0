"""What is refused before training: here, pairs with tokens that the model has no row for."""

import dataclasses
import json
import shlex
import subprocess
import sys

import pytest

from dpo_jax.data.prepare import DataRequest, prepare
from dpo_jax.errors import UserError
from dpo_jax.training.inputs import check_tokens, named_tokens, resize_command
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights.find import Policy
from dpo_jax.weights.hub import ModelFiles
from tests.data.test_render import bpe_tokenizer
from tests.oracles.oracle import CONFIG

EXTRA = ["<|image|>", "<|sound|>"]


def _policy(directory=None):
    tokenizer = bpe_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA})
    return Policy(
        dataclasses.replace(CONFIG, vocab_size=rows), directory and ModelFiles(directory), directory, tokenizer
    )


def _prepared(tmp_path, policy, answer, eval_pairs=0):
    rows = [{"prompt": f"q {i}", "chosen": answer if i == 3 else "yes", "rejected": "no"} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = DataRequest(str(path), cache_dir=str(tmp_path / "cache"), eval_pairs=eval_pairs, prompt_format="chat")
    return prepare(request, policy.tokenizer)


def test_tokens_that_no_pair_has_are_no_matter_and_are_named(tmp_path):
    policy = _policy()
    data = _prepared(tmp_path, policy, "fine")
    check_tokens(data.split, policy)
    rows = policy.config.vocab_size
    assert policy.tokens_beyond() == {rows: "<|image|>", rows + 1: "<|sound|>"}
    assert named_tokens(policy.tokens_beyond()) == f"{rows} '<|image|>', {rows + 1} '<|sound|>'"
    assert named_tokens(dict.fromkeys(range(7), "x"), most=2) == "0 'x', 1 'x' and 5 more"
    largest = max(int(i) for n in range(len(data.train)) for ids in data.train[n] for i in ids)
    assert data.train.cache.manifest["largest_id"] == largest


@pytest.mark.parametrize("eval_pairs", [0, 2])
def test_a_pair_that_has_one_is_refused_with_ids_line_and_command(eval_pairs, tmp_path):
    policy = _policy(tmp_path)
    rows = policy.config.vocab_size
    data = _prepared(tmp_path, policy, "look: <|sound|>", eval_pairs)
    with pytest.raises(UserError) as refused:
        check_tokens(data.split, policy)
    said = str(refused.value)
    assert f"the model's table has {rows} rows, and the data has tokens beyond it: {rows + 1} '<|sound|>'" in said
    assert f"{tmp_path / 'rows.jsonl'} line 4" in said
    assert f"m.resize_token_embeddings({rows + 2})" in said
    assert "\n" not in said
    # Pairs that are not of the run do not matter.
    without = dataclasses.replace(data.train, index=data.train.index[:0])
    check_tokens(dataclasses.replace(data.split, train=without, evaluation=without), policy)


def test_a_cache_that_does_not_know_its_largest_id_is_read(tmp_path):
    policy = _policy(tmp_path)
    data = _prepared(tmp_path, policy, "look: <|sound|>")
    del data.train.cache.manifest["largest_id"]
    with pytest.raises(UserError, match="tokens beyond"):
        check_tokens(data.split, policy)


@pytest.mark.extras
def test_the_command_gives_the_model_its_rows(tmp_path):
    """Run as it is printed; the new model's table has a row for every token, and the old rows."""
    pytest.importorskip("torch", reason="needs torch")
    from tests.weights.test_huggingface import random_params

    policy = _policy(tmp_path / "model")
    weights.save_weights(random_params(policy.config), policy.config, policy.directory, dtype="float32")
    policy.tokenizer.save_pretrained(policy.directory)
    command = shlex.split(resize_command(policy).partition(" and --config")[0])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    config, _ = weights.read_config(tmp_path / "RESIZED")
    assert config.vocab_size == policy.config.vocab_size + len(EXTRA)
    from safetensors.numpy import load_file

    before, after = (load_file(d / "model.safetensors") for d in (policy.directory, tmp_path / "RESIZED"))
    rows = policy.config.vocab_size
    assert (after["model.embed_tokens.weight"][:rows] == before["model.embed_tokens.weight"]).all()
