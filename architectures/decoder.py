"""What all decoder-only language models share: blocks on a residual stream, a head, decoding with carried state.

A model of this kind gives `Decoder` its blocks and says what their mixing layers need to know of the tokens beside
their embeddings. A mixing layer has `forward(x_BTC, *context)`, `continued(x_BTC, state, *context)` with the state
after it, `empty_state(batch_size)` and `mixing_flops(tokens)`; see `layers.Attention`.

Shapes: B rows, T tokens, S tokens with those in the state, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State
from clplat.architectures.layers import causal_document_mask, rotary_angles
from clplat.architectures.mixture_of_experts import idle_weights
from clplat.architectures.option_checks import check_dropout, check_sizes
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

ADDED = (
    "attention.out.weight",
    "mlp.down.weight",
    "mlp.down",
    "mlp.shared.down.weight",
    "fast.first.2",
)
"""Ends of the names of weights whose products are added to the residual stream."""


class ReadingFeed(nn.Module, ABC):
    """Base of feed-forward layers that learn while they read: they are told what the mixing layers are, and have a
    state of their own. A layer that looks at one token alone needs none of this and is any `nn.Module`."""

    @abstractmethod
    def forward(self, x_BTC: Tensor, *context: Any) -> Tensor:
        """What is added to the stream, in a full pass."""

    @abstractmethod
    def continued(self, x_BTC: Tensor, state: State, *context: Any) -> tuple[Tensor, State]:
        """The same for tokens that follow those in `state`, and the state after them."""

    @abstractmethod
    def empty_state(self, batch_size: int) -> State:
        """The state before any token."""

    @abstractmethod
    def mixing_flops(self, tokens: int) -> float:
        """Operations beyond 2 for each weight and token."""


class Block(nn.Module):
    """A layer that mixes tokens and one that feeds each of them forward, both added to the residual stream after a
    norm of their own.

    `attention` is the mixing layer, whatever it is. `mlp` is a layer from x to what is added, or to that and an
    auxiliary loss, as a mixture of experts gives it; or a `ReadingFeed`; None leaves it out.
    """

    def __init__(self, *, hidden_size: int, attention: nn.Module, mlp: nn.Module | None, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attention = attention
        self.mlp_norm = None if mlp is None else nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, *context: Any) -> tuple[Tensor, Tensor | None]:
        """The stream after both layers, and the auxiliary loss where the second has one."""
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), *context))
        if self.mlp_norm is None or not isinstance(self.mlp, ReadingFeed):
            return self._fed(x_BTC)
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC), *context)), None

    def continued(self, x_BTC: Tensor, state: State, *context: Any) -> tuple[Tensor, State]:
        """The same for tokens that follow those in `state`; returns the state after them too."""
        mixed, mixing = self.attention.continued(self.attention_norm(x_BTC), mixing_state(state), *context)
        x_BTC = x_BTC + self.dropout(mixed)
        if self.mlp_norm is None or not isinstance(self.mlp, ReadingFeed):
            return self._fed(x_BTC)[0], mixing
        fed, feeding = self.mlp.continued(self.mlp_norm(x_BTC), state["feeding"], *context)
        return x_BTC + self.dropout(fed), {"mixing": mixing, "feeding": feeding}

    def empty_state(self, batch_size: int) -> State:
        """The mixing layer's state before any token, with the feed-forward layer's where it has one."""
        mixing = self.attention.empty_state(batch_size)
        if not isinstance(self.mlp, ReadingFeed):
            return mixing
        return {"mixing": mixing, "feeding": self.mlp.empty_state(batch_size)}

    def mixing_flops(self, tokens: int) -> float:
        """Operations of both layers beyond 2 for each weight and token."""
        fed = self.mlp.mixing_flops(tokens) if isinstance(self.mlp, ReadingFeed) else 0.0
        return self.attention.mixing_flops(tokens) + fed

    def _fed(self, x_BTC: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.mlp is None or self.mlp_norm is None:
            return x_BTC, None
        fed = self.mlp(self.mlp_norm(x_BTC))
        fed, loss = fed if isinstance(fed, tuple) else (fed, None)
        return x_BTC + self.dropout(fed), loss


def mixing_state(state: State) -> State:
    """The mixing layer's part of a block's state."""
    return state["mixing"] if isinstance(state, dict) else state


class Decoder(Architecture, ABC):
    """Embedding, blocks, norm and head: tokens (B, T) to logits (B, T, V)."""

    causal = True

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int,
        blocks: Iterable[Block],
        dropout: float,
        document_mask: bool,
        tie_head: bool,
        initial_std: float = 0.02,
    ) -> None:
        """`blocks` may be a generator, so that weights are drawn from the input to the output."""
        super().__init__()
        check_sizes(type(self).__name__, hidden_size=hidden_size)
        check_dropout(type(self).__name__, dropout)
        self.row_length, self.document_mask = spec.input_shape[0], document_mask
        self.embedding = nn.Embedding(spec.num_outputs, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.own_head = None if tie_head else nn.Linear(hidden_size, spec.num_outputs, bias=False)
        self._initialise(initial_std)

    def _initialise(self, std: float) -> None:
        """Normal with deviation `std`, and less for layers that add to the residual stream, so that its scale does not
        grow with depth (Radford et al. 2019, GPT-2)."""
        for name, weight in self.named_parameters():
            if weight.ndim >= 2:
                scale = 1 / math.sqrt(2 * len(self.blocks)) if name.endswith(ADDED) else 1.0
                nn.init.normal_(weight, std=std * scale)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, T, V); `hidden` (B, T, C) is the input of the head, with `return_hidden` "all" (B, L + 1, T, C)
        the embeddings and what every block adds up to, the last of which is the input of the head.

        With `state`, every row continues after all the tokens it holds, and the state after them is returned. Rows of
        no tokens are answered by logits (B, 0, V).
        """
        if state is not None:
            return self._continue(batch, state)
        context = self._context(batch.inputs, batch.segment_ids if self.document_mask else None)
        x_BTC, losses, layers = self.dropout(self.embedding(batch.inputs)), [], []
        for block in self.blocks:
            if return_hidden == "all":
                layers.append(x_BTC)
            # No tokens are answered by nothing: a memory has no chunk to read.
            x_BTC, loss = block(x_BTC, *context) if batch.inputs.shape[1] else (x_BTC, None)
            if loss is not None:
                losses.append(loss)
        hidden = self.norm(x_BTC)
        named = {"balance": torch.stack(losses).sum()} if losses else {}
        shown = torch.stack([*layers, hidden], dim=1) if return_hidden == "all" else hidden
        return Output(logits=self._head(hidden), losses=named, hidden=shown)

    def init_state(self, batch_size: int) -> State:
        """The state of each block before any token."""
        return [block.empty_state(batch_size) for block in self.blocks]

    def decode(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Tensor, State]:
        """Logits (B, T, V) of `tokens` (B, T), which follow the `lengths` (B,) tokens that each row has in `state`.

        Rows of unequal length are padded on the right; what follows takes the place of a row's padding. No tokens,
        T = 0, leave the state as it is.
        """
        hidden, state = self._read(tokens, state, lengths)
        return self._head(hidden), state

    def flops_per_row(self) -> float:
        """Forward operations for a row of T tokens: 2 for every weight that a token passes through, head included
        and lookup not, and what the mixing layers do beyond products with weights."""
        weights = self.embedding.weight.numel() + sum(p.numel() for p in self.blocks.parameters() if p.ndim >= 2)
        mixing = sum(block.mixing_flops(self.row_length) for block in self.blocks)
        return 2.0 * self.row_length * (weights - idle_weights(self)) + mixing

    def active_parameters(self) -> int:
        """Parameters that one token passes through: without the experts that it does not choose."""
        return super().active_parameters() - idle_weights(self)

    @abstractmethod
    def _context(self, tokens: Tensor, segment_ids: Tensor | None) -> tuple[Any, ...]:
        """What the mixing layers are told in a full pass beside the tokens' activations."""

    @abstractmethod
    def _continued_context(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Any, ...]:
        """The same for tokens (B, T) that follow the `lengths` (B,) tokens of each row in the state."""

    @abstractmethod
    def _held(self, tokens: Tensor, state: State) -> Tensor:
        """How many tokens of each row (B,) the state holds."""

    def _head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight) if self.own_head is None else self.own_head(hidden)

    def _read(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Tensor, State]:
        """Inputs of the head for tokens that follow those in the state, and the state after them."""
        if not tokens.shape[1]:
            return self.norm(self.embedding(tokens)), state
        context = self._continued_context(tokens, state, lengths)
        x_BTC, longer = self.dropout(self.embedding(tokens)), []
        for block, held in zip(self.blocks, state, strict=True):
            x_BTC, after = block.continued(x_BTC, held, *context)
            longer.append(after)
        return self.norm(x_BTC), longer

    def _continue(self, batch: Batch, state: State) -> Output:
        if self.document_mask and batch.segment_ids is not None:
            name = type(self).__name__
            raise ValueError(f"{name}.document_mask: a carried state does not know documents; pass no segment_ids")
        hidden, state = self._read(batch.inputs, state, self._held(batch.inputs, state))
        return Output(logits=self._head(hidden), state=state, hidden=hidden)


