"""StyleGAN3 and StyleGAN-XL from pickles."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from espalier.errors import ConfigError
from espalier.generators.base import open_generator
from espalier_server.generators.stylegan import StyleGanGenerator
from tests.support.generator_laws import check, seeded

CPU = torch.device("cpu")


STYLEGAN = """
import torch
from torch import nn

opened = []

class Mapping(nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, num_ws):
        super().__init__()
        self.linear, self.num_ws, self.c_dim = nn.Linear(z_dim + c_dim, w_dim), num_ws, c_dim

    def forward(self, z, c, truncation_psi=0.5):
        assert truncation_psi == 1
        assert (c is None) == (self.c_dim == 0)
        x = z if c is None else torch.cat((z, c), 1)
        return self.linear(x)[:, None].repeat(1, self.num_ws, 1)

class Synthesis(nn.Module):
    def __init__(self, w_dim, num_ws):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w_dim, 3 * 16 * 16) for _ in range(num_ws))

    def forward(self, ws, noise_mode="random"):
        noise = 0 if noise_mode == "const" else torch.randn(len(ws), 3 * 16 * 16)
        x = sum(layer(ws[:, i]) for i, layer in enumerate(self.layers)) + noise
        return x.reshape(-1, 3, 16, 16)

class Network(nn.Module):
    def __init__(self, c_dim=0):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = 6, c_dim, 9, 3
        self.mapping, self.synthesis = Mapping(6, c_dim, 9, 3), Synthesis(9, 3)

    def __setstate__(self, state):
        opened.append(1)
        super().__setstate__(state)
"""


@pytest.fixture
def stylegan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "tiny_stylegan.py").write_text(STYLEGAN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_stylegan", raising=False)
    torch.manual_seed(0)
    return importlib.import_module("tiny_stylegan")


def pickled(content: object, file: Path) -> Path:
    file.write_bytes(pickle.dumps(content))
    return file


@pytest.mark.parametrize(("kind", "c_dim"), [("stylegan3", 0), ("stylegan-xl", 4)])
def test_a_stylegan_is_opened_only_when_trusted(
    kind: str, c_dim: int, stylegan: ModuleType, tmp_path: Path
) -> None:
    network = stylegan.Network(c_dim)
    file = pickled({"G": None, "D": None, "G_ema": network}, tmp_path / "net.pkl")
    stylegan.opened.clear()
    with pytest.raises(ConfigError, match="trust-pickle=true"):
        open_generator(f"{kind}:{file}", device="cpu")
    assert not stylegan.opened  # nothing of it ran
    generator = open_generator(f"{kind}:{file}", trust_pickle=True, device="cpu")
    assert stylegan.opened
    check(generator, 9)
    latents = generator.sample_latents(2, seeded(3))
    with torch.no_grad():
        expected = network.synthesis(latents[:, None].repeat(1, 3, 1), noise_mode="const")
    assert torch.allclose(generator.synthesise(latents, 16, 3), expected.clamp(-1, 1), atol=1e-6)


def test_latents_of_stylegan_xl_are_of_random_classes(stylegan: ModuleType) -> None:
    network = stylegan.Network(4)
    with torch.no_grad():
        network.mapping.linear.weight[:, :6] = 0
        network.mapping.linear.weight[:4, 6:] = torch.eye(4)
        network.mapping.linear.bias.zero_()
    latents = StyleGanGenerator(network, CPU, classes=True).sample_latents(400, seeded(0))
    counts = latents[:, :4].sum(0)
    assert torch.equal(latents[:, :4].sum(1), torch.ones(400))
    assert counts.min() > 60  # 100 expected, deviation 9


def test_a_pickle_of_something_else_is_refused(stylegan: ModuleType, tmp_path: Path) -> None:
    def refused(content: object, message: str, kind: str = "stylegan3") -> None:
        with pytest.raises(ConfigError, match=message):
            open_generator(f"{kind}:{pickled(content, tmp_path / 'x.pkl')}", trust_pickle=True, device="cpu")

    refused({"D": stylegan.Network()}, "neither a network")
    refused([1, 2], "neither a network")
    refused(nn.Linear(2, 2), "no mapping, synthesis, num_ws")
    refused(stylegan.Network(), "write stylegan3:", "stylegan-xl")
    refused(stylegan.Network(4), "write stylegan-xl:")
    broken = tmp_path / "broken.pkl"
    broken.write_bytes(b"\x80\x04no pickle")
    with pytest.raises(ConfigError, match=r"broken.pkl cannot be unpickled"):
        open_generator(f"stylegan3:{broken}", trust_pickle=True, device="cpu")


def test_the_code_that_a_pickle_lacks_is_named(
    stylegan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pickled(stylegan.Network(), tmp_path / "net.pkl")
    (tmp_path / "tiny_stylegan.py").unlink()
    monkeypatch.delitem(sys.modules, "tiny_stylegan")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="needs the module 'tiny_stylegan'"):
        open_generator(f"stylegan3:{file}", trust_pickle=True, device="cpu")
