"""The families of forms: from the columns that are there to every way in which their rows may be read, best first."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_jax.data.comparison import LabeledComparison, Skip
from dpo_jax.data.forms import ranked
from dpo_jax.data.forms.beside import with_beside
from dpo_jax.data.forms.chosen import Row, answer_of_messages, joined_task, pair_of, pairs_of
from dpo_jax.data.forms.fields import CARRIED, is_harmless, unaccounted
from dpo_jax.data.forms.messages import decoded
from dpo_jax.data.forms.transcripts import transcript_pair
from dpo_jax.data.forms.winners import answer_columns, labeled_pair, winner_columns

# Columns that may be the prompt; the first that is there, and not null, is.
PROMPTS = (
    "prompt prompt_conversation question instruction input query messages conversation conversations context "
    "trajectory orig_instruction user_prompt dialogue prompts history"
).split()
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    ("accepted", "rejected"),
    ("chosen", "reject"),
    ("preferred", "dispreferred"),
    ("better_response", "worse_response"),
)
BESIDE_MESSAGES = ("rejected_response", "rejected_messages")
STEPS = "initial_reason_steps"  # Step-DPO: both answers go on from here

Value = Callable[[Row], Any]


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Attributes:
      name: as the report and the documentation call it.
      reads: what each column of it becomes.
      parse: a row to what it says, before it is checked. All columns of `reads` but those of `may_lack` are not null.
      needs: the columns of `reads` that must not be null.
      beside: columns that every form may have (`CARRIED`), and this row has.
      harmless, suspicious: the other columns, those that a pair is not changed by, and those that are looked into.
    """

    name: str
    reads: Mapping[str, str]
    parse: Callable[[Row], Any]
    may_lack: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()

    def missing(self, row: Row) -> str:
        """A column that holds nothing; empty if the row is complete."""
        for name in self.needs:
            if row[name] is None:
                return name
        return ""


@dataclass(frozen=True)
class PromptWay:
    """A way to read the prompt: its columns with what they become, those of them that may be null, and the value."""

    reads: Mapping[str, str]
    value: Value
    may_lack: tuple[str, ...] = ()


Maker = Callable[[set[str]], list[Form]]


def transcripts(there: set[str]) -> list[Form]:
    """Anthropic's HH-RLHF: `chosen` and `rejected` are whole transcripts."""
    if not {"chosen", "rejected"} <= there:
        return []

    def parse(row: Row) -> LabeledComparison | Skip:
        chosen, rejected = row["chosen"], row["rejected"]
        for key, text in (("chosen", chosen), ("rejected", rejected)):
            if not isinstance(text, str):
                return Skip("not_text", f"{key} is a {type(text).__name__}, needed is a transcript")
        return transcript_pair(chosen, rejected)

    return [Form("transcripts", {"chosen": "chosen", "rejected": "rejected"}, parse)]


def chosen_and_rejected(there: set[str]) -> list[Form]:
    """The better and the worse answer, with a prompt under one of its names or inside of both."""
    forms = []
    for chosen, rejected in ANSWERS:
        if not {chosen, rejected} <= there:
            continue
        reads = {chosen: "chosen", rejected: "rejected"}
        if STEPS in there:
            reads[STEPS] = "the beginning of both answers"
        for prompt in prompts_among(there, tuple(reads)):
            parse = functools.partial(_chosen, prompt.value, chosen, rejected)
            lacks = (*prompt.may_lack, STEPS)
            forms.append(Form("prompt, chosen and rejected", {**prompt.reads, **reads}, parse, lacks))
        parse = functools.partial(_chosen, lambda row: None, chosen, rejected)
        forms.append(Form("chosen and rejected with the prompt inside", reads, parse, (STEPS,)))
    return forms


def two_answers(there: set[str]) -> list[Form]:
    """Two answers and a column that says which is better: every A/B file."""
    found = answer_columns(sorted(there))
    winner = winner_columns(sorted(there), found[3], found[2]) if found else ()
    if not found or not winner:
        return []
    first, second, stem, _ = found
    reads = {first: "answer A", second: "answer B"} | dict.fromkeys(winner, "winner")
    inside = [PromptWay({}, lambda row: None)] if stem == "conversation" else []
    return [
        Form(
            "two answers and a winner",
            {**prompt.reads, **reads},
            lambda row, prompt=prompt: labeled_pair(row, prompt.value(row), found, winner),  # type: ignore[misc]
            prompt.may_lack,
        )
        for prompt in (*inside, *prompts_among(there, tuple(reads)))
    ]


def prompts_among(there: set[str], taken: Sequence[str] = ()) -> list[PromptWay]:
    """Each way to read the prompt from the columns that are there, and are not `taken` by the answers."""
    ways = []
    for name in PROMPTS:
        if name not in there or name in taken:
            continue
        extra = next((one for one in ("input", "query") if one in there and one not in taken), "")
        if name == "instruction" and extra:
            reads = {name: "prompt", extra: "prompt, below the instruction"}
            ways.append(PromptWay(reads, functools.partial(_joined, extra), (extra,)))
        ways.append(PromptWay({name: "prompt"}, functools.partial(_full_text, name)))
    return ways


