"""docs/pretrained.md, "From Python": its blocks load a run's model, show logits, write text and export it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from question_runs import BYTES, run_of
from small_models import model_folder, write_byte_tokenizer
from studies import run_folder

from clplat.execution import execute
from clplat.streams.batch import Batch

PAGE = Path(__file__).parents[2] / "docs" / "pretrained.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text().partition("## From Python")[2], re.MULTILINE | re.DOTALL
)
RUN = '"runs/my_study-20260101-120000-abcd/er-s0"'


def test_the_page_loads_a_run_shows_logits_writes_text_and_exports_the_same_model(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(tmp_path, "llama", vocab_size=BYTES, eos_token_id=BYTES - 1)
    write_byte_tokenizer(model)
    tokenizer = {"class_path": "clplat.streams.tokenizers.PretrainedTokenizer", "init_args": {"name": str(model)}}
    data = run_of((places[0], model), tmp_path / "cache")
    data["stream"]["init_args"]["tokenizer"] = tokenizer
    folder = run_folder(tmp_path, data)
    assert execute(folder).status == "FINISHED"
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in BLOCKS[:2]:
        assert RUN in block
        exec(block.replace(RUN, repr(str(folder))), found)
    trained, plain, rows = found["model"], found["plain"], found["rows"]
    assert found["logits"].shape == (1, 4, BYTES) and len(capsys.readouterr().out.splitlines()) == 2
    with torch.no_grad():
        torch.testing.assert_close(plain(rows).logits, found["logits"], rtol=0, atol=1e-5 * found["logits"].abs().max())
        with trained.answering():
            bare = trained(Batch(inputs=rows, targets=rows)).logits
    assert (bare - found["logits"]).abs().max() > 0.01, "the adapter has learned something"
    copied = found["AutoTokenizer"].from_pretrained(tmp_path / "my_model")
    assert copied("3+4=").input_ids == found["ids"]
    plain.generation_config.eos_token_id = None
    written = plain.generate(rows, max_new_tokens=4, do_sample=False)[0, 4:].tolist()
    assert found["greedy"](trained, [found["ids"]], max_new_tokens=4, stop=None) == [written]
    assert found["answer"] == (written[: written.index(BYTES - 1)] if BYTES - 1 in written else written)
