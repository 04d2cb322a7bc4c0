"""Prompts typed on a terminal: each is answered at once, in a conversation where the model has a chat template."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_jax.answering.flags import Request
from dpo_jax.answering.found import Found
from dpo_jax.answering.ready import make_prompt_renderer, make_sampler, open_policy, place, tokens_of
from dpo_jax.config.settings import Settings
from dpo_jax.data.prompts import prompt_of
from dpo_jax.data.render import Renderer
from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.records.records import printable
from dpo_jax.sampling.engine import Capacity, Sampler

NEW = "/new"


class Asked(NamedTuple):
    """What is asked: a sampler with the parameters of its model."""

    sampler: Sampler
    params: Params


def talk(r: Request, found: Found, config: Settings | None) -> None:
    """Answer typed prompts until their end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (editing of what is typed)
    policy = open_policy(found)
    renderer = make_prompt_renderer(policy.tokenizer, r.prompt_format, r.chat_template)
    dtype = "" if r.cache_dtype == "auto" else r.cache_dtype
    layout, params = place(found, policy, config, r.dtype)
    sampler = make_sampler(policy, layout, Capacity(rows=r.rows, cache_dtype=dtype))
    print(f"{NEW} begins a new conversation, Ctrl-D ends" if renderer.form == "chat" else "Ctrl-D ends")
    converse(r, Asked(sampler, params), renderer, _typed)


def converse(r: Request, model: Asked, renderer: Renderer, ask: Callable[[], str]) -> None:
    """The conversation; `ask` gives what is typed, and raises EOFError at the end."""
    turns: list[dict[str, Any]] = []
    count = 0
    while True:
        try:
            text = ask()
        except EOFError:
            print()
            return
        if text.strip() == NEW:
            turns = []
        elif text.strip():
            count += 1
            said: Any = [*turns, {"role": "user", "content": text}] if renderer.form == "chat" else text
            try:
                answer = _answer(r, model, renderer, said, count)
            except UserError as error:
                print(f"error: {error}")
                continue
            if renderer.form == "chat":
                turns = [*said, {"role": "assistant", "content": answer}]


def _answer(r: Request, model: Asked, renderer: Renderer, said: str | Sequence[dict[str, Any]], count: int) -> str:
    """Print the answers to one prompt as they end; the first one goes on in the conversation."""
    prompt = prompt_of(said, count)
    (ids,) = tokens_of(renderer, model.sampler.layout.config, [prompt])
    first = ""
    # Named by its number: the same words asked again get another answer.
    for one in model.sampler.sample(model.params, [ids], r.asked, [(*ids, -count)]):
        text = one.answer.text.strip()
        print((f"[{one.sample + 1}] " if r.asked.n > 1 else "") + printable(text), flush=True)
        first = text if one.sample == 0 else first
    return first


def _typed() -> str:
    return input("> ")
