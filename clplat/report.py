"""Comparison of a study's variants, read from MLflow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from clplat.errors import ConfigError, nearest
from clplat.journal import ENDED
from clplat.metrics import amount, interval, paired, verdict
from clplat.result_table import Scores
from clplat.study_results import StudyResults

MEASURED = "strategy/"
"""Before the names of what strategies measured."""
SCORES = {
    "final_score": "final score",
    "learning_score": "learning score",
    "final_forgetting": "final forgetting",
    "cumulative_forgetting": "cumulative forgetting",
    "cumulative_forgetting_curve": "forgetting over time",
}
TRANSFER = {
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "intransigence": "intransigence",
}
VIEWED = ("final_score", "learning_score", "final_forgetting")
"""What other views are shown by."""
ABILITY = {
    "answers/final_score": "answers: final score (OP)",
    "answers/learning_score": "learning score (plasticity)",
    "answers/backward_transfer": "BWT, 1/(t−1)",
    "answers/backward_transfer_trace": "BWT, 1/t",
    "ability_delta": "ability delta",
    "ability_delta_nats": "in nats",
}
"""Of question-answer sequences: scores of written answers, and what multiple-choice probes say of general ability."""
COSTS = {
    "cost/buffer_share": ("replay memory", lambda v: f"{v:.1%}"),
    "cost/replay_ratio": ("replay ratio", lambda v: f"{v:.2f}"),
    "cost/steps": ("steps", lambda v: f"{v:.0f}"),
    "cost/samples_per_second": ("samples/s", lambda v: f"{v:,.0f}"),
    "cost/tokens_per_second": ("tokens/s", lambda v: f"{v:,.0f}"),
    "cost/training_seconds": ("train s", lambda v: f"{v:.1f}"),
    "cost/evaluation_seconds": ("eval s", lambda v: f"{v:.1f}"),
    "cost/boundary_seconds": ("between tasks s", lambda v: f"{v:.1f}"),
    "cost/training_flops": ("FLOPs", lambda v: f"{v:.1e}"),
    "cost/peak_memory_bytes": ("peak MiB", lambda v: f"{v / 2**20:.0f}"),
    "cost/parameters": ("parameters", lambda v: f"{v:,.0f}"),
    "cost/active_parameters": ("active", lambda v: f"{v:,.0f}"),
}

READ = "/ppl"
"""How the measurement ends that is the headline of a text that is read: the perplexity of every chunk before it was
learned (`Prequential`), under whatever name the strategy goes in the study."""

TERMINAL = ("final_score", "final_forgetting", "cumulative_forgetting")
TERMINAL_COSTS = (
    "cost/buffer_share", "cost/replay_ratio", "cost/steps", "cost/samples_per_second", "cost/tokens_per_second",
    "cost/training_seconds", "cost/evaluation_seconds",
)  # fmt: skip


def compare_table(study: StudyResults, baseline: str | None = None) -> Group:
    """What a study says, for a terminal of 80 columns: scores, costs, and what to know before comparing."""
    base = baseline_of(study, baseline)
    heads = ["n", *(SCORES[m] for m in TERMINAL), *([f"score − {base}"] if base else [])]
    scores = number_table(f"{study.name}: mean ± 95 % interval over seeds", heads)
    scores.caption = "Score: higher is better; forgetting: lower. † reference arm."
    if any(study.interval(variant, "final_score").mean < 0 for variant in study.variants()):
        scores.caption += "\nScores below zero are losses with their sign turned: a loss of 2 nats is −2."
    shown = [name for name in known_costs(study) if name in TERMINAL_COSTS]
    costs = number_table("costs: means over seeds", [COSTS[name][0] for name in shown])
    for variant in study.variants():
        name = f"{variant} †" if study.is_reference(variant) else variant
        gap = paired(study.by_seed(variant, "final_score"), study.by_seed(base, "final_score")) if base else None
        row = [name, str(len(study.of(variant))), *(str(study.interval(variant, m)) for m in TERMINAL)]
        scores.add_row(*row, *([str(gap) if variant != base else ""] if gap is not None else []))
        costs.add_row(name, *(_cost(study, variant, cost, COSTS[cost][1]) for cost in shown))
    views = [view_table(study)] if any(map(study.views, study.variants())) else []
    tables = [scores, *_reading(study, base), *views, costs]
    for table in tables:
        _keep_whole(table)
    return Group(*tables, *(f"note: {note}" for note in notes(study, base)))


def view_table(study: StudyResults) -> Table:
    """How the same runs score through other views, such as without what memories wrote."""
    table = number_table("other views of the same runs", ["view", *(SCORES[m] for m in VIEWED[::2]), "final − default"])
    for variant in study.variants():
        for view in study.views(variant):
            seen = study.through_view(variant, view)
            shown = [str(interval(list(seen.get(metric, {}).values()))) for metric in VIEWED[::2]]
            apart = paired(seen.get("final_score", {}), study.by_seed(variant, "final_score"))
            table.add_row(variant, view, *shown, str(apart))
    return table


def _reading(study: StudyResults, base: str | None) -> list[Table]:
    """The perplexity of what was read, where a strategy measured it: a study of books is about that."""
    tables = []
    for metric in read_metrics(study):
        title = f"{metric.removeprefix(MEASURED)}: perplexity of every chunk before it was learned"
        table = number_table(title, ["perplexity", *([f"− {base}"] if base else [])])
        table.caption = "Lower is better."
        for variant in study.variants():
            gap = [difference(study, variant, base, metric)] if base else []
            table.add_row(variant, str(study.interval(variant, metric)), *gap)
        tables.append(table)
    return tables


def read_metrics(study: StudyResults) -> list[str]:
    """Names of the perplexities that strategies measured while a text was read, of all its parts together."""
    names = {name for variant in study.variants() for run in study.of(variant) for name in run.metrics}
    return sorted(name for name in names if name.startswith(MEASURED) and name.endswith(READ))


def _keep_whole(table: Table) -> None:
    """Numbers stand on one line, and names are wrapped where there is no room: cut, two could read the same."""
    name, *numbers = table.columns
    name.overflow = "fold"
    for column in numbers:
        words = [*str(column.header).split(), *map(str, column.cells)]
        column.width = max(map(len, words), default=0)


def number_table(title: str, heads: Sequence[str], first: str = "variant") -> Table:
    """A table of numbers by variant, narrow enough that an interval stands on one line of a terminal."""
    table = Table(first, title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.min_width = len(title)
    table.caption_justify = "left"
    for head in heads:
        table.add_column(head, justify="right")
    return table


def known_costs(study: StudyResults) -> list[str]:
    """The costs that any run of the study has; a language stream counts tokens, others samples."""
    return [cost for cost in COSTS if any(study.by_seed(variant, cost) for variant in study.variants())]


def _cost(study: StudyResults, variant: str, name: str, show: Callable[[float], str]) -> str:
    mean = study.interval(variant, name).mean
    return "–" if math.isnan(mean) else show(mean)


def baseline_of(study: StudyResults, baseline: str | None) -> str | None:
    """The variant to compare with: the one asked for, or the study's own; an unknown one is named."""
    base = baseline or study.baseline
    known = {variant for variant, _ in study.planned} | set(study.variants())
    if base is not None and base not in known:
        raise ConfigError(f"baseline: study {study.name!r} has no variant {base!r}{nearest(base, known)}")
    return base


