"""What every page of fp-bench shares: one file that works offline, its style, tables and numbers."""

from __future__ import annotations

import math
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; } th { font-weight: 600; } th small { font-weight: 400; opacity: .7; }
tr.main td { font-weight: 600; background: var(--soft); }
.met { color: #1a7f37; } .missed { color: #cf222e; } .status { font-weight: 600; white-space: nowrap; }
@media (prefers-color-scheme: dark) { .met { color: #57c774; } .missed { color: #ff8580; } }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } p.note { opacity: .75; max-width: 60rem; }
""".strip()


def html_document(title: str, body: str, style: str = "") -> str:
    """title: text; body: HTML that refers to nothing outside."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}
{style}</style></head><body>
{body}
</body></html>
"""


def html_table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """head: cells of HTML; rows: (class, cells of HTML). The last cell of a short row fills it."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = []
    for css, cells in rows:
        *others, last = cells
        rest = len(head) - len(others)
        wide = f' class="text" colspan="{rest}"' if rest > 1 else ""
        line = "".join(f"<td>{cell}</td>" for cell in others) + f"<td{wide}>{last}</td>"
        body.append(f'<tr class="{css}">{line}</tr>\n')
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{"".join(body)}</tbody></table></div>\n'


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """0.01234 -> 0.0123, 123.4 -> 123, 12345 -> 12345: never an exponent."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def binary(count: float | None) -> str:
    """Bytes -> 512 B, 4.0 MiB."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return (
                f"{count:.0f} {unit}"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 1000
                else f"{count:.0f} {unit}"
            )
        count /= 1024
    raise AssertionError


def metric_prefix(value: float | None, unit: str) -> str:
    """1.52e11, "FLOP" -> 152 GFLOP."""
    if value is None:
        return "–"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {prefix}{unit}"
    return f"{significant(value)} {unit}"
