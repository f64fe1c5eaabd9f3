from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from espalier.torchvision_shim import import_torchvision


def test_torchvision_and_diffusers_work_after_the_shim() -> None:
    code = (
        "from espalier.torchvision_shim import import_torchvision\n"
        "first = import_torchvision(); assert import_torchvision() is first\n"
        "from torchvision import datasets, transforms, models\n"
        "import torch\n"
        "assert transforms.functional.hflip(torch.tensor([[1, 2]])).tolist() == [[2, 1]]\n"
        "from diffusers import UNet2DModel\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_failure_of_another_kind_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="driver too old"):
        import_torchvision()
