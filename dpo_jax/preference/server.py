"""A chat model behind an OpenAI-compatible endpoint as a preference model. No JAX.

    judge = connect("https://api.example.com/v1|some-model", rubric="Better is what a child understands.")
    verdicts = judge(comparisons)       # [-1, 1], +1: B is better, NaN: no verdict
    judge.counts.words()                # '240 answers, 12 more from the cache, 96,413 tokens'

Every comparison is asked in both orders and has half the difference of the two verdicts. Answers are kept on disk by
what was asked, so the same command goes on where it ended, however it ended. docs/judge_servers.md says all of it.
"""

import asyncio
import concurrent.futures
import contextlib
import math
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dpo_jax.bucket.local import cache_root
from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.disk import digest
from dpo_jax.errors import UserError
from dpo_jax.preference.comparing import both_orders, chat_question
from dpo_jax.preference.server_cache import AnswerFile, answer_file, request_key
from dpo_jax.preference.server_refusals import Server
from dpo_jax.preference.server_replies import parse_reply, verdict_in
from dpo_jax.preference.server_requests import Body, Counts, Limits, Wanted, ask_all
from dpo_jax.preference.server_settings import KEYS, Asking, check_settings, parse_spec, read_asking
from dpo_jax.preference.statistics import both_orders_verdict

DIRECTORY = "judgements"  # below the root of caches

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, eq=False)
class JudgeServer:
    """See `connect`.

    Attributes:
      url: of the API, without the last part.
      answers: on disk.
      counts: of all calls.
    """

    url: str
    model: str
    rubric: str
    asking: Asking
    limits: Limits
    answers: AnswerFile
    counts: Counts = field(default_factory=Counts)

    @property
    def is_remote(self) -> bool:
        """One process of several asks for all."""
        return True

    @property
    def name(self) -> str:
        return f"{self.url}|{self.model}"

    def about(self) -> dict[str, Any]:
        """What its verdicts follow from, but for the comparisons: JSON, without the key."""
        question = chat_question(Comparison((), (), ()), self.rubric)
        return {
            "kind": "server",
            "url": self.url,
            "model": self.model,
            "rubric": self.rubric,
            "read": self.asking.read,
            "request": {name: it for name, it in self._bodies([])[0].items() if name not in ("model", "messages")},
            "question": digest(question[0]["content"]),
        }

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """The verdicts, float64 `[comparisons]`, see `PreferenceModel`; raises as `orders` does."""
        return both_orders_verdict(*self.orders(comparisons))

    def told(self) -> list[str]:
        """What a user should know of all calls, in lines."""
        return [f"judge {self.name}: {self.counts.words()}", *self.counts.said]

    def orders(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """What was answered to (A, B) and to (B, A), see `InBothOrders`.

        Raises:
          UserError: the server refuses the key or the model, is not there or answers no more; or the budget is used
            up. What was answered is on disk, and is not asked again.
        """
        server = _server(self)
        orders = [[self._wanted(one) for one in both_orders(comparison)] for comparison in comparisons]
        wanted = {one.name: one for pair in orders for one in pair}
        self.answers.refresh()
        found = {name: body for name, one in wanted.items() if (body := self._kept(one)) is not None}
        self.counts.cached += len(found)
        self._show(len(found), len(wanted))

        def keep(request: Wanted, at: int, body: str) -> None:
            self.answers.put(request.keys[at], body)
            found[request.name] = body
            self._show(len(found), len(wanted))

        missing = [one for name, one in wanted.items() if name not in found]
        ended = _finish(ask_all(server, missing, self.limits, self.counts, keep)) if missing else ""
        self.answers.settle()
        if ended:
            judged = sum(all(one.name in found for one in pair) for pair in orders)
            raise UserError(
                f"judge {self.name}: {ended}; {judged:,} of {len(comparisons):,} comparisons are judged and "
                f"{len(found):,} answers kept in {self.answers.path}: the same command goes on from there"
            )
        verdicts = self._verdicts(found)
        both = [[verdicts.get(one.name, math.nan) for one in pair] for pair in orders]
        return np.asarray(both, np.float64).reshape(-1, 2).T

    def _wanted(self, comparison: Comparison) -> Wanted:
        bodies = self._bodies(chat_question(comparison, self.rubric))
        return Wanted([request_key(self.url, body) for body in bodies], bodies)

    def _bodies(self, messages: Sequence[Message]) -> list[Body]:
        asking = self.asking
        plain: dict[str, object] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": asking.temperature,
            "max_tokens": asking.answer_tokens,
            "seed": asking.seed,
        }
        more: dict[str, object] = {"logprobs": True, "top_logprobs": asking.top_logprobs}
        each = {"auto": [plain | more, plain], "logprobs": [plain | more], "text": [plain]}[asking.read]
        return [{name: it for name, it in {**body, **asking.extra}.items() if it is not None} for body in each]

    def _kept(self, request: Wanted) -> str | None:
        return next((body for key in request.keys if (body := self.answers.get(key)) is not None), None)

    def _verdicts(self, found: Mapping[str, str]) -> dict[str, float]:
        """The verdict of every request that has an answer; NaN where the answer says none."""
        verdicts: dict[str, float] = {}
        for key, body in found.items():
            reply = parse_reply(body)
            verdicts[key], reason = (math.nan, reply) if isinstance(reply, str) else verdict_in(reply, self.asking.read)
            if reason:
                self.counts.unreadable[reason] += 1
        return verdicts

    def _show(self, done: int, total: int) -> None:
        if self.asking.progress is not None:
            self.asking.progress(done, total)


