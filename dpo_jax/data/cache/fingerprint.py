"""What a cache of pairs is known by: a description of everything that decides its content."""

import ast
import inspect
import io
import json
import tokenize
from pathlib import Path
from typing import Any

from dpo_jax.data import comparison, containers, datasets, json_rows, pairing, render, tokenise
from dpo_jax.data.datasets import own_code
from dpo_jax.data.files import fingerprint
from dpo_jax.data.forms import (
    beside,
    chosen,
    families,
    fields,
    messages,
    ranked,
    reader,
    rename,
    scores,
    table,
    transcripts,
    winners,
)
from dpo_jax.data.render import Renderer
from dpo_jax.data.sources import DataSources
from dpo_jax.disk import digest

# The modules whose statements decide the content; other code may change, and the caches stay.
_FORMS = (beside, chosen, families, fields, messages, ranked, reader, rename, scores, table, transcripts, winners)
_DECIDE = (*_FORMS, comparison, containers, datasets, json_rows, pairing, render, tokenise)


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


def _our_code() -> str:
    return digest("".join(_statements(Path(inspect.getfile(module))) for module in _DECIDE))


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
