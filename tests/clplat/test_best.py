"""Known-good settings: every name stands for one variant of a shipped study that builds and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from studies import study
from written_images import cifar10_parquet, write_idx

from clplat import best
from clplat.cli import main
from clplat.dry_run import estimate
from clplat.errors import ConfigError
from clplat.study_file import load_study


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many random images as the largest memory among the rows holds."""
    root = tmp_path_factory.mktemp("data")
    write_idx(root / "mnist", "MNIST", train=4800)
    cifar10_parquet(root / "cifar10_full", train=1100)
    return root


@pytest.mark.parametrize("name", best.catalogue())
def test_every_name_takes_its_first_steps(name: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLAT_DATA", str(images))
    monkeypatch.setenv("CLPLAT_CACHE", str(images / "cache"))
    few = [("seeds", "[7]"), ("stream.init_args.num_tasks", "2"), ("stream.init_args.max_test_per_class", "1")]
    found = best.study(name, [*few, ("training.accelerator", "cpu")])
    assert list(found.variants) == [found.known_good[name].variant] and found.name == name
    table = estimate(found, Console(quiet=True))
    assert table.row_count == 1


def test_every_row_says_where_its_number_is_from() -> None:
    for name, (_, entry) in best.catalogue().items():
        assert 0 < entry.published <= 100 and entry.source and entry.minutes > 0, name
        assert entry.tolerance == (3.0 if "cifar" in name else 2.0), name


def test_alone_it_lists_the_names_and_an_unknown_one_has_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--best"])
    assert not ended.value.code and "split_mnist_gdumb" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="--best: nothing is called 'split_mnist_gdum'; did you mean 'split_mnist_gdumb'"
    ):
        best.study("split_mnist_gdum")


def test_run_without_a_configuration_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run"])
    assert ended.value.code == 2 and "run: which CONFIG?" in capsys.readouterr().err


def test_one_name_runs_its_variant_with_its_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    entry = {"variant": "b", "published": 50, "source": "a paper", "minutes": 1}
    variants = {"a": {}, "b": {"training": {"batch_size": 8}}}
    whole = study(variants=variants, seeds=[3, 4], baseline="a", known_good={"some_name": entry})
    (shipped / "digits.yaml").write_text(yaml.safe_dump(whole))
    monkeypatch.setattr(best, "shipped_folder", lambda: shipped)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--best", "some_name", "--training.budget.steps", "4"])
    assert not ended.value.code, capsys.readouterr().err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("some_name-")
    assert {run.name for run in folder.iterdir() if run.is_dir() and (run / "config.yaml").is_file()} == {
        "b-s3",
        "b-s4",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"variant": "bb"}, r"known_good\.x\.variant: no variant is called 'bb'; did you mean 'b'"),
     ({"minute": 2}, r"known_good\.x\.minute: there is no such key; did you mean 'minutes'"),
     ({"published": "much"}, r"known_good\.x\.published: must be a number")],
)  # fmt: skip
def test_a_wrong_entry_is_refused_by_name(changes: dict, message: str) -> None:
    entry = {"variant": "b", "published": 50, "source": "a paper", "minutes": 1} | changes
    with pytest.raises(ConfigError, match=message):
        load_study(study(variants={"a": {}, "b": {}}, known_good={"x": entry}))


def test_what_the_results_page_has_measured_is_what_the_list_shows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "results" / "images.md").read_text()
    rows = re.findall(r"^\|[^|]*\| (\d+) \| ([^|]*) \|.*`(\w+)` \|$", page, flags=re.MULTILINE)
    assert len(rows) > 20
    for seeds, value, name in rows:
        shown = best.catalogue()[name][1].measured
        assert (shown.partition(" (")[0] == value) if int(seeds) else not shown, name
