"""A training step of the models that `training.compile: cudagraphs` is for stays on its device and waits for nothing.

On `meta`, which has shapes and no numbers, so that nothing can be read, and every operation, forwards and backwards,
shows the devices of its tensors. (Fake CUDA tensors cannot go backwards where there is no driver.)
"""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from no_questions import NoQuestions
from recorded_models import MODELS, SPEC, rows
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from clplat.compilation import answerer
from clplat.objective import Objective


class Elsewhere(TorchDispatchMode):
    """Operations with a tensor that is not on `meta`, and those that a GPU would be waited for, by the line of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [t for t in pytree.tree_leaves((args, kwargs, results)) if isinstance(t, Tensor)]
        if any(t.device.type != "meta" for t in tensors) or func.overloadpacket.__name__ in NoQuestions.asking:
            lines = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.found.add(f"{func} at {lines[-1].filename}:{lines[-1].lineno}")
        return results


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which knows no `meta`; models only turn it off for a while."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def stays(name: str, *, mixed: bool) -> Elsewhere:
    model = MODELS[name]().to("meta")
    objective = Objective(SPEC, []).to("meta")
    given, step = rows(4, "meta", mixed=mixed), answerer(model, objective, None, with_inputs=False, open_logits=False)
    with Elsewhere() as seen:
        _, output, loss = step(given, None)
        (loss.sum() + sum(output.losses.values())).backward()
    return seen


@pytest.mark.parametrize("mixed", [False, True], ids=["current rows", "with replayed rows"])
@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_a_step_is_made_or_read_elsewhere(name: str, mixed: bool) -> None:
    seen = stays(name, mixed=mixed)
    assert seen.operations > 50 and not seen.found, "\n".join(sorted(seen.found))


def test_a_constant_made_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Objective.masked
    monkeypatch.setattr(Objective, "masked", lambda *given: plain(*given) * torch.tensor(1.0))
    assert any("aten.mul" in one and "objective.py" in one for one in stays("Transformer", mixed=False).found)
