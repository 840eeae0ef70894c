"""`SelfModifyingMemory`: memories that make the keys, values and gates under which they all learn.

For token t of a head, with the memories M_□ as they were when the token's chunk began (`anchor`):

    k_t = unit(M_k(x_t))    v_t = M_v(x_t)
    η_t = max_rate · sigmoid(⟨r, M_η(x_t)⟩ + b)     α_t = sigmoid(⟨s, M_α(x_t)⟩ + c)
    y_t = M_mem,t−1(q_t)                                            `read`, here before the token's own write
    every M_□ learns under k_t, η_t, α_t to answer M_□(v_t) to k_t  `written` of the associative memory's token loop

Source: Behrouz et al. 2025 (Nested Learning, arXiv:2512.24695, §8, Eq. 76-93), read as docs/hope.md says. Shapes: see
`inputs.py`; n memories, first those that make something, last the one that answers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.layout import Documents, bounds, continued, separated
from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.state import LOWEST_GATE, MemoryState, Tokens
from clplat.architectures.associative_memory.telemetry import Written
from clplat.architectures.hope.bank import Bank
from clplat.architectures.hope.forms import Group, by_chunks, one_by_one, one_more
from clplat.architectures.hope.inputs import HeadInputs, Lifted
from clplat.architectures.hope.operation import operation_for
from clplat.architectures.hope.options import SelfModifyingOptions


class SelfModifyingMemory(nn.Module):
    """The memories of H heads, with the weights that each of them begins with, which the outer loss trains."""

    def __init__(self, *, options: SelfModifyingOptions, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.options, self.num_heads = options, num_heads
        self.rule, self.names = options.rule, (*options.generators, "memory")
        network = Network(rule=self.rule, scale=None, shift=None)
        self.groups = [Group(bank=Bank(network=network, count=len(names)), chunk=n) for names, n in options.groups]
        self.generators = Bank(network=network, count=len(options.generators))
        self.shapes = [(len(self.names) * num_heads, *widths) for widths in self.rule.widths(head_size, head_size)]
        self.first = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in self.shapes)
        gates = [name for name in ("rate", "decay") if name in options.generators]
        self.readouts = nn.ParameterDict({name: nn.Parameter(torch.empty(num_heads, 1, head_size)) for name in gates})
        self.biases = nn.ParameterDict({name: nn.Parameter(torch.empty(num_heads, 1)) for name in gates})
        self.writes = True
        """False: step sizes are 0 and nothing is forgotten, for a reading without memory."""
        self.operation = operation_for(options)
        self.backend = "chunked PyTorch" if self.operation is None else "none yet"
        """What computed the last call, for the record."""
        self.reset_start()

    @torch.no_grad()
    def reset_start(self) -> None:
        """Layers keep the scale of what they read; where the memory that answers is a matrix, it begins near zero."""
        for weight in [*self.first, *self.readouts.values()]:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1] if weight.shape[1] == 1 else weight.shape[1]))
        if self.rule.memory.depth == 1:
            nn.init.normal_(self.first[0][-self.num_heads :], std=0.02)
        for name, bias in self.biases.items():
            nn.init.constant_(bias, torch.tensor(getattr(self.options, f"{name}_start")).logit().item())

    def empty_state(self, rows: int) -> MemoryState:
        """The memories before any token, in float32 or wider; layers of one group after those of another."""
        weights = tuple(
            weight[taken].to(self._wide()).expand(rows, -1, -1, -1)
            for taken in self._rows()
            for weight in self.first
        )  # fmt: skip
        momentum = tuple(map(torch.zeros_like, weights)) if self.options.momentum else ()
        return MemoryState(weights, momentum, weights, torch.zeros(rows, dtype=torch.long, device=weights[0].device))

    def forward(self, tokens: HeadInputs, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Answers (B, H, T, D), in float32 or wider or where kernels answer in the queries' precision, and the state
        behind the last token; `state` continues an earlier call, at any token."""
        with torch.autocast(tokens.x.device.type, enabled=False):
            if self._taken(tokens, even=state is None):
                return self._operated(tokens, state)
            tokens = tokens.widened(self._wide())
            if state is None:
                return by_chunks(self, tokens, self.empty_state(len(tokens.x)), fresh=True)
            if tokens.x.shape[2] == 1:
                return one_more(self, tokens, state)
            layout = continued(state.offset, tokens.x.shape[2], self.period)
            answers, end = by_chunks(self, tokens.taken(layout.source_BN), state)
            return layout.back(answers), end

    def read_documents(self, tokens: HeadInputs, documents: Documents) -> Tensor:
        """Answers (B, H, T, D) to packed rows, where each document begins with the first state and a chunk."""
        rows, length = tokens.x.shape[0], tokens.x.shape[2]
        with torch.autocast(tokens.x.device.type, enabled=False):
            if self._taken(tokens, even=False):
                ends = bounds(documents, tokens.x.device)
                answers, _ = self._operated(tokens.in_one_row(), None, ends)
                return answers.unflatten(2, (rows, length)).squeeze(0).transpose(0, 1)
            layout = separated(documents, rows, length, self.period)
            moved = tokens.widened(self._wide()).taken(layout.source_BN)
            return layout.back(by_chunks(self, moved, self.empty_state(rows), layout.begins_Bn, fresh=True)[0])

    def written(self, inputs: HeadInputs) -> dict[str, Written]:
        """What each memory does with a row (`telemetry.py`), under the keys, values and gates that are made of it while
        it is read: so it is read in the chunks of what makes them."""
        inputs, chunk, size = inputs.widened(self._wide()), self.groups[0].chunk, len(self.first)
        first = end = self.empty_state(1)
        backend, parts = self.backend, list[Tokens]()
        with torch.autocast(inputs.x.device.type, enabled=False):
            for start in range(0, inputs.x.shape[2], chunk):
                part = inputs.part(start, start + chunk)
                parts.append(self.generated(part, end.anchor[:size]))
                _, end = self(part, end)
        self.backend, found = backend, {}
        for number, ((names, _), group) in enumerate(zip(self.options.groups, self.groups, strict=True)):
            layers = slice(number * size, (number + 1) * size)
            for place, name in enumerate(names):
                heads = slice(place * self.num_heads, (place + 1) * self.num_heads)
                before, after = (tuple(W[:, heads] for W in state.weights[layers]) for state in (first, end))
                found[name] = Written(group.bank.network, tuple(parts), before, after, tells_gates=name == "memory")
        return found

    def _taken(self, tokens: HeadInputs, *, even: bool) -> bool:
        """Whether the operation computes these tokens, `even` where every row begins a chunk and none has documents:
        else its PyTorch form would take one sequence after another, and only its kernels are asked."""
        self.backend = "chunked PyTorch"
        if self.operation is None or tokens.counts is not None or not self.writes:
            return False
        form = self.operation.form(tokens)
        if form == "torch" and not even:
            return False
        self.backend = f"{self.operation.name} {form}"
        return True

    def _operated(
        self, tokens: HeadInputs, state: MemoryState | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """By the operation."""
        assert self.operation is not None
        rows = len(tokens.x) if cu_seqlens is None else len(cu_seqlens) - 1
        begun = self.empty_state(rows) if state is None else state
        gates = dict(self.readouts), dict(self.biases)
        return self.operation(tokens, *gates, begun, fresh=state is None, cu_seqlens=cu_seqlens)

    def by_definition(
        self, tokens: HeadInputs, state: MemoryState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryState]:
        """The same by the loop over tokens, for tests."""
        state = self.empty_state(len(tokens.x)) if state is None else state
        begins = None if documents is None else documents.begins()
        return one_by_one(self, tokens.widened(self._wide()), state, begins)

    @property
    def period(self) -> int:
        """Tokens after which chunks of all memories begin together."""
        return max(group.chunk for group in self.groups)

    def lifted(self, inputs: HeadInputs) -> Lifted:
        """What of tokens depends on no memory."""
        log_momentum = damping = None
        if inputs.momentum is not None:
            log_momentum = F.logsigmoid(inputs.momentum)
            damping = -log_momentum.expm1() if self.options.damped else None
            log_momentum = log_momentum.clamp(min=LOWEST_GATE)
            if inputs.counts is not None:
                log_momentum = log_momentum.masked_fill(~inputs.counts.unsqueeze(1), 0.0)
        query, key = (None if part is None else _unit(part) for part in (inputs.query, inputs.key))
        value = inputs.value
        if value is not None and self.options.unit_values:
            value = _unit(value)
        return Lifted(inputs.x, query, key, value, inputs.rate, inputs.decay, log_momentum, damping, inputs.counts)

    def generated(self, inputs: HeadInputs, anchor: tuple[Tensor, ...]) -> Tokens:
        """What the memories read of tokens: made by those of the first group as they are in `anchor`, or given."""
        return self.made(self.lifted(inputs), self.groups[0].bank.stacked(anchor[: len(self.first)]))

    def made(self, inputs: Lifted, anchor: tuple[Tensor, ...]) -> Tokens:
        """The same by the first group's memories, stacked as in `bank.py`."""
        made: dict[str, Tensor] = {}
        if self.options.generators:
            answers = self.generators.answers(anchor, inputs.x)
            made = dict(zip(self.options.generators, answers, strict=True))
        q, k = (_unit(made[name]) if name in made else getattr(inputs, name) for name in ("query", "key"))
        v = inputs.value
        if "value" in made:
            v = _unit(made["value"]) if self.options.unit_values else made["value"]
        assert q is not None and k is not None and v is not None
        rate = erase = self.options.largest_rate * self._gate("rate", inputs.rate, made).sigmoid()
        if inputs.damping is not None:
            rate = rate * inputs.damping
        log_decay: tuple[Tensor, ...] = ()
        if self.options.decay:
            gate = F.logsigmoid(self._gate("decay", inputs.decay, made)).clamp(min=LOWEST_GATE)
            log_decay = (gate.unsqueeze(-1),) * len(self.first)
        tokens = Tokens(q, k, v, rate, log_decay, inputs.log_momentum, None, inputs.counts, erase)
        return tokens.silenced() if self.writes else tokens.resting()

    def _gate(self, name: str, given: Tensor | None, made: dict[str, Tensor]) -> Tensor:
        if name in made:
            return (made[name] * self.readouts[name]).sum(-1) + self.biases[name]
        assert given is not None
        return given

    def _rows(self) -> list[slice]:
        """Each group's heads among those of all memories."""
        ends = [0]
        for group in self.groups:
            ends.append(ends[-1] + group.bank.count * self.num_heads)
        return [slice(start, stop) for start, stop in zip(ends, ends[1:])]

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.first[0].dtype, torch.float32)


def _unit(part: Tensor) -> Tensor:
    return F.normalize(part, dim=-1)
