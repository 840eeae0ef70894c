"""Parameters of TRC² and of the models that it is compared with, beside the published numbers (arXiv:2602.22479,
project page).

    python benchmarks/trc2_sizes.py

Models are built on the `meta` device: nothing is allocated, and it takes a second. Active parameters are those that one
token passes through, of TRC² without its critics; operations are those of a forward pass for each of 1024 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clplat.architectures.base import Architecture
from clplat.architectures.deepseek_transformer import DeepSeekTransformer
from clplat.architectures.mamba import Mamba
from clplat.architectures.mixture_of_experts import expert_size
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.transformer import Transformer
from clplat.architectures.trc2.model import TRC2
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(1024,), num_outputs=50_304)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published size in millions, and what builds it: class, hidden size, layers, other options."""

    label: str
    model: type[Architecture]
    hidden_size: int
    num_layers: int
    published: float
    options: dict[str, int | float]

    def built(self) -> Architecture:
        with torch.device("meta"):
            sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers}
            return self.model(spec=TEXT, **sizes, **self.options)


def sizes() -> list[Size]:
    """In the order of the published table; Mamba twice, as its authors build it and in the form that fits."""

    def several(label, model, rows, options):
        return [
            Size(label=label, model=model, hidden_size=width, num_layers=layers, published=published, options=own)
            for (width, layers, published), own in zip(rows, options)
        ]

    mamba = [(512, 28, 151), (768, 18, 202), (1024, 12, 245)]
    fed = [{"state_size": 128, "mlp_size": expert_size(width)} for width, *_ in mamba]
    dense = [(512, 28, 144), (768, 20, 228), (1024, 16, 321)]
    columns = [(256, 24, 149), (512, 10, 254), (768, 4, 226), (768, 8, 408), (1024, 6, 560)]
    return [
        *several("Transformer", Transformer, dense, 3 * [{"num_heads": 8, "mlp_ratio": 4.0}]),
        *several("MoE", MoETransformer, [(512, 16, 345), (768, 10, 441), (1024, 6, 493)], 3 * [{"num_heads": 8}]),
        *several("Mamba", Mamba, mamba, 3 * [{}]),
        *several("Mamba, SwiGLU, N = 128", Mamba, mamba, fed),
        *several(
            "DeepSeek", DeepSeekTransformer, [(512, 14, 338), (768, 6, 308), (1024, 6, 545)], 3 * [{"num_heads": 8}]
        ),
        *several("TRC²", TRC2, columns, 5 * [{}]),
    ]


def main() -> None:
    print("model | hidden/layers | parameters | published | difference | active | forward operations a token")
    print("|".join(7 * ["---"]))
    for size in sizes():
        model = size.built()
        total, active = sum(p.numel() for p in model.parameters()) / 1e6, model.active_parameters() / 1e6
        operations = model.flops_per_row() / 1024 / 1e6
        cells = [size.label, f"{size.hidden_size}/{size.num_layers}", f"{total:.1f}M", f"{size.published:.0f}M"]
        cells += [f"{100 * (total / size.published - 1):+.2f} %", f"{active:.1f}M", f"{operations:.0f}M"]
        print(" | ".join(cells))


if __name__ == "__main__":
    main()
