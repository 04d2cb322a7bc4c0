"""The report in a real browser: laid out at every width, nothing fetched, no script error, charts that are there."""

import math

import numpy as np
import pytest
from PIL import Image

from dpo_jax.report import command as report
from tests.report import browser
from tests.report.example_run import make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.BINARY is None, reason="needs chromium on PATH: apt-get install -y chromium"),
]
LONG = "a/very/long/path/" * 12 + "model"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page, one of two runs compared, and a run's whose words are long."""
    base = tmp_path_factory.mktemp("pages")
    make_run(base / "a")
    make_run(base / "b", seed=1, strength=1.5, config={"dpo_beta": 0.3, "model": LONG})
    return {
        "run": report.write_report(base / "a"),
        "long": report.write_report(base / "b"),
        "compared": report.write_comparison([base / "a", base / "b"], base / "compare.html"),
    }


@pytest.mark.parametrize(
    ("name", "width"),
    [("run", 390), ("run", 820), ("run", 1280), ("long", 390), ("compared", 390), ("compared", 1280)],
)
def test_a_page_is_whole_at_every_width(pages, name, width):
    found = browser.measure(pages[name], width)
    assert found["wrong"] == []
    assert found["fetched"] == []
    assert found["inner"] == width
    assert found["wide"] == []
    assert found["scroll"] <= width
    assert all(w > 0 and h > 0 for _, w, h in found["sections"])
    assert len(found["figures"]) > 10
    for figure in found["figures"]:
        title = figure["title"]
        assert all(side > 100 for side in (*figure["plot"], *figure["svg"])), title
        assert any(length > 1 for length in figure["paths"]), title
        assert len(figure["labels"]) >= 4, title
        assert all(w > 0 and h > 0 for w, h in figure["labels"]), title


def test_the_legend_reads_out_what_is_under_the_pointer(pages):
    found = browser.measure(pages["run"], 1280)
    for figure in found["figures"]:
        assert figure["lit"] == "block"
        assert figure["after"] == figure["before"]
        first = [points[0] for points in figure["series"]]
        shown = [float(words.replace("−", "-")) for words in figure["hovered"]]
        assert shown == [pytest.approx(y, rel=1e-3) for _, y in first], figure["title"]
        unit, step = figure["step"].split()
        assert unit in ("step", "tokens")
        assert float(step) in [x for x, _ in first]
    titles = [figure["title"] for figure in found["figures"]]
    assert {"DPO loss", "Accuracy by source", "Accuracy by length", "KL from the reference", "Peak memory, GB"} <= set(
        titles
    )


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_are_legible(pages, dark, tmp_path):
    flags = [browser.DARK] * dark
    ink, paper = (
        np.array([int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")])
        for color in browser.measure(pages["run"], 1280, *flags)["colors"]
    )
    assert (paper.mean() < 60) == dark
    assert _contrast(ink, paper) > 7  # WCAG's AAA
    path = browser.screenshot(pages["run"], tmp_path / "page.png", 1280, 2400, *flags)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert pixels.shape[0] == 1280 * 2400
    np.testing.assert_array_equal(np.median(pixels, axis=0), paper)
    drawn = {tuple(color) for color in np.unique(pixels, axis=0)}
    accent, chosen = ((0x86, 0xA2, 0xFF), (0x4C, 0xC7, 0xB8)) if dark else ((0x34, 0x57, 0xC9), (0x0B, 0x7F, 0x74))
    assert {accent, chosen} <= drawn  # held-out dots are opaque
    assert 0.02 < (np.abs(pixels - paper.astype(float)).max(1) > 40).mean() < 0.5


def _contrast(a, b):
    """WCAG 2's contrast ratio of two colours."""
    light = []
    for color in (a, b):
        c = color / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_it_prints(pages, tmp_path):
    data = browser.pdf(pages["run"], tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 3 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") + data.count(b"/Type /Page/") <= 12
    assert math.log10(len(data)) > 4


def test_the_probe_finds_what_it_looks_for(pages, tmp_path):
    text = pages["run"].read_text()
    bad = tmp_path / "bad.html"
    wide = '<p style="width: 2000px">wide</p><script>owned()</script><img src="x.png">'
    bad.write_text(text.replace("</main>", f"{wide}</main>"))
    found = browser.measure(bad, 390)
    assert found["scroll"] > 390
    assert any("wide" in element for element in found["wide"])
    assert any("refused: script-src" in words for words in found["wrong"])
    assert any("refused: " in words and "img" in words for words in found["wrong"])
