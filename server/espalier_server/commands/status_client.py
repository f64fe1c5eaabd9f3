"""A client of the monitoring service: requests one status snapshot, or a stream of them."""

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
    """Return the address of the monitoring service of a cloud on this machine, and how to connect.

    Raises
    ------
    ConfigError
        The cloud does not run, or has no monitoring service.
    """
    found = find_cloud(cloud)
    if not found.monitor:
        raise ConfigError(f"the cloud {cloud!r} has no monitoring service; start it without `--monitor none`")
    roots = Path(found.root_certificates) if found.root_certificates else None
    # The service has no TLS beyond loopback only if its operator allowed that.
    return str(parse_address(found.monitor).reachable), Security(root_certificates=roots, insecure=True)


def ask_status(
    address: str, security: Security, *, timeout: float = 10.0, server_name: str = ""
) -> mpb.TreeStatus:
    """Return one status snapshot; see `open_channel` for what is raised."""
    with open_channel(address, security, server_name) as channel:
        answer: mpb.TreeStatus = MonitorStub(channel).GetStatus(mpb.StatusRequest(), timeout=timeout)
    return answer


def watch(
    address: str, security: Security, interval: float, *, server_name: str = ""
) -> Generator[mpb.TreeStatus, None, None]:
    """Yield status snapshots until the server ends the stream; see `open_channel` for what is raised."""
    with open_channel(address, security, server_name) as channel:
        yield from MonitorStub(channel).Watch(mpb.WatchRequest(interval=interval))


def as_dict(status: mpb.TreeStatus) -> dict[str, Any]:
    """Return a snapshot as JSON types, with the field names of monitor.proto; scalar fields are always present."""
    found: dict[str, Any] = _with_integers(
        status,
        MessageToDict(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
    )
    return found


def _with_integers(message: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Convert the strings by which protobuf's JSON represents 64-bit integers, in place."""
    for name, value in found.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            parts = value if isinstance(value, list) else [value]
            field_value = getattr(message, name)
            messages = field_value if isinstance(value, list) else [field_value]
            for part, submessage in zip(parts, messages, strict=True):
                _with_integers(submessage, part)
        elif isinstance(value, str) and field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            found[name] = int(value)
    return found
