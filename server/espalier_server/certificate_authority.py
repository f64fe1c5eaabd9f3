"""The certificate authority of a deployment: creates itself, server certificates and node keys."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from espalier.errors import ConfigError
from espalier.security.certificates import Pair, load_certificates, load_private_key, utc_now
from espalier.security.transport import is_host

#: The validity of a certificate begins this long before it was issued, as clocks differ.
CLOCK_SLACK = datetime.timedelta(minutes=10)
#: Names of the local machine, which its own commands and health checks connect to.
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")


def new_authority(name: str, days: float) -> Pair:
    """Create the self-signed certificate and key (P-384) of an authority, valid for `days` days."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), utc_now() + datetime.timedelta(days=days))
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
    ca = load_certificates(authority.certificate, "the authority's certificate")[0]
    ca_key = load_private_key(authority.private_key, "the authority's key")
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise ConfigError("the authority's certificate and key do not belong together")
    if ca.not_valid_after_utc <= utc_now():
        raise ConfigError("the authority has expired; make a new one with `espalier certs init --renew`")
    names = [_general_name(host) for host in hosts]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    ends = min(utc_now() + datetime.timedelta(days=days), ca.not_valid_after_utc)
    builder = _builder(subject, ca.subject, key.public_key(), ends)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(server, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return _signed(builder.add_extension(signer, critical=False), key, ca_key)


def in_force(pem: bytes, what: str) -> list[bytes]:
    """Return the certificates of a PEM file that have not expired, each as PEM, in their order."""
    return [
        c.public_bytes(Encoding.PEM)
        for c in load_certificates(pem, what)
        if c.not_valid_after_utc > utc_now()
    ]


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


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), utc_now() - CLOCK_SLACK, ends
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
