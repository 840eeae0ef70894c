"""TRC²'s own promises: published sizes, causality under every switch, the plain stack at first, replay, the write."""

from __future__ import annotations

import copy
from itertools import combinations, product

import pytest
import torch
from no_questions import NoQuestions
from trc2_models import DEFAULTS, SWITCHES, TEXT, awake, fits, opened, options_of, rows, settings, trc2, write

from clplat.architectures import contract as checks
from clplat.architectures import layers, mixture_of_experts
from clplat.architectures.base import StepOutcome
from clplat.architectures.probing import Contract
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions, WriteOptions
from clplat.streams.base import Spec
from clplat.streams.batch import CURRENT, REPLAY, Batch

SETTINGS = list(settings())


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "millions"),
    [(256, 24, 149), (512, 10, 254), (768, 4, 226), (768, 8, 408), (1024, 6, 560)],
)
def test_parameter_counts_are_the_published_ones(hidden_size: int, num_layers: int, millions: int) -> None:
    spec = Spec(kind="language", input_shape=(1024,), num_outputs=50_304)
    with torch.device("meta"):
        model = TRC2(spec=spec, hidden_size=hidden_size, num_layers=num_layers)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def contract_of(setting: dict) -> Contract:
    return Contract(factory=lambda spec: opened(trc2(setting, spec=spec)), spec=TEXT)


@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_open_loops_are_causal_whatever_two_switches_say(setting: dict) -> None:
    checks.is_causal(contract_of(setting))


# The first settings of a greedy cover hold most of the pairs.
@pytest.mark.parametrize("setting", SETTINGS[:12], ids=range(12))
def test_open_loops_decode_as_they_read(setting: dict) -> None:
    checks.decodes_as_it_reads(contract_of(setting))


@pytest.mark.parametrize("setting", SETTINGS[:6], ids=range(6))
def test_open_loops_keep_rows_and_documents_apart(setting: dict) -> None:
    checks.keeps_rows_apart(contract_of(setting))
    checks.keeps_documents_apart(contract_of(setting | {"document_mask": True}))


def test_the_settings_make_every_two_values_meet_that_go_together() -> None:
    for a, b in combinations(SWITCHES, 2):
        for x, y in product(SWITCHES[a], SWITCHES[b]):
            wanted = awake(((a, x), (b, y)))
            assert not fits(wanted) or any(s | wanted == s for s in SETTINGS), wanted
    assert not fits({"hippocampus.event_gate": "hard", "thalamus.enabled": False})


def columns_of(model: TRC2, plain: TRC2) -> None:
    """The plain model's weights are the same-named ones of the model."""
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})


NO_LOOPS = {"thalamus.enabled": False, "hippocampus.read": False}


@pytest.mark.parametrize("modulation", ["add", "gain"])
@pytest.mark.parametrize("merge", ["thalamic", "residual"])
def test_at_first_the_model_is_the_plain_column_stack_bit_for_bit(modulation: str, merge: str) -> None:
    torch.manual_seed(0)
    model = trc2({"thalamus.modulation": modulation, "hippocampus.merge": merge})
    torch.manual_seed(0)
    plain = trc2(NO_LOOPS)
    batch = rows()
    assert len(plain.routers) == 0 and plain.store is None
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert torch.equal(model(batch).logits, plain(batch).logits)


def test_an_empty_store_answers_as_no_store_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = opened(trc2())
    model.store.used.fill_(False)
    without = trc2({"hippocampus.read": False})
    columns_of(model, without)
    with_gate = model(rows())
    assert torch.equal(with_gate.logits, without(rows()).logits)
    with_gate.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def mixed(origins: list[int]) -> Batch:
    origin = torch.tensor(origins)
    return rows(len(origins)).replaced(origin=origin, weight=torch.ones(len(origins)))


