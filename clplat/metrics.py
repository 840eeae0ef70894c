"""What scores say about forgetting, each number defined once (docs/metrics.md).

S is the signed headline score as `result_table` gives it: rows 0..T, columns tasks 1..T, higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clplat.result_table import Curve, ResultTable, Scores


def forgetting_max(scores: Scores) -> Scores:
    """F[i, k] = max over k ≤ j < i of S[j, k], minus S[i, k]; NaN for tasks not trained before i. May be negative."""
    trained = _trained(scores)
    best = np.maximum.accumulate(np.where(trained, scores, -np.inf), axis=0)
    return _after_training(best[:-1] - scores[1:], trained)


def forgetting_first(scores: Scores) -> Scores:
    """F[i, k] = S[k, k] − S[i, k]: against the score right after training the task."""
    learned = np.full(scores.shape[1], np.nan)
    learned[: scores.shape[0] - 1] = np.diagonal(scores, -1)
    return _after_training(learned - scores[1:], _trained(scores))


def _trained(scores: Scores) -> NDArray[np.bool_]:
    """(T+1, T): whether a row was measured after the task of the column had been trained."""
    return np.arange(scores.shape[0])[:, None] > np.arange(scores.shape[1])


def _after_training(lost: Scores, trained: NDArray[np.bool_]) -> Scores:
    """Losses of rows 1..T as a table (T+1, T), NaN but where the row before was after the task's training too."""
    found = np.full(trained.shape, np.nan)
    found[1:] = np.where(trained[:-1], lost, np.nan)
    return found


def cumulative_forgetting(scores: Scores) -> float:
    """Σ over boundaries i ≥ 2 of the mean over k < i of `forgetting_max[i, k]`, signed."""
    table = forgetting_max(scores)
    return float(sum(np.mean(table[i, : i - 1]) for i in range(2, len(table))))


def cumulative_forgetting_curve(curve: Curve, ends: Sequence[int], *, window: Literal["own", "first"] = "own") -> float:
    """Area under the clipped forgetting curve as a fraction of the stream, mean over the tasks that have ended.

    Forgetting of a task at a step is its best score since its own end (at step `ends[k]`) minus its score now, at
    least 0. Its area is divided by the steps since its own end, or since the first task's end (`window`): the two
    readings of the "area under the forgetting curve" in the TRC² papers, which do not say which they mean.
    """
    if not curve or len(ends) < 2:
        return math.nan
    places = np.array([step for step, _ in curve], dtype=float)
    since = np.array(ends[:-1], dtype=float)
    columns = np.stack([now for _, now in curve])[:, : len(since)]
    ended = places[:, None] >= since
    best = np.maximum.accumulate(np.where(ended, columns, -np.inf), axis=0)
    lost = np.where(ended, np.clip(np.where(ended, best - columns, 0), 0, None), 0)
    strips = np.diff(places)[:, None] * (lost[1:] + lost[:-1]) / 2
    span = places[-1] - (since if window == "own" else since[0])
    areas = np.where(ended[:-1], strips, 0).sum(0)
    return _mean(np.divide(areas, span, out=np.full(len(since), np.nan), where=span > 0))


def forgetting_over_time(curve: Curve, ends: Sequence[int]) -> tuple[Scores, Scores]:
    """Mean forgetting of the tasks that ended before each point of the curve: places in tasks trained, and values.

    A task's forgetting is its best score since its own end minus its score now, as in `forgetting_max`; a place of 2.5
    is half way through the third task.
    """
    later = [(step, now) for step, now in curve if step > ends[0]]
    values = []
    for step, now in later:
        ended = [task for task, end in enumerate(ends) if end < step]
        best = [max(then[task] for at, then in curve if ends[task] <= at < step) for task in ended]
        values.append(_mean(np.array(best) - now[ended]))
    places = np.interp([step for step, _ in later], [0, *ends], range(len(ends) + 1))
    return places, np.array(values)


def summary(table: ResultTable, curve: Curve = ()) -> dict[str, float]:
    """The numbers that stand for a run, as far as its rows go; a number that does not apply is left out: of a run that
    took no step there is nothing that was learned and could be forgotten.

    `curve` adds what was measured inside tasks; without it the forgetting curve has its boundary points alone.
    """
    scores, rows = table.scores(), table.rows()
    if not rows or rows[-1] == 0 or not scores.size:
        return {}
    last = rows[-1]
    part = scores[: last + 1]
    found = learned_and_kept(part)
    found["average_score"] = _mean([_mean(part[i, :i]) for i in range(1, last + 1)])
    answers = learned_and_kept(answer_scores(table)[: last + 1])
    found |= {f"answers/{name}": value for name, value in answers.items()} | ability_delta(table)
    if last > 1:
        lost = forgetting_max(part)
        found["final_forgetting"] = _mean(lost[last, : last - 1])
        found["final_forgetting_first"] = _mean(forgetting_first(part)[last, : last - 1])
        found["forward_transfer"] = _mean([part[k, k] - part[0, k] for k in range(1, last)])
        found["cumulative_forgetting"] = cumulative_forgetting(part)
        ends = table.steps()[1:]
        if len(ends) == last:
            whole = whole_curve(table, curve)
            found["cumulative_forgetting_curve"] = cumulative_forgetting_curve(whole, ends)
            found["cumulative_forgetting_curve_first"] = cumulative_forgetting_curve(whole, ends, window="first")
    return _applicable(found, table)


