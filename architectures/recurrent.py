"""Recurrent classifiers of token rows: the leaky RNN with a time constant for every unit, LSTM and GRU.

A row is read from left to right, and what is held after its last token is answered from, by one linear head or, where
the stream asks several questions (`spec.heads`), by one head for each. The Python loop over a row's tokens is the
definition of a recurrence; what does not depend on the state before, the input's part, is computed outside of it.
Shapes: B rows, T tokens, I input lines, H units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State
from clplat.architectures.layers import WeightsAlone, free_to_look, trimmed
from clplat.architectures.timescales import network_timescales
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

TRIALS, BURN_IN = 20, 500
"""Rows side by side, and steps left out at their beginning, when τ_net is measured."""


class _Recurrent(Architecture):
    """Base: a subclass reads inputs (B, T, I) step by step."""

    causal = True
    several_heads = True

    def __init__(self, *, spec: Spec, hidden_size: int, embedding_size: int | None, measured_steps: int) -> None:
        """`embedding_size`: width of learned token embeddings. None gives every token but the first an input line of
        its own, 1 where it stands and 0 elsewhere: bits are read as numbers.

        `measured_steps`: steps of random input from which the network timescales τ_net are measured at every task
        boundary; 0 for not. (The paper takes 10⁶.)
        """
        super().__init__()
        name = type(self).__name__
        if spec.vocab_size is None or spec.pad_token is None:
            raise ValueError(
                f"{name}: reads padded token rows with a class each, as NParity or LabelledTextStream give them; use "
                "Transformer for language and MLP for images"
            )
        for option, value in (("hidden_size", hidden_size), ("embedding_size", embedding_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}.{option}: at least 1, got {value}")
        if measured_steps and measured_steps < 100 * TRIALS:
            raise ValueError(f"{name}.measured_steps: 0, or at least {100 * TRIALS}, got {measured_steps}")
        self.row_length, self.pad_token, self.hidden_size = spec.input_shape[0], spec.pad_token, hidden_size
        self.measured_steps, self.heads, self.num_outputs = measured_steps, spec.heads, spec.num_outputs
        ids = [token for token in range(spec.vocab_size) if token != spec.pad_token]
        self.first_token = ids[0]
        self.register_buffer("lines", torch.tensor(ids[1:]), persistent=False)
        self.lines: Tensor
        self.embedding = None if embedding_size is None else nn.Embedding(spec.vocab_size, embedding_size)
        self.input_size = len(ids) - 1 if embedding_size is None else embedding_size
        self.head = nn.Linear(hidden_size, spec.num_outputs * (spec.heads or 1))

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C) or (B, heads, C); `hidden` (B, H) is the input of the heads."""
        tokens = trimmed(batch.inputs, self.pad_token)
        real = tokens != self.pad_token
        # Rows of one length, as a batch of a diagnostic stream has them, all end at the last column.
        even = free_to_look(real) and bool(real.all())
        hidden, state = self.read(self.input(tokens), None if even else real.sum(1).clamp(min=1), state)
        logits = self.head(hidden)
        if self.heads is not None:
            logits = logits.unflatten(-1, (self.heads, self.num_outputs))
        return Output(logits=logits, state=state, hidden=hidden)

    def input(self, tokens: Tensor) -> Tensor:
        """What is read of tokens (B, T): (B, T, I)."""
        if self.embedding is not None:
            return self.embedding(tokens)
        return (tokens.unsqueeze(-1) == self.lines).to(self.head.weight.dtype)

    def read(self, x_BTI: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        """What is held after each row's last token (B, H), and the state to go on from, where there is one; `lengths`
        (B,) are None where every row is as long as `x_BTI`."""
        raise TypeError(f"{type(self).__name__} must define read")

    def activity(self, x_BTI: Tensor) -> Tensor:
        """What is held after every step, (T, B, H)."""
        raise TypeError(f"{type(self).__name__} must define activity")

    def measurements(self) -> Mapping[str, float]:
        """Mean and median of τ_net over units, where it is measured."""
        if not self.measured_steps:
            return {}
        with torch.no_grad():
            taus = network_timescales(self.activity(self._random_input())[BURN_IN:])
        return {"tau_net_mean": float(taus.nanmean()), "tau_net_median": float(taus.nanmedian())}

    def _random_input(self) -> Tensor:
        """Inputs (TRIALS, steps, I), the same at every call: in each trial, tokens other than the first come with a
        probability of the trial's own, drawn from U[0, 1]."""
        draw, shape = torch.Generator().manual_seed(0), (TRIALS, BURN_IN + self.measured_steps // TRIALS)
        others = self.lines.cpu()[torch.randint(len(self.lines), shape, generator=draw)]
        chosen = torch.rand(shape, generator=draw) < torch.rand(TRIALS, 1, generator=draw)
        return self.input(others.where(chosen, torch.tensor(self.first_token)).to(self.lines.device))

    def flops_per_row(self) -> float:
        """Forward operations for a full row: 2 per weight of the recurrence and token, 2 per weight of the heads. An
        accelerator reads padding as well, and it is counted."""
        named = [(name.split(".")[0], p.numel()) for name, p in self.named_parameters() if p.ndim == 2]
        step = sum(count for name, count in named if name not in ("head", "embedding"))
        return 2.0 * (self.row_length * step + self.head.weight.numel())


class LeakyRNN(_Recurrent):
    """RNN whose units forget with time constants τ ≥ 1 of their own: large τ is memory in the unit.

    inside   h ← φ((1 − 1/τ) h + (W h + b + W_in x + b_in)/τ)
    outside  h ← (1 − 1/τ) h + φ(W h + b + W_in x + b_in)/τ

    φ is LeakyReLU with slope 0.01; W has no self-connections.
    """

    paper = "Khajehabdollahi et al. 2024, arXiv:2309.12927"
    fidelity = "exact"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 500,
        leak: Literal["inside", "outside"] = "inside",
        fixed_tau: float | None = None,
        initial_noise: float = 0.1,
        embedding_size: int | None = None,
        measured_steps: int = 0,
    ) -> None:
        """`hidden_size` is the paper's; 100 to 200 units do for N ≤ 12. `leak`: where it stands, see above.

        `fixed_tau`: the τ of all units, which is then not trained; None trains them from 1 + U[0, 1]. `initial_noise`:
        in training a row begins from noise · U[0, 1] in every unit, drawn from the run's `model` source, in evaluation
        from its mean; 0 begins from nothing. The other options are those of every recurrent classifier here.
        """
        super().__init__(
            spec=spec, hidden_size=hidden_size, embedding_size=embedding_size, measured_steps=measured_steps
        )
        if fixed_tau is not None and fixed_tau < 1:
            raise ValueError(f"LeakyRNN.fixed_tau: a unit forgets in one step at the fastest, τ = 1; got {fixed_tau}")
        if initial_noise < 0:
            raise ValueError(f"LeakyRNN.initial_noise: a width, at least 0, got {initial_noise}")
        self.leak, self.initial_noise = leak, initial_noise
        self.recurrent, self.drive = WeightsAlone(hidden_size, hidden_size), nn.Linear(self.input_size, hidden_size)
        with torch.no_grad():
            self.recurrent.weight.fill_diagonal_(0.0)
        self.register_buffer("connected", 1 - torch.eye(hidden_size), persistent=False)
        self.connected: Tensor
        self.tau: Tensor
        if fixed_tau is None:
            self.tau = nn.Parameter(1 + torch.rand(hidden_size))
        else:
            self.register_buffer("tau", torch.full((hidden_size,), fixed_tau))

    def step_end(self, outcome: object) -> None:
        """Back to τ = 1 where a step went below: the nearest value allowed, from which a later step may leave again."""
        with torch.no_grad():
            self.tau.clamp_(min=1.0)

    def init_state(self, batch_size: int) -> Tensor:
        """(B, H): noise in training, its mean in evaluation."""
        shape, kind = (batch_size, self.hidden_size), {"device": self.tau.device, "dtype": self.tau.dtype}
        if self.training and self.initial_noise:
            return self.initial_noise * torch.rand(shape, **kind)
        return torch.full(shape, self.initial_noise / 2, **kind)

    def read(self, x_BTI: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        start = self.init_state(len(x_BTI)) if state is None else state
        *_, held = self._steps(x_BTI, start, lengths)
        return held, held

    def activity(self, x_BTI: Tensor) -> Tensor:
        start = self.tau.new_full((len(x_BTI), self.hidden_size), self.initial_noise / 2)
        return torch.stack(list(self._steps(x_BTI, start, None)))

    def measurements(self) -> Mapping[str, float]:
        """Mean and median over units of τ, and of τ_net where it is measured."""
        tau = self.tau.detach()
        return {"tau_mean": float(tau.mean()), "tau_median": float(tau.median())} | dict(super().measurements())

    def _steps(self, x_BTI: Tensor, h_BH: Tensor, lengths: Tensor | None) -> Iterator[Tensor]:
        """The state after every step; a row that is over keeps its own."""
        share, matrix = 1 / self.tau.clamp(min=1.0), self.recurrent.weight * self.connected
        drive_TBH = (self.drive(x_BTI) + self.recurrent.bias).transpose(0, 1)
        if self.leak == "inside":
            # All of a step that is linear as one matrix: (1 − 1/τ) h + W h / τ.
            matrix = torch.diag(1 - share) + share.unsqueeze(1) * matrix
            drive_TBH = drive_TBH * share
        across = matrix.t().contiguous()
        for place, drive_BH in enumerate(drive_TBH.unbind(0)):
            new_BH = F.leaky_relu(torch.addmm(drive_BH, h_BH, across))
            if self.leak == "outside":
                new_BH = h_BH + share * (new_BH - h_BH)
            h_BH = new_BH if lengths is None else torch.where((lengths > place).unsqueeze(1), new_BH, h_BH)
            yield h_BH


class _Gated(_Recurrent):
    """Base of torch's own cells, whose fused pass gives what is held after every token."""

    cells: nn.RNNBase

    def read(self, x_BTI: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Without a state to go on from: after a shorter row the fused pass has none."""
        held_BTH, _ = self.cells(x_BTI)
        if lengths is None:
            return held_BTH[:, -1], None
        return held_BTH[torch.arange(len(held_BTH), device=held_BTH.device), lengths - 1], None

    def activity(self, x_BTI: Tensor) -> Tensor:
        return self.cells(x_BTI)[0].transpose(0, 1)


class LSTM(_Gated):
    """One layer of torch's LSTM, read out after a row's last token."""

    paper = "Hochreiter & Schmidhuber 1997"

    def __init__(
        self, *, spec: Spec, hidden_size: int = 128, embedding_size: int | None = None, measured_steps: int = 0
    ) -> None:
        """The options are those of every recurrent classifier here, see `_Recurrent`."""
        super().__init__(
            spec=spec, hidden_size=hidden_size, embedding_size=embedding_size, measured_steps=measured_steps
        )
        self.cells = nn.LSTM(self.input_size, hidden_size, batch_first=True)


class GRU(_Gated):
    """One layer of torch's gated recurrent units, read out after a row's last token."""

    paper = "Cho et al. 2014, arXiv:1406.1078"

    def __init__(
        self, *, spec: Spec, hidden_size: int = 128, embedding_size: int | None = None, measured_steps: int = 0
    ) -> None:
        """The options are those of every recurrent classifier here, see `_Recurrent`."""
        super().__init__(
            spec=spec, hidden_size=hidden_size, embedding_size=embedding_size, measured_steps=measured_steps
        )
        self.cells = nn.GRU(self.input_size, hidden_size, batch_first=True)
