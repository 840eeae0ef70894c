"""What `self_modifying` refuses: shapes, types, and on the CPU values too; on a GPU reading them would wait for it."""

from __future__ import annotations

from torch import Tensor

from clplat.kernels.delta_memory.arguments import check_offset, check_packed, check_pairs
from clplat.kernels.self_modifying.reference import DELTAS, Inputs, Readouts, Rule, SelfModifyingState


def check(
    inputs: Inputs, readouts: Readouts, rule: Rule, chunk: int, state: SelfModifyingState, cu_seqlens: Tensor | None
) -> None:  # fmt: skip
    """Raises ValueError with the argument's name, what it must be and what it is."""
    if rule.delta not in DELTAS:
        raise ValueError(f"rule.delta: must be one of {', '.join(DELTAS)}, got {rule.delta!r}")
    for name, value in (("max_rate", rule.max_rate), ("max_gradient", rule.max_gradient)):
        if value is not None and not value > 0:
            raise ValueError(f"rule.{name}: must be above 0, got {value}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: must be a whole number of tokens, at least 1, got {chunk!r}")
    _check_tokens(inputs)
    _check_readouts(readouts, inputs)
    check_packed(cu_seqlens, *inputs.x.shape[:2])
    _check_state(state, inputs, readouts, chunk, len(inputs.x) if cu_seqlens is None else len(cu_seqlens) - 1)


def _check_tokens(inputs: Inputs) -> None:
    x = inputs.x
    for name, part in inputs._asdict().items():
        if part is not None and not (isinstance(part, Tensor) and part.is_floating_point()):
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name}: must be a tensor of floating-point numbers, got {kind}")
        if part is not None and part.device != x.device:
            raise ValueError(f"{name}: is on {part.device}, x on {x.device}; move them together")
    alike = x.shape == inputs.q.shape or (x.ndim == 5 and (*x.shape[:3], x.shape[4]) == inputs.q.shape)
    if inputs.q.ndim != 4 or not alike:
        raise ValueError(
            f"x and q must be (B, T, H, D) alike, or x (B, T, H, M - 1, D), got {tuple(x.shape)} and "
            f"{tuple(inputs.q.shape)}"
        )
    for name, gate in (("log_momentum", inputs.log_momentum), ("damping", inputs.damping)):
        if gate is not None and gate.shape != x.shape[:3]:
            raise ValueError(f"{name}: must be (B, T, H) = {tuple(x.shape[:3])}, got {tuple(gate.shape)}")


def _check_readouts(readouts: Readouts, inputs: Inputs) -> None:
    heads, width = inputs.q.shape[2:]
    if (readouts.decay is None) != (readouts.decay_bias is None):
        raise ValueError("readouts.decay and readouts.decay_bias: give both or neither")
    for name, part in readouts._asdict().items():
        shape = (heads,) if name.endswith("bias") else (heads, width)
        if part is not None and part.shape != shape:
            raise ValueError(f"readouts.{name}: must be {shape}, got {tuple(part.shape)}")
    made = 3 + (readouts.decay is not None)
    if inputs.x.ndim == 5 and inputs.x.shape[3] != made:
        raise ValueError(
            f"x: must have an input for each of {made} matrices that make something, got {inputs.x.shape[3]}"
        )


def _check_state(
    state: SelfModifyingState, inputs: Inputs, readouts: Readouts, chunk: int, sequences: int
) -> None:  # fmt: skip
    if not isinstance(state, SelfModifyingState):
        raise ValueError(f"state: must be a SelfModifyingState, as a call returns it, got {type(state).__name__}")
    heads, width = inputs.q.shape[2:]
    shape = (sequences, 4 + (readouts.decay is not None), heads, width, width)
    for name, part in (("W", state.W), ("S", state.S), ("anchor", state.anchor)):
        if part is not None and part.shape != shape:
            raise ValueError(f"state.{name}: must be (sequences, M, H, D, D) = {shape}, got {tuple(part.shape)}")
    check_pairs(state.S, inputs.log_momentum, state.anchor, state.offset)
    check_offset(state.offset, sequences, chunk)
