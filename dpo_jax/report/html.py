"""The HTML around a report: one file, no network. Everything that comes from a run is escaped here.

A run's page shows what models wrote, and what data sets hold: hostile input. Escaping is the defence; the content
security policy is the second one: only this page's own script (by its hash) runs, and nothing is fetched.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.records.records import printable, show_metric

RUN_COLORS = 8  # --run-0 … --run-7, then again from the start


def text(value: object) -> str:
    """Escaped text; control characters become visible, so an answer cannot hide anything."""
    return escape(printable(str(value)))


def number(name: str, value: float | None) -> str:
    """A metric for a person, with the exact value in the element."""
    if value is None:
        return '<span class="none">–</span>'
    return f'<data value="{value!r}">{show_metric(name, value).replace("-", "−")}</data>'


def count(value: Any) -> str:
    """A whole number, or a mean, with thousands set apart."""
    if not isinstance(value, int | float):
        return '<span class="none">–</span>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return f'<data value="{value!r}">{shown}</data>'


def size(held: int) -> str:
    """Bytes for a person."""
    value, unit = float(held), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f'<data value="{held!r}">{value:.3g} {unit}</data>' if value < 1000 else f"{value:,.0f} {unit}"


def bar(fraction: float) -> str:
    """A fraction as a bar, with a mark at one half."""
    return f'<span class="bar"><i style="width:{100 * min(max(fraction, 0), 1):.1f}%"></i></span>'


def setting(value: object) -> str:
    """A config value as one would write it on the command line."""
    if value is None or value == "":
        return '<span class="none">–</span>'
    return text(value if isinstance(value, str) else json.dumps(value))


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,), narrow: bool = False
) -> str:
    """A table of HTML cells; columns are numbers, set to the right, but for those listed in `words`."""
    side = ["" if i in words else ' class="n"' for i in range(len(head))]
    top = "".join(f'<th scope="col"{s}>{text(h)}</th>' for h, s in zip(head, side, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{s}>{cell}</td>" for cell, s in zip(row, side, strict=True)) + "</tr>" for row in rows
    )
    opening = '<table class="narrow">' if narrow else "<table>"
    return f'<div class="scroll">{opening}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def fold(summary: str, body: str) -> str:
    """Something to open."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def section(title: str, body: str, note: str = "") -> str:
    """A part of the page; empty without a body."""
    if not body:
        return ""
    return (
        f"<section><h2>{text(title)}</h2>" + (f'<p class="lead">{text(note)}</p>' if note else "") + f"{body}</section>"
    )


