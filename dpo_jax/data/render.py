"""From a comparison to token ids: prompt, chosen and rejected, as TRL's DPOTrainer makes them from the same pair.

Two forms: `chat` (the tokenizer's chat template; completion ids are what it renders after the generation prompt, end of
turn included) and `plain` (HH's own transcript; a completion is " " + answer, then the end-of-sequence id). A prompt is
tokenised once, and a completion on its own wherever that gives the same ids as tokenising the whole text.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2

from dpo_jax.data.comparison import LabeledComparison, Message, Skip
from dpo_jax.errors import UserError

Ids = list[int]
_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: ", "tool": "\n\nTool: "}
_STARTS = [chr(code) for code in range(33, 127)]  # printable ASCII that is no space
_TAILS = ("", "bc", " bc", "...", "1", "\n\nbc")


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with everything that decides the ids.

    `boundary` is the text with which every prompt ends; a completion that begins with a character of `clean_starts`
    has the same ids on its own as after that boundary (measured by `_clean_starts`). `leading` and `trailing` are the
    ids around the text in the plain form (BOS as the tokenizer itself adds it, EOS).
    """

    tokenizer: Any
    form: Literal["chat", "plain"]
    max_prompt_length: int
    max_completion_length: int
    overlong: Literal["truncate", "drop"]
    boundary: str
    clean_starts: frozenset[str]
    leading: tuple[int, ...]
    trailing: tuple[int, ...]


@dataclass(frozen=True)
class Rendered:
    """Token ids of one pair; `truncated` names the parts that lost tokens to the limits.

    `boundary_moved`: the prompt's last tokens merge with an answer's first ones, so that, as in TRL, the completions
    begin at the first token in which the ids of the prompt and of prompt + completion differ.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    truncated: tuple[str, ...] = ()
    boundary_moved: bool = False


def make_renderer(
    tokenizer: Any,
    prompt_format: str = "auto",
    max_prompt_length: int = 512,
    max_completion_length: int = 512,
    overlong: str = "truncate",
) -> Renderer:
    """The renderer for a transformers tokenizer; lengths are in tokens.

    Raises:
      UserError: an option is unknown, or the tokenizer lacks the chat template or the end-of-sequence token it needs.
    """
    if prompt_format not in ("auto", "chat", "plain"):
        raise UserError(f"prompt_format={prompt_format!r}; use auto, chat or plain")
    if overlong not in ("truncate", "drop"):
        raise UserError(f"overlong={overlong!r}; use truncate or drop")
    for name, limit in (("max_prompt_length", max_prompt_length), ("max_completion_length", max_completion_length)):
        if limit < 1:
            raise UserError(f"{name}={limit}; use at least 1 token")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    form: Literal["chat", "plain"] = "plain" if prompt_format == "plain" or not has_template else "chat"
    if prompt_format == "chat" and not has_template:
        raise UserError(f"prompt_format=chat: the tokenizer {tokenizer.name_or_path} has no chat template; use plain")
    if form == "plain" and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no eos_token, which ends a plain completion; set one"
        )
    if getattr(tokenizer, "is_fast", False):
        # One batch uses every core through the tokenizer's own threads; transformers may have turned them off.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    plain = form == "plain"
    renderer = Renderer(
        tokenizer=tokenizer,
        form=form,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        overlong="drop" if overlong == "drop" else "truncate",
        boundary="",
        clean_starts=frozenset(),
        leading=_leading_ids(tokenizer) if plain else (),
        trailing=(tokenizer.eos_token_id,) if plain else (),
    )
    boundary, clean_starts = _clean_starts(renderer)
    return replace(renderer, boundary=boundary, clean_starts=clean_starts)


def render_batch(renderer: Renderer, pairs: Sequence[LabeledComparison]) -> list[Rendered | Skip]:
    """Token ids for every pair, in order; a `Skip` where the template refuses it or the limits leave nothing to learn.

    A pair labelled "Tie" is rendered with completion A as chosen.
    """
    texts = [_texts(renderer, pair) for pair in pairs]
    ids = iter(_pair_ids(renderer, [one for one in texts if not isinstance(one, Skip)]))
    return [one if isinstance(one, Skip) else _limited(renderer, *next(ids)) for one in texts]


def prompt_text(renderer: Renderer, messages: Sequence[Message]) -> str:
    """The text that the model continues: the conversation and the beginning of the assistant's turn."""
    if renderer.form == "chat":
        return _template(renderer, messages, add_generation_prompt=True)
    return "".join(_SPEAKERS[message["role"]] + message["content"] for message in messages) + "\n\nAssistant:"


def full_text(renderer: Renderer, messages: Sequence[Message], completion: Sequence[Message]) -> str:
    """The text of a conversation with its answer, without the ids that the plain form puts around it."""
    if renderer.form == "chat":
        return _template(renderer, [*messages, *completion], add_generation_prompt=False)
    return prompt_text(renderer, messages) + " " + completion[0]["content"]


def _texts(renderer: Renderer, pair: LabeledComparison) -> tuple[str, str, str] | Skip:
    """Prompt text, and the two whole texts."""
    better = (pair.swap() if pair.label == "B" else pair).comparison
    prompt = better.prompt_conversation
    try:
        chosen, rejected = (full_text(renderer, prompt, one) for one in (better.completion_a, better.completion_b))
        return prompt_text(renderer, prompt), chosen, rejected
    except jinja2.TemplateError as error:  # many templates refuse a system turn or two user turns in a row
        return Skip("template_error", str(error))


