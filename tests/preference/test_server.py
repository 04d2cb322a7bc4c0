"""Judge servers, against a real server on loopback that misbehaves in every way."""

import asyncio
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.preference.models import PreferenceModel, swapped
from dpo_jax.preference.server import Asking, connect
from dpo_jax.preference.server_cache import answer_file, request_key
from tests.fakes.judge_server import (
    PAIRS,
    QUICK,
    answering,
    ask,
    completion,
    completions_in,
    in_turn,
    pair,
    sending,
    shorter,
)

KEY = "sk-very/secret-0123456789"


# ------------------------------------------------------------------------------------------------ what is asked


def test_both_orders_are_asked_and_identical_requests_once(judge_server, tmp_path):
    server = judge_server()
    judge, verdicts = ask(server, [PAIRS[0], PAIRS[1], swapped(PAIRS[0]), PAIRS[0]], tmp_path)
    assert verdicts.tolist() == [-1, -1, 1, -1]
    assert verdicts.dtype == np.float64
    assert sorted(map(completions_in, server.asked)) == sorted(
        [
            ("short 0", "much longer 0"),
            ("much longer 0", "short 0"),
            ("short 1", "much longer 1"),
            ("much longer 1", "short 1"),
        ]
    )
    assert server.paths == ["/v1/chat/completions"] * 4
    assert isinstance(judge, PreferenceModel)
    assert judge.name == server.spec
    assert (judge.counts.asked, judge.counts.answered, judge.counts.cached, judge.counts.tokens) == (4, 4, 0, 400)


def test_the_request_is_what_was_set(judge_server, tmp_path):
    server = judge_server()
    asking = replace(
        QUICK, seed=7, temperature=0.5, answer_tokens=3, top_logprobs=5, extra={"seed": None, "user": "me"}
    )
    ask(server, PAIRS[:1], tmp_path, asking, rubric="Better is shorter.")
    body = server.asked[0]
    assert "Better is shorter." in body.pop("messages")[0]["content"]
    assert body == {
        "model": "judge",
        "temperature": 0.5,
        "max_tokens": 3,
        "user": "me",
        "logprobs": True,
        "top_logprobs": 5,
    }
    ask(server, PAIRS[:1], tmp_path, replace(QUICK, read="text"))
    assert "logprobs" not in server.asked[-1]
    assert (server.asked[-1]["seed"], server.asked[-1]["temperature"]) == (0, 0)


def test_a_judge_of_places_is_no_judge(judge_server, tmp_path):
    for word in ("A", "B"):
        _, verdicts = ask(judge_server(answering(lambda *_, word=word: word)), PAIRS, tmp_path)
        assert verdicts.tolist() == [0] * 6


def test_swapping_negates_exactly_with_log_probabilities(judge_server, tmp_path):
    # For the first place it has a fifth too much: (v(A,B) - v(B,A)) / 2 by hand.
    share = lambda a, b: 0.9 if len(a) < len(b) else 0.3
    judge_of = lambda a, b: [("A" if share(a, b) > 0.5 else "B", {"A": share(a, b), "B": 1 - share(a, b)})]
    _, verdicts = ask(judge_server(answering(judge_of)), [PAIRS[0], swapped(PAIRS[0])], tmp_path)
    assert verdicts[0] == pytest.approx((-0.8 - 0.4) / 2)
    assert verdicts[1] == -verdicts[0]


def test_one_order_without_a_verdict_is_no_verdict_and_counted(judge_server, tmp_path):
    said = lambda a, b: "I cannot say." if a == "much longer 1" else shorter(a, b)
    judge, verdicts = ask(judge_server(answering(said)), PAIRS[:3], tmp_path)
    assert np.array_equal(verdicts, [-1, math.nan, -1], equal_nan=True)
    assert judge.counts.unreadable == {"no_label": 1}
    assert "no verdict: 1 (no_label 1)" in judge.counts.words()


def test_so_many_requests_at_once_and_no_more(judge_server, tmp_path):
    server = judge_server(answering(shorter, seconds=0.02))
    ask(server, [pair(n) for n in range(12)], tmp_path, concurrency=3)
    assert server.peak == 3
    assert len(server.asked) == 24


