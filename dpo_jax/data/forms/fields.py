"""What becomes of a row's other columns: sent to the template, known to be harmless, or a reason to refuse the row.

A name says what a column is by its last word (`chosen_model`, `prompt_id`), which a letter, a number or `at`, `by` and
`on` may follow (`model_a`, `created_at`), or by its first (`num_correct`, `raw_response`).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip
from dpo_jax.data.forms.messages import MEDIA

SYSTEM = ("system", "system_prompt", "system_message", "sys_prompt", "systemPrompt")
HISTORY = ("history",)
TOOLS = ("tools", "functions")
TEMPLATE = ("chat_template_kwargs",)
CARRIED = (*SYSTEM, *HISTORY, *TOOLS, *TEMPLATE)

# Last words of columns that tell about a pair and are no part of it.
_LAST = frozenset(
    """
    id ids idx index indices uuid guid uid hash sha sha1 sha256 md5 key qid pid cid fingerprint row
    score scores rating ratings reward rewards rank ranks ranking ranked grade grades point points margin margins gap
    diff delta logp logps logprob logprobs prob probs probability perplexity ppl loss vote votes upvote upvotes
    downvotes likes karma agreement confidence strength preference preferences weight similarity distance quality
    helpfulness correctness coherence complexity verbosity harmlessness honesty truthfulness accuracy toxicity severity
    model models generator generators engine policy author authors annotator annotators labeler labelers labeller
    worker workers username judge judges evaluator rater raters creator contributor submitter
    source sources dataset datasets subset origin domain domains category categories cat class classes cluster type
    types kind topic topics subject subjects subreddit theme field area skill skills genre aspect aspects criterion
    criteria dimension dimensions principle attribute attributes tag tags label labels flag flags
    split fold language languages lang locale country region
    date datetime time times timestamp timestamps tstamp created updated generated labeled labelled rated annotated utc
    year month day duration seconds latency
    url urls uri link links license licence version revision commit path file filename
    status state stage phase difficulty level length lengths len tokens count counts words wordcount chars characters
    size num number ratio percent percentage order position turn turns round rounds step seed temperature batch
    metadata meta info stats statistics params parameters config configs settings ip kwargs extra extras details
    usage vulnerability
    rationale rationales reason reasons critique critiques feedback comment comments remark remarks explanation
    explanations justification evaluation evaluations assessment judgment judgement judgments judgements verdict
    analysis review reviews annotation annotations statement elaboration unprocessed anony anonymous natured moderation
    toxic
    responses generations completions candidates outputs output gold reference references truth target solution answer
    answers correct incorrect expected winner loser better safer safe harmful relevant valid
    """.split()
)
# First words that do so whatever follows; what is raw, original or processed is another writing of what is used.
_FIRST = frozenset(
    """
    num n is has raw original orig unprocessed processed formatted tokenized labelling labeling annotator annotation
    judge moderation openai metadata meta quotes tokens all individual generation generator embedding embeddings
    evaluation eval grading verification
    """.split()
)
_WHOLE = frozenset({"__index_level_0__", "Unnamed: 0", "", "full_chosen", "full_rejected", "full_conversation"})
_ONE_WORD = frozenset(
    {"task", "style", "name", "title", "group", "part"}
)  # of one word they classify; a sentence speaks
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|[^\W_]+")
# Texts that say nothing: a number, a date, an address, a UUID or hash.
_EMPTY_TALK = re.compile(
    r"[+-]?[\d.]+(?:[eE][+-]?\d+)?|\d{4}-\d\d-\d\d[T\d:.+\-Z ]*|\w+://\S+|[0-9a-fA-F]{8,}(?:-[0-9a-fA-F]{4,})*"
    r"|true|false|True|False|nan|NaN|None|null"
)


@functools.lru_cache(maxsize=4096)
def is_harmless(column: str) -> bool:
    """True of a column that tells about a pair, by its name.

    >>> [is_harmless(name) for name in ("prompt_id", "model_a", "raw_response", "safer_response_id", "persona")]
    [True, True, True, True, False]
    """
    if column in _WHOLE:
        return True
    words = [word.lower() for word in _WORDS.findall(column)]
    last = list(words)
    while len(last) > 1 and (len(last[-1]) == 1 or last[-1].isdigit() or last[-1] in ("at", "by", "on")):
        last.pop()
    return bool(words) and (last[-1] in _LAST or (len(words) > 1 and words[0] in _FIRST))


def unaccounted(
    row: Mapping[str, Any], suspicious: Sequence[str], outcomes: Sequence[Any], inside: str = ""
) -> Skip | None:
    """The first column that nothing reads, and that might change what a model should say.

    `inside` is the column whose mapping `row` is; empty if it is a row.
    """
    used: str | None = None
    for name in suspicious:
        value = row[name]
        if not value or isinstance(value, bool | int | float):
            continue
        if used is None:
            used = "\n".join(used_text(one) for one in outcomes if not isinstance(one, Skip))
            if not used and outcomes:  # the row gives no pair, and that is the reason to tell
                return None
        if why := unread(str(name), value, used, inside):
            return why
    return None


def unread(column: str, value: Any, used: str, inside: str = "") -> Skip | None:
    """Why a row cannot be taken that has this value in a column which no form reads; None if it can.

    `used` is all that is read of the row, as one text: a column that only repeats some of it may stand beside it.
    """
    if not isinstance(value, str | Sequence | Mapping | bytes) or not value or says_nothing(value):
        return None
    if column.lower() in _ONE_WORD and isinstance(value, str) and not re.search(r"\s", value.strip()):
        return None
    if column.lower() in MEDIA or any(column.lower().endswith("_" + name) for name in MEDIA):
        return Skip("unread_field", f"{column}: this trainer reads text alone; leave out rows with {column}")
    if texts := texts_in(value):
        if all(text.strip() in used for text in texts):
            return None
        what = f"the text {texts[0][:40]!r}"
    else:
        what = f"a {type(value).__name__}"
    if inside:
        return Skip(
            "unread_field",
            f"{inside} has {column} with {what} that no form reads; --config.dataset=my_module:my_function reads a row "
            "as you like",
        )
    return Skip(
        "unread_field",
        f"{column} has {what} that no form reads beside the others; --config.columns={column}: leaves it out, "
        f"columns=NAME:{column} reads it as NAME, and --config.dataset=my_module:my_function reads a row as you like",
    )


def without_metadata(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message without keys that tell about it and are no part of it, such as ids and times.

    >>> without_metadata({"role": "user", "content": "Hi", "timestamp": "1:00", "name": "Bo"})
    {'role': 'user', 'content': 'Hi', 'name': 'Bo'}
    """
    return message if len(message) == 2 else {key: one for key, one in message.items() if not is_harmless(key)}