class AttentionDecoder(Decoder, ABC):
    """A decoder whose blocks attend: rotary positions, a causal mask, a cache of what was read.

    No position is learned, so prompts may be longer than the rows of training. Subclasses set `rotary_size`, how
    many dimensions of a head are turned, and `rope_base`.
    """

    rotary_size: int
    rope_base: float

    def _context(self, tokens: Tensor, segment_ids: Tensor | None) -> tuple[Any, ...]:
        """Angles and the mask, None for the plain causal one."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = None if segment_ids is None else causal_document_mask(segment_ids)
        return rotary_angles(positions, self.rotary_size, self.rope_base), mask

    def _continued_context(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Any, ...]:
        """Angles, mask and positions (B, T)."""
        positions = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        columns = torch.arange(state[0][0].shape[1] + tokens.shape[1], device=tokens.device)
        mask = (columns <= positions.unsqueeze(-1)).unsqueeze(1)
        return rotary_angles(positions, self.rotary_size, self.rope_base), mask, positions

    def _held(self, tokens: Tensor, state: State) -> Tensor:
        return tokens.new_full((len(tokens),), state[0][0].shape[1])


def check_language(model: type[Decoder], spec: Spec) -> None:
    """ValueError for a stream that gives no token rows."""
    if spec.kind != "language":
        other = "MLP" if spec.vocab_size is None else "TextClassifier"
        raise ValueError(f"{model.__name__}: reads token rows, but the stream is of kind {spec.kind!r}; use {other}")


def check_heads(model: type[Decoder], hidden_size: int, num_heads: int) -> None:
    """ValueError where a head cannot be turned in pairs."""
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"{model.__name__}.hidden_size: {hidden_size} is not a multiple of 2 * num_heads ({2 * num_heads})"
        )
