"""What `benchmarks/mlp_memory.py` measures: a memory at a shape, its inputs, peers that compute the same, the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kernel_cases import Outputs
from kernel_peers import Columns
from torch import Tensor

from clplat.kernels.delta_memory.reference import Inputs, chunk_bounds
from clplat.kernels.mlp_memory import MLPState, Rule, mlp_memory
from clplat.kernels.mlp_memory.reference import chunk_step

PARTS = ("W1", "W2", "S1", "S2")
Call = Callable[[Inputs, MLPState], Outputs]


@dataclass(frozen=True)
class Case:
    """One memory at one shape."""

    shape: tuple[int, ...]
    rule: Rule = Rule(residual=True)

    def drawn(self, device: str, dtype: torch.dtype) -> tuple[Inputs, MLPState, Tensor]:
        """Inputs on which the memory is stable (unit keys, steps as TitansLMM bounds them), and the gradient of o."""
        generator = torch.Generator(device).manual_seed(0)
        B, T, H, D, C = self.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        q, k, v, upstream = (normal(B, T, H, D) for _ in range(4))
        log_decay, log_momentum = F.logsigmoid(normal(B, T, H) + 4), F.logsigmoid(normal(B, T, H) + 2)
        rate = normal(B, T, H).sigmoid() / C * -log_momentum.expm1()
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        # All rows and heads begin alike: titans-pytorch knows nothing else.
        W1, W2 = normal(D, 4 * D) / D**0.5, normal(4 * D, D) / (4 * D) ** 0.5
        W1, W2 = (part.expand(B, H, *part.shape).contiguous() for part in (W1, W2))
        state = MLPState(W1, W2, torch.zeros_like(W1), torch.zeros_like(W2))
        inputs = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), rate, log_decay, log_momentum)
        return inputs, state, upstream.to(dtype)

    def ours(self, backend: str) -> Call:
        """`mlp_memory` in one of its forms."""

        def call(inputs: Inputs, state: MLPState) -> Outputs:
            kind = {"activation": self.rule.activation, "residual": self.rule.residual}
            o, end = mlp_memory(*inputs, state=state, chunk=self.shape[4], backend=backend, **kind)  # type: ignore[arg-type]
            return {"o": o} | {name: getattr(end, name) for name in PARTS}

        return call

    def compiled(self) -> Call:
        """The chunked form with the body of its loop compiled."""
        torch.compiler.reset()
        step = torch.compile(chunk_step, dynamic=False)

        def call(inputs: Inputs, state: MLPState) -> Outputs:
            W, S, outputs = state.weights, state.momentum, []
            for start, stop in chunk_bounds(self.shape[1], self.shape[4], 0):
                o, W, S = step(inputs.tokens(start, stop), W, S, W, self.rule)
                outputs.append(o)
            return {"o": torch.cat(outputs, 1).to(inputs.v.dtype)} | dict(zip(PARTS, (*W, *(S or ()))))

        return call

    def titans(self) -> Call:
        """titans-pytorch's memory of two layers, without norms, with gates a token and gradients a chunk."""
        from titans_pytorch import NeuralMemory
        from titans_pytorch.memory_models import MemoryMLP

        B, T, H, D, C = self.shape
        memory = NeuralMemory(
            dim=D, chunk_size=1, batch_size=C, model=MemoryMLP(D, depth=2, expansion_factor=4.0), pre_rmsnorm=False,
            mem_model_norm_add_residual=False, adaptive_step_transform=lambda step: step,
            store_memory_loss_fn=lambda read, target: (read - target).square().sum(-1) / 2,
        )  # fmt: skip
        memory.to_queries, memory.to_keys, memory.to_values = (Columns(n * D, (n + 1) * D) for n in range(3))
        memory.to_adaptive_step = Columns(3 * D, 3 * D + 1, lambda part: part[..., 0])
        memory.to_momentum = Columns(3 * D + 1, 3 * D + 2, lambda part: part[None])
        memory.to_decay_factor = Columns(3 * D + 2, 3 * D + 3)

        def call(x: Inputs, state: MLPState) -> Outputs:
            memory.to(x.q.device)
            with torch.no_grad():
                for weight, first in zip(memory.memory_model_parameters, state.weights, strict=True):
                    weight.copy_(first[0, 0].expand_as(weight))
            # The library passes gates through sigmoids, and its decay is what is forgotten.
            gates = (x.rate, x.log_momentum.exp().logit(), -x.log_decay.exp().logit())
            parts = [part.float() for part in (x.q, x.k, x.v, *(gate[..., None] for gate in gates))]
            rows = torch.cat(parts, -1).transpose(1, 2).reshape(B * H, T, 3 * D + 3)
            return {"o": memory(rows)[0].reshape(B, H, T, D).transpose(1, 2)}

        return call


def work(call: Call, given: tuple[Inputs, MLPState, Tensor], backward: bool) -> Callable[[], Outputs]:
    """The forward pass alone, keeping nothing, or both, with gradients of all inputs and of the first weights."""
    inputs, state, upstream = given
    if not backward:
        return torch.no_grad()(lambda: call(inputs, state))
    leaves = {name: part.detach().requires_grad_() for name, part in inputs._asdict().items() if part is not None}
    first = {name: getattr(state, name).detach().requires_grad_() for name in ("W1", "W2")}

    def both() -> Outputs:
        outputs = call(inputs._replace(**leaves), state._replace(**first))
        everything = leaves | first
        found = torch.autograd.grad(outputs["o"], list(everything.values()), upstream, allow_unused=True)
        outputs = {name: part.detach() for name, part in outputs.items()}
        return outputs | {f"d{name}": part for name, part in zip(everything, found, strict=True) if part is not None}

    return both


def sliced(outputs: Outputs) -> Outputs:
    """The first row's first two heads, on the CPU: neither rows nor heads know each other, gradients included."""
    states = (*PARTS, "dW1", "dW2")
    return {name: (part[:1, :2] if name in states else part[:1, :, :2]).float().cpu() for name, part in outputs.items()}


def reference(case: Case, given: tuple[Inputs, MLPState, Tensor], backward: bool) -> Outputs:
    """The slice in fp64 by the chunked form."""
    inputs, state, upstream = given
    few = Inputs(*(None if part is None else part[:1, :, :2].double() for part in inputs))
    rows = MLPState(*(None if part is None else part[:1, :2].double() for part in state))  # type: ignore[arg-type]
    return sliced(work(case.ours("torch"), (few, rows, upstream[:1, :, :2].double()), backward)())
