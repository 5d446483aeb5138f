"""The holder's side of enrollment: somebody whom no port lets in yet, who knows the root by its pin."""

from __future__ import annotations

import json
import ssl
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from http.client import HTTPConnection, HTTPException
from socket import SHUT_RDWR, socket
from threading import Timer
from typing import TYPE_CHECKING, Final, Self

from cryptography.hazmat.primitives import hashes

from parallax.control_plane.edge.status import error_of
from parallax.runtime.address import parse_address, parse_url
from parallax.runtime.settings import NO_CONTROL_PLANE
from parallax.security.authority import Issued
from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.credentials import Credentials, check_usable
from parallax.security.errors import (
    ConfigError,
    InvalidRequest,
    ParallaxError,
    Unavailable,
    UntrustedChain,
    WrongIdentity,
)
from parallax.security.https import client_context, unverified_context
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import PrivateKey, key_id
from parallax.security.possession import Wish
from parallax.security.request import new_request, request_to_pem
from parallax.security.root_pin import RootPin, pinned_roots

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

DEFAULT_PORT: Final = 8080
ANSWER_S: Final = 30.0
MAX_ANSWER_BYTES: Final = 1 << 20  # as a file with a trust bundle

_HOSTNAME_MISMATCH: Final = 62  # X509_V_ERR_HOSTNAME_MISMATCH


@dataclass(frozen=True, slots=True)
class Edge:
    """Where a control plane enrolls."""

    host: str
    port: int

    @classmethod
    def find(cls, url: str | None, control_plane: str) -> Self:
        """
        What *url* says, or else the usual one of the host where agents dial *control_plane*.

        Raises:
            InvalidRequest: *url* is none.
            ConfigError: Neither is given.
        """
        if url:
            try:
                return cls(*parse_url(url))
            except ConfigError as exc:
                raise InvalidRequest(str(exc)) from None
        if control_plane == NO_CONTROL_PLANE:
            raise ConfigError("PARALLAX_CONTROL_PLANE is none, and one has to be asked: give --url")
        return cls(parse_address(control_plane)[0], DEFAULT_PORT)

    def __str__(self) -> str:
        return (
            f"https://[{self.host}]:{self.port}" if ":" in self.host else f"https://{self.host}:{self.port}"
        )


class Registration(StrEnum):
    """What has become of a certificate that one has signed oneself."""

    WAITING = "waiting"
    """It is to be approved, still."""
    LET_IN = "let in"
    PINNED = "pinned"
    """It is to be exchanged: there is no room for it on the control plane's port."""


