"""What a cache of pairs is known by: a description of everything that decides its content."""

import ast
import importlib.util
import io
import json
import pkgutil
import tokenize
from pathlib import Path
from typing import Any

import dpo_jax.data
from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip
from dpo_jax.data.datasets import own_code
from dpo_jax.data.files import fingerprint
from dpo_jax.data.render import Renderer, render_batch
from dpo_jax.data.sources import DataSources
from dpo_jax.data.template import templates_of
from dpo_jax.disk import digest

# Modules of dpo_jax.data that decide no row's ids: those that find files (which are known by their content), those that
# choose among pairs, count them or keep them. All others do, new ones too.
DECIDE_NOTHING = frozenset("__main__ cache lengths mixture notes prepare sources split summary synthetic tally".split())


def identity(data: DataSources, renderer: Renderer, drop_ties: bool, margin: str = "") -> dict[str, Any]:
    """Everything that decides the cache's content: files, parsers and our own code, tokenizer, template, limits."""
    return ({"margin": margin} if margin else {}) | {
        "sources": [
            {
                "name": source.name,
                "split": source.split,
                "parser": source.parser,
                "columns": [dict(renamed.names), sorted(renamed.ignored), dict(renamed.turns)],
                "code": [digest(path.read_text()) for path in own_code(source.parser)],
                # Without the directory: what one machine built, another uses whose files are elsewhere.
                "files": [{**fingerprint(path), "path": path.rsplit("/", 1)[-1]} for path in source.files],
            }
            for source in data.sources
            for renamed in (source.spec.columns,)
        ],
        "code": _our_code(deciding_modules()),
        "tokenizer": _tokenizer_digest(renderer.tokenizer),
        "form": [renderer.form, *(["auto"] if renderer.auto else [])],
        "chat_template": renderer.template.name,
        "template_date": renderer.template.day,
        "rendered": _probes_digest(renderer),
        "limits": [renderer.max_prompt_length, renderer.max_completion_length, renderer.overlong],
        "drop_ties": drop_ties,
    }


def deciding_modules() -> dict[str, Path]:
    """The modules of dpo_jax.data whose statements decide ids, by name, with their files."""
    package = dpo_jax.data
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    found = {}
    for name in sorted(names):
        short = name.removeprefix(f"{package.__name__}.")
        if short.partition(".")[0] not in DECIDE_NOTHING:
            spec = importlib.util.find_spec(name)
            assert spec is not None, name
            found[short] = Path(str(spec.origin))
    return found


def _our_code(modules: dict[str, Path]) -> str:
    return digest("".join(f"{name}\n{_statements(path)}" for name, path in modules.items()))


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
    """Of the vocabulary, the rules and the templates; not of padding and truncation, which a caller may have set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    added = {str(index): repr(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}  # templates read them by name
    split = getattr(tokenizer, "split_special_tokens", False)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, named, added, split, templates_of(tokenizer)]
    return digest(json.dumps([type(tokenizer).__name__, rules, special], sort_keys=True))


def _probes_digest(renderer: Renderer) -> str:
    """Of the ids of a few fixed rows, or of why there are none.

    Ids depend on what no file of ours or the tokenizer's says: on how the installed transformers hands a row to its
    template, or a template's clock.
    """
    rendered = render_batch(renderer, _probes())
    return digest(json.dumps([one.reason if isinstance(one, Skip) else [one.prompt, one.chosen] for one in rendered]))


def _probes() -> list[LabeledComparison]:
    turn: Any = lambda role, content, **more: {"role": role, "content": content, **more}
    ask, system = turn("user", " Why? "), turn("system", "Be brief.")
    answer, other = [turn("assistant", "So.")], [turn("assistant", " No\n")]
    calls = [{"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}]
    tools = [{"type": "function", "function": {"name": "tide", "description": "Tides.", "parameters": {}}}]
    thought = [turn("assistant", "So.", reasoning_content="Because.", thinking="Because.")]
    called = [turn("assistant", "", tool_calls=calls)]
    rows = [
        Comparison([ask], answer, other, texts=("Why? ", "So.", " No\n")),
        Comparison([system, ask, *answer, ask], answer, other),
        Comparison([ask], thought, other, None, {"enable_thinking": True}),
        Comparison([ask, *called, turn("tool", "0.5", name="tide")], called, other, tools),
    ]
    return [LabeledComparison(row, "A") for row in rows]
