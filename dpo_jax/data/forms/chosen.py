"""Forms whose columns say which answer is better: `chosen` and `rejected` under many names, with or without a prompt.

Nothing here is checked, and no system turn or tool is added: `table.read_form` does both for every form.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message, Skip
from dpo_jax.data.forms.fields import without_metadata
from dpo_jax.data.forms.messages import conversation
from dpo_jax.data.forms.transcripts import transcript_pair, transcript_prompt

Row = Mapping[str, Any]
Outcome = LabeledComparison | Skip
Parsed = Outcome | list[Outcome]


def pair_of(prompt: Any, chosen: Any, rejected: Any) -> Outcome:
    r"""Prompt, chosen and rejected; strings or message lists, the prompt inside the lists or not.

    Lists that do not begin with the assistant hold the conversation (UltraFeedback): the prompt is then the longest
    beginning that they have in common, and what `prompt` says must be in it. Strings without a prompt are transcripts
    of HH, or whole texts that only the tokenizer can divide. A `prompt` that is a transcript up to its last
    "\n\nAssistant:" becomes the turns that it holds, and the blanks before its answers are none of theirs.

    >>> pair_of("Hi", "Hello!", "What?").comparison.prompt_conversation
    ({'role': 'user', 'content': 'Hi'},)
    >>> pair_of("\n\nHuman: Hi\n\nAssistant:", " Hello!", " What?").chosen
    ({'role': 'assistant', 'content': 'Hello!'},)
    """
    first, second = conversation(chosen, role="assistant"), conversation(rejected, role="assistant")
    if isinstance(first, Skip):
        return first
    if isinstance(second, Skip):
        return second
    plain = _is_plain(chosen, first) and _is_plain(rejected, second)
    if prompt is None and plain:
        whole = transcript_pair(chosen, rejected)
        if isinstance(whole, Skip) and whole.reason == "no_transcript":
            return LabeledComparison(Comparison((), (), (), texts=("", chosen, rejected)), "A")
        return whole
    turns = transcript_prompt(prompt)
    stated = () if prompt is None else conversation(prompt) if turns is None else turns
    if isinstance(stated, Skip):
        return stated
    texts = (prompt, chosen, rejected) if plain and isinstance(prompt, str) else None
    if turns is not None and plain:
        first, second = ((Message(role="assistant", content=text.strip()),) for text in (chosen, rejected))
    elif texts is not None and not _is_plain(prompt, stated):
        texts = None
    if first and second and (_holds_prompt(first, second) or (not stated and len(first) > 1 and len(second) > 1)):
        shared, lists = shared_turns(first, second), (first, second)
        inside, first, second = first[:shared], first[shared:], second[shared:]
        if not inside:
            return Skip("prompts_differ", "the message lists have no beginning in common")
        if stated not in lists and not _says(inside, prompt, stated):
            return Skip("prompts_differ", "what prompt says is not in the beginning of the message lists")
        stated = inside
    if not stated:
        return Skip("empty_prompt", "no prompt, and the answers hold none")
    return LabeledComparison(Comparison(stated, first, second, texts=texts), "A")


def pairs_of(prompt: Any, chosen: Any, rejected: Any) -> Parsed:
    """As `pair_of`, and for lists of texts several pairs: by place if they are as many, else each with each.

    >>> [pair.rejected[0]["content"] for pair in pairs_of("Hi", ["a"], ["b", "c"])]
    ['b', 'c']
    """
    good, bad = ([x] if isinstance(x, str) else x for x in (chosen, rejected))
    if (not _are_texts(chosen) and not _are_texts(rejected)) or not (_are_texts(good) and _are_texts(bad)):
        return pair_of(prompt, chosen, rejected)
    if len(good) == len(bad):
        return [pair_of(prompt, one, two) for one, two in zip(good, bad, strict=True)]
    return [pair_of(prompt, one, two) for one in good for two in bad]


def shared_turns(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many turns both begin with, as TRL's `extract_prompt` has it: at least one of each is left as the answer.

    Messages that differ by their ids or times are the same turn.
    """
    most = min(len(first), len(second)) - 1
    pairs = zip(map(without_metadata, first[: max(most, 0)]), map(without_metadata, second), strict=False)
    return next((at for at, (one, two) in enumerate(pairs) if one != two), max(most, 0))


def answer_of_messages(messages: Any, rejected: Any) -> Outcome:
    """ms-swift: the last turn of `messages` is chosen; `rejected` stands in its place, or is a whole list."""
    turns = conversation(messages)
    if isinstance(turns, Skip):
        return turns
    if not turns or turns[-1]["role"] != "assistant":
        return Skip("missing_column", "the last turn of messages is the chosen answer, and must be the assistant's")
    other = conversation(rejected, role="assistant")
    if isinstance(other, Skip):
        return other
    if not other:
        return Skip("empty_rejected")
    if other[0]["role"] != "assistant":
        return pair_of(None, turns, other)
    return LabeledComparison(Comparison(turns[:-1], turns[-1:], other), "A")


def joined_task(instruction: Any, extra: Any) -> Any:
    r"""Alpaca's task and its input, a blank line between.

    >>> joined_task("Correct it.", "freind")
    'Correct it.\n\nfreind'
    """
    if not isinstance(instruction, str) or not isinstance(extra, str) or not extra.strip():
        return instruction
    return f"{instruction}\n\n{extra}" if instruction.strip() else extra


def _is_plain(value: Any, messages: Sequence[Message]) -> bool:
    """True of a string that is a text, and not messages as JSON."""
    return isinstance(value, str) and len(messages) == 1 and messages[0]["content"] == value and len(messages[0]) == 2


def _holds_prompt(first: Sequence[Message], second: Sequence[Message]) -> bool:
    return first[0]["role"] != "assistant" or second[0]["role"] != "assistant"


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)


def _says(inside: Sequence[Message], prompt: Any, stated: Sequence[Message]) -> bool:
    """True if nothing is lost with the column `prompt`: its messages, or the words of its string, are in the lists."""
    if not isinstance(prompt, str) or len(stated) != 1:
        return list(inside[: len(stated)]) == list(stated)
    words = " ".join(prompt.split())
    said = [" ".join(message["content"].split()) for message in inside]
    return any(words in text for text in said) or words in " ".join(said) or all(text in words for text in said)
