"""Asking a chat server over HTTP: so many requests at once, again after what passes, no more than is allowed. No JAX.

What a server does not answer in the end is counted by reason and is no verdict. What makes every request vain (a
refused key, a wrong model, a server that is gone) ends the whole with one line.
"""

import asyncio
import collections
import contextlib
import functools
import json
import random
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx2

from dpo_jax.errors import UserError
from dpo_jax.preference.server_refusals import Server, Trouble, refused, shown_line, status_inside, without_key
from dpo_jax.preference.server_replies import Reply, parse_reply

MOST_BYTES = 8 << 20  # of a body; a reply of 4,096 tokens with 20 alternatives each has as much
_IN_A_ROW = 3  # requests without an answer after all tries, with none answered in between: the server is gone
_CONNECT_SECONDS = 10.0
_WORDS = {"not_json": "no JSON", "wrong_shape": "JSON that is no chat completion"}

Body = Mapping[str, object]


@dataclass(frozen=True)
class Limits:
    """How much is asked, and how patiently.

    Attributes:
      concurrency: requests at once.
      max_requests, max_tokens: of the whole life of a judge, retries too; 0: any number. What is under way when the
        tokens are used up is waited for, so a few requests more may be paid.
      timeout: seconds of a request, from its first byte to the last of the answer.
      tries: of a request.
      first_wait, longest_wait: seconds between two tries: the first one, doubled every time, and the most, which caps
        what the server asks for, too.
    """

    concurrency: int = 8
    max_requests: int = 0
    max_tokens: int = 0
    timeout: float = 60.0
    tries: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0


@dataclass
class Counts:
    """What a judge server was asked in all calls; every request once, however many comparisons share it.

    Attributes:
      asked: requests sent, retries too.
      answered: replies that came, now on disk.
      cached: replies that were on disk before.
      retried: requests sent again.
      unanswered: requests without a reply, by reason; asked again next time.
      unreadable: replies that say no verdict, by reason.
      prompt_tokens, completion_tokens: of the replies that came, as the server counts.
      in_a_row: of the last requests, so many have no reply.
      first_body: of `Wanted.bodies`; the server refuses those before it.
      said: what is to be told.
    """

    asked: int = 0
    answered: int = 0
    cached: int = 0
    retried: int = 0
    unanswered: collections.Counter[str] = field(default_factory=collections.Counter)
    unreadable: collections.Counter[str] = field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_a_row: int = 0
    first_body: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def words(self) -> str:
        """All of it in one line."""
        words = f"{self.answered:,} answers, {self.cached:,} more from the cache, {self.tokens:,} tokens"
        if self.retried:
            words += f", {self.retried:,} requests sent again"
        for name, reasons in (("unanswered", self.unanswered), ("no verdict", self.unreadable)):
            if reasons:
                each = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
                words += f"; {name}: {sum(reasons.values()):,} ({each})"
        return words


@dataclass(frozen=True)
class Wanted:
    """A request.

    Attributes:
      keys, bodies: the bodies that ask it, the best first, and what tells each of them from all others; later ones are
        for servers that refuse log-probabilities.
    """

    keys: Sequence[str]
    bodies: Sequence[Body]

    @property
    def name(self) -> str:
        return self.keys[0]


@dataclass
class _Run:
    """One call's state."""

    server: Server
    limits: Limits
    counts: Counts
    client: httpx2.AsyncClient
    keep: Callable[[Wanted, int, str], None]
    ended: asyncio.Event
    why: str = ""
    not_before: float = 0.0  # of the loop's clock: the server wants no request until then
    last: str = ""


class _Gone(Exception):  # noqa: N818 - ends the workers; what is told is in the run
    """The server answers no more."""


async def ask_all(
    server: Server,
    wanted: Sequence[Wanted],
    limits: Limits,
    counts: Counts,
    keep: Callable[[Wanted, int, str], None],
) -> str:
    """Ask everything; `keep(request, number of its body, reply)` is called for every reply as soon as it is there.

    Returns:
      Why it ended before all was asked; empty if all was.

    Raises:
      UserError: the server refuses the key, the model or the requests as such, or cannot be reached at all.
    """
    queue = iter(wanted)
    async with _client(server, limits) as client:
        run = _Run(server, limits, counts, client, keep, asyncio.Event())
        workers = [asyncio.create_task(_worker(run, queue)) for _ in range(min(limits.concurrency, len(wanted)))]
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for worker in done:
            if (error := worker.exception()) is not None and not isinstance(error, _Gone):
                raise error
    if run.last and not (run.why or counts.answered or counts.cached):
        return run.last
    return run.why