def test_in_a_notebook_where_a_loop_runs_already(judge_server, tmp_path):
    server = judge_server()

    async def cell():
        return ask(server, PAIRS, tmp_path)[1]

    assert asyncio.run(cell()).tolist() == [-1] * 6


def test_progress_and_nothing_to_do(judge_server, tmp_path):
    told = []
    asking = replace(QUICK, progress=lambda done, total: told.append((done, total)))
    judge, _ = ask(judge_server(), PAIRS[:2], tmp_path, asking)
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert judge([]).shape == (0,)


# ---------------------------------------------------------------------------------------------- what is kept


def test_nothing_is_asked_twice(judge_server, tmp_path):
    server = judge_server()
    _, first = ask(server, PAIRS[:4], tmp_path)
    judge, again = ask(server, PAIRS, tmp_path)
    assert (len(server.asked), judge.counts.cached) == (12, 8)
    assert np.array_equal(first, again[:4])
    judge([swapped(one) for one in PAIRS])
    assert len(server.asked) == 12


@pytest.mark.parametrize(
    "other",
    [{"rubric": "Longer."}, {"asking": replace(QUICK, seed=1)}, {"asking": replace(QUICK, extra={"top_p": 0.5})}],
)
def test_another_question_is_another_answer(judge_server, tmp_path, other):
    server = judge_server()
    ask(server, PAIRS[:1], tmp_path)
    judge = connect(server.spec, **{"cache_dir": str(tmp_path), "asking": QUICK, **other})
    judge(PAIRS[:1])
    assert len(server.asked) == 4
    assert judge.about() != connect(server.spec, cache_dir=str(tmp_path), asking=QUICK).about()


def test_models_have_files_of_their_own_and_raw_replies(judge_server, tmp_path):
    server = judge_server()
    ask(server, PAIRS[:1], tmp_path)
    connect(server.spec + "/2", cache_dir=str(tmp_path), asking=QUICK)(PAIRS[:1])
    one, two = sorted(tmp_path.glob("judgements/127.0.0.1-*.jsonl"))
    assert len(server.asked) == 4
    lines = [json.loads(line) for path in (one, two) for line in path.read_text().splitlines()]
    assert {line["reply"] for line in lines} == {json.dumps(completion("A")), json.dumps(completion("B"))}
    keys = {request_key(server.url, body) for body in server.asked}
    assert {line["key"] for line in lines} == keys


def test_verdicts_are_read_anew_from_what_is_kept(judge_server, tmp_path):
    server = judge_server(answering(lambda a, b: [(shorter(a, b), {"A": 0.5, "B": 0.5})]))
    assert ask(server, PAIRS[:1], tmp_path)[1].tolist() == [0]
    # Asked with log-probabilities, so `logprobs` is the same request; `text` is one without.
    assert ask(server, PAIRS[:1], tmp_path, replace(QUICK, read="logprobs"))[1].tolist() == [0]
    assert len(server.asked) == 2
    assert ask(server, PAIRS[:1], tmp_path, replace(QUICK, read="text"))[1].tolist() == [-1]
    assert len(server.asked) == 4


def test_a_torn_line_costs_one_answer(judge_server, tmp_path):
    server = judge_server()
    judge, _ = ask(server, PAIRS, tmp_path, concurrency=1)
    path = judge.answers.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # killed in the middle of the last line
    _, verdicts = ask(server, PAIRS, tmp_path)
    assert verdicts.tolist() == [-1] * 6
    assert len(server.asked) == 13
    later, _ = ask(server, PAIRS, tmp_path)
    assert (len(server.asked), later.answers.torn) == (13, 1)
    assert path.read_bytes().startswith(whole[:-40] + b"\n")


def test_lines_edited_by_hand_are_no_answers(judge_server, tmp_path):
    server = judge_server()
    judge, _ = ask(server, PAIRS[:1], tmp_path)
    path = judge.answers.path
    first, second = path.read_text().splitlines()
    path.write_text(f'{first[:90]}}}\nnot a line\n\n{{"key": 3}}\n{second}\n')
    assert ask(server, PAIRS[:1], tmp_path)[1].tolist() == [-1]
    assert len(server.asked) == 3
    ask(server, PAIRS[:1], tmp_path)
    assert len(server.asked) == 3