def says_nothing(value: Any) -> bool:
    """True of text without words, and of lists and mappings that hold nothing else: numbers, dates, nulls."""
    if isinstance(value, str):
        return not value.strip() or _EMPTY_TALK.fullmatch(value.strip()) is not None
    if isinstance(value, Mapping):
        return all(map(says_nothing, value.values()))
    return all(map(says_nothing, value)) if isinstance(value, list | tuple) else not isinstance(value, bytes)


def used_text(one: LabeledComparison | RatedAnswer) -> str:
    """Everything that a pair or an answer says, as one text."""
    texts: Sequence[str] = (one.texts if isinstance(one, RatedAnswer) else one.comparison.texts) or ()
    if isinstance(one, RatedAnswer):
        messages = [*one.prompt_conversation, *one.completion]
    else:
        pair = one.comparison
        messages = [*pair.prompt_conversation, *pair.completion_a, *pair.completion_b]
    return "\n".join([*(message["content"] for message in messages if isinstance(message.get("content"), str)), *texts])


def texts_in(value: Any, key: str = "") -> list[str]:
    """The texts in a value that say something; the roles in messages do not."""
    if isinstance(value, str):
        return [] if says_nothing(value) or key in ("role", "from") else [value]
    if isinstance(value, Mapping):
        return [text for name, one in value.items() for text in texts_in(one, str(name))]
    return [text for one in value for text in texts_in(one)] if isinstance(value, list | tuple) else []
