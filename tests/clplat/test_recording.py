"""What records and replays a step, with a recorder that needs no GPU: replayed steps are the plain function's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tapes import Tape
from torch import Tensor, nn

from clplat.architectures.base import Output
from clplat.recordable import leaves_of
from clplat.recording import MOST_SHAPES, Recorded
from clplat.streams.batch import Batch


class Net(nn.Module):
    """What a step is made of, with whatever stands in the way of replaying it."""

    def __init__(self, inside: Callable[[Net, Tensor], Tensor] = lambda net, x: x) -> None:
        super().__init__()
        self.inside, self.linear, self.norm = inside, nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.number, self.shown = 0, torch.zeros(())

    def step(self, batch: Batch, state: Any) -> tuple[Tensor | None, Output, Tensor | None]:
        carried = 0.0 if state is None else state["sum"][0]
        x = self.inside(self, self.norm(self.linear(batch.inputs)) + carried)
        loss = (x - batch.targets.unsqueeze(1)).square().mean()
        return None, Output(logits=x.detach(), state={"sum": (x.sum(), None)}), loss


def rows(count: int = 5, seed: int = 0) -> Batch:
    drawn = torch.Generator().manual_seed(seed)
    return Batch(inputs=torch.randn(count, 3, generator=drawn), targets=torch.arange(count))


def trained(net: Net, answer: Callable[..., Any], sizes: list[int], *, carried: bool = False) -> list[Tensor]:
    """Losses of SGD on rows of these numbers."""
    optimizer, losses, state = torch.optim.SGD(net.parameters(), lr=0.1), [], None
    for number, size in enumerate(sizes):
        _, output, loss = answer(rows(size, number), state)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
        state = {"sum": (output.state["sum"][0].detach().clone(), None)} if carried else None
    return losses


def both(inside: Callable[[Net, Tensor], Tensor], sizes: list[int], **options: Any) -> list[list[Tensor]]:
    """Losses, weights and buffers without and with recordings."""
    found = []
    for wrap in (lambda net: net.step, lambda net: Recorded(net.step, net)):
        torch.manual_seed(0)
        net = Net(inside)
        found.append([*trained(net, wrap(net), sizes, **options), *net.state_dict().values()])
    return found


def assert_equal(found: list[list[Tensor]]) -> None:
    for plain, replayed in zip(*found, strict=True):
        assert torch.equal(plain, replayed)


def test_each_shape_is_recorded_once_and_statistics_of_the_batch_move_as_ever(tape: Tape) -> None:
    assert_equal(both(lambda net, x: x, [5, 5, 5, 3, 5, 3, 3, 5, 4]))
    assert tape.recordings == 2 * 2 and tape.replays == 2 * (4 + 2)


def test_a_carried_state_goes_in_and_comes_out(tape: Tape) -> None:
    # The first step has none, which is another shape.
    assert_equal(both(lambda net, x: x, [5] * 6, carried=True))
    assert tape.recordings == 2 and tape.replays == 2 * 4


def test_what_a_pass_writes_into_buffers_is_written_once_a_step(tape: Tape) -> None:
    def counts(net: Net, x: Tensor) -> Tensor:
        net.seen += 1
        return x * net.seen

    found = both(counts, [5] * 6)
    assert_equal(found)
    assert found[1][6 + list(Net().state_dict()).index("seen")] == 6


def test_dropout_draws_anew_at_each_replay(tape: Tape) -> None:
    assert_equal(both(lambda net, x: nn.functional.dropout(x, 0.5), [5] * 6))
    net = Net(lambda net, x: nn.functional.dropout(torch.ones_like(x), 0.5))
    answer = Recorded(lambda batch, state: (None, Output(logits=net(batch)), net.linear.weight.sum()), net)
    net.forward = lambda batch: net.inside(net, batch.inputs)
    masks = [answer(rows(40), None)[1].logits.clone() for _ in range(5)]
    assert tape.replays == 10 + 4 and not any(torch.equal(a, b) for a, b in zip(masks, masks[1:]))


def test_more_shapes_than_a_few_run_as_they_are_with_one_warning(tape: Tape) -> None:
    sizes = [*range(2, 2 + MOST_SHAPES + 2)] * 3
    with pytest.warns(UserWarning, match="more than 4 shapes; further ones run as they are") as warned:
        assert_equal(both(lambda net, x: x, sizes))
    assert len(warned) == 1 and tape.recordings == 2 * MOST_SHAPES and tape.replays == 2 * 2 * MOST_SHAPES


def waits(net: Net, x: Tensor) -> Tensor:
    return x * x.detach().mean().item()


def waits_backwards(net: Net, x: Tensor) -> Tensor:
    x.register_hook(lambda slope: slope * slope.sum().item())
    return x


def counts_in_python(net: Net, x: Tensor) -> Tensor:
    net.number += 1
    return x * net.number


def shows(net: Net, x: Tensor) -> Tensor:
    net.shown = x.detach()
    return x


def reads_elsewhere(net: Net, x: Tensor) -> Tensor:
    if not hasattr(net, "also"):
        net.also = [net.norm.weight]
    return x * net.also[0]


def replaces_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.seen = net.seen + 1
    return x * net.seen


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        (waits, r"Net: steps run as they are.*because a pass cannot be recorded: called a synchronizing operation: "
                r"aten\._local_scalar_dense"),
        (waits_backwards, "called a synchronizing operation"),
        (counts_in_python, "each of its passes sets `number`"),
        (shows, "each of its passes sets `shown`"),
        (replaces_a_buffer, "each of its passes sets `seen`"),
        (reads_elsewhere, "it reads a weight from elsewhere than the module that has it"),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_runs_as_it_is_with_one_warning_that_says_why(
    inside: Callable[[Net, Tensor], Tensor], reason: str, tape: Tape
) -> None:
    with pytest.warns(UserWarning, match=reason) as warned:
        found = both(inside, [5, 5, 5, 3, 3, 3])
    assert len(warned) == 1 and tape.rehearsals == 1 and tape.recordings == tape.replays == 0
    # A number that a rehearsal moved is nobody's to put back.
    if inside in (waits, waits_backwards, shows, reads_elsewhere):
        assert_equal(found)


def test_what_fails_while_it_is_recorded_runs_as_it_is_and_draws_as_ever(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = tape.record

    def record(part: Callable[[], Any]) -> Any:
        if tape.recordings:
            raise RuntimeError("out of graphs\nmore")
        return forward(part)

    monkeypatch.setattr(tape, "record", record)
    with pytest.warns(UserWarning, match=r"cannot be recorded: out of graphs at .*test_recording\.py:\d+: raise"):
        assert_equal(both(lambda net, x: nn.functional.dropout(x, 0.5), [5] * 5))


def test_weights_that_are_others_are_recorded_again_and_at_last_no_more(tape: Tape) -> None:
    net = Net()
    answer = Recorded(net.step, net)
    for moved in range(MOST_SHAPES):
        for _ in range(3):
            answer(rows(), None)[2].backward()
        assert tape.recordings == 2 * (1 + moved)
        net.linear.weight.data = net.linear.weight.data.clone()
    answer(rows(), None)
    net.linear.bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="weights, buffers or options are others again and again"):
        answer(rows(), None)[2].backward()


def test_a_recording_meets_nothing_of_autograd_that_an_earlier_step_left(tape: Tape) -> None:
    """A GPU waits for the stream of what accumulated a gradient before, which no recording may."""
    net = Net()
    answer = Recorded(net.step, net)
    kept = answer(rows(), None)[2]  # its graph lives while the next step is recorded
    weights = {id(p) for p in net.parameters()}
    recorded: list[Tensor] = []
    plain = net.step

    def watched(batch: Batch, state: Any) -> Any:
        found = plain(batch, state)
        recorded.append(found[2])
        return found

    answer.answer = watched
    _, _, loss = answer(rows(seed=1), None)
    loss.backward()
    assert tape.recordings == 2 and kept.grad_fn is not None
    assert len(leaves_of([recorded[-1]])) == len(weights) and not leaves_of([recorded[-1]]) & weights
    assert all(p.grad is not None for p in net.parameters())
    assert {id(p) for p in net.parameters()} == weights


def test_a_weight_with_a_hook_is_not_replayed(tape: Tape) -> None:
    found = []
    with pytest.warns(UserWarning, match="a weight has a hook"):
        for wrap in (lambda net: net.step, lambda net: Recorded(net.step, net)):
            torch.manual_seed(0)
            net = Net()
            net.linear.weight.register_hook(lambda slope: 0.5 * slope)
            found.append([*trained(net, wrap(net), [5] * 4), *net.state_dict().values()])
    assert_equal(found)


def test_an_option_that_is_another_counts_from_the_next_step_on(tape: Tape) -> None:
    found = []
    for wrap in (lambda net: net.step, lambda net: Recorded(net.step, net)):
        torch.manual_seed(0)
        net = Net(lambda net, x: x * net.number)
        answer, losses = wrap(net), []
        for net.number in (1, 1, 1, 2, 2, 1):
            losses += trained(net, answer, [5])
        found.append(losses)
    assert_equal(found)
    assert tape.recordings == 2 * 3 and tape.replays == 2 * 5


def test_a_gradient_that_is_kept_is_not_overwritten_by_the_next_step(tape: Tape) -> None:
    net = Net()
    answer, kept = Recorded(net.step, net), []
    for seed in range(4):
        answer(rows(seed=seed), None)[2].backward()
        kept.append((net.linear.weight.grad, net.linear.weight.grad.clone()))
        net.zero_grad()
    assert tape.replays and all(torch.equal(*pair) for pair in kept)


def test_two_forward_passes_before_a_backward_one_are_an_error_and_no_wrong_gradient(tape: Tape) -> None:
    net = Net()
    answer = Recorded(net.step, net)
    answer(rows(), None)
    first, _ = (answer(rows(), None)[2] for _ in range(2))
    with pytest.raises(RuntimeError, match="another step came between"):
        first.backward()


def test_nothing_is_recorded_on_a_cpu_nor_where_nobody_learns(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    answer = Recorded(net.step, net)
    with torch.no_grad():
        for _ in range(3):
            answer(rows(), None)
    monkeypatch.undo()
    trained(net, answer, [5] * 4)
    assert not tape.rehearsals
