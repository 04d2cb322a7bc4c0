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


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with everything that decides the ids.

    `boundary` is the text with which every prompt ends; a completion that begins with a character of `clean_starts`
    has the same ids on its own as after that boundary (see `_measured`). `leading` and `trailing` are the
    ids around the text in the plain form (BOS as the tokenizer itself adds it, EOS).
    """

    tokenizer: Any
    form: Literal["chat", "plain"]
    max_prompt_length: int
    max_completion_length: int
    overlong: Literal["truncate", "drop"]
    leading: tuple[int, ...]
    trailing: tuple[int, ...]
    boundary: str = ""
    clean_starts: frozenset[str] = frozenset()


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

    UserError if an option is unknown, or the tokenizer lacks the chat template or the end-of-sequence token it needs.
    """
    if prompt_format not in ("auto", "chat", "plain"):
        raise UserError(f"prompt_format={prompt_format!r}; use auto, chat or plain")
    if overlong not in ("truncate", "drop"):
        raise UserError(f"overlong={overlong!r}; use truncate or drop")
    for name, limit in (("max_prompt_length", max_prompt_length), ("max_completion_length", max_completion_length)):
        if limit < 1:
            raise UserError(f"{name}={limit}; use at least 1 token")
    has_template = getattr(tokenizer, "chat_template", None)
    form: Literal["chat", "plain"] = "plain" if prompt_format == "plain" or not has_template else "chat"
    if prompt_format == "chat" != form:
        raise UserError(f"prompt_format=chat: the tokenizer {tokenizer.name_or_path} has no chat template; use plain")
    if form == "plain" and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no eos_token, which ends a plain completion; set one"
        )
    if getattr(tokenizer, "is_fast", False):
        # One batch uses every core through the tokenizer's own threads; transformers may have turned them off.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    around = (_leading_ids(tokenizer), (tokenizer.eos_token_id,)) if form == "plain" else ((), ())
    kept: Literal["truncate", "drop"] = "drop" if overlong == "drop" else "truncate"
    return _measured(Renderer(tokenizer, form, max_prompt_length, max_completion_length, kept, *around))


def render_batch(renderer: Renderer, pairs: Sequence[LabeledComparison]) -> list[Rendered | Skip]:
    """Token ids for every pair, in order; a `Skip` where the template refuses it or the limits leave nothing to learn.

    A pair labelled "Tie" is rendered with completion A as chosen.
    """
    texts = [_texts(renderer, pair) for pair in pairs]
    ids = iter(_pair_ids(renderer, [one for one in texts if not isinstance(one, Skip)]))
    return [one if isinstance(one, Skip) else _limited(renderer, *next(ids)) for one in texts]


def _text(renderer: Renderer, messages: Sequence[Message], completion: Sequence[Message] = ()) -> str:
    """The text of a conversation with its answer; without one, up to the beginning of the assistant's turn."""
    if renderer.form == "chat":
        return renderer.tokenizer.apply_chat_template(
            [*messages, *completion], tokenize=False, add_generation_prompt=not completion
        )
    turns = "".join(_SPEAKERS[message["role"]] + message["content"] for message in messages) + "\n\nAssistant:"
    return f"{turns} {completion[0]['content']}" if completion else turns


def _texts(renderer: Renderer, pair: LabeledComparison) -> tuple[str, str, str] | Skip:
    """Prompt text, and the two whole texts."""
    better = (pair.swap() if pair.label == "B" else pair).comparison
    prompt = better.prompt_conversation
    try:
        chosen, rejected = (_text(renderer, prompt, one) for one in (better.completion_a, better.completion_b))
        return _text(renderer, prompt), chosen, rejected
    except jinja2.TemplateError as error:  # many templates refuse a system turn or two user turns in a row
        return Skip("template_error", str(error))


