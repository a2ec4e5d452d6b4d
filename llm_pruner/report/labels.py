"""Name the points of a plot: labels that neither leave the axes nor meet each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTANCES = (9, 14, 22, 32, 45, 60, 80, 105, 135, 170, 210, 260)  # points between a mark and its label
ANGLES = (45, -45, 135, -135, 0, 180, 90, -90, 22, -22, 158, -158, 67, -67, 113, -113)
NEAR = 18  # from here a thin line leads from a mark to the label's edge
MARK = 6.5  # half the width of a mark, in points
CROSSING = 14  # points of distance that a label takes on to spare a line of the plot
# How much a crowded figure grows, and how far labels may lie from their marks at each size.
GROWTH = ((1.0, 32), (1.25, 45), (1.5, 80), (1.8, 260), (2.4, 260), (3.4, 260))
FONT = 11
Box = tuple[float, float, float, float]  # left, bottom, right, top in points


@dataclass(frozen=True, kw_only=True)
class Label:
    """The name of a point, in data coordinates."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Offset:
    """Place of a label: from its point to its centre, and the distance between point and edge, in points."""

    dx: float
    dy: float
    distance: float


def name_points(figure: Figure, ax: Any, labels: Sequence[Label]) -> None:
    """Label points, in a figure that grows until all labels have a place; freeze its layout."""
    width, height = figure.get_size_inches()
    places: list[Offset] = []
    for factor, reach in GROWTH:
        figure.set_size_inches(width * factor, height * factor)
        figure.draw_without_rendering()
        figure.draw_without_rendering()  # other numbers at the ticks after the first layout need another one
        places = _find_places(figure, ax, labels, reach)
        if len(places) == len(labels):
            break
    figure.set_layout_engine("none")
    for label, place in zip(labels, places, strict=False):
        far = place.distance >= NEAR
        ax.annotate(
            label.text,
            (label.x, label.y),
            xytext=(place.dx, place.dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=FONT,
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.7, "shrinkB": 4} if far else None,
        )


def _find_places(figure: Figure, ax: Any, labels: Sequence[Label], reach: float) -> list[Offset]:
    """Return the offset of each label from its point, up to the first without a place within reach."""
    scale = 72 / figure.dpi
    corners = ax.get_window_extent()
    axes: Box = (corners.x0 * scale + 2, corners.y0 * scale + 2, corners.x1 * scale, corners.y1 * scale)
    points = [tuple(scale * value for value in ax.transData.transform((label.x, label.y))) for label in labels]
    taken: list[Box] = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
    segments = _segments(ax, scale)
    places: list[Offset] = []
    for label, (x, y) in zip(labels, points, strict=True):
        width, height = _size(ax, label.text, scale)
        best: tuple[float, Offset, Box] | None = None
        for offset in _offsets(width, height, reach):
            if best and offset.distance >= best[0]:
                break
            centre_x, centre_y = x + offset.dx, y + offset.dy
            box = (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
            inside = box[0] >= axes[0] and box[1] >= axes[1] and box[2] <= axes[2] and box[3] <= axes[3]
            if inside and not any(_meet(box, other) for other in taken):
                cost = offset.distance + CROSSING * min(2, sum(_crosses(segment, box) for segment in segments))
                if best is None or cost < best[0]:
                    best = cost, offset, box
        if best is None:
            return places
        places.append(best[1])
        taken.append(best[2])
    return places


def _offsets(width: float, height: float, reach: float) -> Iterator[Offset]:
    """Yield offsets of a label, near ones first."""
    for distance in DISTANCES:
        for angle in ANGLES if distance <= reach else ():
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            yield Offset(dx=(distance + width / 2) * cos, dy=(distance + height / 2) * sin, distance=distance)


def _segments(ax: Any, scale: float) -> list[Box]:
    """Return the straight parts of all lines in axes, as x, y, x, y in points."""
    segments = []
    for line in ax.lines:
        corners = [tuple(scale * value for value in xy) for xy in line.get_transform().transform(line.get_xydata())]
        segments += [(*one, *other) for one, other in itertools.pairwise(corners)]
    return segments


def _crosses(segment: Box, box: Box) -> bool:
    """Return True if a straight line meets a box (Liang and Barsky's clipping)."""
    x, y, to_x, to_y = segment
    enter, leave = 0.0, 1.0
    for delta, low, high in ((to_x - x, box[0] - x, box[2] - x), (to_y - y, box[1] - y, box[3] - y)):
        if delta == 0:
            if low > 0 or high < 0:
                return False
            continue
        near, far = sorted((low / delta, high / delta))
        enter, leave = max(enter, near), min(leave, far)
    return enter <= leave


def _size(ax: Any, text: str, scale: float) -> tuple[float, float]:
    """Return the width and height of a label with a margin, in points."""
    probe = ax.text(0, 0, text, fontsize=FONT)
    box = probe.get_window_extent()
    probe.remove()
    return box.width * scale + 4, box.height * scale + 2


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
