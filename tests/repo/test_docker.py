"""The compose files, build files and scripts of docker/, checked without docker; `make test-docker` checks the rest."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from espalier.config.assignments import parse_assignments
from espalier.data.spec import parse_spec
from espalier.methods.run_config import RunConfig
from espalier.security.keys import CLIENT_KEYS, EDGE_KEYS, KeyRegistry
from espalier_server.commands.demo import DEMO
from tests.support.command_line import options
from tests.support.paths import ROOT

MACHINES = sorted((ROOT / "docker" / "machines").glob("*.yml"))
LONG_RUNNING = {"cloud", "edge-1", "edge-2", "client"}
ONE_SHOT = {"certs", "run"}


def load(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return read


def script(name: str) -> ModuleType:
    """Import a script of docker/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = load(ROOT / "docker-compose.yml")["services"]
    return found


def test_the_services(services: dict[str, Any]) -> None:
    assert set(services) == LONG_RUNNING | ONE_SHOT


def test_clients_reach_edges_only_and_edges_the_cloud(services: dict[str, Any]) -> None:
    assert services["cloud"]["networks"] == ["core"]
    assert services["client"]["networks"] == ["field"]
    for edge in ("edge-1", "edge-2"):
        assert sorted(services[edge]["networks"]) == ["core", "field"]
        assert services[edge]["sysctls"] == {"net.ipv4.ip_forward": 0}
    assert services["run"]["network_mode"] == "service:cloud"
    assert services["certs"]["network_mode"] == "none"
    assert load(ROOT / "docker-compose.yml")["networks"] == {
        "core": {"internal": True},
        "field": {"internal": True},
    }


def test_no_container_has_more_rights_than_it_needs(services: dict[str, Any]) -> None:
    tier = load(ROOT / "docker" / "tier.yml")["services"]["tier"]
    assert tier["read_only"] is True
    assert tier["cap_drop"] == ["ALL"]
    assert tier["security_opt"] == ["no-new-privileges:true"]
    machines = {path.name: next(iter(load(path)["services"].values())) for path in MACHINES}
    for name, service in {**services, **machines}.items():
        # compose v2 fails on a machine without the image if two services build the same tag concurrently.
        built = name == "certs" or name in machines
        assert service["extends"]["service"] == ("built" if built else "tier"), name
        assert not {"privileged", "cap_add", "pid", "ipc", "devices", "security_opt", "read_only"} & set(
            service
        )
        assert "mem_limit" in service, name
        assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped"), name
        assert ("healthcheck" in service) == (name not in ONE_SHOT), name
        assert "--insecure" not in service["command"], name
        assert not any("docker.sock" in volume for volume in service["volumes"]), name


def test_volumes_exist_and_keep_secrets_apart(services: dict[str, Any]) -> None:
    mounted = {name: {v.split(":")[0] for v in service["volumes"]} for name, service in services.items()}
    assert set().union(*mounted.values()) == set(load(ROOT / "docker-compose.yml")["volumes"])
    assert [name for name, volumes in mounted.items() if "authority" in volumes] == ["certs"]
    assert mounted["cloud"] == mounted["run"] == {"cloud", "runs"}
    for name in ("edge-1", "edge-2"):
        assert mounted[name] == {name}
    assert mounted["client"] == {"clients"}


