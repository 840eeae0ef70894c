"""What all launchers share, without Ray and Slurm: lost runs, stops, questions, refusals. Schedulers are played."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from searches import TwoThatAsk
from studies import assert_same, everything, run_folder, study

from clplat.cli import main
from clplat.errors import ClplatError, ConfigError
from clplat.journal import last_status, read
from clplat.launch import launch, launcher_of, serve
from clplat.launchers import network_disks, post
from clplat.launchers.options import LauncherConfig, SlurmConfig, check_launcher, seconds
from clplat.launchers.remote import End, Remote
from clplat.launchers.slurm_script import script
from clplat.lease import held
from clplat.study_file import expand, load_study

FORK = multiprocessing.get_context("fork")


class Played:
    """A scheduler whose jobs are forks of this process; `deaths` says how often the job of a run dies."""

    def __init__(self, deaths: Mapping[str, int] | None = None, work: Callable[[Path], Any] = post.work) -> None:
        self.jobs: dict[Path, Any] = {}
        self.deaths, self.work, self.submitted, self.most = dict(deaths or {}), work, list[str](), 0
        self.cancelled: list[bool] = []

    def submit(self, runs: Sequence[Path], *, asks: bool) -> None:
        for run in runs:
            post.expect(run, asks=asks)
            dies, self.deaths[run.name] = self.deaths.get(run.name, 0) > 0, self.deaths.get(run.name, 0) - 1
            self.jobs[run] = FORK.Process(target=_die if dies else self.work, args=(run,))
            self.jobs[run].start()
            self.submitted.append(run.name)
        self.most = max(self.most, len(self.jobs))

    def ended(self) -> Mapping[Path, End]:
        over = {run: job.exitcode for run, job in self.jobs.items() if job.exitcode is not None}
        return {run: End(why=f"its job ended with {code}") for run, code in over.items()}

    def forget(self, run: Path) -> None:
        del self.jobs[run]

    def cancel(self, runs: Sequence[Path], *, at_once: bool) -> None:
        self.cancelled.append(at_once)
        for run in runs:
            os.kill(self.jobs[run].pid, signal.SIGKILL if at_once else signal.SIGTERM)


def _die(run: Path) -> None:
    with held(run):
        os.kill(os.getpid(), signal.SIGKILL)


def quiet() -> Console:
    return Console(quiet=True)


def remote(scheduler: Any, room: int = 2) -> Remote:
    return Remote(scheduler, room=room, seconds=0.02)


def test_runs_elsewhere_give_what_they_give_here_and_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    runs = [run_folder(tmp_path, study(), name) for name in ["here", *names]]
    played = Played()
    assert post.work(runs[0]).status == "FINISHED"
    outcomes = launch(runs[1:], launcher=remote(played), console=quiet())
    assert [(o.folder, o.status, o.code) for o in outcomes] == [(run, "FINISHED", 0) for run in runs[1:]]
    assert played.most == 2 and played.submitted == names
    for run in runs[1:]:
        assert_same(everything(runs[0]), everything(run))
        assert not (run / post.FOLDER).exists()


@pytest.mark.parametrize(("deaths", "status"), [(1, "FINISHED"), (2, "FAILED")])
def test_a_lost_run_is_begun_again_once_and_then_failed_with_what_to_do(
    tmp_path: Path, deaths: int, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, other = run_folder(tmp_path, study(), "lost"), run_folder(tmp_path, study(), "other")
    played = Played({"lost": deaths})
    console = Console(width=300)
    outcomes = launch([lost, other], launcher=remote(played), console=console)
    assert [o.status for o in outcomes] == [last_status(lost), last_status(other)] == [status, "FINISHED"]
    assert played.submitted.count("lost") == 2
    said = capsys.readouterr().out
    assert "lost: its job ended with -9; it goes on from what was saved" in said
    if status == "FAILED":
        assert f"lost: FAILED. its job ended with -9; `clplat resume {lost}` goes on from what was saved" in said
        assert outcomes[0].cause == "process" and outcomes[0].code == 1


def test_without_retries_a_lost_run_is_failed_at_once(tmp_path: Path) -> None:
    played = Played({"lost": 1})
    outcomes = launch([run_folder(tmp_path, study(), "lost")], launcher=remote(played), console=quiet(), retries=0)
    assert [o.status for o in outcomes] == ["FAILED"] and played.submitted == ["lost"]


def test_a_stop_cancels_all_which_save_themselves_and_leaves_the_rest_unstarted(tmp_path: Path) -> None:
    data = study(training__budget={"steps": 100_000})
    runs = [run_folder(tmp_path, data, name) for name in ("one", "two", "three")]
    played = Played()

    def stop_when_they_train() -> None:
        while not all(list((run / "checkpoints").glob("*.pt")) for run in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop_when_they_train)
    thread.start()
    outcomes = launch(runs, launcher=remote(played), console=quiet())
    thread.join()
    # The jobs were sent SIGTERM; a person pressed Ctrl-C.
    assert [(o.status, o.code) for o in outcomes] == [("KILLED", 130)] * 3
    assert [last_status(run) for run in runs] == ["KILLED", "KILLED", "WAITING"]
    assert "stopped by SIGTERM" in outcomes[0].reason and outcomes[2].reason == "not started"
    assert played.cancelled == [False]


def test_a_run_elsewhere_asks_at_its_boundaries_and_ends_where_it_is_told_to(tmp_path: Path) -> None:
    supply = TwoThatAsk(tmp_path)
    with held(tmp_path):
        assert serve(supply, runs=2, launcher=remote(Played()), console=quiet()) == 0
    supply.assert_heard()


def test_a_run_that_asks_when_nobody_is_there_goes_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, study())
    post.expect(folder, asks=True)
    assert post.work(folder).status == "FINISHED"


def test_a_scheduler_that_refuses_ends_the_study_in_words_when_what_is_in_hand_has_ended(tmp_path: Path) -> None:
    class Full(Played):
        def submit(self, runs: Sequence[Path], *, asks: bool) -> None:
            if self.submitted:
                raise ClplatError("launcher.slurm: sbatch refused (too many jobs)")
            super().submit(runs, asks=asks)

    runs = [run_folder(tmp_path, study(), name) for name in ("one", "two")]
    with pytest.raises(ClplatError, match="too many jobs"):
        launch(runs, launcher=remote(Full(), room=1), console=quiet())
    assert [last_status(run) for run in runs] == ["FINISHED", "WAITING"]


def test_what_a_run_cannot_have_on_its_machine_is_its_outcome(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, study(training__threads=500))
    outcome = post.work(folder)
    assert outcome.status == last_status(folder) == "FAILED" and "training.threads: is 500" in outcome.reason
    assert [entry["reason"] for entry in read(folder)] == [outcome.reason]
    with pytest.raises(ConfigError, match="must lie on a disk that all machines share"):
        post.work(tmp_path / "not_here")


def test_a_run_elsewhere_leaves_a_sqlite_record_to_whoever_launched_it(tmp_path: Path, store: str) -> None:
    from clplat.mlflow_store import client
    from clplat.tracking import RUN_STATE

    folder = run_folder(tmp_path, study(tracking__enabled=True, tracking__uri=store))
    assert post.work(folder).status == "FINISHED" and not (folder / RUN_STATE).exists()
    launch([folder], launcher=remote(Played()), console=quiet())
    connection = client(store)
    found = connection.search_runs([e.experiment_id for e in connection.search_experiments()])
    assert [run.info.status for run in found] == ["FINISHED"] and "final_score" in found[0].data.metrics


@pytest.mark.long
def test_local_workers_that_are_killed_come_back_to_the_desk(tmp_path: Path) -> None:
    from clplat.launchers.local import Local
    from clplat.lease import holder

    data = study(training__budget={"steps": 150})
    runs = [run_folder(tmp_path, data, name) for name in ("one", "two")]

    def kill() -> None:
        while not list((runs[0] / "checkpoints").glob("*.pt")):
            time.sleep(0.02)
        os.kill(holder(runs[0]).pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    outcomes = launch(runs, launcher=Local(workers=2, threads=1), console=quiet())
    thread.join()
    assert [o.status for o in outcomes] == ["FINISHED", "FINISHED"]
    assert [e["status"] for e in read(runs[0]) if e["kind"] == "status"] == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    assert_same(everything(runs[0]), everything(runs[1]))


def slurm_launcher(**changes: Any) -> LauncherConfig:
    return LauncherConfig(kind="slurm", slurm=SlurmConfig(**changes))


def test_the_batch_script_says_to_slurm_what_the_configuration_says(tmp_path: Path) -> None:
    runs = expand(load_study(study(seeds=[3, 4], training__threads=2)))
    config = slurm_launcher(
        partition="gpu", account="lab", time="04:00:00", memory="8G", extra=["--qos=long"], setup=["module load cuda"]
    )
    text = script(tmp_path, runs, config, at_once=1)
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert set(options) == {
        "--job-name=clplat-digits", "--array=0-1%1", f"--output={tmp_path}/slurm/%A_%a.txt", "--open-mode=append",
        "--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--signal=B:USR1@120", "--requeue", "--partition=gpu",
        "--account=lab", "--time=04:00:00", "--mem=8G", "--qos=long",
    }  # fmt: skip
    assert "variants=(digits digits)\nseeds=(3 4)\n" in text and "\nmodule load cuda\n" in text
    assert f'clplat run {tmp_path} --variant "$variant" --seed "$seed"' in text and "scontrol requeue" in text
    plain = script(tmp_path, runs, slurm_launcher(requeue=False), at_once=None)
    assert "--no-requeue" in plain and "scontrol" not in plain and "--array=0-1\n" in plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra": ["rm -rf"]}, r"launcher\.slurm\.extra: expected options of sbatch"),
        ({"time": "soon"}, r"launcher\.slurm\.time: expected a time as Slurm writes it"),
        ({"time": "00:03:00"}, r"launcher\.slurm\.time: 00:03:00 leaves a run no two minutes"),
        ({"partition": "a b"}, r"launcher\.slurm\.partition: expected one word"),
        ({"poll_seconds": 0}, r"launcher\.slurm\.poll_seconds: must be positive"),
    ],
)
def test_options_of_slurm_that_mean_nothing_are_refused_by_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_launcher(slurm_launcher(**changes))


@pytest.mark.parametrize(
    ("text", "number"),
    [("90", 5400), ("90:30", 5430), ("01:30:30", 5430), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_times_are_read_as_slurm_reads_them(text: str, number: int) -> None:
    assert seconds(text) == number


@pytest.mark.parametrize(
    ("kind", "said"),
    [("slurm", r"needs sbatch, squeue, scancel.*no sbatch.*login node"), ("ray", r"pip install 'clplat\[ray\]'")],
)
def test_a_launcher_that_is_not_there_is_refused_before_anything_is_written(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clplat

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        clplat.run(study(launcher={"kind": kind}), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_kind_of_launcher_that_is_misspelt_is_named() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.kind: .*'slrum'.*did you mean 'slurm'"):
        load_study(study(launcher={"kind": "slrum"}))


def test_sqlite_on_a_network_disk_is_refused_for_runs_on_other_machines(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nserver:/home {tmp_path}/home nfs4 rw 0 0\n")
    monkeypatch.setattr(network_disks, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "home").mkdir()
    network_disks.check_disk("tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    network_disks.check_disk("tracking.uri", "http://server:5000")
    shared = {"enabled": True, "uri": f"sqlite:///{tmp_path}/home/mlflow.db"}
    with pytest.raises(ConfigError, match=r"tracking\.uri: .* SQLite file on a network disk \(nfs4\)"):
        launcher_of(load_study(study(launcher={"kind": "slurm"}, tracking=shared)), 2, 1)
    assert launcher_of(load_study(study(launcher={"workers": 1}, tracking=shared)), 2, 1)


def test_one_variant_and_one_seed_of_a_study_can_be_run_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("clplat.study.conclude", lambda *_: None)
    data = study(variants={"a": {}, "b": {}}, seeds=[0, 7], launcher={"workers": 1})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    ran = [main_code("run", "study.yaml", "--variant", "b", "--seed", "7")]
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in folder.glob("*-s*")] == ["b-s7"] and last_status(folder / "b-s7") == "FINISHED"
    (folder / "b-s7" / "journal.jsonl").unlink()
    for path in (folder / "b-s7" / "checkpoints").iterdir():
        path.unlink()
    ran.append(main_code("run", str(folder), "--variant", "b", "--seed", "7"))
    assert ran == [0, 0] and last_status(folder / "b-s7") == "FINISHED"
    capsys.readouterr()
    for words, said in (
        (["--variant", "b", "--seed", "9"], "there is no b-s9 among its runs: b-s7"),
        ([], "name one of its runs with --variant and --seed"),
    ):
        assert main_code("run", str(folder), *words) == 1 and said in capsys.readouterr().err


def main_code(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)
