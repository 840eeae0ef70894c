"""The Optuna study behind a search: asked for trials, told how they ended, shared by whoever opens the same storage.

A trial belongs to the folder of the tune that asked for it (attribute `folder`) and beats like a heart while that tune
lives. One that has stopped beating is marked as failed by any other tune on the storage, and begun again elsewhere.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from clplat.databases import driver_package
from clplat.errors import ClplatError, ConfigError, StorageError
from clplat.tuning.sampling import NumberedSampler

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

BEAT_SECONDS, GRACE_SECONDS = 30, 180
"""How often a trial beats, and after how long a silence it counts as lost."""
REMEDY = (
    "if its disk is full, free some space; if it is a server, see that it is there; then continue with `clplat "
    "resume`. What has finished is safe in the run folders."
)
RETRIES = 2
"""How often the settings of a lost trial are begun again."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial in hand: its number in the study, and what the sampler has drawn for each key of the space."""

    number: int
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its variant, and of its run folders."""
        return f"t{self.number:04d}"


class Trials:
    """The trials of one search, as one tune (a folder) sees them."""

    def __init__(
        self,
        url: str,
        name: str,
        folder: str,
        *,
        directions: Sequence[int],
        distributions: Mapping[str, Any],
        sampler: str,
        seed: int,
        limit: int,
    ) -> None:
        """`url` of an Optuna RDB storage, `limit` the trials in all; `directions` 1 for more, −1 for less is better."""
        self.url, self.folder, self.directions, self._limit = url, folder, list(directions), limit
        self._distributions = dict(distributions)
        self._mine: set[int] = set()
        self._closing = threading.Event()
        with storage_errors(url):
            self._storage, self.study = _open(url, name, self.directions, NumberedSampler(sampler, seed), self._again)

    def begin(self, facts: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
        """Write down what is searched, or compare it with what the storage says; line up `points` as first trials,
        the configuration's own settings in front."""
        known = self.study.user_attrs.get("search")
        if known is None:
            for place, point in enumerate(points):
                self.study.enqueue_trial(dict(point), user_attrs={"default": place == 0}, skip_if_exists=True)
            self.study.set_user_attr("search", dict(facts))
            return
        for key in sorted(known.keys() | facts.keys()):
            if known.get(key) != facts.get(key):
                raise ConfigError(
                    f"{key}: {known.get(key)} → {facts.get(key)}: the search {self.study.study_name!r} was begun with "
                    "another configuration or other data; undo the change, or give the new search another `name`"
                )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """While inside, this tune's trials are known to be alive."""
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closing.set()
            thread.join()

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            for number in sorted(self._mine):
                # A storage that is away for a while is met where it matters: when a trial is asked for or told.
                try:
                    self._storage.record_heartbeat(self._id(number))
                except Exception:  # noqa: BLE001 - any of its drivers' errors
                    break

    def ask(self) -> Trial | None:
        """The next trial; None when as many have been begun as there are to be."""
        from optuna.trial import TrialState

        self._mark_lost()
        found = self.study.get_trials(deepcopy=False)
        begun = [t for t in found if t.state != TrialState.WAITING and "replaces" not in t.user_attrs]
        if len(begun) >= self._limit and not any(
            "replaces" in t.user_attrs and t.state == TrialState.WAITING for t in found
        ):
            return None
        with warnings.catch_warnings():
            # It expects Study.optimize; our own thread beats.
            warnings.filterwarnings("ignore", message="Heartbeat of storage", category=UserWarning)
            asked = self.study.ask(self._distributions)
        self._claim(asked.number)
        return Trial(number=asked.number, params=dict(asked.params))

    def _claim(self, number: int) -> None:
        """From now on a trial beats, and is this folder's to resume."""
        self._storage.record_heartbeat(self._id(number))
        self._storage.set_trial_user_attr(self._id(number), "folder", self.folder)
        self._mine.add(number)

    def mine(self, *, alone: bool) -> list[Trial]:
        """This folder's trials that have not ended, taken up again.

        `alone`: no other tune uses the storage, so that trials of nobody were cut short while they were asked for.
        """
        if alone:
            self._give_back([t for t in self.running() if "folder" not in t.user_attrs])
        found = [t for t in self.running() if t.user_attrs.get("folder") == self.folder]
        for trial in found:
            self._storage.record_heartbeat(self._id(trial.number))
            self._mine.add(trial.number)
        return [Trial(number=t.number, params=dict(t.params)) for t in found]

    def running(self) -> list[FrozenTrial]:
        """Trials under way, here or elsewhere."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def all(self) -> list[FrozenTrial]:
        """Every trial that has been begun, by number."""
        from optuna.trial import TrialState

        return [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def progress(self) -> str:
        """How many trials have ended of those that there are to be; one that was begun again counts once."""
        found = self.all()
        again = {t.user_attrs.get("replaces") for t in found}
        return f"{sum(t.state.is_finished() and t.number not in again for t in found)} of {self._limit} trials"

    def passed(self, trial: Trial, place: str, step: int, values: Sequence[float]) -> None:
        """Write down what a trial had reached at a boundary, `place`, the `step`-th of the trial."""
        self._storage.set_trial_user_attr(self._id(trial.number), f"at {place}", list(values))
        if len(self.directions) == 1 and values[0] == values[0]:
            # Of pruned trials the sampler learns from this.
            self._storage.set_trial_intermediate_value(self._id(trial.number), step, values[0])

    def finished_at(self, place: str) -> list[list[float]]:
        """What the finished trials had at a boundary."""
        from optuna.trial import TrialState

        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [t.user_attrs[f"at {place}"] for t in finished if f"at {place}" in t.user_attrs]

    def is_default(self, trial: Trial) -> bool:
        """Whether a trial has the configuration's own settings."""
        return bool(self.study.get_trials(deepcopy=False)[trial.number].user_attrs.get("default"))

    def complete(self, trial: Trial, values: Sequence[float]) -> str:
        """A trial has ended with these objectives; what a person should know of it, empty if nothing."""
        return self._tell(trial, "COMPLETE", list(values))

    def prune(self, trial: Trial, reason: str) -> str:
        """A trial has been ended at a boundary."""
        return self._tell(trial, "PRUNED", None, reason)

    def fail(self, trial: Trial, reason: str) -> str:
        """A trial has failed of itself."""
        return self._tell(trial, "FAIL", None, reason)

    def _tell(self, trial: Trial, state: str, values: list[float] | None, reason: str = "") -> str:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        self._mine.discard(trial.number)
        try:
            if reason:
                self._storage.set_trial_user_attr(self._id(trial.number), "reason", reason[:1000])
            self.study.tell(trial.number, values, state=TrialState[state])
        except (UpdateFinishedTrialError, ValueError) as error:
            if self.study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
                raise ClplatError(f"{trial.name}: cannot be told to the search ({error})") from error
            return f"{trial.name}: was silent for so long that another tune has begun it again; its runs stay here"
        return ""

    def _mark_lost(self) -> None:
        """Fail trials whose tune has fallen silent, and line their settings up again."""
        from optuna.storages import fail_stale_trials

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental, says Optuna
            fail_stale_trials(self.study)
        old = datetime.now() - timedelta(seconds=GRACE_SECONDS)
        nobodys = [t for t in self.running() if "folder" not in t.user_attrs]
        # Their tunes died between asking for them and the first beat.
        self._give_back([t for t in nobodys if t.datetime_start is not None and t.datetime_start < old])

    def _give_back(self, cut_short: Sequence[FrozenTrial]) -> None:
        from optuna.trial import TrialState

        for trial in cut_short:
            self.study.tell(trial.number, state=TrialState.FAIL)
            self._again(self.study, trial)

    def _again(self, study: Study, lost: FrozenTrial) -> None:
        tries = lost.user_attrs.get("try", 1)
        if tries <= RETRIES:
            attributes = {"replaces": lost.number, "try": tries + 1, "default": lost.user_attrs.get("default", False)}
            study.enqueue_trial(dict(lost.params), user_attrs=attributes)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)


