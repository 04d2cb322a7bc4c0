"""What a chat server refuses: which request may be sent again, which one is lost, and what makes all of them vain."""

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from dpo_jax.errors import UserError

_AGAIN = (408, 425, 429)  # and 500 and more
_SHOWN = 200  # characters of what a server says
_SECRET = 8  # characters: shorter keys, such as EMPTY, are conventions
# What one request is refused for, and not all of them.
_OF_ONE = {"content_filter": "filtered", "context_length_exceeded": "too_long", "exceed_context_size_error": "too_long"}
_TOO_LONG = re.compile(r"context (length|size|window)", re.IGNORECASE)
_UNPAID = "insufficient_quota"


@dataclass(frozen=True)
class Server:
    """Where requests go. `key` is shown nowhere; `key_name` is the variable that has it, empty if none is sent."""

    name: str
    url: str
    key: str = field(repr=False)
    key_name: str
    key_hint: str


@dataclass(frozen=True)
class Trouble:
    """No reply to a request.

    Attributes:
      reason: what is counted.
      said: for messages.
      again: the same request may be answered later.
      of_one: others may be answered, so that nothing speaks against the server.
      wait: seconds that the server asks for.
    """

    reason: str
    said: str
    again: bool = True
    of_one: bool = False
    wait: float | None = None


def refused(server: Server, status: int, headers: Mapping[str, str], text: str) -> Trouble:
    """What an answer with any other status than 2xx means for its request.

    Raises:
      UserError: every other request would be refused, too.
    """
    said, code = _error_in(text)
    said = shown_line(server, said) or (HTTPStatus(status).phrase if status in set(HTTPStatus) else "")
    of_key = f"the key of {server.key_name}" if server.key_name else f"no key was sent; {server.key_hint}"
    if status // 100 == 3:
        to = headers.get("location", "").partition("?")[0]
        said, mend = (
            f"it redirects to {shown_line(server, to)!r}",
            "give the address itself; keys are not sent elsewhere",
        )
    elif code == _UNPAID:
        mend = "nothing passes until that is paid; the same command goes on then"
    elif status in _AGAIN or status >= 500:
        reason = {429: "rate_limit", 408: "timeout"}.get(status, "server_error")
        return Trouble(reason, f"{status}: {said}", wait=retry_after(headers.get("retry-after", "")))
    elif code in _OF_ONE or status == 413 or _TOO_LONG.search(said):
        return Trouble(_OF_ONE.get(code, "too_long"), f"{status}: {said}", again=False, of_one=True)
    elif "logprob" in said.lower():
        return Trouble("no_logprobs", f"{status}: {said}", again=False)
    elif status == 401:
        mend = f"{of_key}; set the right one" if server.key_name else of_key
    elif status == 403:
        mend = f"{of_key}; the model may need another" if server.key_name else of_key
    elif status == 404:
        mend = "needed is http://HOST/v1|MODEL, with a model that it has"
    else:
        mend = "mend what is asked; asking.extra adds or drops fields of the request"
    raise UserError(f"judge {server.name}: refused ({status}: {said}); {mend}")


def retry_after(value: str) -> float | None:
    """Seconds that a `Retry-After` asks for, of a number or of a date; None if it says nothing.

    >>> retry_after("1.5"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), retry_after("soon"), retry_after("")
    (1.5, 0.0, None, None)
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def status_inside(text: str) -> int:
    """The status of an error that a proxy wraps in a 200; 0 if there is none."""
    if '"error"' not in text[:_SHOWN]:
        return 0
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return code if isinstance(code, int) and 400 <= code < 600 else 0


def _error_in(text: str) -> tuple[str, str]:
    """What a body says is wrong, and its code where it has one."""
    try:
        held: Any = json.loads(text)
    except (ValueError, RecursionError):
        return re.sub(r"<[^>]{0,200}>", " ", text[:4000]), ""
    if not isinstance(held, dict):
        return text, ""
    inner = held.get("error", held)
    if not isinstance(inner, dict):
        return str(inner), ""
    said = next((inner[name] for name in ("message", "detail") if inner.get(name)), text)
    codes = [inner.get(name) for name in ("code", "type") if isinstance(inner.get(name), str)]
    known = [one for one in codes if one in _OF_ONE or one == _UNPAID]
    return said if isinstance(said, str) else json.dumps(said), known[0] if known else ""


def shown_line(server: Server, text: str) -> str:
    """The beginning of what a server says, in one line of printable characters and without the key."""
    text = without_key(server, text)[: 4 * _SHOWN]
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def without_key(server: Server, text: str) -> str:
    """The text with stars for the key, which some servers send back in their messages."""
    if len(server.key) < _SECRET:
        return text
    return text.replace(server.key, "***").replace(server.key.replace("/", r"\/"), "***")
