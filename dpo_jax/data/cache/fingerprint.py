"""What a cache of pairs is known by: a description of everything that decides its content."""

import ast
import inspect
import io
import json
import tokenize
from pathlib import Path
from typing import Any

from dpo_jax.data import columns, comparison, datasets, render, tokenise
from dpo_jax.data.datasets import own_code
from dpo_jax.data.files import fingerprint
from dpo_jax.data.render import Renderer
from dpo_jax.data.sources import DataSources
from dpo_jax.disk import digest

# Older caches are known by digests of whole files, comments included. Code with the digest `_SAME_PAIRS` was seen to
# make the same pairs as those files, so it uses their digests and finds their caches; other code has caches of its own.
_SAME_PAIRS = "8790cbf009a4a608f5e4bac6"
_DECIDE = (columns, datasets, comparison, render, tokenise)
_WHOLE_FILES = [
    "db500021740beb8a6a396108",
    "2a55a713c788aeb7c03a7f9f",
    "29edf6a5738a443ef00ab301",
    "a3fd2305135b659945e2c5ee",
    "74b35f1e9368dd424bf93680",
]


def identity(data: DataSources, renderer: Renderer, drop_ties: bool) -> dict[str, Any]:
    """Everything that decides the cache's content: files, parsers and our own code, tokenizer, template, limits."""
    return {
        "sources": [
            {
                "name": source.name,
                "split": source.split,
                "parser": source.parser,
                "code": [digest(path.read_text()) for path in own_code(source.parser)],
                # Without the directory: what one machine built, another uses whose files are elsewhere.
                "files": [{**fingerprint(path), "path": path.rsplit("/", 1)[-1]} for path in source.files],
            }
            for source in data.sources
        ],
        "code": _our_code(),
        "tokenizer": _tokenizer_digest(renderer.tokenizer),
        "form": renderer.form,
        "limits": [renderer.max_prompt_length, renderer.max_completion_length, renderer.overlong],
        "drop_ties": drop_ties,
    }


def _our_code() -> list[str]:
    code = digest("".join(_statements(Path(inspect.getfile(module))) for module in _DECIDE))
    return _WHOLE_FILES if code == _SAME_PAIRS else [code]


def _statements(path: Path) -> str:
    """The text of a module without what decides nothing: comments, docstrings, imports (modules move), empty lines."""
    text = path.read_text()
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "".join(line.rstrip() + "\n" for line in lines if line.strip())


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of the vocabulary, the rules and the template; not of padding and truncation, which a caller may have set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return digest(json.dumps([type(tokenizer).__name__, rules, special], sort_keys=True))
