"""What every form may have beside its columns: a system turn, a history, tools, arguments of the chat template."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message, RatedAnswer, Skip
from dpo_jax.data.forms.chosen import Row
from dpo_jax.data.forms.fields import HISTORY, SYSTEM, TEMPLATE, TOOLS
from dpo_jax.data.forms.messages import conversation, decoded


def with_beside(row: Row, beside: Sequence[str], one: Any) -> Any:
    """A pair or rated answer with the row's system turn, history, tools and arguments of the template."""
    if isinstance(one, Skip) or not any(row.get(name) for name in beside):
        return one
    is_pair = isinstance(one, LabeledComparison)
    what: Comparison | RatedAnswer = one.comparison if is_pair else one
    changes: dict[str, Any] = {}
    if tools := next((row[name] for name in beside if name in TOOLS and row[name]), None):
        tools = _tools(tools, "functions" in beside and not row.get("tools"))
        if isinstance(tools, Skip):
            return tools
        changes["tools"] = tools or None
    if given := next((row[name] for name in beside if name in TEMPLATE and row[name]), None):
        arguments = decoded(given, dict)
        if not isinstance(arguments, Mapping):
            return Skip(
                "bad_template_kwargs", f"chat_template_kwargs is {given!r:.60}, needed is a mapping, or JSON of one"
            )
        changes["chat_template_kwargs"] = dict(arguments)
    turns = _with_system(row, beside, what.prompt_conversation)
    if isinstance(turns, Skip):
        return turns
    if turns is not None:
        if not what.prompt_conversation:
            return Skip("no_transcript", "a system turn or history stands beside text that has no turns")
        changes |= {"prompt_conversation": turns, "texts": None}
    changed: Any = dataclasses.replace(cast(Any, what), **changes)
    return LabeledComparison(changed, one.label) if is_pair else changed


def _tools(value: Any, bare: bool) -> list[Any] | Skip:
    """The tools as chat templates take them; those of a column `functions` are bare, and are wrapped."""
    tools = decoded(value, (list, dict))
    tools = [tools] if isinstance(tools, Mapping) else tools
    tools = [decoded(tool, dict) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return Skip("bad_tools", f"tools are {value!r:.60}, needed is a list of mappings, or JSON of one")
    return [{"type": "function", "function": tool} if bare and "function" not in tool else tool for tool in tools]


def _with_system(row: Row, beside: Sequence[str], prompt: Sequence[Message]) -> tuple[Message, ...] | Skip | None:
    """The prompt behind the row's system turn and history; None if it has neither."""
    before: list[Message] = []
    systems = [row[name] for name in beside if name in SYSTEM and row[name] not in (None, "", [])]
    if any(not isinstance(one, str) for one in systems):
        return Skip("not_text", f"the system turn is {systems[0]!r:.40}, needed is text")
    own = [message["content"] for message in prompt[:1] if message["role"] == "system"]
    said = {text.strip() for text in (*systems, *own) if text.strip()}
    if len(said) > 1:
        return Skip("systems_differ", f"{len(said)} system turns: {', '.join(repr(x[:40]) for x in sorted(said))}")
    if systems and not own and said:
        before.append({"role": "system", "content": systems[0]})
    history = next((row[name] for name in beside if name in HISTORY and row[name]), None)
    earlier = _history(history)
    if isinstance(earlier, Skip):
        return earlier
    rest = list(prompt)
    if own:
        before.append(rest.pop(0))
    return (*before, *earlier, *rest) if earlier or len(before) > len(own) else None


def _history(value: Any) -> tuple[Message, ...] | Skip:
    """Earlier turns: messages, or pairs of question and answer."""
    turns = decoded(value, list)
    if value is None:
        return ()
    if isinstance(turns, list) and all(isinstance(turn, list | tuple) for turn in turns):
        if any(len(turn) != 2 or not all(isinstance(text, str) for text in turn) for turn in turns):
            return Skip("bad_history", f"history is {value!r:.60}, needed are pairs of question and answer")
        roles = ("user", "assistant")
        return tuple(Message(role=r, content=t) for turn in turns for r, t in zip(roles, turn, strict=True))
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return Skip("bad_history", f"history is {value!r:.60}, needed are messages, or pairs of question and answer")
    return conversation(turns)