def connect(
    spec: str,
    *,
    cache_dir: str | None = None,
    concurrency: int = 8,
    max_requests: int = 0,
    max_tokens: int = 0,
    rubric: str = "",
    timeout: float = 60.0,
    asking: Asking | Mapping[str, Any] | str | None = None,
) -> JudgeServer:
    """A preference model that asks a server; nothing is asked yet.

    The key is taken from the environment (`KEYS`) when it is asked, and is written nowhere.

    Args:
      spec: `http://HOST/v1|MODEL`, or https.
      cache_dir: below which answers are kept, as for other caches; None: $DPO_JAX_CACHE, else ~/.cache/dpo_jax.
      concurrency, max_requests, max_tokens, timeout: see `Limits`.
      rubric: what better means, in place of the default.
      asking: more of how it is asked; fields of `Asking` by their names, or these as JSON.

    Raises:
      UserError: the spec or a number is none that can be, or answers cannot be kept there.
    """
    url, model = parse_spec(spec)
    name = f"{url}|{model}"
    if not isinstance(asking, Asking):
        asking = read_asking(asking or {}, name)
    limits = Limits(
        concurrency, max_requests, max_tokens, timeout, asking.tries, asking.first_wait, asking.longest_wait
    )
    check_settings(name, limits, asking)
    for argument, text in (("rubric", rubric), ("cache_dir", cache_dir or "")):
        if not isinstance(text, str):
            raise UserError(f"judge {name}: {argument}={text!r:.60}; needed is a text")
    return JudgeServer(
        url, model, rubric, asking, limits, answer_file(cache_root(cache_dir or "") / DIRECTORY, url, model)
    )


def _server(judge: JudgeServer) -> Server:
    """Where to ask, with the key that the environment has now."""
    safe = judge.url.startswith("https://") or urlsplit(judge.url).hostname in _LOOPBACK
    # The second variable is meant for another service: it does not go over an open line.
    names = KEYS if safe else KEYS[:1]
    name = next((one for one in names if os.environ.get(one, "").strip()), "")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{name}: holds what no key has (a line end, a blank or no ASCII); set it anew")
    hint = f"set {KEYS[0]}" if safe else f"set {KEYS[0]} ({KEYS[1]} is not sent over http)"
    return Server(judge.name, judge.url, key, name, hint)


def _finish(work: Coroutine[Any, Any, str]) -> str:
    """Run it in a loop of its own, on a thread of its own: a notebook has a loop already. Ctrl-C ends it at once."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def watched() -> str:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await work

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="judge") as pool:
        future = pool.submit(asyncio.run, watched())
        try:
            return future.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                for loop, task in running:
                    loop.call_soon_threadsafe(task.cancel)
            raise