class Enrolling:
    """
    Asks a control plane for a first certificate, or for one in place of a pinned one.

    Args:
        pins: Of its roots. One that it shows must be among them; nothing is sent to whoever has none.
        trust_domain: What it is expected to be of: its own word for that would let an agent pose as it.

    Attributes:
        edge: Where that is.
    """

    def __init__(self, edge: Edge, pins: Collection[RootPin], trust_domain: str) -> None:
        self.edge = edge
        self._pins = pins
        self._server = control_plane(trust_domain)
        self._roots: tuple[Certificate, ...] = ()
        self._connection: _Connection | None = None  # the last one
        self._is_cut = False

    def cut(self) -> None:
        """Have whoever asks give up, now and from now on, with Unavailable; from any thread."""
        self._is_cut = True
        connection = self._connection
        if connection is not None:
            connection.cut()

    def name(self, token: str | None, key: PrivateKey) -> Identity:
        """
        The identity that is allotted to the holder of *key*, the same again for the same key.

        Args:
            token: What grants it; None: it is to be approved.

        Raises:
            EnrollmentError: The token does not admit, or allots no names.
            UntrustedChain, WrongIdentity, Unavailable: As `redeem`.
        """
        stated = {"key": key_id(key.public_key()).hex()}
        said = self._ask("POST", "/v1/names", stated if token is None else stated | {"token": token})
        return Identity.parse_short(_text(said, "identity"), self._server.trust_domain)

    def redeem(self, token: str, identity: Identity, key: PrivateKey) -> Credentials:
        """
        Credentials of *identity* with *key*, which the token grants.

        Raises:
            EnrollmentError: The token does not admit.
            UntrustedChain, WrongIdentity: It is not the control plane that answers.
            Unavailable: Nobody answers, or not now; the same again, with the same key, may succeed.
            ConfigError, InvalidRequest, NotAuthorized, VerificationError: The request is not granted.
        """
        request = request_to_pem(new_request(identity, key))
        said = self._ask(
            "POST", "/v1/enrollments", {"token": token, "identity": identity.short, "request": request}
        )
        return self._check(said, identity, key)

    def request(self, identity: Identity, key: PrivateKey) -> Credentials | None:
        """
        Credentials of *identity* with *key*, once the administrator has approved it; None: not yet.

        Raises:
            EnrollmentError: The administrator has rejected it.
            UntrustedChain, WrongIdentity, Unavailable: As `redeem`.
            ConfigError, InvalidRequest, NotAuthorized, VerificationError: Nobody could approve it.
        """
        request = request_to_pem(new_request(identity, key))
        said = self._ask("POST", "/v1/enrollment-requests", {"identity": identity.short, "request": request})
        return self._check(said, identity, key) if "chain" in said else None

    def bundle(self) -> TrustBundle:
        """The roots that the fleet trusts, from the control plane; raises as `redeem`."""
        bundle = TrustBundle.parse(_text(self._ask("GET", "/v1/trust-bundle", None), "bundle").encode())
        pinned_roots(bundle, self._pins)
        return bundle

    def register(self, token: str | None, identity: Identity, certificate: Certificate) -> Registration:
        """
        Have the *certificate* pinned that *identity* has signed itself.

        Args:
            token: What grants the identity; None: it is to be approved.

        Raises:
            EnrollmentError: The token does not admit, or the administrator has rejected it.
            UntrustedChain, WrongIdentity, Unavailable: As `redeem`.
            ConfigError, InvalidRequest, NotAuthorized, VerificationError: It cannot be pinned.
        """
        pem = certificates_to_pem((certificate,)).decode()
        stated = {"identity": identity.short, "certificate": pem}
        said = self._ask("POST", "/v1/pins", stated if token is None else stated | {"token": token})
        if _text(said, "fingerprint") != certificate.fingerprint(hashes.SHA256()).hex():
            return Registration.WAITING
        return Registration.LET_IN if said.get("on_port", True) else Registration.PINNED

    def exchange(self, identity: Identity, held: Credentials, request: bytes) -> Issued:
        """
        What *identity* is issued in place of the pinned certificate that it has *held*; read, not checked.

        Args:
            request: PKCS#10, DER, for another key.

        Raises:
            EnrollmentError: That is not pinned, or not any more, or of no use for another reason.
            UntrustedChain, WrongIdentity, Unavailable: As `redeem`.
            ConfigError, InvalidRequest, NotAuthorized: The request is not granted.
        """
        wish = Wish(self._server, _text(self._ask("GET", "/v1/nonce", None), "nonce"), request)
        proof = wish.sign(held.leaf, held.key)
        return self._issued(self._ask("POST", "/v1/exchanges", {"identity": identity.short, "proof": proof}))

    def _check(self, said: Mapping[str, object], identity: Identity, key: PrivateKey) -> Credentials:
        """What was issued, if it is what was asked for."""
        issued = self._issued(said)
        credentials = Credentials(issued.chain, key, issued.bundle)
        check_usable(credentials, identity, datetime.now(UTC))
        return credentials

    def _issued(self, said: Mapping[str, object]) -> Issued:
        chain = parse_certificates(_text(said, "chain").encode())
        bundle = TrustBundle.parse(_text(said, "bundle").encode())
        pinned_roots(bundle, self._pins)
        return Issued(chain, bundle)

    def _ask(self, method: str, path: str, body: Mapping[str, str] | None) -> Mapping[str, object]:
        """What is answered over a connection to the control plane and nobody else."""
        if not self._roots:
            self._roots = self._pinned()
        return self._answer(client_context(self._roots), method, path, body)

    def _pinned(self) -> tuple[Certificate, ...]:
        """The roots that are pinned, from whoever answers."""
        said = self._answer(unverified_context(), "GET", "/v1/trust-bundle", None)
        try:
            return pinned_roots(TrustBundle.parse(_text(said, "bundle").encode()), self._pins)
        except ConfigError as exc:
            raise UntrustedChain(f"{self.edge} shows no root certificate: {exc}: check the address") from exc

    def _answer(
        self, context: ssl.SSLContext, method: str, path: str, body: Mapping[str, str] | None
    ) -> Mapping[str, object]:
        connection = self._connection = _Connection(self.edge, context, self._server.dns_name)
        if self._is_cut:
            raise Unavailable(f"{self.edge} is not asked any more")
        limit = Timer(ANSWER_S, connection.cut)  # that of the socket begins anew with each byte
        limit.start()
        try:
            content = None if body is None else json.dumps(body).encode()
            headers = {} if body is None else {"content-type": "application/json"}
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES)
        except ssl.SSLCertVerificationError as exc:
            raise self._impostor(exc) from exc
        except (OSError, HTTPException) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            raise Unavailable(
                f"{self.edge} does not answer: {reason}: is the control plane running, and is "
                "PARALLAX_HTTP_LISTEN that address there?"
            ) from exc
        finally:
            limit.cancel()
            connection.close()
        if response.status not in {200, 202}:
            raise error_of(response.status, answer, response.getheader("retry-after"))
        return _object(answer, self.edge)

    def _impostor(self, exc: ssl.SSLCertVerificationError) -> ParallaxError:
        if exc.verify_code == _HOSTNAME_MISMATCH:
            return WrongIdentity(
                f"it is not {self._server} that answers at {self.edge}: correct the address, "
                "or set PARALLAX_TRUST_DOMAIN as it is there"
            )
        return UntrustedChain(
            f"{self.edge} shows a certificate that the pinned root does not vouch for "
            f"({exc.verify_message}): check the address and the pin"
        )


class _Connection(HTTPConnection):
    """HTTPS to a peer whose name is not that of its address."""

    def __init__(self, edge: Edge, context: ssl.SSLContext, name: str) -> None:
        super().__init__(edge.host, edge.port, timeout=ANSWER_S)
        self._context = context
        self._name = name
        self._is_cut = False

    def connect(self) -> None:
        super().connect()
        self.sock = sock = self._context.wrap_socket(
            self.sock, server_hostname=self._name, do_handshake_on_connect=False
        )
        if self._is_cut:  # which may have been done to what was the socket until now
            raise TimeoutError("timed out")
        sock.do_handshake()

    def cut(self) -> None:
        """Have whoever waits for the peer wait no longer; from any thread."""
        self._is_cut = True
        sock = self.sock
        if sock is not None:
            with suppress(OSError):
                socket.shutdown(sock, SHUT_RDWR)  # TLS's own would take the ground from under the reader


def _object(answer: bytes, edge: Edge) -> Mapping[str, object]:
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Unavailable(f"{edge} answers something else than a control plane would: check the address")
    return said


def _text(said: Mapping[str, object], field: str) -> str:
    value = said.get(field)
    if not isinstance(value, str):
        raise UntrustedChain(f"the answer has no {field}: it is not a control plane that answers there")
    return value
