"""Delta gradient descent over whole models: it has to see what every layer that it takes is given."""

from __future__ import annotations

import torch
from torch import nn

from clplat.architectures.probing import Contract
from clplat.strategies.optimizers.delta_gradient_descent import DGD


def assert_dgd_steps(contract: Contract) -> None:
    """Fails unless one step of DGD moves every linear layer that has a gradient, but those that are never called."""
    model, batch = contract.model().train(), contract.batch()
    optimizer = DGD.for_module(model, lr=0.01, others=lambda rest: torch.optim.SGD(rest, lr=0.0))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    output = model(batch)
    (output.logits.square().mean() + sum(output.losses.values())).backward()
    optimizer.step()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight.grad is not None and weight.grad.any():
            moved = not torch.equal(weight, before[f"{name}.weight"])
            assert moved != getattr(module, "weights_alone", False), name
