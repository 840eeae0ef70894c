"""The episodic store, and its delayed write: after the optimizer step, when losses and next tokens are past.

    w_t   what the critics (or another signal) say of a token     piece: 64 tokens, W = mean w, m = h at the largest w
    z     = (W − μ)/σ with running μ, σ                           the best `quota` pieces with z > threshold are written
    slot  an empty one; else the one that resembles m is merged with it; else one is overwritten
    u_j   ← 0.99 u_j + (slot j's share of this step's reads) + 0.1 z at a write

Every decision of a step is made from the store as it was when the step began, in tensor code without a loop over
tokens, and without the host waiting for the device. Processes that train one run exchange sums and their best pieces,
and then do the same: their stores stay equal, bit for bit.

Shapes: B rows, T tokens, C hidden size, N slots, P parts of a slot, K tokens of a piece, Q the quota.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.trc2.critics import Critics
from clplat.architectures.trc2.options import WriteOptions

NEVER = float("-inf")
QUOTA = 16
"""Pieces written in a step, where nothing else is said and there are as many slots."""
STATISTICS_DECAY = 0.99
"""Of the running mean and variance of W, in steps."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one process saw in one step: detached `hidden` (B, T, C), `loss` (B, T) in nats, `counted` (B, T) where a
    current row's token had a target, `follows` (B, T) where the next token goes on in the same document, and the
    attention `mass` (N,) that current rows gave to the slots."""

    hidden: Tensor
    loss: Tensor
    counted: Tensor
    follows: Tensor
    mass: Tensor


class Store(nn.Module):
    """N slots with what is needed to choose among them, all registered, so that a resumed run goes on equally."""

    def __init__(self, *, hidden_size: int, slots: int, parts: int, options: WriteOptions) -> None:
        super().__init__()
        self.options = options
        self.quota = min(QUOTA, slots) if options.quota is None else options.quota
        self.critics: Critics | None = None
        if options.signal in ("fast_slow", "fast"):
            self.critics = Critics(
                hidden_size=hidden_size,
                slow=options.signal == "fast_slow",
                discount=options.discount,
                rate=options.critic_rate,
                slow_rate=options.slow_rate,
            )
        self.register_buffer("content", torch.zeros(slots, parts, hidden_size))
        self.register_buffer("used", torch.zeros(slots, dtype=torch.bool))
        self.register_buffer("utility", torch.zeros(slots))
        self.register_buffer("surprise", torch.zeros(slots))
        self.register_buffer("written", torch.zeros(slots, dtype=torch.long))
        # Running mean of W, of W², and the weight that both have gathered.
        self.register_buffer("statistics", torch.zeros(3))
        self.content: Tensor
        self.used: Tensor
        self.utility: Tensor
        self.surprise: Tensor
        self.written: Tensor
        self.statistics: Tensor

    @torch.no_grad()
    def with_pieces_of(
        self, hidden_BTC: Tensor, current_B: Tensor | None, parts: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Slots and which are in use, followed by a mean of every piece of some rows: the control that sees its own
        future."""
        flat_BT = hidden_BTC.new_zeros(hidden_BTC.shape[:2])
        counted_BT = torch.ones_like(flat_BT, dtype=torch.bool)
        if current_B is not None:
            counted_BT = counted_BT & current_B.unsqueeze(1)
        score_M, vector_MC = pieces(flat_BT, hidden_BTC, counted_BT, replace(self.options, candidate="mean"))
        content = torch.cat([self.content, parts(vector_MC).to(self.content.dtype)])
        return content, torch.cat([self.used, score_M > NEVER])

    @torch.no_grad()
    def flush(self, seen: Experience, *, step: int, parts: Callable[[Tensor], Tensor]) -> None:
        """The write of one optimizer step; `parts` turns hidden vectors (Q, C) into what is stored of them."""
        dtype = self.content.dtype
        hidden_BTC, loss_BT = seen.hidden.to(dtype), seen.loss.to(dtype)
        signal_BT, gradient = self._signal(hidden_BTC, loss_BT, seen)
        score_M, vector_MC = pieces(signal_BT, hidden_BTC, seen.counted, self.options)
        offered = score_M > NEVER
        finite_M = torch.where(offered, score_M, 0.0)
        sums = torch.stack(
            [finite_M.sum(), finite_M.square().sum(), offered.sum().to(dtype), seen.counted.sum().to(dtype)]
        )
        sums, mass_N, gradient = _summed([sums, seen.mass.to(dtype), gradient])
        score_Q, vector_QC = best(score_M, vector_MC, self.quota)
        score_Q, vector_QC = best(*_gathered(score_Q, vector_QC), self.quota)
        z_Q = self._standardised(score_Q, sums)
        # A step of replayed rows alone teaches nothing and lets nothing age.
        current = sums[3] > 0
        if self.critics is not None:
            self.critics.learn(gradient / sums[3].clamp(min=1), current)
        aged_N = self.options.utility_decay * self.utility + mass_N / mass_N.sum().clamp(min=1)
        self.utility.copy_(torch.where(current, aged_N, self.utility))
        self.write(parts(vector_QC), z_Q, z_Q > self.options.threshold, step=step)

    def write(self, content_QPC: Tensor, z_Q: Tensor, wanted_Q: Tensor, *, step: int) -> None:
        """Put those that are wanted, best first, into empty slots, into ones that they resemble, or over others."""
        count, slots = len(content_QPC), len(self.content)
        filling_Q = wanted_Q & (wanted_Q.cumsum(0) <= (~self.used).sum())
        likeness_Q, like_Q = self._likeness(content_QPC)
        merging_Q = wanted_Q & ~filling_Q & (likeness_Q > self.options.merge_above) & self.options.merge
        merged_QN = merging_Q.unsqueeze(1) & (like_Q.unsqueeze(1) == torch.arange(slots, device=like_Q.device))
        placed_Q = wanted_Q & ~merging_Q
        # Empty slots come first in that order, so the n-th that is placed gets the n-th slot of it.
        order_N = self._priority().masked_fill(merged_QN.any(0), float("inf")).argsort(stable=True)
        target_Q = torch.where(placed_Q, order_N[(placed_Q.cumsum(0) - 1).clamp(min=0)], slots)
        numbers_Q = torch.arange(count, device=target_Q.device)
        # One place more, for those that are not placed.
        source_N = torch.full((slots + 1,), -1, device=target_Q.device).index_put((target_Q,), numbers_Q)[:slots]
        self._merge(content_QPC, z_Q, merged_QN)
        self._place(content_QPC, z_Q, source_N, step)

    def _merge(self, content_QPC: Tensor, z_Q: Tensor, merged_QN: Tensor) -> None:
        """m ← 0.9 m + 0.1 × the mean of what is merged into it."""
        share_NQ = merged_QN.T.to(self.content.dtype)
        number_N = share_NQ.sum(1)
        mean_NPC = (share_NQ @ content_QPC.flatten(1)).view_as(self.content) / number_N.clamp(min=1).view(-1, 1, 1)
        mixed_NPC = self.content.lerp(mean_NPC, self.options.merge_share)
        self.content.copy_(torch.where((number_N > 0).view(-1, 1, 1), mixed_NPC, self.content))
        self.utility.add_(self.options.utility_bonus * (share_NQ @ torch.where(merged_QN.any(1), z_Q, 0.0)))

    def _place(self, content_QPC: Tensor, z_Q: Tensor, source_N: Tensor, step: int) -> None:
        """Slot n takes what `source_N` says, or stays as it is at −1."""
        new_N, source_N = source_N >= 0, source_N.clamp(min=0)
        self.content.copy_(torch.where(new_N.view(-1, 1, 1), content_QPC[source_N], self.content))
        self.used.logical_or_(new_N)
        self.utility.copy_(torch.where(new_N, self.options.utility_bonus * z_Q[source_N], self.utility))
        self.surprise.copy_(torch.where(new_N, z_Q[source_N], self.surprise))
        self.written.masked_fill_(new_N, step)

    def _priority(self) -> Tensor:
        """What is overwritten first is smallest: empty slots before all."""
        named = {"utility": self.utility, "surprise": self.surprise, "fifo": self.written.double()}
        return named[self.options.eviction].masked_fill(~self.used, NEVER)

    def _likeness(self, content_QPC: Tensor) -> tuple[Tensor, Tensor]:
        """The largest cosine of each with a slot in use, and that slot's number."""
        cosine_QN = F.normalize(content_QPC[:, 0], dim=-1) @ F.normalize(self.content[:, 0], dim=-1).T
        return cosine_QN.masked_fill(~self.used, NEVER).max(1)

    def _signal(self, hidden_BTC: Tensor, loss_BT: Tensor, seen: Experience) -> tuple[Tensor, Tensor]:
        """w (B, T), and the critics' gradient (empty without them)."""
        if self.critics is not None:
            return self.critics.errors(hidden_BTC, loss_BT, seen.follows, seen.counted)
        signal = torch.rand_like(loss_BT) if self.options.signal == "random" else loss_BT
        return signal, loss_BT.new_zeros(0)

    def _standardised(self, score_Q: Tensor, sums: Tensor) -> Tensor:
        """z of the best pieces by statistics that have taken in this step's; −inf where there is no piece."""
        total, squares, count, _ = sums
        now = torch.stack([total / count.clamp(min=1), squares / count.clamp(min=1), torch.ones_like(count)])
        self.statistics.copy_(torch.where(count > 0, now.lerp(self.statistics, STATISTICS_DECAY), self.statistics))
        mean, square = self.statistics[:2] / self.statistics[2].clamp(min=1 - STATISTICS_DECAY)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        return (score_Q - mean) / (deviation + 1e-6 * mean.abs() + torch.finfo(mean.dtype).tiny)


