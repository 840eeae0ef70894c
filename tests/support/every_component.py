"""A tiny study for every architecture and every strategy there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from question_runs import BYTES, run_of
from small_models import model_folder
from studies import parity, study

STEPS = 3


def part(class_path: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": options}


def digits(**changes: Any) -> dict[str, Any]:
    """Two tasks of digits on a small MLP without dropout."""
    base = {
        "stream": part("SplitDigits", num_tasks=2, class_order=[0, 1, 2, 3]),
        "architecture": part("MLP", hidden_sizes=[12]), "training__budget": {"steps": STEPS},
    }  # fmt: skip
    return study(**base | changes)


def text(architecture: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Two tasks of short token rows."""
    stream = part(
        "MQAR", pairs=[2, 3], lengths=[12], vocab_size=16, train_rows=48, val_rows=4, test_rows=9
    )  # fmt: skip
    optimizer = part("AdamW", lr=1e-3)
    return digits(stream=stream, architecture=architecture, training__optimizer=optimizer, **changes)


def labelled(architecture: dict[str, Any]) -> dict[str, Any]:
    data = parity(architecture=architecture, training__budget={"steps": STEPS}, training__batch_size=16)
    data["stream"]["init_args"] |= {"last": 3, "train_rows": 64}
    return data


def images(architecture: dict[str, Any]) -> dict[str, Any]:
    return digits(architecture=architecture)


TARGET = part("MLP", hidden_sizes=[8])
SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "Transformer": SMALL | {"dropout": 0.1},
    "MoETransformer": SMALL | {"num_experts": 4, "inner_size": 16},
    "DeepSeekTransformer": SMALL,
    "Mamba": SMALL,
    "MemoryTransformer": {"hidden_size": 16},
    "Hope": SMALL,
    "HopeAttention": SMALL,
    "TRC2": {"hidden_size": 32, "num_layers": 3, "column": {"num_heads": 4, "inner_size": 16, "num_experts": 4},
             "hippocampus": {"slots": 12, "k_read": 3}, "write": {"chunk": 4, "quota": 6}},
    "TRC2V1": SMALL,
}  # fmt: skip
RECURRENT = ("LeakyRNN", "LSTM", "GRU")
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "ConvNet": {"width": 8, "depth": 2}, "ResNet18": {}, "SlimResNet18": {}, "ResNet32": {"width": 4},
}  # fmt: skip


def architectures() -> dict[str, dict[str, Any]]:
    """A study for each architecture that reads no pretrained weights."""
    found = {name: text(part(name, **options)) for name, options in DECODERS.items()}
    found |= {name: labelled(part(name, hidden_size=8)) for name in RECURRENT}
    found |= {name: images(part(name, **options)) for name, options in CONVOLUTIONS.items()}
    found["MLP"] = images(part("MLP", hidden_sizes=[12], dropout=0.1))
    hypernetworks = {"ChunkedHypernetwork": {}, "RecurrentHypernetwork": {"hidden_size": 8, "grow_by": 2}}
    return found | {
        name: images(part(name, target=TARGET, chunk_size=200, **options)) for name, options in hypernetworks.items()
    }


REPLAYS: dict[str, dict[str, Any]] = {
    "ExperienceReplay": {"capacity": 21, "from_task": 1}, "DERpp": {"capacity": 21}, "DER": {"capacity": 21},
    "ERACE": {"capacity": 21}, "SCR": {"capacity": 21}, "iCaRL": {"capacity": 21}, "GDumb": {"capacity": 21},
}  # fmt: skip
"""On a stream whose rows are more than these hold."""
PENALTIES: dict[str, dict[str, Any]] = {
    "EWC": {"strength": 5.0, "fisher_samples": 8}, "OnlineEWC": {"strength": 5.0, "fisher_samples": 8},
    "MAS": {"strength": 1.0, "samples": 8}, "SI": {"strength": 1.0}, "RWalk": {"strength": 1.0}, "LwF": {},
    "GEM": {"patterns_per_task": 8}, "AGEM": {"patterns_per_task": 8, "sample_size": 8},
    "FastSlow": {"episodes": 2}, "PrototypeAnswers": {}, "InterpolatedWeights": {}, "MemoryOff": {},
    "Naive": {}, "Joint": {}, "Cumulative": {}, "ZeroShot": {},
}  # fmt: skip


