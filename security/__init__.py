"""
Identity, certificates and credentials: who somebody is, and the proof of it.

`__all__` is the public surface. What needs gRPC, cryptography or pydantic is imported when it is
first used (PEP 562): importing this package costs nothing, and using one part does not load another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from parallax.security.errors import (
    ConfigError,
    EnrollmentError,
    Expired,
    IdentityError,
    InvalidRequest,
    InvalidTransition,
    LeaseExpired,
    NoSuchAgent,
    NotAuthorized,
    ParallaxError,
    Revoked,
    Superseded,
    TaskFailed,
    Unavailable,
    UntrustedChain,
    VerificationError,
    WrongIdentity,
)
from parallax.security.identity import Identity, Kind

if TYPE_CHECKING:
    from parallax.security.agent_id import get_agent_id
    from parallax.security.authority import CertificateAuthority, Issued
    from parallax.security.bundle import TrustBundle
    from parallax.security.config import MTLSConfig, get_mtls_config
    from parallax.security.credentials import Credentials, CredentialStore
    from parallax.security.keys import KeyType
    from parallax.security.layouts import Layout, Paths, load_authority, save_authority, save_leaf
    from parallax.security.material import load_credentials
    from parallax.security.profiles import LeafProfile
    from parallax.security.provider import Mode, MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator
    from parallax.security.verification import Peer, Usage, authenticate

__all__ = [
    "CertificateAuthority",
    "CertificateRotator",
    "ConfigError",
    "CredentialStore",
    "Credentials",
    "EnrollmentError",
    "Expired",
    "Identity",
    "IdentityError",
    "InvalidRequest",
    "InvalidTransition",
    "Issued",
    "KeyType",
    "Kind",
    "Layout",
    "LeafProfile",
    "LeaseExpired",
    "MTLSConfig",
    "MTLSCredentialsProvider",
    "Mode",
    "NoSuchAgent",
    "NotAuthorized",
    "ParallaxError",
    "Paths",
    "Peer",
    "Revoked",
    "Superseded",
    "TaskFailed",
    "TrustBundle",
    "Unavailable",
    "UntrustedChain",
    "Usage",
    "VerificationError",
    "WrongIdentity",
    "authenticate",
    "get_agent_id",
    "get_mtls_config",
    "load_authority",
    "load_credentials",
    "save_authority",
    "save_leaf",
]

# Module → names, as in the imports for type checkers above; a test compares the two.
_LAZY: Final = {
    "agent_id": ("get_agent_id",),
    "authority": ("CertificateAuthority", "Issued"),
    "bundle": ("TrustBundle",),
    "config": ("MTLSConfig", "get_mtls_config"),
    "credentials": ("CredentialStore", "Credentials"),
    "keys": ("KeyType",),
    "layouts": ("Layout", "Paths", "load_authority", "save_authority", "save_leaf"),
    "material": ("load_credentials",),
    "profiles": ("LeafProfile",),
    "provider": ("MTLSCredentialsProvider", "Mode"),
    "rotation": ("CertificateRotator",),
    "verification": ("Peer", "Usage", "authenticate"),
}
_HOME: Final = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # so that this is asked once
    return value


def __dir__() -> list[str]:
    return __all__
