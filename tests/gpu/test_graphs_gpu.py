"""`training.compile: cudagraphs` on a GPU: replayed steps train as plain ones, and what cannot be replayed trains.

pytest tests/gpu/test_graphs_gpu.py -x -s     # -s shows how many times faster a step is
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from recorded_models import MODELS, TOKENS, Course, of, rows, trained
from torch import Tensor, nn

from clplat.architectures.associative_memory.presets import TitansLMM
from clplat.architectures.base import Architecture
from clplat.kernels.delta_memory import interface as delta_memory
from clplat.kernels.mlp_memory import interface as mlp_memory
from clplat.kernels.self_modifying import interface as self_modifying
from clplat.streams.batch import Batch

STEPS = 20
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-3, fused=True)


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories as loops over chunks, which is what is bound by launches."""
    for interface in (delta_memory, mlp_memory, self_modifying):
        monkeypatch.setattr(interface, "chosen_form", lambda *_, **__: "torch")


def batches(*, mixed: bool = False, count: int = 8, steps: int = STEPS) -> list[Batch]:
    return [rows(count, "cuda", mixed=mixed, seed=step) for step in range(steps)]


def both(make: Callable[[], Architecture], given: list[Batch], **options: object) -> tuple[Course, Course]:
    """The plain course and the recorded one, from the same weights."""
    courses = []
    for recorded in (False, True):
        torch.manual_seed(1)
        courses.append(trained(make(), given, recorded=recorded, **options))
    return courses[0], courses[1]


def assert_close(courses: tuple[Course, Course], *, rtol: float, atol: float) -> None:
    plain, replayed = courses
    assert plain.losses.isfinite().all()
    torch.testing.assert_close(replayed.losses, plain.losses, rtol=rtol, atol=atol)
    for name, weight in plain.weights.items():
        other = replayed.weights[name]
        torch.testing.assert_close(other, weight, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def told(name: str, courses: tuple[Course, Course]) -> None:
    plain, replayed = (course.seconds_a_step() for course in courses)
    print(
        f"\n{name}: {1e3 * plain:.2f} ms a step, replayed {1e3 * replayed:.2f} ms: {plain / replayed:.1f} times as fast"
    )


@pytest.mark.filterwarnings("error:training.compile")
@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_train_as_plain_ones(name: str) -> None:
    courses = both(MODELS[name], batches(), optimizer=SGD)
    told(name, courses)
    assert_close(courses, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error:training.compile")
def test_kernels_of_ours_are_replayed_too() -> None:
    courses = both(MODELS["GatedDeltaNet"], batches(), optimizer=SGD)
    told("GatedDeltaNet, whatever backend is chosen", courses)
    assert_close(courses, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("error:training.compile")
@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("name", ["Titans, depth 4", "self-modifying, depth 2", "Transformer", "TRC2"])
def test_mixed_precision_with_a_fused_optimizer_and_replayed_rows(name: str) -> None:
    courses = both(MODELS[name], batches(mixed=True), optimizer=ADAMW, dtype=torch.bfloat16)
    told(f"{name}, bf16-mixed, mixed batches", courses)
    # AdamW turns the rounding of a gradient near 0 into a step of the learning rate; 20 of them are 0.02.
    assert_close(courses, rtol=2e-2, atol=5e-3)


@pytest.mark.filterwarnings("error:training.compile")
@pytest.mark.usefixtures("in_pytorch")
def test_batches_that_change_their_size_and_replay_that_begins_late() -> None:
    given = batches(steps=3) + batches(count=4, steps=4) + batches(mixed=True, steps=4) + batches(steps=3)
    assert_close(both(MODELS["Titans, depth 2"], given, optimizer=SGD), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error:training.compile")
@pytest.mark.usefixtures("in_pytorch")
def test_dropout_draws_anew_at_each_replay() -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    same = [rows(8, "cuda")] * 8
    replayed = trained(of(TitansLMM(num_heads=2, chunk=8), dropout=0.3), same, recorded=True, optimizer=still)
    assert len(replayed.losses.unique()) == len(same)


class Waiting(nn.Module):
    """What is put before a model's head, and stands in the way of recording."""

    def __init__(self, wait: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.wait = nn.RMSNorm(32), wait

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.wait(self.norm(x_BTC))


def asks(x: Tensor) -> Tensor:
    return x * (1.0 + 0.0 * x.detach().mean().item())


def asks_an_event(x: Tensor) -> Tensor:
    """Waits as no rehearsal sees it: the capture itself fails."""
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    return x


def finds_no_memory(x: Tensor) -> Tensor:
    """While it is recorded, and with a gigabyte in the cache that the allocator would give back first."""
    torch.empty(2**44 if torch.cuda.is_current_stream_capturing() else 2**30, dtype=torch.uint8, device=x.device)
    return x


def copies(x: Tensor) -> Tensor:
    return x + torch.zeros(TOKENS, 1).to(x.device)


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("wait", [asks, copies, asks_an_event, finds_no_memory])
def test_a_model_that_cannot_be_recorded_trains_as_it_is_and_says_so(wait: Callable[[Tensor], Tensor]) -> None:
    def make() -> Architecture:
        model = of(TitansLMM(num_heads=2, chunk=8), dropout=0.1)
        model.norm = Waiting(wait)
        return model

    with pytest.warns(UserWarning, match="MemoryTransformer: steps run as they are") as warned:
        courses = both(make, batches(steps=8), optimizer=SGD)
    said = [str(one.message) for one in warned if "training.compile" in str(one.message)]
    print(f"\n{said}")
    assert len(said) == 1 and "test_graphs_gpu.py" in said[0]
    # Dropout too draws as without the attempt.
    assert_close(courses, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error:training.compile")
@pytest.mark.usefixtures("in_pytorch")
def test_graphs_are_recorded_after_a_capture_that_failed() -> None:
    """In the order of this file the test before has made one fail."""
    assert_close(both(MODELS["Transformer"], batches(steps=8), optimizer=SGD), rtol=1e-4, atol=1e-5)
    torch.cuda.empty_cache()
    torch.nn.functional.dropout(torch.ones(8, device="cuda"))
