"""Which tokens end an answer: those that the chat template ends an assistant's turn with, the model's own, and eos."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.rendering import render_jobs
from dpo_jax.data.template import templates_of
from dpo_jax.weights.hub import CONFIG, GENERATION_CONFIG
from dpo_jax.weights.model_files import GenerationConfig, read_model_json

# What an answer says in a probe: no template and no tokenizer knows it.
ANSWER = "Xq7vAnswerXq7v"
_ASK, _SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
_SAY = {"role": "assistant", "content": ANSWER}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": ANSWER}}}],
}
_LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}


def stop_tokens(tokenizer: Any, directory: Path | None, vocabulary: int) -> list[int]:
    """The ids that end an answer; [-1], which nothing is, if there are none.

    They are what generation_config.json names (without that file config.json, as in transformers), the tokenizer's eos,
    and what its chat template writes behind an assistant's answer and behind a tool call: a token of its own that
    neither of them may name, such as Phi-3's `<|end|>`. The data is not asked: answers that were cut do not show it.

    Args:
      tokenizer: a transformers tokenizer.
      directory: of the model's files; None: it has none.
      vocabulary: how many ids the model can say.

    Raises:
      UserError: one of the files is no JSON object, its `eos_token_id` is no id, or a template does not end.
    """
    ids = [*_named(directory), tokenizer.eos_token_id, *_ends_of_turns(tokenizer)]
    return list(dict.fromkeys(i for i in ids if i is not None and 0 <= i < vocabulary)) or [-1]


def write_generation_config(path: Path, before: Path | None, stops: Sequence[int], hf: Mapping[str, Any]) -> None:
    """Write an export's generation_config.json: that of `before`, if it has one, with `stops` as what ends an answer.

    Args:
      path, before: the new file, and the directory of the model that was trained.
      stops: from `stop_tokens`; without any the file is a copy, or none.
      hf: the export's config.json, whose other tokens a model without such a file has.
    """
    named = [i for i in stops if i >= 0]
    if before is not None and (before / GENERATION_CONFIG).is_file():
        held = read_model_json(before / GENERATION_CONFIG, GenerationConfig)
    elif named:
        held = {key: hf[key] for key in ("bos_token_id", "pad_token_id") if hf.get(key) is not None}
    else:
        return
    if named:
        held["eos_token_id"] = named[0] if len(named) == 1 else named
    path.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _named(directory: Path | None) -> list[int]:
    """`eos_token_id` of the model's files: an id, a list of ids, or nothing."""
    if directory is None:
        return []
    path = directory / (GENERATION_CONFIG if (directory / GENERATION_CONFIG).is_file() else CONFIG)
    said = read_model_json(path, GenerationConfig).get("eos_token_id")
    return said if isinstance(said, list) else [] if said is None else [said]


def _ends_of_turns(tokenizer: Any) -> list[int]:
    """What the templates write behind an answer and behind a tool call, as far as they render such turns."""
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    known |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    if not templates_of(tokenizer) or not known:
        return []
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    # Longest first: one token may begin like another.
    run = re.compile(rf"\s*({'|'.join(map(re.escape, sorted(known, key=len, reverse=True)))})")
    ends = []
    for source in templates_of(tokenizer).values():  # a row may be rendered with any of several
        last, between = (_behind(tokenizer, x, source) for x in ([_ASK, _SAY], [_ASK, _SAY, _ASK]))
        if last is not None:
            here, there = _leading(run, last), _leading(run, between or "")
            same = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False))]
            # What stands behind every answer ends it (Phi-3 writes an eos too behind the last one, Cohere two tokens);
            # else what stands behind the last one (gpt-oss's return); else what begins the next turn, if nothing does.
            ends += (same[-1:] or here[:1]) if here else there[:1]
        call = _behind(tokenizer, [_ASK, _CALL], source, tools=[_LOOK])
        if call is not None and (marks := run.findall(call)) and marks[-1] in special:  # not a bracket of the call
            ends.append(marks[-1])
    return [known[token] for token in dict.fromkeys(ends)]


def _leading(run: re.Pattern[str], text: str) -> list[str]:
    """The tokens with which `text` begins, blanks between them left out."""
    found, at = [], 0
    while match := run.match(text, at):
        found.append(match[1])
        at = match.end()
    return found


def _behind(tokenizer: Any, turns: list[dict[str, Any]], source: str, **more: Any) -> str | None:
    """What a template writes behind `ANSWER`; None if it takes these turns neither with nor without a system turn."""
    more |= {"chat_template": source, "add_generation_prompt": False}
    for text in render_jobs(tokenizer, [{"conversation": one, **more} for one in (turns, [_SYSTEM, *turns])]):
        if isinstance(text, str) and ANSWER in text:
            return text.rpartition(ANSWER)[2]
    return None