def _template(renderer: Renderer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    return renderer.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _encode(renderer: Renderer, texts: list[str]) -> list[Ids]:
    """Ids without special tokens around them: a template writes its own, the plain form adds `leading`/`trailing`."""
    if not texts:
        return []
    return renderer.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _pair_ids(renderer: Renderer, texts: list[tuple[str, str, str]]) -> Iterable[tuple[Ids, Ids, Ids, bool]]:
    """Ids of prompt, chosen, rejected and whether the boundary moved, in one call of the tokenizer for the batch."""
    pieces: list[str] = []
    clean: list[bool] = []
    for prompt, chosen, rejected in texts:
        ends = prompt.endswith(renderer.boundary)
        alone = ends and all(_starts_clean(renderer, prompt, whole) for whole in (chosen, rejected))
        clean.append(alone)
        cut = len(prompt) if alone else 0
        pieces += [prompt, chosen[cut:], rejected[cut:]]
    ids = _encode(renderer, pieces)
    for number, alone in enumerate(clean):
        prompt_ids, chosen_ids, rejected_ids = ids[3 * number : 3 * number + 3]
        start = len(prompt_ids)
        if not alone:
            # TRL 1.16: the completions begin where their ids first differ from the prompt's, both at the same token.
            start = min(_common(prompt_ids, chosen_ids), _common(prompt_ids, rejected_ids))
            chosen_ids, rejected_ids = chosen_ids[start:], rejected_ids[start:]
        yield (
            [*renderer.leading, *prompt_ids[:start]],
            [*chosen_ids, *renderer.trailing],
            [*rejected_ids, *renderer.trailing],
            start < len(prompt_ids),
        )


def _starts_clean(renderer: Renderer, prompt: str, whole: str) -> bool:
    at = len(prompt) + (1 if renderer.form == "plain" else 0)  # the plain form's own space is part of the boundary test
    return whole[at : at + 1] in renderer.clean_starts and whole.startswith(prompt)


def _common(first: Ids, second: Ids) -> int:
    """Length of the common beginning."""
    if second[: len(first)] == first:
        return len(first)
    return next(at for at, (a, b) in enumerate(zip([*first, None], [*second, None], strict=False)) if a != b)


def _limited(renderer: Renderer, prompt: Ids, chosen: Ids, rejected: Ids, moved: bool) -> Rendered | Skip:
    if not prompt:
        return Skip("template_boundary", "the rendered conversation does not begin with the rendered prompt")
    limit, room = renderer.max_prompt_length, renderer.max_completion_length
    over = {"prompt": len(prompt) > limit, "chosen": len(chosen) > room, "rejected": len(rejected) > room}
    truncated = tuple(name for name, is_over in over.items() if is_over)
    if truncated and renderer.overlong == "drop":
        return Skip("too_long", " ".join(truncated))
    prompt, chosen, rejected = prompt[-limit:], chosen[:room], rejected[:room]
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if not ids:
            return Skip(f"empty_{name}", "the template renders no token for this answer")
    if chosen == rejected:
        return Skip("identical_after_truncation" if truncated else "identical_answers")
    return Rendered(prompt, chosen, rejected, truncated, moved)


def _leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer itself puts before a text (BOS, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    start = next((at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), 0)
    return tuple(dressed[:start])


def _clean_starts(renderer: Renderer) -> tuple[str, frozenset[str]]:
    """The text with which prompts end, and the characters with which a completion may begin to be encoded alone.

    Every printable ASCII character is tried with several continuations behind a real boundary; all other beginnings,
    white space first, take the whole text. Equal ids prove something only where nothing can merge across the boundary:
    behind a special token, or where the tokenizer cuts the text there before it merges (Llama 2's does not).
    """
    questions = [[Message(role="user", content=text)] for text in ("Why?", "a b")]
    prompts = [prompt_text(renderer, messages) for messages in questions]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*map(reversed, prompts), strict=False))
    boundary = "".join(letter for letter, _ in same)[::-1]
    backend = getattr(renderer.tokenizer, "backend_tokenizer", None)
    if backend is None or not boundary:
        return boundary, frozenset()
    (prompt_ids,) = _encode(renderer, prompts[:1])
    special = prompt_ids[-1] in renderer.tokenizer.all_special_ids
    space = " " if renderer.form == "plain" else ""
    trials = [space + start + tail for start in _STARTS for tail in _TAILS]
    whole = _encode(renderer, [prompts[0] + trial for trial in trials])
    alone = _encode(renderer, trials)
    failed = {
        trial[len(space)]
        for trial, whole_ids, ids in zip(trials, whole, alone, strict=True)
        if whole_ids != prompt_ids + ids or not (special or _cut_between(backend, boundary, trial))
    }
    return boundary, frozenset(_STARTS) - failed


def _cut_between(backend: Any, before: str, after: str) -> bool:
    """True if the pre-tokenizer cuts between the two texts, so that no merge can cross."""
    if backend.pre_tokenizer is None:
        return False
    normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
    left, both = normalize(before), normalize(before + after)
    cuts = {begin for _, (begin, _) in backend.pre_tokenizer.pre_tokenize_str(both)}
    return both.startswith(left) and len(left) in cuts
