"""The thalamic router: a column's output, compressed, as a focal and a diffuse path between which surprise shifts.

    c_t  = W_d norm(W_5 h_t)                                    in R^r
    past = mean of c_s over s < t of the same document          (0 at its first token)
    δ_t  = ‖ĉ_t − P ĉ_{t−1}‖²/r + γ v(ĉ_t) − v(ĉ_{t−1})          ĉ = sg(c)/RMS(c); a TD error; `pred`: its first term
    a_t  = clip(δ_t / RMS of earlier δ)                         without gradient; 0 where there is none
    Y    = σ(W_f c + b_f + w_f a) ⊙ c + σ(W_g c + b_g − w_g a) ⊙ past
    Z    = W_up TRN(Y),   TRN within a group g: Y_g / (softplus(σ_g) + RMS(Y_g)); across: by the groups' mean RMS

P and v learn from their own errors on detached c and send no gradient into the columns. ĉ keeps their losses, which
grow with the square and the fourth power of c, from outgrowing the language loss that they share a clipping norm with.
Wiring as on the authors' site; the formulas of TRN and surprise are inferred (docs/trc2.md).

Shapes: B rows, T tokens, C hidden size, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clplat.architectures.trc2.options import ThalamusOptions

EPSILON = 1e-6
"""Below this mean square an activity counts as silence."""

Trace = dict[str, Tensor]
"""What a router has to remember of a row's past, after every token of the last call and before its first one, so that
it can go on from any of them: `last` c and `sums` of c (B, T + 1, R), and with a surprise `squares`, the sum of δ²
(B, T + 1, 1)."""


@dataclass(frozen=True, kw_only=True)
class Relay:
    """A router's `signal` (B, T, C), `surprise` (B, T) or None, its critic's losses, and what to go on from."""

    signal: Tensor
    surprise: Tensor | None
    losses: dict[str, Tensor]
    trace: Trace


class Thalamus(nn.Module):
    """The router behind one column."""

    def __init__(self, *, hidden_size: int, options: ThalamusOptions) -> None:
        super().__init__()
        self.options, self.rank = options, rank_of(hidden_size, options)
        self.layer5 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.compress = nn.Linear(hidden_size, self.rank, bias=False)
        self.focal_gate = nn.Linear(self.rank, self.rank) if options.focal else None
        self.diffuse_gate = nn.Linear(self.rank, self.rank) if options.diffuse else None
        self.predict = self.value = self.focal_shift = self.diffuse_shift = None
        if options.surprise != "none":
            self.predict = nn.Linear(self.rank, self.rank, bias=False)
            self.focal_shift = nn.Parameter(torch.full((self.rank,), 0.5)) if options.focal else None
            self.diffuse_shift = nn.Parameter(torch.full((self.rank,), 0.5)) if options.diffuse else None
        if options.surprise == "td":
            self.value = nn.Linear(self.rank, 1)
        # softplus of it is 1 at first.
        start = torch.full((options.groups, 1), math.log(math.expm1(1.0)))
        self.semisaturation = None if options.trn == "none" else nn.Parameter(start)
        self.expand = nn.Linear(self.rank, hidden_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for layer in (self.layer5, self.compress, self.focal_gate, self.diffuse_gate, self.predict, self.expand):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02 if layer is not self.compress else self.layer5.in_features**-0.5)
        for layer in (self.focal_gate, self.diffuse_gate):
            if layer is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, x_BTC: Tensor, position: Tensor, *, several: bool, before: Trace | None, kept: Tensor | None
    ) -> Relay:
        """`position` (T,) or (B, T) of each token in its document; `several` says that a row may hold several.
        `before` is what a row's past left (B, 1, ·). `kept` (B,) marks rows from which the critic learns."""
        if self.options.detach:
            x_BTC = x_BTC.detach()
        # Autocast leaves norms in the precision of their weights.
        c_BTR = self.compress(self.norm(self.layer5(x_BTC).to(self.norm.weight.dtype)))
        before = before or self.empty_trace(c_BTR)
        last = torch.cat([before["last"].to(c_BTR.dtype), c_BTR], dim=1)
        known = (position > 0).expand(c_BTR.shape[:2])
        sums = running_sums(c_BTR, before["sums"], position, several=several)
        unit = unit_of(last)
        delta_BT, losses = self._surprise(unit[:, 1:], unit[:, :-1], known, kept)
        trace, surprise = {"last": last, "sums": sums}, None
        if delta_BT is not None:
            squares = running_sums(delta_BT.square().unsqueeze(-1), before["squares"], position, several=several)
            surprise = self._relative(delta_BT, earlier(squares, known).squeeze(-1), position)
            trace["squares"] = squares
        past_BTR = (earlier(sums, known) / position.clamp(min=1).unsqueeze(-1)).to(c_BTR.dtype)
        mixed_BTR = self._mixed(c_BTR, past_BTR, surprise)
        return Relay(signal=self.expand(self.compete(mixed_BTR)), surprise=surprise, losses=losses, trace=trace)

    def empty_trace(self, like_B: Tensor) -> Trace:
        """The trace of rows (B, …) of which nothing has been read."""
        precise = torch.promote_types(like_B.dtype, torch.float32)
        rows = like_B.new_zeros(len(like_B), 1, self.rank)
        trace = {"last": rows, "sums": rows.to(precise)}
        return trace if self.predict is None else trace | {"squares": rows[..., :1].to(precise)}

    def compete(self, y_BTR: Tensor) -> Tensor:
        """Divisive competition between the units of a group, or between groups."""
        if self.semisaturation is None:
            return y_BTR
        grouped = y_BTR.unflatten(-1, (self.options.groups, -1))
        # The floor also keeps the root's derivative finite where nothing is active.
        activity = (grouped.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        if self.options.trn == "across":
            activity = activity.mean(-2, keepdim=True)
        return (grouped / (nn.functional.softplus(self.semisaturation) + activity)).flatten(-2)

    def _mixed(self, c_BTR: Tensor, past_BTR: Tensor, surprise_BT: Tensor | None) -> Tensor:
        """Both paths, gated: a surprise opens the focal and closes the diffuse one."""
        shift = None if surprise_BT is None else surprise_BT.unsqueeze(-1).to(c_BTR.dtype)
        parts = []
        if self.focal_gate is not None:
            opened = self.focal_gate(c_BTR)
            opened = opened if shift is None else opened + self.focal_shift * shift
            parts.append(opened.sigmoid() * c_BTR)
        if self.diffuse_gate is not None:
            opened = self.diffuse_gate(c_BTR)
            opened = opened if shift is None else opened - self.diffuse_shift * shift
            parts.append(opened.sigmoid() * past_BTR)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _surprise(
        self, c_BTR: Tensor, previous_BTR: Tensor, known_BT: Tensor, kept_B: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """δ (B, T), 0 at a document's first token, and the losses of what it is made with."""
        if self.predict is None:
            return None, {}
        counted = known_BT if kept_B is None else known_BT & kept_B.unsqueeze(1)
        error_BT = (c_BTR - self.predict(previous_BTR)).square().mean(-1)
        losses = {"thalamus_prediction": self.options.critic_weight * _mean(error_BT, counted)}
        delta_BT = error_BT.detach()
        if self.value is not None:
            now, then = self.value(c_BTR).squeeze(-1), self.value(previous_BTR).squeeze(-1)
            error_td = delta_BT + self.options.discount * now.detach() - then
            losses["thalamus_value"] = self.options.critic_weight * _mean(error_td.square(), counted)
            delta_BT = error_td.detach()
        return torch.where(known_BT, delta_BT, 0.0), losses

    def _relative(self, delta_BT: Tensor, squares_BT: Tensor, position: Tensor) -> Tensor:
        """δ over the root mean square of those before it, clipped; 0 where there are none."""
        count = (position - 1).clamp(min=0).expand_as(delta_BT)
        root = (squares_BT / count.clamp(min=1)).sqrt() + EPSILON
        clip = self.options.clip
        return torch.where(count > 0, (delta_BT / root).clamp(-clip, clip), 0.0)


def running_sums(x_BTR: Tensor, before_B1R: Tensor, position: Tensor, *, several: bool) -> Tensor:
    """Sums over a document's tokens, (B, T + 1, R) in at least float32: before the first token, and after each one.

    Where rows hold several documents they are summed by doubling, each step only as far as a document reaches back: a
    difference of two sums over the row would let one document's rounding into the next.
    """
    sums = x_BTR.to(before_B1R.dtype)
    if not several:
        return torch.cat([before_B1R, before_B1R + sums.cumsum(1)], dim=1)
    step, length = 1, x_BTR.shape[1]
    while step < length:
        shifted = nn.functional.pad(sums[:, :-step], (0, 0, step, 0))
        sums = sums + torch.where((position >= step).unsqueeze(-1), shifted, 0.0)
        step *= 2
    return torch.cat([before_B1R, sums], dim=1)


def unit_of(c_BTR: Tensor) -> Tensor:
    """ĉ: detached, with a root mean square of 1."""
    c_BTR = c_BTR.detach()
    return c_BTR * (c_BTR.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def earlier(sums: Tensor, known_BT: Tensor) -> Tensor:
    """The sums over a token's past, (B, T, R); 0 at a document's first token."""
    return torch.where(known_BT.unsqueeze(-1), sums[:, :-1], 0.0)


def rank_of(hidden_size: int, options: ThalamusOptions) -> int:
    """The rank r; refuses groups that do not divide it."""
    rank = options.rank or max(1, hidden_size // 4)
    if options.trn != "none" and rank % options.groups:
        raise ValueError(f"thalamus.groups: {options.groups} does not divide the rank ({rank})")
    return rank


def _mean(x_BT: Tensor, counted_BT: Tensor) -> Tensor:
    return torch.where(counted_BT, x_BT, 0.0).sum() / counted_BT.sum().clamp(min=1)
