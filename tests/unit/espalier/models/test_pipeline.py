from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from espalier.errors import StateError
from espalier.models.pipeline import load_model, load_pipeline, save_model
from espalier.models.pruning import prune
from espalier.models.sampling import sample
from espalier.models.unet import unet
from espalier.tasks.diffusion_settings import DiffusionSettings

SETTINGS = DiffusionSettings(timesteps=200, sample_steps=10)


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    torch.manual_seed(0)
    return prune(unet("unet-tiny", 1, 8), 0.2)


@pytest.fixture
def saved(pruned: nn.Module, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", pruned, schedule=SETTINGS, metadata={"run": "r1", "round": 7})
    return tmp_path / "model"


def test_a_pruned_pipeline_round_trip(pruned: nn.Module, saved: Path) -> None:
    pipeline = load_pipeline(saved)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="pt"
    ).images
    expected = sample(pruned, count=2, steps=5, seed=3, settings=SETTINGS)
    assert torch.allclose(drawn, expected / 2 + 0.5, atol=1e-5)
    assert pipeline(1, num_inference_steps=2).images[0].size == (8, 8)


def test_schedule_and_notes_come_back(saved: Path) -> None:
    model, scheduler, metadata = load_model(saved)
    assert scheduler.config.num_train_timesteps == 200
    assert scheduler.config.timestep_spacing == "trailing"
    assert metadata == {"run": "r1", "round": 7}
    assert not model.training


def test_saving_replaces_the_previous_model(saved: Path) -> None:
    (saved / "stale.txt").write_text("left over")
    save_model(saved, unet("unet-tiny", 3, 16), schedule=SETTINGS)
    assert sorted(p.name for p in saved.iterdir()) == [
        "architecture.json", "model.safetensors", "model_index.json", "scheduler_config.json",
    ]  # fmt: skip
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    assert load_pipeline(saved).unet.config.in_channels == 3


def test_a_save_that_fails_leaves_the_former_model(
    saved: Path, pruned: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StateError, match=r"cannot write .*model: no space left"):
        save_model(saved, pruned, schedule=SETTINGS)
    monkeypatch.undo()
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    assert load_model(saved)[2]["run"] == "r1"


@pytest.mark.parametrize(
    "name", ["architecture.json", "model.safetensors", "model_index.json", "scheduler_config.json"]
)
def test_a_missing_or_damaged_file_is_named(name: str, saved: Path) -> None:
    file = saved / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(StateError, match=rf"{name} is damaged"):
        load_pipeline(saved)
    file.unlink()
    with pytest.raises(StateError, match=rf"{name} is missing"):
        load_pipeline(saved)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("architecture.json", {"family": "gan"}, "is unknown"),
        ("architecture.json", {"colour": 1}, "architecture.json is damaged"),
        ("model_index.json", {"format": 9}, "format 9 instead of 1"),
        ("scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler_config.json is damaged"),
    ],
)
def test_content_that_makes_no_sense_is_refused(
    name: str, changes: dict[str, object], message: str, saved: Path
) -> None:
    (saved / name).write_text(json.dumps(json.loads((saved / name).read_text()) | changes))
    with pytest.raises(StateError, match=message):
        load_pipeline(saved)


def test_no_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is not a model folder"):
        load_pipeline(tmp_path / "nowhere")
