"""Each check of the architecture contract fails for a model that breaks just what it names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clplat.architectures import contract as checks
from clplat.architectures.base import Architecture, Output
from clplat.architectures.mlp import MLP
from clplat.architectures.probing import Contract
from clplat.architectures.transformer import Transformer
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(12,), num_outputs=23)
IMAGES = Spec(kind="classify", input_shape=(5,), num_outputs=6, scenario="class")
LABELLED = Spec(kind="classify", input_shape=(8,), num_outputs=3, scenario="class", vocab_size=11, pad_token=10)


class Text(Transformer):
    def __init__(self, *, spec: Spec, document_mask: bool = True) -> None:
        super().__init__(spec=spec, hidden_size=16, num_layers=1, num_heads=2, document_mask=document_mask)


class Image(MLP):
    def __init__(self, *, spec: Spec) -> None:
        super().__init__(spec=spec, hidden_sizes=[8])


class FewLogits(Image):
    def forward(self, batch, state=None, return_hidden=None):
        return Output(logits=super().forward(batch).logits[:, :-1])


class UndeclaredTime(Text):
    causal = None


class MeasuresATensor(Image):
    def measurements(self):
        return {"largest": self.head.weight.max()}


class MeasuresByDrawing(Image):
    def measurements(self):
        return {"chance": float(torch.rand(()))}


class ChangesWhatItMeasures(Image):
    def measurements(self):
        with torch.no_grad():
            return {"largest": float(self.head.weight.mul_(2).max())}


class OwnSeed(Image):
    def __init__(self, *, spec):
        super().__init__(spec=spec)
        generator = torch.Generator()
        generator.seed()
        with torch.no_grad():
            self.head.weight.normal_(generator=generator)


class SeesLaterTokens(Text):
    def forward(self, batch, state=None, return_hidden=None):
        output = super().forward(batch, state)
        return Output(logits=output.logits + 1e-6 * self.embedding(batch.inputs).mean((1, 2), keepdim=True))


class SeesTheNextTokenUntraced(Text):
    """Not through an embedding, so that only the perturbation can show it."""

    def forward(self, batch, state=None, return_hidden=None):
        later = batch.inputs.roll(-1, dims=1).unsqueeze(-1)
        return Output(logits=super().forward(batch, state).logits + 1e-6 * later)


class IgnoresTokens(Text):
    def forward(self, batch, state=None, return_hidden=None):
        return Output(logits=super().forward(batch, state).logits.roll(1, dims=1))


class SeesOtherRows(Image):
    def forward(self, batch, state=None, return_hidden=None):
        logits = super().forward(batch).logits
        return Output(logits=logits - 1e-3 * logits.mean(0))


class TrainsDifferently(Image):
    def forward(self, batch, state=None, return_hidden=None):
        return Output(logits=super().forward(batch).logits * (1.001 if self.training else 1.0))


class CountsEvaluations(Image):
    def __init__(self, *, spec):
        super().__init__(spec=spec)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch, state=None, return_hidden=None):
        self.calls += 1
        return super().forward(batch)


class CountsPadding(Architecture):
    """Mean over a row's embeddings, those of padding included."""

    def __init__(self, *, spec):
        super().__init__()
        self.embedding = nn.EmbeddingBag(spec.vocab_size, spec.num_outputs)

    def forward(self, batch, state=None, return_hidden=None):
        return Output(logits=self.embedding(batch.inputs))


class DecodesOnePositionOff(Text):
    def _read(self, tokens, state, lengths):
        return super()._read(tokens, state, (lengths - 1).clamp(min=0))


class ForgetsPromptLengths(Text):
    def _read(self, tokens, state, lengths):
        return super()._read(tokens, state, lengths.amax().expand_as(lengths))


class WritesIntoTheStateItWasGiven(Text):
    def decode(self, tokens, state, lengths):
        logits, longer = super().decode(tokens, state, lengths)
        for keys, _ in state:
            keys.mul_(2.0)
        return logits, longer


class GrowsWithoutSayingSo(Image):
    def task_start(self, task):
        self.register_parameter(f"extra{task.index}", nn.Parameter(torch.ones(2)))


class StructureOfTensors(Image):
    def structure(self):
        return {"sizes": (1, 2)}

    def restructure(self, structure):
        pass


class Unused(Image):
    def __init__(self, *, spec):
        super().__init__(spec=spec)
        self.spare = nn.Parameter(torch.ones(3))


