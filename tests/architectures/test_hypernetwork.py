"""Hypernetworks: what is generated, on what it depends, and how a hidden task is found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypernetworks import HIDDEN, IMAGES, SPEC, TASKS, batch, chunked, lstm, mlp, through
from torch import Tensor, nn
from torch.func import functional_call

from clplat.architectures.base import Architecture, GeneratesWeights, Output
from clplat.architectures.hypernetwork.generators import RecurrentGenerator
from clplat.architectures.hypernetwork.model import entropy
from clplat.architectures.hypernetwork.target import CONSTANT_SCALE
from clplat.architectures.probing import Contract
from clplat.architectures.resnet import ResNet32
from clplat.architectures.text_classifier import TextClassifier
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


@pytest.mark.parametrize("make", [chunked, lstm])
@pytest.mark.parametrize(("spec", "target"), [(SPEC, mlp), (IMAGES, lambda spec: ResNet32(spec=spec, width=4))])
def test_generated_weights_have_the_targets_shapes_and_give_its_answers(make, spec: Spec, target) -> None:
    model = through(make(spec, target, chunk_size=300), 2).eval()
    plain = target(spec=spec).eval()
    weights = model.generated_weights([1])[0]
    assert len(weights) == sum(p.numel() for p in plain.parameters())
    parts = weights.split([p.numel() for p in plain.parameters()])
    named = {n: part.view_as(p) for part, (n, p) in zip(parts, plain.named_parameters(), strict=True)}
    rows = batch(spec, task=1)
    expected = functional_call(plain, named, (rows,)).logits
    assert torch.allclose(model(rows).logits, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(model, GeneratesWeights)
    assert torch.equal(model.answer_with(weights, rows, 1).logits, model(rows).logits)


def test_tied_parameters_are_generated_once() -> None:
    class Tied(Architecture):
        def __init__(self, spec: Spec) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.second.weight = self.first.weight

        def forward(self, batch: Batch, state=None, return_hidden=None) -> Output:
            return Output(logits=self.second(self.first(batch.inputs.flatten(1)))[:, :6])

    model, rows = chunked(target=lambda spec: Tied(spec)), batch()
    weight = model.generated_weights([0])[0].view(16, 16)
    assert torch.allclose(model(rows).logits, (rows.inputs.flatten(1) @ weight.T @ weight.T)[:, :6], atol=1e-6)


def test_the_target_owns_no_parameters_and_takes_no_room_in_a_checkpoint() -> None:
    model = chunked(IMAGES, lambda spec: ResNet32(spec=spec, width=4))
    assert not list(model.target.parameters())
    assert all(name.startswith("target.statistics_") for name in model.state_dict() if name.startswith("target"))
    assert model.flops_per_row() == ResNet32(spec=IMAGES, width=4).flops_per_row()


@pytest.mark.parametrize("make", [chunked, lstm])
def test_the_first_weights_have_the_size_of_the_targets_own_initialisation(make) -> None:
    model = make(IMAGES, lambda spec: ResNet32(spec=spec), chunk_size=2000)
    plain = ResNet32(spec=IMAGES)
    weights = model.generated_weights([0])[0].detach()
    for part, (name, own) in zip(weights.split(model.target.lengths), plain.named_parameters(), strict=True):
        own = own.detach()
        if own.ndim == 4:
            assert float(part.std() / own.std()) == pytest.approx(1.0, abs=0.2), name
            assert abs(float(part.mean())) < 0.15 * float(part.std()), name
        elif "norm" in name:
            assert float((part - own).square().mean().sqrt()) == pytest.approx(CONSTANT_SCALE, rel=0.75), name


def influence(generator: RecurrentGenerator, stage: int = 0) -> Tensor:
    """|∂w_l / ∂c_m| summed over chunk and embedding, (L, L)."""
    task = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))

    def weights(chunks: Tensor) -> Tensor:
        return functional_call(generator, {"chunks": chunks}, (task, stage)).view(len(chunks), -1)

    return torch.autograd.functional.jacobian(weights, generator.chunks.detach()).abs().sum((1, 3))


def test_a_layer_of_the_lstm_depends_on_all_before_it_and_on_none_after_it() -> None:
    found = influence(lstm().generator)
    assert torch.equal(found > 0, torch.ones_like(found, dtype=torch.bool).tril())


def test_a_chunk_changes_with_the_hidden_state_before_it() -> None:
    generator = lstm().generator
    inputs = generator.inputs(torch.randn(1, 32, generator=torch.Generator().manual_seed(1)))
    for step in range(1, generator.num_steps):
        _, (hidden, cell) = generator.hidden_states(inputs[:, :step], 0)
        hidden = hidden.detach().requires_grad_()
        after, _ = generator.hidden_states(inputs[:, step : step + 1], 0, (hidden, cell.detach()))
        (slope,) = torch.autograd.grad(generator.weights_at(after, 0).square().sum(), hidden)
        assert bool((slope != 0).all())


def test_without_recurrence_and_in_the_chunked_generator_no_chunk_knows_of_another() -> None:
    for model in (lstm(recurrent=False), chunked()):
        found = influence(model.generator)
        assert torch.equal(found > 0, torch.eye(len(found), dtype=torch.bool))


def test_the_permuted_order_generates_the_same_chunks_in_other_places() -> None:
    plain, permuted = lstm(), lstm(order="permuted")
    permuted.generator.load_state_dict(plain.generator.state_dict() | {"place": permuted.generator.place})
    task, place = torch.randn(1, 32), permuted.generator.place
    assert not torch.equal(place, torch.arange(len(place)))
    steps = plain.generator(task, 0).view(len(place), -1)
    assert torch.equal(permuted.generator(task, 0).view(len(place), -1), steps[place])


def test_the_lstm_is_its_equations_step_by_step() -> None:
    model = through(lstm(grow_by=3), 2)
    generator = model.generator.double()
    task = torch.randn(1, 32, dtype=torch.float64)
    first, second = generator.stages
    inward, bias = (torch.cat([getattr(s, n) for s in (first, second)], 1) for n in ("inward", "bias"))
    recurrent = torch.cat([F.pad(first.recurrent, (0, 3)), second.recurrent], 1)
    outward = torch.cat([first.outward, second.outward], 1)
    hidden = cell = torch.zeros(14, dtype=torch.float64)
    chunks = []
    for chunk in generator.chunks:
        gates = inward @ torch.cat([task[0], chunk]) + recurrent @ hidden + bias
        cell = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh()
        hidden = gates[3].sigmoid() * cell.tanh()
        chunks.append(outward @ hidden + generator.bias)
    assert torch.allclose(generator(task, 1)[0], torch.cat(chunks), rtol=1e-12, atol=1e-14)


def test_embeddings_of_earlier_tasks_are_frozen_and_the_current_one_learns() -> None:
    model = through(chunked(), 3)
    assert (len(model.past_embeddings), len(model.embeddings)) == (2, 1)
    assert not model.past_embeddings.requires_grad
    model(batch(task=2)).logits.square().sum().backward()
    assert bool(model.embeddings.grad.all())


def test_a_joint_arm_learns_the_embeddings_of_all_its_tasks() -> None:
    model = chunked()
    model.task_start(TASKS.task(2))
    model(batch(task=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))).logits.square().sum().backward()
    assert model.embeddings.grad.shape == (3, 32) and bool(model.embeddings.grad.all())


def test_rows_of_several_tasks_are_each_answered_by_their_own() -> None:
    model = through(lstm(grow_by=2), 3)
    tasks = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])
    mixed = model(batch(task=tasks))
    for task in range(3):
        alone = model(batch(task=task))
        assert torch.allclose(mixed.logits[tasks == task], alone.logits[tasks == task], atol=1e-6)
        assert torch.allclose(mixed.hidden[tasks == task], alone.hidden[tasks == task], atol=1e-6)


def test_a_task_that_has_not_started_is_answered_by_the_latest() -> None:
    model = through(chunked(), 2)
    assert torch.equal(model(batch(task=4)).logits, model(batch(task=1)).logits)


@pytest.mark.parametrize("make", [chunked, lstm])
def test_a_hidden_task_is_the_one_whose_answer_has_the_lowest_entropy(make) -> None:
    model = through(make(HIDDEN), 3).double().eval()
    model.scale.mul_(3)  # as it begins, it is unsure of everything
    rows = batch(rows=40)
    rows = rows.replaced(inputs=rows.inputs.double())
    by_task = torch.stack([model.train()(rows.replaced(task=torch.full((40,), task))).logits for task in range(3)])
    chances = by_task.softmax(-1)
    chosen = -(chances * chances.log()).sum(-1)
    expected = by_task[chosen.argmin(0), torch.arange(40)]
    assert len(chosen.argmin(0).unique()) > 1
    assert torch.allclose(model.eval()(rows).logits, expected, atol=1e-6)
    assert torch.allclose(model(rows.replaced(task=None)).logits, expected, atol=1e-6)


def test_the_scenario_task_never_guesses_a_task_that_it_is_told() -> None:
    model = through(chunked(), 3).eval()
    told, guessed = model(batch(task=0)).logits, model(batch().replaced(task=None)).logits
    assert not torch.allclose(told, guessed, atol=1e-3)


def test_entropy_is_zero_for_a_sure_answer_and_log_n_for_none() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(entropy(logits), torch.tensor([0.0, torch.tensor(3.0).log()]))


def test_batchnorm_keeps_statistics_for_every_task_and_moves_those_of_its_own() -> None:
    model = through(chunked(IMAGES, lambda spec: ResNet32(spec=spec, width=4), chunk_size=300), 2)
    first = {name: kept.clone() for name, kept in model.target.of_tasks().items()}
    rows = batch(IMAGES, task=1)
    model.train()(rows)
    plain = ResNet32(spec=IMAGES, width=4).train()
    weights = model.generated_weights([1])[0].detach()
    parts = weights.split([p.numel() for p in plain.parameters()])
    with torch.no_grad():
        for part, own in zip(parts, plain.parameters(), strict=True):
            own.copy_(part.view_as(own))
    plain(rows)
    expected = dict(plain.named_buffers())
    for name, kept in model.target.of_tasks().items():
        assert torch.equal(kept[0], first[name][0])
        assert torch.allclose(kept[1], expected[name], rtol=1e-5, atol=1e-6), name
    again = {name: kept.clone() for name, kept in model.target.of_tasks().items()}
    model.eval()(rows)
    assert all(torch.equal(kept, again[name]) for name, kept in model.target.of_tasks().items())


def test_a_target_that_reads_tokens_is_found_by_entropy_too() -> None:
    spec = Spec(kind="classify", input_shape=(7,), num_outputs=4, scenario="class", vocab_size=9, pad_token=0)
    model = through(chunked(spec, lambda spec: TextClassifier(spec=spec, hidden_size=8, num_layers=1, num_heads=2)), 2)
    rows = Contract(factory=mlp, spec=spec).batch(5)
    assert model.eval()(rows).logits.shape == (5, 4)


def test_a_new_embedding_may_begin_as_the_one_before_it() -> None:
    model = through(chunked(first_embedding="previous"), 2)
    assert torch.equal(model.past_embeddings, model.embeddings)
    fresh = through(chunked(), 3)
    assert len(torch.cat([fresh.past_embeddings, fresh.embeddings]).detach().unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (chunked, {"chunk_size": 0}, "chunk_size"),
        (chunked, {"chunk_size": 10**9}, "chunk_size: 1000000000 is more than twice the target's 381 weights"),
        (lstm, {"chunk_size": 10**9}, "chunk_size: 1000000000 is more than twice the target's 381 weights"),
        (chunked, {"target": lambda spec: chunked(spec)}, "target: ChunkedHypernetwork generates weights itself"),
        (chunked, {"hidden_sizes": [8, 0]}, "hidden_sizes"),
        (chunked, {"task_embedding": 0}, "task_embedding"),
        (lstm, {"hidden_size": 0}, "hidden_size"),
        (lstm, {"grow_by": -1}, "grow_by"),
        (lstm, {"spec": Spec(kind="language", input_shape=(5,), num_outputs=7)}, "target: hypernetworks classify"),
    ],
)
def test_wrong_options_are_refused_by_name(make, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_training_on_rows_without_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ChunkedHypernetwork: rows without a task .*batch\.task"):
        chunked()(batch().replaced(task=None))
