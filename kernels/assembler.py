"""The assembler that turns the kernels into a GPU's own code.

ptxas 12.8 makes Hopper's tensor cores read beyond a block's shared memory in some of them, see docs/results/kernels.md.
Triton 3.6 brings that one, and beside it, for newer GPUs, one that does not.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import torch

OLDEST = (12, 9)
CHOICE = "TRITON_PTXAS_PATH"


@torch.compiler.assume_constant_result
def fault_on_hopper() -> str:
    """Why kernels compiled here for Hopper would be wrong, and the remedy; empty where they would not.

    Where Triton's own choice is too old and a newer one lies beside it, this process takes that one from now on.
    """
    return _fault(_folder(), os.environ.get(CHOICE))


def _folder() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@cache
def _fault(folder: Path, chosen: str | None) -> str:
    taken = Path(chosen) if chosen else folder / "ptxas"
    found = version(taken)
    if found >= OLDEST:
        return ""
    spare = folder / "ptxas-blackwell"
    if not chosen and version(spare) >= OLDEST:
        os.environ[CHOICE] = str(spare)
        return ""
    what = f"{taken} is version {'.'.join(map(str, found))}" if found else f"{taken} does not run"
    return f"{what}, and Hopper needs ptxas {OLDEST[0]}.{OLDEST[1]} or newer: set {CHOICE} to one, or update Triton"


def version(program: Path) -> tuple[int, ...]:
    """Major and minor number; empty if the program is not there or says nothing that can be read."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    release = re.search(r"release (\d+)\.(\d+)", said)
    return tuple(map(int, release.groups())) if release else ()
