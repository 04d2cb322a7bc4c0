"""From a comparison to token ids: prompt, chosen and rejected, as TRL's DPOTrainer makes them from the same pair.

Three forms: `chat` (the tokenizer's chat template; completion ids are what it renders after the generation prompt, end
of turn included), `plain` (HH's own transcript; a completion is " " + answer + end-of-sequence token) and `text` (the
row's strings; TRL's standard format: the end-of-sequence token follows an answer that does not end with it).
`auto` is chat where there is a template, else plain, and text for a prompt that is templated already.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message, Skip
from dpo_jax.data.cuts import Cuts, Ids, Trio, encode, encode_trios, sure_cuts
from dpo_jax.data.rendering import Job, TemplateRefusal, render_jobs
from dpo_jax.data.template import (
    ChatTemplate,
    choose_template,
    foreign_option,
    generation_prompt,
    in_one_line,
    is_prose,
    rendering_job,
    templates_of,
    unread_fields,
)
from dpo_jax.errors import UserError

FORMATS = ("auto", "chat", "plain", "text")
_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: ", "tool": "\n\nTool: "}
Form = Literal["chat", "plain", "text"]


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with everything that decides the ids.

    `templated` matches the special tokens that tell that a prompt is templated already, and `auto` is whether such a
    prompt is taken as text. `leading` and `trailing` are the ids that the tokenizer itself puts around a text.
    """

    tokenizer: Any
    form: Form
    auto: bool
    template: ChatTemplate
    templated: re.Pattern[str]
    max_prompt_length: int
    max_completion_length: int
    overlong: Literal["truncate", "drop"]
    leading: tuple[int, ...]
    trailing: tuple[int, ...]
    cuts: Cuts
    turn: str = ""  # the text with which the template begins an assistant's turn


