"""Memory caching: a row is cut into segments, the memory at the end of each is kept, and queries ask all of them.

With M_t the memory of the current segment s and M⁽ⁱ⁾ those kept of the segments before (Memory Caching,
arXiv:2602.24281; known to us from summaries of its equations):

    residual  y_t = M_t(q_t) + Σ_{i<s} M⁽ⁱ⁾(q_t)
    gated     y_t = γ_t,s M_t(q_t) + Σ_{i<s} γ_t,i M⁽ⁱ⁾(q_t),   γ_t = softmax_i ⟨x_t W_u, mean of the segment's x⟩
    soup      one memory with the weights γ_t,s W_t + Σ_{i<s} γ_t,i W⁽ⁱ⁾ is asked
    sparse    gated, over the `top` best of the segments before and the current one

The current segment's mean goes up to token t: of the whole segment it would tell of the future. Gradients flow through
what is kept. Shapes: `state.py` and `segments.py`; W segments that may be asked, C hidden size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.mixer import MemoryMixer
from clplat.architectures.associative_memory.presets import LayerKind, MemoryLayer, TitansLMM
from clplat.architectures.associative_memory.segments import Run, Segments, counted, cut, folded, run, unfolded
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, each_part
from clplat.architectures.option_checks import check_at_least, check_choices

CacheRead = Literal["residual", "gated", "soup", "sparse"]
CacheStart = Literal["independent", "warm"]


class CachedState(NamedTuple):
    """A memory, what it was at the ends of segments, and what gates need; give it back to go on at any token."""

    memory: tuple[Any, ...]
    """`MemoryState` of the open segment."""
    kept: Layers
    """(B, W, H, I, O) of each layer; a row has position // segment of them, the rest is filler."""
    pools: Tensor
    """(B, W, C) means of the segments' inputs."""
    sums: Tensor
    """(B, C) sum of the open segment's inputs."""
    position: Tensor
    """(B,) tokens read."""
    columns: Tensor
    """(R, 0), whose shape alone tells that calls had R columns so far, so that W is known without waiting."""


