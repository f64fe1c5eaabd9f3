"""The commands `espalier clients` and `espalier edges`: the registered node keys in a state folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from espalier.errors import ConfigError

State = Annotated[Path, typer.Option("--state", help="State folder of the cloud or edge; it may be running.")]
EdgeState = Annotated[Path, typer.Option("--state", help="State folder of the cloud; it may be running.")]
Name = Annotated[str, typer.Argument(help="Name of the node, its --name.")]
PublicKey = Annotated[Path, typer.Argument(metavar="KEY.pub", help="Its public node key, OpenSSH or PEM.")]
Runs = Annotated[
    list[Path] | None,
    typer.Option("--runs", help="Folder with runs: list those whose report names it; repeatable."),
]
Format = Annotated[Literal["text", "json"], typer.Option("--format", help="How to print.")]

clients = typer.Typer(
    help="Register and revoke the node keys of clients.", no_args_is_help=True, rich_markup_mode=None
)
edges = typer.Typer(
    help="Register and revoke the node keys of edges.", no_args_is_help=True, rich_markup_mode=None
)


@clients.command("list")
def list_clients(state: State, form: Format = "text") -> None:
    """List the registered clients."""
    _list(_files("client", state), form)


@clients.command("add")
def add_client(name: Name, key: PublicKey, state: State) -> None:
    """Register a client; a running cloud or edge admits it within a few seconds."""
    _add(_files("client", state), name, key)


@clients.command("revoke")
def revoke_client(name: Name, state: State) -> None:
    """Revoke a client's key, for good."""
    _revoke(_files("client", state), name)


@clients.command("forget")
def forget_client(name: Name, state: State, runs: Runs = None) -> None:
    """Delete what this state folder holds about a client, its keys included."""
    _forget(_files("client", state), name, runs)


@edges.command("list")
def list_edges(state: EdgeState, form: Format = "text") -> None:
    """List the registered edges."""
    _list(_files("edge", state), form)


@edges.command("add")
def add_edge(name: Name, key: PublicKey, state: EdgeState) -> None:
    """Register an edge; a running cloud admits it within a few seconds."""
    _add(_files("edge", state), name, key)


@edges.command("revoke")
def revoke_edge(name: Name, state: EdgeState) -> None:
    """Revoke an edge's key, for good."""
    _revoke(_files("edge", state), name)


@edges.command("forget")
def forget_edge(name: Name, state: EdgeState, runs: Runs = None) -> None:
    """Delete what this state folder holds about an edge, its keys included."""
    _forget(_files("edge", state), name, runs)


# --- shared -------------------------------------------------------------------------------


class Files(NamedTuple):
    """Files in a state folder: keys of one kind of node, keys of the other kind, names claimed on first use."""

    keys: Path
    others: Path
    names: Path


def _files(kind: Literal["client", "edge"], state: Path) -> Files:
    from espalier.security.keys import CLIENT_KEYS, EDGE_KEYS
    from espalier.security.name_registry import CLIENT_NAMES, EDGE_NAMES

    clients, edges = state / CLIENT_KEYS, state / EDGE_KEYS
    if kind == "client":
        return Files(clients, edges, state / CLIENT_NAMES)
    return Files(edges, clients, state / EDGE_NAMES)


def _list(files: Files, form: str) -> None:
    from espalier.security.keys import KeyRegistry, fingerprint, openssh

    entries = KeyRegistry(files.keys).entries()
    if form == "json":
        rows = [
            {
                "name": e.name,
                "revoked": e.revoked,
                "added": e.added,
                "fingerprint": fingerprint(e.public_key),
                "public_key": openssh(e.public_key).decode().strip(),
            }
            for e in entries
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    for e in entries:
        typer.echo(f"{e.name}  {fingerprint(e.public_key)}  {e.added}{'  REVOKED' if e.revoked else ''}")
    if not entries:
        typer.echo(f"no key in {files.keys}")


def _add(files: Files, name: str, key: Path) -> None:
    from espalier.security.keys import KeyRegistry, canonical, fingerprint

    try:
        content = key.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {key}: {error.strerror}; give the .pub file of a node key") from error
    if b"PRIVATE" in content:
        raise ConfigError(f"{key} is a private key; give its public half, the .pub file")
    public_key = canonical(content, name)
    # An edge with a client's key could sign messages as that client.
    if any(entry.public_key == public_key for entry in KeyRegistry(files.others).entries()):
        raise ConfigError(f"this key is in {files.others}; an edge and a client need different keys")
    entry = KeyRegistry(files.keys).add(name, public_key)
    typer.echo(f"{entry.name} {fingerprint(entry.public_key)} is in {files.keys}")


def _revoke(files: Files, name: str) -> None:
    from espalier.security.keys import KeyRegistry, fingerprint

    entry = KeyRegistry(files.keys).revoke(name)
    typer.echo(f"{name} {fingerprint(entry.public_key)} is revoked in {files.keys}")


def _forget(files: Files, name: str, runs: list[Path] | None) -> None:
    """Delete a name's keys and its claim to the name; list the runs whose report still names it."""
    from espalier.security.keys import KeyRegistry
    from espalier.security.name_registry import NameRegistry

    gone = [f"its key in {files.keys.name}"] if KeyRegistry(files.keys).forget(name) else []
    if NameRegistry(files.names).forget(name):
        gone.append(f"its name in {files.names.name}")
    where = files.keys.parent
    typer.echo(f"{name}: deleted {' and '.join(gone)}" if gone else f"{name}: nothing to delete in {where}")
    if not runs:
        typer.echo("the folders of finished runs are not changed; --runs DIR lists those that name it")
    for folder in _runs_that_name(runs or [], name):
        typer.echo(f"not changed: the report and checkpoints in {folder} name {name}")


def _runs_that_name(folders: list[Path], name: str) -> list[Path]:
    """Return the folders of runs, in `folders` or below, whose report contains a name."""
    from espalier.storage.run_folder import REPORT_FILE

    reports = [path for folder in folders for path in sorted(folder.rglob(REPORT_FILE))]
    return [path.parent for path in reports if json.dumps(name) in path.read_text(encoding="utf-8")]
