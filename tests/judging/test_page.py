"""The pages: what is on them, hostile answers, and how a browser lays them out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import judge as door
from dpo_jax.judging.page import spread_over
from tests.judging.judges import line, write
from tests.report import browser

HOSTILE = "<script>alert('a')</script><img src=x onerror=alert(1)> \x1b[31m </main>"
needs_browser = pytest.mark.skipif(browser.BINARY is None, reason="needs chromium on PATH: apt-get install -y chromium")


def page_of(directory, *args):
    out = directory / "page.html"
    assert door.main(["judge", *args, f"--html={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Answers of 60 prompts, some hostile, some without a verdict."""
    directory = tmp_path_factory.mktemp("answers")
    rng = np.random.default_rng(0)
    text = lambda i: HOSTILE if i == 3 else "x" if i == 5 else "word " * int(rng.integers(1, 60))
    sides = [[line(f"p{i}", [text(i)], source="ab"[i % 2]) for i in range(60)] for _ in range(2)]
    sides[0][7]["prompt"] = sides[1][7]["prompt"] = [
        {"role": "system", "content": "Be <b>brief</b>."},
        {"role": "user", "content": "a/very/long/path/" * 12},
    ]
    return [write(directory / f"{name}.jsonl", lines) for name, lines in zip("ab", sides, strict=True)]


@pytest.fixture(scope="module")
def compared(answers):
    return page_of(
        answers_directory(answers), "compare", *answers, "--judge=tests.judging.judges:some,tests.judging.judges:second"
    )


def answers_directory(answers):
    return Path(answers[0]).parent


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    rows = [
        {
            "id": f"{i}",
            "prompt": f"Q {HOSTILE}",
            "chosen": ["a" * (i + 1)],
            "rejected": ["aaa", HOSTILE],
            "num_correct": 1,
            "subset": s,
        }
        for i in range(6)
        for s in ("Math", "Focus")
    ]
    directory = tmp_path_factory.mktemp("rows")
    return page_of(directory, "benchmark", write(directory / "rb2.jsonl", rows), "--judge=tests.judging.judges:shorter")


def test_the_figures_are_on_the_page(answers, compared):
    text = compared.read_text()
    place = compared.with_name("figures.json")
    judge = "--judge=tests.judging.judges:some,tests.judging.judges:second"
    assert door.main(["judge", "compare", *answers, judge, f"--json={place}"]) == 0
    figures = json.loads(place.read_text())
    for name in ("win_rate", "win_rate_error", "length_controlled_win_rate", "disagreement"):
        assert f'<data value="{figures[name]}">' in text, name
    for name in ("By source", "Verdicts", "Answers side by side", "Win rate of A by how many tokens longer"):
        assert name in text, name
    assert text.count("<article") == 60
    kinds = re.findall(r'<article class="sample" data-kind="([^"]*)"', text)
    assert {"a", "b"} <= {kind.split()[0] for kind in kinds}
    assert "shown A first" in text
    assert "Be &lt;b&gt;brief&lt;/b&gt;." in text


@pytest.mark.parametrize("page", ["compared", "measured"])
def test_hostile_answers_are_text(page, request):
    text = request.getfixturevalue(page).read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert" in text
    assert "\x1b" not in text
    assert "␛[31m" in text  # control characters can be seen
    assert text.count("<script>") == 1  # its own, which the policy knows by its hash
    assert "default-src 'none'" in text


def test_few_of_many(answers):
    directory = answers_directory(answers)
    out = page_of(directory, "compare", *answers, "--judge=tests.judging.judges:shorter", "--shown=7")
    text = out.read_text()
    assert text.count("<article") == 7
    assert "7 of 60 comparisons, spread over all." in text
    assert spread_over(10, 4) == [0, 3, 6, 9]
    assert spread_over(3, 0) == spread_over(3, 9) == [0, 1, 2]


def test_no_verdict_at_all_is_a_page_too(answers, tmp_path):
    out = page_of(tmp_path, "compare", *answers, "--judge=tests.judging.judges:none_of_it")
    assert "No verdict" in out.read_text()


def test_a_benchmarks_page(measured):
    text = measured.read_text()
    assert "best of four" in text
    assert text.count("<article") == 12
    assert "the nearest of 2 comparisons" in text
    assert {"right", "wrong"} <= set(re.findall(r'data-kind="(\w+)"', text))
    assert ">Math<" in text


def test_a_place_that_cannot_be_written(answers, capsys):
    assert door.main(["judge", "compare", *answers, "--judge=gold", "--html=no/such/page.html"]) == 2
    assert "no/such/page.html" in capsys.readouterr().err


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["compared", "measured"])
def test_a_page_is_whole_at_every_width(page, width, request):
    found = browser.measure(request.getfixturevalue(page), width)
    assert found["wrong"] == []
    assert found["fetched"] == []
    assert found["wide"] == []
    assert found["scroll"] <= width
    assert found["figures"]
    for figure in found["figures"]:
        assert any(length > 1 for length in figure["paths"])
        assert figure["after"] == figure["before"]
        assert figure["hovered"]


FINDS = """
addEventListener("load", () => {
const form = document.querySelector(".find"), [words, kind] = form.querySelectorAll("input, select");
const articles = [...document.querySelectorAll("article")];
const shown = () => articles.filter(article => article.getClientRects().length).length;
const found = [shown()];
const set = (element, value, name) => {
  element.value = value;
  element.dispatchEvent(new Event(name));
  found.push(shown());
};
set(words, "ALERT", "input");
set(words, "", "input");
set(kind, "none", "change");
set(words, "nowhere", "input");
parent.postMessage(JSON.stringify([...found, form.querySelector("output").textContent]), "*");
});
"""


@needs_browser
@pytest.mark.slow
def test_comparisons_are_found_by_words_and_verdict(answers, monkeypatch):
    directory = answers_directory(answers)
    out = page_of(directory, "compare", *answers, "--judge=tests.judging.judges:some")
    monkeypatch.setattr(browser, "PROBE", FINDS)
    assert browser.measure(out, 1280) == [60, 1, 60, 1, 0, "0 of 60"]