def document(title: str, body: str) -> str:
    """The whole file."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def save(path: Path, title: str, body: str, *, option: str) -> Path:
    """Write a page; `option` is the flag that names its place.

    Raises:
      UserError: the place cannot be written.
    """
    try:
        # A lone surrogate in an answer has no UTF-8 form: a question mark stands for it.
        path.write_bytes(document(title, body).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place with {option}") from error
    return path


# The value under the pointer, in the legend. Without it (or with scripts off) the legend shows the last values.
SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-series]")) {
  const lines = JSON.parse(figure.dataset.series);
  const [low, high] = figure.dataset.domain.split(" ").map(Number);
  const plot = figure.querySelector(".plot"), rule = figure.querySelector(".rule");
  const outputs = [...figure.querySelectorAll("output")], last = outputs.map(o => o.textContent);
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = low + (high - low) * (event.clientX - box.left) / box.width;
    const found = lines.map(points => nearest(points, x));
    const at = found.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)[0];
    found.forEach(([, y], i) => { outputs[i].textContent = String(Number(y.toPrecision(4))).replace("-", "−"); });
    rule.dataset.at = figure.dataset.unit + " " + at;
    rule.style.left = 100 * (at - low) / (high - low) + "%";
    figure.classList.add("hover");
  });
  plot.addEventListener("pointerleave", () => {
    figure.classList.remove("hover");
    outputs.forEach((output, i) => { output.textContent = last[i]; });
  });
}
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --panel: #f5f5f3; --ink: #1b1d21; --soft: #5b616b; --faint: #8b919b; --line: #e4e4e0;
  --accent: #3457c9; --chosen: #0b7f74; --rejected: #c8501c; --warn: #9a4a00;
  --run-0: #3457c9; --run-1: #c8501c; --run-2: #0b7f74; --run-3: #8a3fb5;
  --run-4: #a3790a; --run-5: #b52f62; --run-6: #4d7d1f; --run-7: #59616e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --panel: #1d2025; --ink: #e9eaec; --soft: #a6acb6; --faint: #7b828d; --line: #2c3037;
    --accent: #86a2ff; --chosen: #4cc7b8; --rejected: #ff9461; --warn: #ffb870;
    --run-0: #86a2ff; --run-1: #ff9461; --run-2: #4cc7b8; --run-3: #cf9af0;
    --run-4: #e3bd55; --run-5: #ff8fb4; --run-6: #a5d46a; --run-7: #aab1bd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 64px 32px 96px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; font-weight: 650; margin: 0 0 6px; }
h1, dd, code { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
h2 { font-size: 19px; letter-spacing: -0.005em; font-weight: 650; margin: 0 0 4px; }
h3 { font-size: 14px; font-weight: 600; margin: 0; }
p { margin: 0; }
section { margin-top: 64px; }
.lead, .sub { color: var(--soft); max-width: 76ch; }
.sub { font-size: 16px; }
.lead { margin-bottom: 24px; }
section > h2 + :not(.lead) { margin-top: 20px; }
.none { color: var(--faint); }
.warn { color: var(--warn); margin-top: 12px; }
data, output, td.n, .plot b { font-variant-numeric: tabular-nums; }

.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 32px 36px; }
.headline { margin-top: 44px; }
.headline h2 { font-size: 14px; font-weight: 500; color: var(--soft); }
.headline .big { margin: 2px 0 6px; font-size: 25px; line-height: 1.25; letter-spacing: -0.02em; font-weight: 600; }
.headline .big .was { color: var(--faint); font-weight: 400; }
.headline small { font-size: 15px; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.headline p + p { color: var(--soft); font-size: 13.5px; max-width: 40ch; }

dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 18px 40px; margin: 20px 0 0; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; }

.scroll { overflow-x: auto; }
.scroll + .scroll, .scroll + .charts { margin-top: 36px; }
.scroll + .note { margin-top: 12px; }
.note + .scroll, .note + .charts { margin-top: 36px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { font-weight: 500; color: var(--soft); font-size: 13px; text-align: left; white-space: nowrap; }
th, td { padding: 7px 28px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; }
td.n { white-space: nowrap; overflow-wrap: normal; }
td i { font-style: normal; display: inline-block; white-space: nowrap; }
table.narrow { max-width: 640px; }
strong { font-weight: 650; }
.bar { display: block; position: relative; width: 150px; height: 8px; margin: 7px 0; background: var(--line); }
.bar i { display: block; height: 100%; background: var(--accent); }
.bar::after {
  content: ""; position: absolute; left: 50%; top: -3px; bottom: -3px; border-left: 1px dashed var(--soft);
}

details { margin-top: 20px; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; width: fit-content; }
summary:hover { color: var(--ink); }
details > :not(summary) { margin-top: 14px; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }

.config { columns: 2; column-gap: 48px; }
.config div { display: flex; gap: 20px; justify-content: space-between; break-inside: avoid; padding: 3px 0; }
.config div { border-bottom: 1px solid var(--line); }
.config code:first-child { color: var(--soft); white-space: nowrap; }
.config code:last-child { text-align: right; }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 44px 48px; margin: 0; }
.charts.three { grid-template-columns: repeat(3, minmax(0, 1fr)); margin-top: 44px; }
.chart { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; justify-content: space-between; margin-bottom: 12px; }
.key { font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 0 14px; }
.key span { display: inline-flex; align-items: center; gap: 5px; white-space: nowrap; }
.key i { display: block; width: 14px; height: 2px; border-radius: 1px; background: currentColor; opacity: 0.75; }
.key i.dot { width: 8px; height: 8px; border-radius: 50%; opacity: 1; }
.key output { color: var(--ink); min-width: 2.6em; }
.key output:empty { display: none; }
.plot { position: relative; height: 230px; margin: 0 0 30px 46px; }
.small .plot { height: 150px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; }
.plot path { stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1; opacity: 0.28; }
.plot .steps { fill: currentColor; fill-opacity: 0.16; stroke-width: 1; stroke-opacity: 0.8; }
.mean { stroke-width: 1.5; opacity: 0.75; }
.compared .raw { opacity: 0.13; }
.compared .mean { opacity: 0.45; }
.plot .held { stroke-width: 2; }
.plot .dots { stroke-width: 7; }
.plot .whisker { stroke-width: 1.5; opacity: 0.6; }
.plot b { position: absolute; color: var(--faint); white-space: nowrap; }
.plot b, .plot .guide em { font-size: 12px; line-height: 1; font-weight: 400; font-style: normal; }
.plot b.y { right: calc(100% + 10px); transform: translateY(-50%); }
.plot b.x { top: calc(100% + 9px); transform: translateX(-50%); }
.plot .grid, .plot .guide { position: absolute; left: 0; right: 0; border-top: 1px solid var(--line); }
.plot .guide { border-top: 1px dashed var(--faint); }
.plot .guide em { position: absolute; right: 0; bottom: 3px; color: var(--faint); }
.plot .rule { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--faint); display: none; }
.plot .rule::after {
  content: attr(data-at); position: absolute; top: calc(100% + 4px); transform: translateX(-50%); padding: 3px 6px;
  background: var(--ink); color: var(--paper); border-radius: 4px; font-size: 12px; line-height: 1.2;
  font-style: normal; white-space: nowrap;
}
.hover .rule { display: block; }
.note { color: var(--soft); font-size: 13px; max-width: 64ch; }

.sample { padding: 28px 0; border-top: 1px solid var(--line); }
.sample:first-of-type { border-top: 0; padding-top: 0; }
.sample h3 { color: var(--soft); font-size: 13px; font-weight: 500; margin-bottom: 4px; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22em; overflow-y: auto; unicode-bidi: plaintext; }
.prompt .said { max-width: 90ch; max-height: 14em; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px 24px; margin-top: 18px; }
.pair > div { background: var(--panel); border-radius: 8px; padding: 14px 18px 16px; min-width: 0; }
.tokens.prompt span { color: var(--soft); } .tokens.chosen span { color: var(--chosen); }
.tokens.rejected span { color: var(--rejected); } .tokens span:hover { background: var(--line); }
.tokens b { font-weight: 650; }
.pair h3.chosen { color: var(--chosen); } .pair h3.rejected { color: var(--rejected); }
@media (max-width: 900px) { .charts.three { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 720px) {
  main { padding: 36px 20px 64px; }
  .config { columns: 1; }
  .charts, .charts.three, .pair { grid-template-columns: minmax(0, 1fr); }
  dl { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px 24px; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --panel: #fff; --ink: #000; --soft: #444; --faint: #777; --line: #ccc; }
  :root { --accent: #3457c9; --chosen: #0b7f74; --rejected: #c8501c; --warn: #9a4a00; }
  main { max-width: none; padding: 0 12px 0 0; }
  section { margin-top: 28px; }
  body { font-size: 12px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .pair > div, .headline > div, dl > div { break-inside: avoid; }
  h2, .lead, .prompt { break-after: avoid; }
  dl, .charts.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .headline { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 16px; }
  .headline .big { font-size: 18px; }
  .charts, .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .said { max-height: none; overflow: visible; }
  .pair > div { border: 1px solid var(--line); }
  .scroll { overflow: visible; }
  details:not([open]) { display: none; }
}
"""
