"""HTTPS with the credentials in force, for servers that ask for no certificate and clients that have none."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from parallax.security.bundle import certificates_to_pem

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.security.credentials import Credentials, CredentialStore

OLDEST: Final = ssl.TLSVersion.TLSv1_2  # RFC 9325 §3.1.1


def server_context(store: CredentialStore) -> ssl.SSLContext:
    """
    TLS that shows, at each handshake, the certificate that *store* then holds.

    Where that cannot be taken up, for want of a descriptor for instance, the one before is shown again.
    """
    served = store.current
    in_force = _server_context(served)

    def pick(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal served, in_force
        if store.current is not served:
            with suppress(OSError):
                in_force, served = _server_context(store.current), store.current
        connection.context = in_force

    context = _server_context(served)
    context.sni_callback = pick  # called without a server name, too
    return context


def client_context(roots: Iterable[Certificate]) -> ssl.SSLContext:
    """TLS to a server that one of *roots* vouches for; its name is for the connection to say."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = OLDEST
    context.load_verify_locations(cadata=certificates_to_pem(roots).decode())
    return context


def unverified_context() -> ssl.SSLContext:
    """TLS to whoever answers: only for what is checked in another way, as a trust bundle is by its pin."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = OLDEST
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _server_context(credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = OLDEST
    # Who resumes a session would not see the certificate that is in force by then. Those of TLS 1.2 stay in
    # memory, which Python cannot forbid; nobody is anybody here by a session.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    with _readable(credentials.chain_pem) as chain, _readable(credentials.key_pem) as key:
        context.load_cert_chain(chain, key)
    return context


@contextmanager
def _readable(content: bytes) -> Iterator[str]:
    """
    A path from which *content* can be read, once.

    OpenSSL takes a key from a path only. Through a pipe it reaches no disk, and needs none that can be
    written to.
    """
    reading, writing = os.pipe()
    try:
        try:
            os.set_blocking(writing, False)
            if os.write(writing, content) < len(content):
                raise OSError("a chain of certificates that fills a pipe")
        finally:
            os.close(writing)
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
