"""docs/delta_memory.md: its examples run as printed, and what it says about Hope's update holds."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "delta_memory.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    torch.manual_seed(0)
    found: dict[str, object] = {}
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, found)
    return found


def test_the_pages_examples_run_as_printed(names: dict[str, object]) -> None:
    assert {"state_100", "hope"} <= names.keys()


def hope_by_tokens(q, k, v, rate, log_decay, chunk):
    """Eq. 93 of arXiv:2512.24695, transposed, for one sequence and head, a token at a time."""
    W = anchor = torch.zeros(k.shape[-1], v.shape[-1], dtype=v.dtype)
    outputs = []
    for t in range(len(k)):
        if t % chunk == 0:
            anchor = W
        kept = log_decay[t].exp() * torch.eye(len(W), dtype=W.dtype) - rate[t] * torch.outer(k[t], k[t])
        W = kept @ W - rate[t] * torch.outer(k[t], anchor.T @ k[t] - v[t])
        outputs.append(W.T @ q[t])
    return torch.stack(outputs), W


def test_the_pages_hope_is_the_papers_update_with_the_gradient_at_the_chunks_start(names: dict[str, object]) -> None:
    q, v = torch.randn(2, 1, 21, 1, 6, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(1, 21, 1, 6, dtype=torch.float64), dim=-1)
    rate, log_decay = torch.rand(1, 21, 1, dtype=torch.float64), -torch.rand(1, 21, 1, dtype=torch.float64)
    o, W = names["hope"](q, k, v, rate, log_decay, 8)
    expected, last = hope_by_tokens(*(part[0, :, 0] for part in (q, k, v, rate, log_decay)), 8)
    torch.testing.assert_close(o[0, :, 0], expected)
    torch.testing.assert_close(W[0, 0], last)


@pytest.mark.parametrize(("rate", "converges"), [(0.9, True), (1.1, False)])
def test_hope_converges_to_half_the_value_below_rate_one_and_diverges_above(
    names: dict[str, object], rate: float, converges: bool
) -> None:
    k = torch.nn.functional.normalize(torch.ones(1, 1, 1, 4, dtype=torch.float64), dim=-1).expand(1, 80, 1, 4)
    v, gate = torch.ones(1, 80, 1, 3, dtype=torch.float64), torch.zeros(1, 80, 1, dtype=torch.float64)
    o, _ = names["hope"](k, k, v, gate + rate, gate, 1)
    assert torch.allclose(o[0, -1], 0.5 * v[0, -1]) if converges else o[0, -1].abs().max() > 100
