"""What all pictures are drawn on."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

COLOURS = {"teacher": "#7f7f7f", "student": "#1f5fa8", "baseline": "#9cc3e6", "scratch": "#e08a3c",
           "assistant": "#5b9a68"}  # fmt: skip
LINES = ("#1f5fa8", "#e08a3c", "#5b9a68", "#a8488c", "#7f7f7f")
DOTS_PER_INCH = 150


@contextmanager
def figure(path: Path, panels: int, *, width: float, height: float, columns: int | None = None, names: bool = False):
    """A grid of panels without chart junk, saved as PNG when the block ends well."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or panels
    rows = -(-panels // columns)
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(rows, columns, squeeze=False, sharey=names).flatten()
    for panel in grid:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    yield grid
    drawing.savefig(path, dpi=DOTS_PER_INCH)
