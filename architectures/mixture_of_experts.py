"""A dropless mixture of SwiGLU experts: each token chooses its own k of E feed-forward layers.

Tokens choose experts (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, Mixtral, arXiv:2401.04088), and no
expert has a capacity: every token is answered by all that it chose. Capacity limits, and experts that choose their
tokens, let later tokens change what earlier ones get, so that a causal model would not be causal.

Shapes: N tokens, C hidden size, E experts, k chosen ones, F inner size, R = N·k rows (a token once for each choice),
sorted by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.layers import AsPrecise, SwiGLU, free_to_look
from clplat.kernels.topk_memory import ExpertOrder, expert_order


class MixtureOfExperts(nn.Module):
    """Feed-forward layer: x (…, C) to Σ_chosen weight_e · SwiGLU_e(x) + SwiGLU_shared(x) (…, C), and its balance loss.

    The router's probabilities are computed in at least float32 whatever the model's precision, as rounding there
    changes which expert answers.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int,
        num_experts: int = 8,
        experts_per_token: int = 2,
        shared_experts: int = 0,
        renormalise: bool = True,
        balance: float = 0.01,
    ) -> None:
        """`inner_size` is that of one expert. `renormalise` divides the probabilities of the chosen experts by their
        sum (Mixtral), else they stay as they are (Switch). `shared_experts` more experts answer every token, as one
        layer of so many times the inner size (DeepSeekMoE, arXiv:2401.06066). `balance` is the coefficient of the
        loss that keeps experts evenly used; 0.01 is that of Switch (Fedus et al. 2021, arXiv:2101.03961, §2.2).
        """
        super().__init__()
        _check_options(inner_size, num_experts, experts_per_token, shared_experts, balance)
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.renormalise, self.balance = renormalise, balance
        self.router = AsPrecise(hidden_size, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))
        shared_size = shared_experts * inner_size
        self.shared = SwiGLU(hidden_size=hidden_size, inner_size=shared_size) if shared_experts else None
        for weight in (self.router.weight, self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output (…, C) and its balance loss, a scalar that equals `balance` at even use."""
        x_NC = x.flatten(0, -2)
        probability_NE = self.probabilities(x_NC)
        weight_Nk, chosen_Nk = probability_NE.topk(self.experts_per_token, dim=-1)
        if self.renormalise:
            weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        # Nothing is read back to the host, which would wait to learn how many rows each expert has.
        sort = expert_order(chosen_Nk, self.num_experts)
        rows_E = F.pad(sort.ends, (1, 0)).diff()
        mixed_NC = self._mixed(x_NC, weight_Nk, sort, rows_E)
        if self.shared is not None:
            mixed_NC = mixed_NC + self.shared(x_NC)
        used_E = rows_E.to(probability_NE.dtype) / chosen_Nk.numel()
        loss = self.balance * self.num_experts * (used_E * probability_NE.mean(0)).sum()
        return mixed_NC.view_as(x), loss

    def probabilities(self, x_NC: Tensor) -> Tensor:
        """The router's softmax over the experts (N, E)."""
        precise = torch.promote_types(x_NC.dtype, torch.float32)
        with torch.autocast(x_NC.device.type, enabled=False):
            return self.router(x_NC.to(precise)).softmax(-1)

    def idle_weights(self) -> int:
        """How many weights one token does not pass through."""
        expert = self.gate_up[0].numel() + self.down[0].numel()
        return (self.num_experts - self.experts_per_token) * expert

    def _mixed(self, x_NC: Tensor, weight_Nk: Tensor, sort: ExpertOrder, rows_E: Tensor) -> Tensor:
        """Rows sorted by expert go through their experts, back to their tokens, and are summed by weight."""
        dtype = _working_dtype(x_NC)
        x_RC = x_NC.to(dtype).index_select(0, sort.order // self.experts_per_token)
        y_RC = expert_swiglu(x_RC, self.gate_up.to(dtype), self.down.to(dtype), rows_E)
        y_NkC = y_RC.index_select(0, sort.places).unflatten(0, weight_Nk.shape)
        # A product with one row, so that no weighted copy of all rows is kept for the backward pass.
        return torch.bmm(weight_Nk.to(dtype).unsqueeze(1), y_NkC).squeeze(1)


def expert_size(hidden_size: int) -> int:
    """The inner size of an expert that the published sizes of TRC² and its rivals imply: 8/3 of the hidden size,
    rounded up to a multiple of 256."""
    return 256 * -(-8 * hidden_size // 768)


def idle_weights(model: nn.Module) -> int:
    """How many of a model's weights one token does not pass through: those of experts that it did not choose."""
    return sum(layer.idle_weights() for layer in model.modules() if isinstance(layer, MixtureOfExperts))


def expert_swiglu(x_RC: Tensor, gate_up_EDC: Tensor, down_ECF: Tensor, rows_E: Tensor) -> Tensor:
    """SwiGLU of each row with its expert's weights, D = 2F; the first rows_E[0] rows belong to expert 0, and so on.

    Three forms of one computation: by index slices where the numbers of rows may be looked up (CPU), by
    `torch.nn.functional.grouped_mm` where its kernel fits, else by padded blocks. The last two never make the host
    wait for the device.
    """
    if free_to_look(rows_E):
        parts = zip(x_RC.split(rows_E.tolist()), gate_up_EDC.unbind(), down_ECF.unbind())
        return torch.cat([F.linear(_gated(F.linear(x, gate_up)), down) for x, gate_up, down in parts])
    if _grouped_mm_fits(x_RC, down_ECF):
        ends_E = rows_E.cumsum(0, dtype=torch.int32)
        inner_RF = _gated(F.grouped_mm(x_RC, gate_up_EDC.transpose(1, 2), offs=ends_E))
        return F.grouped_mm(inner_RF, down_ECF.transpose(1, 2), offs=ends_E)
    return _in_blocks(x_RC, gate_up_EDC, down_ECF, rows_E)


def _in_blocks(x_RC: Tensor, gate_up_EDC: Tensor, down_ECF: Tensor, rows_E: Tensor) -> Tensor:
    """Each expert's rows in blocks of an even share, the last one filled up with zeros: at most as many blocks as
    two for each expert, whatever the router does, so that every shape is known without looking."""
    rows, experts = len(x_RC), len(rows_E)
    size = -(-rows // experts)
    blocks = rows // size + min(experts, rows)
    last_block_E = ((rows_E + size - 1) // size).cumsum(0)
    expert_of_block = _group_of_each(blocks, last_block_E).clamp(max=experts - 1)  # blocks beyond need hold zeros
    end_E = rows_E.cumsum(0)
    expert_R = _group_of_each(rows, end_E)
    first_block_E = last_block_E - (rows_E + size - 1) // size
    place_R = torch.arange(rows, device=x_RC.device) + (rows_E - end_E + size * first_block_E)[expert_R]
    padded = x_RC.new_zeros(blocks * size, x_RC.shape[1]).index_copy(0, place_R, x_RC).unflatten(0, (blocks, size))
    inner = _gated(torch.bmm(padded, gate_up_EDC[expert_of_block].transpose(1, 2)))
    return torch.bmm(inner, down_ECF[expert_of_block].transpose(1, 2)).flatten(0, 1).index_select(0, place_R)


def _group_of_each(count: int, ends_E: Tensor) -> Tensor:
    """For each number below `count` how many groups end at or before it (count,)."""
    return (torch.arange(count, device=ends_E.device).unsqueeze(-1) >= ends_E).sum(-1)


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def _grouped_mm_fits(x_RC: Tensor, down_ECF: Tensor) -> bool:
    """Its kernel reads bfloat16 rows that begin at multiples of 16 bytes, and is there from SM 9.0 on: on older cards
    the same function loops on the host and waits for the device."""
    aligned = x_RC.shape[1] % 8 == 0 and down_ECF.shape[2] % 8 == 0
    return aligned and x_RC.dtype == torch.bfloat16 and x_RC.is_cuda and _grouped_kernel(x_RC.device)


@torch.compiler.assume_constant_result
def _grouped_kernel(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def _working_dtype(x: Tensor) -> torch.dtype:
    """What autocast would compute in: it does not know grouped_mm."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _check_options(
    inner_size: int, num_experts: int, experts_per_token: int, shared_experts: int, balance: float
) -> None:
    if inner_size < 1:
        raise ValueError(f"inner_size: {inner_size} is below 1")
    if num_experts < 1:
        raise ValueError(f"num_experts: {num_experts} is below 1")
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token: {experts_per_token} is not in 1..num_experts ({num_experts})")
    if shared_experts < 0:
        raise ValueError(f"shared_experts: {shared_experts} is negative; 0 means none")
    if balance < 0:
        raise ValueError(f"balance: {balance} is negative; 0 means no balance loss")
