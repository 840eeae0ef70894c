"""A sampler whose draws follow from its seed and the number of the trial alone.

So a search that was killed goes on with the trials that it would have had, and several tunes on one storage with one
seed do not all try the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optuna.samplers import BaseSampler, RandomSampler, TPESampler

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState


class NumberedSampler(BaseSampler):
    """TPE or independent draws, seeded anew for every trial (Bergstra et al. 2011; Optuna's TPESampler).

    The points of a grid are lined up before the search begins; where they run out, draws are independent.
    """

    def __init__(self, kind: str, seed: int) -> None:
        """`kind`: tpe, random or grid."""
        self._kind, self._seed = kind, seed
        self._made: tuple[int, BaseSampler] | None = None

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if self._made is None or self._made[0] != trial.number:
            seed = (self._seed * 1_000_003 + trial.number) % 2**32
            inner = TPESampler(seed=seed) if self._kind == "tpe" else RandomSampler(seed=seed)
            self._made = (trial.number, inner)
        return self._made[1]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._of(trial).after_trial(study, trial, state, values)
