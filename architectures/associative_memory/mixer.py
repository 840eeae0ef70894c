"""A mixing layer of a decoder whose heads are associative memories: projections, gates, a norm and a way out.

Shapes: B rows, T tokens, P pending tokens, C hidden size, H heads, D head size, K width of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.carrying import CarryingMixer, OutputGate
from clplat.architectures.associative_memory.costs import operations_per_token
from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.rule import MemoryRule, check_rate
from clplat.architectures.associative_memory.state import Tokens
from clplat.architectures.associative_memory.telemetry import Written
from clplat.architectures.layers import WideBias
from clplat.architectures.option_checks import check_at_least, check_choices, check_finite

MOST_NUMBERS = 2**24
"""Of the first layer of one head's memory, for one row: 64 MiB in float32, and again for momentum and anchor."""


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """What stands around the memory.

    `conv_width` tokens are read by a short convolution of queries, keys and values, with SiLU behind it; 1 is neither.
    `learned_rate` gives every token a step size `max_rate` · sigmoid(·), otherwise each takes `max_rate`. `max_rate`
    defaults to 1, and for rules with a gradient at the chunk's start to 1 / chunk: unit keys that repeat all through a
    chunk then do not overshoot; under a map that makes steps smaller, to as much more; with a window of c pairs to c
    times less, as each may weigh 1, but not for orthogonal steps, which are as long as their rate. `gate_rank`: gates
    are a linear map of the token through so few numbers, None for a full one. `damped` multiplies rates by
    1 − momentum, for the same reason. `short_values`: a value longer than 1 is shortened to 1, and `max_rate` then
    defaults to as much less as a network of several layers is steeper than a matrix (`MemoryRule.steepness`).
    `normaliser` divides answers by the sum of what was read with, as linear attention does. `output_gate` multiplies
    normed answers by silu(gate(x)). `learned_start`: the memory's first weights are trained, otherwise 0. Gates begin
    where `decay_start`, `momentum_start` and `window_start`, of each pair of a window, say.
    """

    group: ClassVar[str] = "projection"

    conv_width: int = 4
    learned_rate: bool = True
    max_rate: float | None = None
    damped: bool = False
    short_values: bool = False
    normaliser: bool = False
    output_gate: OutputGate = "silu"
    gate_rank: int | None = None
    learned_start: bool = True
    decay_start: float = 0.99
    momentum_start: float = 0.9
    window_start: float = 0.5

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, output_gate=OutputGate)
        check_at_least(self, 1, "conv_width", "gate_rank")
        if self.max_rate is not None and self.max_rate <= 0:
            raise ValueError(f"projection.max_rate: must be above 0, got {self.max_rate}")
        for name in ("decay_start", "momentum_start", "window_start"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"projection.{name}: must lie between 0 and 1, got {getattr(self, name)}")
        if self.normaliser and self.learned_start:
            raise ValueError("projection.normaliser: needs learned_start: false, for a sum of positive weights")


