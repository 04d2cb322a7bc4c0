"""Line charts and histograms: their data, which `report/templates/charts.html` draws as HTML and inline SVG.

They need no scripts and no assets, and are light or dark by CSS variables. The SVG holds only the curves and stretches
to any width (`preserveAspectRatio="none"`, strokes that do not scale); the labels are HTML, placed in percent, so that
text keeps its size on a phone and on a wide screen. How a line is drawn tells what it is, on every chart: training
batches are thin, with a running mean; held-out pairs are dots, joined.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

from markupsafe import Markup

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

    def axes(self) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
        """Ticks of the vertical and of the horizontal axis: percent from the top or the left, text."""
        rows = [(self.down(y), label(y)) for y in ticks(*self.y, 5)]
        return rows, [(self.across(x), label(x)) for x in ticks(*self.x, 5) if x == round(x)]


@dataclass(frozen=True)
class Chart:
    """A figure, ready to be drawn.

    scale: of its axes, the horizontal one in `unit`.
    marks: a colour, and (CSS class, SVG path) of what is drawn in it.
    key: of the legend: colour, class of its mark, name, value.
    readout: JSON of the points of each entry of the legend, for the page's script.
    guide: a value worth comparing with, and its name: (0.5, "chance").
    note: one line under the chart.
    small: a lower plot.
    """

    title: str
    scale: Scale
    marks: Sequence[tuple[str, Sequence[tuple[str, Markup]]]]
    key: Sequence[tuple[str, str, str, str]]
    readout: Markup
    guide: tuple[float, str] | None = None
    note: str = ""
    small: bool = False
    unit: str = "step"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    guide: tuple[float, str] | None = None,
    from_zero: bool = False,
    small: bool = False,
) -> Chart | None:
    """A figure of the lines; None if no line has a finite point. See `Chart` for the options.

    Lines of held-out data are drawn last, on top; with `from_zero` the vertical axis starts at zero.
    """
    lines = [(s, points) for s in series if (points := finite(s.points))]
    if not lines:
        return None
    xs = [x for _, points in lines for x, _ in points]
    ys = [y + side * s.errors.get(x, 0.0) for s, points in lines for x, y in points for side in (-1, 1)]
    lows = [*ys, *([guide[0]] if guide else []), *([0.0] if from_zero else [])]
    scale = Scale(x=(min(0.0, *xs), max(*xs, min(xs) + 1)), y=_padded(min(lows), max(lows), from_zero))
    on_top = sorted(lines, key=lambda line: line[0].held_out)
    marks = [(s.color, _marks(s, points, scale)) for s, points in on_top]
    key = [_key(s, label(points[-1][1])) for s, points in lines if s.name is not None]
    return Chart(title, scale, marks, key, _readout(lines), guide, note, small)


def histogram_chart(title: str, series: Sequence[Series], width: float, *, unit: str, note: str = "") -> Chart | None:
    """A small figure of counts in bins of equal width; None if nothing is counted.

    Args:
      title, note: see `Chart`.
      series: points are (middle of a bin, count), from left to right, drawn as steps over one another.
      width: of a bin, in `unit`.
      unit: of the horizontal axis, shown under the pointer, such as "tokens".
    """
    lines = [(s, points) for s in series if (points := finite(s.points)) and any(y for _, y in points)]
    if not lines:
        return None
    xs, most = [x for _, points in lines for x, _ in points], max(y for _, points in lines for _, y in points)
    scale = Scale(x=(min(xs) - width / 2, max(xs) + width / 2), y=(0.0, most * 1.06))
    marks = [(s.color, [("steps", _steps(points, width, scale))]) for s, points in lines]
    key = [_key(s, "") for s, _ in lines if s.name is not None]
    return Chart(title, scale, marks, key, _readout(lines), note=note, small=True, unit=unit)


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
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].replace("+", ""), f"{value:.4g}").replace("-", "−")


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points that keep every peak: the lowest and the highest of each stretch, in order."""
    if len(points) <= limit:
        return list(points)
    width = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
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


def _path(points: Sequence[Point], scale: Scale, end: str = "") -> Markup:
    return Markup(f"M{'L'.join(scale.at(x, y) for x, y in points)}{end}")


def _dots(points: Sequence[Point], scale: Scale) -> tuple[str, Markup]:
    # A line of no length with round ends is a dot that the stretched SVG does not squash.
    return "dots", Markup("".join(f"M{scale.at(x, y)}h0" for x, y in points))


def _steps(points: Sequence[Point], width: float, scale: Scale) -> Markup:
    """The outline of a histogram, filled, from its first bin to its last."""
    corners = [(x + side * width / 2, y) for x, y in points for side in (-1, 1)]
    return _path([(corners[0][0], 0.0), *corners, (corners[-1][0], 0.0)], scale, "Z")


def _marks(series: Series, points: list[Point], scale: Scale) -> list[tuple[str, Markup]]:
    if series.held_out:
        ends = [((x, y - e), (x, y + e)) for x, y in points if (e := series.errors.get(x)) is not None]
        whiskers = Markup("".join(_path(pair, scale) for pair in ends))
        return [("held", _path(thin(points), scale)), _dots(points, scale)] + [("whisker", whiskers)] * bool(ends)
    if len(points) >= SMOOTH_FROM and not series.exact:
        return [("raw", _path(thin(points), scale)), ("mean", _path(thin(running_mean(points)), scale))]
    if len(points) > 1:
        parts = groupby(series.points, lambda point: bool(finite([point])))
        return [("mean", _path(finite(list(part)), scale)) for unbroken, part in parts if unbroken]
    return [_dots(points, scale)]


def _key(series: Series, value: str) -> tuple[str, str, str, str]:
    return series.color, "dot" if series.held_out else "line", series.name or "", value


def _readout(lines: Sequence[tuple[Series, Sequence[Point]]]) -> Markup:
    named = [points for series, points in lines if series.name is not None]
    short = [[[x, float(f"{y:.5g}")] for x, y in thin(points)] for points in named]
    return Markup(json.dumps(short, separators=(",", ":")))
