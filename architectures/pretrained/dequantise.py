"""A GGUF file as a folder of `transformers`, made once, so that runs need not dequantise it each time they start.

    python -m clplat.architectures.pretrained.dequantise MODEL.gguf FOLDER

The folder holds float32 safetensors, `config.json` and the tokenizer. What the weights were is written into the
configuration, and every run says it (`architecture.weights: dequantised Q4_1, float32`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from clplat.architectures.pretrained.loading import ORIGIN, Source, need


def dequantise(file: Path, folder: Path) -> str:
    """Write the folder; what the weights were, in words. A ValueError says what cannot be read and why."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    need("gguf", "accelerate")
    from transformers import AutoTokenizer

    check_new(folder)
    source = Source(name=str(file.parent.resolve()), gguf_file=file.name, local_files_only=True)
    model = cast(Any, source.load())
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, gguf_file=file.name)
    except KeyError as error:
        raise ValueError(f"{file} has no tokenizer in it; take one that llama.cpp's converter wrote") from error
    origin = as_plain(model, source)
    model.save_pretrained(folder)
    _end_as(model.config, tokenizer)
    tokenizer.save_pretrained(folder)
    return origin


def check_new(folder: str | Path) -> None:
    """ValueError where a model would be written over what is there: runs may have been trained beside it."""
    if Path(folder).is_file() or (Path(folder).is_dir() and any(Path(folder).iterdir())):
        raise ValueError(f"{folder} is there already and not empty; give a new folder")


def _end_as(config: Any, tokenizer: Any) -> None:
    """Give the tokenizer the model's special tokens: transformers 5.17 reads the first token of a text from GGUF as the
    last one too."""
    for role in ("bos", "eos", "pad"):
        if isinstance(number := getattr(config, f"{role}_token_id", None), int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(number))
            tokenizer.init_kwargs.pop(f"{role}_token_id", None)


def as_plain(model: Any, source: Source) -> str:
    """Let a model read from GGUF be written as what it is in memory, plain weights; what they were, in words."""
    origin = source.weights(model.config).partition(",")[0]
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model.config, ORIGIN, origin)
    return origin


def main() -> None:
    """Entry point of the command above."""
    parser = argparse.ArgumentParser(description="write a GGUF file as a folder of float32 safetensors")
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="where to write")
    given = parser.parse_args()
    try:
        print(f"{given.folder}: {dequantise(given.file, given.folder)}")
    except (ValueError, OSError) as error:
        sys.exit(f"dequantise: {error}")


if __name__ == "__main__":
    main()
