"""The report page: what it shows is what the files hold, and hostile answers stay text."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpo_jax.errors import UserError
from dpo_jax.records.length_bias import GROUPS
from dpo_jax.records.records import HELD_OUT
from dpo_jax.report import charts
from dpo_jax.report import command as report
from dpo_jax.report.html import jinja_environment
from dpo_jax.report.runs import LENGTH_WORDS, held_out_series, load_run
from tests.report.example_run import CONFIG, DATA, SOURCES, answers, make_run

pytestmark = pytest.mark.filterwarnings("error")

EVIL = (
    '<script>alert("owned")</script><img src=http://evil.example/x.png onerror=alert(1)>\x1b[31m & "quotes" \''
    "{{ 7*7 }}{% raw %}{# note #}</style></title>"
)


VOID = {"meta", "link", "br", "img", "hr", "input", "path"}


class Page(HTMLParser):
    """The page as a browser sees it: its tags are balanced, its text, its exact numbers, what its charts hold."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.values: list[float] = []
        self.curves: dict[str, list] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))
        if tag == "figure":
            self.curves[str(len(self.curves))] = json.loads(dict(attrs)["data-series"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_page_shows_the_numbers_of_the_files(tmp_path):
    records = make_run(tmp_path / "run")
    path = report.write_report(tmp_path / "run")
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    last = [r for r in records if r["split"] == "eval"][-1]
    held_out = [name for name in HELD_OUT if name in last]
    assert {"dpo_loss", "accuracy", "margin", "kl"} <= set(held_out)
    for name in held_out:
        assert last[name] in page.values
    p = last["accuracy"]
    assert math.sqrt(p * (1 - p) / 512) in page.values
    assert f"0.6931 → {last['dpo_loss']:.4f}" in page.text
    assert f"± {math.sqrt(p * (1 - p) / 512):.3f}" in page.text
    for source in DATA["sources"]:
        assert {source["read"], source["kept"], *source["dropped"].values()} <= set(page.values)
    assert {151.3, 118, 318, 512} <= set(page.values)
    for key, value in CONFIG.items():
        assert key in page.text
        assert str(value).lower() in page.text.lower()
    for sample in answers():
        assert {sample["prompt"].strip(), sample["answer"].strip(), sample["chosen"]} <= {w.strip() for w in page.words}


def test_the_curves_are_those_of_the_files(tmp_path):
    records = make_run(tmp_path / "run")
    page = Page(report.write_report(tmp_path / "run"))
    held_out, train = page.curves["0"]
    for split, curve in (("eval", held_out), ("train", train)):
        expected = {r["step"]: r["dpo_loss"] for r in records if r["split"] == split}
        assert dict(curve) == {step: pytest.approx(value, rel=1e-4) for step, value in expected.items()}
    accuracy = dict(page.curves["1"][0])
    assert 0 not in accuracy  # at step 0 every pair ties: that 0 is no accuracy, and would squash the scale
    assert 25 in accuracy


def test_hostile_text_stays_text(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    edit(run / "config.json", model=EVIL, dataset=EVIL)
    edit(
        run / "data.json", held_out=EVIL, sources=[{"name": EVIL, "split": EVIL, "dropped": {EVIL: 3}, "files": [EVIL]}]
    )
    sample = {"when": "after", "step": 1, "mode": EVIL, "prompt": EVIL, "answer": EVIL + "\ud800", "chosen": EVIL}
    (run / "samples.jsonl").write_text(json.dumps(sample | {"rejected": EVIL}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "split": "train", EVIL: 1.0}) + "\n")
        groups = {f"{name}/{EVIL}": 0.5 for name in ("accuracy", "margin", "pairs")}
        file.write(json.dumps({"step": 200, "split": "eval", "accuracy": 0.5, "dpo_loss": 0.6} | groups) + "\n")
    edit(run / "run.json", device=EVIL, versions={EVIL: EVIL}, mesh={EVIL: 1}, compute_dtype=EVIL)
    (run / "export" / EVIL.replace("/", "")).write_text("")
    path = report.write_report(run)
    page = Page(path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(tag in ("img", "link", "iframe") for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert '<script>alert("owned")</script>' in page.text
    assert "\x1b" not in path.read_text()  # an escape code is shown, not sent


def poisoned(value):
    """The value with `EVIL` behind every string in it, keys too."""
    if isinstance(value, dict):
        return {f"{key}{EVIL}": poisoned(v) for key, v in value.items()}
    return (
        [poisoned(v) for v in value] if isinstance(value, list) else value + EVIL if isinstance(value, str) else value
    )


def assert_harmless(path: Path):
    """Nothing of `EVIL` became a tag, an attribute or a template's instruction; all of it can be read."""
    page = Page(path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(tag in ("img", "link", "iframe", "style") for tag, _ in page.tags[page.tags.index(("main", {})) :])
    names = {name for _, attrs in page.tags for name in attrs}
    assert names <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "style", "scope", "value", "d", "viewbox", "role",
        "preserveaspectratio", "aria-label", "data-domain", "data-unit", "data-series", "data-ids", "title",
    }  # fmt: skip
    for tag, attrs in page.tags:  # what a run holds stands in no attribute but a chart's label
        assert not any("alert" in (value or "") for name, value in attrs.items() if name != "aria-label"), tag
    assert EVIL.replace("\x1b", "␛") in page.text
    assert "\x1b" not in path.read_text()  # an escape code is shown, not sent


def test_every_string_of_a_run_stays_text(tmp_path):
    """Hostile words as values of every key that pages know, and as keys that they do not."""
    run = tmp_path / f"run {EVIL.replace('/', '')}"[:200]
    make_run(run)
    for name in ("config.json", "data.json", "run.json"):
        table = json.loads((run / name).read_text())
        if name == "data.json":
            table["mixture"] = [{"name": "hhh", "weight": 0.5, "pairs": 10, "epoch": 5}]
        table = {key: poisoned(value) if not isinstance(value, dict | list) else value for key, value in table.items()}
        for nested in ("versions", "mesh"):
            table |= {nested: poisoned(table[nested])} if nested in table else {}
        for source in table.get("sources", ()):
            source |= {key: poisoned(value) for key, value in source.items()}
        for part in table.get("mixture", ()):
            part["name"] += EVIL
        (run / name).write_text(json.dumps(table | {EVIL: EVIL}))
    (run / "samples.jsonl").write_text(
        "".join(json.dumps({k: v if k == "when" else poisoned(v) for k, v in s.items()}) + "\n" for s in answers())
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "split": "train", EVIL: 1.0, "note": EVIL}) + "\n")
        groups = {f"{name}/{EVIL}": 0.5 for name in ("accuracy", "margin", "pairs")}
        file.write(json.dumps({"step": 200, "split": "eval", "accuracy": 0.5, "dpo_loss": 0.6} | groups) + "\n")
    (run / "export" / EVIL.replace("/", "")).write_text("")
    assert_harmless(report.write_report(run))
    make_run(tmp_path / "other")
    assert_harmless(report.write_comparison([run, tmp_path / "other"], tmp_path / "compare.html"))


def test_nothing_is_fetched(tmp_path):
    make_run(tmp_path / "run")
    path = report.write_report(tmp_path / "run")
    page = Page(path)
    assert not any({"src", "href", "srcset", "data", "action"} & attrs.keys() for _, attrs in page.tags)
    assert not re.search(r"https?://|url\(|@import", path.read_text())
    (policy,) = (attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("missing", ["config.json", "data.json", "samples.jsonl", "metrics.jsonl", "run.json"])
def test_a_missing_file_leaves_out_its_part(tmp_path, missing):
    make_run(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    page = Page(report.write_report(tmp_path / "run"))
    part = {
        "config.json": "Full config",
        "data.json": "median",
        "samples.jsonl": "after, greedy",
        "metrics.jsonl": "Curves",
        "run.json": "Versions",
    }
    assert part[missing] not in [word.strip() for word in page.words]


def test_a_run_that_broke_off_says_so(tmp_path):
    bad = [{"step": 77, "split": "train", "dpo_loss": None, "margin": None}]
    make_run(tmp_path / "run", steps=76, further=bad)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 78, "split": "tra')
    page = Page(report.write_report(tmp_path / "run"))
    assert "its last record is of step 77 of 200" in page.text
    assert "numbers that are not finite: 1, the first at train step 77" in page.text


def test_an_early_run_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "split": "eval", "dpo_loss": 0.6931, "accuracy": 0, "margin": 0}\n'
    )
    page = Page(report.write_report(tmp_path))
    assert "0.6931 → –" in page.text


def test_a_further_metric_gets_a_chart(tmp_path):
    further = [{"step": s, "split": "eval", "kl_from_reference": 0.5 * s} for s in (10, 20)]
    make_run(tmp_path / "run", further=further)
    page = Page(report.write_report(tmp_path / "run"))
    assert "kl from reference" in page.words
    assert [[10, 5], [20, 10]] in [curve for figure in page.curves.values() for curve in figure]


def test_what_holds_for_dpo_is_not_said_of_another_loss(tmp_path):
    for name, said in (("sigmoid", True), ("simpo<i>", False)):
        workdir = tmp_path / str(said)
        make_run(workdir)
        edit(workdir / "config.json", loss=name)
        text = Page(report.write_report(workdir)).text
        assert ("ln 2" in text) == ("reference log-probability" in text) == said
        assert said or "That of simpo<i>." in text


def test_wins_by_source_and_length_are_told_apart(tmp_path):
    records = make_run(tmp_path / "run")
    page = Page(report.write_report(tmp_path / "run"))
    last = [r for r in records if r["split"] == "eval"][-1]
    for name, words in (*((s, s) for s in SOURCES), *LENGTH_WORDS.items()):
        accuracy, pairs = last[f"accuracy/{name}"], last[f"pairs/{name}"]
        assert {accuracy, pairs, last[f"margin/{name}"], math.sqrt(accuracy * (1 - accuracy) / pairs)} <= set(
            page.values
        )
        assert words in page.words
    assert "with the margin: 0.310." in page.text
    curve = next(c for c in page.curves.values() if len(c) == 3)  # by length: three lines
    assert [points[-1] for points in curve] == [
        [200, pytest.approx(last[f"accuracy/{name}"], rel=1e-4)] for name in GROUPS
    ]


def test_the_kl_has_its_standard_errors(tmp_path):
    records = make_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    series = held_out_series(run, "kl", "held-out", "accent")
    evals = [r for r in records if r["split"] == "eval"]
    assert series.points == [(r["step"], r["kl"]) for r in evals]
    assert series.errors == {r["step"]: r["kl_error"] for r in evals if r["kl_error"]}
    assert "kl error" not in Page(report.write_report(tmp_path / "run")).words


def test_files_and_time_are_those_of_the_directory(tmp_path):
    make_run(tmp_path / "run")
    page = Page(report.write_report(tmp_path / "run"))
    assert {210, 260, 1500, 2500} <= set(page.values)
    assert "60 updates of SFT, 200 of DPO" in page.words
    assert "model.safetensors" in page.words
    assert "5 min 12 s of updates · 8 × TPU v5 lite" in page.text  # 200 steps of 1.56 s
    records = [{"step": s, "split": "train", "step_seconds": 2.0} for s in (1, 10, 15)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert load_run(tmp_path / "run").training_seconds == 30.0


def test_runs_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path / "a" / "run")
    second = make_run(tmp_path / "b" / "run", seed=1, strength=1.5, config={"dpo_beta": 0.3, "model": "other/model"})
    assert report.main(["a/run", "b/run"]) == 0
    assert capsys.readouterr().out == "compare.html\n"
    page = Page(tmp_path / "compare.html")
    assert {"run (1)", "run (2)", "dpo_beta", "other/model"} <= set(page.words)
    assert "learning_rate" not in page.words  # equal in both
    assert page.text.count("I think (greedy) that is what one would say here.") > 5
    assert "Accuracy · chosen shorter" in page.text
    for records in (first, second):
        assert [r["dpo_loss"] for r in records if r["split"] == "eval"][-1] in page.values
    assert len(page.curves["0"]) == 2


def test_many_runs_reuse_the_colours(tmp_path):
    make_run(tmp_path / "run")
    body = report.write_comparison([tmp_path / "run"] * 9, tmp_path / "compare.html").read_text().partition("<main>")[2]
    assert "run-7" in body
    assert "run-8" not in body.replace("run-8)", "")


def test_one_directory_writes_its_page_again(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert report.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "run" / "report.html").read_bytes()


def test_a_page_needs_no_jax(tmp_path):
    make_run(tmp_path / "run")
    code = "import sys; from dpo_jax.report.command import main; print(main(sys.argv[1:]), 'jax' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("\n0 False\n")


@pytest.mark.parametrize("case", ["missing", "empty", "damaged", "damaged records", "nowhere"])
def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys, case):
    run = tmp_path / "run"
    arguments = [str(run)]
    if case != "missing":
        run.mkdir()
    if case == "damaged":
        (run / "config.json").write_text('{"seed": ')
    if case == "damaged records":
        (run / "metrics.jsonl").write_text('{"step": \n{"step": 2, "split": "train"}\n')
    if case == "nowhere":
        (run / "config.json").write_text('{"seed": 1}')
        arguments += ["--out", str(tmp_path / "not" / "there.html")]
    assert report.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(tmp_path) in captured.err
    if case in ("missing", "empty"):
        with pytest.raises(UserError):
            report.write_report(run)


def test_ticks_are_round_and_within_the_axis():
    assert charts.ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(-0.31, 0.42, 4) == pytest.approx([-0.2, 0.0, 0.2, 0.4])
    assert charts.ticks(0.0, 5.1e-7, 5) == pytest.approx([0, 1e-7, 2e-7, 3e-7, 4e-7, 5e-7])
    assert [charts.label(v) for v in (0.25, 12000, 5e-7, -1.5)] == ["0.25", "12,000", "5e−7", "−1.5"]


def test_thinning_keeps_every_peak_in_order():
    points = [(float(i), math.sin(i / 900)) for i in range(20_000)]
    points[777] = (777.0, 99.0)
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS
    assert (777.0, 99.0) in thinned
    assert thinned == sorted(thinned)


def test_running_mean_keeps_a_straight_line():
    line = [(float(i), 3.0 * i) for i in range(200)]
    assert charts.running_mean(line) == [(x, pytest.approx(y)) for x, y in line[3:-3]]


def figure(chart):
    return jinja_environment().get_template("report/templates/charts.html").module.figure(chart)


def test_whiskers_are_within_the_axis():
    series = charts.Series("kl", "accent", [(0, 1.0), (10, 2.0)], held_out=True, errors={10: 3.0})
    heights = [float(y) for y in re.findall(r"[ML][\d.-]+ ([\d.-]+)", figure(charts.line_chart("t", [series])))]
    assert 0 <= min(heights) < max(heights) <= 1000


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5], [None, None], [None, 1.0], [float("nan"), float("inf"), 2.0], []]
)
def test_few_and_broken_values_draw(values):
    chart = charts.line_chart("t", [charts.Series("s", "accent", list(enumerate(values)), held_out=len(values) == 2)])
    assert bool(chart) == any(v is not None and math.isfinite(v) for v in values)
    assert not re.search(r"nan|inf", figure(chart) if chart else "")