def test_volumes_belong_to_the_user_of_the_image(services: dict[str, Any]) -> None:
    """A new volume takes the owner of the folder it is mounted on first, if the image has that folder."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    made = re.search(r"install -d -o espalier .*?\n *(/.*)", dockerfile)
    assert made is not None
    targets = {volume.split(":")[1] for service in services.values() for volume in service["volumes"]}
    assert targets == set(made[1].split())


@pytest.mark.parametrize("path", [ROOT / "docker-compose.yml", *MACHINES], ids=lambda path: path.name)
def test_commands_have_the_options_they_are_given(path: Path) -> None:
    for name, service in load(path)["services"].items():
        if name == "certs":
            continue
        words = service["command"].split()
        command = "client" if words[0].startswith("-") else words[0]
        given = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert given <= options(command), name
        if "healthcheck" in service:
            test = service["healthcheck"]["test"]
            assert test[:3] == ["CMD", "espalier", "health"], name
            assert {word for word in test if word.startswith("--")} <= options("health"), name


def test_run_trains_what_the_demo_trains(services: dict[str, Any]) -> None:
    command = re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", services["run"]["command"])
    assert "$" not in command
    settings = parse_assignments(re.findall(r"-c (\S+)", command))
    assert DEMO.items() <= settings.items()
    config = RunConfig.from_flat(settings)
    assert (config.method, config.min_edges, config.min_clients) == ("fedphd", 2, 4)


@pytest.mark.parametrize(
    "path",
    [ROOT / "docker-compose.yml", ROOT / "docker" / "tier.yml", ROOT / "docker" / "gpu.yml"],
    ids=lambda p: p.name,
)
def test_every_variable_has_a_default_and_is_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    explained = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", text):
        assert rest.startswith((":-", "-")), name
        line = re.search(rf"^#{name}=(\S*)", explained, re.MULTILINE)
        assert line is not None, name
        assert line[1] == re.sub("^:?-", "", rest).split(" ")[0] or rest == ":-", name


def test_the_gpu_overlay_changes_services_that_exist(services: dict[str, Any]) -> None:
    overlay = load(ROOT / "docker" / "gpu.yml")["services"]
    assert set(overlay) == {"cloud", "client"}
    assert overlay["cloud"]["build"]["args"]["COMPUTE"] == "cuda"
    for service in overlay.values():
        assert service["image"] == "${IMAGE:-espalier}:cuda"
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_each_machine_has_its_file() -> None:
    assert [path.stem for path in MACHINES] == ["client", "cloud", "edge"]
    for path in MACHINES:
        (service,) = load(path)["services"].values()
        assert service["user"].startswith("${OWNER:?"), path
        assert ("ports" in service) == (path.stem != "client")
        assert {volume.rsplit(":/", 1)[1].split(":")[0] for volume in service["volumes"]} >= {
            "state",
            "certs",
        }


# --- the image -----------------------------------------------------------------------------------------


def test_the_image_is_staged_portable_and_not_root() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("FROM ") for line in lines) >= 3
    assert not re.search(r"amd64|x86_64|aarch64|--platform", "\n".join(lines))
    assert [line for line in lines if line.startswith("USER ")] == ["USER espalier"]
    assert any("useradd --uid 10001" in line for line in lines)


def test_the_build_context_has_all_packages_and_little_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    let_in = {line[1:].split("/")[0] for line in ignore if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(project["tool"]["hatch"]["build"]["dev-mode-dirs"])
    assert let_in == packages | {"constraints.txt", "docker", "LICENSE", "README.md", "pyproject.toml"}
    for line in ignore:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line


def test_requirements_are_those_of_the_project() -> None:
    requirements = script("requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    assert requirements.requirements(project, []) == base
    lines = requirements.requirements(project, ["cloud", "client"])
    assert extras["cloud"][0] == "espalier-fl[client]"
    assert lines == base + extras["client"] + extras["cloud"][1:]
    first = [line for line in lines if requirements.is_first(line)]
    assert [line.split(">=")[0] for line in first] == ["torch", "torchvision"]
    assert not any(requirements.is_first(line) for line in base)
    with pytest.raises(SystemExit, match="clouds"):
        requirements.requirements(project, ["clouds"])


@pytest.mark.parametrize("extras", ["", "client", "cloud", "client,testbed"])
def test_the_dockerfile_installs_torch_first_then_the_rest(
    extras: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    requirements = script("requirements")
    installed = {}
    for arguments, file in re.findall(r"requirements\.py (\S+ \S+(?: \S+)?) > (\S+)", dockerfile):
        command, pyproject, *given = arguments.split()
        requirements.main(
            command, str(ROOT / pyproject), *(word.replace('"$EXTRAS"', extras) for word in given)
        )
        installed[file] = capsys.readouterr().out.split("\n")[:-1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, rest = installed["first.txt"], installed["rest.txt"]
    assert [re.split(r"\W", line)[0] for line in first if line] == (
        ["torch", "torchvision"] if extras else []
    )
    lines = requirements.requirements(project, [name for name in extras.split(",") if name])
    assert sorted(line for line in first + rest if line) == sorted(lines)


def test_a_cuda_build_of_torch_is_refused_in_an_image_for_cpus() -> None:
    requirements = script("requirements")

    def plan(*names: str) -> dict[str, Any]:
        return {"install": [{"metadata": {"name": name}} for name in names]}

    requirements.check_cpu(plan("torch", "sympy"))
    with pytest.raises(SystemExit, match=r"(?s)nvidia-cublas.*TORCH_INDEX"):
        requirements.check_cpu(plan("torch", "sympy", "nvidia-cublas"))


# --- places of clients -----------------------------------------------------------------------------------


def test_every_container_takes_a_place_of_its_own(tmp_path: Path) -> None:
    place = script("place")
    assert [place.take(tmp_path, 3) for _ in range(3)] == [1, 2, 3]
    assert (tmp_path / "client-3").stat().st_mode & 0o777 == 0o700
    with pytest.raises(SystemExit, match="PLACES"):
        place.take(tmp_path, 3)


def test_places_beyond_the_shares_use_another_partition_seed() -> None:
    place = script("place")
    env = {"DATA": "digits", "SCHEME": "similarity=100+rotate=4", "SHARES": "4"}
    shares = [place.share(number, env) for number in range(1, 10)]
    assert len(set(shares)) == 9
    specs = [parse_spec(text) for text in shares]
    assert [(spec.index, spec.clients, spec.scheme.seed) for spec in specs[:4]] == [
        (index, 4, parse_spec("digits").scheme.seed) for index in range(4)
    ]
    assert shares[5] == "digits:1/4:similarity=100,seed=1+rotate=4"
    assert shares[8] == "digits:0/4:similarity=100,seed=2+rotate=4"
    assert all(spec.extras.rotate == 4 for spec in specs)


# --- certificates and keys -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of volumes that the service `certs` filled."""
    folder = tmp_path_factory.mktemp("tiers")
    for name in ("authority", "cloud", "edge-1", "edge-2", "clients"):
        (folder / name).mkdir()
    created = script("provision").provision(folder, ["edge-1", "edge-2"], 3)
    assert len(created) == 1 + 3 + 3  # an authority, certificates of three servers, keys of three clients
    return folder


