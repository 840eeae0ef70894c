"""Reading the episodic store, and the gate through which what was read reaches later columns.

    s = norm(W_Q h_t) · norm(W_K m_j) / τ over the slots in use,   J = the k_read largest (exact),   α = softmax(s_J)
    M_t   = e_t · W_O Σ_J α_j W_V m_j                    e_t: the event gate
    F_hip = σ(a) · W_h (σ(W_g [sg(h_t), M_t] + b) ⊙ M_t)

An empty store gives M = 0 and F_hip = 0, exactly. The top-k read and the feedback gate are the authors'; the event
gate's form and all sizes are inferred (docs/trc2.md).

Shapes: B rows, T tokens, N slots, C hidden size, P parts of a slot (1: a hidden vector; 2: a key and a value).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.trc2.options import HippocampusOptions
from clplat.kernels import topk_memory

SHARES = 2**46
"""Of a weight of 1, in which mass is counted; 64 bits hold those of a row of 131,072 tokens."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """`feedback` F_hip (B, T, C), and the attention `mass` (B, N) that every row gave to every slot."""

    feedback: Tensor
    mass: Tensor


class Hippocampus(nn.Module):
    """The read; the store itself is `store.Store`, and does not change while a step lasts."""

    def __init__(self, *, hidden_size: int, options: HippocampusOptions, surprised: bool) -> None:
        """`surprised`: whether there is a thalamic surprise for the event gate to listen to."""
        super().__init__()
        self.options = options
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.relay = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(2 * hidden_size, hidden_size) if options.gate else None
        self.strength = nn.Parameter(torch.tensor(options.strength))
        self.event = self.event_surprise = None
        if options.event_gate != "none":
            self.event = nn.Linear(hidden_size, 1)
            self.event_surprise = nn.Parameter(torch.ones(())) if surprised else None
        self._initialise()

    def _initialise(self) -> None:
        for layer in (self.query, self.key, self.value, self.out, self.relay, self.gate, self.event):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5 if layer is not self.event else 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if self.options.stored == "projected":
            # What is written was projected without a gradient: these stay as they were drawn.
            self.key.weight.requires_grad_(False)
            self.value.weight.requires_grad_(False)

    def forward(self, x_BTC: Tensor, content_NPC: Tensor, used_N: Tensor, surprise_BT: Tensor | None) -> Recall:
        """`content_NPC` with `used_N` bool; `surprise_BT` is the thalamic one of the same column."""
        key_NC, value_NC = self.slots(content_NPC.to(x_BTC.dtype))
        query_BTC = F.normalize(self.query(x_BTC), dim=-1)
        mixed_BTC, mass_BN = topk_read(
            query_BTC, key_NC, value_NC, used_N, k=self.options.k_read, temperature=self.options.temperature
        )
        memory_BTC = self.out(mixed_BTC)
        if self.event is not None:
            memory_BTC = memory_BTC * self._event(x_BTC.detach(), surprise_BT).unsqueeze(-1)
        opened = memory_BTC
        if self.gate is not None:
            opened = self.gate(torch.cat([x_BTC.detach(), memory_BTC], dim=-1)).sigmoid() * memory_BTC
        return Recall(feedback=self.strength.sigmoid() * self.relay(opened), mass=mass_BN)

    def slots(self, content_NPC: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and values of the slots, (N, C) each."""
        if self.options.stored == "projected":
            key, value = content_NPC.unbind(1)
        else:
            key, value = self.key(content_NPC[:, 0]), self.value(content_NPC[:, 0])
        return F.normalize(key, dim=-1), value

    def parts(self, vectors_NC: Tensor) -> Tensor:
        """What is stored of hidden vectors: (N, P, C)."""
        if self.options.stored == "projected":
            return torch.stack([self.key(vectors_NC), self.value(vectors_NC)], dim=1)
        return vectors_NC.unsqueeze(1)

    def _event(self, x_BTC: Tensor, surprise_BT: Tensor | None) -> Tensor:
        """e_t (B, T): how far a token is an occasion to remember."""
        assert self.event is not None
        logit_BT = self.event(x_BTC).squeeze(-1)
        if surprise_BT is not None and self.event_surprise is not None:
            logit_BT = logit_BT + self.event_surprise * surprise_BT.to(logit_BT.dtype)
        soft_BT = logit_BT.sigmoid()
        if self.options.event_gate == "soft":
            return soft_BT
        assert surprise_BT is not None
        hard_BT = (surprise_BT > self.options.event_threshold).to(soft_BT.dtype)
        # The value of the hard gate, the gradient of the soft one.
        return hard_BT + soft_BT - soft_BT.detach()


def topk_read(
    query_BTC: Tensor, key_NC: Tensor, value_NC: Tensor, used_N: Tensor, *, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Softmax over each query's k best slots in use: what it mixes (B, T, C), and a row's mass on each slot (B, N).

    Fewer than k slots in use are mixed alone, and none gives 0.
    """
    wide = torch.promote_types(query_BTC.dtype, torch.float32)
    q, keys, values = (part.to(wide) for part in (query_BTC, key_NC, value_NC))
    # Rounded to 16 bits, scores of different slots would tie and the best k be others.
    with torch.autocast(query_BTC.device.type, enabled=False):
        read = topk_memory.topk_read(q, keys, values, min(k, len(used_N)), temperature=temperature, valid=used_N)
    return read.output.to(query_BTC.dtype), _mass_of_rows(read, len(used_N))


def _mass_of_rows(read: topk_memory.TopkRead, slots: int) -> Tensor:
    """Every row's weights by slot (B, N), summed in whole numbers, so that the order in which a GPU adds is nothing."""
    share = (read.weights.detach() * SHARES).round().long()
    mass_BN = share.new_zeros(len(share), slots)
    mass_BN.scatter_add_(1, read.indices.clamp(min=0).flatten(1), share.flatten(1))
    return mass_BN.to(read.weights.dtype) / SHARES
