"""What `topk_read` computes: all scores at once, which defines it, and a block at a time, which is its CPU form.

Shapes: N queries and S slots with keys of D and values of E features, k slots read by each query. For query n, with
s_nj = q_n·key_j over the slots j that are valid and whose score is a number above −∞:

    J_n = the k slots of largest s_nj, of equal ones the lowest (all of them where there are fewer)
    α_nj = exp(s_nj / τ) / Σ_{i ∈ J_n} exp(s_ni / τ)      o_n = Σ_{j ∈ J_n} α_nj value_j      mass_j = Σ_n α_nj

Nothing to choose from gives zeros. A NaN in a query makes its weights and output NaN and adds nothing to `mass`.
Gradients reach q, keys and values through the chosen slots alone: J is piecewise constant.

Source: the episodic store of TRC² (arXiv:2602.22479), "content-addressable exact top-k reads".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERIES, SLOTS = 1024, 8192
"""How many of each the blocked form holds scores of at once."""


class TopkRead(NamedTuple):
    """What a read gives; the leading dimensions are those of q."""

    output: Tensor
    """(…, E), in the values' type."""
    indices: Tensor
    """(…, k) int64, the chosen slots, best first; −1 where fewer than k were valid."""
    weights: Tensor
    """(…, k), the softmax over the chosen, fp32 or wider; 0 where there is no slot. Differentiable, as `output` is."""
    mass: Tensor
    """(S,), every slot's weights summed over the queries; not differentiable."""


def read_whole(
    q: Tensor, keys: Tensor, values: Tensor, k: int, temperature: float, count: Tensor | None, mask: Tensor | None
) -> TopkRead:
    """The definition: q (N, D), keys (S, D), values (S, E), `count` (1,) the first so many slots, `mask` (S,) bool."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores_NS = (q.detach().to(wide) @ keys.detach().to(wide).T).masked_fill(
        ~valid_slots(keys, count, mask), -torch.inf
    )
    scores_NS = scores_NS.masked_fill(scores_NS.isnan(), -torch.inf)
    found_Nk, indices_Nk = scores_NS.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - scores_NS.shape[1])
    found_Nk = torch.nn.functional.pad(found_Nk[:, :k], (0, missing), value=-torch.inf)
    indices_Nk = torch.nn.functional.pad(indices_Nk[:, :k], (0, missing), value=-1)
    return weighted(q, keys, values, indices_Nk.masked_fill(found_Nk == -torch.inf, -1), temperature)


def read_blocked(
    q: Tensor, keys: Tensor, values: Tensor, k: int, temperature: float, count: Tensor | None, mask: Tensor | None
) -> TopkRead:
    """The same, with scores of few queries and few slots in memory at a time."""
    valid_S = valid_slots(keys, count, mask)
    parts = [
        weighted(rows, keys, values, chosen(rows.detach(), keys.detach(), k, valid_S), temperature)
        for rows in q.split(QUERIES)
    ]
    output, indices, weights = (torch.cat([part[field] for part in parts]) for field in range(3))
    return TopkRead(output, indices, weights, torch.stack([part.mass for part in parts]).sum(0))


def valid_slots(keys: Tensor, count: Tensor | None, mask: Tensor | None) -> Tensor:
    """(S,) bool."""
    slot_S = torch.arange(len(keys), device=keys.device)
    valid_S = torch.ones_like(slot_S, dtype=torch.bool) if count is None else slot_S < count
    return valid_S if mask is None else valid_S & mask


def chosen(q: Tensor, keys: Tensor, k: int, valid_S: Tensor) -> Tensor:
    """The k best slots of every query (N, k), best first, −1 for none; each block's scores join the best so far."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found_Nk = torch.full((len(q), k), -torch.inf, dtype=wide, device=q.device)
    indices_Nk = torch.full((len(q), k), -1, device=q.device)
    for start in range(0, len(keys), SLOTS):
        scores_NB = q.to(wide) @ keys[start : start + SLOTS].to(wide).T
        scores_NB = scores_NB.masked_fill(~valid_S[start : start + SLOTS] | scores_NB.isnan(), -torch.inf)
        slot_NB = torch.arange(start, start + scores_NB.shape[1], device=q.device).expand_as(scores_NB)
        both, slots = torch.cat([found_Nk, scores_NB], 1), torch.cat([indices_Nk, slot_NB], 1)
        place_Nk = best_places(both, k)
        found_Nk, indices_Nk = both.gather(1, place_Nk), slots.gather(1, place_Nk)
    return indices_Nk.masked_fill(found_Nk == -torch.inf, -1)


def best_places(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, largest first, of equal ones the first; `torch.topk` promises no order."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=1, descending=True, stable=True)[1][:, :k]
    # Score and column in one number: a float's bits as an integer with its order, then the column counted backwards.
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    rank = bits ^ ((bits >> 63) & 0x7FFFFFFF)
    column = torch.arange(scores.shape[1], device=scores.device)
    return 0xFFFFFFFF - (((rank << 32) | (0xFFFFFFFF - column)).topk(k, 1)[0] & 0xFFFFFFFF)


def weighted(q: Tensor, keys: Tensor, values: Tensor, indices_Nk: Tensor, temperature: float) -> TopkRead:
    """Softmax over chosen slots and their values' sum, differentiable."""
    wide, there_Nk = torch.promote_types(q.dtype, torch.float32), indices_Nk >= 0
    scores_Nk = torch.einsum("nd,nkd->nk", q.to(wide), gathered(keys, indices_Nk).to(wide)) / temperature
    # A row without slots is softmaxed over zeros and then set to zero: over −∞ alone it would be NaN, gradient too.
    none_N1 = ~there_Nk.any(1, keepdim=True)
    scores_Nk = scores_Nk.masked_fill(~there_Nk, -torch.inf).masked_fill(none_N1, 0.0)
    weights_Nk = scores_Nk.softmax(1).masked_fill(~there_Nk, 0.0)
    weights_Nk = weights_Nk.masked_fill(q.isnan().any(1, keepdim=True), torch.nan)
    output_NE = torch.einsum("nk,nke->ne", weights_Nk, gathered(values, indices_Nk).to(wide))
    return TopkRead(output_NE.to(values.dtype), indices_Nk, weights_Nk, mass_of(indices_Nk, weights_Nk, len(keys)))


def gathered(rows: Tensor, indices_Nk: Tensor) -> Tensor:
    """(N, k, width), zeros for −1, whatever lies in slots that nobody chose."""
    found = rows.index_select(0, indices_Nk.clamp(min=0).flatten()).unflatten(0, indices_Nk.shape)
    return found.masked_fill((indices_Nk < 0)[..., None], 0.0)


def mass_of(indices_Nk: Tensor, weights_Nk: Tensor, slots: int) -> Tensor:
    """Weights summed by slot (S,)."""
    weights = weights_Nk.detach().nan_to_num(0.0).flatten()
    return weights.new_zeros(slots).index_add(0, indices_Nk.clamp(min=0).flatten(), weights)
