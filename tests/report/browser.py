"""Pages as a real browser lays them out: headless Chromium, no network, any width.

A copy of the page sits in a frame of the width asked for (a headless window is never narrower than 500 pixels) with a
script added that measures it and tells the frame's owner, whose document is then printed.
"""

import base64
import hashlib
import html
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage --virtual-time-budget=4000
""".split()
DARK = "--blink-settings=preferredColorScheme=0"

PROBE = """
const wrong = [];
addEventListener("error", event => wrong.push(event.message));
addEventListener("securitypolicyviolation", event => wrong.push("refused: " + event.violatedDirective));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  const box = element => { const b = element.getBoundingClientRect(); return [b.width, b.height]; };
  const shown = element => element.getClientRects().length && !element.closest(".scroll");
  const figures = [...document.querySelectorAll("figure")].map(figure => {
    const plot = figure.querySelector(".plot"), area = plot.getBoundingClientRect();
    const read = () => [...figure.querySelectorAll("output")].map(output => output.textContent);
    const before = read();
    const at = x => new PointerEvent("pointermove", { clientX: area.left + x * area.width, clientY: area.top + 5 });
    plot.dispatchEvent(at(0));
    const hovered = read(), rule = figure.querySelector(".rule");
    const step = rule.dataset.at, lit = getComputedStyle(rule).display;
    plot.dispatchEvent(new PointerEvent("pointerleave"));
    return {
      title: figure.querySelector("h3").textContent, plot: box(plot), svg: box(figure.querySelector("svg")),
      paths: [...figure.querySelectorAll("path")].map(path => path.getTotalLength()),
      labels: [...figure.querySelectorAll(".plot b")].map(box),
      series: JSON.parse(figure.dataset.series), before, hovered, step, lit, after: read(),
    };
  });
  parent.postMessage(JSON.stringify({
    wrong, figures, inner: innerWidth, scroll: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll("body *")].filter(
      e => shown(e) && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200)),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...document.querySelectorAll("section > h2")].map(h => [h.textContent, ...box(h.parentElement)]),
    colors: ["color", "backgroundColor"].map(name => getComputedStyle(document.body)[name]),
  }), "*");
});
"""
OWNER = """<!DOCTYPE html><meta charset="utf-8"><style>body { margin: 0 } iframe { border: 0; display: block }</style>
<pre id="found" hidden></pre>
<script>addEventListener("message", e => { document.getElementById("found").textContent = e.data; });</script>
<iframe src="framed.html" style="width: %dpx; height: %dpx"></iframe>
"""


def measure(page: Path, width: int, *flags: str) -> dict:
    """What `PROBE` finds in a page of this width."""
    with tempfile.TemporaryDirectory(prefix="dpo_jax_browser_") as directory:
        owner = _owner(page, Path(directory), width, 3000, PROBE)
        printed = _chromium(Path(directory), "--window-size=1400,1000", "--dump-dom", *flags, owner.as_uri())
    return json.loads(html.unescape(printed.split('<pre id="found" hidden="">')[1].split("</pre>")[0]))


def screenshot(page: Path, out: Path, width: int, height: int, *flags: str) -> Path:
    """The page's first `height` pixels, as a PNG."""
    with tempfile.TemporaryDirectory(prefix="dpo_jax_browser_") as directory:
        owner = _owner(page, Path(directory), width, height)
        size = f"--window-size={max(width, 500)},{height}"
        _chromium(Path(directory), size, f"--screenshot={out}", *flags, owner.as_uri())
    return out


def pdf(page: Path, out: Path) -> Path:
    """The page as it is printed."""
    with tempfile.TemporaryDirectory(prefix="dpo_jax_browser_") as directory:
        _chromium(Path(directory), f"--print-to-pdf={out}", "--no-pdf-header-footer", page.absolute().as_uri())
    return out


def _owner(page: Path, directory: Path, width: int, height: int, probe: str = "") -> Path:
    """A document that holds the page in a frame; a probe is let in beside the page's own script, whose policy stays."""
    text = page.read_text(encoding="utf-8")
    if probe:
        digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
        assert text.count("script-src ") == 1
        text = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
        text = text.replace("</title>", f"</title><script>{probe}</script>", 1)
    (directory / "framed.html").write_text(text, encoding="utf-8")
    owner = directory / "owner.html"
    owner.write_text(OWNER % (width, height), encoding="utf-8")
    return owner


def _chromium(directory: Path, *arguments: str) -> str:
    command = [str(BINARY), *FLAGS, f"--user-data-dir={directory / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
