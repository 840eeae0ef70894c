"""The side memory itself: slots beside a feed-forward layer that stays as it is.

    h = FFN(a) + Σ_memories τ · V^T (φ(G a) ⊙ K a)        without gates V^T φ(K a)

φ is the layer's own activation, so that a memory can be joined to the layer (the paper's is SiLU with gates and ReLU
without). Shapes: d hidden size, r slots of a memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.locas.feed_forward import FeedForward, view_of


class Bank(nn.Module):
    """One memory: keys, values and, beside gated layers, gates, each (r, d), in float32 or wider."""

    def __init__(self, rank: int, size: int, *, gated: bool, scale: float, like: Tensor) -> None:
        """Random directions as keys and gates, values 0: it changes nothing yet. Draws from torch's global source."""
        super().__init__()
        self.scale = scale
        made: dict[str, Any] = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.K = nn.Parameter(F.normalize(torch.randn(rank, size, **made), dim=1))
        self.G = nn.Parameter(F.normalize(torch.randn(rank, size, **made), dim=1)) if gated else None
        self.V = nn.Parameter(torch.zeros(rank, size, **made))

    def forward(self, a: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """What it adds, (…, d), in its own precision."""
        a = a.to(self.K.dtype)
        keyed = F.linear(a, self.K)
        active = activation(keyed) if self.G is None else activation(F.linear(a, self.G)) * keyed
        return self.scale * (active @ self.V.to(active.dtype))

    @torch.no_grad()
    def clip(self) -> None:
        """Every row longer than 1 at length 1: w ← w / max(‖w‖, 1)."""
        for rows in self.parameters():
            rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=1.0))

    @torch.no_grad()
    def set_slots(self, keys_rd: Tensor, gates_rd: Tensor | None, values_rd: Tensor | None) -> None:
        """New contents; fewer slots than there are leave the rest empty."""
        for own, new in ((self.K, keys_rd), (self.G, gates_rd), (self.V, values_rd)):
            if own is not None:
                own.zero_()
                if new is not None:
                    own[: len(new)] = new.to(own)


class SidewayFFN(nn.Module):
    """A feed-forward layer and the memories beside it; called as the layer was.

    `active` memories answer, `permanent` ones too, always: they belong to the layer.
    """

    def __init__(self, base_ffn: nn.Module) -> None:
        super().__init__()
        self.base_ffn, self.side_banks = base_ffn, nn.ModuleDict()
        self.active: list[str] = []
        self.permanent: list[str] = []
        self.value_norm = self.view().value_norm()

    def view(self) -> FeedForward:
        found = view_of(self.base_ffn)
        assert found is not None
        return found

    def bank(self, name: str) -> Bank:
        return cast(Bank, self.side_banks[name])

    def forward(self, a: Tensor) -> Tensor:
        answer, activation = self.base_ffn(a), self.view().activation
        for name in (*self.permanent, *self.active):
            answer = answer + self.bank(name)(a, activation).to(answer.dtype)
        return answer

    def widened(self, names: Sequence[str], rows: int) -> nn.Module:
        """The layer with these memories as further rows of its own, `rows` in all, the last of them empty."""
        view, banks = self.view(), [self.bank(name) for name in names]

        def joined(parts: list[Tensor]) -> Tensor:
            whole = torch.cat(parts)
            return F.pad(whole, (0, 0, 0, rows - len(whole)))

        gates = joined([cast(Tensor, bank.G) for bank in banks]) if view.gated else None
        view.widen(joined([bank.K for bank in banks]), gates, joined([bank.scale * bank.V for bank in banks]))
        return self.base_ffn
