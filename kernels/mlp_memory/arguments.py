"""What `mlp_memory` refuses: shapes, types, and on the CPU values too; on a GPU reading them would wait for it."""

from __future__ import annotations

from torch import Tensor

from clplat.kernels.delta_memory.arguments import check_inputs, check_offset, check_packing
from clplat.kernels.delta_memory.reference import Inputs
from clplat.kernels.mlp_memory.reference import ACTIVATIONS, BIASES, MLPState, Rule


def check(inputs: Inputs, rule: Rule, chunk: int, state: MLPState, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError with the argument's name, what it must be and what it is."""
    for name, value, known in (("activation", rule.activation, ACTIVATIONS), ("bias", rule.bias, BIASES)):
        if value not in known:
            raise ValueError(f"{name}: must be one of {', '.join(known)}, got {value!r}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: must be a whole number of tokens, at least 1, got {chunk!r}")
    check_inputs(inputs)
    check_packing(inputs, cu_seqlens)
    q, v = inputs.q, inputs.v
    if q.shape[2] != v.shape[2]:
        raise ValueError(f"v: must have q's {q.shape[2]} heads, got {v.shape[2]}")
    if rule.residual and q.shape[3] != v.shape[3]:
        raise ValueError(f"residual: needs keys as wide as values, got {q.shape[3]} and {v.shape[3]}")
    _check_state(state, inputs, chunk, len(q) if cu_seqlens is None else len(cu_seqlens) - 1)


def _check_state(state: MLPState, inputs: Inputs, chunk: int, sequences: int) -> None:
    if not isinstance(state, MLPState):
        raise ValueError(f"state: must be an MLPState, as a call returns it, got {type(state).__name__}")
    (heads, D), E, J = inputs.q.shape[2:], inputs.v.shape[3], state.W1.shape[-1]
    shapes = ((sequences, heads, D, J), (sequences, heads, J, E))
    for name in ("W", "S", "anchor"):
        pair = (getattr(state, f"{name}1"), getattr(state, f"{name}2"))
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"state.{name}1 and state.{name}2: give both or neither")
        for number, (part, shape) in enumerate(zip(pair, shapes, strict=True), start=1):
            if part is not None and part.shape != shape:
                letters = "(sequences, H, D, J)" if number == 1 else "(sequences, H, J, E)"
                raise ValueError(f"state.{name}{number}: must be {letters} = {shape}, got {tuple(part.shape)}")
    if (state.S1 is None) != (inputs.log_momentum is None):
        raise ValueError(
            "state.S1, S2 and log_momentum: give all or none; to begin or end momentum here, set S to zeros or to None"
        )
    if (state.anchor1 is None) != (state.offset is None):
        raise ValueError("state.anchor1, anchor2 and offset: give all or none")
    check_offset(state.offset, sequences, chunk)
