"""Validation of X.509 server certificates: validity period, key, authorities and host names."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from espalier.errors import ConfigError
from espalier.security.transport import Security

log = logging.getLogger("espalier")

#: A server warns at its start if its certificate expires within this many days.
WARN_DAYS = 21.0


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, PEM."""

    certificate: bytes
    private_key: bytes


@dataclass(frozen=True)
class Facts:
    """The fields of a certificate.

    Attributes
    ----------
    subject, issuer : str
        Common names.
    hosts : tuple of str
        DNS names and IP addresses that it is valid for.
    authority : bool
        Whether it may sign other certificates.
    begins, ends : datetime
        Validity period, in UTC.
    fingerprint : str
        SHA-256 of the certificate, hexadecimal.
    """

    subject: str
    issuer: str
    hosts: tuple[str, ...]
    authority: bool
    begins: datetime.datetime
    ends: datetime.datetime
    fingerprint: str

    @property
    def days_left(self) -> float:
        """Days until it expires; negative once it has."""
        return (self.ends - utc_now()).total_seconds() / 86400


def facts(pem: bytes, what: str) -> list[Facts]:
    """Return the fields of each certificate in a PEM file.

    Raises
    ------
    ConfigError
        If there is none; `what` names the file.
    """
    return [_facts(certificate) for certificate in load_certificates(pem, what)]


def check_server(pair: Pair, what: str, roots: bytes | None = None, host: str | None = None) -> Facts:
    """Validate a server certificate before it is used.

    Parameters
    ----------
    pair : Pair
        The server's certificate and key.
    what : str
        Name of the certificate's file, for the error message.
    roots : bytes, optional
        Authorities, one of which must have signed it.
    host : str, optional
        A name or address that it must be valid for.

    Raises
    ------
    ConfigError
        If it has expired, is not valid yet, or does not match its key, the authorities or the host.
    """
    chain = load_certificates(pair.certificate, what)
    certificate, said = chain[0], _facts(chain[0])
    if (
        load_private_key(pair.private_key, f"the private key of {what}").public_key()
        != certificate.public_key()
    ):
        raise ConfigError(f"{what} and its private key do not belong together; give the key made with it")
    if said.days_left <= 0:
        raise ConfigError(f"{what} expired on {said.ends:%Y-%m-%d}; make a new one with `certs … --renew`")
    if said.begins > utc_now():
        raise ConfigError(
            f"{what} is valid from {said.begins:%Y-%m-%d %H:%M} UTC only; set this machine's clock"
        )
    trusted = [] if roots is None else load_certificates(roots, "--root-certificates")
    if trusted and not any(_signed_by(link, root) for link in chain for root in trusted):
        raise ConfigError(
            f"{what} is signed by none of the authorities in --root-certificates; give the ca.pem it was made with"
        )
    if host is not None and not is_valid_for(said, host):
        raise ConfigError(
            f"{what} is not valid for {host} but for {', '.join(said.hosts) or 'nothing'}; "
            f"make a new one with --host {host} --renew"
        )
    return said


def check_served(
    security: Security, listen: str, *, own_roots: bool = False, host: str | None = None
) -> None:
    """Validate the certificate of a server that will listen on `listen`; log a warning if it expires soon.

    Parameters
    ----------
    security : Security
        Its files.
    listen : str
        ``HOST:PORT`` to listen on.
    own_roots : bool
        Whether to verify it with the process's own root certificates.
    host : str, optional
        A name or address that the certificate must be valid for.

    Raises
    ------
    EspalierError
        If the address does not parse, would be plain beyond this machine without `--insecure`, or the
        certificate cannot be used (see `check_server`).
    """
    files = security.server_certificates(listen)
    if files is None:
        return
    roots = files[0] if own_roots and security.root_certificates is not None else None
    said = check_server(Pair(files[1], files[2]), f"--certificate {security.certificate}", roots, host)
    if said.days_left < WARN_DAYS:
        log.warning("%s expires in %.1f days; renew it", security.certificate, said.days_left)


def is_valid_for(certificate: Facts, host: str) -> bool:
    """Return whether a certificate is valid for a host name or address."""
    if host in certificate.hosts:
        return True
    parent = host.partition(".")[2]
    return bool(parent) and f"*.{parent}" in certificate.hosts


# --- parts -----------------------------------------------------------------------------------------


def utc_now() -> datetime.datetime:
    """Return the time that validity periods are compared with."""
    return datetime.datetime.now(datetime.UTC)


def load_certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, at least one; `what` names the file in the ConfigError otherwise."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{what} holds no certificate that can be read: {error}") from error


def load_private_key(pem: bytes, what: str) -> PrivateKeyTypes:
    """Return the unencrypted private key of a PEM file; `what` names the file in the ConfigError otherwise."""
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{what} is not an unencrypted private key: {error}") from error


def _facts(certificate: x509.Certificate) -> Facts:
    extensions = certificate.extensions
    hosts: tuple[str, ...] = ()
    authority = False
    for extension in extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            hosts = tuple(str(name.value) for name in extension.value)
        elif isinstance(extension.value, x509.BasicConstraints):
            authority = extension.value.ca
    return Facts(
        _common_name(certificate.subject),
        _common_name(certificate.issuer),
        hosts,
        authority,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _signed_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
