"""What every architecture must hold, as plain functions: check your own with `check_architecture(factory, spec)`.

Each check builds the model anew, runs in about a second on a CPU with a small configuration, and raises
AssertionError with the model's name, what must hold and what was found. A test suite runs over `CHECKS` for one
report a check: `check(Contract(factory=lambda spec: MyModel(spec=spec, hidden_size=32), spec=spec))`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from clplat.architectures.base import Architecture, Decodes
from clplat.architectures.probing import (
    Contract,
    answers,
    loss_of,
    require,
    require_equal,
    require_influence,
    saved,
    train_step,
)
from clplat.streams.base import Spec


def check_architecture(
    factory: Callable[[Spec], Architecture],
    spec: Spec,
    *,
    gradient_steps: int = 1,
    overfit_steps: int = 150,
    learning_rate: float = 1e-2,
    isolates_documents: bool = True,
) -> None:
    """Run every check; the options are those of `Contract`."""
    contract = Contract(
        factory=factory,
        spec=spec,
        gradient_steps=gradient_steps,
        overfit_steps=overfit_steps,
        learning_rate=learning_rate,
        isolates_documents=isolates_documents,
    )
    for check in CHECKS:
        check(contract)


def declares_itself(contract: Contract) -> None:
    """Class attributes, shape of the logits, and costs are what the platform expects."""
    model, batch = contract.model(), contract.batch()
    require(model.causal in (True, False, None), model, f"causal must be True, False or None, not {model.causal!r}")
    require(not contract.language or model.causal is not None, model, "a language model must declare causal")
    require(model.memory_life in ("sequence", "task", "run"), model, f"memory_life {model.memory_life!r} is unknown")
    logits, expected = model(batch).logits, (*batch.targets.shape, contract.spec.num_outputs)
    require(logits.shape == expected, model, f"logits must have shape {expected}, not {tuple(logits.shape)}")
    flops, active, total = model.flops_per_row(), model.active_parameters(), sum(p.numel() for p in model.parameters())
    require(math.isfinite(flops) and flops > 0, model, f"flops_per_row must be positive, not {flops}")
    require(0 < active <= total, model, f"active_parameters must lie in 1..{total}, not {active}")


def is_measured_without_a_trace(contract: Contract) -> None:
    """`measurements` gives plain numbers, draws from no global random source and changes nothing."""
    model, random = contract.model(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    for name, value in model.measurements().items():
        require(isinstance(value, float), model, f"measurement {name!r} must be a plain float, not {value!r}")
    require(torch.equal(random, torch.get_rng_state()), model, "measurements draw from torch's global random source")
    for name, value in model.state_dict().items():
        require(torch.equal(value, before[name]), model, f"measurements changed {name}")


def is_built_from_the_seed_alone(contract: Contract) -> None:
    """Two models built under one seed have equal weights: differences between variants are paired."""
    first, second = contract.model().state_dict(), contract.model().state_dict()
    require(first.keys() == second.keys(), contract.model(), "two builds differ in their parameters' names")
    for name, value in first.items():
        require(torch.equal(value, second[name]), contract.model(), f"two builds under one seed differ in {name}")


def is_causal(contract: Contract) -> None:
    """No logit depends on a later token: its Jacobian is exactly 0, and changed later tokens move it ≤ 1e-10."""
    model, batch = contract.model(), contract.batch()
    if model.causal is not True or not contract.language:
        return
    length = batch.inputs.shape[1]
    require_influence(model, batch, torch.ones(length, length, dtype=torch.bool).tril().expand(len(batch), -1, -1))
    before = answers(model, batch)
    for start in {1, length // 3, length // 2, length - 1}:
        tokens = batch.inputs.clone()
        tokens[:, start:] = (tokens[:, start:] + 1) % contract.spec.num_outputs
        after = answers(model, batch.replaced(inputs=tokens))
        require_equal(after[:, :start], before[:, :start], model, f"logits before position {start} see later tokens")
        require(not torch.equal(after[:, start], before[:, start]), model, f"logits at {start} ignore their own token")


def keeps_documents_apart(contract: Contract) -> None:
    """With `segment_ids`, no logit depends on a token of another document of its row."""
    model, batch = contract.model(), contract.batch()
    if not contract.language or not model.causal or not contract.isolates_documents:
        return
    length = batch.inputs.shape[1]
    segments = torch.zeros_like(batch.inputs)
    segments[1, length // 2 :] = 1
    segments[2, 1:] = 1
    segments[2, length - 2 :] = 2
    packed = batch.replaced(segment_ids=segments)
    require_influence(model, packed, (segments.unsqueeze(2) == segments.unsqueeze(1)).tril())
    changed = batch.inputs.clone()
    changed[1, : length // 2] = (changed[1, : length // 2] + 1) % contract.spec.num_outputs
    before, after = answers(model, packed), answers(model, packed.replaced(inputs=changed))
    require_equal(after[1, length // 2 :], before[1, length // 2 :], model, "a document sees the one before it")


def keeps_rows_apart(contract: Contract) -> None:
    """A row's logits are the same alone as among others (in evaluation only, where the model is batch-coupled)."""
    model, batch = contract.model(), contract.batch()
    model.train(not model.batch_coupled)
    together = answers(model, batch)
    for row in range(len(batch)):
        alone = answers(model, batch.rows(slice(row, row + 1)))
        require_equal(together[row : row + 1], alone, model, f"row {row} depends on the other rows of its batch")