def difference(study: StudyResults, variant: str, base: str, metric: str = "final_score") -> str:
    """Paired difference to the baseline; a star where it is one at 95 %."""
    if variant == base:
        return ""
    found = paired(study.by_seed(variant, metric), study.by_seed(base, metric))
    if not found.n:
        return "–"
    return f"{found}*" if verdict(found) == "difference" else str(found)


def notes(study: StudyResults, baseline: str | None = None) -> list[str]:
    """Missing and failed runs, a baseline that is not there, and budgets that are not equal between compared arms."""
    found = _unfinished(study)
    if pruned := [run for run in study.runs if run.status == "PRUNED"]:
        found.append(f"{len(pruned)} runs were pruned, at a boundary where others were better; they count nowhere")
    base = baseline_of(study, baseline)
    if base and not study.by_seed(base, "final_score"):
        found.append(f"the baseline {base} has no finished run, so that nothing is compared with it")
    compared = [variant for variant in study.variants() if not study.is_reference(variant)]
    replaying = [v for v in compared if study.interval(v, "cost/buffer_bytes").mean > 0]
    for name, group in (
        ("cost/steps", compared), ("cost/buffer_bytes", replaying), ("cost/replay_ratio", replaying),
    ):  # fmt: skip
        means = {variant: study.interval(variant, name).mean for variant in group}
        values = [value for value in means.values() if not math.isnan(value)]
        if values and max(values) > 1.02 * min(values):
            listed = ", ".join(f"{variant} {amount(value)}" for variant, value in means.items())
            found.append(f"unequal {name.removeprefix('cost/')}: {listed}; these arms are not on one budget")
    return found


