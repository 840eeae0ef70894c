"""Memories written from gradients, and their compression, against direct computation in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import END, VOCABULARY, model_folder
from torch import Tensor

from clplat.architectures.locas import LocasModel
from clplat.architectures.locas.compression import Slots, compressed, probes
from clplat.architectures.locas.options import Compression, SideMemory
from clplat.architectures.locas.writing import _alone, _together
from clplat.architectures.pretrained.model import Pretrained
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch

SPEC = Spec(kind="language", input_shape=(8,), num_outputs=VOCABULARY, end_token=END)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), "gpt2")


def host(folder: Path, **options: Any) -> LocasModel:
    torch.manual_seed(1)
    memory = SideMemory(**{"rank": 4, "start": "gradient", "scale": "one", "clip": False} | options)
    model = LocasModel(spec=SPEC, model=lambda spec: Pretrained(spec=spec, name=str(folder)), memory=memory)
    return model.double().eval()


def batch(counted: int = 7) -> Batch:
    tokens = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[:, : 7 - counted] = IGNORE
    return Batch(inputs=tokens[:, :-1].clone(), targets=targets)


def log_probability(model: LocasModel, rows: Batch, row: int, place: int) -> Tensor:
    return model(rows).logits.log_softmax(-1)[row, place, rows.targets[row, place]]


def slopes(model: LocasModel, rows: Batch, row: int, place: int) -> list[Tensor]:
    """∂ log p(target) by every layer's answer to that token, one token at a time."""
    found = []
    for side in model.sideways().values():
        probe = torch.zeros(2, 7, 32, dtype=torch.float64, requires_grad=True)
        handle = side.register_forward_hook(lambda _, __, answer, probe=probe: answer + probe)
        (slope,) = torch.autograd.grad(log_probability(model, rows, row, place), probe)
        handle.remove()
        found.append(slope[row, place])
    return found


def test_a_gradient_on_its_own_knows_nothing_of_later_tokens_and_one_of_all_tokens_does(folder: Path) -> None:
    model, rows = host(folder), batch(3)
    alone, together = (how(model.sideways(), model.backbone, rows) for how in (_alone, _together))
    places = (rows.targets != IGNORE).nonzero().tolist()
    assert len(places) == 6
    for number, (row, place) in enumerate(places):
        exact = torch.stack(slopes(model, rows, row, place))
        torch.testing.assert_close(torch.stack([g[number] for g in alone[2].values()]), exact)
        mixed = torch.stack([g[number] for g in together[2].values()])
        # The last layer's answer reaches no later token, and the last token has none behind it.
        torch.testing.assert_close(mixed[-1], exact[-1])
        assert (place == 6) == torch.allclose(mixed[0], exact[0], rtol=1e-6, atol=1e-12)
    for first, second in zip(alone[:2], together[:2]):
        torch.testing.assert_close(list(first.values()), list(second.values()))


def test_one_token_is_written_as_its_input_and_its_gradient_normalised_over_all_layers(folder: Path) -> None:
    model, rows = host(folder, rank=1, write_share=0.05), batch(1)
    rows.targets[1] = IGNORE
    before = log_probability(model, rows, 0, 6).detach()
    wanted = slopes(model, rows, 0, 6)
    inputs, answers, _ = _together(model.sideways(), model.backbone, rows)
    model.begin_memory("default", rows, torch.Generator())
    norm = torch.stack([g.square().sum() for g in wanted]).sum().sqrt()
    steps, added, own = [], 0.0, 0.0
    for path, slope in zip(model.sideways(), wanted, strict=True):
        side, a = model.sideways()[path], inputs[path][0]
        bank = side.bank("default")
        torch.testing.assert_close(bank.K.data[0], a / a.norm())
        steps.append(bank.V.data[0] / (slope / norm))
        change = bank(a, side.view().activation).detach()
        added, own = added + float(change.square().sum()), own + float(answers[path][0].square().sum())
    assert float(torch.cat(steps).std()) < 1e-9 < float(torch.cat(steps).mean())
    assert abs((added / own) ** 0.5 - 0.05) < 1e-9
    assert log_probability(model, rows, 0, 6) > before


@pytest.mark.parametrize("detach_future", [False, True])
def test_more_tokens_than_slots_are_reduced_and_their_log_probability_rises(
    folder: Path, detach_future: bool
) -> None:  # fmt: skip
    model, rows = host(folder, rank=6, detach_future=detach_future), batch()

    def nats() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(rows).logits.flatten(0, 1), rows.targets.flatten()))

    before = nats()
    model.begin_memory("default", rows, torch.Generator())
    assert nats() < before
    assert all(side.bank("default").V.any(1).all() for side in model.sideways().values())


def slots(seed: int = 0, count: int = 12, size: int = 8) -> tuple[Slots, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, size, generator=draw, dtype=torch.float64) for n in (count, count, 64)]
    return Slots(made[0], made[1]), made[2]


def answer(k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """f(x) = Σ_i ReLU(⟨k_i, x⟩) v_i, slot by slot."""
    return sum(((k[i] @ x).clamp(min=0) * v[i] for i in range(len(k))), torch.zeros_like(x))


def test_probes_are_the_strongest_directions_and_point_to_where_the_memory_fires() -> None:
    memory, _ = slots()
    found = probes(memory, 5, torch.relu)
    strength = memory.keys.norm(dim=1) * memory.values.norm(dim=1)
    weighted = torch.diag(strength) @ (memory.keys / memory.keys.norm(dim=1, keepdim=True))
    sizes, directions = torch.linalg.eigh(weighted.T @ weighted)
    for number, probe in enumerate(found):
        expected = directions[:, sizes.argsort(descending=True)[number]]
        torch.testing.assert_close(probe, expected if probe @ expected > 0 else -expected)
        ahead, behind = ((strength * (memory.keys @ (sign * probe)).clamp(min=0)).sum() for sign in (1, -1))
        assert ahead >= behind
    parallel = Slots(memory.keys[:1].repeat(3, 1), memory.values[:3])
    assert len(probes(parallel, 2, torch.relu)) == 1


def test_nl_svd_keeps_the_answers_at_its_probes() -> None:
    memory, inputs = slots()
    kept = compressed(memory, 5, "nl_svd", torch.relu, inputs)
    for key, value in zip(kept.keys, kept.values):
        torch.testing.assert_close(value, answer(memory.keys, memory.values, key))


def test_a_refit_gives_the_values_of_least_squares() -> None:
    memory, inputs = slots()
    wanted = torch.stack([answer(memory.keys, memory.values, x) for x in inputs])
    errors = {}
    modes: tuple[Compression, ...] = ("nl_svd", "nl_svd_refit", "prune_refit")
    for mode in modes:
        kept = compressed(memory, 5, mode, torch.relu, inputs)
        active = (inputs @ kept.keys.T).clamp(min=0)
        errors[mode] = float((active @ kept.values - wanted).norm())
        if mode != "nl_svd":
            solved = torch.linalg.lstsq(active, wanted).solution
            torch.testing.assert_close(kept.values, solved, rtol=1e-4, atol=1e-4)
    strongest = (memory.keys.norm(dim=1) * memory.values.norm(dim=1)).topk(5).indices
    torch.testing.assert_close(compressed(memory, 5, "prune_refit", torch.relu, inputs).keys, memory.keys[strongest])
    assert errors["nl_svd_refit"] < errors["nl_svd"]


def test_a_memory_that_fits_is_left_as_it_is() -> None:
    memory, inputs = slots(count=4)
    assert compressed(memory, 4, "nl_svd", torch.relu, inputs) is memory