class CachedMixer(MemoryMixer):
    """A memory layer that keeps the memory of every segment and lets queries ask all of them."""

    def __init__(
        self, *, hidden_size: int, layer: MemoryLayer, segment: int, read: CacheRead, top: int, start: CacheStart
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, num_heads=layer.num_heads, rule=layer.rule, projection=layer.projection
        )
        self.segment, self.read, self.top, self.warm = segment, read, top, start == "warm"
        self.segment_query = None if read == "residual" else nn.Linear(hidden_size, hidden_size, bias=False)

    def mixing_flops(self, tokens: int) -> float:
        """As of the layer alone, and 2 for every number of each kept memory that a token asks: all before it."""
        numbers = sum(heads * inputs * outputs for heads, inputs, outputs in self.memory.shapes)
        asked = 2.0 * numbers * tokens * max(0, -(-tokens // self.segment) - 1)
        again = super().mixing_flops(tokens) if self.read == "soup" else 0.0
        return super().mixing_flops(tokens) + asked + again

    def _empty_memory(self, batch_size: int) -> tuple[Any, ...]:
        memory, hidden = self.memory.empty_state(batch_size), self.out.in_features
        kept = tuple(part.new_zeros(batch_size, 0, *part.shape[1:]) for part in memory.weights)
        pools, position = memory.weights[0].new_zeros(batch_size, 0, hidden), torch.zeros_like(memory.offset)
        columns = pools.new_zeros(0, 0)
        return tuple(CachedState(tuple(memory), kept, pools, pools.new_zeros(batch_size, hidden), position, columns))

    def _remembered(
        self, x_BTC: Tensor, tokens: Tokens, memory: tuple[Any, ...] | None, documents: Documents | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        before = CachedState(*(self._empty_memory(len(x_BTC)) if memory is None else memory))
        position = None if memory is None else before.position
        segments = cut(x_BTC, self.segment, position, documents, chunk=self.memory.rule.chunk)
        placed = segments.placed(self.memory.prepared(tokens))
        read = run(self.memory, placed, segments, MemoryState(*before.memory), warm=self.warm)
        sums = self._sums(segments.placed_rows(x_BTC), placed, segments, before)
        kept, pools = self._kept(read, sums, segments, before)
        width = kept[0].shape[1] - 1  # the last segment of this call is asked by no token in it
        asked, shares = tuple(part[:, :width] for part in kept), self._shares(x_BTC, segments, sums, pools[:, :width])
        if self.read == "soup":
            answers = self._soup(placed, segments, read.starts, asked, shares)
        else:
            answers = together(read.answers_BHPE, self.memory.read(asked, placed.q.unsqueeze(1)), shares)
        number = (len(before.columns) + x_BTC.shape[1]) // self.segment
        place, which = segments.after(counted(placed))
        rows = torch.arange(len(which), device=which.device)
        behind = CachedState(
            tuple(read.state),
            tuple(part[:, :number] for part in kept),
            pools[:, :number],
            torch.where((place == 0).unsqueeze(-1), 0.0, sums[rows, which, -1]),
            before.position + counted(placed),
            before.columns.new_zeros(len(before.columns) + x_BTC.shape[1], 0),
        )
        return segments.back(answers), tuple(behind)

    def _sums(self, x_BPC: Tensor, placed: Tokens, segments: Segments, before: CachedState) -> Tensor:
        """(B, n, L, C) sums of a segment's inputs up to each place."""
        x = x_BPC.to(before.sums.dtype)
        if placed.counts is not None:
            x = x.masked_fill(~placed.counts.unsqueeze(-1), 0.0)
        sums = x.unflatten(1, (segments.touched, segments.width)).cumsum(2)
        return torch.cat([sums[:, :1] + before.sums[:, None, None], sums[:, 1:]], 1)

    def _kept(self, read: Run, sums: Tensor, segments: Segments, before: CachedState) -> tuple[Layers, Tensor]:
        """Memories and means by the number of their segment: those kept before, then this call's."""
        ends, means = read.ends.weights, sums[:, :, -1] / self.segment
        held = before.pools.shape[1]
        if not held and not len(before.columns):
            return ends, means
        number = torch.arange(held + segments.touched, device=means.device)
        begun = segments.number_Bn[:, :1]
        index = torch.where(number < begun, number, held + (number - begun).clamp(0, segments.touched - 1))

        def joined(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new], 1).take_along_dim(index.view(*index.shape, *[1] * (new.ndim - 2)), 1)

        return tuple(map(joined, before.kept, ends)), joined(before.pools, means)

    def _shares(self, x_BTC: Tensor, segments: Segments, sums: Tensor, pools_BWC: Tensor) -> Tensor:
        """(B, P, W + 1) weights of the segments that are asked, the current one's last."""
        number = torch.arange(pools_BWC.shape[1], device=x_BTC.device)
        seen = (number >= segments.first_Bn.unsqueeze(-1)) & (number < segments.number_Bn.unsqueeze(-1))
        seen_BPW = seen.repeat_interleave(segments.width, 1).expand(len(x_BTC), -1, -1)
        if self.segment_query is None:
            return F.pad(seen_BPW.to(sums.dtype), (0, 1), value=1.0)
        asked = segments.placed_rows(self.segment_query(x_BTC)).to(sums.dtype)
        current = sums.flatten(1, 2) / (segments.place_BP + 1).unsqueeze(-1)
        return segment_shares(asked, pools_BWC, current, seen_BPW, self.top if self.read == "sparse" else None)

    def _soup(
        self, placed: Tokens, segments: Segments, starts: MemoryState, asked: Layers, shares_BPW: Tensor
    ) -> Tensor:
        """Answers of memories whose weights are mixed, layer by layer: x Σ γ_i W_i = Σ γ_i (x W_i)."""
        count = segments.touched
        shares = shares_BPW.unflatten(1, (count, segments.width)).flatten(0, 1)
        others = tuple(part.unsqueeze(1).expand(-1, count, *part.shape[1:]).flatten(0, 1) for part in asked)

        def mixed(first: int, layer: int, x_BHLI: Tensor, own: Tensor) -> Tensor:
            return together(own, x_BHLI.unsqueeze(1) @ others[layer], shares[:, first : first + x_BHLI.shape[2]])

        flat = each_part(lambda part: part.flatten(0, 1), starts)
        return unfolded(self.memory.aligned(folded(placed, segments), flat, mixed, segments.begun())[0], segments)


def segment_shares(
    asked_BPC: Tensor, pools_BWC: Tensor, current_BPC: Tensor, seen_BPW: Tensor, top: int | None
) -> Tensor:
    """γ (B, P, W + 1): softmax over segments of what a token asks times their means, the current one's last. `top`
    leaves the best of the segments before."""
    with torch.autocast(asked_BPC.device.type, enabled=False):
        scores = (asked_BPC @ pools_BWC.mT).masked_fill(~seen_BPW, -torch.inf)
    if top is not None and top < scores.shape[-1]:
        best = torch.zeros_like(seen_BPW).scatter(-1, scores.topk(top, dim=-1).indices, True)
        scores = scores.masked_fill(~best, -torch.inf)
    return torch.cat([scores, (asked_BPC * current_BPC).sum(-1, keepdim=True)], -1).softmax(-1)


def together(own_BHLE: Tensor, others_BWHLE: Tensor, shares_BLW: Tensor) -> Tensor:
    """The current memory's output and those of others by their shares."""
    with torch.autocast(own_BHLE.device.type, enabled=False):
        past = torch.einsum("blw,bwhle->bhle", shares_BLW[..., :-1], others_BWHLE)
    return own_BHLE * shares_BLW[:, None, :, -1:] + past


class MemoryCaching(LayerKind):
    """Any memory layer with the memories of all segments kept."""

    paper = "Memory Caching, arXiv:2602.24281"

    def __init__(
        self, *, layer: MemoryLayer | None = None, segment: int = 256, read: CacheRead = "gated",
        top: int | None = None, start: CacheStart = "independent",
    ) -> None:  # fmt: skip
        """`layer` (TitansLMM) under segments of `segment` tokens, 256 as in the paper at rows of 4096. `read: sparse`
        asks the `top` best (4). `start`: each segment begins with the first memory, and all are read at once, or where
        the one before ended (`warm`), one after the other."""
        self.layer = TitansLMM() if layer is None else layer
        self.segment, self.read, self.top, self.start = segment, read, 4 if top is None else top, start
        check_choices(self, read=CacheRead, start=CacheStart)
        check_at_least(self, 1, "segment", "top")
        if read != "sparse" and top is not None:
            raise ValueError(f"MemoryCaching.top: {top} has no effect with read {read}; leave it out, or read: sparse")
        check_weights("MemoryCaching", self.layer)
        check_whole("MemoryCaching.segment", segment, self.layer)
        if read == "soup" and self.layer.rule.orthogonal:
            raise ValueError("MemoryCaching.read: 'soup' is not computed for a layer with optimizer muon")

    def build(self, hidden_size: int) -> CachedMixer:
        """The layer; ValueError where heads do not divide the stream."""
        self.layer.build(hidden_size)
        return CachedMixer(
            hidden_size=hidden_size, layer=self.layer, segment=self.segment, read=self.read, top=self.top,
            start=self.start,
        )  # fmt: skip


def check_weights(name: str, layer: MemoryLayer) -> None:
    """Refuse layers of which the state is not the weights."""
    if layer.rule.map.kind in ("lq", "kl"):
        raise ValueError(f"{name}.layer: of a layer with map {layer.rule.map.kind} states would be asked as weights")


def check_whole(name: str, segment: int, layer: MemoryLayer) -> None:
    """Refuse segments that end within a chunk of a layer whose chunks are part of its function."""
    if layer.rule.anchored and segment % layer.rule.chunk:
        raise ValueError(f"{name}: must be a multiple of the layer's chunk ({layer.rule.chunk}), got {segment}")
