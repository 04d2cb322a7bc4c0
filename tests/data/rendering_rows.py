"""Rows for tests of rendering: conversations with all that other tools' files hold, made by hypothesis."""

import json

from hypothesis import strategies as st

from dpo_jax.data.comparison import Comparison, LabeledComparison

PIECES = [
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "hello", "Human:", " there", "12", "1,000.50", "'s", "é",
    "e\u0301", "\u4f60\u597d", "🙂", "\u0301", "\ufb01", "?", ":", ": ", "<think>", "</think>\n\n", "<|im_end|>",
    "<|endoftext|>", "</s>", "<s>", "[INST]", "{{ x }}", "<tool_call>",
]  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide_height",
            "description": "Height of the tide in metres.",
            "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
        },
    }
]

texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
some_text = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


def said(role, content=texts):
    return content.map(lambda text: {"role": role, "content": text})


def call(port):
    return {"type": "function", "function": {"name": "tide_height", "arguments": {"port": port}}}


def assistants(extras):
    """Assistant turns, with the keys that templates know besides the content if `extras`."""
    plain = said("assistant")
    if not extras:
        return plain
    return st.one_of(
        plain,
        plain,
        st.builds(lambda turn, why: {**turn, "reasoning_content": why}, plain, texts),
        st.builds(lambda turn, port: {**turn, "tool_calls": [call(port)]}, plain, some_text),
    )


@st.composite
def conversations(draw):
    """A row of messages: prompt, chosen, rejected, and perhaps tools and template arguments."""
    prompt = draw(st.one_of(st.just([]), said("system").map(lambda turn: [turn])))
    extras = draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        prompt += [draw(said("user")), draw(assistants(extras))]
        if "tool_calls" in prompt[-1]:
            prompt += [{"role": "tool", "name": "tide_height", "content": draw(texts)}, draw(assistants(False))]
    prompt.append(draw(said("user", some_text)))
    several = draw(st.integers(0, 3)) == 0
    between = [draw(assistants(extras)), draw(said("user"))] if several else []
    good, bad = draw(st.tuples(assistants(extras), assistants(extras)).filter(lambda answers: answers[0] != answers[1]))
    row = {"prompt": prompt, "chosen": [*between, good], "rejected": [*between, bad]}
    if extras and draw(st.booleans()):
        row["tools"] = draw(st.sampled_from([TOOLS, [], json.dumps(TOOLS)]))
    if draw(st.integers(0, 3)) == 0:
        row["chat_template_kwargs"] = {"enable_thinking": draw(st.booleans())}
    return row


def comparison_of(row):
    """The row as the parser of its form makes it."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if isinstance(row["prompt"], str):
        texts = tuple(row[key] for key in ("prompt", "chosen", "rejected"))
        roles = ("user", "assistant", "assistant")
        turns = [[{"role": role, "content": text}] for role, text in zip(roles, texts, strict=True)]
        return LabeledComparison(Comparison(*turns, tools, texts=texts), "A")
    parts = (row["prompt"], row["chosen"], row["rejected"])
    return LabeledComparison(Comparison(*parts, tools, row.get("chat_template_kwargs")), "A")