def _applicable(found: Mapping[str, float], table: ResultTable) -> dict[str, float]:
    """What is known; of a model that nothing was done to, its scores alone."""
    trained, scores = table.steps()[-1] > 0, ("final_score", "average_score")
    return {n: v for n, v in found.items() if not math.isnan(v) and (trained or n.endswith(scores))}


def learned_and_kept(part: Scores) -> dict[str, float]:
    """Final and learning score, and both backward transfers, of a table that ends in the row of interest.

    TRACE (arXiv:2310.06762, §3.3) calls the final score overall performance and divides the sum of backward transfer by
    the t tasks trained (`backward_transfer_trace`), others by the t − 1 that could be forgotten.
    """
    last = len(part) - 1
    if last < 1:
        return {}
    diagonal = np.diagonal(part, -1)[:last]
    found = {"final_score": _mean(part[last, :last]), "learning_score": _mean(diagonal)}
    if last > 1:
        found["backward_transfer"] = _mean(part[last, : last - 1] - diagonal[:-1])
        found["backward_transfer_trace"] = found["backward_transfer"] * (last - 1) / last
    return found


def through_view(table: ResultTable, view: str) -> dict[str, float]:
    """`final_score`, `learning_score` and `final_forgetting` of a run as another view has them."""
    part = table.seen_through(view)[: table.rows()[-1] + 1]
    found = {name: value for name, value in learned_and_kept(part).items() if name.endswith("_score")}
    if len(part) > 2:
        found["final_forgetting"] = _mean(forgetting_max(part)[-1, : len(part) - 2])
    return _applicable(found, table)


def answer_scores(table: ResultTable) -> Scores:
    """Scores (T+1, T) of what is written, for tasks whose headline is a loss: of each the one metric, higher is better,
    that is measured beside it. Empty where a task has none or several."""
    last = table.cells(table.rows()[-1])
    losses = {cell.index: cell.view for cell in last if cell.headline and not cell.higher_is_better}
    beside = [c for c in last if c.index is not None and c.higher_is_better and losses.get(c.index) == c.view]
    named = {(cell.index, cell.view, cell.metric) for cell in beside}
    tasks = len(table.tasks())
    if len(named) != tasks or {index for index, *_ in named} != set(range(tasks)):
        return np.empty((0, 0))
    return table.values(lambda cell: (cell.index, cell.view, cell.metric) in named)


def ability_delta(table: ResultTable) -> dict[str, float]:
    """What training did to general ability: last row minus row 0, mean over the multiple-choice probes (TRACE's ΔR^G).

    `ability_delta` is of their accuracy, `ability_delta_nats` of the right answer's log-likelihood, which moves where
    accuracy is too coarse; below zero ability was lost. Multiple choice is what a probe measures by these two alone.
    """
    rows, kinds = table.rows(), {"accuracy": 1.0, "answer_loss": -1.0}
    ends = [{(c.task, c.metric): c.value for c in table.cells(row) if c.index is None and c.view == "default"}
            for row in (rows[0], rows[-1])]  # fmt: skip
    measured: dict[str, set[str]] = {}
    for task, metric in ends[1]:
        measured.setdefault(task, set()).add(metric)
    probes = [task for task, metrics in measured.items() if metrics == kinds.keys() and (task, "accuracy") in ends[0]]
    if rows[0] != 0 or not probes:
        return {}
    moved = {metric: _mean([sign * (ends[1][task, metric] - ends[0][task, metric]) for task in probes])
             for metric, sign in kinds.items()}  # fmt: skip
    return {"ability_delta": moved["accuracy"], "ability_delta_nats": moved["answer_loss"]}


def whole_curve(table: ResultTable, curve: Curve) -> Curve:
    """Scores measured inside tasks and those of the table's rows, in order."""
    points = zip(table.steps(), table.scores()[table.rows()], strict=True)
    return sorted([*curve, *points], key=lambda point: point[0])


def _mean(values: Any) -> float:
    """Mean that is NaN when any part is: half a table must not pass for a whole one."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()) if array.size else math.nan


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean, half the width of its 95 % Student t interval, and how many values it stands on."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if self.n == 0 or math.isnan(self.mean):
            return "–"
        return f"{self.mean:.3f} ± {self.half:.3f}" if self.n > 1 else f"{self.mean:.3f}"


def amount(value: float) -> str:
    """A count or a cost as a person reads it: 5,280 or 23.8 G, and three places where it is no whole number."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f} {letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Student t interval at 95 % over independent values; the half width is NaN for fewer than two."""
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    kept = np.asarray([v for v in values if not math.isnan(v)])
    if len(kept) < 2:
        return Interval(mean=float(kept.mean()) if len(kept) else math.nan, half=math.nan, n=len(kept))
    spread = stdtrit(len(kept) - 1, 0.975) * kept.std(ddof=1) / math.sqrt(len(kept))
    return Interval(mean=float(kept.mean()), half=float(spread), n=len(kept))


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """ours − theirs of each seed that both have, by seed."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """Interval of the differences ours − theirs over the seeds that both have."""
    return interval(list(differences(ours, theirs).values()))


def verdict(difference: Interval) -> str:
    """How a difference may be spoken of: fewer than five seeds show a direction at most."""
    if difference.n < 2:
        return "single seed"
    if difference.n < 5:
        return "direction"
    return "difference" if abs(difference.mean) > difference.half else "no difference shown"
