"""The Python environment: what is missing, out of range or there twice is one line with the remedy."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from espalier import cli, distribution, environment
from espalier.errors import ConfigError


def add_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


def test_this_environment_is_sound() -> None:
    environment.check_installation()
    environment.check_libraries("client", "cloud")


@pytest.mark.parametrize(("name", "version"), [("Espalier", "0.1.2"), ("espalier", "0.1.0")])
def test_another_distribution_of_the_packages_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    add_distribution(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        environment.check_installation()
    said = str(caught.value)
    assert f"two Espaliers: {tmp_path}" in said
    assert f"{name} {version}" in said
    assert "run `pip uninstall espalier espalier-fl`" in said


def test_packages_of_two_installations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "espalier_server"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    places = environment._place
    monkeypatch.setattr(
        environment, "_place", lambda name: package.parent if name == "espalier_server" else places(name)
    )
    with pytest.raises(ConfigError, match=r"two Espaliers: .*, espalier_server from"):
        environment.check_installation()


def test_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "NAME", "espalier-none")
    with pytest.raises(ConfigError, match="no distribution 'espalier-none'; run `pip install -e"):
        environment.check_installation()


def test_an_extra_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = {"torch", "pillow"}
    real = environment._installed
    monkeypatch.setattr(environment, "_installed", lambda name: None if name in lacking else real(name))
    for command, extra in (
        (["cloud", "--state", "st"], "cloud"),
        (["client", "--name", "c", "--edge", "127.0.0.1:1", "--state", "st", "--data", "d"], "client"),
        (["demo"], "cloud"),
        (["sample", "folder"], "cloud"),
    ):
        monkeypatch.setattr(sys, "argv", ["espalier", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.startswith("error: ")
        assert "torch" in said
        assert f"not installed in {sys.prefix}" in said
        assert f"pip install 'espalier-fl[{extra}]'" in said
        assert said.count("\n") == 1


def test_a_flower_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment._installed
    monkeypatch.setattr(environment, "_installed", lambda name: "9.9.0" if name == "flwr" else real(name))
    wanted = next(r for r in distribution.requirements() if r.name == "flwr")
    with pytest.raises(ConfigError) as caught:
        environment.check_libraries()
    assert f"flwr 9.9.0 in {sys.prefix} is out of range" in str(caught.value)
    assert f"pip install 'flwr{wanted.specifier}'" in str(caught.value)


def test_a_library_that_could_not_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = {"": ["grpcio"], "client": ["pillow"], "privacy": ["opacus==1.6.*"]}
    monkeypatch.setattr(distribution, "extras", lambda: ("client", "privacy"))
    monkeypatch.setattr(
        distribution, "requirements", lambda extra="": tuple(Requirement(r) for r in requirements[extra])
    )
    for module, said in (
        ("PIL.Image", "pillow is not installed in .*; run: pip install 'espalier-fl\\[client\\]'"),
        ("opacus", "opacus is not installed in .*; run: pip install 'espalier-fl\\[privacy\\]'"),
        ("grpc", "grpcio is not installed in .*; run: pip install espalier-fl$"),
    ):
        error = environment.explain(ModuleNotFoundError(name=module))
        assert error is not None
        with pytest.raises(ConfigError, match=said):
            raise error
    assert environment.explain(ModuleNotFoundError(name="their_own_module")) is None
