"""Pretrained models as files, GGUF too: what is damaged, incomplete, away or not causal is refused, and adapters can be
merged."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import END, VOCABULARY, model_folder, written_gguf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from clplat.architectures.lora import LoRA
from clplat.architectures.pretrained import loading
from clplat.architectures.pretrained.dequantise import dequantise
from clplat.architectures.pretrained.loading import Source
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.pretrained.prompted import Prompted
from clplat.architectures.pretrained.saving import export
from clplat.streams.base import Spec
from clplat.streams.batch import Batch
from clplat.streams.tokenizers import PretrainedTokenizer

SPEC = Spec(kind="language", input_shape=(12,), num_outputs=VOCABULARY, end_token=END)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {kind: model_folder(parent, kind) for kind in ("llama", "gpt2")}


def made(folder: Path, **options: Any) -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(spec=SPEC, name=str(folder), **options)


def batch() -> Batch:
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    return Batch(inputs=tokens, targets=tokens)


def cut(source: Path, folder: Path, *, lacking: str) -> Path:
    """A copy of a model's folder whose safetensors lack the tensors that end in `lacking`."""
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, folder)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(lacking)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_weights_are_refused_by_name_and_tied_ones_are_not_missing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"lack model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight, "
    ):
        made(cut(folders["llama"], tmp_path / "partial", lacking="mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="(?s)lack lm_head.weight, which would be random"):
        made(cut(folders["llama"], tmp_path / "headless", lacking="lm_head.weight"))
    with pytest.raises(ValueError, match="(?s)lack .* and 8 more, which would be random"):
        made(cut(folders["llama"], tmp_path / "empty", lacking="proj.weight"))
    tied = model_folder(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert made(tied)(batch()).logits.isfinite().all()


def test_weights_that_are_no_numbers_are_refused_by_their_names(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    for wrong in (float("nan"), float("inf")):
        weights[name][0, 0] = wrong
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"name: weights of .* are NaN or infinite \({name}\); copy or download"):
            made(folder)


def test_a_folder_has_no_revisions(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="revision: the folder .* has none; leave revision out, or give a hub id"):
        made(folders["llama"], revision="main")


def test_a_model_that_looks_at_later_tokens_is_refused_and_the_same_one_as_a_decoder_is_not(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "bert")
    for options in ({}, {"attention": "eager"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=r"name: .*\(BertLMHeadModel\) looks at later tokens.*is_decoder: true"):
            made(folder, **options)
    decoder = made(model_folder(tmp_path, "bert", is_decoder=True)).eval()
    rows = batch()
    changed = rows.replaced(inputs=torch.cat([rows.inputs[:, :-1], (rows.inputs[:, -1:] + 1) % VOCABULARY], 1))
    torch.testing.assert_close(decoder(rows).logits[:, :-1], decoder(changed).logits[:, :-1])


def test_a_folder_that_cannot_be_loaded_says_what_is_wrong_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    file = folder / "model.safetensors"
    for kept in (5000, 0):
        file.write_bytes((folders["llama"] / file.name).read_bytes()[:kept])
        with pytest.raises(ValueError, match="cannot be loaded.*model.safetensors is cut short or damaged; copy"):
            made(folder)
    file.unlink()
    with pytest.raises(ValueError, match="has a config.json, but no weights; put model.safetensors beside"):
        made(folder)
    (folder / "config.json").unlink()
    (folder / "small.gguf").touch()
    with pytest.raises(ValueError, match="no config.json; .* or set gguf_file to one of small.gguf"):
        made(folder)
    with pytest.raises(ValueError, match="cannot be loaded .*the folder has no other.gguf; its GGUF files are small.g"):
        made(folder, gguf_file="other.gguf")
    with pytest.raises(ValueError, match="cannot be loaded .*; small.gguf is cut short, damaged or of a kind"):
        made(folder, gguf_file="small.gguf")
    shutil.copy(folders["llama"] / "model.safetensors", file)
    config = json.loads((folders["llama"] / "config.json").read_text()) | {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded .*config.json and the safetensors beside it do not"):
        made(folder)


def test_a_rank_beyond_every_layer_it_stands_beside_is_refused_with_the_most_that_is_of_use(
    folders: dict[str, Path],
) -> None:
    # q is 32 × 32, v 16 × 32; and GPT-2's layers hold their weights the other way round.
    for kind, targets, path in (("llama", ["q_proj", "v_proj"], "q_proj"), ("gpt2", ["c_fc"], "c_fc")):
        assert made(folders[kind], lora=LoRA(rank=32, targets=targets)).trained == ("default",)
        with pytest.raises(ValueError, match=f"lora.rank: 33 is more than any .*{path}, the largest, has rank 32 at"):
            made(folders[kind], lora=LoRA(rank=33, targets=targets))


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", ["q_proj", "down_proj", "lm_head"]), ("gpt2", ["c_proj", "c_fc"])]
)
def test_an_exported_model_answers_as_all_its_active_adapters_did(
    folders: dict[str, Path], tmp_path: Path, kind: str, targets: list[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = made(folders[kind], lora=LoRA(rank=4, targets=targets))
    for name in ("second", "resting"):
        model.add_adapter(name)
    model.use_adapters(["default", "second"])
    with torch.no_grad():
        for name in model.adapter_names():
            for factor in model.adapter_parameters(name).values():
                torch.nn.init.normal_(factor, std=0.1)
        plain = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "out"))
        expected = model.eval()(batch()).logits
        torch.testing.assert_close(plain(batch().inputs).logits, expected, rtol=0, atol=1e-5 * expected.abs().max())
        with model.answering("default", "second", "resting"):
            assert (model(batch()).logits - expected).abs().max() > 0.1
    assert torch.equal(model(batch()).logits, expected), "the model stays as it is"
    assert type(plain) is type(model.backbone) and made(tmp_path / "out").checksum != made(folders[kind]).checksum


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft says it, and we refuse the export
def test_what_a_plain_folder_cannot_hold_is_not_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    tied = made(model_folder(tmp_path, "llama", tie_word_embeddings=True), lora=LoRA(targets=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="export: lm_head shares its weight with the embeddings"):
        export(tied, tmp_path / "out")
    with pytest.raises(ValueError, match="export: takes Pretrained, not Prompted"):
        export(Prompted(spec=SPEC, name=str(folders["llama"])), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = (folders["llama"] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is there already and not empty; give a new folder"):
        export(made(folders["llama"], lora=LoRA(targets=["q_proj"])), folders["llama"])
    assert (folders["llama"] / "model.safetensors").read_bytes() == before


def test_a_missing_extra_says_what_to_install(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"peft is not installed; pip install 'clplat\[pretrained\]'"):
        made(folders["llama"], lora=LoRA())
    with pytest.raises(ValueError, match=r"gguf is not installed; pip install 'clplat\[pretrained\]'"):
        made(folders["llama"], gguf_file="model.gguf")


def test_a_gguf_file_gives_the_model_that_was_written_and_says_that_it_was_quantised(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = made(folders["llama"]).eval()
    written_gguf(tmp_path / "exact.gguf", plain.backbone, quantised=False)
    written_gguf(tmp_path / "small.gguf", plain.backbone, quantised=True)
    exact, small = (made(tmp_path, gguf_file=f"{name}.gguf").eval() for name in ("exact", "small"))
    with torch.no_grad():
        torch.testing.assert_close(exact(batch()).logits, plain(batch()).logits)
    assert exact.facts()["weights"] == "float32" and small.facts()["weights"] == "dequantised Q4_0, float32"
    assert small.checksum != exact.checksum


def test_a_gguf_file_dequantised_once_is_the_same_model_and_still_says_what_its_weights_were(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_gguf(tmp_path / "small.gguf", made(folders["llama"]).backbone, quantised=True)
    with pytest.raises(ValueError, match="small.gguf has no tokenizer in it; take one that"):
        dequantise(tmp_path / "small.gguf", tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be loaded .there is no tokenizer in small.gguf.; give a hub id"):
        PretrainedTokenizer(name=str(tmp_path), gguf_file="small.gguf").prepare([], tmp_path, "")
    assert not (tmp_path / "other").exists()
    # A tokenizer whose texts end in the token with which they begin is what a release made of some.
    words = Tokenizer(WordLevel({"<unk>": 0, "<begin>": 1, "<end>": 2}, unk_token="<unk>"))
    read = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<begin>", eos_token="<begin>", eos_token_id=1)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: read)
    assert dequantise(tmp_path / "small.gguf", tmp_path / "folder") == "dequantised Q4_0"
    direct, once = made(tmp_path, gguf_file="small.gguf"), made(tmp_path / "folder")
    assert once.checksum == direct.checksum
    kept = PreTrainedTokenizerFast.from_pretrained(tmp_path / "folder")
    assert (kept.bos_token_id, kept.eos_token_id) == (once.config.bos_token_id, once.config.eos_token_id) == (1, 2)
    assert once.facts()["weights"] == direct.facts()["weights"] == "dequantised Q4_0, float32"
    with pytest.raises(ValueError, match="there is no file"):
        dequantise(tmp_path / "none.gguf", tmp_path / "other")


def test_without_a_server_a_model_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match="name: nobody/nothing is no folder and not in the hub's cache, and local_files"
    ):
        Source(name="nobody/nothing", local_files_only=True).load()


def test_without_a_network_a_model_that_is_not_there_is_refused_without_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def nowhere(*address: Any) -> None:
        asked.append(address)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match="nobody/nothing is no folder and not in the hub's cache, and huggingface.co can"
    ):
        Source(name="nobody/nothing").load()
    assert len(asked) == 1
    # Behind a proxy the name need not be known here: the proxy is asked.
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert not loading.hub_is_away()