def pieces(signal_BT: Tensor, hidden_BTC: Tensor, counted_BT: Tensor, options: WriteOptions) -> tuple[Tensor, Tensor]:
    """Scores W (M,) and candidate vectors (M, C) of all pieces of all rows; −inf where no token of a piece counts."""
    size, length, width = options.chunk, signal_BT.shape[1], hidden_BTC.shape[2]
    missing = -length % size
    signal_MK = F.pad(signal_BT, (0, missing)).unflatten(1, (-1, size)).flatten(0, 1)
    counted_MK = F.pad(counted_BT, (0, missing)).unflatten(1, (-1, size)).flatten(0, 1)
    hidden_MKC = F.pad(hidden_BTC, (0, 0, 0, missing)).unflatten(1, (-1, size)).flatten(0, 1)
    number_M = counted_MK.sum(1)
    share_MK = counted_MK.to(signal_BT.dtype) / number_M.clamp(min=1).unsqueeze(1)
    score_M = (signal_MK * share_MK).sum(1).masked_fill(number_M == 0, NEVER)
    if options.candidate == "mean":
        return score_M, torch.einsum("mk,mkc->mc", share_MK, hidden_MKC)
    peak_M = signal_MK.masked_fill(~counted_MK, NEVER).argmax(1)
    return score_M, hidden_MKC.gather(1, peak_M.view(-1, 1, 1).expand(-1, 1, width)).squeeze(1)


def best(score_M: Tensor, vector_MC: Tensor, quota: int) -> tuple[Tensor, Tensor]:
    """The `quota` pieces of largest score, best first, filled up with ones of score −inf."""
    score_Q, chosen = score_M.topk(min(quota, len(score_M)))
    missing = quota - len(score_Q)
    return F.pad(score_Q, (0, missing), value=NEVER), F.pad(vector_MC[chosen], (0, 0, 0, missing))


def _summed(parts: list[Tensor]) -> list[Tensor]:
    """Every tensor's sum over processes, in one exchange."""
    if not _together():
        return parts
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    return [part.view_as(like) for part, like in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]


def _gathered(score_Q: Tensor, vector_QC: Tensor) -> tuple[Tensor, Tensor]:
    """The pieces of all processes, in the order of their ranks."""
    if not _together():
        return score_Q, vector_QC
    mine = torch.cat([score_Q.unsqueeze(1), vector_QC], dim=1)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    every = torch.cat(parts)
    return every[:, 0], every[:, 1:]


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
