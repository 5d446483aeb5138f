"""Who the control plane is itself: at its port, and where it dials agents."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from parallax.control_plane.roots import Own
from parallax.runtime.renewal import Renewer
from parallax.security.errors import ConfigError
from parallax.security.identity import agent_proxy, control_plane
from parallax.security.provider import MTLSCredentialsProvider

if TYPE_CHECKING:
    from parallax.control_plane.issuance import Issuance
    from parallax.security.authority import Issued
    from parallax.security.config import MTLSConfig
    from parallax.security.rotation import CertificateRotator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OwnIdentities:
    """
    The control plane's own credentials, which are read once and follow their files from then on.

    Args:
        provider: Of its port.
        dialler: Of what dials agents, in plaintext the same; None if there is nothing to prove that we may.
        rotators: Keep them like their files, while they run.
        certified: What there is a certificate of.
    """

    provider: MTLSCredentialsProvider
    dialler: MTLSCredentialsProvider | None
    rotators: tuple[CertificateRotator, ...]
    certified: tuple[Own, ...]

    @classmethod
    def load(cls, tls: MTLSConfig, poll: timedelta) -> Self:
        """
        Those that *tls* leads to.

        Args:
            poll: How often to look at the files without being told of a change.

        Raises:
            ConfigError: The port's cannot be used.
        """
        provider = MTLSCredentialsProvider(tls, logger, identity=control_plane(tls.trust_domain))
        dialler = _dialler(tls) if provider.store is not None else provider  # plaintext, which proves nothing
        rotators, certified = [], []
        for each in _different(provider, dialler):
            rotator = each.rotator(poll)
            if rotator is not None:
                rotators.append(rotator)
            if each.store is not None:
                certified.append(Own(each.store, each.keeper(rotator)))
        return cls(provider, dialler, tuple(rotators), tuple(certified))

    @property
    def trust_domain(self) -> str:
        """Of these, and of all whom they trust."""
        return self.provider.identity.trust_domain

    @property
    def providers(self) -> tuple[MTLSCredentialsProvider, ...]:
        """The port's, and what dials agents where that is another."""
        return _different(self.provider, self.dialler)

    def renewers(self, issuance: Issuance) -> tuple[Renewer, ...]:
        """What renews them, by asking ourselves."""
        return tuple(_renewer(own, issuance) for own in self.certified)


def _different(
    provider: MTLSCredentialsProvider, dialler: MTLSCredentialsProvider | None
) -> tuple[MTLSCredentialsProvider, ...]:
    return (provider,) if dialler is None or dialler is provider else (provider, dialler)


def _dialler(tls: MTLSConfig) -> MTLSCredentialsProvider | None:
    # Never less than our own port speaks, whatever is allowed where that has no material.
    strict = tls.model_copy(update={"allow_insecure": False})
    try:
        return MTLSCredentialsProvider(strict, logger, identity=agent_proxy(tls.trust_domain))
    except ConfigError as exc:
        logger.warning(
            "agents that listen and keep no session are not dialled: there is no certificate for it",
            extra={"identity": str(agent_proxy(tls.trust_domain)), "cause": str(exc)},
        )
        return None


def _renewer(own: Own, issuance: Issuance) -> Renewer:
    async def ask(request: bytes) -> Issued:
        return await issuance.renew(own.identity, own.store.current.leaf, request)

    return Renewer(own.store, ask, own.keep)