def test_a_file_that_is_deleted_or_replaced_is_no_error(judge_server, tmp_path):
    server = judge_server()
    judge, _ = ask(server, PAIRS[:1], tmp_path)
    judge.answers.path.unlink()
    assert judge(PAIRS[:1]).tolist() == [-1]
    assert len(server.asked) == 4
    first, second = judge.answers.path.read_text().splitlines(keepends=True)
    judge.answers.refresh()
    judge.answers.path.write_text(second + first)  # in place: as many bytes of the same file
    keys = [json.loads(line)["key"] for line in (first, second)]
    assert [judge.answers.get(key) for key in keys] == [None, None]
    judge.answers.path.unlink()
    assert judge.answers.get(keys[0]) is None
    assert judge(PAIRS[:1]).tolist() == [-1]


def test_several_writers_of_one_file(tmp_path):
    """Processes that append at once, and one that was killed before them: every line is whole."""
    program = (
        "import sys; from pathlib import Path; from dpo_jax.preference.server_cache import answer_file, request_key\n"
        "file = answer_file(Path(sys.argv[1]), 'http://h/v1', 'm')\n"
        "for n in range(300): file.put(request_key(sys.argv[2], {'n': n}), sys.argv[2] * 3000)"
    )
    path = answer_file(tmp_path, "http://h/v1", "m").path
    path.write_bytes(b'{"key": "to')
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in "abc"]
    assert [one.wait(60) for one in started] == [0, 0, 0]
    file = answer_file(tmp_path, "http://h/v1", "m")
    file.refresh()
    assert file.torn == 1
    assert all(file.get(request_key(name, {"n": n})) == name * 3000 for name in "abc" for n in range(300))


PROGRAM = """
import signal, sys
# A shell runs what is in its background with SIGINT ignored, which a child inherits.
signal.signal(signal.SIGINT, signal.default_int_handler)
from dpo_jax.errors import UserError
from dpo_jax.preference.server import Asking, connect
from tests.fakes.judge_server import pair
judge = connect(sys.argv[1], cache_dir=sys.argv[2], concurrency=4, asking=Asking(first_wait=0.01, tries=3))
try:
    print(judge([pair(n) for n in range(40)]).tolist())
except UserError as error:
    sys.exit(str(error))
"""


