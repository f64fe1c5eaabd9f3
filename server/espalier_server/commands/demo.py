"""`espalier demo`: starts a tree of real processes on this machine, trains one run, and stops them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from espalier.config.fields import FlatValue
from espalier.data.spec import parse_spec
from espalier.errors import ConfigError, EspalierError
from espalier.security.transport import Address
from espalier_server.commands.follow import check_folder, describe_result, prepare, run_to_end
from espalier_server.commands.run_view import RunView
from espalier_server.processes import (
    Group,
    espalier_command,
    espalier_env,
    free_ports,
    listens,
    signals_interrupt,
)
from espalier_server.records.events import EVENTS_FILE
from espalier_server.superlink.clouds import Cloud, find_cloud, running_clouds

#: Settings that differ from the defaults, for a run of minutes on two cores.
DEMO: dict[str, FlatValue] = {
    "rounds": 60,
    "rg": 5,
    "learning-rate": 0.002,
    "batch-size": 16,
    "ema-decay": 0.5,
    "eval-every": 2,
    "eval-samples": 256,
    "sample-steps": 20,
}

READY_SECONDS = 90.0


def run_demo(edges: int, clients: int, data: str, out: Path, settings: Mapping[str, FlatValue]) -> str:
    """Start a cloud, edges and clients, train one run and stop all processes; return the status of the run.

    Parameters
    ----------
    edges, clients : int
        Number of processes of each kind; every client connects to every edge.
    data : str
        ``SOURCE`` or ``SOURCE:SCHEME``; client i of n gets ``SOURCE:i/n:SCHEME``, and quality is measured
        against the whole data set.
    out : Path
        The run's folder; its ``processes/`` holds the logs and state folders of the processes.
    settings : mapping
        Flat settings that override those of `DEMO`.

    Raises
    ------
    EspalierError
        A setting is invalid, a process does not start, or the run failed.
    """
    if edges < 1 or clients < 1:
        raise ConfigError(f"--edges {edges} --clients {clients}: a tree needs at least one of each")
    source, _, scheme = data.partition(":")
    parse_spec(":".join(filter(None, [source, f"0/{clients}", scheme])))
    tree: dict[str, FlatValue] = {"eval-data": source, "min-edges": edges, "min-clients": clients}
    out = out.expanduser().resolve()
    view = RunView()
    _rename_earlier(out, view)
    from espalier.methods.run_config import with_defaults  # late: the methods load Flower

    config = prepare(with_defaults(DEMO, {**tree, **settings}), out)
    with signals_interrupt(), Group() as group:
        # Start the edges together with the cloud, and the clients together with the ServerApp, which takes longest:
        # start-up is most of the duration of a short demonstration.
        folder = out / "processes"
        name, listen, control = _start_cloud(group, folder)
        addresses = _start_edges(group, folder, listen, edges)
        cloud = _ready_cloud(group, name, listen, control)
        reported: set[str] = set()

        def check(view: RunView) -> None:
            _check(group, view, reported)

        with view:
            status = run_to_end(
                cloud, config, view, check, lambda: _start_clients(group, folder, addresses, clients, data)
            )
    view.print_line(describe_result(out, status))
    return status


def _rename_earlier(out: Path, view: RunView) -> None:
    """Rename the folder of an earlier demonstration, so that its results are not overwritten."""
    if not (out / EVENTS_FILE).exists():
        check_folder(out, "demo")
        # State folders of a demonstration that ended before its run was submitted.
        shutil.rmtree(out / "processes", ignore_errors=True)
        return
    number = 1
    while (renamed := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(renamed)
    view.print_line(f"the earlier run in {out} is now {renamed}")


def _start_cloud(group: Group, folder: Path) -> tuple[str, Address, Address]:
    """Start the cloud; return its name and its addresses for edges and for commands."""
    fleet, control = (Address("127.0.0.1", port) for port in free_ports(2))
    name = f"demo-{uuid.uuid4().hex[:6]}"
    arguments = ["--listen", str(fleet), "--control", str(control), "--name", name]
    command = espalier_command("cloud", *arguments, "--state", str(folder / "cloud"))
    group.start("cloud", command, folder / "cloud.log", espalier_env())
    return name, fleet, control


def _ready_cloud(group: Group, name: str, fleet: Address, control: Address) -> Cloud:
    def ready() -> bool:
        named = any(cloud.name == name for cloud in running_clouds())
        return named and listens(*fleet) and listens(*control)

    group.wait_until(ready, "the cloud", READY_SECONDS)
    return find_cloud(name)


def _start_edges(group: Group, folder: Path, cloud: Address, edges: int) -> list[Path]:
    """Start the edges; return the files to which they write their addresses."""
    for number in range(1, edges + 1):
        name = f"edge-{number}"
        arguments = ["--name", name, "--cloud", str(cloud), "--listen", "127.0.0.1:0"]
        command = espalier_command("edge", *arguments, "--state", str(folder / name))
        group.start(name, command, folder / f"{name}.log", espalier_env())
    return [folder / f"edge-{number}" / "address" for number in range(1, edges + 1)]


def _start_clients(group: Group, folder: Path, addresses: list[Path], clients: int, data: str) -> None:
    """Start the clients once every edge has written its address."""
    threads = max(1, (os.cpu_count() or 1) // clients)
    group.wait_until(
        lambda: all(path.exists() and path.read_text().endswith("\n") for path in addresses),
        "an edge",
        READY_SECONDS,
    )
    homes = [word for path in addresses for word in ("--edge", path.read_text(encoding="utf-8").strip())]
    source, _, scheme = data.partition(":")
    for number in range(clients):
        name = f"client-{number + 1}"
        share = ":".join(filter(None, [source, f"{number}/{clients}", scheme]))
        arguments = ["--name", name, *homes, "--data", share, "--threads", str(threads)]
        command = espalier_command("client", *arguments, "--state", str(folder / name))
        group.start(name, command, folder / f"{name}.log", espalier_env())


def _check(group: Group, view: RunView, reported: set[str]) -> None:
    """Fail if a process ends before all clients have joined; after that, report it and continue."""
    for process in group.ended():
        if process.name == "cloud" or not view.state.clients:
            group.check()
        if process.name not in reported:
            reported.add(process.name)
            view.print_line(f"{process.name} ended: {process.last_lines()} (log: {process.log})")
            if all(other in group.ended() for other in group.processes if other.name.startswith("client-")):
                raise EspalierError("every client has ended")
