"""The one place that decides whether a port or a channel speaks TLS."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc.aio

from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import ConfigError, InvalidTransition
from parallax.security.identity import clip
from parallax.security.layouts import Layout, find_layout, locate, save_leaf
from parallax.security.material import Sources, load_credentials
from parallax.security.pin import where_to_dial
from parallax.security.port import SecurePort, ServerPort, Swapped
from parallax.security.snapshot import Content
from parallax.security.swap import ServerSwap
from parallax.security.tls import (
    channel_credentials,
    host_of,
    identity_options,
    is_loopback,
    names_port,
    replace_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from parallax.security.config import MTLSConfig
    from parallax.security.identity import Identity
    from parallax.security.layouts import Paths
    from parallax.security.rotation import CertificateRotator
    from parallax.security.snapshot import Source
    from parallax.security.tls import Option

Keep: TypeAlias = Callable[[Credentials, Credentials], Awaitable[None]]
"""
Puts the first in force in place of the second, where it will be found after a restart, too.

When it returns, the second is no longer in force: it may be that others than the first are, put there
by somebody who was faster. Raises ConfigError if they cannot be kept; then nothing has changed.
"""

# A proxy named in the environment would carry plaintext off this host, localhost's too.
_NO_PROXY: Final[tuple[Option, ...]] = (("grpc.enable_http_proxy", 0),)


class Mode(StrEnum):
    """What the two ends of a connection know of each other."""

    MUTUAL = "mutual"
    """Each proves its identity."""
    SERVER_ONLY = "server-only"
    """The server proves its identity and does not ask for the client's."""
    PLAINTEXT = "plaintext"
    """Neither proves anything; loopback only."""


