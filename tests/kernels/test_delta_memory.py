"""Every form of `delta_memory` against the token loop in fp64: outputs, end states and the gradient of every input.

On a computer without a GPU the Triton kernels run in Triton's interpreter; with one, see tests/gpu.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from delta_memories import Case, agrees, assert_close, by, definition, problem, read
from memory_problems import BACKWARD, FORWARD, covering, distances

from clplat.kernels.backends import interpreting
from clplat.kernels.delta_memory import delta_memory
from clplat.kernels.delta_memory.reference import MODES

BACKENDS = ("torch", "triton") if interpreting() else ("torch",)

pytestmark = [pytest.mark.usefixtures("unwritten_is_nan"), pytest.mark.parametrize("backend", BACKENDS)]
every_mode = pytest.mark.parametrize("mode", MODES)

CASES = [
    Case(**levels)
    for levels in covering(
        ("mode", "decay", "momentum"),
        mode=MODES, decay=(True, False), momentum=(True, False), tokens=(1, 15, 16, 17, 35), D=(16, 60, 64),
        E=(16, 32, 60), group=(1, 2),
    )
]  # fmt: skip
LARGER = [
    Case(mode="hebb", tokens=67, chunk=32),
    Case(mode="frozen", tokens=130, chunk=64),
    Case(mode="frozen", tokens=31, chunk=32, heads=2, group=2),
    Case(mode="exact", tokens=65, chunk=64, group=2),
    Case(mode="gdn", tokens=33, chunk=32, batch=2, D=64, E=60),
    # More columns than any program holds at once.
    Case(mode="exact", D=16, E=100),
    Case(mode="gdn", tokens=63, chunk=64, heads=2),
]
SEGMENTS = (5, 0, 16, 1, 19, 0)


@pytest.mark.parametrize("case", CASES + LARGER, ids=str)
def test_outputs_states_and_gradients_are_those_of_the_token_loop(case: Case, backend: str) -> None:
    agrees(case, backend)


@every_mode
def test_a_memory_without_a_state_begins_with_zeros(mode: Any, backend: str) -> None:
    case = Case(mode=mode)
    given = problem(case)
    given["W"], given["S"] = torch.zeros_like(given["W"]), torch.zeros_like(given["S"])
    tokens = [given[name] for name in ("q", "k", "v", "rate", "log_decay", "log_momentum")]
    o, end = delta_memory(*tokens, mode=mode, chunk=case.chunk, backend=backend)  # type: ignore[arg-type]
    expected = definition(case, given)
    found = {"o": o, "W": end.W, "S": end.S}
    assert max(distances(found, {name: expected[name] for name in found}).values()) <= FORWARD  # type: ignore[arg-type]


@every_mode
@pytest.mark.parametrize("momentum", [True, False])
def test_packed_sequences_are_as_good_as_alone(mode: Any, momentum: bool, backend: str) -> None:
    agrees(Case(mode=mode, lengths=SEGMENTS, momentum=momentum), backend)


@every_mode
def test_packed_sequences_continue_chunks_of_their_own(mode: Any, backend: str) -> None:
    agrees(Case(mode=mode, lengths=SEGMENTS, offsets=(3, 7, 0, 15, 5, 0)), backend)


@every_mode
def test_rate_zero_leaves_the_memory_alone(mode: Any, backend: str) -> None:
    case = Case(mode=mode, momentum=False, decay=False)
    given = problem(case)
    given["rate"] = torch.zeros_like(given["rate"])
    found = agrees(case, backend, given)
    assert torch.equal(found["W"], given["W"])
    assert torch.allclose(found["o"][:, :, 0], given["q"][:, :, 0] @ given["W"][:, 0], atol=1e-5)


@every_mode
def test_decay_one_is_no_decay(mode: Any, backend: str) -> None:
    with_decay, without = Case(mode=mode), Case(mode=mode, decay=False)
    given = problem(with_decay)
    given["log_decay"] = torch.zeros_like(given["log_decay"])
    found = agrees(with_decay, backend, given)
    del found["dlog_decay"], given["log_decay"]
    assert_close(found, by(without, given, backend), forward=FORWARD, backward=BACKWARD)


@every_mode
def test_momentum_vanishes_at_its_lowest_gate_and_only_there(mode: Any, backend: str) -> None:
    case = Case(mode=mode)
    given = problem(case)
    given["log_momentum"] = torch.full_like(given["log_momentum"], -torch.inf)
    vanished = agrees(case, backend, given)
    assert vanished["dlog_momentum"].abs().max() == 0
    given["log_momentum"] = torch.full_like(given["log_momentum"], 0.99).log()
    strong = read(case, given, backend)
    del given["log_momentum"], given["S"]
    without = read(replace(case, momentum=False), given, backend)
    assert distances({"o": vanished["o"]}, {"o": without})["o"] < 1e-4
    assert distances({"o": strong}, {"o": without})["o"] > 0.1


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("mode", ["exact", "gdn"])
def test_keys_that_resemble_each_other_do_no_harm(mode: Any, momentum: bool, backend: str) -> None:
    # Where (I + A)⁻¹ is found by a Neumann series, its terms reach 1e8 and more here.
    case = Case(mode=mode, tokens=130, chunk=64, D=32, momentum=momentum)
    given = problem(case)
    direction = torch.nn.functional.normalize(given["k"] + 20 * given["k"][:, :1], dim=-1)
    given |= {"k": direction, "rate": torch.ones_like(given["rate"])}
    given["log_decay"] = given["log_decay"].clamp(min=-0.01)
    if momentum:
        given["log_momentum"] = torch.full_like(given["log_momentum"], 0.1).log()
    assert_close(by(case, given, backend), definition(case, given), forward=1e-5, backward=1e-4)


@every_mode
def test_inputs_may_lie_in_memory_in_any_order(mode: Any, backend: str) -> None:
    case = Case(mode=mode, heads=2)
    given = problem(case)
    strange = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "v", "do")}
    strange["k"] = torch.stack([given["k"], given["k"]], -1)[..., 0]
    strange |= {name: given[name].mT.contiguous().mT for name in ("W", "dW", "dS", "S")}
    strange |= {name: given[name][..., :1].expand(-1, -1, 2) for name in ("rate", "log_decay", "log_momentum")}
    assert not any(part.is_contiguous() for part in strange.values())
    agrees(case, backend, given | strange)


@every_mode
def test_packed_sequences_and_heads_know_nothing_of_each_other(mode: Any, backend: str) -> None:
    case = Case(mode=mode, heads=2, lengths=(6, 7))
    given = problem(case)
    changed = {name: part.clone() for name, part in given.items()}
    for name in ("q", "k", "v", "rate", "do"):
        changed[name][:, 6:] *= -0.5
        changed[name][:, :, 1] *= -0.5
    changed["W"][1], changed["dW"][:, 1] = 7, 7
    before, after = by(case, given, backend), by(case, changed, backend)
    for name in ("o", "dq", "dk", "dv", "drate", "dlog_decay", "dlog_momentum"):
        assert torch.equal(before[name][0, :6, 0], after[name][0, :6, 0]), name
        assert not torch.equal(before[name], after[name]), name
    for name in ("W", "S", "dW", "dS"):
        assert torch.equal(before[name][0, 0], after[name][0, 0]), name


@every_mode
def test_rows_of_a_batch_know_nothing_of_each_other(mode: Any, backend: str) -> None:
    case = Case(mode=mode, batch=2)
    given = problem(case)
    changed = {name: part.clone() for name, part in given.items()}
    for name in ("q", "k", "v", "rate"):
        changed[name][1] *= -0.5
    before, after = read(case, given, backend), read(case, changed, backend)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
