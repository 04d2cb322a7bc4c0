"""What a cache of pairs is known by: a description of everything that decides its content."""

import inspect
import json
from pathlib import Path
from typing import Any

from dpo_jax.data import columns, datasets, render
from dpo_jax.data import comparison as preference
from dpo_jax.data.datasets import own_code
from dpo_jax.data.files import fingerprint
from dpo_jax.data.render import Renderer
from dpo_jax.data.sources import Found
from dpo_jax.disk import digest


def identity(found: Found, renderer: Renderer, drop_ties: bool, code: Path) -> dict[str, Any]:
    """Everything that decides the cache's content: files, parsers and our own code, tokenizer, template, limits.

    `code` is the file of the module that reads the rows.
    """
    ours = [*(Path(inspect.getfile(module)) for module in (columns, datasets, preference, render)), code]
    return {
        "sources": [
            {
                "name": source.name,
                "split": source.split,
                "parser": source.parser,
                "code": [
                    digest(path.read_text()) for path in (own_code(source.parser) if ":" in source.parser else [])
                ],
                # Without the directory: what one machine built, another finds whose files lie elsewhere.
                "files": [{**fingerprint(path), "path": path.rsplit("/", 1)[-1]} for path in source.files],
            }
            for source in found.sources
        ],
        "code": [digest(path.read_text()) for path in ours],
        "tokenizer": _tokenizer_digest(renderer.tokenizer),
        "form": renderer.form,
        "limits": [renderer.max_prompt_length, renderer.max_completion_length, renderer.overlong],
        "drop_ties": drop_ties,
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of the vocabulary, the rules and the template; not of padding and truncation, which a caller may have set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return digest(json.dumps([type(tokenizer).__name__, rules, special], sort_keys=True))