class MTLSCredentialsProvider:
    """
    Ports and channels of one identity, secured as *config* says.

    ========  ===========  ==============  ==================================================
    enabled   material     allow_insecure  then
    ========  ===========  ==============  ==================================================
    no        (not read)   (no effect)     plaintext, loopback only
    yes       usable       (no effect)     TLS; `verify_client` makes ports demand certificates
    yes       not usable   no              `ConfigError`
    yes       not usable   yes             plaintext, loopback only, and a warning at every start
    ========  ===========  ==============  ==================================================

    Args:
        config: From `get_mtls_config`.
        logger: For the warnings; this module's own by default.
        identity: Whose credentials to load, and what channels present.
        clock: Aware UTC.

    Attributes:
        insecure_fallback: TLS was asked for, and plaintext is spoken.
        store: The credentials in force; None in plaintext.
        source: Where they came from; None in plaintext.
        layout: How the files lie that they came from; None if there are none, or they are named one by one.
        on_swap: Told how a port has changed its certificate; does nothing unless set.

    Raises:
        ConfigError: TLS was asked for and its material cannot be used: one line, file and remedy.
    """

    def __init__(
        self,
        config: MTLSConfig,
        logger: logging.Logger | None = None,
        *,
        identity: Identity,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.identity = identity
        self.store: CredentialStore | None = None
        self.source: Sources | None = None
        self.layout: Layout | None = None
        self.insecure_fallback = False
        self.on_swap: Callable[[Swapped], None] = lambda _: None
        self._certs_dir = config.certs_dir
        self._verify_client = config.verify_client
        self._clock = clock
        self._log = logger or logging.getLogger(__name__)
        self._has_warned = False
        if not config.enabled:
            return
        try:
            self._load(config)
        except ConfigError as exc:
            if not config.allow_insecure:
                raise
            self.insecure_fallback = True
            self._log.warning(
                "TLS cannot be used and PARALLAX_TLS_ALLOW_INSECURE is set: plaintext, loopback only",
                extra={"reason": str(exc)},
            )

    @property
    def mode(self) -> Mode:
        """What the ports of this process speak; its channels present a certificate in both TLS modes."""
        if self.store is None:
            return Mode.PLAINTEXT
        return Mode.MUTUAL if self._verify_client else Mode.SERVER_ONLY

    def rotator(self, poll: timedelta) -> CertificateRotator | None:
        """
        What keeps `store` like the files it came from, once it runs; None if there are none.

        Args:
            poll: How often to look at the files without being told of a change.
        """
        source = self.source
        if self.store is None or source is None:
            return None
        if not any(isinstance(part, Path) for part in (source.cert, source.key, source.ca)):
            return None
        from parallax.security.rotation import CertificateRotator  # and with it watchdog

        return CertificateRotator(self.store, source, poll=poll, clock=self._clock, log=self._log)

    def keeper(self, rotator: CertificateRotator | None) -> Keep | None:
        """
        What puts another certificate of ours in force, and where the one before came from; None: not us.

        Others renew what is mounted by Kubernetes and files that are named one by one. What is given
        by content is renewed in memory, and with it for as long as this process runs.

        Args:
            rotator: Of this provider's, whether it runs or not.
        """
        store, source, layout = self.store, self.source, self.layout
        if store is None or source is None:
            return None
        if not any(isinstance(part, Path) for part in (source.cert, source.key, source.ca)):
            return partial(_keep_in_memory, store, self._clock)
        if layout in {None, Layout.KUBERNETES} or rotator is None:
            return None
        save = partial(save_leaf, self._certs_dir, layout, self.identity)
        return partial(_keep_in_files, store, rotator, save)

    def add_port(self, server: grpc.aio.Server, address: str) -> ServerPort:
        """
        Listen on *address*, `host:port`, before *server* starts; the port, which 0 lets the system choose.

        It keeps the certificate of this moment, unless a task of the caller's runs its `follow`.

        Raises:
            ConfigError: It cannot be bound, or it is not loopback and plaintext is all there is.
        """
        if self.store is None and not is_loopback(address):
            raise ConfigError(f"plaintext does not listen on {clip(address)}: {self._remedy}")
        wrong = f"cannot listen on {clip(address)}"
        if not names_port(address):
            raise ConfigError(f"{wrong}: write it as host:port, port 0 to 65535")
        if self.mode is Mode.SERVER_ONLY and not self._has_warned:
            self._has_warned = True
            self._log.warning("clients are not authenticated: set PARALLAX_TLS_VERIFY_CLIENT=true")
        try:
            _check_localhost(address)
            if self.store is None:
                number = server.add_insecure_port(address)
                return ServerPort(number, where_to_dial(address, number))
            swap = ServerSwap(self.store.served, verify_client=self._verify_client)
            number = server.add_secure_port(address, swap.grpc_credentials)
        except (OSError, RuntimeError) as exc:  # why, gRPC says on stderr only
            raise ConfigError(f"{wrong}: use a free port and an address of this host") from exc
        where = where_to_dial(address, number)
        return SecurePort(number, where, self.store, swap, self._note_swap)

    def channel(self, address: str, expected: Identity, options: Sequence[Option] = ()) -> grpc.aio.Channel:
        """
        A channel to *expected* at *address*; whoever else answers there is refused in the handshake.

        In plaintext nobody proves to be *expected*. The channel keeps the credentials of this
        moment; after a rotation open another.

        Raises:
            ConfigError: *address* is not loopback and plaintext is all there is.
        """
        if self.store is not None:
            secured = replace_options(options, identity_options(expected))
            return grpc.aio.secure_channel(address, channel_credentials(self.store.current), options=secured)
        if not is_loopback(address):
            raise ConfigError(f"plaintext does not dial {clip(address)}: {self._remedy}")
        return grpc.aio.insecure_channel(address, options=replace_options(options, _NO_PROXY))

    def _note_swap(self, how: Swapped) -> None:
        self.on_swap(how)  # which may have been set since the port was added

    def _load(self, config: MTLSConfig) -> None:
        source, now = sources(config, self.identity), self._clock()
        self.store = CredentialStore(self.identity, load_credentials(source, self.identity, now), now)
        self.source = source
        if not config.is_explicit:
            self.layout = find_layout(config.certs_dir, self.identity.name, self.identity.kind)

    @property
    def _remedy(self) -> str:
        if self.insecure_fallback:
            return "mend the TLS material that the warning at start names, or use a loopback address"
        return "set PARALLAX_TLS_ENABLED=true, or use a loopback address"


def sources(config: MTLSConfig, identity: Identity) -> Sources:
    """
    Where the credentials of *identity* are to come from: what *config* names, else what its directory holds.

    Raises:
        ConfigError: There are none, or it would be a guess.
    """
    if not config.is_explicit:
        paths = locate(config.certs_dir, identity.name, identity.kind)
        return Sources(paths.cert, paths.key, paths.ca)
    key_pem = config.key_pem.get_secret_value() if config.key_pem else None
    return Sources(
        cert=_source("CERT", config.cert_file, config.cert_pem),
        key=_source("KEY", config.key_file, key_pem),
        ca=_source("CA", config.ca_file, config.ca_pem),
    )


def _check_localhost(address: str) -> None:
    """
    OSError if *address* is `localhost`, and somebody else has the port on IPv4 or IPv6.

    gRPC listens on what it can get of both. Who dials the name then may reach the other one.
    """
    if (host_of(address) or "").lower() != "localhost":
        return
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, int(address.rpartition(":")[2])))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise  # otherwise this host has no such addresses


async def _keep_in_memory(
    store: CredentialStore, clock: Callable[[], datetime], new: Credentials, replacing: Credentials
) -> None:
    if store.current is replacing:
        store.publish(new, clock())


async def _keep_in_files(
    store: CredentialStore,
    rotator: CertificateRotator,
    save: Callable[..., Paths],
    new: Credentials,
    replacing: Credentials,
) -> None:
    """Only files can come into force: so it is certain that what is in force outlasts this process."""
    with suppress(InvalidTransition):  # another process was faster, and what it wrote is as good
        await asyncio.to_thread(save, new.chain, new.key, new.bundle, replacing=replacing.leaf)
    await rotator.look()
    if store.current is replacing:
        raise ConfigError(rotator.status.reason or "the files are not what was written there a moment ago")


def _source(part: str, path: Path | None, pem: str | None) -> Source:
    return path or Content(f"PARALLAX_TLS_{part}_PEM", (pem or "").encode())