@dataclass(frozen=True)
class Rendered:
    """Token ids of one pair; `truncated` names the parts that lost tokens to the limits.

    `left_out` are the prompt's last ids if the whole texts do not go on with them (they merge with an answer's first
    ones, or the template renders the prompt alone otherwise): as in TRL, the completions begin where the ids part.
    `notes` are what a reader of the counts should know, see `dpo_jax/data/notes.py`.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    truncated: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def boundary_moved(self) -> bool:
        return bool(self.left_out)


def make_renderer(
    tokenizer: Any,
    prompt_format: str = "auto",
    max_prompt_length: int = 512,
    max_completion_length: int = 512,
    overlong: str = "truncate",
    chat_template: str = "",
    template_date: str = "",
) -> Renderer:
    """The renderer for a transformers tokenizer; lengths are in tokens.

    `chat_template` names one of several templates, `template_date` (YYYY-MM-DD, empty: today) is what a template with a
    date writes. UserError if an option is unknown, or the tokenizer lacks the template or the end that it needs.
    """
    if prompt_format not in FORMATS:
        raise UserError(f"prompt_format={prompt_format!r}; use auto, chat, plain or text")
    if overlong not in ("truncate", "drop"):
        raise UserError(f"overlong={overlong!r}; use truncate or drop")
    for name, limit in (("max_prompt_length", max_prompt_length), ("max_completion_length", max_completion_length)):
        if limit < 1:
            raise UserError(f"{name}={limit}; use at least 1 token")
    templates, who = templates_of(tokenizer), tokenizer.name_or_path
    if prompt_format == "chat" and not templates:
        raise UserError(f"prompt_format=chat: the tokenizer {who} has no chat template; use plain")
    form: Form = "plain" if prompt_format == "plain" or not templates else "chat"
    if prompt_format == "text":
        form = "text"
    template = ChatTemplate(tokenizer)
    if chat_template or (form == "chat" and templates):
        template = choose_template(tokenizer, chat_template, template_date)
    if getattr(tokenizer, "is_fast", False):
        # One batch uses every core through the tokenizer's own threads; transformers may have turned them off.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if form != "chat":
        _check_end(tokenizer)
    auto = prompt_format == "auto"
    return Renderer(
        tokenizer,
        form,
        auto,
        template,
        _special_text(tokenizer),
        max_prompt_length,
        max_completion_length,
        "drop" if overlong == "drop" else "truncate",
        *(((), ()) if prompt_format == "chat" else _around(tokenizer)),
        sure_cuts(tokenizer, templates.values()),
        generation_prompt(template) if templates and (auto or form == "text") else "",
    )


def render_batch(renderer: Renderer, pairs: Sequence[LabeledComparison]) -> list[Rendered | Skip]:
    """Token ids for every pair, in order; a `Skip` where the template refuses it or the limits leave nothing to learn.

    A pair labelled "Tie" is rendered with completion A as chosen.
    """
    begun = [_row(renderer, (pair.swap() if pair.label == "B" else pair).comparison) for pair in pairs]
    # All texts of the chat template are asked for at once.
    asked = [job for row in begun if isinstance(row, _Asked) for job in row.jobs]
    texts, known = iter(render_jobs(renderer.tokenizer, asked)), dict[tuple[str, str], bool]()
    rows = [
        _told(renderer, row, [next(texts) for _ in row.jobs], known) if isinstance(row, _Asked) else row
        for row in begun
    ]
    good = [row for row in rows if not isinstance(row, Skip)]
    ids = iter(encode_trios(renderer.tokenizer, renderer.cuts, [row.trio for row in good]))
    return [row if isinstance(row, Skip) else _limited(renderer, *next(ids), row.notes) for row in rows]


class _Row(NamedTuple):
    trio: Trio
    notes: tuple[str, ...] = ()


class _Asked(NamedTuple):
    """A comparison whose texts a chat template makes: of the prompt, and with each answer."""

    better: Comparison
    jobs: tuple[Job, ...]
    notes: tuple[str, ...] = ()


def _row(renderer: Renderer, better: Comparison) -> _Row | _Asked | Skip:
    """The texts of a comparison whose better completion is A."""
    texts = better.texts
    if whole := texts is not None and not better.prompt_conversation:
        assert texts is not None
        cut = _cut_whole(renderer, texts)
        if isinstance(cut, Skip):
            return cut
        texts = cut
    last = "".join(str(one.get("content")) for one in better.prompt_conversation[-1:])
    templated = renderer.templated.search(last if texts is None else texts[0]) is not None
    if renderer.form == "text" or (renderer.auto and templated and texts is not None) or whole:
        note = ("templated",) if renderer.auto else ()
        row: _Row | _Asked | Skip = _unchanged(renderer, better, texts)
    else:
        note = ("templated_inside",) if templated else ()
        row = _transcript(renderer, better) if renderer.form == "plain" else _chat(renderer, better)
    return row if isinstance(row, Skip) or not note else row._replace(notes=note + row.notes)


def _chat(renderer: Renderer, better: Comparison) -> _Asked | Skip:
    template, prompt = renderer.template, better.prompt_conversation
    if option := foreign_option(renderer.tokenizer, better):
        return Skip("template_option", f"chat_template_kwargs has {option}, which is no variable of a template")
    answers = [better.completion_a, better.completion_b]
    if better.texts is not None:  # the template writes the end of the turn
        answers = [_without_end(renderer, answer) for answer in answers]
    try:
        begun = rendering_job(template, better, prompt, generation=True)
        whole = (rendering_job(template, better, [*prompt, *one], generation=False) for one in answers)
        return _Asked(better, (begun, *whole))
    except Exception as error:  # a row may name any template
        return Skip("template_error", in_one_line(error))


def _told(
    renderer: Renderer, asked: _Asked, texts: list[str | TemplateRefusal], known: dict[tuple[str, str], bool]
) -> _Row | Skip:
    """A row of the texts that a chat template made; a `Skip` if it refused one of them."""
    begun, chosen, rejected = texts
    for text in texts:
        if isinstance(text, TemplateRefusal):
            return Skip("template_error", in_one_line(text))
    assert isinstance(begun, str)
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)
    try:
        unread = unread_fields(renderer.template, asked.better, known)
    except TemplateRefusal as error:
        return Skip("template_error", in_one_line(error))
    return _Row(Trio(begun, chosen, rejected), asked.notes + tuple(f"unread {name}" for name in unread))


def _transcript(renderer: Renderer, better: Comparison) -> _Row | Skip:
    """HH's transcript, whose text TRL takes as a string; the end of sequence is written once."""
    if name := _more_than_text(better):
        return Skip("not_plain", f"the transcript has no place for {name}; use prompt_format=chat")
    prompt = _turns(better.prompt_conversation) + "\n\nAssistant:"
    answers = []
    for answer in (better.completion_a, better.completion_b):
        if answer[0]["role"] != "assistant":
            return Skip("not_plain", f"the answer begins with a {answer[0]['role']} turn")
        answers.append(prompt + _ended(renderer, " " + answer[0]["content"] + _turns(answer[1:])))
    chosen, rejected = answers
    return _Row(Trio(prompt, chosen, rejected, renderer.leading))


def _unchanged(renderer: Renderer, better: Comparison, texts: tuple[str, str, str] | None) -> _Row | Skip:
    """The row's own strings, as TRL's standard format has them, with all that TRL and the tokenizer put around them."""
    if texts is None:
        named = [one["role"] for one in better.prompt_conversation if one["role"] == "system"]
        held = _more_than_text(better) or (f"a {named[0]} turn" if named else "messages")
        return Skip("not_text", f"the row has {held}; prompt_format=text takes strings: prompt, chosen, rejected")
    if name := _more_than_text(better):
        return Skip("not_text", f"the text has no place for {name}; use prompt_format=chat")
    missing = [one["role"] for one in better.prompt_conversation if one["content"].strip() not in texts[0]]
    if missing:
        return Skip("not_text", f"the prompt's text does not hold the {missing[0]} turn; use prompt_format=chat")
    tokenizer, (prompt, *answers) = renderer.tokenizer, texts
    end = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        return Skip("not_text", "the tokenizer has no eos_token, which ends an answer that is taken as text")
    twice = {
        "bos_twice": tokenizer.bos_token_id in renderer.leading and prompt.startswith(tokenizer.bos_token),
        "eos_twice": tokenizer.eos_token_id in renderer.trailing
        or any(answer.rstrip().endswith(end) and not answer.endswith(end) for answer in answers),
    }
    chosen, rejected = (prompt + _ended(renderer, answer) for answer in answers)
    trio = Trio(prompt, chosen, rejected, renderer.leading, renderer.trailing)
    return _Row(trio, tuple(note for note, found in twice.items() if found))


