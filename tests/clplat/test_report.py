"""Comparisons from MLflow alone: numbers against tables made by hand, and nothing hidden."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from records import Made, cells
from rich.console import Console

from clplat.errors import ConfigError
from clplat.journal import Journal
from clplat.metrics import interval, paired
from clplat.page import write_report
from clplat.report import compare_table, finding, notes
from clplat.study_results import StudyResults, load_study_results

NAIVE = {0: [[0.1, 0.1], [0.9, 0.1], [0.3, 0.8]], 1: [[0.1, 0.1], [0.8, 0.1], [0.4, 0.9]]}
ER = {0: [[0.1, 0.1], [0.9, 0.1], [0.8, 0.7]], 1: [[0.1, 0.1], [0.8, 0.1], [0.6, 0.8]]}
CUMULATIVE = {0: [[0.1, 0.1], [0.95, 0.1], [0.9, 0.9]], 1: [[0.1, 0.1], [0.8, 0.1], [0.8, 0.95]]}


def made(store: str) -> Made:
    study = Made(store, ["naive", "er", "cumulative"], [0, 1], baseline="naive")
    for seed in (0, 1):
        study.run("naive", seed, NAIVE[seed])
        study.run("er", seed, ER[seed], costs={"cost/buffer_bytes": 100.0, "cost/buffer_share": 0.1})
        study.run(
            "cumulative", seed, CUMULATIVE[seed], costs={"cost/steps": 99.0},
            tags={"reference": "true", "strategy": "Cumulative"},
        )  # fmt: skip
    return study


def printed(study: StudyResults, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(compare_table(study))
    return console.export_text()


def test_means_intervals_paired_differences_and_intransigence_are_those_of_the_tables(store: str) -> None:
    study = made(store)
    shutil.rmtree(study.folder)
    results = load_study_results("digits", store)
    assert results.variants() == ["naive", "er", "cumulative"]
    assert results.by_seed("naive", "final_forgetting") == pytest.approx({0: 0.6, 1: 0.4})
    assert results.interval("naive", "final_forgetting").half == pytest.approx(interval([0.6, 0.4]).half)
    assert results.by_seed("er", "intransigence") == pytest.approx({0: 0.125, 1: 0.075})
    assert results.by_seed("cumulative", "intransigence") == pytest.approx({0: 0.0, 1: 0.0})
    gap = paired(results.by_seed("er", "final_score"), results.by_seed("naive", "final_score"))
    assert finding(results, "naive") == (
        f"Best final score but for reference arms: er, {results.interval('er', 'final_score')} (n = 2), {gap} above "
        "naive, seed by seed: with fewer than 5 seeds a direction, not a finding. Least forgetting: er, 0.150 ± 0.635, "
        f"with a learning score of {results.interval('er', 'learning_score')}."
    )


def test_an_arm_in_which_nothing_moved_has_nothing_to_forget_and_is_not_praised_for_it(store: str) -> None:
    study = Made(store, ["learns", "frozen", "slow"], [0])
    study.run("learns", 0, [[0.5, 0.5], [0.9, 0.5], [0.7, 0.9]])
    study.run("frozen", 0, [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    study.run("slow", 0, [[0.5, 0.5], [0.6, 0.5], [0.5, 0.5]])
    results = load_study_results("digits", store)
    said = finding(results)
    assert said.startswith("Best final score: learns, 0.800")
    assert "Least forgetting: slow, 0.100, with a learning score of 0.550 (learns: 0.900)" in said
    (line,) = [line for line in printed(results).splitlines() if line.strip().startswith("frozen ") and "0.500" in line]
    assert line.split() == ["frozen", "1", "0.500", "–", "–"]


def test_the_perplexity_of_a_text_that_was_read_stands_in_the_terminal_and_in_the_closing_line(store: str) -> None:
    study = Made(store, ["truncation", "temp_lora"], [0, 1], baseline="truncation")
    for seed in (0, 1):
        for variant, value in (("truncation", 40.0), ("temp_lora", 15.0 + seed)):
            found = {"strategy/reader/ppl": {20: value}, "strategy/reader/ppl/part-1": {20: 99.0}}
            study.run(variant, seed, NAIVE[seed], steps=found)
    results = load_study_results("digits", store)
    lines = [" ".join(line.split()) for line in printed(results).splitlines()]
    assert "reader/ppl: perplexity of every chunk before it was learned" in lines
    assert "variant perplexity − truncation" in lines and not any("99" in line for line in lines)
    assert "temp_lora 15.500 ± 6.353 -24.500 ± 6.353" in lines and "truncation 40.000 ± 0.000" in lines
    assert finding(results).endswith(". Lowest reader/ppl: temp_lora, 15.500 ± 6.353 (n = 2).")


def test_long_names_are_wrapped_and_numbers_stand_whole_on_one_line(store: str) -> None:
    names = ["ilora_code_intent", "ilora_code_inert_ema", "seq"]
    study = Made(store, names, [0, 1], baseline="seq")
    for number, name in enumerate(names):
        for seed in (0, 1):
            study.run(name, seed, [[-9.0, -9.0], [-2.0 - seed, -8.0], [-5.0 - seed / 9, -3.0 - number]], higher=False)
    results = load_study_results("digits", store)
    text = printed(results)
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    for name in names:
        score = str(results.interval(name, "final_score"))
        rows = text.split(f"{results.name}: mean")[1].splitlines()
        (at,) = [place for place, line in enumerate(rows) if score in line and name.startswith(line.split()[0])
                 and (line.split()[0] == name or name.endswith(rows[place + 1].split()[0]))]  # fmt: skip
        assert rows[at].split()[0] + ("" if rows[at].split()[0] == name else rows[at + 1].split()[0]) == name


def test_the_terminal_table_fits_eighty_columns_and_marks_reference_arms(store: str) -> None:
    made(store)
    text = printed(load_study_results("digits", store))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "cumulative †" in text and "naive †" not in text
    # Reference arms may take more steps than the others; nobody else may.
    assert "unequal" not in text


def test_failed_and_missing_runs_and_unequal_budgets_are_said(store: str) -> None:
    study = Made(store, ["naive", "er", "der"], [0, 1])
    study.run("naive", 0, NAIVE[0])
    study.run("naive", 1, NAIVE[1][:2], status="FAILED", reason="loss is NaN at step 13")
    study.run("er", 0, ER[0], costs={"cost/buffer_bytes": 100.0, "cost/steps": 20.0})
    study.run("der", 0, ER[0], costs={"cost/buffer_bytes": 150.0, "cost/steps": 30.0})
    results = load_study_results("digits", store)
    said = "\n".join(notes(results))
    assert "naive, seed 1: FAILED loss is NaN at step 13" in said
    assert "er, seed 1: no record of it yet" in said and "der, seed 1: no record of it yet" in said
    assert re.search(r"unequal buffer_bytes: er 100, der 150", said)
    assert re.search(r"unequal steps: naive 20, er 20, der 30", said)
    assert results.interval("naive", "final_score").n == 1
    page = write_report(results, "out").read_text()
    assert "loss is NaN at step 13" in page and "unequal steps" in page


def test_runs_of_a_variant_that_stand_alike_are_said_once_with_what_resumes_them_all(store: str) -> None:
    study = Made(store, ["naive", "er"], [0, 1, 2])
    for seed in (0, 1, 2):
        study.run("naive", seed, NAIVE[0])
    for seed in (0, 2):
        reason = f"stopped by SIGTERM; `clplat resume runs/digits/er-s{seed}` goes on from here"
        study.run("er", seed, ER[0][:2], status="KILLED", reason=reason)
    assert notes(load_study_results("digits", store)) == [
        "er, seeds 0, 2: KILLED stopped by SIGTERM; `clplat resume runs/digits` goes on from here",
        "er, seed 1: no record of it yet",
    ]


def test_a_study_stopped_before_its_baseline_ran_is_compared_all_the_same(store: str) -> None:
    study = Made(store, ["naive", "er"], [0], baseline="naive")
    study.run("er", 0, ER[0])
    results = load_study_results("digits", store)
    text = printed(results)
    assert "naive, seed 0: no record of it yet" in text
    assert finding(results, "naive").startswith("Best final score: er")
    stopped = replace(results.runs[0], variant="cut", status="KILLED", metrics={})
    said = finding(replace(results, runs=[*results.runs, stopped]), "naive")
    assert said.startswith("Best final score: er") and "Without a score so far: cut." in said
    assert write_report(results, "out").is_file()


def test_a_variant_in_another_task_order_keeps_its_own_names(store: str) -> None:
    study = Made(store, ["ab", "ba", "mixed"], [0, 1])
    for seed in (0, 1):
        study.run("ab", seed, NAIVE[seed], tasks=("a", "b"))
        study.run("ba", seed, NAIVE[seed], tasks=("b", "a"))
        study.run("mixed", seed, NAIVE[seed], tasks=("a", "b") if seed else ("b", "a"))
    results = load_study_results("digits", store)
    assert results.tasks("ab") == ["a", "b"] and results.tasks("ba") == ["b", "a"]
    assert results.tasks("mixed") == ["task 1", "task 2"]
    assert results.final("ab", "a").mean == results.final("ba", "b").mean == pytest.approx(0.35)
    assert results.final("ab", "b").mean == results.final("ba", "a").mean == pytest.approx(0.85)


def test_a_study_of_losses_reports_forgetting_in_the_same_direction(store: str) -> None:
    study = Made(store, ["naive"], [0])
    study.run("naive", 0, [[5.0, 5.0], [2.0, 5.0], [4.0, 2.5]], higher=False)
    results = load_study_results("digits", store)
    assert results.by_seed("naive", "final_forgetting") == pytest.approx({0: 2.0})
    assert results.by_seed("naive", "final_score") == pytest.approx({0: -3.25})


def test_curves_measured_inside_tasks_and_runs_without_rows_of_their_own_tasks_reach_the_report(store: str) -> None:
    study = Made(store, ["naive", "joint"], [0])
    journal = Journal(study.folder / "naive-s0")
    journal.curve(15, 1, cells([0.5, 0.4], ["a", "b"]))
    journal.flush()
    study.run("naive", 0, NAIVE[0])
    study.run("joint", 0, [[0.1, 0.1], None, [0.9, 0.9]], tags={"reference": "true"})
    results = load_study_results("digits", store)
    ((places, values),) = results.forgetting("naive")
    assert places.tolist() == [1.5, 2] and values == pytest.approx([0.4, 0.6])
    assert results.forgetting("joint") == [] and results.by_seed("joint", "final_score") == pytest.approx({0: 0.9})
    assert "joint †" in printed(results) and write_report(results, "out").is_file()


def test_an_arm_that_trains_nothing_has_scores_and_no_forgetting_curve(store: str) -> None:
    study = Made(store, ["naive", "zero_shot"], [0], baseline="naive")
    study.run("naive", 0, NAIVE[0])
    study.run("zero_shot", 0, [[0.1, 0.2]] * 3, row_steps=0, tags={"reference": "true"})
    results = load_study_results("digits", store)
    assert results.forgetting("zero_shot") == [] and results.by_seed("zero_shot", "final_score") == pytest.approx(
        {0: 0.15}
    )
    assert "zero_shot †" in printed(results) and write_report(results, "out").is_file()
    assert not any("unequal steps" in note for note in notes(results))


def test_of_reference_arms_alone_the_scores_are_said(store: str) -> None:
    study = Made(store, ["joint", "zero_shot"], [0])
    study.run("joint", 0, [[0.1, 0.1], None, [0.9, 0.9]], tags={"reference": "true"})
    study.run("zero_shot", 0, [[0.1, 0.2]] * 3, row_steps=0, tags={"reference": "true"}, status="FAILED")
    said = finding(load_study_results("digits", store))
    assert said == "Reference arms alone have finished: joint, final score 0.900."


def test_the_page_opens_without_a_network_and_escapes_what_it_shows(store: str, tmp_path: Path) -> None:
    study = Made(store, ["naive"], [0])
    study.run("naive", 0, NAIVE[0], tasks=("<script>alert(1)</script>", "b & c"))
    results = load_study_results(str(study.folder))
    page = write_report(results, tmp_path / "out").read_text()
    assert "<script" not in page
    loaded = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(target.startswith(("#", "data:")) for target in loaded), loaded
    drawn = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    names = ("heat_maps", "forgetting", "learned_and_lost", "final_scores")
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_what_mlflow_does_not_give_is_an_error_that_names_it(store: str) -> None:
    study = Made(store, ["naive"], [0])
    with pytest.raises(ConfigError, match="no runs of it yet"):
        load_study_results(str(study.folder))
    study.run("naive", 0, NAIVE[0])
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_study_results("digit", store)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9"):
        load_study_results(str(study.folder), "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="did you mean 'naive'"):
        compare_table(load_study_results("digits", store), "naiv")


def test_a_study_of_one_task_has_a_report_without_forgetting(store: str, tmp_path: Path) -> None:
    study = Made(store, ["naive"], [0])
    study.run("naive", 0, [[0.1], [0.9]], tasks=("a",))
    results = load_study_results("digits", store)
    assert finding(results) == "Best final score: naive, 0.900 (n = 1)."
    assert "0.900" in write_report(results, tmp_path / "out").read_text()
    assert not (tmp_path / "out" / "figures" / "forgetting.png").exists()


def test_written_answers_and_ability_stand_on_the_page_of_studies_that_measure_them_alone(store: str) -> None:
    study = Made(store, ["naive", "er"], [0])
    study.run("naive", 0, NAIVE[0])
    plain = write_report(load_study_results("digits", store), "out").read_text()
    study.run("er", 0, ER[0], steps={"answers/final_score": {20: 0.51}, "ability_delta": {20: -0.062}})
    page = write_report(load_study_results("digits", store), "out").read_text()
    assert "general ability" not in plain
    assert "answers: final score (OP)" in page and "0.510" in page and "-0.062" in page and "BWT" in page


def test_other_views_of_the_same_runs_stand_beside_the_default_one(store: str) -> None:
    study = Made(store, ["naive", "er"], [0, 1])
    for seed in (0, 1):
        study.run("naive", seed, NAIVE[seed])
        study.run("er", seed, ER[seed], views={"slow": NAIVE[seed]})
    results = load_study_results("digits", store)
    assert results.views("naive") == [] and results.views("er") == ["slow"]
    for metric in ("final_score", "learning_score", "final_forgetting"):
        assert results.through_view("er", "slow")[metric] == pytest.approx(results.by_seed("naive", metric))
    page = write_report(results, "out").read_text()
    apart = paired(results.by_seed("naive", "final_score"), results.by_seed("er", "final_score"))
    assert (
        "Other views" in page and f"<td>slow</td><td>2</td><td>{results.interval('naive', 'final_score')}</td>" in page
    )
    assert f"<td>{apart}</td>" in page
    text = printed(results)
    assert re.search(r"other views of the same runs(?:.*\n)+? variant +view +final score .*\n.*\n er +slow +\S", text)
    assert max(len(line) for line in text.splitlines()) <= 80 and str(apart) in text
    # Losses are turned in other views too.
    study = Made(store, ["naive"], [0], baseline=None)
    study.run("naive", 0, NAIVE[0], higher=False, views={"slow": ER[0]})
    found = load_study_results(str(study.folder)).through_view("naive", "slow")["final_score"]
    assert found == {0: pytest.approx(-(0.8 + 0.7) / 2)}


def test_the_terminal_table_reads_no_runs_table_which_of_a_thousand_runs_takes_long(store: str) -> None:
    def never() -> NoReturn:
        raise AssertionError("a run's table was read")

    made(store)
    results = load_study_results("digits", store)
    whole = printed(results)
    assert "other views" not in whole
    unread = replace(results, runs=[replace(run, read_tables=never) for run in results.runs])
    assert printed(unread) == whole


def test_what_strategies_measured_stands_on_the_page(store: str) -> None:
    study = Made(store, ["naive", "er"], [0, 1])
    for seed in (0, 1):
        study.run("naive", seed, NAIVE[seed])
    assert "strategies measured" not in write_report(load_study_results("digits", store), "out").read_text()
    for seed, ppl in ((0, 30.0), (1, 32.0)):
        study.run("er", seed, ER[seed], steps={"strategy/prequential/ppl": {10: 99.0, 20: ppl}})
    page = write_report(load_study_results("digits", store), "out").read_text()
    assert f"<td>prequential/ppl</td><td>–</td><td>{interval([30.0, 32.0])}</td>" in page


def test_an_arm_that_took_no_step_has_scores_and_no_forgetting(store: str) -> None:
    study = Made(store, ["naive", "zero", "cumulative"], [0])
    same = [[0.4, 0.5]] * 3
    study.run("naive", 0, NAIVE[0])
    study.run("zero", 0, same, row_steps=0, tags={"reference": "true"}, views={"bare": same})
    study.run("cumulative", 0, NAIVE[0], tags={"reference": "true", "strategy": "Cumulative"})
    results = load_study_results("digits", store)
    assert results.by_seed("zero", "final_score") == pytest.approx({0: 0.45})
    for metric in ("learning_score", "final_forgetting", "cumulative_forgetting", "forward_transfer", "intransigence"):
        assert results.by_seed("naive", metric) and not results.by_seed("zero", metric), metric
    assert not [name for run in results.of("zero") for name in run.metrics if "forgetting" in name]
    assert results.through_view("zero", "bare").keys() == {"final_score"}
    (line,) = [line for line in printed(results).splitlines() if line.strip().startswith("zero")][:1]
    assert line.split()[3:] == ["0.450", "–", "–"]


def test_a_baseline_without_a_finished_run_is_said(store: str) -> None:
    study = Made(store, ["naive", "er"], [0], baseline="naive")
    study.run("naive", 0, NAIVE[0][:2], status="FAILED", reason="out of memory")
    study.run("er", 0, ER[0])
    results = load_study_results("digits", store)
    said = "the baseline naive has no finished run, so that nothing is compared with it"
    assert said in " ".join(printed(results).split()) and said in write_report(results, "out").read_text()
    assert not [note for note in notes(results, "er") if "baseline" in note]


def test_a_figure_of_forgetting_that_has_no_line_says_why(store: str) -> None:
    study = Made(store, ["naive", "er"], [0])
    study.run("naive", 0, NAIVE[0])
    results = load_study_results("digits", store)
    assert "Two tasks give each arm one point of forgetting" in write_report(results, "out").read_text()
    journal = Journal(study.folder / "er-s0")
    journal.curve(15, 1, cells([0.5, 0.4], ["a", "b"]))
    journal.flush()
    study.run("er", 0, ER[0])
    assert "one point of forgetting" not in write_report(load_study_results("digits", store), "out").read_text()
    alone = Made(store, ["naive"], [0])
    alone.run("naive", 0, [[0.5], [0.9]], tasks=("a",))
    page = write_report(load_study_results(str(alone.folder), store), "alone").read_text()
    assert "No figure of forgetting: no run was trained on two tasks or more" in page
