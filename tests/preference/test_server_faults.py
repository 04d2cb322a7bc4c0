"""Judge servers that misbehave in every way, over loopback; and what is told of each."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.preference import server_requests
from dpo_jax.preference.server import connect
from dpo_jax.preference.server_refusals import retry_after
from tests.fakes.judge_server import (
    PAIRS,
    QUICK,
    answering,
    ask,
    broken_off,
    completions_in,
    endless,
    in_turn,
    pair,
    resetting,
    sending,
    shorter,
)

KEY = "sk-very/secret-0123456789"


# ------------------------------------------------------------------------------------------ servers that misbehave

PASSING = {
    "429": sending(429, {"error": {"message": "slow down"}}),
    "429 with Retry-After": sending(429, b"", Retry_After="0.01"),
    "408": sending(408, b""),
    "500": sending(500, "oops"),
    "503 of a proxy": sending(503, "<html><body>upstream</body></html>"),
    "reset": resetting,
    "broken off": broken_off,
    "empty body": sending(200, b""),
    "HTML": sending(200, "<html>Welcome</html>"),
    "truncated JSON": sending(200, '{"choices": [{"message": {"content": "B"'),
    "wrong types": sending(200, {"choices": {"message": 3}}),
    "an error inside": sending(200, {"error": {"message": "provider", "code": 502}}),
    "bytes": sending(200, bytes(range(256))),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again(judge_server, tmp_path, name):
    server = judge_server(in_turn(PASSING[name], answering(shorter)))
    judge, verdicts = ask(server, PAIRS[:2], tmp_path, concurrency=1)
    assert verdicts.tolist() == [-1, -1]
    assert (judge.counts.retried, judge.counts.asked, len(server.asked)) == (1, 5, 5)
    assert not judge.counts.unanswered


REASONS = {
    "429": "rate_limit",
    "500": "server_error",
    "reset": "broken_off",
    "broken off": "broken_off",
    "empty body": "not_json",
    "HTML": "not_json",
    "truncated JSON": "not_json",
    "wrong types": "wrong_shape",
    "an error inside": "server_error",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_never_passes_is_no_verdict_with_its_reason_and_no_other_suffers(judge_server, tmp_path, name):
    good = answering(shorter)

    def behave(handler, body):
        poisoned = completions_in(body)[0] == "much longer 1"
        (PASSING[name] if poisoned else good)(handler, body)

    server = judge_server(behave)
    judge, verdicts = ask(server, PAIRS[:3], tmp_path, concurrency=1)
    assert np.array_equal(verdicts, [-1, math.nan, -1], equal_nan=True)
    assert judge.counts.unanswered == {REASONS[name]: 1}
    assert judge.counts.retried == 2  # three tries
    judge(PAIRS[:3])  # what has no answer is not kept: it is asked again
    assert len(server.asked) == 6 + 2 + 3


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (answering(shorter, seconds=20), "timeout"),
        (endless(10, 0.01), "timeout"),
        (endless(1 << 16, 0), "too_large"),
        (sending(200, b" " * (1 << 19)), "too_large"),
    ],
    ids=["slow", "drips without end", "streams without end", "huge"],
)
def test_what_has_no_end_is_left(judge_server, tmp_path, monkeypatch, behave, reason):
    monkeypatch.setattr(server_requests, "MOST_BYTES", 1 << 18)
    good = answering(shorter)
    server = judge_server(lambda h, body: (behave if "Question 1?" in str(body) else good)(h, body))
    began = time.monotonic()
    judge, verdicts = ask(server, PAIRS[:3], tmp_path, replace(QUICK, tries=2), timeout=0.2, concurrency=6)
    assert np.array_equal(verdicts, [-1, math.nan, -1], equal_nan=True)
    assert judge.counts.unanswered == {reason: 2}
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", REASONS)
def test_a_server_that_answers_no_more_ends_it_with_what_is_kept(judge_server, tmp_path, name):
    server = judge_server(in_turn(*[answering(shorter)] * 5, PASSING[name]))
    with pytest.raises(UserError) as caught:
        ask(server, PAIRS, tmp_path, concurrency=1)
    assert "it answers no more: 3 requests in a row have no answer (last: " in str(caught.value)
    assert "; 2 of 6 comparisons are judged and 5 answers kept in " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 5 + 3 * 3
    server.behave = answering(shorter)
    assert ask(server, PAIRS, tmp_path)[1].tolist() == [-1] * 6
    assert len(server.asked) == 14 + 7


def test_failures_between_answers_do_not_end_it(judge_server, tmp_path):
    good = answering(shorter)
    bad = lambda body: completions_in(body)[0].startswith("much")
    server = judge_server(lambda h, body: (PASSING["500"] if bad(body) else good)(h, body))
    judge, verdicts = ask(server, PAIRS, tmp_path, concurrency=1)
    assert np.isnan(verdicts).all()
    assert judge.counts.unanswered == {"server_error": 6}
    assert judge.counts.answered == 6


def test_calls_of_single_comparisons_end_too(judge_server, tmp_path):
    server = judge_server(in_turn(*[answering(shorter)] * 2, PASSING["500"]))
    judge, _ = ask(server, PAIRS[:1], tmp_path, concurrency=1)
    assert np.isnan(judge([PAIRS[1]])).all()
    with pytest.raises(UserError, match="answers no more"):
        judge([PAIRS[2]])


def test_the_server_is_obeyed_when_it_says_when(judge_server, tmp_path):
    busy = sending(429, b"", Retry_After="0.3")
    server = judge_server(in_turn(busy, answering(shorter)))
    ask(server, PAIRS, tmp_path, replace(QUICK, longest_wait=5), concurrency=2)
    early = [when - server.times[0] for when in server.times if when - server.times[0] < 0.29]
    assert len(early) <= 3  # the first, and what the other one had sent before it knew
    assert len(server.asked) == 13


def test_no_wait_is_longer_than_the_cap(judge_server, tmp_path):
    server = judge_server(in_turn(sending(503, b"", Retry_After="Fri, 31 Dec 2100 23:59:59 GMT"), answering(shorter)))
    began = time.monotonic()
    ask(server, PAIRS[:1], tmp_path)
    assert time.monotonic() - began < 3


def test_retry_after_is_seconds_or_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 98 < retry_after(date) <= 100
    assert [retry_after(value) for value in ("7", "-3", "nan", "inf", "x")] == [7, 0, None, None, None]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            401,
            {"error": {"message": "bad key"}},
            "refused (401: bad key); the key of DPO_JAX_JUDGE_KEY; set the right one",
        ),
        (403, {"error": "not yours"}, "refused (403: not yours); the key of DPO_JAX_JUDGE_KEY"),
        (404, {"detail": "no model judge"}, "refused (404: no model judge); needed is http://HOST/v1|MODEL"),
        (400, {"message": "seed is unknown"}, "refused (400: seed is unknown); mend what is asked"),
        (422, [1], "refused (422: [1]); mend"),
        (405, b"", "refused (405: Method Not Allowed); mend"),
        (418, "<html>\n<b>teapot</b>", "refused (418: teapot); mend"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "refused (429: pay); nothing passes until"),
    ],
)
def test_what_makes_all_requests_vain_ends_it_at_once(judge_server, tmp_path, monkeypatch, status, body, words):
    monkeypatch.setenv("DPO_JAX_JUDGE_KEY", KEY)
    server = judge_server(sending(status, body))
    with pytest.raises(UserError) as caught:
        ask(server, PAIRS, tmp_path, concurrency=1)
    assert str(caught.value).startswith(f"judge {server.spec}: {words}")
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


def test_a_missing_key_is_named(judge_server, tmp_path):
    with pytest.raises(UserError, match=r"401: who.*no key was sent; set DPO_JAX_JUDGE_KEY$"):
        ask(judge_server(sending(401, {"error": {"message": "who?"}})), PAIRS, tmp_path)


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"message": "This model's maximum context length is 2048 tokens."}, "too_long"),
        (400, {"message": "too many tokens", "code": "context_length_exceeded"}, "too_long"),
        (400, {"message": "x", "type": "exceed_context_size_error", "code": 400}, "too_long"),
        (413, {"message": "body"}, "too_long"),
        (400, {"message": "x", "code": "content_filter"}, "filtered"),
    ],
)
def test_what_is_refused_for_its_own_sake_is_no_verdict(judge_server, tmp_path, status, error, reason):
    refuse, good = sending(status, {"error": error}), answering(shorter)
    server = judge_server(lambda h, body: (refuse if "Question 5?" not in str(body) else good)(h, body))
    judge, verdicts = ask(server, PAIRS, tmp_path, concurrency=1)
    assert np.array_equal(verdicts, [math.nan] * 5 + [-1], equal_nan=True)
    assert judge.counts.unanswered == {reason: 10}
    assert judge.counts.retried == 0


def test_where_nothing_at_all_is_answered_there_is_no_result(judge_server, tmp_path):
    server = judge_server(sending(400, {"error": {"message": "maximum context length is 8"}}))
    with pytest.raises(UserError, match=r"nothing was answered .*context length is 8.*; 0 of 2 comparisons"):
        ask(server, PAIRS[:2], tmp_path)


def test_a_server_without_log_probabilities_is_asked_for_texts(judge_server, tmp_path):
    def behave(handler, body):
        if "logprobs" in body:
            handler.send(403, {"error": {"message": "You are not allowed to request logprobs from this model"}})
        else:
            answering(shorter)(handler, body)

    server = judge_server(behave)
    judge, verdicts = ask(server, PAIRS, tmp_path, concurrency=1)
    assert verdicts.tolist() == [-1] * 6
    assert len(server.asked) == 13  # refused once
    assert len(judge.counts.said) == 1
    assert "gives no log-probabilities" in judge.counts.said[0]
    judge([pair(7)])
    assert len(server.asked) == 15  # and never again
    ask(server, PAIRS, tmp_path)
    assert len(server.asked) == 15
    with pytest.raises(UserError, match=r"logprobs from this model\); read=text asks for none"):
        ask(server, PAIRS, tmp_path, replace(QUICK, read="logprobs"))


def test_nobody_there_is_said_at_once(tmp_path, judge_server):
    server = judge_server()
    server.close()
    with pytest.raises(UserError, match=r"cannot be reached .*is it running there"):
        connect(server.spec, cache_dir=str(tmp_path))(PAIRS)
    server.close = lambda: None


@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTP_PROXY", "ftp://x")])
def test_a_proxy_that_cannot_be_used(judge_server, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"proxy or certificates are unusable \(.*mend HTTP_PROXY"):
        ask(judge_server(), PAIRS, tmp_path)


def test_the_key_does_not_follow_a_redirect(judge_server, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_JAX_JUDGE_KEY", KEY)
    other = judge_server()
    server = judge_server(sending(307, b"", Location=f"{other.url}/chat/completions?token={KEY}"))
    with pytest.raises(
        UserError, match=f"307: it redirects to '{other.url}/chat/completions'.; give the address itself"
    ):
        ask(server, PAIRS, tmp_path)
    assert other.asked == []
