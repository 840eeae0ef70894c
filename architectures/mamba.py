"""Mamba: a language model without attention, whose layers carry a state of fixed size past every token.

Gu & Dao 2023 (arXiv:2312.00752), the first form: every channel has a diagonal state of its own, and step size, input
and output of the recurrence depend on the token. The rival "Mamba" of TRC² (arXiv:2602.22479); what its published
size implies: docs/rivals.md.

Shapes: B rows, T tokens, P pending tokens, C hidden size, D inner channels, N state size, K width of the convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import State
from clplat.architectures.decoder import Block, Decoder, check_language
from clplat.architectures.layers import SwiGLU, WideBias, causal_convolution
from clplat.architectures.option_checks import check_sizes
from clplat.kernels.selective_scan import selective_scan
from clplat.streams.base import Spec

MixerState = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs of the convolution before the pending ones (B, K − 1, D), the scan's state there (B, N, D), inputs that were
read last and may be padding (B, P, D), and the number of tokens before them (B,)."""


class SelectiveStateSpace(nn.Module):
    """Mamba's mixing layer (Gu & Dao 2023, §3.4): a gated selective scan behind a short causal convolution.

    How many of a call's tokens were a row's own and how many padding is known only when the next call says where it
    continues. So the state keeps the inputs of the last call, and the next one takes in those that count.
    """

    def __init__(self, *, hidden_size: int, expand: int, state_size: int, conv_width: int) -> None:
        super().__init__()
        inner = expand * hidden_size
        self.state_size, self.step_rank = state_size, math.ceil(hidden_size / 16)
        self.project = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, inner))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.select = nn.Linear(inner, self.step_rank + 2 * state_size, bias=False)
        self.step = WideBias(self.step_rank, inner)
        self.log_rate = nn.Parameter(torch.empty(state_size, inner))
        self.skip = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, hidden_size, bias=False)
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """What the authors' code gives all but the projections: rates 1..N, steps log-uniform in 0.001..0.1."""
        nn.init.uniform_(self.conv_weight, -(len(self.conv_weight) ** -0.5), len(self.conv_weight) ** -0.5)
        nn.init.uniform_(self.conv_bias, -(len(self.conv_weight) ** -0.5), len(self.conv_weight) ** -0.5)
        nn.init.uniform_(self.step.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        steps = torch.empty_like(self.step.bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.step.bias.copy_(steps + (-(-steps).expm1()).log())  # the inverse of softplus
        self.log_rate.copy_(torch.arange(1.0, self.state_size + 1).log().unsqueeze(1).expand_as(self.log_rate))
        nn.init.ones_(self.skip)

    def forward(self, x_BTC: Tensor, document_BT: Tensor | None) -> Tensor:
        """A full pass; `document_BT` numbers the documents of a row, which do not see each other (None: one each)."""
        inner_BTD, gate_BTD = self.project(x_BTC).chunk(2, dim=-1)
        mixed_BTD, _ = self._scanned(inner_BTD, None, None, document_BT)
        return self.out(mixed_BTD * F.silu(gate_BTD))

    def continued(self, x_BTC: Tensor, state: MixerState, lengths: Tensor) -> tuple[Tensor, MixerState]:
        """New tokens after the `lengths` (B,) tokens of each row that `state` holds."""
        before, first = self._taken_in(state, lengths)
        inner_BTD, gate_BTD = self.project(x_BTC).chunk(2, dim=-1)
        mixed_BTD, _ = self._scanned(inner_BTD, before, first, None)
        return self.out(mixed_BTD * F.silu(gate_BTD)), (before, first, inner_BTD, lengths)

    def empty_state(self, batch_size: int) -> MixerState:
        """The state before any token, with nothing pending."""
        weight, inner = self.out.weight, self.skip.numel()
        precise = torch.promote_types(weight.dtype, torch.float32)
        return (
            weight.new_zeros(batch_size, len(self.conv_weight) - 1, inner),
            weight.new_zeros(batch_size, self.state_size, inner, dtype=precise),
            weight.new_zeros(batch_size, 0, inner),
            weight.new_zeros(batch_size, dtype=torch.long),
        )

    def mixing_flops(self, tokens: int) -> float:
        """Operations of the scan beyond 2 per number in `log_rate` (product with the step, exponential): 5 for each
        number of the state, to write, to decay, to add, and 2 to read."""
        return 5.0 * self.log_rate.numel() * tokens

    def _scanned(
        self, inner_BTD: Tensor, before: Tensor | None, first: Tensor | None, document_BT: Tensor | None,
        counts_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What the scan and the skip answer (B, T, D), and the state after; tokens that do not count change nothing."""
        u_BTD = F.silu(causal_convolution(inner_BTD, self.conv_weight, self.conv_bias, before, document_BT))
        rank, b_BTN, c_BTN = self.select(u_BTD).split([self.step_rank, self.state_size, self.state_size], dim=-1)
        precise = torch.promote_types(inner_BTD.dtype, torch.float32)
        step_BTD = F.softplus(self.step(rank))
        if counts_BT is not None:
            step_BTD = step_BTD * counts_BT.unsqueeze(-1)
        keep_BT = None if document_BT is None else F.pad(document_BT[:, 1:] == document_BT[:, :-1], (1, 0), value=True)
        rate = -self.log_rate.to(precise).exp()
        mixed_BTD, last = selective_scan(u_BTD, step_BTD, rate, b_BTN, c_BTN, first_BNC=first, keep_BT=keep_BT)
        return (mixed_BTD + self.skip * u_BTD).to(inner_BTD.dtype), last

    def _taken_in(self, state: MixerState, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's inputs and the scan's state after the pending tokens that belong to a row."""
        before, first, pending, held = state
        if not pending.shape[1]:
            return before, first
        count = lengths - held
        counts_BP = torch.arange(pending.shape[1], device=pending.device) < count.unsqueeze(1)
        _, first = self._scanned(pending, before, first, None, counts_BP)
        places = count.unsqueeze(1) + torch.arange(before.shape[1], device=pending.device)
        both = torch.cat([before.to(pending.dtype), pending], dim=1)
        return both.gather(1, places.unsqueeze(-1).expand(-1, -1, both.shape[-1])), first


class Mamba(Decoder):
    """Decoder-only language model of selective state spaces: tokens (B, T) to logits (B, T, V)."""

    paper = "Gu & Dao 2023, arXiv:2312.00752"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 8,
        expand: int = 2,
        state_size: int = 16,
        conv_width: int = 4,
        mlp_size: int | None = None,
        dropout: float = 0.0,
        document_mask: bool = True,
        tie_head: bool = True,
    ) -> None:
        """`expand` is inner channels over hidden size, `state_size` the numbers that each of them carries,
        `conv_width` the tokens that the convolution reads. These defaults are the authors', who stack such layers
        alone, twice as many as a Transformer has; `mlp_size` puts a SwiGLU of that inner size behind each.
        `document_mask` begins every document of a row with an empty state. The rest is as in `Transformer`."""
        check_language(type(self), spec)
        check_sizes(
            type(self).__name__, hidden_size=hidden_size, num_layers=num_layers, expand=expand, state_size=state_size,
            conv_width=conv_width, mlp_size=mlp_size,
        )  # fmt: skip
        blocks = (
            Block(
                hidden_size=hidden_size,
                attention=SelectiveStateSpace(
                    hidden_size=hidden_size, expand=expand, state_size=state_size, conv_width=conv_width
                ),
                mlp=None if mlp_size is None else SwiGLU(hidden_size=hidden_size, inner_size=mlp_size),
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        super().__init__(
            spec=spec, hidden_size=hidden_size, blocks=blocks, dropout=dropout, document_mask=document_mask,
            tie_head=tie_head,
        )  # fmt: skip
        for block in self.blocks:
            block.attention.reset_dynamics()

    def _context(self, tokens: Tensor, segment_ids: Tensor | None) -> tuple[Any, ...]:
        """Documents (B, T) numbered in the order in which they begin."""
        if segment_ids is None:
            return (None,)
        begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
        return (begins.cumsum(1),)

    def _continued_context(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Any, ...]:
        return (lengths,)

    def _held(self, tokens: Tensor, state: State) -> Tensor:
        _, _, pending, held = state[0]
        return held + pending.shape[1]
