"""Find the model to train: its numbers, its files and its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dpo_jax.bucket.local import local_twin
from dpo_jax.errors import Stopped, UserError
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import classifier_config, hf_config
from dpo_jax.weights import hub, stops, tiny
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights.heads import Head, find_head, is_classifier
from dpo_jax.weights.model_files import check_tokenizer
from dpo_jax.weights.stored import check_weights


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model to train: its numbers, its files (None: made from scratch), and its tokenizer.

    `head` is that of a reward model in the files; one without a name is drawn.
    """

    config: ModelConfig
    files: hub.ModelFiles | None
    tokenizer_directory: Path
    tokenizer: Any
    head: Head = dataclasses.field(default_factory=Head)

    @property
    def directory(self) -> Path | None:
        """Of its files in Hugging Face's layout; of an adapter's base."""
        return None if self.files is None else self.files.directory

    def hf_config(self) -> dict[str, Any]:
        """What its Hugging Face `config.json` holds; of a reward model what it would hold."""
        if self.directory is not None:
            hf = weights.read_config(self.directory)[1]
        else:
            tokens = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
            hf = hf_config(self.config, **tokens)
        return classifier_config(hf, self.pad) if self.config.scalar_head else hf

    @property
    def pad(self) -> int | None:
        """Of a reward model: the token that a score is not read at; None: whatever the last token is.

        It is what its config.json says. Where a causal model becomes one, it is the tokenizer's padding, else its end
        of text, as TRL has it.
        """
        hf = {} if self.directory is None else weights.read_config(self.directory)[1]
        if is_classifier(hf):
            default = CONFIG_MAPPING[hf["model_type"]]().pad_token_id  # that of a file without the key
            return hf.get("pad_token_id", default)
        padding, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        # One beyond the table, such as an added [PAD], is no token that transformers could load the model with.
        return padding if padding is not None and padding < self.config.vocab_size else end

    def tokens_beyond(self) -> dict[int, str]:
        """Tokens of the tokenizer, by id, for which the model's table has no row: no text may hold one."""
        rows, known = self.config.vocab_size, self.tokenizer.get_vocab()
        return {i: text for text, i in sorted(known.items(), key=lambda item: item[1]) if i >= rows}

    def stop_tokens(self) -> list[int]:
        """The ids that end an answer, see `stops.stop_tokens`."""
        return stops.stop_tokens(self.tokenizer, self.directory, self.config.vocab_size)


def find_policy(
    model: str, workdir: Path, seed: int, *, with_weights: bool = True, revision: str = "", scalar_head: bool = False
) -> Policy:
    """Find the model's files, or make the tokenizer of the model that starts from scratch (`tiny`).

    Without weights, a model of the hub has only its config and tokenizer downloaded. `revision` is the hub's. With
    `scalar_head` it is a reward model, or a causal model that becomes one.

    Raises:
      UserError: there is no such model, or it is not supported, or its tokenizer does not belong to it.
    """
    if model == "tiny":
        if revision:
            raise UserError(f"revision={revision!r}: model='tiny' is made here and has none; leave it empty")
        workdir = local_twin(workdir)
        dialogues = tiny.write_dialogues(workdir, seed)
        directory = tiny.write_tokenizer(workdir / f"tokenizer-{seed}", dialogues)
        tokenizer = _tokenizer(directory)
        config = dataclasses.replace(tiny.model_config(len(tokenizer)), scalar_head=scalar_head)
        return Policy(config, None, directory, tokenizer)
    files = hub.resolve_model(model, with_weights=with_weights, revision=revision)
    config, hf = weights.read_config(files.directory)
    if is_classifier(hf) and not scalar_head:
        raise UserError(
            f"model={model!r} is a reward model ({hf['architectures'][0]}), which says no words; give a causal "
            "model, or use it as a judge (--judge=)"
        )
    head = find_head(files) if scalar_head and with_weights else Head()
    config = dataclasses.replace(config, scalar_head=scalar_head)
    if with_weights:
        check_weights(files.directory, config, adapter=files.adapter, head=head.name)
    policy = Policy(config, files, files.tokenizer, _tokenizer(files.tokenizer), head)
    policy.stop_tokens()  # damaged files are refused now
    return policy


def _tokenizer(directory: Path) -> Any:
    """A directory's tokenizer, by the code of transformers alone: never by that of the directory's author."""
    check_tokenizer(directory)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit, GeneratorExit, Stopped):
        raise
    except BaseException as e:  # transformers has errors of many kinds, and tokenizers' panics are no Exception
        first = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise UserError(f"no tokenizer can be read from {directory} ({first}); put its tokenizer.json there") from None


def check_reference(reference: ModelConfig, policy: ModelConfig, name: str) -> None:
    """Refuse a reference of another architecture than the policy's.

    Raises:
      UserError: with the numbers that differ; `name` is the reference's.
    """
    theirs, ours = dataclasses.asdict(reference), dataclasses.asdict(policy)
    irrelevant = ("model_type", "lora_scale", "max_position_embeddings", "router_aux_loss_coef")
    changed = [f"{k}: {theirs[k]!r}, policy {ours[k]!r}" for k in ours if k not in irrelevant and theirs[k] != ours[k]]
    if changed:
        raise UserError(f"reference {name} is another architecture than the policy ({'; '.join(changed)})")
