"""Which figures a study's report has: each is drawn where it has something to say, and a sentence says what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clplat import figures
from clplat.comparison_figures import COST_RANGE, Ablated, Panel, ablation_bars, paired_differences, score_and_costs
from clplat.dominance import pareto
from clplat.html_parts import picture
from clplat.metrics import Interval, differences, paired
from clplat.report import mean_scores
from clplat.study_results import StudyResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETTER = {"final_score": "right is better", "final_forgetting": "left is better", "learning_score": "right is better"}
"""What variants are compared by seed in, and which way is better."""
NAMES = (
    "paired", "ablation", "cost", "learned_and_lost", "forgetting", "heat_maps", "final_scores", "streams", "ranks",
)  # fmt: skip
"""Files of figures, of which an earlier report may have left some that this one has not."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure with its title, its file's name and what it says."""

    title: str
    name: str
    figure: Figure
    caption: str
    broad: bool = False


def pictures(study: StudyResults, baseline: str | None, folder: Path) -> dict[str, str]:
    """The report's figures as HTML by title, written into `folder` as PNG and SVG too."""
    clear(folder)
    finished = [variant for variant in study.variants() if study.scores(variant)]
    if not finished:
        return {}
    several = [v for v in finished if study.forgetting(v)]
    drawn = [*_compared(study, finished, baseline), *_of_forgetting(study, finished, several),
             *_by_task(study, finished, several)]  # fmt: skip
    return {d.title: picture(d.title, d.name, d.figure, folder, d.caption, broad=d.broad) for d in drawn}


def clear(folder: Path) -> None:
    """Take away the figures of an earlier report."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)


def _compared(study: StudyResults, finished: Sequence[str], baseline: str | None) -> list[Drawn]:
    """Differences to the baseline, their parts, and what scores cost."""
    found = []
    numbers = {variant: number for number, variant in enumerate(finished)}
    others = [v for v in finished if v != baseline] if baseline in finished else []
    panels = [panel for metric in BETTER if (panel := _panel(study, metric, baseline, others))] if baseline else []
    if panels and max(d.n for d in panels[0].differences.values()) > 1:
        caption = ("A grey point is a seed: the variant's score minus the baseline's at the same seed, with the same "
                   "first weights and data order. Mean and 95 % interval below; full where the interval, of at least "
                   "5 seeds, leaves zero out.")  # fmt: skip
        found.append(Drawn(title=f"Differences to {baseline}", name="paired", caption=caption, broad=len(panels) > 1,
                           figure=paired_differences(panels, others, numbers)))  # fmt: skip
    parts = [_ablated(study, variant, baseline) for variant in others if baseline]
    parts = [part for part in parts if np.isfinite(part.total.mean)]
    if len(parts) > 1 and baseline:
        caption = (
            "Sorted. The final score is what tasks scored right after their training plus what they gained or lost "
            "since, so a difference has two parts; grey where an arm has no score after each task."
        )
        found.append(Drawn(title="Where the differences come from", name="ablation", caption=caption,
                           figure=ablation_bars(parts, baseline)))  # fmt: skip
    return found + _cost(study, finished)


def _panel(study: StudyResults, metric: str, baseline: str, others: Sequence[str]) -> Panel | None:
    """A metric's differences to the baseline; None where no variant has one."""
    base = study.by_seed(baseline, metric)
    ours = {variant: study.by_seed(variant, metric) for variant in others}
    gaps = {variant: paired(values, base) for variant, values in ours.items()}
    if not any(gap.n for gap in gaps.values()):
        return None
    by_seed = {variant: list(differences(values, base).values()) for variant, values in ours.items()}
    label = f"{metric.replace('_', ' ')} − {baseline}\n({BETTER[metric]})"
    return Panel(label=label, by_seed=by_seed, differences=gaps)


def _ablated(study: StudyResults, variant: str, baseline: str) -> Ablated:
    total, learned, kept = (
        paired(study.by_seed(variant, metric), study.by_seed(baseline, metric))
        for metric in ("final_score", "learning_score", "backward_transfer_trace")
    )
    known = learned.n == kept.n == total.n
    return Ablated(variant=variant, total=total, learned=learned.mean if known else np.nan,
                   kept=kept.mean if known else np.nan)  # fmt: skip


