"""Titans' memory beside window attention: as its gate (MAG), and as a layer before it (MAL).

MAG  o = norm(window attention([p ‖ x])) ⊗ σ(norm(M([p ‖ x])))
MAL  o = window attention(M([p ‖ x]))

Source: Behrouz et al. 2024 (Titans, arXiv:2501.00663, Eq. 26-31); what is inferred: docs/memories.md; by name:
`titans_presets.py`. Shapes: B rows, T tokens, N persistent tokens, C hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clplat.architectures.associative_memory.carrying import MixerState
from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.local_attention import PersistentTokens, WindowAttention
from clplat.architectures.associative_memory.mixer import MemoryMixer
from clplat.architectures.associative_memory.presets import MemoryLayer
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.state import MemoryState, Tokens, repeated


def mixer_of(layer: MemoryLayer, hidden_size: int) -> dict[str, Any]:
    """What a mixer of that layer is built from."""
    return {
        "hidden_size": hidden_size, "num_heads": layer.num_heads, "rule": layer.rule, "projection": layer.projection
    }  # fmt: skip


class PersistentMixer(MemoryMixer):
    """A memory that has read the persistent tokens before every text and document. Behind them a chunk begins, and the
    convolution sees none of them."""

    def __init__(self, *, layer: MemoryLayer, hidden_size: int, persistent: int) -> None:
        super().__init__(**mixer_of(layer, hidden_size))
        self.persistent = PersistentTokens(persistent, hidden_size)

    def begun(self) -> tuple[Tensor, MemoryState]:
        """What is given out for the persistent tokens (N, C), and the memory behind them, of one row."""
        x = self.persistent.inputs.unsqueeze(0)
        state = self.memory.empty_state(1)
        if not x.shape[1]:
            return x.squeeze(0), state
        answers, end = self.memory(self._tokens(x, self.qkv(x), None, None))
        # All else goes on: a window holds the last persistent pairs, and steps not yet taken are still owed.
        anchor = end.weights if self.rule.anchored else ()
        return self._given_out(x, answers).squeeze(0), end._replace(anchor=anchor, offset=state.offset)

    def _empty_memory(self, batch_size: int) -> tuple[Any, ...]:
        return tuple(repeated(self.begun()[1], batch_size))

    def _remembered(
        self, x_BTC: Tensor, tokens: Tokens, memory: tuple[Any, ...] | None, documents: Documents | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        if documents is not None:
            return self.memory.read_documents(tokens, documents, self.begun()[1]), ()
        return super()._remembered(x_BTC, tokens, memory or self._empty_memory(len(x_BTC)), None)


class WindowedMemory(nn.Module):
    """A memory and window attention, of which subclasses say how they meet."""

    def __init__(self, *, hidden_size: int, layer: MemoryLayer, num_heads: int, window: int, persistent: int) -> None:
        super().__init__()
        self.mixer = PersistentMixer(layer=layer, hidden_size=hidden_size, persistent=persistent)
        self.attention = WindowAttention(hidden_size=hidden_size, num_heads=num_heads, window=window)

    def empty_state(self, batch_size: int) -> MixerState:
        """The states of attention and memory, tokens that were read last, and how many came before them."""
        before, memory, pending, held = self.mixer.empty_state(batch_size)
        return self.attention.empty_state(batch_size), (before, memory), pending, held

    def mixing_flops(self, tokens: int) -> float:
        """As both parts; persistent tokens' own reading is left out."""
        count = len(self.mixer.persistent.inputs)
        return self.mixer.mixing_flops(tokens) + self.attention.mixing_flops(tokens, count)


class GatingMemory(WindowedMemory):
    """MAG: what attention gives is gated by what the memory gives, each normed with a learned vector."""

    def __init__(self, *, hidden_size: int, layer: MemoryLayer, num_heads: int, window: int, persistent: int) -> None:
        super().__init__(
            hidden_size=hidden_size, layer=layer, num_heads=num_heads, window=window, persistent=persistent
        )
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.memory_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass."""
        attended = self.attention(x_BTC, self.mixer.persistent.inputs, reading)
        return self._gated(attended, self.mixer(x_BTC, reading))

    def continued(self, x_BTC: Tensor, state: MixerState, reading: Reading) -> tuple[Tensor, MixerState]:
        """New tokens after those in `state`."""
        window, memory, pending, held = state
        attended, window = self.attention.continued(
            x_BTC, self.mixer.persistent.inputs, window, reading.lengths - held, reading
        )
        remembered, after = self.mixer.continued(x_BTC, (*memory, pending, held), reading)
        return self._gated(attended, remembered), (window, after[:2], *after[2:])

    def _gated(self, attended: Tensor, remembered: Tensor) -> Tensor:
        attended, remembered = (part.to(self.memory_norm.weight.dtype) for part in (attended, remembered))
        return self.out(self.attention_norm(attended) * self.memory_norm(remembered).sigmoid())


class LayeredMemory(WindowedMemory):
    """MAL: attention reads what the memory gives, normed."""

    def __init__(self, *, hidden_size: int, layer: MemoryLayer, num_heads: int, window: int, persistent: int) -> None:
        super().__init__(
            hidden_size=hidden_size, layer=layer, num_heads=num_heads, window=window, persistent=persistent
        )
        self.memory_norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass."""
        remembered = self._normed(self.mixer(x_BTC, reading))
        return self.attention(remembered, self._normed(self.mixer.begun()[0]), reading)

    def continued(self, x_BTC: Tensor, state: MixerState, reading: Reading) -> tuple[Tensor, MixerState]:
        """New tokens after those in `state`."""
        window, memory, pending, held = state
        count = reading.lengths - held
        remembered, after = self.mixer.continued(x_BTC, (*memory, pending, held), reading)
        persistent = self._normed(self.mixer.begun()[0])
        mixed, window = self.attention.continued(self._normed(remembered), persistent, window, count, reading)
        return mixed, (window, after[:2], *after[2:])

    def _normed(self, remembered: Tensor) -> Tensor:
        return self.memory_norm(remembered.to(self.memory_norm.weight.dtype))
