"""The command `espalier certs`: creates certificates and node keys, in one folder per authority or machine."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from espalier.errors import ConfigError, StateError
from espalier.storage.atomic import write_bytes

if TYPE_CHECKING:
    from espalier.security.certificates import Facts, Pair

app = typer.Typer(help="Make certificates and node keys.", no_args_is_help=True, rich_markup_mode=None)

CA, CA_KEY = "ca.pem", "ca.key"
CERTIFICATE, PRIVATE_KEY = "server.pem", "server.key"
NODE_KEY, NODE_PUBLIC = "node.key", "node.pub"

Authority = Annotated[Path, typer.Option("--dir", help="Folder of the authority.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write to; by default one below --dir.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        help="DNS name or IP address that others connect to; repeatable. By default a renewal takes the old ones.",
    ),
]
Days = Annotated[float, typer.Option(min=0.01, help="Days of validity.")]
Renew = Annotated[bool, typer.Option("--renew", help="Make a new certificate; the old file is renamed.")]
RenewKey = Annotated[bool, typer.Option("--renew-key", help="Make a new node key; the old file is renamed.")]
Format = Annotated[Literal["text", "json"], typer.Option("--format", help="Output format.")]


@app.command()
def init(
    folder: Authority = Path("certs"),
    name: Annotated[str, typer.Option(help="Name of the authority.")] = "Espalier",
    days: Days = 3650.0,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new authority; ca.pem then contains it and the old one.")
    ] = False,
    retire: Annotated[bool, typer.Option("--retire", help="Remove the old authorities from ca.pem.")] = False,
) -> None:
    """Make the authority that signs servers' certificates; its folder is secret."""
    from espalier_server.certificate_authority import in_force, new_authority

    roots = folder / CA
    if retire:
        valid = in_force(_read(roots), str(roots))[:1]
        if not valid:
            raise ConfigError(f"{roots} has expired; make a new authority with --renew")
        write_bytes(roots, valid[0], 0o644)
        typer.echo(f"{roots}: one authority; copy it to every machine")
        return
    _refuse_overwriting(roots, renew, "--renew")
    old = in_force(_read(roots), str(roots)) if roots.exists() else []
    pair = new_authority(name, days)
    _make_folder(folder)
    for path in (roots, folder / CA_KEY):
        _rename_old(path)
    write_bytes(folder / CA_KEY, pair.private_key, 0o600)
    write_bytes(roots, b"".join([pair.certificate, *old]), 0o644)
    typer.echo(f"{roots}: verifies servers on every machine (--root-certificates)")
    typer.echo(f"{folder / CA_KEY}: the authority's private key; do not copy it")
    if old:
        typer.echo(
            "next: copy ca.pem to every machine, renew the servers' certificates, then `certs init --retire`"
        )


@app.command()
def cloud(
    hosts: Hosts = None,
    folder: Authority = Path("certs"),
    out: Out = None,
    days: Days = 365.0,
    renew: Renew = False,
) -> None:
    """Make the cloud's certificate."""
    out = out or folder / "cloud"
    _refuse_overwriting(out / CERTIFICATE, renew, "--renew")
    _certify(folder, out, hosts, days)


@app.command()
def edge(
    name: Annotated[str, typer.Option(help="Name of the edge.")],
    hosts: Hosts = None,
    folder: Authority = Path("certs"),
    out: Out = None,
    days: Days = 365.0,
    renew: Renew = False,
    renew_key: RenewKey = False,
) -> None:
    """Make an edge's certificate (for its clients) and its node key (for the cloud)."""
    from espalier.names import check_name

    check_name(name, "--name")
    out = out or folder / name
    has_both = (out / CERTIFICATE).exists() and (out / NODE_KEY).exists()
    if has_both and not renew and not renew_key:
        _refuse_overwriting(out / CERTIFICATE, False, "--renew or --renew-key")
    if renew or not (out / CERTIFICATE).exists():
        _certify(folder, out, hosts, days)
    if renew_key or not (out / NODE_KEY).exists():
        _make_node_key(out)
        typer.echo(f"register it at the cloud: espalier edges add {name} {out / NODE_PUBLIC} --state DIR")