@pytest.mark.parametrize(
    ("path", "without"), [("bare", NO_LOOPS), ("thalamus", {"hippocampus.read": False}), ("full", {})]
)
@pytest.mark.parametrize("merge", ["thalamic", "residual"])
def test_replayed_rows_take_the_path_that_is_named_and_current_rows_all_of_it(path, without, merge) -> None:
    torch.manual_seed(0)
    model = opened(trc2({"replay_path": path, "hippocampus.merge": merge})).double()
    less = trc2(without | {"hippocampus.merge": merge}).double()
    columns_of(model, less)
    if less.store is not None:
        less.store.used.copy_(model.store.used)
    batch = mixed([CURRENT, REPLAY, CURRENT])
    found, whole = model(batch).logits, model(rows()).logits
    torch.testing.assert_close(found[1], less(rows()).logits[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-12)
    assert path == "full" or not torch.allclose(found[1], whole[1])


def test_two_forwards_before_the_write_are_equal_and_only_the_next_step_sees_it() -> None:
    torch.manual_seed(0)
    model, batch = opened(trc2()).double(), rows()
    before = copy.deepcopy(model.state_dict())
    first, second = model(batch), model(batch)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    write(model, batch)
    assert not torch.equal(model.store.content, before["store.content"])
    assert not torch.equal(model(batch).logits, first.logits)


@pytest.mark.parametrize(
    "setting",
    [{}, {"write.signal": "nll", "hippocampus.stored": "projected", "hippocampus.event_gate": "hard"}],
    ids=str,
)
def test_no_step_waits_for_the_device(setting: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    # What only a CPU may look up is not looked up.
    for module in (layers, mixture_of_experts):
        monkeypatch.setattr(module, "free_to_look", lambda tensor: False)
    model = opened(trc2(setting)).train()
    packed = mixed([CURRENT, REPLAY, CURRENT]).replaced(segment_ids=torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 3))
    with NoQuestions():
        output = model(packed)
        (output.logits.square().mean() + sum(output.losses.values())).backward()
        loss = torch.rand(packed.inputs.shape)
        model.step_end(StepOutcome(step=1, batch=packed, output=output, row_loss=lambda: loss))
    assert model.store.statistics.any()


def test_evaluation_leaves_nothing_to_write() -> None:
    model = trc2()
    assert model.train()(rows()).stash.keys() == {"hidden", "mass"}
    assert not model.eval()(rows()).stash


def test_replayed_rows_are_never_written_and_leave_no_trace_in_utilities() -> None:
    torch.manual_seed(0)
    model = opened(trc2({"replay_path": "full"})).double()
    used, content = model.store.used.clone(), model.store.content.clone()
    write(model, mixed([REPLAY, REPLAY, REPLAY]))
    assert torch.equal(model.store.used, used) and torch.equal(model.store.content, content)
    assert not model.store.utility.any() and not model.store.statistics.any()
    write(model, mixed([REPLAY, CURRENT, REPLAY]))
    kept = model(mixed([REPLAY, CURRENT, REPLAY])).stash["hidden"]
    new = model.store.content[model.store.written == 1, 0]
    assert len(new) and all(bool((kept[1] == vector).all(-1).any()) for vector in new)


def test_the_stashes_of_micro_batches_are_those_of_one_batch_row_by_row() -> None:
    torch.manual_seed(0)
    model = opened(trc2()).double().train()
    whole = model(rows(4)).stash
    halves = [model(rows(4).rows(half)).stash for half in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items():
        joined = torch.cat([half[name] for half in halves])
        torch.testing.assert_close(joined, value, rtol=0, atol=1e-12)


def test_the_immediate_write_sees_its_own_future_in_training_and_not_in_evaluation() -> None:
    torch.manual_seed(0)
    model, batch = opened(trc2({"write.delay": "immediate"})).double(), rows()
    changed = batch.replaced(inputs=torch.cat([batch.inputs[:, :5], batch.inputs[:, 5:].roll(1, 0)], dim=1))
    train = [model.train()(b).logits[:, :5] for b in (batch, changed)]
    test = [model.eval()(b).logits[:, :5] for b in (batch, changed)]
    assert (train[0] - train[1]).abs().max() > 1e-6
    torch.testing.assert_close(test[0], test[1], rtol=0, atol=1e-12)
    assert model.measurements()["leaks_its_future"] == 1.0


def test_stored_projections_get_no_gradient_and_raw_slots_teach_theirs() -> None:
    for stored, taught in (("raw", True), ("projected", False)):
        model = opened(trc2({"hippocampus.stored": stored}))
        model(rows()).logits.square().sum().backward()
        grad = model.hippocampus.key.weight.grad
        assert (grad is not None and bool(grad.any())) is taught


def test_gradient_stops_where_it_should() -> None:
    torch.manual_seed(0)
    model = opened(trc2({"thalamus.detach": True, "hippocampus.read": False}))
    parts = model(rows()).losses
    critics = sum(value for name, value in parts.items() if name.startswith("thalamus"))
    grads = torch.autograd.grad(critics, list(model.parameters()), allow_unused=True)
    named = {name for (name, _), grad in zip(model.named_parameters(), grads) if grad is not None}
    assert named == {f"routers.{n}.{part}" for n in (1, 2) for part in ("predict.weight", "value.weight", "value.bias")}


def test_flops_grow_with_slots_and_active_parameters_leave_out_idle_experts_and_critics() -> None:
    few, many = trc2(), trc2({"hippocampus.slots": 17})
    assert many.flops_per_row() - few.flops_per_row() == 4 * 7 * 10 * 16
    total = sum(p.numel() for p in few.parameters())
    critics = sum(p.numel() for p in few.store.parameters())
    assert few.active_parameters() == total - critics - 3 * (3 - 2) * 3 * 8 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hippocampus": HippocampusOptions(slots=10**13)}, "hippocampus.slots: .* GB"),
        ({"hippocampus": HippocampusOptions(after_column=3)}, "hippocampus.after_column: 3 is not in 1..2"),
        ({"num_layers": 1}, "hippocampus.after_column: 0 is not in 1..0"),
        ({"num_layers": 0}, "TRC2.num_layers: 0 is below 1"),
        ({"thalamus": ThalamusOptions(columns="early")}, "thalamus.columns: early names no column .* use all"),
        ({"num_layers": 2, "thalamus": ThalamusOptions(columns="early")}, "thalamus.columns: early names no column"),
        ({"thalamus": ThalamusOptions(columns="late"),
          "hippocampus": HippocampusOptions(merge="residual", after_column=3)}, "thalamus.columns: late names no"),
        ({"thalamus": ThalamusOptions(rank=12)}, "thalamus.groups: 8 does not divide the rank"),
        ({"column": ColumnOptions(num_heads=3)}, "column.num_heads: twice its 3 must divide hidden_size"),
        ({"column": ColumnOptions(num_heads=2)}, "column.heads_per_kv: 4 does not divide num_heads"),
        ({"hippocampus": HippocampusOptions(event_gate="hard"), "thalamus": ThalamusOptions(surprise="none")},
         "hippocampus.event_gate: hard needs"),
        ({"write": WriteOptions(quota=600)}, "write.quota: 600 exceeds hippocampus.slots"),
        ({"replay_path": "half"}, "replay_path: must be one of bare, thalamus, full"),
        ({"spec": Spec(kind="classify", input_shape=(4,), num_outputs=2)}, "kind 'classify'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TRC2(**({"spec": TEXT, "hidden_size": 64, "num_layers": 3, "column": ColumnOptions(num_heads=4)} | options))


def test_a_step_that_leaves_nothing_to_write_is_refused() -> None:
    model = trc2()
    model.eval()
    with pytest.raises(ValueError, match="TRC2.write: .*set write.signal to none"):
        output = model(rows())
        model.step_end(
            StepOutcome(step=1, batch=rows(), output=output, row_loss=lambda: torch.zeros(output.logits.shape[:2]))
        )


def test_the_defaults_of_small_models_are_those_of_the_options() -> None:
    assert options_of({}) == DEFAULTS