def _encode(renderer: Renderer, texts: list[str]) -> list[Ids]:
    """Ids without special tokens around them: a template writes its own, the plain form adds `leading`/`trailing`."""
    if not texts:
        return []
    return renderer.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _pair_ids(renderer: Renderer, texts: list[tuple[str, str, str]]) -> Iterable[tuple[Ids, Ids, Ids, bool]]:
    """Ids of prompt, chosen, rejected and whether the boundary moved, in one call of the tokenizer for the batch."""
    clean = [all(_starts_clean(renderer, prompt, whole) for whole in answers) for prompt, *answers in texts]
    pieces: list[str] = []
    for (prompt, chosen, rejected), alone in zip(texts, clean, strict=True):
        cut = len(prompt) if alone else 0
        pieces += [prompt, chosen[cut:], rejected[cut:]]
    ids = iter(_encode(renderer, pieces))
    for alone, prompt_ids, chosen_ids, rejected_ids in zip(clean, ids, ids, ids, strict=True):
        start = len(prompt_ids)
        if not alone:
            # TRL 1.16: the completions begin where their ids first differ from the prompt's, both at the same token.
            trios = enumerate(zip(prompt_ids, chosen_ids, rejected_ids, strict=False))
            shortest = min(len(prompt_ids), len(chosen_ids), len(rejected_ids))
            start = next((at for at, (p, c, r) in trios if not p == c == r), shortest)
            chosen_ids, rejected_ids = chosen_ids[start:], rejected_ids[start:]
        yield (
            [*renderer.leading, *prompt_ids[:start]],
            [*chosen_ids, *renderer.trailing],
            [*rejected_ids, *renderer.trailing],
            start < len(prompt_ids),
        )


def _starts_clean(renderer: Renderer, prompt: str, whole: str) -> bool:
    at = len(prompt) + (1 if renderer.form == "plain" else 0)  # the plain form's own space is part of the boundary test
    begins = whole.startswith(prompt) and prompt.endswith(renderer.boundary)
    return begins and whole[at : at + 1] in renderer.clean_starts


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


def _measured(renderer: Renderer) -> Renderer:
    """With `boundary`, and with `clean_starts`, as what a completion may begin to be encoded alone.

    Every printable ASCII character is tried with several continuations behind a real boundary; all other beginnings,
    white space first, take the whole text. Equal ids prove something only where nothing can merge across the boundary:
    behind a special token, or where the tokenizer cuts the text there before it merges (Llama 2's does not).
    """
    questions = [[Message(role="user", content=text)] for text in ("Why?", "a b")]
    prompts = [_text(renderer, messages) for messages in questions]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*map(reversed, prompts), strict=False))
    boundary = "".join(letter for letter, _ in same)[::-1]
    backend = getattr(renderer.tokenizer, "backend_tokenizer", None)
    if backend is None or not boundary:
        return replace(renderer, boundary=boundary)
    (prompt_ids,) = _encode(renderer, prompts[:1])
    special = prompt_ids[-1] in renderer.tokenizer.all_special_ids
    space = " " if renderer.form == "plain" else ""
    starts = [chr(code) for code in range(33, 127)]  # printable ASCII that is no space
    trials = [space + start + tail for start in starts for tail in ("", "bc", " bc", "...", "1", "\n\nbc")]
    whole = _encode(renderer, [prompts[0] + trial for trial in trials])
    alone = _encode(renderer, trials)
    failed = {
        trial[len(space)]
        for trial, whole_ids, ids in zip(trials, whole, alone, strict=True)
        if whole_ids != prompt_ids + ids or not (special or _cut_between(backend, boundary, trial))
    }
    return replace(renderer, boundary=boundary, clean_starts=frozenset(starts) - failed)


def _cut_between(backend: Any, before: str, after: str) -> bool:
    """True if the pre-tokenizer cuts between the two texts, so that no merge can cross."""
    if backend.pre_tokenizer is None:
        return False
    normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
    left, both = normalize(before), normalize(before + after)
    cuts = {begin for _, (begin, _) in backend.pre_tokenizer.pre_tokenize_str(both)}
    return both.startswith(left) and len(left) in cuts
