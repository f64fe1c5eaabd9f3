"""A trained model on disk: safetensors and JSON, opened again as a diffusers pipeline, pruned or not.

The folder holds ``model.safetensors``, ``architecture.json`` (the ArchitectureSpec in protobuf's JSON form),
``scheduler_config.json`` (diffusers' own form) and ``model_index.json`` (what it is, and the caller's notes).
diffusers' own ``from_pretrained`` builds a net from its configuration alone and so cannot open a pruned one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.json_format import ParseDict, ParseError
from safetensors import SafetensorError
from torch import nn

from espalier.errors import StateError
from espalier.models.architecture import build_with, describe, to_json
from espalier.models.noise_schedule import ScheduleSettings, ddim_schedule
from espalier.storage.atomic import replacing_folder, write_error
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from diffusers import DDIMPipeline, DDIMScheduler

_WEIGHTS, _ARCHITECTURE = "model.safetensors", "architecture.json"
_SCHEDULER, _INDEX = "scheduler_config.json", "model_index.json"
_FORMAT = 1


def save_model(
    folder: Path,
    model: nn.Module,
    *,
    schedule: ScheduleSettings,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder; an existing one is replaced atomically.

    Parameters
    ----------
    folder : Path
        The folder; its parent is created if needed.
    model : nn.Module
        A UNet2DModel, pruned or not, on any device.
    schedule : ScheduleSettings
        The run's configuration, or an object with its ``timesteps``, ``beta_start`` and ``beta_end``.
    metadata : mapping, optional
        JSON values to store with it (run id, round, quality).

    Raises
    ------
    StateError
        The folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    index = {"format": _FORMAT, "pipeline": "DDIMPipeline", "metadata": dict(metadata or {})}
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    texts = {
        _ARCHITECTURE: to_json(describe(model)),
        _SCHEDULER: ddim_schedule(schedule).to_json_string(),
        _INDEX: json.dumps(index, indent=1),
    }
    try:
        with replacing_folder(folder) as new:
            save_file(tensors, new / _WEIGHTS)
            for name, text in texts.items():
                (new / name).write_text(text + "\n", encoding="utf-8")
    except SafetensorError as error:
        raise write_error(folder, error) from error


def load_model(folder: Path) -> tuple[nn.Module, DDIMScheduler, dict[str, Any]]:
    """Read a folder that :func:`save_model` wrote.

    Returns
    -------
    nn.Module
        The network, on the CPU, in evaluation mode.
    DDIMScheduler
        Its sampling schedule.
    dict
        The metadata.

    Raises
    ------
    StateError
        A file is missing or damaged; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StateError(f"{folder} is not a model folder; give the `model` folder of a run")
    index = _read_json(folder / _INDEX)
    if index.get("format") != _FORMAT:
        raise _damaged(folder / _INDEX, f"format {index.get('format')!r} instead of {_FORMAT}")
    try:
        spec = ParseDict(_read_json(folder / _ARCHITECTURE), pb.ArchitectureSpec())
    except ParseError as error:
        raise _damaged(folder / _ARCHITECTURE, str(error)) from error
    from safetensors.torch import load_file

    try:
        model = build_with(spec, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(folder / _WEIGHTS, str(error)) from error
    from diffusers import DDIMScheduler

    try:
        scheduler = DDIMScheduler.from_config(_read_json(folder / _SCHEDULER))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _damaged(folder / _SCHEDULER, str(error)) from error
    metadata = index.get("metadata", {})
    return model.eval(), cast("DDIMScheduler", scheduler), metadata if isinstance(metadata, dict) else {}


def load_pipeline(folder: Path | str) -> DDIMPipeline:
    """Open a model folder as a diffusers DDIMPipeline, e.g. ``load_pipeline("runs/demo/model")(batch_size=16)``.

    Raises
    ------
    StateError
        A file is missing or damaged; the message names it.
    """
    model, scheduler, _ = load_model(Path(folder))
    from diffusers import DDIMPipeline

    return cast("DDIMPipeline", DDIMPipeline(unet=model, scheduler=scheduler))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    return content


def _damaged(path: Path, reason: str) -> StateError:
    state = "is damaged" if path.exists() else "is missing"
    return StateError(
        f"{path} {state} ({reason}); save the model again, or take it from a checkpoint of the run"
    )
