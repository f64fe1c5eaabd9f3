"""X.509 certificates of a deployment: a certificate authority, server certificates, and their validation."""

from __future__ import annotations

import datetime
import ipaddress
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from espalier.errors import ConfigError
from espalier.security.transport import Security, is_host

log = logging.getLogger("espalier")

#: A server warns at its start if its certificate expires within this many days.
WARN_DAYS = 21.0
#: The validity of a certificate begins this long before it was issued, as clocks differ.
CLOCK_SLACK = datetime.timedelta(minutes=10)
#: Names of the local machine, which its own commands and health checks connect to.
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")


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
        return (self.ends - _now()).total_seconds() / 86400


def new_authority(name: str, days: float) -> Pair:
    """Create the self-signed certificate and key (P-384) of an authority, valid for `days` days."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), _now() + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return _signed(builder, key, key)


def issue(authority: Pair, hosts: Sequence[str], days: float) -> Pair:
    """Issue a server certificate with a new key (P-256).

    Parameters
    ----------
    authority : Pair
        The signing authority; the first certificate of its PEM is used.
    hosts : sequence of str
        DNS names and IP addresses that clients connect to; the first one is the common name.
    days : float
        Validity in days, limited by that of the authority.

    Raises
    ------
    ConfigError
        If a host is invalid, or the authority has expired or does not match its key.
    """
    ca = _certificates(authority.certificate, "the authority's certificate")[0]
    ca_key = _private_key(authority.private_key, "the authority's key")
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise ConfigError("the authority's certificate and key do not belong together")
    if ca.not_valid_after_utc <= _now():
        raise ConfigError("the authority has expired; make a new one with `espalier certs init --renew`")
    names = [_general_name(host) for host in hosts]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    ends = min(_now() + datetime.timedelta(days=days), ca.not_valid_after_utc)
    builder = _builder(subject, ca.subject, key.public_key(), ends)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(server, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return _signed(builder.add_extension(signer, critical=False), key, ca_key)


def facts(pem: bytes, what: str) -> list[Facts]:
    """Return the fields of each certificate in a PEM file.

    Raises
    ------
    ConfigError
        If there is none; `what` names the file.
    """
    return [_facts(certificate) for certificate in _certificates(pem, what)]


def in_force(pem: bytes, what: str) -> list[bytes]:
    """Return the certificates of a PEM file that have not expired, each as PEM, in their order."""
    return [c.public_bytes(Encoding.PEM) for c in _certificates(pem, what) if c.not_valid_after_utc > _now()]


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
    chain = _certificates(pair.certificate, what)
    certificate, said = chain[0], _facts(chain[0])
    if _private_key(pair.private_key, f"the private key of {what}").public_key() != certificate.public_key():
        raise ConfigError(f"{what} and its private key do not belong together; give the key made with it")
    if said.days_left <= 0:
        raise ConfigError(f"{what} expired on {said.ends:%Y-%m-%d}; make a new one with `certs … --renew`")
    if said.begins > _now():
        raise ConfigError(
            f"{what} is valid from {said.begins:%Y-%m-%d %H:%M} UTC only; set this machine's clock"
        )
    trusted = [] if roots is None else _certificates(roots, "--root-certificates")
    if trusted and not any(_signed_by(link, root) for link in chain for root in trusted):
        raise ConfigError(
            f"{what} is signed by none of the authorities in --root-certificates; give the ca.pem it was made with"
        )
    if host is not None and not stands_for(said, host):
        raise ConfigError(
            f"{what} does not stand for {host} but for {', '.join(said.hosts) or 'nothing'}; "
            f"make it anew with --host {host} --renew"
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


def stands_for(said: Facts, host: str) -> bool:
    """Return whether a certificate is valid for a host name or address."""
    if host in said.hosts:
        return True
    parent = host.partition(".")[2]
    return bool(parent) and f"*.{parent}" in said.hosts


def node_key_pair() -> tuple[bytes, bytes]:
    """Generate a node key (P-256): the private key in OpenSSH format, and the public key as an OpenSSH line.

    Resident nodes and a stock ``flower-supernode`` read the first; registries and ``flwr supernode register`` the
    second. P-256 is ten times faster than P-384 in OpenSSL, and every call of a node is signed.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n",
    )


# --- parts -----------------------------------------------------------------------------------------


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), _now() - CLOCK_SLACK, ends
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Pair:
    certificate = builder.sign(signer, hashes.SHA384())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Pair(certificate.public_bytes(Encoding.PEM), private)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    if not is_host(host.removeprefix("*.")):
        raise ConfigError(f"--host {host!r} is no host name or IP address; give it without a port")
    return x509.DNSName(host)


def _certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{what} holds no certificate that can be read: {error}") from error


def _private_key(pem: bytes, what: str) -> PrivateKeyTypes:
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
