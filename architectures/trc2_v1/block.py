"""One block of TRC², first version: units with states, routed by chunks, and a feed-forward layer.

    Û  = U − (1 − s_pred) P̂,  U = norm(X)                P̂: a causal convolution of U, shifted by one
    S  = a (⟨Ū W_q, K_m⟩ − γ ‖tanh(Ū W_pos) − P_m‖²)      a = 1 + ρ(2s − 1);  R = softmax over the k best units
    δ, B, C, g = Proj(Û);  α = σ(δ) σ(−A);  D = (1 − α) B;  H = conv(D) within the chunk
    Y  = Σ_m R_m (g_out · readout(C ⊙ H) + tanh(s_m) Û)  + conv over chunk means
    X̃  = X + g_gain Y + corrector([Û; Y]);   X⁺ = X̃ + SwiGLU(norm X̃)

Shapes: B rows, T tokens, G chunks of K tokens, C hidden size, M units, n state size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.layers import SwiGLU
from clplat.architectures.trc2_v1.chunks import (
    CausalConvolution,
    chunk_means,
    chunked,
    joined,
    row_statistics,
    summary,
)
from clplat.architectures.trc2_v1.options import V1Sizes, V1Switches

RANGE = 0.5
"""ρ: how far modulation can turn routing and gain from 1. Inferred."""


class Modulators(NamedTuple):
    """`route` a, `predict` s_pred and `gain` g_gain, each (B, G, 1)."""

    route: Tensor
    predict: Tensor
    gain: Tensor


class Router(nn.Module):
    """Scores of units for every chunk, by content and by their place in a plane."""

    def __init__(self, *, hidden_size: int, sizes: V1Sizes, switches: V1Switches) -> None:
        super().__init__()
        self.chosen = sizes.units_per_chunk
        self.query = nn.Linear(hidden_size, sizes.state_size, bias=False)
        self.keys = nn.Parameter(torch.randn(sizes.units, sizes.state_size) / math.sqrt(sizes.state_size))
        self.place = nn.Linear(hidden_size, 2) if switches.topology else None
        self.sharpness = nn.Parameter(torch.ones(())) if switches.topology else None
        side = math.ceil(math.sqrt(sizes.units))
        numbers = torch.arange(sizes.units)
        grid = torch.stack([numbers % side, numbers // side], dim=1) / max(1, side - 1) * 2 - 1
        self.register_buffer("grid", grid, persistent=False)
        self.grid: Tensor
        self.feedback = nn.Linear(hidden_size, sizes.state_size, bias=False) if switches.refinement else None
        self.feedback_strength = nn.Parameter(torch.zeros(())) if switches.refinement else None

    def scores(self, summary_BGC: Tensor, modulators: Modulators) -> Tensor:
        score_BGM = self.query(summary_BGC) @ self.keys.T
        if self.place is not None and self.sharpness is not None:
            here_BG2 = self.place(summary_BGC).tanh()
            score_BGM = score_BGM - self.sharpness * (here_BG2.unsqueeze(-2) - self.grid).square().sum(-1)
        return modulators.route * score_BGM

    def refined(self, score_BGM: Tensor, output_BGC: Tensor) -> Tensor:
        """Scores that know what a chunk gave."""
        assert self.feedback is not None and self.feedback_strength is not None
        return score_BGM + self.feedback_strength.tanh() * (self.feedback(output_BGC) @ self.keys.T)

    def weights(self, score_BGM: Tensor) -> Tensor:
        """R: softmax over the best units, 0 for the others."""
        best, units = score_BGM.topk(self.chosen, dim=-1)
        return torch.zeros_like(score_BGM).scatter(-1, units, best.softmax(-1).to(score_BGM.dtype))


class Memory(nn.Module):
    """Learned patterns Ξ: norm(W_v softmax(β q̂ · Ξ̂) Ξ̂) (Ramsauer et al. 2021, modern Hopfield network)."""

    def __init__(self, *, hidden_size: int, patterns: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.patterns = nn.Parameter(torch.randn(patterns, hidden_size) / math.sqrt(hidden_size))
        self.inverse_temperature = nn.Parameter(torch.tensor(8.0))
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(self, summary_BGC: Tensor) -> Tensor:
        pattern_NC = F.normalize(self.patterns, dim=-1)
        likeness = F.normalize(self.query(summary_BGC), dim=-1) @ pattern_NC.to(summary_BGC.dtype).T
        found = (self.inverse_temperature * likeness).softmax(-1).to(pattern_NC.dtype) @ pattern_NC
        return self.norm(self.value(found).to(self.norm.weight.dtype))


class Units(nn.Module):
    """M narrow units with gated states, each with its own readout."""

    def __init__(self, *, hidden_size: int, sizes: V1Sizes, switches: V1Switches) -> None:
        super().__init__()
        self.count, self.size, self.gated = sizes.units, sizes.state_size, switches.ei_gates
        self.project = nn.Linear(hidden_size, sizes.units * (3 * sizes.state_size + 3 * self.gated))
        self.decay = nn.Parameter(torch.zeros(sizes.units, sizes.state_size))
        self.mix = CausalConvolution(sizes.units * sizes.state_size, sizes.kernel)
        self.readout = nn.Parameter(torch.randn(sizes.units, sizes.state_size, hidden_size) * 0.02)
        self.skip = nn.Parameter(torch.zeros(sizes.units)) if switches.skip else None
        self.gate: nn.Sequential | None = None
        if switches.gated_readout:
            narrow = max(1, hidden_size // 4)
            self.gate = nn.Sequential(
                nn.Linear(hidden_size, narrow, bias=False), nn.SiLU(), nn.Linear(narrow, hidden_size)
            )
            self.norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(self, u_BGKC: Tensor, memory_BGC: Tensor | None) -> Tensor:
        """What every unit has to say (B, G, K, M, C), before routing chooses."""
        parts = self.project(u_BGKC).unflatten(-1, (self.count, -1))
        delta, drive, read = parts[..., : 3 * self.size].chunk(3, dim=-1)
        out: Tensor | float = 1.0
        if self.gated:
            state, out, free = parts[..., 3 * self.size :].sigmoid().split(1, dim=-1)
            # Disinhibition frees a gate.
            state, out = (1 - free) * state + free, (1 - free) * out + free
            delta, drive, read = delta * state, drive * state, read * state
        kept = delta.sigmoid() * (-self.decay).sigmoid()
        states = self.mix(((1 - kept) * drive).flatten(-2)).unflatten(-1, (self.count, -1))
        said = torch.einsum("bgkmn,mnc->bgkmc", read * states, self.readout.to(read.dtype))
        if self.gate is not None:
            assert memory_BGC is not None
            opened = 1 + self.gate(memory_BGC).sigmoid()
            said = self.norm((said * opened[:, :, None, None]).to(self.norm.weight.dtype))
        said = said * out
        if self.skip is not None:
            said = said + self.skip.tanh().view(-1, 1) * u_BGKC.unsqueeze(-2)
        return said


class Corrector(nn.Module):
    """A low-rank fast path: U_r V_rᵀ SiLU([Û; Y] W_z), nothing at first."""

    def __init__(self, *, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.enter = nn.Linear(2 * hidden_size, 4 * rank, bias=False)
        self.narrow = nn.Linear(4 * rank, rank, bias=False)
        self.leave = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, u_BGKC: Tensor, y_BGKC: Tensor) -> Tensor:
        return self.leave(self.narrow(F.silu(self.enter(torch.cat([u_BGKC, y_BGKC], dim=-1)))))


class V1Block(nn.Module):
    """One block; `causal` is what `chunks` asks for."""

    def __init__(
        self, *, hidden_size: int, sizes: V1Sizes, switches: V1Switches, dropout: float, balance: float
    ) -> None:
        super().__init__()
        self.sizes, self.balance, self.causal = sizes, balance, True
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.predict = CausalConvolution(hidden_size, sizes.kernel) if switches.predictive else None
        self.modulate = nn.Linear(2 * hidden_size, 3) if switches.modulation else None
        self.router = Router(hidden_size=hidden_size, sizes=sizes, switches=switches)
        self.memory = Memory(hidden_size=hidden_size, patterns=sizes.patterns) if switches.memory else None
        self.units = Units(hidden_size=hidden_size, sizes=sizes, switches=switches)
        self.across = CausalConvolution(hidden_size, sizes.kernel)
        self.corrector = Corrector(hidden_size=hidden_size, rank=sizes.rank) if switches.corrector else None
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size=hidden_size, inner_size=32 * math.ceil(8 / 3 * hidden_size / 32))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The stream after this block, and its losses: `prediction` and `route`."""
        u_BTC, losses = self.norm(x_BTC), {}
        modulators = self._modulators(chunked(u_BTC, self.sizes.chunk))
        if self.predict is not None:
            predicted_BTC = F.pad(self.predict(u_BTC)[:, :-1], (0, 0, 1, 0))
            losses["prediction"] = F.mse_loss(predicted_BTC.float(), u_BTC.detach().float())
            share_BTC = joined(
                (1 - modulators.predict).unsqueeze(2).expand(-1, -1, self.sizes.chunk, -1), x_BTC.shape[1]
            )
            u_BTC = u_BTC - share_BTC * predicted_BTC
        u_BGKC = chunked(u_BTC, self.sizes.chunk)
        y_BGKC, losses["route"] = self._routed(u_BGKC, modulators)
        added_BGKC = modulators.gain.unsqueeze(2) * y_BGKC
        if self.corrector is not None:
            added_BGKC = added_BGKC + self.corrector(u_BGKC, y_BGKC)
        x_BTC = x_BTC + self.dropout(joined(added_BGKC, x_BTC.shape[1]))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC))), losses

    def _routed(self, u_BGKC: Tensor, modulators: Modulators) -> tuple[Tensor, Tensor]:
        """Y, and the loss that keeps units evenly used: M Σ p² ≥ 1."""
        stands_BGC = summary(u_BGKC, self.sizes.pooling, causal=self.causal)
        score_BGM = self.router.scores(stands_BGC, modulators)
        memory_BGC = None if self.memory is None else self.memory(stands_BGC)
        said = self.units(u_BGKC, memory_BGC)
        y_BGKC = self._mixed(said, score_BGM)
        if self.router.feedback is not None:
            score_BGM = self.router.refined(score_BGM, chunk_means(y_BGKC, causal=self.causal))
            y_BGKC = self._mixed(said, score_BGM)
        y_BGKC = y_BGKC + self.across(chunk_means(u_BGKC, causal=self.causal)).unsqueeze(2)
        if memory_BGC is not None and self.units.gate is None:
            y_BGKC = y_BGKC + memory_BGC.unsqueeze(2)
        used_M = score_BGM.float().softmax(-1).mean((0, 1))
        return y_BGKC, self.balance * len(used_M) * used_M.square().sum()

    def _mixed(self, said_BGKMC: Tensor, score_BGM: Tensor) -> Tensor:
        return torch.einsum("bgkmc,bgm->bgkc", said_BGKMC, self.router.weights(score_BGM).to(said_BGKMC.dtype))

    def _modulators(self, u_BGKC: Tensor) -> Modulators:
        if self.modulate is None:
            one = u_BGKC.new_ones(*u_BGKC.shape[:2], 1)
            return Modulators(route=one, predict=torch.zeros_like(one), gain=one)
        s_route, s_predict, s_gain = (
            self.modulate(row_statistics(u_BGKC, causal=self.causal)).sigmoid().split(1, dim=-1)
        )
        return Modulators(route=1 + RANGE * (2 * s_route - 1), predict=s_predict, gain=1 + RANGE * (2 * s_gain - 1))