class FrozenInWordsOnly(Image):
    frozen = ("head",)


class Overflows(Image):
    def forward(self, batch, state=None, return_hidden=None):
        logits = super().forward(batch).logits
        return Output(logits=logits + ((torch.ones_like(logits) + 1e-3) - 1).log())


class AlmostConstant(Image):
    def forward(self, batch, state=None, return_hidden=None):
        return Output(logits=super().forward(batch).logits.tanh())


BROKEN = [
    (FewLogits, IMAGES, checks.declares_itself, "shape"),
    (UndeclaredTime, TEXT, checks.declares_itself, "must declare causal"),
    (MeasuresATensor, IMAGES, checks.is_measured_without_a_trace, "'largest' must be a plain float"),
    (MeasuresByDrawing, IMAGES, checks.is_measured_without_a_trace, "draw from torch's global random source"),
    (ChangesWhatItMeasures, IMAGES, checks.is_measured_without_a_trace, "measurements changed head.weight"),
    (OwnSeed, IMAGES, checks.is_built_from_the_seed_alone, "differ in head.weight"),
    (SeesLaterTokens, TEXT, checks.is_causal, "depend on hidden tokens"),
    (SeesTheNextTokenUntraced, TEXT, checks.is_causal, "see later tokens"),
    (IgnoresTokens, TEXT, checks.is_causal, "depend on hidden|ignore their own token"),
    (lambda spec: Text(spec=spec, document_mask=False), TEXT, checks.keeps_documents_apart, "depend on hidden tokens"),
    (SeesOtherRows, IMAGES, checks.keeps_rows_apart, "depends on the other rows"),
    (TrainsDifferently, IMAGES, checks.evaluates_as_it_trains, "training differs from evaluation"),
    (CountsEvaluations, IMAGES, checks.evaluates_as_it_trains, "evaluation changed calls"),
    (CountsPadding, LABELLED, checks.ignores_padding, "more padding changes logits"),
    (DecodesOnePositionOff, TEXT, checks.decodes_as_it_reads, "differs from a full pass"),
    (ForgetsPromptLengths, TEXT, checks.decodes_as_it_reads, "differs from a full pass"),
    (WritesIntoTheStateItWasGiven, TEXT, checks.decodes_as_it_reads, "changed the state"),
    (GrowsWithoutSayingSo, IMAGES, checks.survives_saving, "other parameters than the grown model"),
    (StructureOfTensors, IMAGES, checks.survives_saving, "plain data"),
    (Unused, IMAGES, checks.teaches_every_parameter, "without a gradient after 1 step.*spare"),
    (FrozenInWordsOnly, IMAGES, checks.teaches_every_parameter, "declared frozen, but got a gradient: head"),
    (Overflows, IMAGES, checks.runs_in_bfloat16, "infinite or undefined"),
    (AlmostConstant, IMAGES, checks.learns_one_batch_by_heart, "brought the loss from"),
]


@pytest.mark.parametrize(("broken", "spec", "check", "message"), BROKEN)
def test_a_broken_model_is_caught_by_the_check_that_names_its_fault(broken, spec, check, message) -> None:
    with pytest.raises(AssertionError, match=message):
        check(Contract(factory=lambda spec: broken(spec=spec), spec=spec))


def test_every_check_has_a_model_that_it_catches() -> None:
    assert {check for _, _, check, _ in BROKEN} == set(checks.CHECKS)


def test_one_call_checks_a_model_of_ones_own() -> None:
    checks.check_architecture(lambda spec: Image(spec=spec), IMAGES)
    with pytest.raises(AssertionError, match="SeesOtherRows: row 0"):
        checks.check_architecture(lambda spec: SeesOtherRows(spec=spec), IMAGES)


class Late(Architecture):
    """Its second layer starts at zero, so the first learns from the second step on."""

    def __init__(self, *, spec: Spec) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, spec.num_outputs)
        nn.init.zeros_(self.second.weight)

    def forward(self, batch, state=None, return_hidden=None):
        return Output(logits=self.second(self.first(batch.inputs).relu()))


def test_gradient_steps_declares_how_late_a_parameter_may_learn() -> None:
    with pytest.raises(AssertionError, match="first.bias, first.weight"):
        checks.teaches_every_parameter(Contract(factory=lambda spec: Late(spec=spec), spec=IMAGES))
    checks.teaches_every_parameter(Contract(factory=lambda spec: Late(spec=spec), spec=IMAGES, gradient_steps=2))