def test_certs_creates_the_files_that_the_commands_name(tiers: Path, services: dict[str, Any]) -> None:
    """Every file below /state that a command names is in that tier's volume."""
    for name, volume in {
        "cloud": "cloud",
        "edge-1": "edge-1",
        "edge-2": "edge-2",
        "client": "clients",
    }.items():
        words = services[name]["command"].split() + services[name]["healthcheck"]["test"]
        files = [word.removeprefix("/state/") for word in words if word.startswith("/state/")]
        assert files, name
        for file in files:
            assert (tiers / volume / file).is_file(), f"{name}: {file}"
    assert (tiers / "clients" / "client-3" / "node.key").stat().st_mode & 0o777 == 0o600


def test_certs_admits_edges_and_clients_only(tiers: Path) -> None:
    def names(path: Path) -> list[str]:
        return [entry.name for entry in KeyRegistry(path).entries() if not entry.revoked]

    clients = ["client-1", "client-2", "client-3"]
    assert names(tiers / "cloud" / EDGE_KEYS) == ["edge-1", "edge-2"]
    for tier in ("cloud", "edge-1", "edge-2"):
        assert names(tiers / tier / CLIENT_KEYS) == clients
    secrets = {path.relative_to(tiers).parts[0] for path in tiers.rglob("ca.key")}
    assert secrets == {"authority"}


def test_certs_keeps_existing_files_and_renews_expiring_certificates(
    tiers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision = script("provision")
    before = (tiers / "edge-1" / "tls" / "server.pem").read_bytes()
    assert provision.provision(tiers, ["edge-1", "edge-2"], 3) == []
    assert (tiers / "edge-1" / "tls" / "server.pem").read_bytes() == before
    key = (tiers / "edge-1" / "tls" / "node.key").read_bytes()
    monkeypatch.setattr(provision, "RENEW_DAYS", 400.0)  # more than a certificate's lifetime
    assert len(provision.provision(tiers, ["edge-1", "edge-2"], 3)) == 3
    assert (tiers / "edge-1" / "tls" / "server.pem").read_bytes() != before
    assert (tiers / "edge-1" / "tls" / "node.key").read_bytes() == key