def _open(url: str, name: str, directions: Sequence[int], sampler: Any, again: Any) -> tuple[Any, Study]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A SQLite file waits for another writer; other databases do so of themselves.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, says Optuna
        storage = optuna.storages.RDBStorage(
            url, engine_kwargs=engine, heartbeat_interval=BEAT_SECONDS, grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=again,
        )  # fmt: skip
    words = ["maximize" if direction > 0 else "minimize" for direction in directions]
    study = optuna.create_study(
        storage=storage, study_name=name, directions=words, sampler=sampler, load_if_exists=True
    )
    if [d.name.lower() for d in study.directions] != words:
        raise ConfigError(
            f"tune.storage: it holds a search {name!r} with other objectives; give this one another `name`"
        )
    return storage, study


def check_storage(url: str) -> None:
    """Refuse an address under which no database answers, before a tune has a folder."""
    from sqlalchemy import create_engine

    with storage_errors(url, remedy="see that it is there and may be written; nothing has been begun."):
        create_engine(url).connect().close()


@contextmanager
def storage_errors(url: str, remedy: str = REMEDY) -> Iterator[None]:
    """What a database says, as what a person can do about it."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    place, secret, rest = url.rpartition("@")
    shown = f"{place.partition('://')[0]}://…@{rest}" if secret else url
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"tune.storage: {shown} needs a driver that is not installed: pip install {driver_package(error)}"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"tune.storage: {shown} is the address of no database that is known; write postgresql://…, mysql://… or "
            "sqlite:///…"
        ) from error
    except (StorageInternalError, SQLAlchemyError) as error:
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise StorageError(f"tune.storage: {shown} cannot be used ({said}); {remedy}") from error