class MemoryMixer(CarryingMixer):
    """Reads tokens into the memories of its heads, all under one rule, and answers from them."""

    def __init__(self, *, hidden_size: int, num_heads: int, rule: MemoryRule, projection: ProjectionOptions) -> None:
        super().__init__(
            hidden_size=hidden_size, num_heads=num_heads, channels=3 * hidden_size,
            conv_width=projection.conv_width, output_gate=projection.output_gate,
        )  # fmt: skip
        self.rule, self.options = rule, projection
        self._check_size()
        self.max_rate = projection.max_rate or self._stable_rate()
        check_rate("projection.max_rate", self.max_rate, rule)
        self.starts = self._gate_starts()
        narrowed = projection.gate_rank if self.starts else None
        self.gate_inputs = nn.Linear(hidden_size, narrowed, bias=False) if narrowed else None
        gates = sum(len(part) for part in self.starts.values())
        self.gates = WideBias(narrowed or hidden_size, gates) if self.starts else None
        self.memory: AssociativeMemory = AssociativeMemory(
            rule=rule, num_heads=num_heads, key_size=self.head_size,
            value_size=self.head_size + projection.normaliser, learned_start=projection.learned_start,
        )  # fmt: skip
        self.reset_dynamics()

    def _check_size(self) -> None:
        """ValueError, before anything is allocated, for features that no machine holds: they are size ** degree."""
        features, outputs = self.rule.widths(self.head_size, self.head_size)[0]
        if features > self.head_size and features * outputs > MOST_NUMBERS:
            asked = self.rule.polynomial
            raise ValueError(
                f"degree: {asked.degree} of a head of {self.head_size} gives {features:,} features with rank "
                f"{asked.rank}, and the first layer of each head's memory {features * outputs:,} numbers a row, of "
                f"which {MOST_NUMBERS:,} are allowed; take a lower degree, more heads, or a rank such as 64"
            )

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """What is not drawn like a projection: convolution, gates and the memory's first weights."""
        super().reset_dynamics()
        if self.gates is not None:
            self.gates.bias.copy_(torch.cat(list(self.starts.values())))
        self.memory.reset_start()

    def written(self, x_BTC: Tensor) -> dict[str, Written]:
        """What the memory does with a row (1, T, C); see `telemetry.py`."""
        backend, tokens = self.memory.backend, self._tokens(x_BTC, self.qkv(x_BTC), None, None)
        _, end = self.memory(tokens)
        self.memory.backend = backend
        first = self.memory.empty_state(1).weights
        return {"": Written(self.memory, (self.memory.prepared(tokens),), first, end.weights)}

    def mixing_flops(self, tokens: int) -> float:
        """Operations of the memory beyond 2 for each weight that it begins with; see `costs.py`."""
        return self.flops_under(self.rule, tokens)

    def flops_under(self, rule: MemoryRule, tokens: int) -> float:
        """The same of a memory of these sizes under another rule."""
        first = sum(part.numel() for part in self.memory.first)
        return tokens * (operations_per_token(rule, self.head_size, self.memory.shapes) - 2.0 * first)

    def _stable_rate(self) -> float:
        """The largest step that overshoots nowhere, for `max_rate`."""
        rule = self.rule
        # Erasing tokens know of each other; an orthogonal step is as long as its rate, whatever the losses weigh.
        together = rule.chunk if rule.steps_together and rule.delta == "none" else 1
        steep = rule.steepness if self.options.short_values and rule.steps_together else 1.0
        return rule.map.step_scale(self.head_size) / (together * (1 if rule.orthogonal else rule.window) * steep)

    def _gate_starts(self) -> dict[str, Tensor]:
        """Biases with which the gates begin, in the order of their outputs, heads first."""
        heads, rule, options = self.num_heads, self.rule, self.options
        widths = [inputs for inputs, _ in rule.widths(self.head_size, self.head_size)]
        decays = {"none": 0, "decay": heads, "channel": heads * sum(widths)}[rule.retention]
        starts = {"rate": torch.zeros(heads if options.learned_rate else 0)}
        starts["decay"] = torch.full((decays,), torch.tensor(options.decay_start).logit().item())
        momenta = heads if rule.momentous else 0
        starts["momentum"] = torch.full((momenta,), torch.tensor(options.momentum_start).logit().item())
        pairs = heads * rule.window if rule.window > 1 else 0
        starts["window"] = torch.full((pairs,), torch.tensor(options.window_start).logit().item())
        starts["threshold"] = torch.full((heads if rule.bias.kind == "huber" else 0,), math.log(math.e - 1))
        return {name: part for name, part in starts.items() if len(part)}

    def _tokens(
        self, x_BTC: Tensor, qkv: Tensor, before: Tensor | None, documents: Documents | None,
        counts_BT: Tensor | None = None,
    ) -> Tokens:  # fmt: skip
        """Queries, keys, values and gates of tokens, whose projections `qkv` follow those `before`."""
        qkv = self._convolved(qkv, before, documents)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_size)).permute(2, 0, 3, 1, 4).unbind(0)
        v = self._bounded(v)
        if self.options.normaliser:
            v = F.pad(v, (0, 1), value=1.0)
        wide = torch.promote_types(q.dtype, torch.float32)
        gates = self._gates(x_BTC)
        momentum = F.logsigmoid(gates["momentum"]) if "momentum" in gates else None
        rate = gates["rate"].sigmoid() if "rate" in gates else q.new_ones(q.shape[:3], dtype=wide)
        if self.options.damped and momentum is not None:
            rate = rate * -momentum.expm1()
        threshold = F.softplus(gates["threshold"]) if "threshold" in gates else None
        window = None
        if "window" in gates:
            window = gates["window"].unflatten(1, (self.num_heads, -1)).mT.sigmoid()
        return Tokens(
            q, k, v, self.max_rate * rate, self._decays(gates), momentum, threshold, counts=counts_BT, window=window
        )

    def _bounded(self, v_BHTE: Tensor) -> Tensor:
        """Values as the memory learns them."""
        if not self.options.short_values:
            return v_BHTE
        return v_BHTE / torch.linalg.vector_norm(v_BHTE, dim=-1, keepdim=True).clamp(min=1.0)

    def _gates(self, x_BTC: Tensor) -> dict[str, Tensor]:
        """Gates by name before their squashing, (B, H, T), those of channels and of a window (B, H·each, T)."""
        if self.gates is None:
            return {}
        if self.gate_inputs is not None:
            x_BTC = self.gate_inputs(x_BTC)
        raw = self.gates(x_BTC).mT
        return dict(zip(self.starts, raw.split([len(part) for part in self.starts.values()], dim=1), strict=True))

    def _decays(self, gates: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Logarithms of what is kept, for every layer."""
        if "decay" not in gates:
            return ()
        log_decay, widths = F.logsigmoid(gates["decay"]), [shape[1] for shape in self.memory.shapes]
        if self.rule.retention == "decay":
            return (log_decay.unsqueeze(-1),) * len(widths)
        return log_decay.unflatten(1, (self.num_heads, -1)).mT.split(widths, dim=-1)

    def _given_out(self, x_BTC: Tensor, answers_BHTE: Tensor, factor: Tensor | None = None) -> Tensor:
        if self.options.normaliser:
            sums = answers_BHTE[..., -1:]
            # Sums are above 0, but for memories that are kept from writing.
            answers_BHTE = answers_BHTE[..., :-1] / sums.masked_fill(sums == 0, 1.0)
        return super()._given_out(x_BTC, answers_BHTE, factor)
