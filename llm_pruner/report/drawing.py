"""One style for all figures, and their images: SVG in the page; SVG, PNG and PDF for slides and papers."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart. Markers and lines tell them apart in grey.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GREY, PALE = "#777777", "#BBBBBB"
SIZE = (6.4, 4.2)  # inches; half a slide at this size reads well with 12 points
STYLE = {
    "font.size": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.pad": 7,  # powers are tall, and must not meet the lowest number of the other axis
    "ytick.major.pad": 5,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # a name with dollars is a name
}


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """Colour, marker and dashes of a method in every figure of a report."""

    colour: str
    marker: str
    line: Any
    hollow: bool = False

    @property
    def marking(self) -> dict[str, Any]:
        face = "none" if self.hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "markeredgewidth": 1.6}


ORIGINAL_STYLE = LineStyle(colour=GREY, marker="s", line=(0, (4, 2)))


def styles_of(names: Iterable[str]) -> dict[str, LineStyle]:
    """Return a style for each method; ``X + something`` has the colour of X, with hollow markers."""
    bases: dict[str, int] = {}
    styles = {}
    for name in names:
        base, _, later = name.partition(" + ")
        i = bases.setdefault(base, len(bases))
        styles[name] = LineStyle(
            colour=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            line=LINES[i % len(LINES)],
            hollow=bool(later),
        )
    return styles


@dataclass
class Drawing:
    """A figure, its description for readers who cannot see it, and its tooltips.

    Attributes:
        name: name of its files, and prefix of its ids in a page.
        alt: description.
        tips: tooltip by the ``gid`` of the artist that it belongs to.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Any, text: str) -> None:
        """Give an artist a tooltip."""
        gid = f"tip{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def write(self, to: Path | io.StringIO | io.BytesIO, form: str, **options: Any) -> None:
        """Write an image; the same figure gives the same bytes."""
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        metadata = {"Title": self.title, **dates.get(form, {})}
        with drawing_settings({"svg.hashsalt": self.name, "pdf.fonttype": 42}):
            self.figure.savefig(to, format=form, metadata=metadata, **options)

    def svg(self) -> str:
        """Return an ``<svg>`` element for a page with others: its ids are unique, its text is text."""
        buffer = io.StringIO()
        with drawing_settings({"svg.fonttype": "none"}):
            self.write(buffer, "svg", transparent=True)
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = re.sub(r"(?<=[ \"(]-|.[ \"(,])\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", svg)
        svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{self.name}-", svg)
        for gid, text in self.tips.items():
            anchor = f'id="{self.name}-{gid}"'
            svg = svg.replace(f"{anchor}>", f'{anchor} class="tip"><title>{escape(text)}</title>', 1)
        box = re.search(r'viewBox="[^"]*"', svg)
        assert box is not None
        label = f'role="img" tabindex="0" aria-label="{escape(self.alt)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
        width = f'style="max-width: {self.figure.get_figwidth():.1f}in"'
        return f'<svg class="figure" {label} {width} {box[0]}>' + svg[svg.index(">") + 1 :]


@contextmanager
def new_axes() -> Iterator[tuple[Figure, Any]]:
    """Draw in the style of reports within the block, on the axes of a new figure.

    Only the extra ``report`` brings matplotlib, so functions import it, not the module.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with drawing_settings(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()


@contextmanager
def bar_axes(groups: Sequence[int], bars: int) -> Iterator[tuple[Figure, list[Any]]]:
    """Draw as :func:`new_axes` does, on axes one above the other for so many groups of horizontal bars each."""
    with new_axes() as (figure, ax):
        ax.remove()
        rows = [count * max(1.0, 0.4 * bars) for count in groups]
        figure.set_size_inches(SIZE[0], 1.4 * len(groups) + 0.36 * sum(rows))
        yield figure, list(figure.subplots(len(groups), squeeze=False, height_ratios=rows)[:, 0])


def draw_level(ax: Any, y: float) -> None:
    """Draw the level of an unpruned model."""
    ax.axhline(y, color=GREY, linewidth=1.4, linestyle=ORIGINAL_STYLE.line, zorder=1)


def drawing_settings(values: Any) -> AbstractContextManager[None]:
    """Return a block in which matplotlib draws with these settings; ``STYLE`` is that of reports."""
    import matplotlib

    return matplotlib.rc_context(values)


def add_legend(figure: Figure, handles: list[Any]) -> None:
    """Put a legend above the axes, in as many columns as fit."""
    for columns in range(min(len(handles), 4), 0, -1):
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def freeze_layout(figure: Figure) -> None:
    """Lay a figure out once: repeating it for every image takes most of the time of a page with many runs."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def slug(text: str) -> str:
    """Return a text as a part of file names and ids.

    >>> slug("perplexity, wikitext2 (tokens/s)")
    'perplexity-wikitext2-tokens-s'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "figure"
