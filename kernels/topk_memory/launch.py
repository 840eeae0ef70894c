"""Launches of the `topk_memory` kernels: which, over what grids, with what buffers between them.

There: `store_maxima` or `best_groups` search all slots for the groups worth a look, `read` scores those again. Back:
`adjoints` finds what reaches each score, a stable sort puts the chosen slots in order, and `gathered_by_slot` sums by
slot. Sums of floating-point numbers have one order and those of whole numbers need none: every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from clplat.kernels.backends import interpreting
from clplat.kernels.topk_memory.triton_read import MASS_UNIT, adjoints, gathered_by_slot, read
from clplat.kernels.topk_memory.triton_select import best_groups, store_maxima
from clplat.kernels.topk_memory.tuning import LARGEST_BUFFER, Plan, padded, plan_for

Found = tuple[Tensor, Tensor, Tensor, Tensor]
CANDIDATES = 512
"""How many maxima or ranks a warp of a query's program looks at together."""


def forward(
    q: Tensor, keys: Tensor, values: Tensor, count: Tensor | None, mask: Tensor | None, k: int, scale: float,
    plan: Plan | None = None,
) -> Found:  # fmt: skip
    """Output (N, E), indices and weights (N, k) and mass (S,)."""
    (N, D), S = q.shape, len(keys)
    plan = plan or plan_for(N, S, D, k, q.dtype)
    output = torch.empty(N, values.shape[1], dtype=values.dtype, device=q.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=q.device)
    weights = torch.empty(N, k, dtype=torch.float32, device=q.device)
    units = torch.zeros(S, dtype=torch.int64, device=q.device)
    step = N
    if plan.search == "maxima":
        step = min(N, max(plan.rows, LARGEST_BUFFER // triton.cdiv(S, plan.group) // plan.rows * plan.rows))
    for start in range(0, N, step):
        stop = min(N, start + step)
        part = q[start:stop]
        candidates = searched(part, keys, count, mask, k, plan)
        num = candidates.shape[1]
        read[(stop - start,)](
            part, keys, values, count, mask, candidates, output[start:stop], indices[start:stop], weights[start:stop],
            units, S, q.stride(0), keys.stride(0), values.stride(0), D, values.shape[1], num, k, scale,
            K=list_length(k), G=min(CANDIDATES * plan.read_warps, padded(num)), GROUP=plan.group,
            **blocks(D, values.shape[1], k, plan.group, plan.read_warps),
            MAXIMA=plan.search == "maxima", COUNTED=count is not None, MASKED=mask is not None,
            num_warps=plan.read_warps,
        )  # fmt: skip
    return output, indices, weights, (units / MASS_UNIT.value).to(torch.float32)


def list_length(k: int) -> int:
    """Entries of a query's list: a power of two."""
    return max(4, 1 << (k - 1).bit_length())


def blocks(D: int, E: int, k: int, group: int, warps: int) -> dict[str, int]:
    """Features at a time of a query's program: of keys of all slots of its groups, of values of the chosen alone."""
    chosen = list_length(k)
    sizes = {"BD": (D, chosen * group), "BE": (E, chosen)}
    return {name: min(padded(width), max(16, 2048 * warps // rows)) for name, (width, rows) in sizes.items()}


def searched(q: Tensor, keys: Tensor, count: Tensor | None, mask: Tensor | None, k: int, plan: Plan) -> Tensor:
    """Of every query, the maxima of all groups (N, groups), or the ranks (N, parts · K) of the best of them."""
    (N, D), S = q.shape, len(keys)
    tiles, features = triton.cdiv(S, plan.slots), min(padded(D), plan.features)
    # Many parts fill the card; few slots a part would spend their time on starting, and lists start anew in each.
    rows, shortest = triton.cdiv(N, plan.rows), 8 if plan.search == "maxima" else 16
    parts = min(triton.cdiv(tiles, shortest), triton.cdiv(plan.programs, rows))
    num_blocks = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, num_blocks)
    groups = triton.cdiv(S, plan.group)
    sizes = (N, S, q.stride(0), keys.stride(0), D, groups, num_blocks)
    constants: dict[str, Any] = {
        "BM": plan.rows, "BS": plan.slots, "BD": features, "GROUP": plan.group, "WHOLE": features >= D,
        "COUNTED": count is not None, "MASKED": mask is not None, "num_warps": plan.warps, "num_stages": plan.stages,
        "UPCAST": interpreting() and q.dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    if plan.search == "maxima":
        maxima = torch.empty(N, groups, dtype=torch.float32, device=q.device)
        store_maxima[(rows, parts)](q, keys, count, mask, maxima, *sizes, **constants)
        return maxima
    K = list_length(k)
    most = min(K, plan.slots // plan.group)
    rounds = most if most <= 8 else 0
    lists = torch.empty(N, parts * K, dtype=torch.int64, device=q.device)
    best_groups[(rows, parts)](q, keys, count, mask, lists, *sizes, K=K, ROUNDS=rounds, **constants)
    return lists


def backward(
    q: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor, doutput: Tensor,
    dweights: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adjoints of q, keys and values."""
    (N, D), (S, E), k = q.shape, values.shape, indices.shape[1]
    dq, dscores = torch.empty(N, D, dtype=q.dtype, device=q.device), torch.empty_like(weights)
    adjoints[(N,)](
        q, keys, values, indices, weights, doutput, dweights, dq, dscores, keys.stride(0), values.stride(0), D, E, k,
        scale, K=list_length(k), **blocks(D, E, k, 1, 1), WEIGHED=dweights is not None, num_warps=1,
    )  # fmt: skip
    # Entries without a slot go behind all others, where nobody looks.
    slots, order = indices.masked_fill(indices < 0, S).to(torch.int32).flatten().sort(stable=True)
    bounds = torch.searchsorted(slots, torch.arange(S + 1, dtype=torch.int32, device=q.device))
    found = []
    for rows, coefficients, like in ((q, dscores, keys), (doutput, weights, values)):
        width = rows.shape[1]
        out = torch.empty(S, width, dtype=like.dtype, device=q.device)
        block, together = min(padded(width), 256), min(64, max(8, padded(N * k // S + 1) // 2))
        gathered_by_slot[(S, triton.cdiv(width, block))](
            rows, coefficients, order, bounds, out, rows.stride(0), width, k, B=together, BW=block,
            num_warps=4 if block * together >= 4096 else 1,
        )  # fmt: skip
        found.append(out)
    return dq, found[0], found[1]