def costs_of(study: StudyResults, variants: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """The costs in which variants differ, under the names that a figure gives them."""
    names = {"cost/training_flops": "training operations", "cost/buffer_bytes": "replay memory in bytes",
             "cost/training_seconds": "training seconds"}  # fmt: skip
    if not any(study.interval(v, "cost/training_flops").mean > 0 for v in variants):
        names = {"cost/steps": "optimizer steps"} | {name: names[name] for name in list(names)[1:]}
    found = {label: {v: study.interval(v, name) for v in variants} for name, label in names.items()}
    return {label: values for label, values in found.items() if _spread(values)}


def _spread(values: Mapping[str, Interval]) -> bool:
    means = np.array([value.mean for value in values.values() if np.isfinite(value.mean)])
    return len(means) > 1 and means.max() > 1.01 * means.min()


def _cost(study: StudyResults, finished: Sequence[str]) -> list[Drawn]:
    """Score against costs; nothing where there is one variant, or none costs more than another."""
    costs = costs_of(study, finished)
    if not costs:
        return []
    scores = {v: study.interval(v, "final_score") for v in finished}
    references = [v for v in finished if study.is_reference(v)]
    free = [v for v in finished if v not in references]
    fronts = "; ".join(f"by {cost}: {', '.join(on_front(scores, values, free))}" for cost, values in costs.items())
    caption = f"The broken line is the front of who, by the means, is beaten by nobody in both. On it {fronts}."
    caption += " Hollow: reference arms, which are left out of it." if references else ""
    caption += _cut([(v, COST_RANGE) for values in costs.values() for v in values.values()],
                    [(v, figures.possible(list(scores.values()))) for v in scores.values()])  # fmt: skip
    if "training operations" in costs:
        caption += (" Operations are those of training steps; passes that a strategy makes between tasks, such as "
                    "EWC's, are not among them.")  # fmt: skip
    return [Drawn(title="Score and cost", name="cost", caption=caption, broad=len(costs) > 1,
                  figure=score_and_costs(scores, costs, references))]  # fmt: skip


def _cut(*drawn: Sequence[tuple[Interval, tuple[float, float]]]) -> str:
    """A sentence where intervals were cut at what values can be; empty where none was."""
    if not any(figures.is_cut(found, limits) for group in drawn for found, limits in group):
        return ""
    return " An interval without an end mark is cut there: it goes on beyond what the value can be."


def on_front(scores: Mapping[str, Interval], costs: Mapping[str, Interval], variants: Sequence[str]) -> list[str]:
    """Who of them no other beats in score and cost, by their means; the cheapest first."""
    known = [v for v in variants if np.isfinite(scores[v].mean + costs[v].mean)]
    kept = pareto([(costs[v].mean, scores[v].mean) for v in known], (-1, 1))
    return sorted((v for v, on in zip(known, kept, strict=True) if on), key=lambda v: costs[v].mean)


def _of_forgetting(study: StudyResults, finished: Sequence[str], several: Sequence[str]) -> list[Drawn]:
    """All variants are passed to each figure, so that each has one look throughout the page."""
    if not several:
        return []
    found = []
    lost = {v: (study.interval(v, "final_forgetting"), study.interval(v, "learning_score")) for v in finished}
    if any(np.isfinite(forgetting.mean + learned.mean) for forgetting, learned in lost.values()):
        caption = "Right and low is best. Far left and low stands who kept what it had by learning little."
        learned = [learned for _, learned in lost.values()]
        caption += _cut([(one, figures.possible(learned)) for one in learned])
        found.append(Drawn(title="Learned and forgotten", name="learned_and_lost", caption=caption,
                           figure=figures.learned_and_lost(lost)))  # fmt: skip
    caption = "Mean over the tasks that ended before; the shade is the range over seeds."
    curves = figures.forgetting_curves({v: study.forgetting(v) for v in finished})
    return [*found, Drawn(title="Forgetting", name="forgetting", caption=caption, figure=curves)]


def _by_task(study: StudyResults, finished: Sequence[str], several: Sequence[str]) -> list[Drawn]:
    tasks = {variant: study.tasks(variant) for variant in finished}
    bars = {variant: {task: study.final(variant, task) for task in names} for variant, names in tasks.items()}
    tables = figures.heat_maps(mean_scores(study, several or finished), tasks)
    caption = "Rows: after which task. Columns: the score of which task. Framed: right after its own training."
    return [
        Drawn(title="Result tables", name="heat_maps", caption=caption, figure=tables, broad=True),
        Drawn(title="Final scores by task", name="final_scores", figure=figures.final_scores(bars), broad=True,
              caption="After the last task; mean and 95 % interval over seeds, cut at what scores can be."),
    ]  # fmt: skip


def few_points(study: StudyResults) -> str:
    """Why there is no figure of forgetting, or one without lines; empty where there is nothing to say."""
    several = [v for v in study.variants() if study.forgetting(v)]
    if not any(study.scores(variant) for variant in study.variants()):
        return ""
    if not several:
        return "No figure of forgetting: no run was trained on two tasks or more, one after another."
    if all(len(places) < 2 for variant in several for places, _ in study.forgetting(variant)):
        return ("Two tasks give each arm one point of forgetting, after the second; with evaluation.every, runs are "
                "scored inside tasks too, and points become lines.")  # fmt: skip
    return ""
