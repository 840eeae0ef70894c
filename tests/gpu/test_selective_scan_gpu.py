"""The selective scan's kernels as the GPU's compiler makes them: many tokens, every size of program, bits, replays.

pytest tests/gpu/test_selective_scan_gpu.py -x
"""

from __future__ import annotations

import pytest
import torch
from gpu_work import no_waiting
from torch import Tensor

from clplat.kernels.selective_scan import selective_scan, token_loop

NAMES = ("x", "step", "rate", "b", "c", "first")


def inputs(rows: int, tokens: int, channels: int, state: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw, device="cuda")

    found = {
        "x": normal(rows, tokens, channels),
        "step": torch.nn.functional.softplus(normal(rows, tokens, channels) - 2),
        "rate": -normal(state, channels).exp(),
        "b": normal(rows, tokens, state),
        "c": normal(rows, tokens, state),
        "first": normal(rows, state, channels),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in found.items()}


def solved(given: dict[str, Tensor], keep: Tensor, backend: str) -> dict[str, Tensor]:
    if backend == "reference":
        outputs = token_loop(*given.values(), keep)
    else:
        *parts, first = given.values()
        outputs = selective_scan(*parts, first_BNC=first, keep_BT=keep, backend=backend)
    answers, last = outputs
    probe = torch.linspace(-1, 1, answers.shape[1], device="cuda", dtype=answers.dtype)[:, None]
    score = (answers * probe).sum() + last.sum()
    return dict(zip(("y", "last", *NAMES), (answers, last, *torch.autograd.grad(score, tuple(given.values())))))


@pytest.mark.parametrize(
    "sizes", [(3, 100, 70, 16), (2, 33, 16, 128), (2, 257, 512, 16), (1, 1, 5, 3), (2, 40, 1000, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_everything_is_rounding_away_from_one_token_after_the_other(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(*sizes, dtype=dtype)
    keep = (torch.rand(sizes[:2], device="cuda") > 0.1).to(dtype)
    expected = solved(
        {name: value.detach().double().requires_grad_() for name, value in given.items()}, keep.double(), "reference"
    )
    found = solved(given, keep, "triton")
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error <= bound, f"{name} is {float(error):.1e} away"


def test_every_run_gives_the_same_bits_and_auto_takes_the_kernels() -> None:
    given, keep = inputs(4, 200, 512, 16, torch.float32), torch.ones(4, 200, device="cuda")
    first = solved(given, keep, "triton")
    for backend in ("triton", "auto"):
        again = solved(given, keep, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_nothing_waits_for_the_device() -> None:
    given, keep = inputs(2, 64, 64, 16, torch.float32), torch.ones(2, 64, device="cuda")
    solved(given, keep, "triton")
    with no_waiting():
        solved(given, keep, "triton")