def _client(server: Server, limits: Limits) -> httpx2.AsyncClient:
    # Redirects are not followed: the key is for this host. Without compression a body's bytes bound its size.
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    pool = httpx2.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency)
    waits = httpx2.Timeout(None, connect=min(_CONNECT_SECONDS, limits.timeout))  # the whole is timed in `_exchange`
    try:
        return httpx2.AsyncClient(
            headers=headers, timeout=waits, limits=pool, verify=_certificates(), follow_redirects=False
        )
    except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
        said = shown_line(server, str(error))
        mend = "mend HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR"
        raise UserError(
            f"judge {server.name}: the environment's proxy or certificates are unusable ({said}); {mend}"
        ) from None


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once, as it takes as long as many a request."""
    return httpx2.create_ssl_context()


async def _worker(run: _Run, queue: Iterator[Wanted]) -> None:
    for wanted in queue:
        trouble = await _until_answered(run, wanted)
        if run.ended.is_set():
            return
        if trouble is None:
            run.counts.in_a_row = 0
            continue
        run.counts.unanswered[trouble.reason] += 1
        run.last = f"nothing was answered (last: {trouble.said})"
        run.counts.in_a_row += not trouble.of_one
        if run.counts.in_a_row >= _IN_A_ROW:
            run.why = f"it answers no more: {_IN_A_ROW} requests in a row have no answer (last: {trouble.said})"
            raise _Gone


async def _until_answered(run: _Run, wanted: Wanted) -> Trouble | None:
    """Why there is no reply; None if there is one, or if all is to end."""
    trouble, tries = Trouble("", ""), 0
    while tries < run.limits.tries:
        if tries:
            await _pause(run, _wait(run.limits, tries, trouble.wait))
        while not run.ended.is_set() and (rest := run.not_before - asyncio.get_running_loop().time()) > 0:
            await _pause(run, rest)
        if _must_end(run):
            return None
        at = min(run.counts.first_body, len(wanted.bodies) - 1)
        run.counts.asked += 1
        run.counts.retried += tries > 0
        found = await _exchange(run, wanted.bodies[at])
        if isinstance(found, tuple):
            _take(run, wanted, at, *found)
            return None
        if found.reason == "no_logprobs":
            if at + 1 == len(wanted.bodies):
                raise UserError(f"judge {run.server.name}: refused ({found.said}); read=text asks for none")
            run.counts.first_body = max(run.counts.first_body, at + 1)
            note = f"{run.server.name} gives no log-probabilities ({found.said}); verdicts are read from its texts"
            if note not in run.counts.said:
                run.counts.said.append(note)
            continue
        trouble, tries = found, tries + 1
        if not trouble.again:
            break
        if trouble.wait:
            pause = min(trouble.wait, run.limits.longest_wait)
            run.not_before = max(run.not_before, asyncio.get_running_loop().time() + pause)
    return trouble


def _take(run: _Run, wanted: Wanted, at: int, reply: Reply, body: str) -> None:
    run.keep(wanted, at, body)
    run.counts.answered += 1
    if reply.usage is not None:
        run.counts.prompt_tokens += reply.usage[0]
        run.counts.completion_tokens += reply.usage[1]
    elif run.limits.max_tokens:
        raise UserError(
            f"judge {run.server.name}: max_tokens={run.limits.max_tokens}, and the server does not say how many tokens "
            "a reply takes; use max_requests"
        )


def _must_end(run: _Run) -> bool:
    """Whether the budget is used up, or something else has ended the run."""
    limits, counts = run.limits, run.counts
    if not run.ended.is_set():
        if 0 < limits.max_requests <= counts.asked:
            run.why = f"the budget is used up: max_requests={limits.max_requests:,}"
        elif 0 < limits.max_tokens <= counts.tokens:
            run.why = f"the budget is used up: max_tokens={limits.max_tokens:,}, {counts.tokens:,} taken"
        if run.why:
            run.ended.set()
    return run.ended.is_set()


async def _pause(run: _Run, seconds: float) -> None:
    """Wait, but no longer than until the end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(run.ended.wait(), seconds)


def _wait(limits: Limits, tries: int, asked: float | None) -> float:
    """Seconds before the next try: doubled each time, or what the server asks for; drawn, so that not all come at once.

    >>> 2 <= _wait(Limits(), 3, None) <= 4, 20 <= _wait(Limits(), 1, 20) <= 21, _wait(Limits(), 1, 9999)
    (True, True, 60.0)
    """
    doubled = limits.first_wait * 2 ** min(tries - 1, 32)
    wait = doubled * (1 + random.random()) / 2 if asked is None else asked + limits.first_wait * random.random()
    return min(limits.longest_wait, wait)


async def _exchange(run: _Run, body: Body) -> tuple[Reply, str] | Trouble:
    """One request. Raises UserError where every other one would be refused, too."""
    try:
        async with asyncio.timeout(run.limits.timeout):
            content = json.dumps(body).encode()
            async with run.client.stream("POST", f"{run.server.url}/chat/completions", content=content) as response:
                status, headers = response.status_code, response.headers
                got = bytearray()
                async for chunk in response.aiter_bytes():
                    got += chunk
                    if len(got) > MOST_BYTES:
                        return Trouble("too_large", f"a body of more than {MOST_BYTES >> 20} MiB", again=False)
    except TimeoutError:
        return Trouble("timeout", f"no answer within {run.limits.timeout:g} s")
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        said = shown_line(run.server, str(error)) or type(error).__name__
        if not run.counts.answered:
            raise UserError(f"judge {run.server.name}: cannot be reached ({said}); is it running there?") from None
        return Trouble("not_reached", said)
    except httpx2.HTTPError as error:
        return Trouble("broken_off", f"{type(error).__name__}: {shown_line(run.server, str(error))}".rstrip(": "))
    text = without_key(run.server, got.decode(errors="replace"))
    status = status_inside(text) or status
    if status // 100 != 2:
        return refused(run.server, status, headers, text)
    reply = parse_reply(text)
    if isinstance(reply, str):
        return Trouble(reply, f"{_WORDS[reply]}: {shown_line(run.server, text)!r}")
    return reply, text
