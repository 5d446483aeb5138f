"""Which agent this host is, by its certificate: for a program that nobody tells its id."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from parallax.security.bundle import parse_certificates
from parallax.security.config import VARIABLES, MTLSConfig, get_mtls_config
from parallax.security.errors import ConfigError, ParallaxError
from parallax.security.files import read_file, show
from parallax.security.identity import Kind
from parallax.security.layouts import Layout, leaf_paths
from parallax.security.verification import identity_of

if TYPE_CHECKING:
    from pathlib import Path

_REMEDY: Final = "restore it, or state the agent's id"


def get_agent_id(config: MTLSConfig | None = None) -> str:
    """
    The id of the agent that the certificate on this host names; `SecureAgent` wants it.

    Only where there is one certificate it is no guess whose it is: the one that the settings name or
    contain, else that of a mounted secret, else the one in `~/.mtls`. Whether it is good for anything is for
    whoever uses it to find out.

    Args:
        config: By default what the `PARALLAX_*` environment says.

    Raises:
        ConfigError: There is none, it cannot be read, or it names no agent; one line.
    """
    config = config or get_mtls_config()
    if config.cert_pem is not None:
        return _agent_in(config.cert_pem.encode(), VARIABLES["cert_pem"], config.trust_domain)
    if config.cert_file is not None:
        return _read(config.cert_file, config.trust_domain)
    places = [leaf_paths(config.certs_dir, layout, "any").cert for layout in (Layout.KUBERNETES, Layout.HOME)]
    for place in places:
        if os.path.lexists(place):
            return _read(place, config.trust_domain)
    neither = " nor ".join(map(show, places))
    raise ConfigError(f"nothing here says which agent this is, neither {neither}: state its id")


def _read(path: Path, trust_domain: str) -> str:
    return _agent_in(read_file(path, remedy=_REMEDY), show(path), trust_domain)


def _agent_in(pem: bytes, where: str, trust_domain: str) -> str:
    try:
        identity = identity_of(parse_certificates(pem)[0], trust_domain)
    except ParallaxError as exc:
        raise ConfigError(f"{where}: {exc}: {_REMEDY}") from exc
    if identity.kind is not Kind.AGENT:
        raise ConfigError(f"{where} is of {identity}, which is no agent: {_REMEDY}")
    return identity.name
