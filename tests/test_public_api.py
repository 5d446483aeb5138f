"""What users import, frozen: a name that comes, goes or moves changes this file too."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PUBLIC = {
    "parallax.sdk": [
        "AgentEvent",
        "AgentInfo",
        "ParallaxClient",
        "Result",
        "SecureAgent",
        "SecureGrpcAgentProxy",
        "SyncParallaxClient",
    ],
    "parallax.sdk.testing": [
        "Fleet",
        "ThrowawayPKI",
        "fleet",
    ],
    "parallax.security": [
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
    ],
}

STAR_IMPORT = """
import sys
names = {}
exec(f"from {sys.argv[1]} import *", names)
print(*sorted(set(names) - {"__builtins__"}))
"""


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == PUBLIC[package]


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in PUBLIC.items() for name in names]
)
def test_public_name_exists_and_has_a_docstring(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    assert value.__doc__


@pytest.mark.parametrize("package", PUBLIC)
def test_star_import_gives_exactly_the_public_names(package: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", STAR_IMPORT, package], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == PUBLIC[package]