def start(server, tmp_path):
    command = [sys.executable, "-c", PROGRAM, server.spec, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_in_the_middle_and_started_again_it_asks_nothing_twice(judge_server, tmp_path):
    server = judge_server(answering(shorter, seconds=0.01))
    one = start(server, tmp_path)
    until(lambda: len(server.asked) >= 30)
    one.kill()
    one.communicate()
    until(lambda: not server.active)
    file = answer_file(tmp_path / "judgements", server.url, "judge")
    file.refresh()
    key_of = lambda body: request_key(server.url, body)
    before = len(server.asked)
    kept = {key_of(body) for body in server.asked if file.get(key_of(body)) is not None}
    assert before - 4 <= len(kept) <= before < 80  # but for what was under way
    two = start(server, tmp_path)
    printed = two.communicate(timeout=60)[0]
    assert json.loads(printed) == [-1.0] * 40
    again = [key_of(body) for body in server.asked[before:]]
    assert not kept & set(again)
    assert len(again) == len(set(again)) == 80 - len(kept)


def test_ctrl_c_ends_it_at_once(judge_server, tmp_path):
    server = judge_server(answering(shorter, seconds=30))
    one = start(server, tmp_path)
    until(lambda: len(server.asked) == 4)
    began = time.monotonic()
    one.send_signal(signal.SIGINT)
    one.communicate(timeout=120)
    assert one.returncode != 0
    assert time.monotonic() - began < 5


# ------------------------------------------------------------------------------------------------------- the budget


def test_a_budget_of_requests(judge_server, tmp_path):
    server = judge_server(answering(shorter, seconds=0.01))
    judge = connect(server.spec, cache_dir=str(tmp_path), asking=QUICK, max_requests=7, concurrency=3)
    with pytest.raises(UserError) as caught:
        judge(PAIRS)
    assert "the budget is used up: max_requests=7; " in str(caught.value)
    assert f" of 6 comparisons are judged and 7 answers kept in {judge.answers.path}: the same" in str(caught.value)
    assert (len(server.asked), judge.counts.answered) == (7, 7)
    with pytest.raises(UserError, match="max_requests=7"):  # of the life of the judge
        judge(PAIRS)
    assert len(server.asked) == 7
    again, verdicts = ask(server, PAIRS, tmp_path, max_requests=7)
    assert verdicts.tolist() == [-1] * 6
    assert (len(server.asked), again.counts.cached) == (12, 7)


def test_a_budget_counts_what_is_asked_again(judge_server, tmp_path):
    server = judge_server(sending(500, b""))
    with pytest.raises(UserError, match=r"max_requests=2; 0 of 6 comparisons are judged and 0 answers"):
        ask(server, PAIRS, tmp_path, max_requests=2, concurrency=1)
    assert len(server.asked) == 2


def test_a_budget_of_tokens(judge_server, tmp_path):
    server = judge_server(answering(shorter, usage=(90, 10)))
    with pytest.raises(UserError, match=r"max_tokens=450, 500 taken; 2 of 6 .* 5 answers"):
        ask(server, PAIRS, tmp_path, max_tokens=450, concurrency=1)
    with pytest.raises(UserError, match=r"does not say how many tokens.*use max_requests"):
        ask(judge_server(answering(shorter, usage=None)), PAIRS, tmp_path, max_tokens=450)


# ---------------------------------------------------------------------------------------------------------- the key


def test_the_key_is_written_nowhere(judge_server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DPO_JAX_JUDGE_KEY", f" {KEY}\n")
    echo = completion("A") | {"echo": KEY, "escaped": "sk"}
    text = json.dumps(echo).replace('"escaped": "sk"', '"escaped": "' + KEY.replace("/", "\\/") + '"')
    server = judge_server(in_turn(sending(500, KEY), sending(200, text), sending(403, f"not with {KEY}")))
    judge = connect(server.spec, cache_dir=str(tmp_path), asking=QUICK, concurrency=1)
    with pytest.raises(UserError, match=r"refused \(403: not with \*\*\*\)") as caught:
        judge(PAIRS)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b'\\"echo\\": \\"***\\"' in kept
    words = [
        kept.decode(),
        str(caught.value),
        repr(judge),
        json.dumps(judge.about()),
        judge.counts.words(),
        caplog.text,
    ]
    for text in [*words, repr(judge.counts), pickle.dumps(judge.about()).decode("latin-1")]:
        assert "very" not in text
        assert "secret-0123456789" not in text


def test_which_key_is_sent(judge_server, tmp_path, monkeypatch):
    server = judge_server()
    sent = lambda: server.headers[-1].get("Authorization")
    ask(server, PAIRS[:1], tmp_path)
    assert sent() is None
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")
    ask(server, PAIRS[1:2], tmp_path)
    assert sent() == "Bearer openai-key"
    monkeypatch.setenv("DPO_JAX_JUDGE_KEY", "own-key")
    ask(server, PAIRS[2:3], tmp_path)
    assert sent() == "Bearer own-key"
    for bad in ("two words", "ké", "a\nb"):
        monkeypatch.setenv("DPO_JAX_JUDGE_KEY", bad)
        with pytest.raises(UserError, match="DPO_JAX_JUDGE_KEY: holds what no key has") as caught:
            ask(server, PAIRS[3:4], tmp_path)
        assert bad not in str(caught.value)


def test_a_key_for_openai_does_not_go_over_an_open_line(judge_server, tmp_path, monkeypatch):
    """A name that is no loopback's and yet leads here, by a proxy that is this server."""
    server = judge_server(sending(401, b""))
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = connect("http://judge.example/v1|m", cache_dir=str(tmp_path), asking=QUICK)
    with pytest.raises(UserError, match=r"set DPO_JAX_JUDGE_KEY \(OPENAI_API_KEY is not sent over http\)"):
        judge(PAIRS)
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("DPO_JAX_JUDGE_KEY", "own-key")
    with pytest.raises(UserError):
        judge(PAIRS)
    assert server.headers[-1]["Authorization"] == "Bearer own-key"


# --------------------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "http://h/v1",
        "http://h/v1|",
        "h/v1|m",
        "ftp://h/v1|m",
        "http:///v1|m",
        "http://h:x/v1|m",
        "http://h:99999/v1|m",
        "http://a b/v1|m",
        "http://a..b/v1|m",
        "http://999.1.1.1/v1|m",
        "http://[::zz]/v1|m",
        "http://" + "a" * 300 + "/v1|m",
    ],
)
def test_a_spec_that_is_none(spec, tmp_path):
    with pytest.raises(UserError, match=r"needed is http://HOST/v1\|MODEL") as caught:
        connect(spec, cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "https://me:{}@h/v1|m",
        "https://me:{}/x@h/v1|m",
        "me:{}@h/v1|m",
        "https://me:{}@h:x/v1|m",
        "https://{}@h/v1|m",
        "https://h/v1?key={}|m",
        "https://h/v1#{}|m",
    ],
)
def test_nothing_secret_in_a_spec(spec, tmp_path):
    with pytest.raises(UserError, match="environment variable DPO_JAX_JUDGE_KEY") as caught:
        connect(spec.format("s3cret"), cache_dir=str(tmp_path))
    assert "s3cret" not in str(caught.value)


