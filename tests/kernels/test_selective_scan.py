"""The selective scan in chunks and by its kernels equals one token after the other, every gradient included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from clplat.kernels.backends import interpreting
from clplat.kernels.selective_scan import selective_scan, token_loop
from clplat.kernels.selective_scan.reference import linear_recurrence

COMPILER = Path(__file__).parents[1] / "support" / "hopper_compiler.py"
NAMES = ("x", "step", "rate", "b", "c", "first")


interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")


def inputs(tokens: int, *, rows: int = 2, channels: int = 5, state: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    found = {
        "x": normal(rows, tokens, channels),
        "step": torch.nn.functional.softplus(normal(rows, tokens, channels)),
        "rate": -normal(state, channels).exp(),
        "b": normal(rows, tokens, state),
        "c": normal(rows, tokens, state),
        "first": normal(rows, state, channels),
    }
    return {name: value.requires_grad_() for name, value in found.items()}


def in_chunks(
    given: dict[str, torch.Tensor], keep: torch.Tensor | None = None, chunk: int | None = None, backend: Any = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    *parts, first = (given[name] for name in NAMES)
    return selective_scan(*parts, first_BNC=first, keep_BT=keep, chunk=chunk, backend=backend)


def kept(tokens: int) -> torch.Tensor:
    """A state is forgotten before every fifth token or so, two tokens in a row among them."""
    keep = (torch.rand(2, tokens, generator=torch.Generator().manual_seed(3)) > 0.2).double()
    keep[0, 1:3] = 0.0
    return keep


def assert_equals_token_loop(given: dict[str, torch.Tensor], keep: torch.Tensor | None, **options: Any) -> None:
    """Outputs, last state and every gradient, in fp64."""
    every = torch.ones_like(given["x"][..., 0]) if keep is None else keep
    probes = [torch.randn_like(given[name]) for name in ("x", "first")]
    results = []
    for outputs in (token_loop(*given.values(), every), in_chunks(given, keep, **options)):
        score = sum((part * probe).sum() for part, probe in zip(outputs, probes))
        results.append(dict(zip(("y", "last", *NAMES), (*outputs, *torch.autograd.grad(score, tuple(given.values()))))))
    for name, expected in results[0].items():
        close = torch.allclose(results[1][name], expected, rtol=1e-9, atol=1e-12)
        assert close, f"{name} differs by {float((results[1][name] - expected).detach().abs().max())}"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("tokens", "chunk"), [(1, 64), (2, 1), (12, 64), (37, 16), (48, 16), (63, 9), (63, 62), (130, None)]
)
def test_outputs_and_gradients_equal_one_token_after_the_other(tokens: int, chunk: int | None, documents: bool) -> None:
    assert_equals_token_loop(inputs(tokens), kept(tokens) if documents else None, chunk=chunk)


@interpreted
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("tokens", "chunk", "sizes"), [(1, 4, {}), (8, 4, {}), (7, 3, {"channels": 70, "state": 5}),
                                                        (5, None, {"channels": 33, "state": 40})])  # fmt: skip
def test_kernels_equal_one_token_after_the_other(
    tokens: int, chunk: int | None, sizes: dict[str, int], documents: bool, unwritten_is_nan: None
) -> None:
    keep = kept(tokens) if documents else None
    assert_equals_token_loop(inputs(tokens, **sizes), keep, chunk=chunk, backend="triton")


@interpreted
def test_kernels_read_tensors_however_they_lie_in_memory() -> None:
    given = {name: value.detach().transpose(0, -1).contiguous().transpose(0, -1) for name, value in inputs(5).items()}
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    assert not leaves["x"].is_contiguous()
    assert_equals_token_loop(leaves, kept(5), chunk=2, backend="triton")


def test_without_a_gpu_the_kernels_are_taken_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(3)
    with pytest.raises(ValueError, match="backend: must be auto, torch, triton or reference"):
        in_chunks(given, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="tensors are on cpu"):
        in_chunks(given, backend="triton")
    expected = in_chunks(given, backend="reference")
    torch.testing.assert_close(in_chunks(given), expected, rtol=0, atol=1e-12)


def test_no_decay_is_too_fast_and_no_chunk_too_long_for_float32() -> None:
    given = {name: value.detach().float() for name, value in inputs(300).items()}
    given["rate"] = torch.tensor([[-1e-4], [-1.0], [-1e6]]).repeat(1, 5)
    given["step"] = given["step"] * 100
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    answers, last = in_chunks(leaves, chunk=300)
    slopes = torch.autograd.grad(answers.square().sum() + last.sum(), tuple(leaves.values()))
    assert all(bool(part.isfinite().all()) for part in (answers, last, *slopes))
    expected, _ = token_loop(*(value.detach().double() for value in leaves.values()), torch.ones(2, 300))
    torch.testing.assert_close(answers.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_step_of_zero_leaves_the_state_as_it_is() -> None:
    given = inputs(20)
    given["step"] = given["step"] * (torch.arange(20) < 7).unsqueeze(-1)
    _, last = in_chunks(given, chunk=6)
    short = {name: value[:, :7] if name in ("x", "step", "b", "c") else value for name, value in given.items()}
    torch.testing.assert_close(last, in_chunks(short)[1], rtol=0, atol=1e-14)


def test_half_precision_inputs_are_scanned_in_float32() -> None:
    given = {name: value.detach().bfloat16() for name, value in inputs(70).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers, last = in_chunks(given)
    expected, _ = in_chunks({name: value.float() for name, value in given.items()})
    assert answers.dtype == last.dtype == torch.float32
    assert torch.equal(answers, expected)


def test_a_recurrence_backwards_is_one_forwards_with_all_reversed() -> None:
    decay, write = torch.rand(2, 2, 11, 3, 4, dtype=torch.float64)
    first = torch.randn(2, 3, 4, dtype=torch.float64)
    states, last = linear_recurrence(decay, write, first, backwards=True)
    turned, end = linear_recurrence(decay.flip(1), write.flip(1), first)
    torch.testing.assert_close(states, turned.flip(1))
    torch.testing.assert_close(last, end)


def test_gradients_of_each_row_by_vmap_equal_those_of_the_whole() -> None:
    given = {name: value.detach() for name, value in inputs(20).items()}

    def score(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one = {name: value[:1] for name, value in given.items()} | {"x": x[None], "b": b[None]}
        return in_chunks(one, chunk=8)[0].square().sum()

    together = vmap(grad(score, argnums=(0, 1)))(given["x"], given["b"])
    for row in range(2):
        x, b = (given[name][row].clone().requires_grad_() for name in ("x", "b"))
        for found, expected in zip(together, torch.autograd.grad(score(x, b), (x, b))):
            torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-12)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    given = inputs(5)
    (slope,) = torch.autograd.grad(in_chunks(given)[0].square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        slope.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_both_operators_say_the_truth_about_themselves(documents: bool, fused: bool) -> None:
    given = inputs(10)
    keep = kept(10) if documents else None
    torch.library.opcheck(torch.ops.clplat.selective_scan_forward.default, (*given.values(), keep, 4, fused))
    answers, last, starts = torch.ops.clplat.selective_scan_forward(*given.values(), keep, 4, fused)
    parts = [given[name].detach() for name in NAMES[:5]]
    torch.library.opcheck(
        torch.ops.clplat.selective_scan_backward.default,
        (*parts, keep, starts.detach(), answers.detach(), last.detach(), 4, fused),
    )


def test_compiled_whole_it_gives_the_same_outputs_and_gradients() -> None:
    given = inputs(10)
    compiled = torch.compile(lambda parts: in_chunks(parts, chunk=4)[0], fullgraph=True, backend="aot_eager")
    answers, expected = compiled(given), in_chunks(given, chunk=4)[0]
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(part.square().sum(), tuple(given.values())) for part in (answers, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-10)


def test_both_kernels_compile_for_a_hopper_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", str(COMPILER), "selective_scan"], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert {line.split()[0] for line in result.stdout.splitlines()} == {"forward", "backward"}
