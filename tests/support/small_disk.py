"""A study on a disk that becomes full, and then has room: run as a program, since it mounts a disk of its own.

    python tests/support/small_disk.py WHERE KIB      # WHERE: runs, database or both lie on the small disk

The disk is a tmpfs of KIB kibibytes in a mount namespace that ends with the program (`confined` gives the command).
Where the system allows no such thing, every file is limited to half of KIB instead (RLIMIT_FSIZE), which fails in the
same calls. Prints one JSON object with what happened.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def confined(where: str, kib: int) -> list[str]:
    """The command that runs this file, in a namespace where it may mount, if the system has them."""
    inside = ["unshare", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    return [*(inside if allowed else []), sys.executable, "-P", __file__, where, str(kib)]


class SmallDisk:
    """The folder `small`, with room for so many KiB until it is `enlarge`d."""

    def __init__(self, kib: int) -> None:
        Path("small").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", "small"]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024 // 2, resource.RLIM_INFINITY))

    def enlarge(self) -> None:
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", "small"], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def statuses(folder: Path) -> dict[str, str]:
    from clplat.journal import last_status
    from clplat.study_file import run_folders

    return {run.name: last_status(run) for run in run_folders(folder)}


def main(where: str, kib: int) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parent))
    from rich.console import Console
    from studies import study

    import clplat
    from clplat.journal import table
    from clplat.study import conclude

    disk, small = SmallDisk(kib), Path("small").absolute()
    uri = f"sqlite:///{(small if where in ('database', 'both') else Path.cwd()) / 'mlflow.db'}"
    replay = {"class_path": "ExperienceReplay", "init_args": {"capacity": 200}}
    data = study(
        variants={"naive": {}, "er": {"strategies": {"replay": replay}}}, launcher={"workers": 1},
        folder=str(small / "runs" if where in ("runs", "both") else Path("runs")),
        tracking={"enabled": where != "runs", "uri": uri, "log_every": 1, "system_metrics": False},
    )  # fmt: skip
    found, console = {"mounted": disk.mounted}, Console(record=True, width=300, quiet=False, file=sys.stderr)
    done = clplat.run(data, quiet=True)
    found |= {"outcomes": [[o.status, o.cause, o.reason] for o in done.outcomes], "then": statuses(done.folder)}
    conclude(done, console)
    found |= {"said": console.export_text(), "unsent": done.unsent}
    disk.enlarge()
    clplat.resume(done.folder, console=Console(quiet=True))
    found |= {"now": statuses(done.folder), "table": table(done.folder / "er-s0").to_rows()}
    if where != "runs":
        from clplat.study_results import load_study_results

        held = load_study_results(str(done.folder)).runs
        found["held"] = {run.variant: [run.status, run.tags.get("status_reason", ""), len(run.metrics)] for run in held}
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
