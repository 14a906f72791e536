"""matplotlib figures as SVG for a page: colours are the page's, so that they follow its light or dark scheme."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .inputs import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins, replaced in the SVG by the page's colours. They differ from any colour that is drawn otherwise.
INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#05050{number}" for number in range(1, 7))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"}
_VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and is as sharp as the page's
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "path.simplify": False,
}


@contextmanager
def canvas(width: float, height: float, rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of inches with `rows` axes that share x. Raises ReportError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("plots need matplotlib; install it with: pip install 'flyray[plots]'") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=72)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
        yield figure, [row[0] for row in axes]


def to_svg(figure: Figure, name: str, about: str) -> Markup:
    """The figure as an <svg> element. name: unique on the page. about: what it shows, for those who do not see it."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several figures stand on one page, where ids must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Sizes in points would be the figure's smallest width; the viewBox keeps its shape.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    title = html.escape(about)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip())