def _openai(there: set[str]) -> list[Form]:
    """OpenAI's fine-tuning API, and Azure's, Together's and Fireworks': messages and tools are inside `input`."""
    if not {"input", "preferred_output", "non_preferred_output"} <= there:
        return []
    reads = {"input": "prompt", "preferred_output": "chosen", "non_preferred_output": "rejected"}
    return [Form("OpenAI preference", reads, _parse_openai)]


def _summaries(there: set[str]) -> list[Form]:
    if not {"info", "summaries", "choice"} <= there:
        return []
    reads = {"info": "prompt (its post or article)", "summaries": "the two answers", "choice": "winner"}
    return [Form("summarize-from-feedback", reads, ranked.summaries)]


def _messages_and_rejected(there: set[str]) -> list[Form]:
    """ms-swift's rows."""
    forms = []
    for rejected in BESIDE_MESSAGES:
        if rejected not in there:
            continue
        if "messages" in there:
            reads = {"messages": "prompt, and its last turn chosen", rejected: "rejected"}
            forms.append(Form("messages and a rejected answer", reads, functools.partial(_last_turn, rejected)))
        for prompt in prompts_among(there) if "response" in there else ():
            reads = {**prompt.reads, "response": "chosen", rejected: "rejected"}
            parse = functools.partial(_chosen, prompt.value, "response", rejected)
            forms.append(Form("prompt, response and a rejected answer", reads, parse, prompt.may_lack))
    return forms


def _ranked(there: set[str]) -> list[Form]:
    """Several answers, with ranks or scores in them or beside them."""
    if not (several := ranked.lists_of(sorted(there))):
        return []
    score = next((name for name in ranked.SCORES if name in there), "")
    forms = []
    for prompt in prompts_among(there, (several,)):
        reads = {**prompt.reads, several: "ranked answers"}
        if score:
            parse = functools.partial(_best, prompt.value, several, score)
            forms.append(Form("answers and their scores", {**reads, score: "scores"}, parse, prompt.may_lack))
        parse = functools.partial(_best, prompt.value, several, "")
        forms.append(Form("ranked answers", reads, parse, prompt.may_lack))
    return forms


def _rated(there: set[str]) -> list[Form]:
    """KTO's rows, which are paired by their prompts."""
    rating = next((name for name in ranked.RATINGS if name in there), "")
    forms = []
    for answer in ranked.ONE_ANSWER if rating else ():
        for prompt in prompts_among(there, (answer,)) if answer in there else ():
            reads = {**prompt.reads, answer: "an answer", rating: "whether it is good"}
            parse = functools.partial(_rate, prompt.value, answer, rating)
            forms.append(Form("rated answers", reads, parse, prompt.may_lack))
    for turns in ("messages", "conversations", "conversation") if rating else ():
        if turns in there:
            reads = {turns: "prompt, and its last turn an answer", rating: "whether it is good"}
            parse = functools.partial(_rate, operator.itemgetter(turns), "", rating)
            forms.append(Form("rated answers", reads, parse))
    return forms


MAKERS: tuple[Maker, ...] = (
    _openai,
    _summaries,
    chosen_and_rejected,
    two_answers,
    _messages_and_rejected,
    _ranked,
    _rated,
)


def _joined(extra: str, row: Row) -> Any:
    return joined_task(row["instruction"], row[extra])


def _full_text(name: str, row: Row) -> Any:
    """The prompt's value; WebGPT's question is a mapping that has its text inside."""
    value = row[name]
    if isinstance(value, Mapping) and isinstance(value.get("full_text"), str):
        return value["full_text"]
    return value


def _chosen(prompt: Value, chosen: str, rejected: str, row: Row) -> Any:
    if not (steps := row.get(STEPS)):
        return pairs_of(prompt(row), row[chosen], row[rejected])
    if not all(isinstance(text, str) for text in (steps, row[chosen], row[rejected])):
        return Skip("not_text", f"{STEPS}, {chosen} and {rejected} must be text")
    return pair_of(prompt(row), steps + row[chosen], steps + row[rejected])


def _last_turn(rejected: str, row: Row) -> Any:
    return answer_of_messages(row["messages"], row[rejected])


def _best(prompt: Value, answers: str, score: str, row: Row) -> Any:
    scores = row[score] if score else None
    return ranked.best_against_others(prompt(row), row[answers], scores, lower=score.startswith("rank"))


def _rate(prompt: Value, answer: str, rating: str, row: Row) -> Any:
    return ranked.rated_answer(prompt(row), row[answer] if answer else None, row[rating])


def _parse_openai(row: Row) -> Any:
    given = decoded(row["input"], dict)
    if not isinstance(given, Mapping):
        return pair_of(row["input"], row["preferred_output"], row["non_preferred_output"])
    pair = pair_of(given.get("messages"), row["preferred_output"], row["non_preferred_output"])
    if not isinstance(pair, LabeledComparison):
        return pair
    pair = with_beside(given, tuple(name for name in CARRIED if name in given), pair)
    others = tuple(name for name in given if name not in (*CARRIED, "messages") and not is_harmless(name))
    return unaccounted(given, others, [pair], inside="input") or pair
