"""Stills of the figures that a notebook stores, for all who show no plotly: GitHub, PDF, pages without JavaScript.

    python -m obc_tools.plots.stills notebooks/*.ipynb

Widgets bring theirs along when they are shown while the environment variable `WANTED` is set; figures draw none of
their own accord. Needs the extra ``notebook`` and a Chrome or Chromium.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from PIL import Image

from ..files import write_text

PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
WANTED = "OBC_TOOLS_STILLS"
SIZE = (760, 450)
"""Of figures that say none, in pixels."""
COLOURS = 128
"""In a still; more would cost bytes that nobody sees."""


def add_stills(notebook: str | Path) -> int:
    """Put a PNG beside each figure that a notebook stores, in place of one that lies there; return how many.

    The notebook is replaced once all are drawn, or not at all.

    Raises:
        ValueError: if it is no notebook, or no browser is found that draws.
    """
    path = Path(notebook)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        outputs = [output for cell in content["cells"] for output in cell.get("outputs", ())]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is no notebook: {error}") from error
    figures = [output["data"] for output in outputs if PLOTLY in output.get("data", ())]
    with _browser():
        for data in figures:
            data[PNG] = encoded(go.Figure(copy.deepcopy(data[PLOTLY]), skip_invalid=True))
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return len(figures)


def with_still(bundle: dict[str, Any], figure: Callable[[], go.Figure]) -> dict[str, Any]:
    """Return what a widget shows itself as, with the still of the figure that it then has where those are wanted."""
    return bundle | {PNG: encoded(figure())} if os.environ.get(WANTED) else bundle


def encoded(figure: go.Figure) -> str:
    """Return a still as notebooks hold it."""
    return base64.b64encode(still(figure)).decode("ascii")


def still(figure: go.Figure) -> bytes:
    """Return a figure as PNG, of its own size or `SIZE`, on its own background: readable on light and dark pages.

    Raises:
        ValueError: if no browser is found that draws.
    """
    width, height = figure.layout.width or SIZE[0], figure.layout.height or SIZE[1]
    try:
        import kaleido

        drawn = kaleido.calc_fig_sync(figure, opts={"format": "png", "width": width, "height": height, "scale": 1})
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"a still needs kaleido (pip install 'obc_tools[notebook]') and a Chrome or Chromium, which "
            f"plotly_get_chrome installs and BROWSER_PATH names: {' '.join(str(error).split())}"
        ) from error
    buffer = io.BytesIO()
    Image.open(io.BytesIO(drawn)).convert("RGB").quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    ).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@contextmanager
def _browser() -> Iterator[None]:
    """Keep one browser for all figures: starting it takes longer than drawing."""
    try:
        import kaleido
    except ImportError:
        yield  # `still` says what is missing
        return
    kaleido.start_sync_server(silence_warnings=True)
    try:
        yield
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {add_stills(name)} stills")
