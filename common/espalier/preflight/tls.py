"""TLS checks: a process's own certificate, and the handshake with the server above it."""

from __future__ import annotations

import socket
import ssl
import stat
from pathlib import Path

from espalier.errors import EspalierError
from espalier.preflight.findings import Findings
from espalier.security.certificates import WARN_DAYS, Facts, Pair, check_server, facts, is_valid_for
from espalier.security.transport import Address, Security

CONNECT_SECONDS = 5.0
# OpenSSL's verification errors of a server's certificate.
_NOT_YET, _EXPIRED, _MISMATCH, _UNKNOWN = 9, 10, (62, 64), (18, 19, 20, 21)


def check_own(found: Findings, security: Security, listen: Address) -> None:
    """Check the certificate that this process presents at `listen`."""
    if security.certificate is None and security.private_key is None:
        _report_plain(found, security, listen, f"{listen} is served")
        return
    try:
        files = security.server_certificates(str(listen))
        assert files is not None
        roots = files[0] if security.root_certificates is not None else None
        said = check_server(Pair(files[1], files[2]), f"--certificate {security.certificate}", roots)
    except EspalierError as error:
        found.fault("certificate", error)
        return
    found.ok("certificate", f"{security.certificate} fits its key{' and the roots' if roots else ''}")
    _report_expiry(found, said, "certificate dates")
    check_mode(
        found, "private key", Path(str(security.private_key)).expanduser(), "belongs to the certificate"
    )
    _check_names(found, said, listen)


def _report_plain(found: Findings, security: Security, address: Address, what: str) -> None:
    if address.is_loopback:
        found.ok("TLS", f"{what} without TLS, on this machine only")
    elif security.insecure:
        found.warn(
            "TLS", f"{what} without TLS (--insecure)", "use certificates where others share the network"
        )
    else:
        found.fail("TLS", f"{what} beyond this machine without TLS", "give TLS files, or --insecure")


def _report_expiry(found: Findings, said: Facts, check: str) -> None:
    if said.days_left < WARN_DAYS:
        left = f"expires in {said.days_left:.0f} days, on {said.ends:%Y-%m-%d}"
        found.warn(check, left, "renew the certificate soon")
    else:
        found.ok(check, f"valid until {said.ends:%Y-%m-%d}")


def check_mode(found: Findings, check: str, path: Path, said: str) -> None:
    """Check that only the owner can read a private key."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        found.warn(check, f"{said}; others can read it (mode {mode:o})", f"chmod 600 {path}")
    else:
        found.ok(check, f"{said}; mode {mode:o}")


def _check_names(found: Findings, said: Facts, listen: Address) -> None:
    shown = ", ".join(said.hosts) or "no host"
    anywhere = listen.host in ("0.0.0.0", "::")
    wanted = {socket.gethostname(), socket.getfqdn()} if anywhere else {listen.host}
    if any(is_valid_for(said, name) for name in wanted):
        found.ok("certificate names", shown)
    else:
        found.warn(
            "certificate names",
            f"it is for {shown}, this host is {' or '.join(sorted(wanted))}",
            "clients must connect by one of its names",
        )


def check_server_link(found: Findings, security: Security, server: Address) -> bool:
    """Check that a server can be reached: its name resolves, it accepts connections, its certificate is valid.

    Returns
    -------
    bool
        Whether further checks over this link make sense.
    """
    try:
        socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except OSError as error:
        found.fail(f"name {server.host}", f"does not resolve ({error.strerror})", "check the name and DNS")
        return False
    try:
        link = socket.create_connection(server, timeout=CONNECT_SECONDS)
    except OSError as error:
        reason = error.strerror or "no answer in time"
        found.fail(
            f"reach {server}", f"no connection ({reason})", "start it, or check the address and the firewall"
        )
        return False
    found.ok(f"reach {server}", "it accepts connections")
    with link:
        if security.root_certificates is None:
            _report_plain(found, security, server, f"{server} is reached")
            return True
        return _handshake(found, security.root_certificates.expanduser(), server, link)


def _handshake(found: Findings, roots: Path, server: Address, link: socket.socket) -> bool:
    check = f"TLS {server}"
    try:
        context = ssl.create_default_context(cafile=str(roots))
    except (OSError, ssl.SSLError) as error:
        found.fail(
            check, f"--root-certificates {roots} cannot be used ({error})", "give the authority's PEM file"
        )
        return False
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(link, server_hostname=server.host) as secured:
            raw = secured.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        found.fail(check, *_verdict(error, server))
        return False
    except (OSError, ssl.SSLError) as error:
        found.fail(
            check, f"the TLS handshake failed ({error})", "check that the server uses TLS at this port"
        )
        return False
    if raw:
        _report_expiry(found, facts(ssl.DER_cert_to_PEM_cert(raw).encode(), check)[0], check)
    return True


def _verdict(error: ssl.SSLCertVerificationError, server: Address) -> tuple[str, str]:
    """Return why OpenSSL rejected a certificate, and the remedy."""
    said = f"its certificate is not valid: {error.verify_message}"
    if error.verify_code == _EXPIRED:
        return said, "renew the server's certificate, or check this machine's clock"
    if error.verify_code == _NOT_YET:
        return said, "set this machine's clock, or the one that made the certificate"
    if error.verify_code in _MISMATCH:
        return said, f"connect by a name of the certificate, or have one issued for {server.host}"
    if error.verify_code in _UNKNOWN:
        return said, "give the authority that issued it with --root-certificates"
    return said, "renew the server's certificate"
