"""A tokenizer's chat templates: which one a row is rendered with, the text it makes, and what it says of itself."""

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.data.rendering import TemplateRefusal, render_jobs, source_file
from dpo_jax.errors import UserError

_CLOCK = "strftime_now"  # the function by which templates write a date
_FORMATS = "aAbBdjmUwWyYxcGuVeDFhHIMSpTRX"  # of strftime, one character each
_TEXT = frozenset({"role", "content"})  # of a message, which every template reads
_ROW_MAY_NAME = (
    "tools",
    "documents",
    "chat_template",
)  # of apply_chat_template's arguments; only the text follows from them
# Kinds of errors by which a template says that it renders nothing, whatever it is given.
_BROKEN = frozenset(
    "TemplateSyntaxError TemplateAssertionError TemplateNotFound TemplatesNotFound SecurityError RecursionError".split()
)
_NO_LOADER = "no loader for this environment specified"  # of include, import and extends
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}],
)


@dataclass(frozen=True)
class ChatTemplate:
    """What renders messages. `name` is one of several templates; empty: `default`, and `tool_use` for rows with tools.

    `day` (YYYY-MM-DD) is the date that templates with a date write, midnight; empty where none has one.
    """

    tokenizer: Any
    name: str = ""
    day: str = ""


def templates_of(tokenizer: Any) -> dict[str, str]:
    """All chat templates of a tokenizer by name; a single one is `default`."""
    held = tokenizer.chat_template if hasattr(tokenizer, "chat_template") else None
    return dict(held) if isinstance(held, dict) else {"default": held} if held else {}


def choose_template(tokenizer: Any, name: str = "", day: str = "") -> ChatTemplate:
    """The template of that name, with the date `day` (empty: today's) where one is written.

    UserError if there is no such template, if there are several of which none is the default and none is named, or if
    it cannot be rendered at all.
    """
    held, who = templates_of(tokenizer), tokenizer.name_or_path
    if name and name not in held:
        raise UserError(
            f"chat_template={name}: the tokenizer {who} has no template of this name; it has "
            f"{', '.join(sorted(held)) or 'none'}"
        )
    if held and not name and "default" not in held:
        raise UserError(
            f"the tokenizer {who} has several chat templates and none is the default; name one: "
            f"--config.chat_template={' or '.join(sorted(held))}"
        )
    if held:
        _refuse_broken(tokenizer, name, held[name or "default"])
    dated = any(_CLOCK in source for source in held.values())
    return ChatTemplate(tokenizer, name, (day or date.today().isoformat()) if dated else "")


def render_messages(
    template: ChatTemplate, comparison: Comparison, messages: Sequence[Message], *, generation: bool
) -> str:
    """The text of messages, with the tools and template arguments of their row, as TRL 1.16 has it.

    Args:
      generation: whether the text ends with the beginning of the assistant's turn.

    Raises:
      TemplateRefusal: the template raised something.
      UserError: the template does not end, or takes all memory.
    """
    (text,) = render_jobs(template.tokenizer, [rendering_job(template, comparison, messages, generation=generation)])
    if isinstance(text, TemplateRefusal):
        raise text
    return text


def rendering_job(
    template: ChatTemplate, comparison: Comparison, messages: Sequence[Message], *, generation: bool
) -> dict[str, Any]:
    """What `render_messages` renders, for `render_jobs`: several at once take less time."""
    row: dict[str, Any] = {"tools": comparison.tools, **(comparison.chat_template_kwargs or {})}
    source = source_of(template, comparison)
    row["chat_template"] = _dated(template.day, source) if template.day and _CLOCK in source else source
    return {"conversation": list(messages), "add_generation_prompt": generation, **row}


def source_of(template: ChatTemplate, comparison: Comparison) -> str:
    """The source of a row's template: of the one that it names, of the chosen one, or by its tools."""
    row = comparison.chat_template_kwargs or {}
    named = row.get("chat_template") or template.name or None
    return template.tokenizer.get_chat_template(named, row.get("tools", comparison.tools))


def foreign_option(tokenizer: Any, comparison: Comparison) -> str:
    """The first of a row's template arguments that would steer tokenisation and not the template; empty if none."""
    if not comparison.chat_template_kwargs:
        return ""
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    taken = [name for name, one in own.items() if one.kind is not one.VAR_KEYWORD and name not in _ROW_MAY_NAME]
    return next((name for name in comparison.chat_template_kwargs if name in taken), "")


