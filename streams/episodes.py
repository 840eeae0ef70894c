"""Few-shot episodes: some classes, a few rows of each to learn them from, and others to be answered.

Shapes: E episodes, N classes of an episode (ways), K support rows of each (shots), Q query rows of each, R rows,
H features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clplat.streams.base import Data, Metric
from clplat.streams.scorers import Answerer, Scorer, Sums

PIECE = 100
"""Episodes that are answered at once: 100 of 5 × 15 queries at 512 features take 80 MB."""


@dataclass(frozen=True, kw_only=True)
class EpisodeShape:
    """Classes of an episode, and the support and query rows of each; 15 queries are the custom of the literature."""

    ways: int = 5
    shots: int = 1
    queries: int = 15

    def __post_init__(self) -> None:
        if self.ways < 2 or min(self.shots, self.queries) < 1:
            raise ValueError("ways, shots, queries: an episode needs two classes, a row of each to learn from and one "
                             f"to ask; got {self.ways}, {self.shots} and {self.queries}")  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows that an episode takes of each of its classes."""
        return self.shots + self.queries


def draw_episodes(
    labels: Tensor, shape: EpisodeShape, episodes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Row numbers of the support (E, N, K) and of the queries (E, N, Q), out of rows with `labels` (R,) on the CPU.

    The classes of an episode differ, and so do all of its rows. Classes of fewer than K + Q rows are left out; raises
    ValueError where fewer than N are left.
    """
    order, ways = labels.argsort(stable=True), shape.ways
    counts = labels[order].unique_consecutive(return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    starts, counts = starts[counts >= shape.rows], counts[counts >= shape.rows]
    if len(counts) < ways:
        raise ValueError(f"{len(counts)} classes have {shape.rows} rows, which an episode takes of each of {ways}")
    chosen = torch.rand(episodes, len(counts), generator=generator).argsort(1)[:, :ways]
    keys = torch.rand(episodes, ways, int(counts.max()), generator=generator)
    keys[torch.arange(keys.shape[-1]) >= counts[chosen].unsqueeze(-1)] = torch.inf
    rows = order[starts[chosen].unsqueeze(-1) + keys.argsort(-1)[..., : shape.rows]]
    return rows[..., : shape.shots], rows[..., shape.shots :]


def prototype_logits(support: Tensor, queries: Tensor) -> Tensor:
    """Minus the squared distance of each query to each class's mean, (..., N·Q, N), from features (..., N, K, H) and
    (..., N, Q, H); the softmax over N is p(class | query) of Snell et al. 2017, arXiv:1703.05175, Eq. 2."""
    apart = queries.flatten(-3, -2).unsqueeze(-2) - support.mean(-2).unsqueeze(-3)
    return -apart.square().sum(-1)


class Episodic(Scorer):
    """Accuracy of few-shot episodes by nearest class mean, and how well it is known.

    Features, the inputs of the model's last layer, are computed once for all rows, and no weight is changed. The
    episodes are the same at every evaluation. `half_width` is half of the accuracy's 95 % Student t interval over
    episodes: it covers the draw of episodes, not that of classes or of training runs.
    """

    metrics = {"accuracy": Metric(higher_is_better=True, best=1.0), "half_width": Metric(higher_is_better=False)}
    whole = True

    def __init__(self, shape: EpisodeShape, *, episodes: int = 600, seed: int = 0) -> None:
        """`episodes` of one `shape`, drawn by `seed`."""
        if episodes < 2:
            raise ValueError(f"episodes: an interval needs at least two, got {episodes}")
        self.shape, self.episodes, self.seed = shape, episodes, seed

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        """Sum of the episodes' accuracies and their number; the half width stands on its own."""
        batches = [data.batch(part).to(model.device()) for part in rows.split(batch_size)]
        features = torch.cat([model.features(batch).float() for batch in batches])
        labels = torch.cat([batch.targets for batch in batches]).cpu()
        draw = torch.Generator().manual_seed(self.seed)
        support, queries = draw_episodes(labels, self.shape, self.episodes, draw)
        pieces = zip(support.to(features.device).split(PIECE), queries.to(features.device).split(PIECE), strict=True)
        right = torch.cat([self._accuracies(features[known], features[asked]) for known, asked in pieces]).double()
        half = _student(len(right) - 1) * right.std() / math.sqrt(len(right))
        count = right.new_tensor(float(len(right)))
        return {"accuracy": torch.stack([right.sum(), count]), "half_width": torch.stack([half, torch.ones_like(half)])}

    def _accuracies(self, support: Tensor, queries: Tensor) -> Tensor:
        """The accuracy of each episode (E,)."""
        answers = prototype_logits(support, queries).argmax(-1)
        wanted = torch.arange(self.shape.ways, device=answers.device).repeat_interleave(self.shape.queries)
        return (answers == wanted).float().mean(-1)


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))
