"""Final models in MLflow's model registry: weights, and the plain data from which the architecture is built again.

A registered model is a folder of the run's artifacts: `weights.pt` (tensors and plain data, read with `weights_only`),
`config.yaml` and `spec.json`, with MLflow's own `MLmodel` beside them. No code is pickled. What answers is the
architecture with its last weights; a strategy that answers in its place (`predict`, other views) stays with the run.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clplat.api import run_folder_of
from clplat.assembly import built_architecture, load_weights
from clplat.checkpoint import Checkpoints
from clplat.config import RunConfig, load_run, parse
from clplat.errors import ConfigError
from clplat.journal import last_status
from clplat.mlflow_store import client, short
from clplat.storage import read_json
from clplat.streams.base import Spec, Stream
from clplat.tracking import RUN_STATE
from clplat.yaml_text import parse_yaml

if TYPE_CHECKING:
    from clplat.architectures.base import Architecture

FOLDER = "model"
"""Where among a run's artifacts its model lies."""


def register(run: str | Path, name: str | None = None) -> Any:
    """Put the final model of a finished run into the registry as the next version of `name`; MLflow's model version.

    `name` is STUDY-VARIANT by default. Raises `ConfigError`, with what to do, for a run that has not finished, has no
    checkpoint, or is not in MLflow.
    """
    folder = run_folder_of(run)
    config, state = load_run(folder / "config.yaml"), _finished_state(folder)
    name = name or f"{config.study}-{config.variant}"
    if not name.strip() or set(name) & set("/:"):
        raise ConfigError(f"--name: {name!r} cannot name a registered model; leave out / and :")
    known = read_json(folder / RUN_STATE)
    if known is None or not known["run_id"]:
        raise ConfigError(f"{folder}: MLflow has not got this run; `clplat sync {folder}` sends it")
    with tempfile.TemporaryDirectory() as scratch:
        _write(Path(scratch), folder, config, state, known["run_id"])
        try:
            return _send(client(known["uri"]), known["run_id"], Path(scratch), name, config)
        except Exception as error:  # noqa: BLE001 - a server can fail in any way
            raise ConfigError(f"{folder}: MLflow at {known['uri']} does not take the model ({short(error)})") from error


def _finished_state(folder: Path) -> dict[str, Any]:
    status = last_status(folder)
    if status != "FINISHED":
        raise ConfigError(f"{folder}: has not finished ({status}); `clplat resume {folder}` finishes it")
    state = Checkpoints(folder, every_seconds=0).load()
    if state is None:
        raise ConfigError(
            f"{folder}: no checkpoint is left, and so no weights; put its folder `checkpoints` back, or run it in a "
            "new study"
        )
    return state


def _write(place: Path, folder: Path, config: RunConfig, state: dict[str, Any], run_id: str) -> None:
    from mlflow.models import Model

    from clplat.assembly import prepared_stream

    weights = {"structure": state["structure"], "architecture": state["architecture"]}
    torch.save(weights, place / "weights.pt")
    shutil.copyfile(folder / "config.yaml", place / "config.yaml")
    (place / "spec.json").write_text(json.dumps(dataclasses.asdict(prepared_stream(config).spec)))
    flavour = {"weights": "weights.pt", "config": "config.yaml", "spec": "spec.json", "load": "clplat.load_model"}
    Model(artifact_path=FOLDER, run_id=run_id, flavors={"clplat": flavour}).save(place / "MLmodel")


def _send(connection: Any, run_id: str, place: Path, name: str, config: RunConfig) -> Any:
    from mlflow.exceptions import MlflowException

    connection.log_artifacts(run_id, str(place), FOLDER)
    try:
        connection.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run = connection.get_run(run_id)
    score = run.data.metrics.get("final_score")
    return connection.create_model_version(
        name, source=f"{run.info.artifact_uri}/{FOLDER}", run_id=run_id,
        description=f"{config.variant}, seed {config.seed}, of {config.study}. "
        f'`clplat.load_model("models:/{name}/VERSION")` builds it.',
        tags={"variant": config.variant, "seed": str(config.seed)} | ({"final_score": f"{score:.4f}"} if score else {}),
    )  # fmt: skip


def load(model: str, uri: str) -> Architecture:
    """The architecture of `models:/NAME/VERSION` in the registry at `uri`, in evaluation mode, on the CPU.

    Its data are not needed. Classes that its configuration names are imported, as with any configuration.
    """
    connection = client(uri)
    try:
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as scratch:
            files = Path(download_artifacts(model, dst_path=scratch, tracking_uri=connection.tracking_uri))
            config = parse(RunConfig, parse_yaml((files / "config.yaml").read_text()))
            spec = json.loads((files / "spec.json").read_text())
            state = torch.load(files / "weights.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{model}: MLflow at {uri} does not give this model ({short(error)})") from error
    stream = Stream()
    stream.spec = Spec(**spec | {"input_shape": tuple(spec["input_shape"])})
    architecture = built_architecture(config, stream)
    load_weights(architecture, state, config.training.precision)
    return architecture.eval()
