"""What `benchmarks/kernels.py` measures: cases of `delta_memory`, their inputs, the hardware's floor, and the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels.delta_memory import Mode, delta_memory
from clplat.kernels.delta_memory.reference import Inputs

CHUNK = 64
BANDWIDTH, OPERATIONS = 3.0e12, 790e12
"""What one H100 SXM does a second: bytes from memory, bf16 operations of the tensor cores (8192³ reaches 794e12)."""

Outputs = dict[str, Tensor]
"""`o` (B, T, H, D), `W` and `S` (B, H, D, D) where they are given, and gradients under `dq`, `dk`, …"""
Call = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Case:
    """One function of the family at one shape (B, T, H, D)."""

    mode: Mode
    decay: bool
    momentum: bool
    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        gates = [gate for gate, there in (("decay", self.decay), ("momentum", self.momentum)) if there]
        return f"{self.mode}, {' + '.join(gates) or 'no gates'}"

    @property
    def size(self) -> str:
        return "×".join(map(str, self.shape))


FAMILY: tuple[tuple[Mode, bool, bool], ...] = (
    ("gdn", True, False), ("gdn", False, False), ("hebb", True, False), ("frozen", True, True), ("exact", True, True),
)  # fmt: skip
"""Mode, decay, momentum: Gated DeltaNet, DeltaNet, gated linear attention, Titans, the exact rule with momentum."""


def drawn(case: Case, device: str, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """Inputs on which every mode is stable (unit keys, small steps under momentum), and the gradient of o."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    B, T, H, D = case.shape
    q, k, v, upstream = (normal(B, T, H, D) for _ in range(4))
    gate = (B, T, H)
    rate = normal(*gate).sigmoid() * (0.1 if case.mode == "frozen" or case.momentum else 1)
    log_decay = F.logsigmoid(normal(*gate) + 3) if case.decay else None
    log_momentum = F.logsigmoid(normal(*gate) + 1) if case.momentum else None
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), rate, log_decay, log_momentum), upstream.to(dtype)


def ours(case: Case, backend: str) -> Call:
    """`delta_memory` in one of its forms."""

    def call(inputs: Inputs) -> Outputs:
        o, state = delta_memory(*inputs, mode=case.mode, chunk=CHUNK, backend=backend)
        return {"o": o, "W": state.W} | ({} if state.S is None else {"S": state.S})

    return call


def work(call: Call, inputs: Inputs, upstream: Tensor, backward: bool) -> Callable[[], Outputs]:
    """The forward pass alone, keeping nothing for a backward pass, or both, with gradients of all inputs."""
    if not backward:
        return torch.no_grad()(lambda: call(inputs))
    leaves = {name: part.detach().requires_grad_() for name, part in inputs._asdict().items() if part is not None}

    def both() -> Outputs:
        outputs = call(inputs._replace(**leaves))
        found = torch.autograd.grad(outputs["o"], list(leaves.values()), upstream, allow_unused=True)
        outputs = {name: part.detach() for name, part in outputs.items()}
        return outputs | {f"d{name}": part for name, part in zip(leaves, found) if part is not None}

    return both


def sliced(outputs: Outputs) -> Outputs:
    """The first row's first two heads, on the CPU: neither rows nor heads know each other, gradients included."""
    return {
        name: (part[:1, :2] if name in ("W", "S") else part[:1, :, :2]).float().cpu() for name, part in outputs.items()
    }


def reference(case: Case, inputs: Inputs, upstream: Tensor, backward: bool) -> Outputs:
    """The slice in fp64 by the chunked form."""
    few = Inputs(*(None if part is None else part[:1, :, :2].double() for part in inputs))
    return sliced(work(ours(case, "torch"), few, upstream[:1, :, :2].double(), backward)())


def worst(found: Outputs, expected: Outputs) -> tuple[float, str]:
    """The largest relative error ‖x − y‖ / ‖y‖ of the tensors that both have, and whose it is; NaN counts as inf."""
    errors = {}
    for name in found.keys() & expected.keys():
        error = ((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)).item()
        errors[name] = error if error == error else float("inf")
    name = max(sorted(errors), key=errors.__getitem__)
    return errors[name], name


def input_bytes(case: Case, element: int) -> int:
    """q, k, v, the fp32 gates, and the fp32 states behind the last token."""
    B, T, H, D = case.shape
    gates = 1 + case.decay + case.momentum
    return B * T * H * (3 * D * element + 4 * gates) + (1 + case.momentum) * B * H * D * D * 4


def floor_ms(case: Case, backward: bool, element: int = 2) -> float:
    """The time below which no kernel of this form gets on an H100: the larger of its traffic and its products.

    Forward: every input is read once, o and the last states are written. Products of one chunk of C tokens and one
    head, C = 64: 2CD² each for qW and KᵀE, for KW unless `hebb`, for each of qS, KᵀE again and (`exact`, `gdn`) KS with
    momentum; 2C²D each for QKᵀ and its product with E, three times that more where errors are solved for; 2C³ each for
    the solve and for the two gates' triangles. Backward: W (and S) at each chunk's start, written in bf16 by the
    forward pass, are read; so are inputs and o's gradient; the inputs' gradients are written; 2.5 times the products.
    """
    B, T, H, D = case.shape
    tokens, chunks = B * T * H, B * H * -(-T // CHUNK)
    solved = case.mode in ("exact", "gdn")
    per_chunk = (
        CHUNK * D * D * (4 + 2 * (case.mode != "hebb") + 4 * case.momentum + 2 * (case.momentum and solved))
        + CHUNK**2 * D * (4 + 6 * solved)
        + CHUNK**3 * 2 * (solved + case.momentum)
    )
    flops, states = chunks * per_chunk, 1 + case.momentum
    traffic = input_bytes(case, element) + tokens * D * element
    if not backward:
        return 1e3 * max(traffic / BANDWIDTH, flops / OPERATIONS)
    kept = chunks * states * D * D * 2
    gates = 1 + case.decay + case.momentum
    back = tokens * (7 * D * element + 2 * 4 * gates) + kept
    return 1e3 * (
        max((traffic + kept) / BANDWIDTH, flops / OPERATIONS) + max(back / BANDWIDTH, 2.5 * flops / OPERATIONS)
    )
