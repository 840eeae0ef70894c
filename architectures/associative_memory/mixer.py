"""A mixing layer of a decoder whose heads are associative memories: projections, gates, a norm and a way out.

Shapes: B rows, T tokens, P pending tokens, C hidden size, H heads, D head size, K width of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import MemoryState, Tokens
from clplat.architectures.layers import causal_convolution
from clplat.architectures.option_checks import check_at_least, check_choices

MixerState = tuple[Tensor, tuple[Any, ...], Tensor, Tensor]
"""What the convolution read before the pending tokens (B, K − 1, 3C), the memory there (`MemoryState` as plain tuples),
tokens that were read last and may be padding (B, P, C), and the number of tokens before them (B,)."""

OutputGate = Literal["none", "silu"]


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """What stands around the memory.

    `conv_width` tokens are read by a short convolution of queries, keys and values, with SiLU behind it; 1 is neither.
    `learned_rate` gives every token a step size `max_rate` · sigmoid(·), otherwise each takes `max_rate`. `max_rate`
    defaults to 1, and for rules with a gradient at the chunk's start to 1 / chunk: unit keys that repeat all through a
    chunk then do not overshoot. `damped` multiplies it by 1 − momentum, for the same reason. `normaliser` divides
    answers by the sum of what was read with, as linear attention does. `output_gate` multiplies normed answers by
    silu(gate(x)). `learned_start`: the memory's first weights are trained, otherwise 0.
    """

    group: ClassVar[str] = "projection"

    conv_width: int = 4
    learned_rate: bool = True
    max_rate: float | None = None
    damped: bool = False
    normaliser: bool = False
    output_gate: OutputGate = "silu"
    learned_start: bool = True
    decay_start: float = 0.99
    momentum_start: float = 0.9

    def __post_init__(self) -> None:
        check_choices(self, output_gate=OutputGate)
        check_at_least(self, 1, "conv_width")
        if self.max_rate is not None and self.max_rate <= 0:
            raise ValueError(f"projection.max_rate: must be above 0, got {self.max_rate}")
        for name in ("decay_start", "momentum_start"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"projection.{name}: must lie between 0 and 1, got {getattr(self, name)}")
        if self.normaliser and self.learned_start:
            raise ValueError("projection.normaliser: needs learned_start: false, for a sum of positive weights")


class MemoryMixer(nn.Module):
    """Reads tokens into the memories of its heads and answers from them.

    How many of a call's tokens were a row's own and how many padding is known only when the next call says where it
    continues: as in Mamba's layer the state keeps the last call's inputs, and the next one takes in those that count.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, rule: MemoryRule, projection: ProjectionOptions) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide hidden_size ({hidden_size})")
        self.rule, self.options, self.num_heads = rule, projection, num_heads
        self.head_size = hidden_size // num_heads
        self.max_rate = projection.max_rate or (1 / rule.chunk if rule.anchored else 1.0)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        wide = projection.conv_width > 1
        self.conv_weight = nn.Parameter(torch.empty(projection.conv_width, 3 * hidden_size)) if wide else None
        self.starts = self._gate_starts()
        self.gates = nn.Linear(hidden_size, sum(len(part) for part in self.starts.values())) if self.starts else None
        self.memory = AssociativeMemory(
            rule=rule, num_heads=num_heads, key_size=self.head_size,
            value_size=self.head_size + projection.normaliser, learned_start=projection.learned_start,
        )  # fmt: skip
        self.norm = nn.RMSNorm(self.head_size, eps=1e-6)
        self.output_gate = nn.Linear(hidden_size, hidden_size, bias=False) if projection.output_gate != "none" else None
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.last_row: Tensor | None = None
        """The first row that was evaluated last, for `telemetry.py`; no answer depends on it."""
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """What is not drawn like a projection: convolution, gates and the memory's first weights."""
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -(len(self.conv_weight) ** -0.5), len(self.conv_weight) ** -0.5)
        if self.gates is not None:
            self.gates.bias.copy_(torch.cat(list(self.starts.values())))
        self.memory.reset_start()

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass over rows, packed with documents or each of one text."""
        documents = reading.documents
        if not self.training:
            self.last_row = x_BTC[:1].detach().clone()
        tokens = self._tokens(x_BTC, self.qkv(x_BTC), None, documents)
        return self._given_out(x_BTC, self._remembered(x_BTC, tokens, None, documents)[0])

    def continued(self, x_BTC: Tensor, state: MixerState, reading: Reading) -> tuple[Tensor, MixerState]:
        """New tokens after the `reading.lengths` (B,) tokens of each row that `state` holds."""
        before, memory = self._taken_in(state, reading.lengths)
        answers, _ = self._remembered(x_BTC, self._tokens(x_BTC, self.qkv(x_BTC), before, None), memory, None)
        return self._given_out(x_BTC, answers), (before, memory, x_BTC, reading.lengths)

    def empty_state(self, batch_size: int) -> MixerState:
        """The state before any token, with nothing pending."""
        weight, hidden = self.out.weight, self.out.in_features
        return (
            weight.new_zeros(batch_size, self.options.conv_width - 1, 3 * hidden),
            self._empty_memory(batch_size),
            weight.new_zeros(batch_size, 0, hidden),
            weight.new_zeros(batch_size, dtype=torch.long),
        )

    def mixing_flops(self, tokens: int) -> float:
        """Operations of the memory beyond 2 for each weight that it begins with. For every number of a layer: 2 to ask
        it with the key, to write it, to read it, behind the first layer to send the error back, and 4 for momentum.
        Inside chunks: products of queries and keys with each other and with steps, and of momentum with decay."""
        momentum, total = self.rule.optimizer == "momentum", 0.0
        for layer, (heads, inputs, outputs) in enumerate(self.memory.shapes):
            passes = 6.0 + 2.0 * bool(layer) + 4.0 * momentum
            inside = 2.0 * self.rule.chunk * (inputs + outputs)
            total += heads * (passes * inputs * outputs + inside)
        total += 2.0 * self.num_heads * self.rule.chunk**2 * momentum
        return tokens * (total - 2.0 * sum(part.numel() for part in self.memory.first))

    def _remembered(
        self, x_BTC: Tensor, tokens: Tokens, memory: tuple[Any, ...] | None, documents: Documents | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Answers (B, H, T, E) of the memory, and the memory behind the tokens as plain tuples, which nobody asks for
        where rows are packed with documents. What stands around one memory or several overrides this."""
        if documents is not None:
            return self.memory.read_documents(tokens, documents), ()
        answers, after = self.memory(tokens, None if memory is None else MemoryState(*memory))
        return answers, tuple(after)

    def _empty_memory(self, batch_size: int) -> tuple[Any, ...]:
        """The memory before any token, as `_remembered` takes it."""
        return tuple(self.memory.empty_state(batch_size))

    def _gate_starts(self) -> dict[str, Tensor]:
        """Biases with which the gates begin, in the order of their outputs, heads first."""
        heads, rule, options = self.num_heads, self.rule, self.options
        widths = [inputs for inputs, _ in rule.widths(self.head_size, self.head_size)]
        decays = {"none": 0, "decay": heads, "channel": heads * sum(widths)}[rule.retention]
        starts = {"rate": torch.zeros(heads if options.learned_rate else 0)}
        starts["decay"] = torch.full((decays,), torch.tensor(options.decay_start).logit().item())
        momenta = heads if rule.optimizer == "momentum" else 0
        starts["momentum"] = torch.full((momenta,), torch.tensor(options.momentum_start).logit().item())
        starts["threshold"] = torch.full((heads if rule.bias.kind == "huber" else 0,), math.log(math.e - 1))
        return {name: part for name, part in starts.items() if len(part)}

    def _tokens(
        self, x_BTC: Tensor, qkv: Tensor, before: Tensor | None, documents: Documents | None,
        counts_BT: Tensor | None = None,
    ) -> Tokens:  # fmt: skip
        """Queries, keys, values and gates of tokens, whose projections `qkv` follow those `before`."""
        if self.conv_weight is not None:
            numbers = None if documents is None else documents.number_BT
            qkv = F.silu(causal_convolution(qkv, self.conv_weight, None, before, numbers))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_size)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.options.normaliser:
            v = F.pad(v, (0, 1), value=1.0)
        wide = torch.promote_types(q.dtype, torch.float32)
        gates = self._gates(x_BTC, wide)
        momentum = F.logsigmoid(gates["momentum"]) if "momentum" in gates else None
        rate = gates["rate"].sigmoid() if "rate" in gates else q.new_ones(q.shape[:3], dtype=wide)
        if self.options.damped and momentum is not None:
            rate = rate * -momentum.expm1()
        threshold = F.softplus(gates["threshold"]) if "threshold" in gates else None
        return Tokens(q, k, v, self.max_rate * rate, self._decays(gates), momentum, threshold, counts_BT)

    def _gates(self, x_BTC: Tensor, wide: torch.dtype) -> dict[str, Tensor]:
        """Gates by name before their squashing, (B, H, T), that of channels (B, H·channels, T)."""
        if self.gates is None:
            return {}
        raw = (F.linear(x_BTC, self.gates.weight).to(wide) + self.gates.bias.to(wide)).mT
        return dict(zip(self.starts, raw.split([len(part) for part in self.starts.values()], dim=1), strict=True))

    def _decays(self, gates: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Logarithms of what is kept, for every layer."""
        if "decay" not in gates:
            return ()
        log_decay, widths = F.logsigmoid(gates["decay"]), [shape[1] for shape in self.memory.shapes]
        if self.rule.retention == "decay":
            return (log_decay.unsqueeze(-1),) * len(widths)
        return log_decay.unflatten(1, (self.num_heads, -1)).mT.split(widths, dim=-1)

    def _given_out(self, x_BTC: Tensor, answers_BHTE: Tensor, factor: Tensor | None = None) -> Tensor:
        """From answers to what is added to the stream; `factor` (B, T, C) multiplies them once they are normed."""
        if self.options.normaliser:
            sums = answers_BHTE[..., -1:]
            # Sums are above 0, but for memories that are kept from writing.
            answers_BHTE = answers_BHTE[..., :-1] / sums.masked_fill(sums == 0, 1.0)
        normed = self.norm(answers_BHTE.transpose(1, 2).to(x_BTC.dtype)).flatten(2).to(x_BTC.dtype)
        if self.output_gate is not None:
            normed = normed * F.silu(self.output_gate(x_BTC))
        if factor is not None:
            normed = normed * factor
        return self.out(normed)

    def _taken_in(self, state: MixerState, lengths: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The convolution's inputs and the memory after the pending tokens that belong to a row."""
        before, memory, pending, held = state
        if not pending.shape[1]:
            return before, memory
        count = lengths - held
        counts_BP = torch.arange(pending.shape[1], device=pending.device) < count.unsqueeze(1)
        qkv = self.qkv(pending)
        _, memory = self._remembered(pending, self._tokens(pending, qkv, before, None, counts_BP), memory, None)
        places = count.unsqueeze(1) + torch.arange(before.shape[1], device=pending.device)
        both = torch.cat([before.to(qkv.dtype), qkv], dim=1)
        return both.gather(1, places.unsqueeze(-1).expand(-1, -1, both.shape[-1])), memory