@app.command()
def client(
    name: Annotated[str, typer.Option(help="Name of the client.")],
    folder: Authority = Path("certs"),
    out: Out = None,
    renew_key: RenewKey = False,
) -> None:
    """Make a client's node key."""
    from espalier.names import check_name

    check_name(name, "--name")
    out = out or folder / name
    _refuse_overwriting(out / NODE_KEY, renew_key, "--renew-key")
    _make_folder(out)
    _make_node_key(out)
    if (folder / CA).exists():
        write_bytes(out / CA, _read(folder / CA), 0o644)
        typer.echo(f"{out / CA}: --root-certificates")
    typer.echo(
        f"register it at its edges and at the cloud: espalier clients add {name} {out / NODE_PUBLIC} --state DIR"
    )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A PEM file, or a folder with some.")] = Path("certs"),
    form: Format = "text",
) -> None:
    """Print the subjects of certificates and when they expire."""
    from espalier.security.certificates import facts

    files = sorted(path.rglob("*.pem")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} contains no .pem file; create one with `espalier certs init`")
    rows = [(file, entry) for file in files for entry in facts(_read(file), str(file))]
    if form == "json":
        typer.echo(json.dumps([_as_dict(file, entry) for file, entry in rows], indent=1))
        return
    for file, entry in rows:
        left = f"{entry.days_left:.0f} days left" if entry.days_left > 0 else "EXPIRED"
        what = "authority" if entry.authority else f"for {', '.join(entry.hosts) or 'no host'}"
        typer.echo(
            f"{file}: {entry.subject}, {what}; by {entry.issuer}; until {entry.ends:%Y-%m-%d} ({left})"
        )


# --- files -----------------------------------------------------------------------------------------


def _as_dict(file: Path, entry: Facts) -> dict[str, object]:
    return {
        "file": str(file),
        "subject": entry.subject,
        "issuer": entry.issuer,
        "hosts": list(entry.hosts),
        "authority": entry.authority,
        "begins": entry.begins.isoformat(),
        "ends": entry.ends.isoformat(),
        "days_left": round(entry.days_left, 2),
        "sha256": entry.fingerprint,
    }


def _certify(folder: Path, out: Path, hosts: list[str] | None, days: float) -> None:
    """Write a new server certificate, its key and the authorities into `out`."""
    from espalier.security.certificates import facts
    from espalier_server.certificate_authority import OWN_HOSTS, issue

    if not hosts and (out / CERTIFICATE).exists():
        hosts = list(facts(_read(out / CERTIFICATE), str(out / CERTIFICATE))[0].hosts)
    if not hosts:
        raise ConfigError("--host is missing: the name or address that others connect to; repeatable")
    pair = issue(_authority(folder), list(dict.fromkeys([*hosts, *OWN_HOSTS])), days)
    _make_folder(out)
    for name in (CERTIFICATE, PRIVATE_KEY):
        _rename_old(out / name)
    write_bytes(out / PRIVATE_KEY, pair.private_key, 0o600)
    write_bytes(out / CERTIFICATE, pair.certificate, 0o644)
    write_bytes(out / CA, _read(folder / CA), 0o644)
    typer.echo(f"{out / CERTIFICATE}: --certificate")
    typer.echo(f"{out / PRIVATE_KEY}: --private-key")
    typer.echo(f"{out / CA}: --root-certificates")


def _make_node_key(out: Path) -> None:
    from espalier_server.certificate_authority import node_key_pair

    private, public = node_key_pair()
    for name in (NODE_KEY, NODE_PUBLIC):
        _rename_old(out / name)
    write_bytes(out / NODE_KEY, private, 0o600)
    write_bytes(out / NODE_PUBLIC, public, 0o644)
    typer.echo(f"{out / NODE_KEY}: --key")
    typer.echo(f"{out / NODE_PUBLIC}: its public key")


def _authority(folder: Path) -> Pair:
    from espalier.security.certificates import Pair

    if not (folder / CA_KEY).exists():
        raise ConfigError(
            f"{folder} contains no authority; create one with `espalier certs init --dir {folder}`"
        )
    return Pair(_read(folder / CA), _read(folder / CA_KEY))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _refuse_overwriting(path: Path, renew: bool, flag: str) -> None:
    if path.exists() and not renew:
        raise ConfigError(f"{path} exists; {flag} makes a new one and renames the old one")


def _rename_old(path: Path) -> None:
    """Rename a file before it is replaced."""
    if path.exists():
        now = datetime.datetime.now(datetime.UTC)
        path.rename(path.with_name(f"{path.name}.until-{now:%Y%m%dT%H%M%S.%f}"))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateError(f"cannot make {folder}: {error.strerror}; give another --out or --dir") from error
