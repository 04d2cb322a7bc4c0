"""Line charts and histograms as HTML and inline SVG: no scripts needed, no assets, light and dark by CSS variables.

The SVG holds only the curves and stretches to any width (`preserveAspectRatio="none"`, strokes that do not scale); the
labels are HTML, placed in percent, so that text keeps its size on a phone and on a wide screen. How a line is drawn
says what it is, on every chart: training batches are thin, with a running mean; held-out pairs are dots, joined.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from dpo_jax.report.html import text

MAX_POINTS = 500  # drawn per line; more would not be seen at these widths
SMOOTH_FROM = 60  # records from which a running mean is drawn over the single values

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    name: for the legend; None leaves the line out of it.
    color: a CSS variable of the page, such as "accent" or "run-3".
    points: (step, value); a value that is not finite breaks the line.
    held_out: drawn with dots, over the training lines.
    errors: standard error by step, drawn as a whisker.
    exact: not noisy, so no running mean.
    """

    name: str | None
    color: str
    points: Sequence[tuple[float, float | None]]
    held_out: bool = False
    errors: Mapping[float, float] = field(default_factory=dict)
    exact: bool = False


@dataclass(frozen=True)
class Scale:
    """Data coordinates to thousandths of the plot, origin at the top left."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> str:
        """The SVG coordinates of a point."""
        return f"{self.across(x) * 10:.1f} {self.down(y) * 10:.1f}"

    def across(self, x: float) -> float:
        """Percent from the left."""
        return 100 * (x - self.x[0]) / (self.x[1] - self.x[0])

    def down(self, y: float) -> float:
        """Percent from the top."""
        return 100 * (self.y[1] - y) / (self.y[1] - self.y[0])


def chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    guide: tuple[float, str] | None = None,
    from_zero: bool = False,
    small: bool = False,
) -> str:
    """A figure of the lines; empty if no line has a finite point.

    Args:
      title: what is drawn.
      series: the lines; those of held-out data go on top.
      note: one line under the chart.
      guide: a value worth comparing with, and its name: (0.5, "chance").
      from_zero: the vertical axis starts at zero.
      small: a lower plot.
    """
    lines = [(s, list(finite(s.points))) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y + side * s.errors.get(x, 0.0) for s, points in lines for x, y in points for side in (-1, 1)]
    lows = [*ys, *([guide[0]] if guide else []), *([0.0] if from_zero else [])]
    scale = Scale(x=(min(0.0, *xs), max(*xs, min(xs) + 1)), y=_padded(min(lows), max(lows), from_zero))
    drawn = "".join(_draw(s, points, scale) for s, points in sorted(lines, key=lambda line: line[0].held_out))
    named = [(s, points) for s, points in lines if s.name is not None]
    key = "".join(_key(s, label(points[-1][1])) for s, points in named)
    shown = [points for _, points in named]
    return _figure(title, drawn, scale, shown, key=key, axes=_axes(scale, guide), note=note, small=small)


def histogram(
    title: str, series: Sequence[Series], width: float, *, unit: str, note: str = "", small: bool = False
) -> str:
    """A figure of counts in bins of equal width; empty if nothing is counted.

    Args:
      title: what is counted.
      series: points are (middle of a bin, count), from left to right, drawn as steps over one another.
      width: of a bin, in `unit`.
      unit: of the horizontal axis, shown under the pointer, such as "tokens".
      note: one line under the chart.
      small: a lower plot.
    """
    lines = [(s, list(finite(s.points))) for s in series]
    lines = [(s, points) for s, points in lines if any(y for _, y in points)]
    if not lines:
        return ""
    xs, most = [x for _, points in lines for x, _ in points], max(y for _, points in lines for _, y in points)
    scale = Scale(x=(min(xs) - width / 2, max(xs) + width / 2), y=(0.0, most * 1.06))
    drawn = "".join(f'<g style="color:var(--{s.color})">{_steps(points, width, scale)}</g>' for s, points in lines)
    key = "".join(_key(s, "") for s, _ in lines if s.name is not None)
    shown = [points for s, points in lines if s.name is not None]
    return _figure(title, drawn, scale, shown, key=key, axes=_axes(scale, None), note=note, small=small, unit=unit)


def _figure(
    title: str,
    drawn: str,
    scale: Scale,
    shown: Sequence[Sequence[Point]],
    *,
    key: str,
    axes: str,
    note: str,
    small: bool,
    unit: str = "step",
) -> str:
    """The HTML around curves; `shown` is what the page's script reads out under the pointer."""
    return (
        f'<figure class="chart{" small" if small else ""}" data-domain="{scale.x[0]:g} {scale.x[1]:g}"'
        f' data-unit="{text(unit)}" data-series="{_hover_data(shown)}">'
        f'<figcaption><h3>{text(title)}</h3><p class="key">{key}</p></figcaption>'
        f'<div class="plot">{axes}'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{text(title)}">'
        f'{drawn}</svg><i class="rule"></i></div>' + (f'<p class="note">{text(note)}</p>' if note else "") + "</figure>"
    )


