"""What layers whose heads remember have in common: projections, a short convolution, a norm, a way out, and a state
that goes on at any token.

Shapes: B rows, T tokens, P pending tokens, C hidden size, H heads, E size of an answer, K width of the convolution, W
channels of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.guard import Guard
from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.state import MemoryState
from clplat.architectures.layers import causal_convolution

MixerState = tuple[Tensor, tuple[Any, ...], Tensor, Tensor]
"""What the convolution read before the pending tokens (B, K − 1, 3C), the memory there (`MemoryState` as plain tuples),
tokens that were read last and may be padding (B, P, C), and the number of tokens before them (B,)."""

OutputGate = Literal["none", "silu"]


class Remembers(Protocol):
    """The memory of a layer's heads: what `AssociativeMemory` has, with tokens of the layer's own kind."""

    backend: str

    def __call__(self, tokens: Any, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]: ...

    def read_documents(self, tokens: Any, documents: Documents) -> Tensor: ...

    def empty_state(self, rows: int) -> MemoryState: ...


class CarryingMixer(nn.Module, ABC):
    """Reads tokens into the memories of its heads and answers from them.

    How many of a call's tokens were a row's own and how many padding is known only when the next call says where it
    continues: as in Mamba's layer the state keeps the last call's inputs, and the next one takes in those that count.
    """

    memory: Remembers

    def __init__(
        self, *, hidden_size: int, num_heads: int, channels: int, conv_width: int, output_gate: OutputGate
    ) -> None:
        """`channels` W are projected and pass the convolution, which with a width of 1 is none."""
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide hidden_size ({hidden_size})")
        self.num_heads, self.head_size, self.conv_width = num_heads, hidden_size // num_heads, conv_width
        self.qkv = nn.Linear(hidden_size, channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, channels)) if conv_width > 1 else None
        self.norm = nn.RMSNorm(self.head_size, eps=1e-6)
        self.output_gate = nn.Linear(hidden_size, hidden_size, bias=False) if output_gate != "none" else None
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.guard = Guard(num_heads=num_heads, head_size=self.head_size)
        self.last_row: Tensor | None = None
        """The first row that was evaluated last, for `telemetry.py`; no answer depends on it."""

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """What is not drawn like a projection: here the convolution, in subclasses gates and first weights too."""
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -(len(self.conv_weight) ** -0.5), len(self.conv_weight) ** -0.5)

    @abstractmethod
    def _tokens(
        self, x_BTC: Tensor, qkv: Tensor, before: Tensor | None, documents: Documents | None,
        counts_BT: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What the memory reads of tokens, whose projections `qkv` follow those `before`."""

    @abstractmethod
    def mixing_flops(self, tokens: int) -> float:
        """Operations of the memory beyond 2 for each weight that it begins with."""

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass over rows, packed with documents or each of one text."""
        documents = reading.documents
        if not self.training:
            self.last_row = x_BTC[:1].detach().clone()
        qkv = self.qkv(x_BTC)
        answers, _ = self._remembered(x_BTC, self._tokens(x_BTC, qkv, None, documents), None, documents)
        if self.training:
            self.guard.notes(x_BTC, qkv, answers)
        return self._given_out(x_BTC, answers)

    def continued(self, x_BTC: Tensor, state: MixerState, reading: Reading) -> tuple[Tensor, MixerState]:
        """New tokens after the `reading.lengths` (B,) tokens of each row that `state` holds."""
        before, memory = self._taken_in(state, reading.lengths)
        answers, _ = self._remembered(x_BTC, self._tokens(x_BTC, self.qkv(x_BTC), before, None), memory, None)
        return self._given_out(x_BTC, answers), (before, memory, x_BTC, reading.lengths)

    def empty_state(self, batch_size: int) -> MixerState:
        """The state before any token, with nothing pending."""
        weight = self.out.weight
        return (
            weight.new_zeros(batch_size, self.conv_width - 1, self.qkv.out_features),
            self._empty_memory(batch_size),
            weight.new_zeros(batch_size, 0, self.out.in_features),
            weight.new_zeros(batch_size, dtype=torch.long),
        )

    def _remembered(
        self, x_BTC: Tensor, tokens: Any, memory: tuple[Any, ...] | None, documents: Documents | None
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

    def _given_out(self, x_BTC: Tensor, answers_BHTE: Tensor, factor: Tensor | None = None) -> Tensor:
        """From answers to what is added to the stream; `factor` (B, T, C) multiplies them once they are normed."""
        normed = self.norm(answers_BHTE.transpose(1, 2).to(x_BTC.dtype)).flatten(2).to(x_BTC.dtype)
        if self.output_gate is not None:
            normed = normed * F.silu(self.output_gate(x_BTC))
        if factor is not None:
            normed = normed * factor
        return self.out(normed)

    def _convolved(self, qkv: Tensor, before: Tensor | None, documents: Documents | None) -> Tensor:
        if self.conv_weight is None:
            return qkv
        numbers = None if documents is None else documents.number_BT
        return F.silu(causal_convolution(qkv, self.conv_weight, None, before, numbers))

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
