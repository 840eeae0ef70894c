"""TNT: sequential memories with resets are the definition; long chunks are written at once; stages change chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from associative_memories import RULES, memory, tokens
from memory_presets import PRESETS, taken_by

from clplat.architectures.associative_memory.bulk import takes
from clplat.architectures.associative_memory.presets import DeltaNet, MemoryLayer, TitansLMM, TTTLinear
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import each_part
from clplat.architectures.associative_memory.tnt import TNT, TNTMixer
from clplat.architectures.associative_memory.token_loop import token_loop
from clplat.architectures.base import as_in_task
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.architectures.probing import Contract
from clplat.streams.base import Spec, Task
from clplat.streams.batch import Batch

HIDDEN, ROWS, LENGTH = 8, 2, 13
TEXT = Spec(kind="language", input_shape=(16,), num_outputs=23)
TITANS = TitansLMM(num_heads=2, chunk=2, expand=2)


def mixer(layer: MemoryLayer = TITANS, **options: Any) -> TNTMixer:
    """A layer in float64 whose parameters are none of those it is born with."""
    torch.manual_seed(0)
    chosen = {"global_chunk": 6, "local_chunks": [2, 4], "shard": 8} | options
    made = TNT(layer=layer, **chosen).build(HIDDEN).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=draw, dtype=torch.float64)


def plain() -> Reading:
    return Reading(
        positions=torch.arange(LENGTH), mask=None, documents=None, lengths=torch.zeros(ROWS, dtype=torch.long)
    )


def by_definition(made: TNTMixer, x: torch.Tensor) -> torch.Tensor:
    """Token after token, each local memory set back at every shard's start."""
    given = made.memory.prepared(made._tokens(x, made.qkv(x), None, None))
    wide = made.memory.empty_state(ROWS)
    near = [local.empty_state(ROWS) for local in made.near]
    read, seen, answers = wide.weights, [torch.zeros(()) for _ in near], []
    for t in range(LENGTH):
        token = given.part(t, t + 1)
        if t % made.global_chunk == 0:
            read = wide.weights
        answer = made.memory._network().read(read, token.q)
        _, wide = token_loop(made.memory._network(), token, wide)
        for j, (local, chunk) in enumerate(zip(made.near, made.chunks)):
            if t % made.shard == 0:
                near[j] = local.empty_state(ROWS)
            if t % chunk == 0:
                seen[j] = torch.zeros(())
            direction = F.normalize(token.k, dim=-1)
            seen[j] = seen[j] + direction.mT @ direction
            scale = made.global_chunk / chunk if local.rule.anchored else 1.0
            own = token._replace(q=token.q @ seen[j] if made.project else token.q, rate=scale * token.rate)
            found, near[j] = token_loop(local._network(), own, near[j])
            answer = answer + found
        answers.append(answer)
    return made._given_out(x, torch.cat(answers, 2))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        TITANS,
        TTTLinear(num_heads=2),
        DeltaNet(num_heads=2),
        MemoryLayer(num_heads=2, rule=MemoryRule(window=3, retention="decay")),
        MemoryLayer(num_heads=2, rule=MemoryRule(optimizer="muon")),
    ],
    ids=["titans", "ttt", "delta", "omega", "muon"],
)
def test_shards_at_once_are_memories_set_back_in_turn_with_all_outer_gradients(
    layer: MemoryLayer, project: bool
) -> None:
    made, x = mixer(layer, project=project), inputs().requires_grad_()
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = {"x": x, **dict(made.named_parameters())}
    found, expected = made(x, plain()), by_definition(made, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for leaf, a, b in zip(
        leaves, *(torch.autograd.grad((out * pull).sum(), list(leaves.values())) for out in (found, expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, leaf=leaf: f"{leaf}: {text}")
        assert bool(a.any()), leaf


@pytest.mark.parametrize("name", taken_by(lambda layer: TNT(layer=layer)))
def test_over_every_named_layer_shards_at_once_are_memories_set_back_in_turn(name: str) -> None:
    made, x = mixer(PRESETS[name]), inputs()
    with torch.no_grad():
        torch.testing.assert_close(made(x, plain()), by_definition(made, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if takes(rule) or not rule.anchored])
def test_a_chunk_written_at_once_leaves_what_the_token_loop_leaves(name: str) -> None:
    rule = RULES[name]
    made, given, before = memory(rule), tokens(rule, 3), tokens(rule, 1, seed=1)
    start = made(before)[1]
    counts = torch.arange(3) < torch.tensor([3, 1, 2]).unsqueeze(1)
    lengths = {"all": None, "some": counts} if rule.chunk > 3 else {"all": None}
    for counted in lengths.values():
        part = given.part(0, min(3, rule.chunk))._replace(counts=counted)
        state = start if rule.chunk > 1 else None
        _, expected = made.by_definition(part, state)
        found = made.written(made.prepared(part), made.empty_state(3) if state is None else state)
        each_part(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12) or a, found, expected)


def test_the_next_stage_has_other_chunks_and_the_same_weights() -> None:
    torch.manual_seed(0)
    kind = TNT(layer=TITANS, global_chunk=8, local_chunks=[4], shard=8, later={1: [1]})
    contract = Contract(
        factory=lambda spec: MemoryTransformer(spec=spec, hidden_size=16, layers=[kind, TITANS], mlp_ratio=2.0),
        spec=TEXT,
    )
    made = contract.model().eval()
    rows = torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = Batch(inputs=rows, targets=rows, task=torch.zeros(2, dtype=torch.long))
    first, weights = made(batch).logits, {name: value.clone() for name, value in made.state_dict().items()}
    made.task_start(contract.task(1))
    assert made.blocks[0].attention.chunks == [1]
    assert made.blocks[0].attention.near[0].rule.chunk == 1
    assert all(torch.equal(weights[name], value) for name, value in made.state_dict().items())
    assert (made(batch).logits - first).abs().max() > 1e-6
    assert made.structure() == {"task": 1}
    twin = contract.model().eval()
    twin.restructure(made.structure())
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin(batch).logits, made(batch).logits)


class Growing(MemoryTransformer):
    """A model of somebody else's that grows."""

    def task_start(self, task: Task) -> None:
        super().task_start(task)
        self.register_parameter(f"of_task_{task.index}", torch.nn.Parameter(torch.zeros(1)))


def test_stages_need_no_copy_of_the_model_to_know_that_it_does_not_grow_and_a_subclass_that_grows_gets_one() -> None:
    kind = TNT(layer=TITANS, global_chunk=8, local_chunks=[4], shard=8, later={1: [1]})
    staged, growing = (made(spec=TEXT, hidden_size=16, layers=[kind]) for made in (MemoryTransformer, Growing))
    tasks = [Contract(factory=MemoryTransformer, spec=TEXT).task(index) for index in range(2)]
    assert as_in_task(staged, tasks) is staged and staged.blocks[0].attention.chunks == [4]
    later = as_in_task(growing, tasks)
    assert later is not growing and not hasattr(growing, "of_task_1") and hasattr(later, "of_task_1")


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="TNT.local_chunks: 3 must divide shard .8."):
        TNT(local_chunks=[3], shard=8)
    with pytest.raises(ValueError, match="TNT.later.1: must give 2 chunks"):
        TNT(local_chunks=[2, 4], shard=8, later={1: [1]})
    for task in (-1, 0):
        with pytest.raises(ValueError, match=f"TNT.later: is of tasks from 1 on, got {task}; chunks of task 0 are"):
            TNT(later={task: [1]})
    with pytest.raises(ValueError, match="TNT.local_chunks: must name the chunk of at least one"):
        TNT(local_chunks=[])
    with pytest.raises(ValueError, match="TNT.global_chunk: must be at least 1"):
        TNT(global_chunk=0)
