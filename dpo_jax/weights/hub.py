"""Find a Hugging Face model: a local directory, or a repository of the hub, downloaded once."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from dpo_jax.errors import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CARD = "README.md"  # for its licence
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (  # patterns, as the hub's client and `Path.glob` take them
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
# `model*`: some repositories hold the same weights a second time as consolidated*.safetensors or under original/.
HUB_FILES = (CONFIG, GENERATION_CONFIG, "model*.safetensors", INDEX, CARD, *TOKENIZER_FILES)


def resolve_model(model: str, *, what: str = "model", with_weights: bool = True) -> Path:
    """A directory in Hugging Face's layout: `model` itself if it is one, else the hub's repository, downloaded once.

    Args:
      model: a local directory or a hub id.
      what: the config key that `model` came from, for messages.
      with_weights: False downloads the config and the tokenizer alone.

    Raises:
      UserError: no such directory, no config.json in it, or it cannot be downloaded; with what to do instead.
    """
    given, local = f"{what}={model!r}", local_model(model, what=what)
    if local is not None:
        return local
    files = HUB_FILES if with_weights else (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
    try:
        path = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(files)))
    except Exception as e:  # the client's own errors, httpx's, OSError: one cause for the user, whatever the library
        raise UserError(f"{given}: {_hub_problem(model, e, what)}") from e
    if not (path / CONFIG).is_file():
        raise UserError(f"{given}: the hub's repository has no {CONFIG}; is it a transformers model?")
    return path


def local_model(model: str, *, what: str = "model") -> Path | None:
    """`model` as a directory; None if it is not one but may be a hub id.

    Raises:
      UserError: no such directory, or no config.json in it.
    """
    given, path = f"{what}={model!r}", Path(model).expanduser()
    if model and path.is_dir():
        if not (path / CONFIG).is_file():
            raise UserError(f"{given}: the directory has no {CONFIG}; give a Hugging Face model directory")
        return path
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1
    if not model or looks_like_path or "://" in model or path.exists():
        problem = "is a file, not a directory" if path.is_file() else "no such directory"
        raise UserError(f"{given}: {problem}; give a local Hugging Face directory or a hub id (OWNER/NAME)")
    return None


def _hub_problem(model: str, error: Exception, what: str) -> str:
    """What went wrong with a download and what to do instead, in one line."""
    hub = constants.ENDPOINT
    without = f"use --config.{what}=DIRECTORY, or --config=configs/hhh.py:tiny, which needs no download"
    if isinstance(error, hub_errors.HFValidationError):
        return f"not a local directory and not a hub id (OWNER/NAME); {without}"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated: ask for access at {hub}/{model}, then `hf auth login`; or {without}"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"no local directory, and {hub} has no such model (a private one needs `hf auth login`); {without}"
    cause = error.__cause__ or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    return f"no local directory, and it cannot be downloaded from {hub} ({reason[:200]}); {without}"