def strategies() -> dict[str, dict[str, Any]]:
    """A study for each strategy that needs no pretrained model."""
    found = {name: digits(strategies={"own": part(name, **o)}) for name, o in (REPLAYS | PENALTIES).items()}
    memory = text(part("MemoryTransformer", hidden_size=16), strategies={"own": part("MemoryOff")})
    hypernetwork = digits(
        architecture=part("ChunkedHypernetwork", target=TARGET, chunk_size=200),
        strategies={"own": part("HypernetworkRegularizer", strength=0.1)},
    )
    controlled = digits(
        strategies={
            "own": part("ReplayController", every=2),
            "replay": part("ExperienceReplay", capacity=20, policy="ring_reservoir", from_task=1),
        }
    )
    return found | {
        "MemoryOff": memory, "HypernetworkRegularizer": hypernetwork, "ReplayController": controlled
    }  # fmt: skip


def with_files(folder: Path) -> dict[str, dict[str, Any]]:
    """A study for each component that reads files, which are written into `folder`: pretrained models above all."""
    for name, plus in (("plus", 1), ("minus", 0)):
        (folder / "tasks" / name).mkdir(parents=True)
        rows = [{"prompt": f"{a} {b}=", "answer": f"{a + plus * b:02d}"} for a in range(9) for b in range(9)]
        for kind, chosen in (("train", rows[::2]), ("eval", rows[1::4]), ("test", rows[3::4])):
            (folder / "tasks" / name / f"{kind}.json").write_text(json.dumps(chosen))
    model = str(model_folder(folder, "llama", vocab_size=BYTES, eos_token_id=BYTES - 1))
    lora = part("Pretrained", name=model, lora={"rank": 4, "dropout": 0.0})
    prompted = part("Prompted", name=model)
    locas = part("LocasModel", model=part("Pretrained", name=model), memory={"rank": 4})
    cases = {
        "Pretrained": (part("Pretrained", name=model), {}),
        "ILoRA": (lora, part("ILoRA", capacity=12, decay=0.5)),
        "OLoRA": (lora, part("OLoRA", norm=0.1)),
        "AdapterPerTask": (lora, part("AdapterPerTask")),
        "ProgressivePrompts": (prompted, part("ProgressivePrompts", length=3)),
        "PromptPool": (prompted, part("PromptPool", size=4, length=2, top_k=2, query_tokens=3)),
        "LocasModel": (locas, part("Locas", after_task="stack")),
    }
    found = {"TextClassifier": _classified(folder), "Playback": _played_back(folder)}
    adapted = part("Adapted", model=part("Transformer", **SMALL), lora={"rank": 4})
    found["Adapted"] = text(adapted, strategies={"own": part("OLoRA", norm=0.1)})
    for name, (architecture, own) in cases.items():
        data = run_of((folder / "tasks", Path(model)), folder / "cache", architecture=architecture)
        data["stream"]["init_args"]["max_answers"] = 0
        data["training"] |= {"budget": {"steps": STEPS}}
        found[name] = data | {"strategies": {"own": own} if own else {}}
    return found


def _classified(folder: Path) -> dict[str, Any]:
    """Texts of two tasks, each of two labels that their words give away."""
    files = {}
    for kind, count in {"train": 12, "val": 4, "test": 5}.items():
        rows = [
            {"text": f"it is {label} {n}", "label": label} for label in ("ap", "pe", "sa", "ra") for n in range(count)
        ]
        files[kind] = str(folder / f"{kind}.jsonl")
        Path(files[kind]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = {"fruit": ["ap", "pe"], "tool": ["sa", "ra"]}
    return digits(
        stream=part("LabelledTextStream", source={"data_files": files}, groups=groups, mode="classify"),
        architecture=part("TextClassifier", hidden_size=16, num_layers=1, num_heads=2),
    )


def _played_back(folder: Path) -> dict[str, Any]:
    decision = {"kind": "decision", "event": "step", "step": 2, "strategy": "replay", "knob": "ratio", "value": 0.5}
    path = folder / "decisions.jsonl"
    path.write_text(json.dumps(decision | {"task": "classes-0-1"}) + "\n")
    replay = part("ExperienceReplay", capacity=20, from_task=1)
    return digits(strategies={"own": part("Playback", decisions=str(path)), "replay": replay})
