"""In which order tokens meet their experts: a stable sort by expert whose ragged lengths stay on the device."""
from __future__ import annotations
from typing import NamedTuple
from torch import Tensor
class ExpertOrder(NamedTuple):
    order: Tensor
def expert_order(indices, num_experts): ...
