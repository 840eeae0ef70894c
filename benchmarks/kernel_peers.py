"""Other implementations of what `delta_memory` computes, each as a function of the same inputs, for comparison.

A peer may change the inputs once before it is timed. What it cannot compute it says by an exception, whose text stands
in the table. Heads come first or last, gates as logarithms or not, as each library wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from kernel_cases import CHUNK, Call, Case, Outputs, ours
from torch import Tensor, nn

from clplat.kernels.delta_memory.reference import Inputs, chunk_bounds, chunk_step, empty_state


class Peer(NamedTuple):
    """`build` makes the function; `prepare` changes the inputs; gradients in `other` are not those of our inputs."""

    name: str
    build: Callable[[], Call]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    other: tuple[str, ...] = ()


def loops(case: Case, compiled: bool) -> list[Peer]:
    """Our own chunked PyTorch form, as it is, or with the body of its loop compiled."""
    if compiled:
        return [Peer("torch.compile of the chunk", lambda: _compiled(case))]
    return [Peer("eager chunk loop", lambda: ours(case, "torch"))]


def libraries(case: Case) -> list[Peer]:
    """Released implementations of the same function."""
    found = {
        ("gdn", True, False): [Peer("fla chunk_gated_delta_rule", _gated_delta_rule)],
        ("gdn", False, False): [Peer("fla chunk_delta_rule", _delta_rule)],
        # The library has no rate: it is multiplied into v beforehand, at no cost to the library.
        ("hebb", True, False): [Peer("fla chunk_simple_gla", _simple_gla, _rate_in_values, ("dv", "drate"))],
        ("exact", True, True): [
            # In chunks of 64, its default, release 0.6.0 is far off on a CPU where momentum fades faster than W.
            Peer(f"fla chunk_momentum_delta_rule, chunks of {size}", partial(_momentum_delta_rule, size))
            for size in (16, CHUNK)
        ],
        ("frozen", True, True): [Peer("titans-pytorch", lambda: _titans_pytorch(case))],
    }.get((case.mode, case.decay, case.momentum), [])
    if case.mode == "frozen" and case.momentum and case.shape[1] <= 512:
        found = [*found, Peer("fla titans (naive)", lambda: _titans_naive(case))]
    return found


def _compiled(case: Case) -> Call:
    # A case has its own shapes and types: what earlier ones compiled only fills the cache's limit.
    torch.compiler.reset()
    step = torch.compile(chunk_step)

    def call(inputs: Inputs) -> Outputs:
        state, outputs = empty_state(inputs, len(inputs.q)), []
        W, S = state.W, state.S
        for start, stop in chunk_bounds(case.shape[1], CHUNK, 0):
            o, W, S = step(inputs.tokens(start, stop), W, S, W, case.mode)
            outputs.append(o)
        return {"o": torch.cat(outputs, 1).to(inputs.v.dtype), "W": W} | ({} if S is None else {"S": S})

    return call


def _gated_delta_rule() -> Call:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule

    return lambda x: _named(
        rule(x.q, x.k, x.v, g=x.log_decay, beta=x.rate, scale=1.0, output_final_state=True,
             use_qk_l2norm_in_kernel=False)
    )  # fmt: skip


def _delta_rule() -> Call:
    from fla.ops.delta_rule import chunk_delta_rule as rule

    return lambda x: _named(
        rule(x.q, x.k, x.v, x.rate, scale=1.0, output_final_state=True, use_qk_l2norm_in_kernel=False)
    )


def _simple_gla() -> Call:
    from fla.ops.simple_gla import chunk_simple_gla as attend

    return lambda x: _named(attend(x.q, x.k, x.v, g=x.log_decay, scale=1.0, output_final_state=True))


def _rate_in_values(inputs: Inputs) -> Inputs:
    return inputs._replace(v=(inputs.v * inputs.rate[..., None]).to(inputs.v.dtype))


def _momentum_delta_rule(size: int) -> Call:
    from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule as rule

    return lambda x: {
        "o": rule(x.q, x.k, x.v, x.log_decay, x.log_momentum, eta=x.rate, scale=1.0, use_qk_l2norm_in_kernel=False,
                  use_p_times_alpha=False, chunk_size=size)[0]
    }  # fmt: skip


def _named(results: tuple[Tensor, Tensor]) -> Outputs:
    return dict(zip(("o", "W"), results))


def _titans_naive(case: Case) -> Call:
    """Normalises what it reads and learns v − k, so that it is a neighbour; it is run to say by how much it differs."""
    from fla.ops.titans.naive import chunk_titans_linear_ref as titans

    H, D = case.shape[2:]

    def call(x: Inputs) -> Outputs:
        w, b = torch.ones(H, D, device=x.q.device), torch.zeros(H, D, device=x.q.device)
        theta, alpha, eta = x.rate / 2, 1 - x.log_decay.exp(), x.log_momentum.exp()
        gates = (gate[..., None] for gate in (theta, alpha, eta))
        return {"o": titans(x.q, x.k, x.v, w, b, *gates, chunk_size=CHUNK)[0]}

    return call


class Columns(nn.Module):
    """Stands where the library has a projection of its input, and takes what lies in columns start..stop of it."""

    def __init__(self, start: int, stop: int, unit: Callable[[Tensor], Tensor] = lambda part: part) -> None:
        super().__init__()
        self.start, self.stop, self.unit = start, stop, unit

    def forward(self, rows: Tensor) -> Tensor:
        return self.unit(rows[..., self.start : self.stop])


def _titans_pytorch(case: Case) -> Call:
    """Its memory of one matrix, without norms, with gates a token and the gradient taken anew every CHUNK tokens."""
    from titans_pytorch import NeuralMemory
    from titans_pytorch.memory_models import MemoryMLP

    B, T, H, D = case.shape
    memory = NeuralMemory(
        dim=D, chunk_size=1, batch_size=CHUNK, model=MemoryMLP(D, depth=1), pre_rmsnorm=False,
        mem_model_norm_add_residual=False, adaptive_step_transform=lambda step: step,
        store_memory_loss_fn=lambda read, target: (read - target).square().sum(-1) / 2,
    )  # fmt: skip
    memory.to_queries, memory.to_keys, memory.to_values = (Columns(n * D, (n + 1) * D) for n in range(3))
    memory.to_adaptive_step = Columns(3 * D, 3 * D + 1, lambda part: part[..., 0])
    memory.to_momentum = Columns(3 * D + 1, 3 * D + 2, lambda part: part[None])
    memory.to_decay_factor = Columns(3 * D + 2, 3 * D + 3)
    for weight in memory.memory_model_parameters:
        nn.init.zeros_(weight)

    def call(x: Inputs) -> Outputs:
        # The library passes gates through sigmoids, and its decay is what is forgotten.
        gates = (x.rate, x.log_momentum.exp().logit(), -x.log_decay.exp().logit())
        parts = [part.float() for part in (x.q, x.k, x.v, *(gate[..., None] for gate in gates))]
        rows = torch.cat(parts, -1).transpose(1, 2).reshape(B * H, T, 3 * D + 3)
        memory.to(rows.device)
        return {"o": memory(rows)[0].reshape(B, H, T, D).transpose(1, 2)}

    return call
