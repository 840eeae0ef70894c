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

CHUNK = 1024
"""Queries compared with all slots at once: what bounds the memory that scores take."""


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

    Exact; chunked over tokens. Fewer than k slots in use are mixed alone, and none gives 0. The weights are laid out
    over all slots and multiplied with the values, which needs no gather whose gradient would be added up in any order.
    `kernels.topk_memory.topk_read` is the same read by kernels that hold no scores; this is the place to exchange them.
    """
    given, dtype = query_BTC.dtype, torch.promote_types(query_BTC.dtype, torch.float32)
    query_BTC, key_NC, value_NC = (part.to(dtype) for part in (query_BTC, key_NC, value_NC))
    mixed, mass_BN = [], query_BTC.new_zeros(len(query_BTC), len(key_NC))
    # Rounded to 16 bits, scores of different slots would tie and the best k be others.
    with torch.autocast(query_BTC.device.type, enabled=False):
        for part_BtC in query_BTC.split(max(1, CHUNK // max(1, len(query_BTC))), dim=1):
            weight_BtN = _weights(part_BtC @ key_NC.T / temperature, used_N, k)
            mixed.append(weight_BtN @ value_NC)
            mass_BN = mass_BN + weight_BtN.detach().sum(1)
    return torch.cat(mixed, dim=1).to(given), mass_BN


def _weights(score_BtN: Tensor, used_N: Tensor, k: int) -> Tensor:
    """Softmax over the k best slots in use, 0 elsewhere."""
    best_Btk, slot_Btk = score_BtN.masked_fill(~used_N, float("-inf")).topk(min(k, len(used_N)), dim=-1)
    # An empty store has no largest score to subtract, and nothing to divide by.
    largest = best_Btk[..., :1].detach()
    weight_Btk = (best_Btk - torch.where(largest.isfinite(), largest, 0.0)).exp()
    total = weight_Btk.sum(-1, keepdim=True)
    return torch.zeros_like(score_BtN).scatter(-1, slot_Btk, weight_Btk / torch.where(total > 0, total, 1.0))
