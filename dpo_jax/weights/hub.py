"""Find a Hugging Face model: a local directory, or a repository of the hub, downloaded once."""

import dataclasses
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from dpo_jax.bucket.path import as_path
from dpo_jax.errors import UserError
from dpo_jax.weights.fetch import fetch_model, is_in_bucket
from dpo_jax.weights.model_files import AdapterFile, check_files, read_model_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CARD = "README.md"  # for its licence
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (  # patterns, as the hub's client and `Path.glob` take them
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
# `model*`: some repositories hold the same weights a second time as consolidated*.safetensors or under original/.
HUB_FILES = (
    CONFIG, GENERATION_CONFIG, "model*.safetensors", INDEX, CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_FILES,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model is on disk.

    Attributes:
      directory: in Hugging Face's layout: config.json, the weights.
      adapter: a PEFT directory whose adapters belong on these weights; None: they are the model.
    """

    directory: Path
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The directory of the tokenizer: the adapter's own, if there is one."""
        own = self.adapter is not None and any((self.adapter / name).is_file() for name in TOKENIZER_FILES)
        return self.adapter if own and self.adapter is not None else self.directory

    def deciding(self) -> list[Path]:
        """The files that decide the parameters."""
        whole = sorted([*self.directory.glob("*.safetensors"), self.directory / CONFIG])
        return (
            whole if self.adapter is None else [*whole, self.adapter / ADAPTER_WEIGHTS, self.adapter / ADAPTER_CONFIG]
        )


def resolve_model(model: str, *, what: str = "model", with_weights: bool = True, revision: str = "") -> ModelFiles:
    """A model's files: those in the directory `model` if it is one, else the hub's repository, downloaded once.

    A PEFT directory (adapter_config.json) is an adapter on the base that it names, as transformers takes it.

    Args:
      model: a local directory or a hub id.
      what: the config key that `model` came from, for messages.
      with_weights: False downloads the config and the tokenizer alone.
      revision: the hub's branch, tag or commit; empty: its main branch.

    Raises:
      UserError: no such directory, no config.json in it, or it cannot be downloaded; with what to do instead.
    """
    if revision and local_model(model, what=what) is not None:
        key = "revision" if what == "model" else f"{what}_revision"
        raise UserError(f"{key}={revision!r}: {what}={model!r} is a local directory, which has none; leave it empty")
    path = _directory(model, what, with_weights, revision)
    check_files(path)
    if not (path / ADAPTER_CONFIG).is_file():
        return ModelFiles(path)
    peft = read_model_json(path / ADAPTER_CONFIG, AdapterFile)
    base = peft.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{path / ADAPTER_CONFIG}: base_model_name_or_path={base!r}; put the adapter's base model there"
        )
    try:
        under = _directory(base, what, with_weights, str(peft.get("revision") or ""))  # PEFT's key: of the base
    except UserError as error:
        raise UserError(f"{what}={model!r}: base_model_name_or_path of its {ADAPTER_CONFIG}: {error}") from error
    check_files(under)
    if (under / ADAPTER_CONFIG).is_file():
        raise UserError(f"{what}={model!r}: its base {base} is a PEFT directory too; merge that one with PEFT first")
    return ModelFiles(under, path)


def snapshot_of(path: Path | str) -> dict[str, str] | None:
    """The repository and the commit of a file or directory in the hub's cache; None of any other.

    >>> snapshot_of("/c/models--owner--name/snapshots/1f2e/config.json")
    {'repository': 'owner/name', 'commit': '1f2e'}
    """
    parts = Path(path).parts
    for at, part in enumerate(parts[1:-1], 1):
        kind, *named = parts[at - 1].split("--")
        if part == "snapshots" and kind in ("models", "datasets") and named:
            return {"repository": "/".join(named), "commit": parts[at + 1]}
    return None


def _directory(model: str, what: str, with_weights: bool, revision: str) -> Path:
    given, local = f"{what}={model!r}", local_model(model, what=what)
    if local is not None:
        return local
    if is_in_bucket(model):
        if revision:
            raise UserError(f"{given}: is in a bucket, where nothing has a revision ({revision!r}); leave it empty")
        return _fetched(model, what, with_weights)
    files = HUB_FILES if with_weights else (CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, *TOKENIZER_FILES)
    try:
        path = Path(huggingface_hub.snapshot_download(model, revision=revision or None, allow_patterns=list(files)))
    except Exception as e:  # the client's own errors, httpx's, OSError: one cause for the user, whatever the library
        raise UserError(f"{given}{f' at {revision!r}' if revision else ''}: {_hub_problem(model, e, what)}") from e
    if not any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise UserError(f"{given}: the hub's repository has no {CONFIG}; is it a transformers model?")
    return path


def _fetched(model: str, what: str, with_weights: bool) -> Path:
    """The local copy of a model's directory in a bucket."""
    patterns = HUB_FILES if with_weights else (CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, *TOKENIZER_FILES)
    path = fetch_model(model, patterns, what)
    if not any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise UserError(f"{what}={model!r}: the directory has no {CONFIG}; give a Hugging Face model directory")
    return path


def local_model(model: str, *, what: str = "model") -> Path | None:
    """`model` as a directory; None if it is not one but may be a hub id, or is an address in a bucket.

    Raises:
      UserError: no such directory, or no config.json in it; or it cannot be an address in a bucket.
    """
    if is_in_bucket(model):
        try:
            as_path(model)
        except UserError as error:
            raise UserError(f"{what}={error}") from None
        return None
    given, path = f"{what}={model[:200]!r}", Path(model)
    try:
        path = path.expanduser()
        there = bool(model) and path.is_dir()
    except (OSError, RuntimeError) as error:  # a name beyond the system's limit, a home that nobody has
        words = getattr(error, "strerror", None) or error
        raise UserError(f"{given}: no directory ({words}); give a local Hugging Face directory or a hub id") from None
    if there:
        if not any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
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
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{hub}/{model} has no such branch, tag or commit; give one that it lists, or leave it empty"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated: ask for access at {hub}/{model}, then `hf auth login`; or {without}"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"no local directory, and {hub} has no such model (a private one needs `hf auth login`); {without}"
    cause = error.__cause__ or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    return f"no local directory, and it cannot be downloaded from {hub} ({reason[:200]}); {without}"
