"""
A fleet for tests: a control plane in this process and certificates of a throw-away CA, all on 127.0.0.1.

It reads no environment variable and needs no pytest: `async with fleet() as local:` works in any
program with an asyncio event loop. For pytest, `pytest_plugins = ["parallax.sdk.testing"]` in
`conftest.py` brings the fixtures `parallax_pki` and `parallax_fleet`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypedDict, TypeVar, Unpack

from pydantic import SecretStr, ValidationError

from parallax.control_plane.server import ControlPlane
from parallax.runtime.settings import NOWHERE, VARIABLES, Settings
from parallax.sdk.agent import SecureAgent
from parallax.sdk.client import ParallaxClient
from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.config import VARIABLES as TLS_VARIABLES
from parallax.security.config import MTLSConfig
from parallax.security.errors import ConfigError, Unavailable
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind, control_plane
from parallax.security.keys import PrivateKey, generate_key, key_to_pem
from parallax.security.layouts import Layout, find_authority, save_leaf
from parallax.security.profiles import LeafProfile

__all__ = ["Fleet", "ThrowawayPKI", "fleet"]

# pytest loads these when it loads this module as a plugin; nobody else does.
pytest_plugins: Final = ["parallax.sdk.fixtures"]

T = TypeVar("T")
AgentT = TypeVar("AgentT", bound=SecureAgent)

LIFETIME: Final = timedelta(days=1)
CONNECT: Final = timedelta(seconds=10)
DRAIN_S: Final = 1.0  # a handler that hangs must not hold up a test run for half a minute

_ANY_PORT: Final = "127.0.0.1:0"
_AGE: Final = timedelta(days=7)  # of the CA, so that it can have issued what has expired since


class Limits(TypedDict, total=False):
    """What `fleet` accepts by name, as the settings of the same names; the drain is 1 s unless given."""

    lease_seconds: float
    drain_seconds: float
    queue_limit: int
    max_payload_bytes: int
    policy_file: Path


class ThrowawayPKI:
    """
    A CA in memory, and certificates of it: good ones, and such as must be refused.

    Every call makes a new key. It is in the configuration that is returned, and in no file
    unless you `save` it. An identity is written `<kind>/<name>`, `client/cli` for example; a
    name alone is an agent's.

    Attributes:
        authority: Signs whatever else a test needs.
    """

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self.authority = _new_authority("Throw-away CA")

    def identity(self, text: str) -> Identity:
        """The identity written *text*."""
        if "/" in text:
            return Identity.parse_short(text, self.trust_domain)
        return Identity(self.trust_domain, Kind.AGENT, text)

    def issue(
        self, identity: str, *, lifetime: timedelta = LIFETIME, now: datetime | None = None
    ) -> MTLSConfig:
        """A certificate that everybody in the fleet accepts, issued *now*, up to a week ago or later."""
        return self._issue(identity, lifetime, now)

    def expired(self, identity: str) -> MTLSConfig:
        """The same, but it expired a day ago: whoever starts with it is told so."""
        return self._issue(identity, LIFETIME, datetime.now(UTC) - 2 * LIFETIME)

    def foreign(self, identity: str) -> MTLSConfig:
        """The same, but another CA issued it; its holder trusts both CAs, so the others must refuse it."""
        bundle = TrustBundle((*self._stranger.bundle.roots, *self.authority.bundle.roots))
        issuer = CertificateAuthority(self._stranger.certificate, self._stranger.key, bundle)
        return self._issue(identity, LIFETIME, None, issuer)

    def save(
        self,
        directory: Path,
        *identities: str,
        lifetime: timedelta = LIFETIME,
        now: datetime | None = None,
    ) -> MTLSConfig:
        """
        Write certificates for other processes, to `<directory>/<name>/{cert,key,ca}.pem`.

        Keys are 0600. A file of the same identity is replaced, as a rotation does.

        Raises:
            ConfigError: The place of one is taken by another identity.
        """
        for text in identities:
            issued, key = self._sign(self.authority, text, lifetime, now)
            save_leaf(directory, Layout.PARALLAX, self.identity(text), issued.chain, key, issued.bundle)
        return _config(certs_dir=directory, trust_domain=self.trust_domain)

    def _issue(
        self, text: str, lifetime: timedelta, now: datetime | None, issuer: CertificateAuthority | None = None
    ) -> MTLSConfig:
        issued, key = self._sign(issuer or self.authority, text, lifetime, now)
        return _config(
            ca_pem=issued.bundle.pem.decode(),
            cert_pem=certificates_to_pem(issued.chain).decode(),
            key_pem=SecretStr(key_to_pem(key).decode()),
            trust_domain=self.trust_domain,
        )

    def _sign(
        self, issuer: CertificateAuthority, text: str, lifetime: timedelta, now: datetime | None
    ) -> tuple[Issued, PrivateKey]:
        key, profile = generate_key(), LeafProfile(lifetime=lifetime)
        return issuer.issue(self.identity(text), key.public_key(), profile, now or datetime.now(UTC)), key

    @cached_property
    def _stranger(self) -> CertificateAuthority:
        return _new_authority("Foreign CA")


class Fleet:
    """
    A running control plane, and whoever takes part; made by `fleet`.

    Attributes:
        address: What agents and clients dial.
        port, metrics_port: Where it serves gRPC, and metrics and health over plain HTTP.
    """

    def __init__(
        self, pki: ThrowawayPKI, settings: Settings, plane: ControlPlane, stack: AsyncExitStack
    ) -> None:
        self.pki = pki
        self.control_plane = plane
        self.port = plane.port
        self.metrics_port = plane.metrics_port
        self.address = f"127.0.0.1:{plane.port}"
        self._settings = settings.model_copy(update={"metrics_listen": None})  # the control plane's alone
        self._stack = stack
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def agent(
        self, agent: AgentT, *, tls: MTLSConfig | None = None, timeout: timedelta | float = CONNECT
    ) -> AsyncIterator[AgentT]:
        """
        *agent*, connected for as long as the block.

        What its constructor was told of TLS and address is put aside. If it stops by itself, because
        another instance took over for example, the end of the block raises that.

        Args:
            tls: Instead of a good certificate, to see one refused.
            timeout: For connecting, in seconds or as timedelta.

        Raises:
            ConfigError: It cannot use the certificate.
            Unavailable: The control plane did not let it in, in time.
        """
        self._check_loop()
        agent._place(self.address, tls or self.pki.issue(agent.agent_id), self._settings)  # noqa: SLF001 - our own
        limit_s = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(limit_s):
                    await stack.enter_async_context(_hosted(agent))
            except TimeoutError:
                raise Unavailable(
                    f"{agent.agent_id} was not let in within {limit_s:g} s: the warnings in its log say why"
                ) from None
            yield agent

    async def start(self, *agents: SecureAgent) -> None:
        """Connect *agents*, one after the other, until the fleet ends."""
        for agent in agents:
            await self._stack.enter_async_context(self.agent(agent))

    def client(self, identity: str = "client/cli", *, tls: MTLSConfig | None = None) -> ParallaxClient:
        """
        A client that acts as *identity*. It connects when it is first used and closes with the fleet.

        Args:
            tls: Instead of a good certificate, to see one refused.
        """
        self._check_loop()
        short = self.pki.identity(identity).short
        client = _Client(self.address, tls or self.pki.issue(identity), short, self._settings)
        self._stack.push_async_callback(client.close)
        return client

    def environment(self, directory: Path, *identities: str) -> dict[str, str]:
        """
        The variables that make a child process one of this fleet, whatever else is set around it.

        *directory* receives the certificates of *identities*. A setting that the fleet does not
        decide is empty, which means unset: so `os.environ | fleet.environment(...)` hides the
        developer's own.
        """
        tls = self.pki.save(directory, *identities)
        limits = {name: str(getattr(self._settings, name)) for name in Limits.__optional_keys__}
        decided = {
            "PARALLAX_CA_PASSPHRASE": "",
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
            "PARALLAX_CERTS_DIR": str(tls.certs_dir.absolute()),
            "PARALLAX_TRUST_DOMAIN": tls.trust_domain,
            "PARALLAX_CONTROL_PLANE": self.address,
        }
        unset = dict.fromkeys((*TLS_VARIABLES.values(), *VARIABLES.values()), "")
        return unset | decided | {VARIABLES[name]: value for name, value in limits.items()}

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "the fleet runs in another event loop: give the test and its fixtures the same loop_scope"
            )


@asynccontextmanager
async def fleet(
    pki: ThrowawayPKI | None = None, *, tls: MTLSConfig | None = None, **limits: Unpack[Limits]
) -> AsyncIterator[Fleet]:
    """
    A control plane on free ports of 127.0.0.1 for as long as the block; then all that it made has ended.

    It requires client certificates, and renews them.

    Args:
        pki: Issues every certificate, also those that are renewed; a new one unless given.
        tls: The control plane's own, instead of a good certificate. If there is a CA in its directory, that
            one renews, and not *pki*.

    Raises:
        ConfigError: A limit is out of bounds, or *tls* cannot be used.
    """
    pki = pki or ThrowawayPKI()
    async with AsyncExitStack() as stack:
        data_dir = stack.enter_context(TemporaryDirectory(prefix="parallax-"))
        settings = _settings(limits, Path(data_dir))
        tls = tls or pki.issue(control_plane(pki.trust_domain).short)
        has_own = not tls.is_explicit and find_authority(tls.certs_dir) is not None
        plane = ControlPlane(settings, tls, authority=None if has_own else lambda: pki.authority)
        await stack.enter_async_context(_hosted(plane.serving()))
        yield Fleet(pki, settings, plane, stack)


class _Client(ParallaxClient):
    """A client that asks no environment."""

    def __init__(self, address: str, tls: MTLSConfig, identity: str, settings: Settings) -> None:
        super().__init__(address, tls, identity=identity)
        self._settings = settings


@asynccontextmanager
async def _hosted(context: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """
    *context*, entered and left within one task.

    A task group needs that, and test runners set up and tear down a fixture in two tasks.
    """
    entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def host() -> None:
        async with context as value:
            entered.set_result(value)
            await leave.wait()

    task = asyncio.create_task(host())  # awaited below, whatever happens
    try:
        await asyncio.wait((task, entered), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait((task,))
        raise
    if not entered.done():
        await task  # raises why
    try:
        yield entered.result()
    finally:
        leave.set()
        await task


def _new_authority(name: str) -> CertificateAuthority:
    return CertificateAuthority.create(now=datetime.now(UTC) - _AGE, name=name)


def _config(**fields: object) -> MTLSConfig:
    """A configuration of these fields and defaults alone: the constructor would ask the environment, too."""
    return MTLSConfig.model_construct(None, enabled=True, verify_client=True, **fields)


def _settings(limits: Limits, data_dir: Path) -> Settings:
    """Settings that leave nothing for the environment to say."""
    values = {name: field.default for name, field in Settings.model_fields.items()}
    ours = {
        "listen": _ANY_PORT,
        "http_listen": NOWHERE,
        "metrics_listen": _ANY_PORT,
        "drain_seconds": DRAIN_S,
        "data_dir": data_dir,
    }
    try:
        return Settings(**(values | ours | dict(limits)))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg'].lower()}, not {first['input']!r}") from None
