"""Levels in place of the feed-forward layer: clocks, losses in closed form, starts from trained layers, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from token_rows import assert_reads_in_parts, batch_of, tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clplat.architectures.associative_memory.presets import TitansLMM
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.continuum_memory.feed import ContinuumFeed
from clplat.architectures.continuum_memory.levels import TokenLevel
from clplat.architectures.continuum_memory.options import CMSLevel, ContinuumMemory
from clplat.architectures.layers import SwiGLU
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.architectures.transformer import Transformer
from clplat.components import Component, build, checked
from clplat.streams.base import Spec
from clplat.study_file import expand, load_study
from clplat.yaml_text import parse_yaml

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=23)


def level(**options: Any) -> TokenLevel:
    torch.manual_seed(0)
    made = TokenLevel(CMSLevel(**{"clock": "token", "period": 4, "expand": 1.0, **options}).sized(6)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def inputs(rows: int = 2, length: int = 11, width: int = 6) -> Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reading(rows: int = 2, length: int = 11) -> Reading:
    none = torch.zeros(rows, dtype=torch.long)
    return Reading(positions=torch.arange(length), mask=None, documents=None, lengths=none)


def model(*levels: CMSLevel, layers: Any = None, **options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    memory = ContinuumMemory(levels=levels, **options) if levels else None
    kinds = layers or [AttentionLayer(num_heads=2)] * 2
    return MemoryTransformer(spec=TEXT, hidden_size=16, layers=kinds, feed_forward=memory).double().eval()


def swiglu(weights: list[Tensor], x: Tensor) -> Tensor:
    gate, up, down = weights
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_token_level_steps_at_each_boundary_on_its_periods_tokens_by_the_gradient_of_the_stated_loss(
    reduction: str,
) -> None:
    made, x = level(reduction=reduction, lr=0.1), inputs()
    answers = torch.zeros_like(x)
    for row in range(2):
        weights = [part[0].detach() for part in made.fast.first]
        gathered = [torch.zeros_like(weight) for weight in weights]
        for t in range(11):
            answers[row, t] = swiglu(weights, x[row, t])
            target = made.target(x[row, t]).detach()

            def loss(own: list[Tensor], key: Tensor = x[row, t], goal: Tensor = target) -> Tensor:
                return 0.5 * (swiglu(own, key) - goal).square().mean() / key.square().mean().clamp(min=1.0)

            gathered = [a + b for a, b in zip(gathered, torch.func.grad(loss)(weights), strict=True)]
            if (t + 1) % 4 == 0:  # the period's own C tokens, none of them twice
                share = 0.1 / (4 if reduction == "mean" else 1)
                weights = [w - share * g for w, g in zip(weights, gathered, strict=True)]
                gathered = [torch.zeros_like(weight) for weight in weights]
    torch.testing.assert_close(made(x, None), answers, rtol=0, atol=1e-12)


def test_a_token_level_answers_by_the_same_weights_until_its_boundary() -> None:
    made, x = level(lr=0.5), inputs(rows=1, length=1).expand(1, 12, 6)
    answers = made(x, None)[0]
    for start in (0, 4, 8):
        assert torch.equal(answers[start], answers[start + 3])
    assert (answers[3] - answers[4]).abs().max() > 1e-3 and (answers[7] - answers[8]).abs().max() > 1e-4


def test_a_token_level_comes_closer_to_its_targets() -> None:
    made = level(period=1)
    x = torch.eye(6, dtype=torch.float64)[:1].mul(6**0.5).expand(1, 40, 6)
    wanted = made.target(x[0, 0])
    errors = (made(x, None)[0] - wanted).norm(dim=-1)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("carry", ["sequential", "independent"])
def test_a_row_read_in_parts_with_carried_state_equals_one_pass(carry: str) -> None:
    levels = (CMSLevel(), CMSLevel(period=5, clock="token"), CMSLevel(period=3, clock="token", reduction="mean"))
    made, row = model(*levels, carry=carry, layers=[TitansLMM(num_heads=2, chunk=4), AttentionLayer()]), tokens()
    assert_reads_in_parts(made, row, [4, 1, 1, 7, 3], atol=1e-11)


def test_a_packed_document_begins_with_the_trained_weights_and_a_new_period() -> None:
    made, row = model(CMSLevel(period=3, clock="token", lr=0.3), layers=[TitansLMM(num_heads=2, chunk=4)]), tokens(1)
    segments = torch.tensor([[0] * 5 + [1] * 11])
    packed = made(batch_of(row, segments)).logits
    torch.testing.assert_close(packed[:, 5:], made(batch_of(row[:, 5:])).logits, rtol=0, atol=1e-11)
    assert (packed - made(batch_of(row)).logits).abs().max() > 1e-6


def test_evaluation_and_inference_mode_learn_what_training_learns() -> None:
    made, row = model(CMSLevel(period=4, clock="token")), tokens()
    trained = made.train()(batch_of(row)).logits
    with torch.inference_mode():
        assert torch.equal(made.eval()(batch_of(row)).logits, trained)


@pytest.mark.parametrize("clock", ["step", "token"])
@pytest.mark.parametrize("carry", ["sequential", "nested", "independent"])
def test_levels_that_stand_still_are_the_model_whose_layers_they_copied_bit_for_bit(
    clock: str, carry: str, tmp_path: Path
) -> None:
    base, row = model(), batch_of(tokens())
    torch.save(base.state_dict(), tmp_path / "base.pt")
    several = [CMSLevel(clock=clock, lr=0.0, period=period) for period in (1, 4)]
    memory = ContinuumMemory(levels=several, carry=carry)
    made = MemoryTransformer(
        spec=TEXT, hidden_size=16, layers=[AttentionLayer(num_heads=2)] * 2, feed_forward=memory,
        start_from=str(tmp_path / "base.pt"),
    ).double()  # fmt: skip
    made.load_state_dict({**made.state_dict(), **{k: v for k, v in base.state_dict().items() if ".mlp." not in k}})
    for block, own in zip(base.blocks, made.blocks, strict=True):
        own.mlp.begin_as(block.mlp)  # in double precision; the file was read into a model of single precision
    assert torch.equal(made(row).logits, base(row).logits)


def test_one_level_of_period_one_is_the_usual_layer_bit_for_bit() -> None:
    assert torch.equal(model(CMSLevel())(batch_of(tokens())).logits, model()(batch_of(tokens())).logits)


def test_a_trained_transformer_is_gone_on_from_with_the_same_answers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = Transformer(spec=TEXT, hidden_size=16, num_layers=2, num_heads=2)
    torch.save({"architecture": trained.state_dict()}, tmp_path / "run.pt")
    levels = [CMSLevel(period=1), CMSLevel(period=8), CMSLevel(period=2, clock="token")]
    made = MemoryTransformer(
        spec=TEXT, hidden_size=16, layers=[AttentionLayer(num_heads=2)] * 2,
        feed_forward=ContinuumMemory(levels=levels), start_from=str(tmp_path / "run.pt"),
    )  # fmt: skip
    assert torch.equal(made(batch_of(tokens())).logits, trained(batch_of(tokens())).logits)
    assert made.blocks[0].mlp.gains.tolist() == [0.0, 1.0, 0.0]  # the slowest gives what was learned
    made(batch_of(tokens())).logits.square().sum().backward()
    assert bool(made.blocks[0].mlp.gains.grad.all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, "start_from: the file has no blocks.1.mlp.gate_up.weight"),
        ({"mlp_ratio": 6.0}, "start_from: blocks.0.mlp has inner size 96; give the levels the `expand`"),
        ({"num_kv_heads": 1}, "start_from: blocks.0.attention.qkv.weight has shape"),
        (None, "start_from: there is no file"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    if change is not None:
        trained = Transformer(**{"spec": TEXT, "hidden_size": 16, "num_layers": 2, "num_heads": 2, **change})
        torch.save(trained.state_dict(), tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        MemoryTransformer(
            spec=TEXT, hidden_size=16, layers=[AttentionLayer(num_heads=2)] * 2,
            feed_forward=ContinuumMemory(levels=[CMSLevel()]), start_from=str(tmp_path / "run.pt"),
        )  # fmt: skip


def test_a_bare_chain_is_the_printed_composition() -> None:
    torch.manual_seed(0)
    sizes = [CMSLevel(period=p).sized(6) for p in (1, 2)]
    made = ContinuumFeed(levels=sizes, independent=False, residual=False).double()
    first, second = (part.mlp for part in made.levels.values())
    torch.testing.assert_close(made(inputs(), reading()), second(first(inputs())), rtol=0, atol=0)
    with pytest.raises(ValueError, match="residual: a bare chain of copies is another function"):
        made.begin_as(SwiGLU(hidden_size=6, inner_size=32))


def test_the_model_names_its_levels_and_the_record_their_clocks_and_losses() -> None:
    made = model(CMSLevel(), CMSLevel(period=8, lr=0.1, name="slow"), CMSLevel(period=4, clock="token"))
    found = made.levels()
    assert {name: (one.period, one.lr) for name, one in found.items()} == {"step1": (1, None), "slow": (8, 0.1)}
    own = dict(made.named_parameters())
    assert all(name in own and ".levels.slow." in name for name in found["slow"].parameters)
    assert len(found["slow"].parameters) == 4  # two weights in each of two blocks
    assert made.facts()["level.token4"] == "4 tokens, local loss"
    assert model().levels() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0, "name": "slow"}, "levels.slow.period: must be at least 1"),
        ({"clock": "hour"}, "levels.hour1.clock: must be one of step, token"),
        ({"lr": -1.0}, "levels.step1.lr: must be at least 0"),
        ({"expand": 0.0}, "levels.step1.expand: must be above 0"),
        ({"name": "a.b"}, "levels.name: must be a word"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CMSLevel(**options)
    with pytest.raises(ValueError, match="two are called 'step1'"):
        ContinuumMemory(levels=[CMSLevel(), CMSLevel()])
    with pytest.raises(ValueError, match="levels: must give at least one"):
        ContinuumMemory(levels=[])


@pytest.mark.parametrize("chosen", [CMSLevel(period=4), CMSLevel(period=8, clock="token")], ids=lambda one: one.clock)
def test_flops_are_those_that_torch_counts_within_a_tenth(chosen: CMSLevel) -> None:
    made = MemoryTransformer(
        spec=TEXT, hidden_size=64, layers=[AttentionLayer()], feed_forward=ContinuumMemory(levels=[CMSLevel(), chosen])
    )
    with FlopCounterMode(display=False) as counter:
        made(batch_of(tokens(rows=1)))
    assert made.flops_per_row() == pytest.approx(counter.get_total_flops(), rel=0.1)


def built(component: Component) -> MemoryTransformer:
    named = checked(component, "architecture", "architecture")
    return build(named, "architecture", "architecture", {"spec": TEXT})


def test_the_pages_example_can_be_built() -> None:
    page = (Path(__file__).parents[2] / "docs" / "continuum_memory.md").read_text(encoding="utf-8")
    made = built(Component(**parse_yaml(page.split("```yaml")[1].split("```")[0])["architecture"]))
    assert list(made.levels()) == ["step1", "step16"] and "token64" in made.blocks[1].mlp.levels


@pytest.mark.parametrize("name", ["intents_clinc", "intents_banking", "levels"])
def test_arms_of_a_shipped_study_have_as_many_feed_forward_weights_and_levels_have_their_clock(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLPLAT_DATA", "data")
    sizes = set()
    for run in expand(load_study(f"hope/{name}", [("seeds", "[0]")])):
        layers = "num_layers" if run.architecture.class_path.endswith("Hope") else "repeat"
        made = built(
            Component(class_path=run.architecture.class_path, init_args=run.architecture.init_args | {layers: 1})
        )
        own = {name: p.numel() for name, p in made.named_parameters() if ".mlp." in name and p.ndim >= 2}
        sizes.add(sum(count for name, count in own.items() if not name.endswith("target.weight")))
        assert bool(made.levels()) == run.training.optimizer.class_path.endswith("LevelClock")
    assert len(sizes) == 1


def test_arms_of_the_language_study_are_of_one_size_and_levels_have_their_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLPLAT_DATA", "data")
    spec, sizes = Spec(kind="language", input_shape=(256,), num_outputs=4096), []
    for run in expand(load_study("hope/language", [("seeds", "[0]")])):
        named = checked(run.architecture, "architecture", "architecture")
        made = build(named, "architecture", "architecture", {"spec": spec})
        sizes.append(sum(p.numel() for p in made.parameters()))
        assert bool(made.levels()) == run.training.optimizer.class_path.endswith("LevelClock")
    assert max(sizes) < 1.05 * min(sizes)