def evaluates_as_it_trains(contract: Contract) -> None:
    """Without dropout, training and evaluation mode give equal logits (unless batch-coupled); evaluation is
    repeatable and leaves every parameter and buffer as it was."""
    model, batch = contract.model(), contract.batch()
    if not model.batch_coupled:
        require_equal(
            answers(model.train(), batch), answers(model.eval(), batch), model, "training differs from evaluation"
        )
    model = contract.model(dropout=True).eval()
    before = copy.deepcopy(model.state_dict())
    first, second = answers(model, batch), answers(model, batch)
    require(torch.equal(first, second), model, "two evaluations of one batch differ")
    for name, value in model.state_dict().items():
        require(torch.equal(value, before[name]), model, f"evaluation changed {name}")


def ignores_padding(contract: Contract) -> None:
    """Logits of padded token rows do not depend on how much padding follows their tokens."""
    model, batch, pad = contract.model().eval(), contract.batch(), contract.spec.pad_token
    if contract.language or pad is None:
        return
    before = answers(model, batch)
    for more in (1, 7):
        wider = F.pad(batch.inputs, (0, more), value=pad)
        require_equal(answers(model, batch.replaced(inputs=wider)), before, model, "more padding changes logits")


def decodes_as_it_reads(contract: Contract) -> None:
    """Prefill and step-by-step decoding give the logits of one full pass, also for prompts of unequal length padded
    on the right; the state that was passed in stays as it was and survives being saved."""
    model, batch = contract.model(), contract.batch()
    if not isinstance(model, Decodes):
        return
    model.eval()
    tokens, length = batch.inputs, batch.inputs.shape[1]
    full, rows = answers(model, batch), torch.arange(len(batch))
    ragged = torch.tensor([length // 2, 1, length - 3])
    for lengths in (torch.ones_like(ragged), torch.full_like(ragged, length // 2), ragged):
        widest = int(lengths.max())
        padding = torch.arange(widest) >= lengths.unsqueeze(1)
        prompt = torch.where(padding, (tokens[:, :widest] + 1) % contract.spec.num_outputs, tokens[:, :widest])
        with torch.no_grad():
            logits, state = model.decode(prompt, model.init_state(len(batch)), torch.zeros_like(lengths))
            require_equal(logits[~padding], full[:, :widest][~padding], model, "prefill differs from a full pass")
            for step in range(length - widest):
                ends, given = lengths + step, copy.deepcopy(state)
                logits, longer = model.decode(tokens[rows, ends].unsqueeze(1), saved(state), ends)
                require_equal(logits[:, 0], full[rows, ends], model, f"decoding step {step} differs from a full pass")
                again, _ = model.decode(tokens[rows, ends].unsqueeze(1), state, ends)
                require(torch.equal(again, logits), model, "decoding from a saved and loaded state differs")
                kept = zip(pytree.tree_leaves(state), pytree.tree_leaves(given), strict=True)
                require(all(torch.equal(a, b) for a, b in kept), model, "decode changed the state that it was given")
                state = longer


def survives_saving(contract: Contract) -> None:
    """After two tasks have begun, `structure` (plain data) and weights rebuild a model with equal logits, and a
    carried state is a pytree of tensors that continues equally after being saved."""
    model, batch = contract.model(), contract.batch()
    for index in range(2):
        model.task_start(contract.task(index))
    model.eval().double()
    structure = dict(model.structure())
    require(json.loads(json.dumps(structure)) == structure, model, f"structure must be plain data, not {structure!r}")
    twin = contract.model()
    twin.restructure(structure)
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, twin)]
    require(shapes[0] == shapes[1], model, "restructure(structure()) gives other parameters than the grown model has")
    twin.double().eval().load_state_dict(saved(model.state_dict()))
    require(torch.equal(answers(twin, batch), answers(model, batch)), model, "a rebuilt model answers differently")
    with torch.no_grad():
        state = model(batch).state
        if state is not None:
            kept = saved(state)
            first, second = model(batch, state).logits, model(batch, kept).logits
            require(torch.equal(first, second), model, "a carried state continues differently once saved")


def teaches_every_parameter(contract: Contract) -> None:
    """Within `gradient_steps` steps every parameter not declared frozen gets a gradient, and no frozen one does."""
    model = contract.model()
    model.task_start(contract.task(0))
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    waiting = {name for name, p in model.named_parameters() if not name.startswith(model.frozen)}
    for step in range(contract.gradient_steps):
        train_step(model, optimizer, contract.batch(8, seed=step), step)
        taught = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        frozen = sorted(name for name in taught if name.startswith(model.frozen))
        require(not frozen, model, f"declared frozen, but got a gradient: {', '.join(frozen)}")
        waiting -= taught
    missed = f"without a gradient after {contract.gradient_steps} step(s): {', '.join(sorted(waiting))}"
    require(not waiting, model, f"{missed}; use them, declare them in `frozen`, or allow more gradient_steps")


def runs_in_bfloat16(contract: Contract) -> None:
    """Forward and backward are finite in bfloat16, by autocast and with bfloat16 weights."""
    for weights in (torch.float32, torch.bfloat16):
        model, batch = contract.model(double=False).to(weights).train(), contract.batch(dtype=weights)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
            output = model(batch)
        loss_of(output, batch).backward()
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        finite = finite and bool(output.logits.isfinite().all())
        require(finite, model, f"bfloat16 with {weights} weights gives infinite or undefined numbers")


def learns_one_batch_by_heart(contract: Contract) -> None:
    """Adam brings the loss of one batch below a tenth of where it began."""
    model, batch = contract.model(double=False), contract.batch(4, dtype=torch.float32)
    model.task_start(contract.task(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=contract.learning_rate)
    first = last = train_step(model.train(), optimizer, batch, 0)
    for step in range(1, contract.overfit_steps):
        last = train_step(model, optimizer, batch, step)
        if last < 0.1 * first:
            return
    require(
        False, model, f"{contract.overfit_steps} steps on one batch brought the loss from {first:.3g} to {last:.3g}"
    )


CHECKS: tuple[Callable[[Contract], None], ...] = (
    declares_itself,
    is_measured_without_a_trace,
    is_built_from_the_seed_alone,
    is_causal,
    keeps_documents_apart,
    keeps_rows_apart,
    evaluates_as_it_trains,
    ignores_padding,
    decodes_as_it_reads,
    survives_saving,
    teaches_every_parameter,
    runs_in_bfloat16,
    learns_one_batch_by_heart,
)
