"""What a judge server is asked with: address, model, request; and what of it cannot be. No JAX."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx2

from dpo_jax.errors import UserError
from dpo_jax.preference.server_replies import Read
from dpo_jax.preference.server_requests import Limits

KEYS = ("DPO_JAX_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables; the second is for what was not set up for us
_SPEC = "needed is http://HOST/v1|MODEL or https://HOST/v1|MODEL"
_COMPLETIONS = "/chat/completions"
# Fields of a request that have an argument of their own, or that decide what a reply looks like.
_FIXED = ("model", "messages", "stream", "n", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class Asking:
    """How a server is asked, beyond what the other arguments of `connect` say.

    Attributes:
      read: where the verdict is: `logprobs` of the label's token, the `text`, or `auto`: log-probabilities where the
        server gives them. No part of what is cached, but `text` asks for none.
      temperature, seed: of the request; a seed of None is not sent.
      answer_tokens: the most of a reply, `max_tokens` of the request.
      top_logprobs: alternatives of a token that are asked for.
      extra: fields of the request that are added, or left out where their value is None, for servers that need it:
        {"max_tokens": None, "max_completion_tokens": 2000}, {"chat_template_kwargs": {"enable_thinking": False}}.
      tries, first_wait, longest_wait: see `Limits`.
      progress: called with the number of requests that have an answer and of all of them, now and then.
    """

    read: Read = "auto"
    temperature: float = 0.0
    seed: int | None = 0
    answer_tokens: int = 16
    top_logprobs: int = 20
    extra: Mapping[str, Any] = field(default_factory=dict)
    tries: int = Limits.tries
    first_wait: float = Limits.first_wait
    longest_wait: float = Limits.longest_wait
    progress: Callable[[int, int], None] | None = None


def read_asking(given: Mapping[str, Any] | str, name: str) -> Asking:
    """`Asking` of its fields by name, or of these as JSON.

    Raises:
      UserError: there is no such field, or it is no object.
    """
    known = [one.name for one in dataclasses.fields(Asking)]
    try:
        fields = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        fields = given
    unknown = [one for one in fields if one not in known] if isinstance(fields, Mapping) else [given]
    if unknown:
        raise UserError(
            f"judge {name}: asking has {unknown[0]!r:.60}; needed is an object with any of {', '.join(known)}"
        )
    return Asking(**fields)


def check_settings(name: str, limits: Limits, asking: Asking) -> None:
    """Raises UserError for what cannot be, before anything is asked."""
    whole = {
        "concurrency": (limits.concurrency, 1),
        "max_requests": (limits.max_requests, 0),
        "max_tokens": (limits.max_tokens, 0),
        "tries": (asking.tries, 1),
        "answer_tokens": (asking.answer_tokens, 1),
        "top_logprobs": (asking.top_logprobs, 1),
    } | ({} if asking.seed is None else {"seed": (asking.seed, 0)})
    real = {
        "timeout": (limits.timeout, 1e-3),
        "first_wait": (asking.first_wait, 0),
        "longest_wait": (asking.longest_wait, 0),
        "temperature": (asking.temperature, 0),
    }
    for kind, table in ((int, whole), (int | float, real)):
        for what, (value, least) in table.items():
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < math.inf:
                said = f"a {'whole ' if kind is int else ''}number of at least {least:g}"
                raise UserError(f"judge {name}: {what}={value!r:.60}; needed is {said}")
    if asking.read not in get_args(Read):
        raise UserError(f"judge {name}: read={asking.read!r:.60}; needed is {', '.join(get_args(Read))}")
    if not isinstance(asking.extra, Mapping):
        raise UserError(f"judge {name}: extra={asking.extra!r:.60}; needed is an object of fields")
    if fixed := [one for one in _FIXED if one in asking.extra]:
        raise UserError(f"judge {name}: extra may not have {fixed[0]!r}; leave it out")


def parse_spec(spec: str) -> tuple[str, str]:
    """Address and model of `http://HOST/v1|MODEL`.

    Raises:
      UserError: it is none; also with anything secret in it, which is not shown.
    """
    address, bar, model = (part.strip() for part in spec.partition("|"))
    shown = re.sub(r"[?#].*", "?***", re.sub(r"^(\w+://)?.*@", r"\1***@", address)) + bar + model
    if any(mark in address for mark in "@?#"):
        raise UserError(
            f"judge {shown!r:.200}: the address may have no name, key, ? or # in it; {_SPEC}, and the key in the "
            f"environment variable {KEYS[0]}"
        )
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"judge {shown!r:.200}: the address is none; {_SPEC}") from None
    if parts.scheme.lower() not in ("http", "https") or not host or not bar or not model:
        raise UserError(f"judge {shown!r:.200}: {_SPEC}")
    named = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme.lower()}://{named}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"
    try:
        sound = all(0 < len(label) < 64 for label in httpx2.URL(url).raw_host.split(b".")) and " " not in url
    except httpx2.InvalidURL:
        sound = False
    if not sound:
        raise UserError(f"judge {shown!r:.200}: the address is none; {_SPEC}")
    return url.removesuffix(_COMPLETIONS), model