def test_one_address_is_written_in_one_way(tmp_path):
    named = lambda spec: connect(spec, cache_dir=str(tmp_path)).name
    assert named("HTTP://Host:8000/v1/|a/b:c") == "http://host:8000/v1|a/b:c"
    assert named("https://host/v1/chat/completions|m") == "https://host/v1|m"
    assert named("http://[::1]:1/v1|m") == "http://[::1]:1/v1|m"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"concurrency": 0}, "concurrency=0; needed is a whole number of at least 1"),
        ({"max_requests": -1}, "max_requests=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": math.nan}, "timeout=nan"),
        ({"asking": Asking(tries=0)}, "tries=0"),
        ({"asking": Asking(read="both")}, "read='both'; needed is auto, logprobs, text"),
        ({"asking": Asking(extra={"n": 2})}, "extra may not have 'n'"),
        ({"asking": Asking(extra=["n"])}, "extra=.*needed is an object"),
        ({"asking": {"reed": "text"}}, "asking has 'reed'; needed is an object with any of read, "),
        ({"asking": "text"}, "asking has 'text'; needed is an object"),
        ({"asking": '["read"]'}, "needed is an object"),
        ({"asking": Asking(seed=0.5)}, "seed=0.5; needed is a whole number"),
        ({"concurrency": "8"}, "concurrency='8'"),
        ({"concurrency": True}, "concurrency=True"),
        ({"rubric": 5}, "rubric=5; needed is a text"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        connect("http://h/v1|m", cache_dir=str(tmp_path), **more)


def test_asking_by_names_or_as_json(tmp_path):
    asking = lambda given: connect("http://h/v1|m", cache_dir=str(tmp_path), asking=given).asking
    assert (
        asking({"read": "text", "tries": 2}) == Asking(read="text", tries=2) == asking('{"read": "text", "tries": 2}')
    )
    assert asking(None) == Asking()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"answers cannot be kept .*cache_dir"):
        connect("http://h/v1|m", cache_dir=str(tmp_path / "file"))


def test_about_tells_judges_apart_and_is_json(tmp_path):
    about = lambda spec="http://h/v1|m", **more: json.dumps(connect(spec, cache_dir=str(tmp_path), **more).about())
    assert about() == about(concurrency=2, max_requests=3, timeout=5)
    others = [about(rubric="x"), about("http://h/v1|n"), about("http://g/v1|m"), about(asking=Asking(read="text"))]
    assert len({about(), *others}) == 5


def test_it_is_imported_without_jax():
    program = "import sys, dpo_jax.preference.server; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
