"""A small canvas for charts: SVG as text, the same bytes for the same data, in the colours of the page around it.

A chart drawn by a plotting library brings fixed colours, text turned into outlines, and a second of imports. These
are a few kilobytes, follow the page's light or dark theme through CSS variables, and keep their text selectable.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from html import escape

WIDTH = 520
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# A picture that stands alone (Dagster's metadata) brings the colours that a page would give it.
_LIGHT = (
    "--ink:#1c2024;--dim:#60646c;--grid:#d9d9e0;--a:#8b8d98;--b:#2f6feb;--good:#1a7f4b;--bad:#c62a2f;--warn:#b86e00"
)
_DARK = "--ink:#edeef0;--dim:#a5a9b1;--grid:#43484e;--a:#8b8d98;--b:#6ea8fe;--good:#4cc38a;--bad:#ff7b7f;--warn:#f1a10d"


class Canvas:
    """Shapes in a coordinate system of pixels, origin at the top left."""

    def __init__(self, title: str, height: float, width: float = WIDTH) -> None:
        self.title, self.width, self.height = title, width, height
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, colour: str = "dim", anchor: str = "start", size: float = 12) -> None:
        """Write a line of text, its baseline at ``y``; ``anchor`` is ``start``, ``middle`` or ``end``."""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}"'
            f' fill="var(--{colour})">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str, *, opacity: float = 1) -> None:
        """Fill a rectangle; nothing where it has no extent."""
        if width > 0 and height > 0:
            self._parts.append(
                f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="1.5"'
                f' fill="var(--{colour})"{_opacity(opacity)}/>'
            )

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, width: float = 1, dash: str = "") -> None:
        """Draw a line through points."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="var(--{colour})" stroke-width="{_n(width)}"'
            f' stroke-linejoin="round"{dashed}/>'
        )

    def area(self, points: Sequence[tuple[float, float]], colour: str, *, opacity: float) -> None:
        """Fill a polygon."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._parts.append(f'<polygon points="{path}" fill="var(--{colour})"{_opacity(opacity)}/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        """Draw a filled circle."""
        self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="var(--{colour})"/>')

    def key(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """Write a legend of (colour, words) in one row."""
        for colour, words in entries:
            self.box(x, y - 9, 10, 10, colour)
            self.text(x + 15, y, words)
            x += 15 + 6.3 * len(words) + 18

    def svg(self) -> str:
        """Return the picture for a page that defines the colours."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img"'
            f' font-family="{_FONT}"><title>{escape(self.title)}</title>{"".join(self._parts)}</svg>'
        )


def as_markdown(svg: str) -> str:
    """Return a picture as a markdown image that holds it, for Dagster's metadata; it brings its own colours."""
    title = svg.partition("<title>")[2].partition("</title>")[0]
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(standalone(svg).encode()).decode()})"


def standalone(svg: str) -> str:
    """Return a picture that brings its own colours, for a file or a page that has none."""
    style = f"<style>svg{{{_LIGHT}}}@media (prefers-color-scheme:dark){{svg{{{_DARK}}}}}</style>"
    return svg.replace("<title>", f"{style}<title>", 1).replace("<svg ", f'<svg width="{WIDTH}" ', 1)


def page_colours() -> tuple[str, str]:
    """Return the CSS variables of the light and of the dark theme."""
    return _LIGHT, _DARK


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


class Axis:
    """Maps values from ``low`` to ``high`` onto pixels from ``start`` to ``end``; what is beyond falls on the edge."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> Iterator[tuple[float, float]]:
        """Give round values with their pixels."""
        yield from ((value, self(value)) for value in ticks(self.low, self.high, count))


def _n(value: float) -> str:
    """Write a coordinate to a tenth of a pixel, so that the same data gives the same bytes."""
    return f"{round(value, 1) + 0.0:g}"


def _opacity(opacity: float) -> str:
    return "" if opacity == 1 else f' fill-opacity="{opacity:g}"'
