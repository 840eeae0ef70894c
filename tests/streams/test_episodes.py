"""Few-shot episodes: drawn without a row in two places, scored as a loop over episodes would, with a true interval."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from clplat.streams.base import TensorData
from clplat.streams.batch import Batch
from clplat.streams.episodes import EpisodeShape, Episodic, draw_episodes, prototype_logits

SHAPE = EpisodeShape(ways=3, shots=2, queries=4)


class Model:
    """Its features are its inputs."""

    def features(self, batch: Batch) -> Tensor:
        return batch.inputs

    def device(self) -> torch.device:
        return torch.device("cpu")


def labels() -> Tensor:
    """Five classes of 6 to 10 rows, shuffled, and one of five, which is too small for an episode."""
    counts = torch.tensor([6, 7, 8, 9, 10, 5])
    every = torch.arange(6).repeat_interleave(counts)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))]


def drawn(shape: EpisodeShape = SHAPE, episodes: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw_episodes(labels(), shape, episodes, torch.Generator().manual_seed(seed))


def test_no_row_is_twice_in_an_episode() -> None:
    support, queries = drawn()
    rows = torch.cat([support, queries], dim=2).flatten(1)
    assert support.shape == (300, 3, 2) and queries.shape == (300, 3, 4)
    assert all(len(set(row)) == len(row) for row in rows.tolist())


def test_every_class_of_an_episode_is_another_one_and_has_rows_of_its_own_label_alone() -> None:
    support, queries = drawn()
    found = labels()[torch.cat([support, queries], dim=2)]
    assert bool((found == found[..., :1]).all())
    assert all(len(set(classes)) == 3 for classes in found[..., 0].tolist())


def test_classes_too_small_for_an_episode_are_left_out_and_the_others_come_equally_often() -> None:
    support, _ = drawn(episodes=4000)
    shares = labels()[support[..., 0]].flatten().bincount(minlength=6) / 4000
    assert shares[5] == 0
    assert shares[:5].tolist() == pytest.approx([0.6] * 5, abs=0.04)  # five standard deviations


def test_every_row_of_a_class_comes_as_support_and_as_query() -> None:
    support, queries = drawn()
    usable = set((labels() != 5).nonzero().flatten().tolist())
    assert set(support.flatten().tolist()) == set(queries.flatten().tolist()) == usable


def test_more_ways_than_there_are_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 classes have 6 rows, which an episode takes of each of 6"):
        drawn(EpisodeShape(ways=6, shots=2, queries=4))


def test_logits_are_minus_the_squared_distance_to_the_mean_of_the_support() -> None:
    support = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 4.0], [0.0, 4.0]]])
    queries = torch.tensor([[[1.0, 1.0]], [[0.0, 3.0]]])
    assert prototype_logits(support, queries).tolist() == [[-1.0, -10.0], [-10.0, -1.0]]


def features() -> TensorData:
    """Rows around a mean for each class, near enough for mistakes."""
    source, own = torch.Generator().manual_seed(2), labels()
    return TensorData(
        torch.randn(6, 3, generator=source)[own] + torch.randn(len(own), 3, generator=source), own, task=-1
    )


def by_hand(data: TensorData, episodes: int, seed: int) -> list[float]:
    """The accuracy of each episode, in loops."""
    accuracies = []
    for support, queries in zip(*drawn(SHAPE, episodes, seed), strict=True):
        means = [data.inputs[rows].mean(0) for rows in support]
        right = [
            min(range(3), key=lambda way: float((data.inputs[row] - means[way]).square().sum())) == number
            for number, rows in enumerate(queries)
            for row in rows
        ]
        accuracies.append(sum(right) / len(right))
    return accuracies


@pytest.mark.parametrize("batch_size", [7, 100])
def test_accuracy_and_interval_are_those_of_a_direct_computation(batch_size: int) -> None:
    data, episodes = features(), 130  # more than are answered at once
    sums = Episodic(SHAPE, episodes=episodes, seed=5).score(Model(), data, torch.arange(len(data)), batch_size)
    expected = by_hand(data, episodes, seed=5)
    mean = sum(expected) / episodes
    low, high = stats.t.interval(
        0.95,
        episodes - 1,
        loc=mean,
        scale=torch.tensor(expected, dtype=torch.float64).std().item() / math.sqrt(episodes),
    )
    assert 0.4 < mean < 0.95, "the episodes must be neither hopeless nor trivial to tell scorers apart"
    assert float(sums["accuracy"][0] / sums["accuracy"][1]) == pytest.approx(mean, abs=1e-6)
    assert float(sums["accuracy"][1]) == episodes and float(sums["half_width"][1]) == 1
    assert float(sums["half_width"][0]) == pytest.approx((high - low) / 2, rel=1e-5)


def test_the_score_draws_from_no_global_source_and_is_the_same_each_time() -> None:
    data, scorer = features(), Episodic(SHAPE, episodes=50)
    first = scorer.score(Model(), data, torch.arange(len(data)), 16)
    state = torch.get_rng_state()
    torch.rand(3)
    moved = torch.get_rng_state()
    again = scorer.score(Model(), data, torch.arange(len(data)), 16)
    assert not torch.equal(state, moved) and torch.equal(torch.get_rng_state(), moved)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [{"ways": 1}, {"shots": 0}, {"queries": 0}])
def test_a_shape_that_asks_nothing_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="ways, shots, queries: an episode needs two classes"):
        EpisodeShape(**shape)


def test_one_episode_has_no_interval() -> None:
    with pytest.raises(ValueError, match="episodes: an interval needs at least two, got 1"):
        Episodic(SHAPE, episodes=1)
