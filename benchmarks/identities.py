"""The certificates of a run: one CA of ours, and a leaf for whoever takes part."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import grpc

from parallax.security import CertificateAuthority, Identity, MTLSConfig
from parallax.security.identity import control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, leaf_paths, save_leaf
from parallax.security.profiles import LeafProfile

SERVER: Final = "control-plane"
AGENT: Final = "agent-1"
CLIENT: Final = "cli"
BROKER: Final = "broker"


def write_certificates(certs: Path) -> None:
    """A new CA, whose key is not kept, and the leaves it signs."""
    now = datetime.now(UTC)
    authority = CertificateAuthority.create(now=now)
    for short in (f"service/{SERVER}", f"service/{BROKER}", f"agent/{AGENT}", f"client/{CLIENT}"):
        identity, key = Identity.parse_short(short), generate_key()
        issued = authority.issue(identity, key.public_key(), LeafProfile(), now)
        save_leaf(certs, Layout.PARALLAX, identity, issued.chain, key, issued.bundle)


def files(certs: Path, name: str) -> tuple[Path, Path, Path]:
    """Certificate, key and CA of *name*."""
    paths = leaf_paths(certs, Layout.PARALLAX, name)
    return paths.cert, paths.key, paths.ca


def server_credentials(certs: Path, name: str) -> grpc.ServerCredentials:
    """Mutual TLS for a plain gRPC server."""
    cert, key, ca = (path.read_bytes() for path in files(certs, name))
    return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)


def channel(certs: Path, name: str, address: str) -> grpc.aio.Channel:
    """A plain gRPC channel as *name* to the holder of the control plane's certificate."""
    cert, key, ca = (path.read_bytes() for path in files(certs, name))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    options = [("grpc.ssl_target_name_override", control_plane().dns_name)]
    return grpc.aio.secure_channel(address, credentials, options=options)


def ssl_context(certs: Path, name: str) -> ssl.SSLContext:
    """Mutual TLS for a client that is not gRPC's."""
    cert, key, ca = files(certs, name)
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(cert, key)
    return context


def tls(certs: Path) -> MTLSConfig:
    """The same directory, as Parallax takes it."""
    return MTLSConfig(enabled=True, certs_dir=certs, verify_client=True)


def environment(certs: Path) -> dict[str, str]:
    """The same, for a process of Parallax."""
    return {
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_CERTS_DIR": str(certs),
        "PARALLAX_LOG_FORMAT": "json",
    }
