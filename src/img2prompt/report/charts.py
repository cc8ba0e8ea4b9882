"""Charts of the report: their geometry, which chart.html draws as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import MaxNLocator

# In user units, of which a page shows one as about a pixel, so that text can be read on any screen.
WIDTH, RIGHT, BOTTOM = 360, 14, 38
HEIGHT, TOP, LEFT = 230, 24, 46  # of a chart with numbers on its vertical axis, whose label is above it
ROW, NAMED_TOP, NAMED_LEFT = 26, 8, 82  # of one with names there


@dataclass(frozen=True)
class Line:
    """A line of a chart, or points, in the units of the axes.

    x, y: on an axis of names, their numbers from 0. style: a class of page.css. low, high: the ends of intervals around
    y or, where the vertical axis has names, around x. joined: whether a line leads from point to point. dots: whether
    the points are drawn. legend: what the legend calls this line and others of its style; None: its name.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    joined: bool = True
    dots: bool = True
    legend: str | None = None


@dataclass(frozen=True)
class Chart:
    """A chart that is ready to be drawn, all places in user units.

    about: what it shows, in a sentence, also for those who cannot see it. x_ticks, y_ticks, marks (vertical lines):
    place and label. drawn: of each line its style, path, dots (x, y) and intervals (x, y, x, y). legend: one line of
    each style, with its name. figures: rows of cells, the first the head, of the lines that share the first one's x.
    """

    title: str
    about: str
    x_label: str
    y_label: str
    left: float
    top: float
    height: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]
    drawn: list[dict[str, object]]
    legend: list[tuple[Line, str]]
    figures: list[list[str]]
    width: float = field(default=WIDTH, init=False)
    right: float = field(default=WIDTH - RIGHT, init=False)
    bottom: float = field(default=BOTTOM, init=False)


class _Axis:
    """From values, or the numbers of names, to user units."""

    def __init__(self, values: Sequence[float], start: float, end: float, names: Sequence[str]) -> None:
        self._units = (start, end)
        if names:
            self._ends = (-0.5, len(names) - 0.5)
            self.ticks = [(self(number), name) for number, name in enumerate(names)]
            return
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        margin = (high - low) / 20 or 0.05
        self._ends = (low - margin, high + margin)
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*self._ends)
        self.ticks = [(self(tick), f"{tick:.10g}") for tick in ticks if self._ends[0] <= tick <= self._ends[1]]

    def __call__(self, value: float) -> float:
        return round(float(np.interp(value, self._ends, self._units)), 1)


def chart(
    title: str,
    about: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    marks: Mapping[str, float] | None = None,
    x_names: Sequence[str] = (),
    y_names: Sequence[str] = (),
    reach: Sequence[float] = (),
) -> Chart:
    """Lay out lines, one point of them at least; an axis has numbers, or the names that are given.

    marks: by label, the values on the horizontal axis where vertical lines stand. y_names: the first is at the top.
    reach: values that the horizontal axis takes in as well, so that several charts can have the same.
    """
    marks = marks or {}
    left, top, height = LEFT, TOP, HEIGHT
    if y_names:
        left, top, height = NAMED_LEFT, NAMED_TOP, NAMED_TOP + ROW * len(y_names) + BOTTOM
    across = [*(v for line in lines for v in line.x), *marks.values(), *reach]
    along = [v for line in lines for v in line.y]
    for line in lines:
        (across if y_names else along).extend([*line.low, *line.high])
    x_axis = _Axis(across, left, WIDTH - RIGHT, x_names)
    y_axis = _Axis(along, *((top, height - BOTTOM) if y_names else (height - BOTTOM, top)), y_names)
    drawn = []
    for line in lines:
        dots = [(x_axis(x), y_axis(y)) for x, y in zip(line.x, line.y, strict=True)]
        ends = list(zip(dots, line.low, line.high, strict=False))  # none where a line has no intervals
        across_names = [(x_axis(low), y, x_axis(high), y) for (_, y), low, high in ends if np.isfinite(low)]
        upright = [(x, y_axis(low), x, y_axis(high)) for (x, _), low, high in ends if np.isfinite(low)]
        path = "M" + "L".join(f"{x},{y}" for x, y in dots) if line.joined and len(dots) > 1 else ""
        intervals = across_names if y_names else upright
        drawn.append({"style": line.style, "path": path, "dots": dots if line.dots else [], "intervals": intervals})
    alike = [line for line in lines if list(line.x) == list(lines[0].x) and not y_names]
    figures = [[x_label, *(line.name for line in alike)]]
    for x, *values in zip(lines[0].x, *(line.y for line in alike), strict=True) if alike else ():
        figures.append([x_names[int(x)] if x_names else f"{x:g}", *(f"{value:.4f}" for value in values)])
    return Chart(
        title,
        about,
        x_label,
        y_label,
        left,
        top,
        height,
        x_axis.ticks,
        y_axis.ticks,
        [(x_axis(value), label) for label, value in marks.items()],
        drawn,
        list({line.style: (line, line.legend or line.name) for line in lines}.values()),
        figures if alike else [],
    )
