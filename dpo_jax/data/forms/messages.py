"""Messages from whatever a row has: strings, messages of any spelling, JSON in strings, parts of contents, tool calls.

Contents are kept letter for letter, and every key of a message that is not null stays, for the chat template.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dpo_jax.data.comparison import Message, Skip

_SPELLINGS = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "bot", "model", "ai", "chatgpt"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function", "tool_response", "ipython"),
}
_CALLS = ("function_call", "tool_call")  # turns of LLaMA-Factory and ms-swift whose text is a call, as JSON
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_WHO, _WHAT = ("role", "from"), ("content", "value")
# Keys of a message whose content the model would not see.
MEDIA = ("images", "image", "videos", "video", "audios", "audio", "documents")
_MESSAGES = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|content|from|value|tool_calls)["']\s*:""")
_OPENINGS = ("[", "{", " ", "\n", "\t", "\r")
_MARKS = ("weight", "loss", "train", "training")  # other trainers' marks of turns without loss


def conversation(value: Any, role: str = "user") -> tuple[Message, ...] | Skip:
    """Messages from a string (one turn of `role`, or messages as JSON), one message, or a list of them.

    >>> conversation('[{"from": "human", "value": "Hi"}]')
    ({'role': 'user', 'content': 'Hi'},)
    >>> conversation([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    ({'role': 'user', 'content': 'Hi'},)
    >>> conversation([{"role": "user", "content": [{"type": "image_url"}]}]).reason
    'unread_field'
    """
    if isinstance(value, str):
        decoded = decode_messages(value)
        if isinstance(decoded, Skip):
            return decoded
        if decoded is None:
            return ({"role": role, "content": value},)
        value = decoded
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return Skip("not_text", f"needed is text or messages, found {type(value).__name__}")
    messages: list[Message] = []
    called = False  # the turn before was a call, too: calls that follow each other are one turn
    for item in value:
        if not isinstance(item, Mapping):
            return Skip("not_text", f"a message is a {type(item).__name__}, needed is {{role, content}}")
        who = next((item[key] for key in _WHO if item.get(key) is not None), None)
        if isinstance(who, str) and who.lower() in _CALLS:
            calls = _calls_in(next((item[key] for key in _WHAT if item.get(key) is not None), None))
            if isinstance(calls, Skip):
                return calls
            before = cast(dict[str, Any], messages[-1]) if called else {}
            if called:
                before["tool_calls"] = [*before["tool_calls"], *calls]
            else:
                messages.append(cast(Message, {"role": "assistant", "content": "", "tool_calls": calls}))
            called = True
            continue
        message = _message(item, who)
        if isinstance(message, Skip):
            return message
        messages.append(message)
        called = False
    return tuple(messages)


def decode_messages(text: str) -> Any:
    """The messages that a string holds as JSON (or as Python prints them); None if it is a text like any other.

    `Skip` if it begins as messages do, and can be read as neither: nobody means that as a question.
    """
    if not text.startswith(_OPENINGS) or _MESSAGES.match(text) is None:
        return None
    value = _loaded(text)
    if value is None:
        return Skip("not_text", f"text that begins as messages do, but is no JSON: {text[:60]!r}; write it as JSON")
    items = value if isinstance(value, list) else [value]
    return value if all(_is_message(item) for item in items) else None


def without_loss(messages: Sequence[Message]) -> str:
    """The key by which another trainer would take the loss off a turn of this answer; empty if there is none."""
    for message in messages:
        if len(message) > 2:
            for mark in _MARKS:
                if message.get(mark) in (0, False) and message.get(mark) is not None:
                    return mark
    return ""


def decoded(value: Any, wanted: type | tuple[type, ...]) -> Any:
    """JSON of a list or mapping that a string holds; every other value as it is, None if a string is no such JSON."""
    if not isinstance(value, str):
        return value
    found = _loaded(value)
    return found if isinstance(found, wanted) else None


def _is_message(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    who = next((item[key] for key in _WHO if item.get(key) is not None), None)
    known = isinstance(who, str) and (who.lower() in _ROLES or who.lower() in _CALLS)
    return known and any(key in item for key in (*_WHAT, "tool_calls"))


def _loaded(text: str) -> Any:
    for load in (json.loads, ast.literal_eval):
        try:
            return load(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _message(item: Mapping[str, Any], who: Any) -> Message | Skip:
    """One message: role and content, and every other key that is not null."""
    content = next((item[key] for key in _WHAT if item.get(key) is not None), None)
    if not isinstance(who, str) or who.lower() not in _ROLES:
        return Skip("unknown_role", f"role {who!r:.40}; known are {', '.join((*_ROLES, *_CALLS))}")
    message: dict[str, Any] = {"role": _ROLES[who.lower()], "content": content}
    if len(item) > 2:
        for key, value in item.items():
            if value is not None and key not in (*_WHO, *_WHAT):
                message[key] = value
        for key in MEDIA:
            if message.get(key):
                return Skip("unread_field", f"a message has {key}, which this trainer cannot read")
            message.pop(key, None)
        if calls := message.pop("function_call", None):
            message["tool_calls"] = calls
        if isinstance(message.get("tool_calls"), str | Mapping):
            message["tool_calls"] = _calls_in(message["tool_calls"])
            if isinstance(message["tool_calls"], Skip):
                return message["tool_calls"]
    if isinstance(content, list | tuple):
        joined = _joined(content)
        if isinstance(joined, Skip):
            return joined
        message["content"] = joined
    elif content is None and message.get("tool_calls"):
        message["content"] = ""
    elif not isinstance(content, str):
        return Skip("not_text", f"a message's content is a {type(content).__name__}, needed is text")
    return cast(Message, message)


def _joined(parts: Sequence[Any]) -> str | Skip:
    """The text of a content's parts, one behind the other as templates write them."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", None) or not isinstance(text, str):
            return Skip("unread_field", f"a message has a part of type {kind}; only parts of text can be read")
        texts.append(text)
    return "".join(texts)


def _calls_in(value: Any) -> list[dict[str, Any]] | Skip:
    """Tool calls as chat templates take them, from JSON of one call or of several."""
    calls = decoded(value, (list, dict))
    calls = [calls] if isinstance(calls, Mapping) else calls
    wrong = Skip("bad_tool_call", f"a call is {value!r:.60}, needed is JSON with a name and arguments")
    if not isinstance(calls, list) or not calls:
        return wrong
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return wrong
        if function is call:
            arguments = function.get("arguments", function.get("parameters", {}))
            read = decoded(arguments, (dict, list))
            call = {
                "type": "function",
                "function": {"name": call["name"], "arguments": arguments if read is None else read},
            }
        found.append(dict(call))
    return found
