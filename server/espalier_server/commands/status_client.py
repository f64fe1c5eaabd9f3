"""Asking a Monitor service: one snapshot, or one after the other."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from espalier.errors import ConfigError
from espalier.monitor.channel import open_channel
from espalier.security.transport import Security, parse_address
from espalier_proto import monitor_pb2 as mpb
from espalier_proto.monitor_pb2_grpc import MonitorStub
from espalier_server.superlink.clouds import find_cloud


def monitor_of(cloud: str) -> tuple[str, Security]:
    """Return where a running cloud of this machine is looked on, and how to connect.

    Raises
    ------
    ConfigError
        It does not run, or serves no live view.
    """
    found = find_cloud(cloud)
    if not found.monitor:
        raise ConfigError(f"the cloud {cloud!r} serves no live view; start it without `--monitor none`")
    roots = Path(found.root_certificates) if found.root_certificates else None
    # It serves plainly beyond loopback only where its owner allowed that.
    return str(parse_address(found.monitor).reachable), Security(root_certificates=roots, insecure=True)


def ask_status(
    address: str, security: Security, *, timeout: float = 10.0, server_name: str = ""
) -> mpb.TreeStatus:
    """Return one snapshot; see `open_channel` for what is raised."""
    with open_channel(address, security, server_name) as channel:
        answer: mpb.TreeStatus = MonitorStub(channel).GetStatus(mpb.StatusRequest(), timeout=timeout)
    return answer


def watch(
    address: str, security: Security, interval: float, *, server_name: str = ""
) -> Generator[mpb.TreeStatus, None, None]:
    """Yield snapshots until the server ends; see `open_channel` for what is raised."""
    with open_channel(address, security, server_name) as channel:
        yield from MonitorStub(channel).Watch(mpb.WatchRequest(interval=interval))


def as_dict(status: mpb.TreeStatus) -> dict[str, Any]:
    """Return a snapshot in JSON's types: the names of monitor.proto, every plain field there even when empty."""
    found: dict[str, Any] = _numbers(
        status,
        MessageToDict(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
    )
    return found


def _numbers(message: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Make numbers of the texts that protobuf's JSON has for 64-bit integers."""
    for name, value in found.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            parts = value if isinstance(value, list) else [value]
            own = getattr(message, name)
            for part, of in zip(parts, own if isinstance(value, list) else [own], strict=True):
                _numbers(of, part)
        elif isinstance(value, str) and field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            found[name] = int(value)
    return found