def _turns(messages: Sequence[Message]) -> str:
    return "".join(_SPEAKERS[message["role"]] + message["content"] for message in messages)


def _ended(renderer: Renderer, text: str) -> str:
    """With the end of sequence, unless it stands there already (TRL's `add_eos`)."""
    end = renderer.tokenizer.eos_token
    return text if text.endswith(end) else text + end


def _without_end(renderer: Renderer, answer: Sequence[Message]) -> Sequence[Message]:
    end, last = renderer.tokenizer.eos_token, answer[-1]
    if not end or not isinstance(last.get("content"), str) or not last["content"].endswith(end):
        return answer
    without: Any = {**last, "content": last["content"].removesuffix(end)}
    return [*answer[:-1], without]


def _more_than_text(comparison: Comparison) -> str:
    """The first field of a row that no text holds, by its name; empty if there is none."""
    if comparison.tools:
        return "tools"
    if comparison.chat_template_kwargs:
        return "chat_template_kwargs"
    parts = (comparison.prompt_conversation, comparison.completion_a, comparison.completion_b)
    for message in (message for part in parts for message in part):
        for key, value in message.items():
            if key not in ("role", "content") and value not in (None, "", []):
                return key
        if not isinstance(message.get("content"), str) or message["role"] not in _SPEAKERS:
            return f"a {message['role']} turn whose content is {message.get('content')!r:.40}"
    return ""


def _cut_whole(renderer: Renderer, texts: tuple[str, str, str]) -> tuple[str, str, str] | Skip:
    """Prompt and answers of two whole templated texts, cut where an assistant's turn last begins in both alike."""
    if renderer.form != "text" and not renderer.auto:
        return Skip("no_transcript", f"prompt_format={renderer.form} needs a prompt; text takes templated texts")
    _, chosen, rejected = texts
    alike = len(os.path.commonprefix([chosen, rejected]))  # noqa: RUF071 (texts, not paths)
    at = chosen.rfind(renderer.turn, 0, alike) if renderer.turn else -1
    if at < 0:
        shown = repr(renderer.turn) if renderer.turn else "which its chat template does not show"
        return Skip(
            "no_transcript", f"no prompt, no HH turns, and no assistant turn of the tokenizer ({shown}) in both"
        )
    at += len(renderer.turn)
    return chosen[:at], chosen[at:], rejected[at:]


def _limited(
    renderer: Renderer, prompt: Ids, chosen: Ids, rejected: Ids, left_out: Ids, notes: tuple[str, ...]
) -> Rendered | Skip:
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
    return Rendered(prompt, chosen, rejected, truncated, tuple(left_out), notes)


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer itself puts before and after a text (BOS, EOS, or nothing).

    UserError if they depend on the text.
    """
    found = set()
    for text in ("a", "b c\n"):
        (bare,), dressed = encode(tokenizer, [text]), tokenizer(text, verbose=False)["input_ids"]
        start = next((at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), len(dressed))
        found.add((tuple(dressed[:start]), tuple(dressed[start + len(bare) :])))
    if len(found) > 1:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} puts other tokens around one text than another")
    return found.pop()


def _check_end(tokenizer: Any) -> None:
    """UserError unless the end-of-sequence token can be written in a text."""
    who = f"the tokenizer {tokenizer.name_or_path}"
    if tokenizer.eos_token_id is None:
        raise UserError(f"{who} has no eos_token, which ends a completion; set one")
    if encode(tokenizer, [tokenizer.eos_token]) != [[tokenizer.eos_token_id]]:
        raise UserError(f"{who} does not read the text of its eos_token {tokenizer.eos_token!r} as this token; mend it")


def _special_text(tokenizer: Any) -> re.Pattern[str]:
    """What only a templated text holds: special tokens, those that prose may hold only at the very beginning."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
    texts = sorted((re.escape(name) for name in names if not is_prose(name)), key=len, reverse=True)
    prose = sorted((re.escape(name) for name in names if is_prose(name)), key=len, reverse=True)
    either = [rf"\A(?:{'|'.join(prose)})"] * bool(prose) + texts
    return re.compile("|".join(either) or r"(?!)")
