"""Titans' memory as context of attention (MAC).

h = M_{t−1}(segment's queries); y = attention over [persistent ‖ h ‖ segment]; M learns y; o = y ⊗ M_t(y)

Source: Behrouz et al. 2024 (Titans, arXiv:2501.00663, Eq. 21-25); what is inferred: docs/memories.md; by name:
`titans_presets.py`. Shapes: B rows, T tokens, L tokens of a segment, C hidden size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from clplat.architectures.associative_memory.carrying import MixerState
from clplat.architectures.associative_memory.local_attention import PersistentTokens, SegmentAttention
from clplat.architectures.associative_memory.mixer import MemoryMixer
from clplat.architectures.associative_memory.presets import MemoryLayer
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.segments import cut
from clplat.architectures.associative_memory.state import MemoryState, Tokens, either
from clplat.architectures.associative_memory.telemetry import Written
from clplat.architectures.associative_memory.windowed_memory import mixer_of


class ContextMemory(nn.Module):
    """MAC: attention of each segment sees what the memory, as it was before the segment, recalls for its tokens; the
    memory learns what attention gives, which is multiplied with what it then answers.

    The state is the memory at the start of a row's open segment and the inputs since: decoding reads the open segment
    anew for every token, which costs up to two segments.
    """

    def __init__(self, *, hidden_size: int, layer: MemoryLayer, num_heads: int, segment: int, persistent: int) -> None:
        super().__init__()
        self.segment = segment
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.recalled_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.persistent = PersistentTokens(persistent, hidden_size)
        self.attention = SegmentAttention(hidden_size=hidden_size, num_heads=num_heads)
        # What attention gives is the gate of the memory's answers.
        plain = dataclasses.replace(layer.projection, output_gate="none")
        self.mixer = MemoryMixer(**{**mixer_of(layer, hidden_size), "projection": plain})
        self.last_row: Tensor | None = None
        """As in `CarryingMixer`."""

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass."""
        if not self.training:
            self.last_row = x_BTC[:1].detach().clone()
        before, memory = self._first(len(x_BTC))
        if reading.documents is None:
            return self._segments(x_BTC, before, memory, None)
        segments = cut(x_BTC, self.segment, None, reading.documents)
        assert segments.layout is not None
        begins = segments.number_Bn == segments.first_Bn
        mixed = self._segments(segments.placed_rows(x_BTC), before, memory, begins)
        return segments.layout.back(mixed.unsqueeze(1)).squeeze(1)

    def continued(self, x_BTC: Tensor, state: MixerState, reading: Reading) -> tuple[Tensor, MixerState]:
        """New tokens after those in `state`."""
        (before, parts, start), pending, _, _ = state
        before, memory, start, pending = self._closed(
            before, MemoryState(*parts), start, pending, reading.lengths - start
        )
        places = (reading.lengths - start).unsqueeze(1) + torch.arange(x_BTC.shape[1], device=x_BTC.device)
        grown = torch.cat([pending.to(x_BTC.dtype), torch.zeros_like(x_BTC)], 1)
        grown = grown.scatter(1, places.unsqueeze(-1).expand_as(x_BTC), x_BTC)
        mixed = self._segments(grown, before, memory, None).take_along_dim(places.unsqueeze(-1), 1)
        # How many tokens the call had is all that its caller asks of what is pending.
        return mixed, ((before, tuple(memory), start), grown, x_BTC[..., :0], reading.lengths)

    def empty_state(self, batch_size: int) -> MixerState:
        """Convolution and memory at the open segment's start, and where that is; inputs since then; the last call's
        number of tokens, as a tensor (B, T, 0); tokens before that call."""
        before, memory = self._first(batch_size)
        nothing = self.query.weight.new_zeros(batch_size, 0, self.query.in_features)
        return (before, tuple(memory), memory.offset), nothing, nothing[..., :0], memory.offset

    def written(self, x_BTC: Tensor) -> dict[str, Written]:
        """What the memory does with a row (1, T, C), segment after segment."""
        learner, parts = self.mixer.memory, []
        before, memory = self._first(1)
        first, backend = memory.weights, learner.backend
        for part in x_BTC.split(self.segment, 1):
            _, tokens, before = self._attended(part, before, memory)
            _, memory = learner.aligned(tokens, memory)
            parts.append(tokens)
        learner.backend = backend
        return {"": Written(learner, tuple(parts), first, memory.weights)}

    def mixing_flops(self, tokens: int) -> float:
        """As both parts, and the memory is asked once more."""
        asked = 2.0 * tokens * sum(heads * wide * out for heads, wide, out in self.mixer.memory.shapes)
        attention = self.attention.mixing_flops(tokens, min(tokens, self.segment), len(self.persistent.inputs))
        return self.mixer.mixing_flops(tokens) + asked + attention

    def _first(self, rows: int) -> tuple[Tensor, MemoryState]:
        before = self.query.weight.new_zeros(rows, self.mixer.options.conv_width - 1, 3 * self.query.in_features)
        return before, self.mixer.memory.empty_state(rows)

    def _segments(self, x_BTC: Tensor, before: Tensor, memory: MemoryState, begins_Bn: Tensor | None) -> Tensor:
        """One segment after the other; where `begins_Bn`, one begins a document."""
        first, mixed = (before, memory), []
        for number, part in enumerate(x_BTC.split(self.segment, 1)):
            if number and begins_Bn is not None:
                before, memory = _chosen(begins_Bn[:, number], first, (before, memory))
            out, before, memory = self._read(part, before, memory)
            mixed.append(out)
        return torch.cat(mixed, 1)

    def _read(self, x_BLC: Tensor, before: Tensor, memory: MemoryState) -> tuple[Tensor, Tensor, MemoryState]:
        """A segment's output, with convolution and memory behind it."""
        mixed, tokens, behind = self._attended(x_BLC, before, memory)
        answers, memory = self.mixer.memory.aligned(tokens, memory)
        return self.mixer._given_out(mixed, answers, mixed), behind, memory

    def _attended(self, x_BLC: Tensor, before: Tensor, memory: MemoryState) -> tuple[Tensor, Tokens, Tensor]:
        """What attention gives for a segment, what the memory is to learn of it, and the convolution behind it."""
        mixer = self.mixer
        asked = mixer.memory.features(self.query(x_BLC).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2))
        recalled = mixer.memory.read(memory.weights, asked.to(memory.weights[0].dtype))
        recalled = self.recalled_norm(recalled.transpose(1, 2).flatten(2).to(x_BLC.dtype)).to(x_BLC.dtype)
        mixed = self.attention(x_BLC, recalled, self.persistent.inputs).to(x_BLC.dtype)
        qkv = mixer.qkv(mixed)
        tokens = mixer.memory.prepared(mixer._tokens(mixed, qkv, before, None))
        return mixed, tokens, torch.cat([before.to(qkv.dtype), qkv], 1)[:, qkv.shape[1] :]

    def _closed(
        self, before: Tensor, memory: MemoryState, start_B: Tensor, pending: Tensor, count_B: Tensor
    ) -> tuple[Tensor, MemoryState, Tensor, Tensor]:
        """The state moved to the start of the segment that is open behind the `count_B` pending tokens of each row."""
        if pending.shape[1] < self.segment:
            return before, memory, start_B, pending
        for number in range(pending.shape[1] // self.segment):
            part = pending[:, number * self.segment : (number + 1) * self.segment]
            _, later, after = self._read(part, before, memory)
            before, memory = _chosen(count_B >= (number + 1) * self.segment, (later, after), (before, memory))
        done = count_B // self.segment * self.segment
        places = done.unsqueeze(1) + torch.arange(self.segment - 1, device=pending.device)
        left = pending.take_along_dim(places.clamp(max=pending.shape[1] - 1).unsqueeze(-1), 1)
        return before, memory, start_B + done, left


def _chosen(
    condition_B: Tensor, yes: tuple[Tensor, MemoryState], no: tuple[Tensor, MemoryState]
) -> tuple[Tensor, MemoryState]:
    before = torch.where(condition_B[:, None, None], yes[0].to(no[0].dtype), no[0])
    return before, either(condition_B, yes[1], no[1])
