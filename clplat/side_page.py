"""comparison.html: several studies side by side, as one file that opens without a network."""

from __future__ import annotations

import html
from pathlib import Path

from clplat.comparison_figures import Panel, paired_differences, rank_figure
from clplat.html_parts import document, heading, picture, small, table
from clplat.page import report_folder
from clplat.page_figures import clear
from clplat.side_by_side import SideBySide, difference_rows, score_rows, side_finding, side_notes
from clplat.storage import writing


def write_side_page(side: SideBySide, folder: Path) -> Path:
    """Write comparison.html into `folder`, and its figures as PNG and SVG into `figures`."""
    title, what = " · ".join(side.studies), "study" if side.shared else "stream"
    folders = [f"{column}: {Path(study.folder).name}" for column, study in side.studies.items()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        small(f"{len(side.studies)} studies: {html.escape(', '.join(folders))}"),
        f'<p class="finding">{html.escape(side_finding(side))}</p>',
        *(f'<p class="note">{html.escape(note)}</p>' for note in side_notes(side)),
        heading(f"Final scores by {what}"),
        small("Mean ± 95 % Student t interval over seeds; higher is better. "
              + ("† Reference arm." if side.shared
                 else "Rank 1 is the best mean of a stream. † Reference arms are not ranked.")),
        table(*score_rows(side)),
    ]  # fmt: skip
    if side.baseline:
        parts += [
            heading(f"Differences to {side.baseline} by {what}"),
            small("Paired over seeds; a star marks one at 95 %, for which at least 5 seeds are needed."
                  + ("" if side.shared else " Over streams: a stream's mean difference is one value, and the interval "
                     "is over the streams that have both variants, as many as “better in” counts.")),
            table(*difference_rows(side)),
        ]  # fmt: skip
    page = report_folder(folder) / "comparison.html"
    with writing(folder, "write the report again"):
        clear(folder / "figures")
        drawn = _pictures(side, folder / "figures")
        page.write_text(document(title, [*parts, '<div class="figures">', *drawn, "</div>"]))
    return page


def _pictures(side: SideBySide, folder: Path) -> list[str]:
    numbers = {variant: number for number, variant in enumerate(side.variants())}
    parts, others = [], [v for v in side.variants() if v != side.baseline]
    if side.baseline and others:
        panels = [
            Panel(label=f"{column}\nfinal score − {side.baseline}",
                  by_seed={v: list(side.by_seed(v, column).values()) for v in others},
                  differences={v: side.difference(v, column) for v in others})
            for column in side.studies
        ]  # fmt: skip
        caption = ("Right is better. A grey point is a seed; mean and 95 % interval below, full where the interval, "
                   "of at least 5 seeds, leaves zero out.")  # fmt: skip
        drawn = paired_differences(panels, others, numbers)
        parts.append(picture("Paired differences", "streams", drawn, folder, caption, broad=True))
    found = side.critical_difference()
    if isinstance(found, tuple):
        caption = (f"Two variants differ where their bars do not meet, if Friedman's test says that any do: p = "
                   f"{found[1]:.2g}. Demšar 2006, JMLR 7: Nemenyi's test at 5 %.")  # fmt: skip
        drawn = rank_figure(side.mean_ranks(), found[0], numbers, len(side.studies))
        parts.append(picture("Mean ranks", "ranks", drawn, folder, caption))
    return parts
