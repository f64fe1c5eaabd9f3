"""TLS checks: a process's own certificate, and the handshake with the server above it."""

from __future__ import annotations

import socket
import ssl
import stat
from pathlib import Path

from espalier.errors import EspalierError
from espalier.preflight.findings import Findings
from espalier.security.certificates import WARN_DAYS, Facts, Pair, check_server, facts, stands_for
from espalier.security.transport import Address, Security

CONNECT_SECONDS = 5.0
# OpenSSL's verdicts on a server's certificate.
_NOT_YET, _EXPIRED, _MISMATCH, _UNKNOWN = 9, 10, (62, 64), (18, 19, 20, 21)


def check_own(found: Findings, security: Security, listen: Address) -> None:
    """Check the certificate that this process shows to those who connect to `listen`."""
    if security.certificate is None and security.private_key is None:
        _note_plain(found, security, listen, f"{listen} is served")
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
    _note_end(found, said, "certificate dates")
    check_mode(
        found, "private key", Path(str(security.private_key)).expanduser(), "belongs to the certificate"
    )
    _check_names(found, said, listen)


def _note_plain(found: Findings, security: Security, address: Address, what: str) -> None:
    if address.is_loopback:
        found.ok("TLS", f"{what} without TLS, on this machine only")
    elif security.insecure:
        found.warn("TLS", f"{what} without TLS (--insecure)", "give certificates where others can listen in")
    else:
        found.fail("TLS", f"{what} beyond this machine without TLS", "give TLS files, or --insecure")


def _note_end(found: Findings, said: Facts, check: str) -> None:
    if said.days_left < WARN_DAYS:
        left = f"expires in {said.days_left:.0f} days, on {said.ends:%Y-%m-%d}"
        found.warn(check, left, "renew the certificate soon")
    else:
        found.ok(check, f"valid until {said.ends:%Y-%m-%d}")


def check_mode(found: Findings, check: str, path: Path, said: str) -> None:
    """Check that only a key's owner can read it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        found.warn(check, f"{said}; others can read it (mode {mode:o})", f"chmod 600 {path}")
    else:
        found.ok(check, f"{said}; mode {mode:o}")


def _check_names(found: Findings, said: Facts, listen: Address) -> None:
    shown = ", ".join(said.hosts) or "no host"
    anywhere = listen.host in ("0.0.0.0", "::")
    wanted = {socket.gethostname(), socket.getfqdn()} if anywhere else {listen.host}
    if any(stands_for(said, name) for name in wanted):
        found.ok("certificate names", shown)
    else:
        found.warn(
            "certificate names",
            f"it is for {shown}, this host is {' or '.join(sorted(wanted))}",
            "see that those who connect use one of its names",
        )


def check_above(found: Findings, security: Security, server: Address) -> bool:
    """Check that the server above can be reached: its name resolves, it answers, its certificate holds.

    Returns
    -------
    bool
        Whether it is worth while to ask it more.
    """
    try:
        socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except OSError as error:
        found.fail(f"name {server.host}", f"does not resolve ({error.strerror})", "see to the name or to DNS")
        return False
    try:
        link = socket.create_connection(server, timeout=CONNECT_SECONDS)
    except OSError as error:
        reason = error.strerror or "no answer in time"
        found.fail(
            f"reach {server}", f"nobody answers ({reason})", "start it, or see to address and firewall"
        )
        return False
    found.ok(f"reach {server}", "it accepts connections")
    with link:
        if security.root_certificates is None:
            _note_plain(found, security, server, f"{server} is reached")
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
        found.fail(check, f"no TLS comes about ({error})", "is it served with TLS, and is it this port?")
        return False
    if raw:
        _note_end(found, facts(ssl.DER_cert_to_PEM_cert(raw).encode(), check)[0], check)
    return True


def _verdict(error: ssl.SSLCertVerificationError, server: Address) -> tuple[str, str]:
    """Return what a refused certificate means, and what to do."""
    said = f"its certificate does not hold: {error.verify_message}"
    if error.verify_code == _EXPIRED:
        return said, "renew the server's certificate; or is this machine's clock ahead?"
    if error.verify_code == _NOT_YET:
        return said, "set this machine's clock, or the one that made the certificate"
    if error.verify_code in _MISMATCH:
        return said, f"connect by a name of the certificate, or have one issued for {server.host}"
    if error.verify_code in _UNKNOWN:
        return said, "give the authority that issued it with --root-certificates"
    return said, "renew the server's certificate"
