"""What pages of results are made of: one style, tables, and figures drawn into the page. No page loads anything."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
h2, figure { scroll-margin-top: 1rem }
nav { margin: .6rem 0 1rem; font-size: .9rem } nav a { margin-right: 1rem; color: #005a8c }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }
th, td { padding: .35rem .55rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
th { font-weight: 600; border-bottom: 2px solid #888 } tbody tr:hover td { background: #f2f6fa }
.finding { font-size: 1.05rem; background: #f2f6fa; padding: .8rem 1rem; border-left: 4px solid #0072B2 }
.figures { display: flex; flex-wrap: wrap; gap: 0 2.5rem } figure { flex: 1 1 26rem; max-width: 42rem; margin: 0 }
figure.broad { flex-basis: 100%; max-width: 100% } figure.broad .drawn { overflow-x: auto }
figcaption { color: #444; font-size: .88rem; max-width: 42rem; margin-top: .3rem }
.note { color: #8a3b00; margin: .4rem 0 }
.wide { overflow-x: auto; background: /* a shadow at the right edge while there is more to scroll to */
  linear-gradient(to left, #fff 40%, #fff0) right / 3rem 100% no-repeat local,
  linear-gradient(to left, #0003, #0000) right / 1rem 100% no-repeat scroll }
.small { color: #555; max-width: 60rem }
svg { max-width: 100%; height: auto } @media (max-width: 40rem) { figure.broad svg { min-width: 34rem }
  body { margin: .5rem auto } }
@media print { nav { display: none } figure { break-inside: avoid } }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def heading(title: str) -> str:
    """A section's title, which `contents` can lead to."""
    return f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>'


def contents(titles: Sequence[str]) -> str:
    """Links to sections of the page."""
    links = (f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title in titles)
    return f"<nav>{''.join(links)}</nav>"


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def small(text: str) -> str:
    """A sentence in small letters; `text` is HTML."""
    return f'<p class="small">{text}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, which scrolls by itself where the window is narrow."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(title: str, name: str, figure: Figure, folder: Path, caption: str = "", *, broad: bool = False) -> str:
    """The figure for the page, and in `folder` as NAME.png and NAME.svg; its caption is read out for it too."""
    figure.savefig(folder / f"{name}.png", dpi=150)
    drawn = inline(figure, folder / f"{name}.svg")
    told = html.escape(f"{title}. {caption}", quote=True)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{told}" ', 1)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    kind = ' class="broad"' if broad else ""
    return f'<figure{kind}>{heading(title)}<div class="drawn">{drawn}</div>{below}</figure>'


def inline(figure: Figure, path: Path) -> str:
    """The figure as SVG text; text stays text, so that the page can be searched."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    path.write_text(text)
    return text[text.index("<svg") :]
