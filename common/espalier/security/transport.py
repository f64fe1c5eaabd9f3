"""Addresses and transport security: the rules for links, the same on every tier."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from espalier.errors import AddressError, ConfigError

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")


class Address(NamedTuple):
    """A host name or IP address and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def reachable(self) -> Address:
        """The address at which this machine reaches a listener on this address."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return self._replace(host=anywhere.get(self.host, self.host))

    @property
    def is_loopback(self) -> bool:
        """Whether it is reachable only from this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, *, listen: bool = False) -> Address:
    """Read ``HOST:PORT``; an IPv6 address is in brackets.

    Parameters
    ----------
    text : str
        The address.
    listen : bool
        Whether it is an address to listen on, where port 0 means a free port.

    Raises
    ------
    AddressError
        The text is not an address, or the port is not in 1..65535.
    """
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host:
        raise AddressError(f"address {text!r} has no port; write it as HOST:PORT, e.g. 192.0.2.7:9092")
    if not port.isascii() or not port.isdigit() or not (0 if listen else 1) <= int(port) <= 65535:
        raise AddressError(f"address {text!r}: {port!r} is not a port; use a number from 1 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if bracketed else host
    if not is_host(name, bracketed=bracketed):
        hint = "put an IPv6 address in brackets, e.g. [::1]:9092" if ":" in host else "write it as HOST:PORT"
        raise AddressError(f"address {text!r}: {host!r} is not a host name or IP address; {hint}")
    return Address(name, int(port))


def is_host(name: str, *, bracketed: bool = False) -> bool:
    """Whether `name` is a host name or an IPv4 address; in brackets, whether it is an IPv6 address."""
    if bracketed or re.fullmatch(r"[0-9.]+", name):
        try:
            return ipaddress.ip_address(name).version == (6 if bracketed else 4)
        except ValueError:
            return False
    return _HOST.fullmatch(name) is not None


@dataclass(frozen=True)
class Security:
    """TLS files of a process, and whether plain links are allowed.

    Attributes
    ----------
    root_certificates : Path or None
        PEM file of the authorities with which this process verifies servers.
    certificate, private_key : Path or None
        PEM files that a server presents to its clients; both or neither.
    insecure : bool
        Allow a link without TLS beyond this machine.
    trust_on_first_use : bool
        Bind a name to the first key that uses it over TLS; otherwise only registered node keys are admitted.
    """

    root_certificates: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    insecure: bool = False
    trust_on_first_use: bool = False

    @property
    def keys_only(self) -> bool:
        """Whether a server admits registered node keys only. Flower needs TLS for it."""
        return self.certificate is not None and not self.trust_on_first_use

    def client_roots(self, server: str) -> bytes | None:
        """Return the root certificates for a connection to `server`, None for a plain one.

        Raises
        ------
        AddressError
            `server` does not parse.
        ConfigError
            The link would be plain beyond this machine without `--insecure`, or a file cannot be read.
        """
        address = parse_address(server)
        if self.root_certificates is not None:
            return _read(self.root_certificates, "--root-certificates")
        if not self.insecure and not address.is_loopback:
            raise ConfigError(
                f"the link to {address} leaves this machine without TLS; "
                "give --root-certificates FILE, or --insecure to allow it"
            )
        return None

    def server_certificates(self, listen: str) -> tuple[bytes, bytes, bytes] | None:
        """Return (root certificates, certificate, private key) to serve `listen` with, None to serve it plain.

        The order is Flower's. Without root certificates the certificate takes their place: they are used only to
        verify clients' certificates, and our clients authenticate by node keys.

        Raises
        ------
        AddressError
            `listen` does not parse.
        ConfigError
            The port would be plain beyond this machine without `--insecure`, one of the two files is missing,
            or a file cannot be read.
        """
        address = parse_address(listen, listen=True)
        if (self.certificate is None) != (self.private_key is None):
            missing = "--private-key" if self.private_key is None else "--certificate"
            raise ConfigError(f"{missing} FILE is missing: a certificate and its private key go together")
        if self.certificate is not None and self.private_key is not None:
            certificate = _read(self.certificate, "--certificate")
            roots = self.root_certificates
            root = _read(roots, "--root-certificates") if roots is not None else certificate
            return root, certificate, _read(self.private_key, "--private-key")
        if not self.insecure and not address.is_loopback:
            raise ConfigError(
                f"{address} is open to other machines without TLS; "
                "give --certificate FILE and --private-key FILE, or --insecure to allow it"
            )
        return None

    def flags(self) -> list[str]:
        """Return the command-line flags of these settings."""
        files = {
            "--root-certificates": self.root_certificates,
            "--certificate": self.certificate,
            "--private-key": self.private_key,
        }
        flags = [word for flag, path in files.items() if path is not None for word in (flag, str(path))]
        flags += ["--trust-on-first-use"] if self.trust_on_first_use else []
        return [*flags, "--insecure"] if self.insecure else flags


def _read(path: Path, flag: str) -> bytes:
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}; give a PEM file") from error
    if b"-----BEGIN" not in content:
        raise ConfigError(f"{flag} {path} is not a PEM file; it must contain a -----BEGIN …----- block")
    return content