def _unfinished(study: StudyResults) -> list[str]:
    """A line for runs of a variant that stand alike; what resumes one then names the study, which resumes all."""
    alike: dict[tuple[str, str], list[int]] = {}
    for run in study.runs:
        if run.status not in ENDED:
            reason = run.tags.get("status_reason", "")
            says = f"{run.status} {reason.replace(f'/{run.variant}-s{run.seed}`', '`')}".strip()
            alike.setdefault((run.variant, says), []).append(run.seed)
    for variant, seed in study.missing():
        alike.setdefault((variant, "no record of it yet"), []).append(seed)
    return [
        f"{variant}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {says}"
        for (variant, says), seeds in alike.items()
    ]


def finding(study: StudyResults, baseline: str | None = None) -> str:
    """The study's result in a few words, with intervals and how far they may be trusted; reference arms left out.

    The best final score leads, since it falls with everything that was forgotten and with everything never learned.
    """
    base = baseline_of(study, baseline)
    scored = [v for v in study.variants() if study.by_seed(v, "final_score")]
    arms = [v for v in scored if not study.is_reference(v)]
    if not arms and scored:
        found = "; ".join(f"{v}, final score {study.interval(v, 'final_score')}" for v in scored)
        return f"Reference arms alone have finished: {found}."
    if not arms:
        return "No variant has finished with a final score to compare."
    best = max(arms, key=lambda v: study.interval(v, "final_score").mean)
    score = study.interval(best, "final_score")
    text = f"Best final score{' but for reference arms' if len(arms) < len(scored) else ''}: {best}, {score}"
    gap = paired(study.by_seed(best, "final_score"), study.by_seed(base, "final_score")) if base else None
    if gap is not None and gap.n and best != base:
        text += f" (n = {score.n}), {gap} above {base}, seed by seed: {MEANING[verdict(gap)]}."
    else:
        text += f" (n = {score.n})."
    unscored = [] if study.is_search else [v for v in study.variants() if v not in scored]
    if unscored:
        text += f" Without a score so far: {', '.join(unscored)}."
    forgetful = [v for v in arms if study.by_seed(v, "final_forgetting")]
    if not forgetful:
        return text + _best_read(study)
    least = min(forgetful, key=lambda v: study.interval(v, "final_forgetting").mean)
    lost, learned = study.interval(least, "final_forgetting"), study.interval(least, "learning_score")
    text += f" Least forgetting: {least}, {lost}, with a learning score of {learned}"
    if least != best:
        text += f" ({best}: {study.interval(best, 'learning_score')})"
    return f"{text}.{_best_read(study)}"


def _best_read(study: StudyResults) -> str:
    """A sentence about the text that was read, where a strategy measured it."""
    text = ""
    for metric in read_metrics(study):
        arms = [v for v in study.variants() if not study.is_reference(v) and study.by_seed(v, metric)]
        if arms:
            best = min(arms, key=lambda v: study.interval(v, metric).mean)
            found = study.interval(best, metric)
            text += f" Lowest {metric.removeprefix(MEASURED)}: {best}, {found} (n = {found.n})."
    return text


MEANING = {
    "single seed": "no interval can be given for it",
    "direction": "with fewer than 5 seeds a direction, not a finding",
    "difference": "a difference at 95 %",
    "no difference shown": "no difference shown",
}


def mean_scores(study: StudyResults, variants: Sequence[str]) -> dict[str, Scores]:
    """Mean result table of each variant that has finished runs."""
    found = {variant: study.scores(variant) for variant in variants}
    return {variant: np.mean(tables, axis=0) for variant, tables in found.items() if tables}
