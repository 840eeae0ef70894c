"""A mixing layer of a decoder whose heads modify themselves: what they are given of the stream, and costs.

Shapes: B rows, T tokens, C hidden size, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.architectures.associative_memory.carrying import CarryingMixer
from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.telemetry import Written
from clplat.architectures.hope.inputs import HeadInputs
from clplat.architectures.hope.memory import SelfModifyingMemory
from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.architectures.layers import WideBias


class SelfModifyingMixer(CarryingMixer):
    """Heads that make their own keys, values and gates of their share of the stream, which is projected, read by the
    short convolution and passed through SiLU first, as queries and what else is not made are."""

    def __init__(self, *, hidden_size: int, num_heads: int, options: SelfModifyingOptions) -> None:
        own = [f"x of {name}" for name in options.generators] if options.inputs == "own" else []
        self.inputs = own or ["x"]
        self.projected = [*self.inputs, *(name for name in ("query", "key", "value") if name not in options.generated)]
        super().__init__(
            hidden_size=hidden_size, num_heads=num_heads, channels=len(self.projected) * hidden_size,
            conv_width=options.conv_width, output_gate=options.output_gate,
        )  # fmt: skip
        self.options = options
        kept = {"rate": "rate" not in options.generators, "momentum": options.momentum}
        kept["decay"] = options.decay and "decay" not in options.generators
        self.gated = [name for name, has in kept.items() if has]
        self.gates = WideBias(hidden_size, len(self.gated) * num_heads) if self.gated else None
        self.memory: SelfModifyingMemory = SelfModifyingMemory(
            options=options, num_heads=num_heads, head_size=self.head_size
        )
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """What is not drawn like a projection: convolution, gates and the memories' first weights."""
        super().reset_dynamics()
        if self.gates is not None:
            starts = torch.tensor([getattr(self.options, f"{name}_start") for name in self.gated])
            self.gates.bias.copy_(starts.logit().repeat_interleave(self.num_heads))
        self.memory.reset_start()

    def written(self, x_BTC: Tensor) -> dict[str, Written]:
        """What each memory does with a row (1, T, C), by the name of what it makes; see `telemetry.py`."""
        return self.memory.written(self._tokens(x_BTC, self.qkv(x_BTC), None, None))

    def mixing_flops(self, tokens: int) -> float:
        """Operations of the memories beyond 2 for each weight that they begin with. For every number of a layer: 2 to
        ask it with the key, 2 with the value for a target, behind the first layer 2 for the error's way back, 2 to
        write it and 2 for momentum; to erase, 2 to ask its momentum, 2 to ask it where that is not known of its
        gradient, and behind the first layer 2 to write; 2 to ask those that make something and the one that answers.
        Inside chunks: products of inputs with each other and with steps."""
        options, total, count = self.options, 0.0, len(self.memory.names)
        chunk, momentum = min(group.chunk for group in self.memory.groups), options.momentum
        apart = len(self.memory.groups) > 1
        for layer, (heads, inputs, outputs) in enumerate(self.memory.shapes):
            erases = self.memory.rule.erases(layer)
            passes = 4.0 + 2.0 * (options.target == "self") + 2.0 * bool(layer) + 2.0 * momentum
            passes += erases * 2.0 * (bool(layer) + momentum + apart) + 2.0 + 2.0 * momentum / count
            # The memories' first layers share their keys; one memory is read.
            sharing = 1.0 if layer else 1.0 / count
            inside = erases * (2 * inputs * sharing + outputs) + (1 + erases) * (inputs + outputs) / count
            total += heads * (passes * inputs * outputs + 2.0 * chunk * inside)
        total += 2.0 * self.num_heads * chunk**2 * momentum
        return tokens * (total - 2.0 * sum(part.numel() for part in self.memory.first))

    def _tokens(
        self, x_BTC: Tensor, qkv: Tensor, before: Tensor | None, documents: Documents | None,
        counts_BT: Tensor | None = None,
    ) -> HeadInputs:  # fmt: skip
        """What the heads are given of tokens, whose projections `qkv` follow those `before`."""
        qkv = self._convolved(qkv, before, documents)
        heads = qkv.unflatten(-1, (len(self.projected), self.num_heads, self.head_size)).permute(2, 0, 3, 1, 4)
        named = dict(zip(self.projected, heads.unbind(0), strict=True))
        gates: dict[str, Tensor] = {}
        if self.gates is not None:
            gates = dict(zip(self.gated, self.gates(x_BTC).mT.split(self.num_heads, dim=1), strict=True))
        x = named["x"] if "x" in named else heads[: len(self.inputs)].permute(1, 2, 3, 0, 4)
        return HeadInputs(
            x, named.get("query"), named.get("key"), named.get("value"), gates.get("rate"),
            gates.get("decay"), gates.get("momentum"), counts_BT,
        )  # fmt: skip