def unread_fields(template: ChatTemplate, comparison: Comparison, known: dict[tuple[str, str], bool]) -> list[str]:
    """The fields of a row that leave no trace in its text, of those whose names its template does not mention.

    A name may be mentioned nowhere and yet be read (transformers gives a template `reasoning_content` where a row says
    `thinking`), so the text is rendered without the field and compared, once for each template and field: `known`.
    """
    answers = (comparison.completion_a, comparison.completion_b)
    messages = [message for part in (comparison.prompt_conversation, *answers) for message in part]
    if not (comparison.tools or comparison.chat_template_kwargs or any(message.keys() - _TEXT for message in messages)):
        return []  # most rows have texts alone
    fields = {key for message in messages for key, value in message.items() if value not in (None, "", [])}
    fields |= set(comparison.chat_template_kwargs or {}) - set(_ROW_MAY_NAME)
    fields |= {"tools"} if comparison.tools else set()
    fields -= _TEXT
    if not fields:
        return []
    source = source_of(template, comparison)
    for field in fields:
        if field not in source and (source, field) not in known:
            known[source, field] = _no_trace(template, comparison, field)
    return sorted(field for field in fields if known.get((source, field)))


def generation_prompt(template: ChatTemplate) -> str:
    """The text with which a template begins an assistant's turn; empty if it shows none."""
    for messages in _PROBES:
        probe = Comparison(messages, (), ())
        try:
            begun, bare = (render_messages(template, probe, messages, generation=one) for one in (True, False))
        except (TemplateRefusal, ValueError):  # a template may refuse any conversation, in its own way
            continue
        if begun.startswith(bare) and begun != bare:
            return begun[len(bare) :]
    return ""


def in_one_line(error: Exception) -> str:
    """What went wrong in a template, for a reader: its own message, or the exception with its kind."""
    kind = error.kind if isinstance(error, TemplateRefusal) else type(error).__name__
    text = " ".join(str(error).split())[:300]
    return text if kind == "TemplateError" and text else f"{kind}: {text}" if text else kind


def _no_trace(template: ChatTemplate, comparison: Comparison, field: str) -> bool:
    def bare(messages: Sequence[Message]) -> list[Any]:
        return [{key: value for key, value in message.items() if key != field} for message in messages]

    options = {key: value for key, value in (comparison.chat_template_kwargs or {}).items() if key != field}
    without = replace(comparison, chat_template_kwargs=options, tools=None if field == "tools" else comparison.tools)
    for completion in (comparison.completion_a, comparison.completion_b):
        messages = [*comparison.prompt_conversation, *completion]
        try:
            text = render_messages(template, comparison, messages, generation=False)
            if text != render_messages(template, without, bare(messages), generation=False):
                return False
        except UserError:
            raise
        except Exception:  # without the field the template refuses the row: it reads it
            return False
    return True


def _refuse_broken(tokenizer: Any, name: str, source: str) -> None:
    """A UserError, with its place, if a template renders no conversation whatever."""
    jobs = [{"conversation": probe, "chat_template": source} for probe in _PROBES]
    for text in render_jobs(tokenizer, jobs):
        if isinstance(text, TemplateRefusal) and (text.kind in _BROKEN or str(text) == _NO_LOADER):
            which = f"{source_file(tokenizer)}: the chat template{' ' + name if name else ''}"
            raise UserError(
                f"{which} cannot be rendered ({in_one_line(text)}); mend it, or use --config.prompt_format=plain"
            )


@functools.lru_cache(maxsize=64)
def _dated(day: str, source: str) -> str:
    """A template whose date is that day."""
    return _stopped_clock(day) + source


@functools.lru_cache(maxsize=16)
def _stopped_clock(day: str) -> str:
    """A macro in front of a template that takes the place of `strftime_now`: midnight of `day`, on any machine.

    A template is rendered in a sandbox that takes no function of ours, so each format is replaced by its value. The
    last line end belongs to the macro: the environment of chat templates drops it.
    """
    values = {f"%{one}": date.fromisoformat(day).strftime(f"%{one}") for one in _FORMATS}
    values |= {f"%-{one}": value.lstrip("0") or "0" for one in "dmjHIMS" for value in (values[f"%{one}"],)}
    steps = "".join(f".replace({text!r}, {value!r})" for text, value in values.items())
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"


def is_prose(token: str) -> bool:
    """Whether a special token's text may stand in ordinary prose, such as `<s>` in a question about HTML."""
    return re.fullmatch(r"</?[A-Za-z]+>|\[(PAD|UNK|CLS|SEP|MASK)\]", token) is not None
