"""`delta_memory` as a PyTorch citizen: compiler, autograd, autocast, FLOP counts, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_memories import STATES, Case, called, problem, state_of
from memory_problems import TOKENWISE, Tensors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import clplat.kernels.delta_memory.op  # noqa: F401  registers the operators
from clplat.kernels.backends import interpreting
from clplat.kernels.delta_memory import which_backend
from clplat.kernels.delta_memory.reference import MODES

BACKENDS = ("torch", "triton") if interpreting() else ("torch",)

every_mode = pytest.mark.parametrize("mode", MODES)
interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")


OP_CASES = [
    Case(mode="hebb", tokens=5, momentum=False, decay=False),
    Case(mode="frozen", tokens=5),
    Case(mode="gdn", tokens=5, momentum=False),
    Case(mode="frozen", lengths=(3, 0, 2), offsets=(1, 3, 14)),
]


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_the_forward_operator_is_what_it_is_registered_as(case: Case) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # Packed, places for chunks stay empty, and the last check takes it for wrong that what lies there differs.
    checks = checks[:3] if case.lengths else checks
    torch.library.opcheck(
        torch.ops.clplat.delta_memory_forward.default, operands(case, gradients=True), test_utils=checks
    )


@interpreted
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_the_backward_operator_is_what_it_is_registered_as(case: Case) -> None:
    given, arguments = problem(case), operands(case, gradients=False)
    with torch.no_grad():
        o, W, S, anchor, *kept = torch.ops.clplat.delta_memory_forward(*arguments)
    flowing = [torch.ones_like(part) for part in (o, W, S, anchor)]
    assert flowing[0].shape == given["v"].shape
    torch.library.opcheck(
        torch.ops.clplat.delta_memory_backward.default, (*arguments[:11], *kept, *flowing, *arguments[11:13])
    )


def operands(case: Case, *, gradients: bool) -> tuple[Any, ...]:
    """The arguments of the forward operator."""
    given, arguments = problem(case), case.arguments()
    leaves = [given[name].requires_grad_(gradients) if name in given else None for name in (*TOKENWISE, *STATES)]
    return (*leaves, state_of(case, given).offset, arguments["cu_seqlens"], MODES.index(case.mode), case.chunk, True)


# Operations of one chunk and value head with D = E, in C D², C² D and C³. C D²: q W and kᵀ E, k W but in hebb, and of
# momentum q S, another kᵀ E and, where errors see it, k S. C² D: q kᵀ and P E, and three more where errors see others.
# C³: that inverse and what joins the two gates. A product of n³ has 2 n³ operations.
OPERATIONS = {
    ("hebb", False): (4, 4, 0),
    ("gdn", False): (6, 10, 2),
    ("frozen", True): (10, 4, 2),
    ("exact", True): (12, 10, 4),
}


@interpreted
@pytest.mark.parametrize(("mode", "momentum"), OPERATIONS)
def test_the_flop_counter_knows_both_passes(mode: Any, momentum: bool) -> None:
    case = Case(mode=mode, momentum=momentum, tokens=32, D=32, E=32)
    given = {name: part.requires_grad_() for name, part in problem(case).items()}
    with FlopCounterMode(display=False) as counter:
        o, _ = called(case, given, backend="triton")
        forward = counter.get_total_flops()
        o.sum().backward()
    wide, square, cube = OPERATIONS[mode, momentum]
    C, D, chunks = case.chunk, case.D, case.tokens // case.chunk
    assert forward == chunks * (wide * C * D * D + square * C * C * D + cube * C**3)
    assert counter.get_total_flops() == 3.5 * forward


def test_auto_is_pytorch_on_the_cpu_and_never_the_interpreter() -> None:
    given = problem(Case(mode="gdn"))
    tensors = given["q"], given["k"], given["v"]
    assert which_backend(*tensors) == "torch"
    assert [which_backend(*tensors, backend=name) for name in ("torch", "recurrent")] == ["torch", "recurrent"]  # type: ignore[arg-type]


@interpreted
def test_triton_is_triton_when_asked_for_and_interpreted() -> None:
    given = problem(Case(mode="gdn"))
    assert which_backend(given["q"], given["k"], given["v"], backend="triton") == "triton"


def eighth(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


@interpreted
@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        (Case(mode="gdn", D=130), {}, "heads are 130 and 16 wide.*up to 128"),
        (Case(mode="gdn", E=200), {}, "heads are 16 and 200 wide.*up to 128"),
        (Case(mode="gdn", chunk=24), {}, r"chunk is 24.*\(16, 32, 64\)"),
        (Case(mode="gdn"), {"q": torch.Tensor.bfloat16}, "q, k, v are torch.bfloat16, torch.float32.*take one of"),
        (Case(mode="gdn"), {name: eighth for name in "qkv"}, "torch.float8_e4m3fn.*take one of torch.bfloat16"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_what_they_can(
    case: Case, change: dict[str, Callable[[Tensor], Tensor]], says: str
) -> None:
    given = problem(case)
    given |= {name: function(given[name]) for name, function in change.items()}
    with pytest.raises(ValueError, match=f"backend: triton is asked for, but .*{says}"):
        called(case, given, backend="triton")
    assert which_backend(given["q"], given["k"], given["v"], chunk=case.chunk) == "torch"


def without_last(name: str) -> Callable[[Tensors], Tensors]:
    """A problem whose tensor `name` misses the last entry of its last dimension."""
    return lambda given: given | {name: given[name][..., :-1]}


@pytest.mark.parametrize(
    ("change", "named", "says"),
    [
        (without_last("q"), {}, "^q and k must be"),
        (lambda given: given | {"q": given["q"][0], "k": given["k"][0]}, {}, "^q and k must be"),
        (lambda given: given | {"v": given["v"][:, 1:]}, {}, "^v must be"),
        (lambda given: given | {"v": given["v"][:, :, :3]}, {}, "^v must be .* a multiple of 2 heads"),
        (without_last("rate"), {}, "^rate: must be"),
        (without_last("log_decay"), {}, "^log_decay: must be"),
        (without_last("log_momentum"), {}, "^log_momentum: must be"),
        (without_last("W"), {}, "^state.W: must be"),
        (without_last("S"), {}, "^state.S: must be"),
        (without_last("anchor"), {}, "^state.anchor: must be"),
        (lambda given: {name: part for name, part in given.items() if name != "S"}, {}, "^state.S and log_momentum"),
        (
            lambda given: {name: part for name, part in given.items() if name != "log_momentum"},
            {},
            "^state.S and log_momentum",
        ),
        (lambda given: {n: part for n, part in given.items() if n != "anchor"}, {}, "^state.anchor and state.offset"),
        (lambda given: given, {"mode": "hebbian"}, "^mode: must be one of hebb, frozen, exact, gdn, got 'hebbian'"),
        (lambda given: given, {"chunk": 0}, "^chunk: must be a whole number of tokens, at least 1, got 0"),
        (lambda given: given, {"backend": "cuda"}, "^backend: must be auto, torch, triton or recurrent, got 'cuda'"),
        (lambda given: given, {"cu_seqlens": torch.tensor([0, 3, 18])}, "^cu_seqlens: .* B = 1, got B = 2"),
        (lambda given: given, {"cu_seqlens": torch.tensor([0.0, 18.0])}, "^cu_seqlens: must be .* integers"),
        (lambda given: given, {"cu_seqlens": torch.tensor([[0, 18]])}, "^cu_seqlens: must be .* integers"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name(change: Any, named: dict[str, Any], says: str) -> None:
    case = Case(mode="frozen", batch=2, heads=2, group=2, offsets=(1, 2))
    with pytest.raises(ValueError, match=says):
        called(case, change(problem(case)), **named)


def test_an_offset_a_sequence_is_asked_for() -> None:
    case = Case(mode="frozen", batch=2, offsets=(1, 2, 3))
    with pytest.raises(ValueError, match=r"^state.offset: must be \(sequences,\) = \(2,\), got \(3,\)"):
        called(case, problem(case))
