"""The command line: `clplat COMMAND`. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from clplat.study import Study
    from clplat.tuning.outcome import Tuned

DESCRIPTION = """Continual-learning experiments: train on a sequence of tasks, measure what is forgotten,
compare strategies in MLflow."""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(prog="clplat", description=DESCRIPTION)
    root.add_argument("--version", action="store_true", help="print the version and stop")
    root.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="run a study: CONFIG [--dotted.key value ...] [--dry-run]")
    run.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped study (`clplat list studies`)")
    run.add_argument("--best", action="store_true", help="CONFIG is a name of known-good settings; alone: list them")
    run.add_argument("--variant", help="this one of its variants")
    run.add_argument(
        "--seed", type=int, help="this one of its seeds; with --variant of a study's folder: that one run of it"
    )
    run.add_argument("--dry-run", action="store_true", help="two batches a task; estimate time and memory")
    tune = commands.add_parser("tune", help="search the `space:` of a study, and report what the best has gained")
    tune.add_argument("config", help="a YAML file with a space, or the name of a shipped one (docs/tuning.md)")
    tune.add_argument("--on-test-sequence", action="store_true", help="tune on the very sequence that is reported")
    resume = commands.add_parser("resume", help="continue a run, a study or a tune where it was stopped")
    resume.add_argument("target", metavar="RUN_OR_FOLDER", help="a run folder, a study folder, or an MLflow run id")
    compare = commands.add_parser("compare", help="print the comparison of a study's variants, or of several studies")
    report = commands.add_parser("report", help="write report.html and figures for a study, or one for several")
    for command in (compare, report):
        command.add_argument(
            "studies", nargs="+", metavar="STUDY",
            help="a study folder, or the name or run id of a study in MLflow; several: variants by stream",
        )  # fmt: skip
        command.add_argument("--baseline", help="the variant to compare with")
        command.add_argument("--uri", help="MLflow tracking URI (default: the study's, or sqlite:///mlflow.db)")
    report.add_argument(
        "--out", help="folder for the report (default: the study's folder, or here; for several studies: here)"
    )
    evaluate = commands.add_parser("evaluate", help="score a run's final model on a stream")
    evaluate.add_argument("run", help="a run folder, or an MLflow run id")
    evaluate.add_argument("--stream", help="class name, or YAML of class_path and init_args (default: the run's own)")
    reproduce = commands.add_parser("reproduce", help="run again what MLflow holds of a run, and compare the results")
    reproduce.add_argument("run", help="an MLflow run id, or a run folder")
    analyze = commands.add_parser("analyze", help="study the weights that a finished run kept")
    analyze.add_argument("what", choices=["connectivity"], help="the loss on lines between the weights of its tasks")
    analyze.add_argument("run", help="a run folder, or an MLflow run id")
    analyze.add_argument("--points", type=int, default=11, help="losses on a line, its ends included (default 11)")
    analyze.add_argument("--gap", type=int, default=2, help="tasks between the ends of a line, at most (default 2)")
    analyze.add_argument("--rows", type=int, default=200, help="test rows of each task (default 200)")
    register = commands.add_parser("register", help="put a finished run's model into MLflow's model registry")
    register.add_argument("run", help="a run folder, or an MLflow run id")
    register.add_argument("--name", help="the registered model (default: STUDY-VARIANT); versions are counted up")
    sync = commands.add_parser("sync", help="send what MLflow has not got yet")
    sync.add_argument("target", metavar="RUN_OR_FOLDER", help="a run folder or a study folder")
    sync.add_argument("--uri", help="send everything to this server from now on")
    ui = commands.add_parser("ui", help="open MLflow on this machine (localhost only)")
    ui.add_argument("--uri", default="sqlite:///mlflow.db")
    ui.add_argument("--port", type=int, default=5000)
    show = commands.add_parser("show", help="print a study, fully resolved")
    show.add_argument("config")
    listing = commands.add_parser("list", help="list streams, architectures, layers, strategies, optimizers, studies")
    listing.add_argument("what", nargs="?", help="one of these words; all of them by default")
    commands.add_parser("doctor", help="versions, devices, Triton, caches")
    for command in (run, tune, show):
        command.epilog = (
            "Any key of the configuration can be set: --training.batch_size 64. Where runs are carried out: "
            "--launcher.kind local (this machine), ray or slurm; --launcher.workers of them side by side "
            "(docs/launchers.md)"
        )
    resume.epilog = "Keys that results do not depend on can be set: --training.workers 2, --tracking.uri …"
    return root


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 1 for an error, 2 for wrong usage, 75 for stopped and ready to be resumed."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    if options.version:
        from importlib.metadata import version

        print(f"clplat {version('clplat')}")
        sys.exit(0)
    if options.command is None:
        root.print_help()
        sys.exit(2)
    if options.command == "run" and options.config is None and not options.best:
        root.error("run: which CONFIG? `clplat list studies` names those that are shipped")
    overrides = dotted(rest, root, allowed=options.command in ("run", "tune", "resume", "show"))
    from clplat.errors import ClplatError, Interrupted
    from clplat.interruption import exit_code, stopping_at_once

    try:
        with stopping_at_once():
            code = perform(options, overrides)
    except ClplatError as error:
        if options.traceback:
            raise
        print(f"clplat {options.command}: {error}", file=sys.stderr)
        code = 1
    except Interrupted as stop:
        remedy = stop.remedy or ("; nothing had been begun" if options.command in ("run", "tune") else "")
        print(f"clplat {options.command}: stopped by {stop.signal_name}{remedy}", file=sys.stderr)
        code = exit_code(stop.signal_name)
    except BrokenPipeError:
        # The reader of our output left (as with `| head`); Python must not complain again when it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def dotted(rest: Sequence[str], root: argparse.ArgumentParser, *, allowed: bool) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` pairs out of what argparse did not know."""
    pairs: list[tuple[str, str]] = []
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or not allowed:
            root.error(f"unrecognized argument: {word}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                root.error(f"--{key}: a value is missing")
            value = words.pop(0)
        pairs.append((key, value))
    return pairs


def perform(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    """Carry out one command; its exit code."""
    from clplat.terminal import terminal

    console = terminal()
    match options.command:
        case "run":
            return _run(options, overrides, console)
        case "tune":
            from clplat.tuning.checks import load_tune

            asked = [("tune.on_test_sequence", "true")] if options.on_test_sequence else []
            study = load_tune(options.config, overrides + asked)
            # After that: it loads all that trains, which takes seconds.
            from clplat.tuning.tune import run_tune

            return _conclude(run_tune(study, console), console)
        case "resume":
            from clplat.api import resume

            return _conclude(resume(options.target, overrides, console), console)
        case "compare" | "report":
            _compare(options, console)
        case "evaluate":
            from clplat.api import evaluate
            from clplat.overview import shown_frame

            console.print(shown_frame(evaluate(options.run, options.stream), f"{options.run} now"))
        case "reproduce":
            from clplat.api import reproduce
            from clplat.overview import shown_frame

            scores = reproduce(options.run, console)
            same = scores["recorded"].equals(scores["now"])
            last = scores[scores["row"] == scores["row"].max()]
            console.print(shown_frame(last, "the last row of the result table"))
            console.print("Every score of the whole table is the same, bit for bit." if same else "The tables differ.")
            return 0 if same else 1
        case "analyze":
            from clplat.api import analyze_connectivity
            from clplat.connectivity.lines import LINES
            from clplat.overview import shown_frame

            console.print("measuring losses on the lines between the run's weights …")
            folder, barriers = analyze_connectivity(
                options.run, points=options.points, gap=options.gap, rows=options.rows
            )
            moved, barriers = barriers["weights"].unique(), barriers.drop(columns="weights").round(4)
            console.print(shown_frame(barriers, "barriers in nats; connected: at most 5 % of the ends' mean loss"))
            console.print(LINES, soft_wrap=True)
            console.print(f"weights moved: {'; '.join(moved)}", soft_wrap=True)
            console.print(f"connectivity: {folder / 'connectivity.png'}", soft_wrap=True)
        case "register":
            from clplat.registry import register

            version = register(options.run, options.name)
            console.print(f"registered: models:/{version.name}/{version.version}", soft_wrap=True)
        case "sync":
            from clplat.study_record import sync

            console.print(f"MLflow has all of {sync(options.target, options.uri)} runs")
        case "ui":
            return _serve(options)
        case "show":
            from clplat.overview import shown

            console.print(shown(options.config, overrides), soft_wrap=True)
        case "list":
            from clplat.overview import listed

            for table in listed(options.what):
                console.print(table)
        case "doctor":
            from clplat.overview import examined

            table, healthy = examined()
            console.print(table)
            return 0 if healthy else 1
    return 0


def _run(options: argparse.Namespace, overrides: list[tuple[str, str]], console: Console) -> int:
    from clplat.study_file import chosen, load_study

    if options.config is not None and Path(options.config).is_dir():
        from clplat.one_run import run_one

        outcome = run_one(options.config, options.variant, options.seed, console)
        if outcome.status != "FINISHED":
            console.print(f"{outcome.folder}: {outcome.status}. {outcome.reason}", soft_wrap=True)
        return outcome.code
    if options.best:
        from clplat import best

        if options.config is None:
            console.print(best.listed())
            return 0
        study = best.study(options.config, overrides)
    else:
        study = load_study(options.config, overrides)
    study = chosen(study, options.variant, options.seed)
    if study.space and not options.dry_run:
        console.print(f"its space is not searched: `clplat tune {options.config}` does that", soft_wrap=True)
    if options.dry_run:
        from clplat.dry_run import estimate

        console.print(estimate(study, console))
        return 0
    from clplat.study import run_study

    return _conclude(run_study(study, console), console)


def _compare(options: argparse.Namespace, console: Console) -> None:
    """One study's variants, or those of several studies stream by stream: in the terminal, or as a page."""
    from clplat.study_results import load_study_results

    found = [load_study_results(name, options.uri) for name in options.studies]
    if len(found) > 1:
        from clplat.side_by_side import side_by_side, side_table
        from clplat.side_page import write_side_page

        sides = side_by_side(found, options.baseline)
        if options.command == "compare":
            console.print(side_table(sides))
            return
        page = write_side_page(sides, Path(options.out or "."))
    elif options.command == "compare":
        from clplat.report import compare_table

        console.print(compare_table(found[0], options.baseline))
        return
    else:
        from clplat.page import write_report

        page = write_report(found[0], options.out, options.baseline)
    console.print(f"report: {page}", soft_wrap=True)


def _conclude(ended: Study | Tuned, console: Console) -> int:
    """The end of a study: the table, the report, and how to look at it in MLflow; of a tune: the front and the gain."""
    from clplat.study import Study, conclude

    if isinstance(ended, Study):
        conclude(ended, console)
    else:
        from clplat.tuning.tune import show

        show(ended, console)
    return ended.code


def _serve(options: argparse.Namespace) -> int:
    from clplat.errors import Interrupted
    from clplat.ui import serve

    try:
        return serve(options.uri, options.port)
    except Interrupted:
        return 0


if __name__ == "__main__":
    main()
