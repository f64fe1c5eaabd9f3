"""diffusers without its optional packages: a client imports none, others still can, the numbers are the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOK = """
import hashlib, sys
import torch
from espalier.diffusers_shim import leave_out_optional, OPTIONAL
{first}
from espalier.models.unet import unet
from espalier.models.noise_schedule import noise_schedule
from espalier.tasks.diffusion_settings import DiffusionSettings
torch.set_num_threads(1)
torch.manual_seed(3)
model = unet("unet-tiny", 1, 8)
schedule = noise_schedule(DiffusionSettings())
noisy = schedule.add_noise(torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4) * 200)
model(noisy, torch.arange(4), return_dict=False)[0].square().mean().backward()
digest = hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters())).hexdigest()
found = [name for name in OPTIONAL if name in sys.modules]
import scipy.stats
print(digest, *found)
"""


def words(first: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(first=first)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_a_client_imports_no_optional_package() -> None:
    pytest.importorskip("scipy")
    all_of_it, alone = words(""), words("leave_out_optional()")
    assert "scipy" in all_of_it[1:]  # else there is nothing to leave out
    assert alone[1:] == []
    assert alone[0] == all_of_it[0]


def test_what_is_imported_already_stays() -> None:
    pytest.importorskip("scipy")
    assert words("leave_out_optional(); import scipy")[1:] == ["scipy"]
