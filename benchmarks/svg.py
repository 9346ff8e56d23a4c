"""Plots as inline SVG: a few hundred bytes each, sharp at any size, light and dark, tooltips without a script.

Own code and no plotting library: these pages need six plain kinds of plots, and matplotlib would bring fonts as paths, a fixed
background and 30 MB of wheels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a500", "#8a6fd1", "#7f7f7f", "#a0522d")
STYLE = """
svg.plot { width: 100%; max-width: 46rem; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg.plot text { fill: currentColor; } svg.plot .grid { stroke: #8883; } svg.plot .axis { stroke: #888; }
svg.plot .mark { stroke: #cf222e; stroke-dasharray: 4 3; } .legend span { margin-right: 1.1em; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
figure { margin: 1rem 0 1.6rem; } figcaption { font-weight: 600; margin-bottom: .2rem; }
""".strip()
STYLE += "".join(f"\n.c{index} {{ --c: {value}; }}" for index, value in enumerate(COLOURS))
STYLE += """
svg.plot .fill { fill: var(--c); } svg.plot .stroke { stroke: var(--c); fill: none; stroke-width: 2; }
.legend i { background: var(--c); }"""


def colour(index: int) -> str:
    """Class of the index-th series; colours come again after ten."""
    return f"c{index % len(COLOURS)}"


@dataclass(frozen=True)
class Scale:
    """Values low..high to pixels start..end; low > 0 where log."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside: multiples of 1, 2 or 5 times a power of ten; log: 1, 2, 5 in a decade, 1 alone over many."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            digits = (1, 2, 5) if len(decades) <= 4 else (1,)
            if self.high < 10 * self.low:
                digits = (1, 1.5, 2, 3, 4, 5, 7)
            found = [digit * 10.0**power for power in decades for digit in digits]
            return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """1e12 -> 1T, 20000 -> 20k, 0.02 -> 0.02."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if suffix == 'k' else factor):g}{suffix}"
    return f"{value:.10g}" if abs(value) >= 1e-9 else "0"


class Plot:
    """A frame with axes; elements are added in drawing order."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, width: int = 720, height: int = 280, left: int = 62,
        right: int = 14, log_x: bool = False, log_y: bool = False,
    ):  # fmt: skip
        self.width, self.height, self.left, self.right, self.top, self.bottom = width, height, left, right, 10, 42
        self.x = Scale(*_widened(x, log_x), left, width - right, log_x)
        self.y = Scale(*_widened(y, log_y), height - self.bottom, self.top, log_y)
        self.parts: list[str] = []

    def axes(
        self, x_label: str, y_label: str = "", x_ticks: Sequence[tuple[float, str]] | None = None, y_ticks: bool = True
    ) -> None:
        base = self.height - self.bottom
        for value, text in x_ticks if x_ticks is not None else [(tick, tick_text(tick)) for tick in self.x.ticks()]:
            at = self.x(value)
            self.parts.append(f'<path class="grid" d="M{at:.1f} {self.top}V{base}"/>')
            self.text(at, base + 16, text, "middle")
        for value in self.y.ticks() if y_ticks else ():
            at = self.y(value)
            self.parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{self.width - self.right}"/>')
            self.text(self.left - 6, at + 4, tick_text(value), "end")
        self.parts.append(
            f'<path class="axis" fill="none" d="M{self.left} {self.top}V{base}H{self.width - self.right}"/>'
        )
        self.text((self.left + self.width - self.right) / 2, self.height - 6, x_label, "middle")
        if y_label:
            middle = (self.top + base) / 2
            self.parts.append(
                f'<text text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
            )

    def text(self, x: float, y: float, text: str, anchor: str = "start", css: str = "") -> None:
        """At pixels."""
        kind = f' class="{css}"' if css else ""
        self.parts.append(f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], css: str, title: str = "") -> None:
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<path class="stroke {css}" d="M{path}">{_title(title)}</path>')

    def area(
        self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], css: str, title: str
    ) -> None:
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in (*upper, *reversed(lower)))
        self.parts.append(f'<path class="fill {css}" d="M{path}Z">{_title(title)}</path>')

    def point(self, x: float, y: float, css: str, title: str, radius: float = 4.5, hollow: bool = False) -> None:
        kind = "stroke" if hollow else "fill"
        at = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius:g}"'
        self.parts.append(f'<circle class="{kind} {css}" {at}>{_title(title)}</circle>')

    def bar(self, x0: float, x1: float, top_px: float, height_px: float, css: str, title: str) -> None:
        """Horizontal, at least half a pixel wide."""
        start, width = self.x(x0), max(self.x(x1) - self.x(x0), 0.5)
        self.parts.append(
            f'<rect class="fill {css}" x="{start:.1f}" y="{top_px:.1f}" width="{width:.1f}" height="{height_px:.1f}">'
            f"{_title(title)}</rect>"
        )

    def mark_x(self, value: float, title: str) -> None:
        """Dashed line from top to bottom."""
        at = self.x(value)
        self.parts.append(
            f'<path class="mark" d="M{at:.1f} {self.top}V{self.height - self.bottom}">{_title(title)}</path>'
        )

    def figure(self, caption: str, kind: str, legend: Sequence[tuple[str, str]] = ()) -> str:
        """HTML; kind: class of the figure; legend: (class of the colour, name)."""
        names = "".join(f'<span><i class="{css}"></i>{escape(name)}</span>' for css, name in legend)
        return (
            f'<figure class="{kind}"><figcaption>{escape(caption)}</figcaption>'
            + (f'<div class="legend">{names}</div>' if names else "")
            + f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(caption)}">'
            + "".join(self.parts) + "</svg></figure>\n"
        )  # fmt: skip


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _widened(limits: tuple[float, float], log: bool) -> tuple[float, float]:
    """A range that is never empty, so that one value can be drawn too."""
    low, high = limits
    if high > low:
        return low, high
    return (low / 2, low * 2) if log else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)
