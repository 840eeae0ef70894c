"""The state of Avalanche's plugins as tensors and plain data, and draws that can be taken up again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clplat.strategies.avalanche_shim import PlainModel, Shim, avalanche_dataset


def pack(value: Any, where: str) -> Any:
    """State of a plugin as tensors and plain data. Raises ValueError that names what cannot be kept."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        # Equal texts as one object, so that equal states make equal files.
        return sys.intern(value)
    if isinstance(value, Tensor):
        return {"tensor": value.detach().clone(), "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        return {"mapping": [[pack(k, where), pack(v, f"{where}[{k!r}]")] for k, v in value.items()]}
    for kind, name in ((list, "list"), (tuple, "tuple"), (set, "set")):
        if isinstance(value, kind):
            items = sorted(value) if kind is set else value
            return {name: [pack(item, where) for item in items]}
    if isinstance(value, PlainModel):
        return {"model": {name: t.detach().clone() for name, t in value.architecture.state_dict().items()}}
    return _pack_object(value, where)


def _pack_object(value: Any, where: str) -> Any:
    """Avalanche's own small objects."""
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.training.regularization import RegularizationMethod
    from avalanche.training.utils import ParamData

    if isinstance(value, ParamData):
        return {"weights": pack(value.data, where), "name": sys.intern(value.name)}
    if isinstance(value, RegularizationMethod):
        return {"object": {name: pack(item, f"{where}.{name}") for name, item in sorted(vars(value).items())}}
    if isinstance(value, AvalancheDataset):
        inputs, targets = rows_of(value)
        return {"inputs": inputs, "targets": targets}
    raise ValueError(f"{where} is a {type(value).__name__}, which a checkpoint cannot keep as tensors and plain data; "
                     "write the method as a strategy of your own")  # fmt: skip


def unpack(packed: Any, shim: Shim, current: Any = None) -> Any:
    """The inverse of `pack`; mappings and objects that are there already (`current`) are filled in place."""
    if not isinstance(packed, Mapping):
        return packed
    if "tensor" in packed:
        return packed["tensor"].to("cpu" if packed["on_cpu"] else shim.device, copy=True)
    if "mapping" in packed:
        items = {unpack(key, shim): unpack(value, shim) for key, value in packed["mapping"]}
        if not isinstance(current, dict):
            return items
        current.clear()
        current.update(items)
        return current
    if "model" in packed:
        model = copy.deepcopy(shim.model)
        model.architecture.load_state_dict(packed["model"])
        return model
    if "weights" in packed:
        from avalanche.training.utils import ParamData

        data = unpack(packed["weights"], shim)
        return ParamData(packed["name"], data.shape, init_tensor=data, device=data.device)
    if "object" in packed:
        for name, value in packed["object"].items():
            setattr(current, name, unpack(value, shim, getattr(current, name)))
        return current
    if "inputs" in packed:
        return avalanche_dataset(packed["inputs"].clone(), packed["targets"].clone())
    ((kind, items),) = packed.items()
    return {"list": list, "tuple": tuple, "set": set}[kind](unpack(item, shim) for item in items)


def rows_of(dataset: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an Avalanche data set."""
    items = [dataset[index] for index in range(len(dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


def nbytes(packed: Any) -> int:
    """Bytes of all tensors in a packed state."""
    if isinstance(packed, Tensor):
        return packed.nbytes
    if isinstance(packed, Mapping | list):
        return sum(nbytes(item) for item in (packed.values() if isinstance(packed, Mapping) else packed))
    return 0


class SeededDraws:
    """An iterator over a loader that draws from a random source of its own."""

    def __init__(self, loader: Any, seed: int) -> None:
        self.batches, self.seed, self.drawn = iter(loader), seed, 0
        self._random = torch.Generator().manual_seed(seed).get_state()

    def __iter__(self) -> SeededDraws:
        return self

    def __next__(self) -> Any:
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            return next(self.batches)
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)
            self.drawn += 1