def finite(points: Sequence[tuple[float, float | None]]) -> list[Point]:
    """The points that have a finite value."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's text: 0.25, 12,000, 5e-7."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    shown = f"{value:.4g}"
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].replace("+", ""), shown).replace("-", "−")


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points that keep every peak: the lowest and the highest of each stretch, in order."""
    if len(points) <= limit:
        return list(points)
    width = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over 1/30 of the points on each side, over fewer near the ends; where there are too few, none is given.

    Always as many on one side as on the other, so that a straight line stays where it is.
    """
    sums = [0.0, *accumulate(y for _, y in points)]
    reach = max(len(points) // 30, 2)
    smooth = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        if side >= reach / 2:
            smooth.append((x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return smooth


def _padded(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if from_zero and low >= 0 else low - room), high + room


def _path(points: Sequence[Point], scale: Scale, style: str) -> str:
    return f'<path class="{style}" d="M{"L".join(scale.at(x, y) for x, y in points)}"/>'


def _steps(points: Sequence[Point], width: float, scale: Scale) -> str:
    """The outline of a histogram, filled, from its first bin to its last."""
    corners = [(x + side * width / 2, y) for x, y in points for side in (-1, 1)]
    ends = [(corners[0][0], 0.0), *corners, (corners[-1][0], 0.0)]
    return f'<path class="steps" d="M{"L".join(scale.at(x, y) for x, y in ends)}Z"/>'


def _draw(series: Series, points: list[Point], scale: Scale) -> str:
    if series.held_out:
        whiskers = "".join(
            f"M{scale.at(x, y - series.errors[x])}L{scale.at(x, y + series.errors[x])}"
            for x, y in points
            if x in series.errors
        )
        # A line of no length with round ends is a dot that the stretched SVG does not squash.
        dots = "".join(f"M{scale.at(x, y)}h0" for x, y in points)
        marks = _path(thin(points), scale, "held") + f'<path class="dots" d="{dots}"/>'
        marks += f'<path class="whisker" d="{whiskers}"/>' if whiskers else ""
    elif len(points) >= SMOOTH_FROM and not series.exact:
        marks = _path(thin(points), scale, "raw") + _path(thin(running_mean(points)), scale, "mean")
    elif len(points) > 1:
        marks = "".join(_path(part, scale, "mean") for part in _unbroken(series.points))
    else:
        marks = f'<path class="dots" d="M{scale.at(*points[0])}h0"/>'
    return f'<g style="color:var(--{series.color})">{marks}</g>'


def _unbroken(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    parts: list[list[Point]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [part for part in parts if part]


def _axes(scale: Scale, guide: tuple[float, str] | None) -> str:
    rows = [(scale.down(y), label(y)) for y in ticks(*scale.y, 5)]
    columns = [(scale.across(x), label(x)) for x in ticks(*scale.x, 5) if x == round(x)]
    marks = [f'<i class="grid" style="top:{at:.2f}%"></i><b class="y" style="top:{at:.2f}%">{t}</b>' for at, t in rows]
    marks += [f'<b class="x" style="left:{at:.2f}%">{t}</b>' for at, t in columns]
    if guide:
        value, name = guide
        marks.append(f'<i class="guide" style="top:{scale.down(value):.2f}%"><em>{text(name)}</em></i>')
    return "".join(marks)


def _key(series: Series, value: str) -> str:
    kind = "dot" if series.held_out else "line"
    return (
        f'<span><i class="{kind}" style="color:var(--{series.color})"></i>{text(series.name or "")}'
        f" <output>{value}</output></span>"
    )


def _hover_data(lines: Sequence[Sequence[Point]]) -> str:
    short = [[[x, float(f"{y:.5g}")] for x, y in thin(points)] for points in lines]
    return text(json.dumps(short, separators=(",", ":")))
