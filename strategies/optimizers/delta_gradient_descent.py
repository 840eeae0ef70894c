"""Delta gradient descent: a layer forgets along the inputs it is given while it learns from them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clplat.strategies.optimizers.joined import (
    Joined,
    NamedWeights,
    OptimizerFactory,
    check_numbers,
    evaluated,
    shared_out,
    with_gradient,
)

Form = Literal["mean", "proximal"]


class DGD(Joined):
    """W ← W (I − η′ x xᵀ) − η′ ∇W with η′ = lr / (1 + lr ‖x‖²) for the weights of `nn.Linear` layers; x is their input.

    It is the W that minimises ⟨∇_y L, W x⟩ + ½ ‖W x‖² + ‖W − W_old‖² / (2 lr), ∇_y L held at W_old. With n rows,
    C = Xᵀ X / n: `mean` takes C for x xᵀ and its trace for ‖x‖²; `proximal` is the minimum itself,
    (W − lr ∇W)(I + lr C)⁻¹. For one row they are the same.
    """

    paper = "Behrouz et al. 2025, arXiv:2512.24695, Eq. 57 and Appendix C"
    fidelity: ClassVar[str] = "interpretation"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.01,
        form: Form = "mean",
        erase: float = 1.0,
        others: OptimizerFactory | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        """`form` is for more rows than one. `erase` multiplies ½ ‖W x‖², and so x xᵀ and ‖x‖²: 1 as printed, 0 is
        gradient descent. Biases, all that is no weight of an `nn.Linear`, layers that say that they are never called
        (`weights_alone`), and names that match `exclude` belong to `others`."""
        check_numbers(lr=lr, erase=erase)
        named = NamedWeights.given(params)
        if named.module is None:
            raise ValueError("params: DGD reads the inputs of layers; build it with DGD.for_module(module, ...)")
        linear = (one for one in named.module.modules() if isinstance(one, nn.Linear))
        layers = {id(one.weight): one for one in linear if not getattr(one, "weights_alone", False)}
        apart = [name for name, p in named if p.ndim == 2 and id(p) not in layers]
        matrices, rest = shared_out(named, others, [*exclude, *apart], "DGD")
        own = _LayerDGD(matrices, {"lr": lr, "form": form, "erase": erase})
        own.watch([layers[id(p)] for _, p in matrices])
        super().__init__(named, [own, *rest])


_WATCHED: weakref.WeakKeyDictionary[nn.Linear, RemovableHandle] = weakref.WeakKeyDictionary()
"""The hook by which each layer tells its inputs to the last optimizer that was built for it."""


class _LayerDGD(Optimizer):
    """DGD's part for layers; what their inputs were stands in the state until the next step, as sums over rows."""

    def __init__(self, params: NamedWeights, defaults: dict[str, Any]) -> None:
        super().__init__(list(params), defaults)

    def watch(self, layers: list[nn.Linear]) -> None:
        """Follow the inputs of the layers as long as this optimizer lives, in place of the one that did before.

        That one may outlive its task until garbage is collected, and its sums are the tensors that this one loads.
        """
        hook = _recorder(weakref.ref(self), {id(layer.weight) for layer in layers})
        for layer in layers:
            if before := _WATCHED.pop(layer, None):
                before.remove()
            _WATCHED[layer] = layer.register_forward_hook(hook)
            weakref.finalize(self, _WATCHED[layer].remove)

    def record(self, weight: Tensor, inputs: Tensor) -> None:
        """Add the rows of one forward pass to what the next step knows."""
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            rows = inputs.detach().flatten(0, -2).to(weight.dtype)
            kept = self.state[weight]
            if "inputs" in kept:
                kept["inputs"].addmm_(rows.mT, rows)
            else:
                kept["inputs"] = rows.mT @ rows
            kept["rows"] = kept.get("rows", 0) + len(rows)

    def _not_seen(self, weight: Tensor) -> bool:
        return weight.grad is not None and "inputs" not in self.state.get(weight, ())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            unseen = [n for n, p in zip(group["param_names"], group["params"]) if self._not_seen(p)]
            if unseen:
                raise RuntimeError(
                    f"DGD: {', '.join(unseen[:6])}: has a gradient, and no forward pass of its layer in training mode "
                    f"was seen; something else uses the weight, so give it to `others` with exclude: {unseen}"
                )
            for p in with_gradient(group):
                kept = self.state[p]
                moment = _over_processes(kept.pop("inputs") * (group["erase"] / kept.pop("rows")))
                _descend(p, moment, group["lr"], group["form"])
        return loss


def _descend(weight: Tensor, moment: Tensor, lr: float, form: Form) -> None:
    """One step of a weight (O, I); `moment` (I, I) is the inputs' second moment, times `erase`. Waits for no GPU."""
    assert weight.grad is not None
    if form == "mean":
        rate = lr / (1 + lr * moment.trace())
        weight.sub_(rate * (weight @ moment + weight.grad))
        return
    system = torch.eye(len(moment), dtype=moment.dtype, device=moment.device).add_(moment, alpha=lr)
    # There is no 16-bit form of the factorisation, and the system is never singular: nothing to check.
    factor, _ = torch.linalg.cholesky_ex(system.to(torch.promote_types(system.dtype, torch.float32)))
    aim = (weight - lr * weight.grad).mT.to(factor.dtype)
    weight.copy_(torch.cholesky_solve(aim, factor).mT)


def _over_processes(moment: Tensor) -> Tensor:
    """The mean over all processes that train together, as their gradients are means."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(moment)
        moment /= torch.distributed.get_world_size()
    return moment


def _recorder(
    optimizer: weakref.ReferenceType[_LayerDGD], weights: set[int]
) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
    """A forward hook. It holds no optimizer alive, and passes over copies of the layer that others train."""

    @torch.compiler.disable
    def record(layer: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> None:
        owner = optimizer()
        if owner is not None and layer.training and torch.is_grad_enabled() and id(layer.weight) in weights:
            owner.record(layer.weight, args[0])

    return record
