"""The commands that mend a set-up, to be copied as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from parallax.sdk.cli.case import Case, Finding, Material, Part, failed
from parallax.security.errors import IdentityError, VerificationError
from parallax.security.files import command, show
from parallax.security.identity import Identity
from parallax.security.verification import identity_of

START: Final = "parallax control-plane start"
TLS_ON: Final = "export PARALLAX_TLS_ENABLED=true"
SET_CLOCK: Final = "timedatectl set-ntp true"
OTHER_ADDRESS: Final = "export PARALLAX_CONTROL_PLANE=HOST:PORT"
START_MUTUAL: Final = f"PARALLAX_TLS_ENABLED=true PARALLAX_TLS_VERIFY_CLIENT=true {START}"


def issue(case: Case) -> str:
    """The command that issues our own credentials again; first out of the way what it would not replace."""
    wanted, material, tls = case.setup.identity, case.material, case.setup.tls
    if wanted is None or tls is None:
        return "parallax certs generate"
    typed = issue_for(case, wanted)
    if tls.is_explicit or material is None or material.problem or material.cert.path is None:
        if material is not None and material.problem and material.authority is None:
            return " ".join(["parallax certs generate", *_where(case)])
        return typed
    if not _is_ours(material, wanted):
        path = material.cert.path
        files = [path, material.key.path or path] if material.is_flat else [path.parent]
        away = [command("mv", file, f"{show(file)}.old")[1:-1] for file in files]
        return " && ".join([*away, typed])
    return typed


def issue_for(case: Case, identity: Identity) -> str:
    """The command that issues a certificate of *identity* with the CA that is here."""
    flat = ("--layout", "flat") if case.material is not None and case.material.is_flat else ()
    words = ("parallax", "certs", "issue", identity.name, "--kind", identity.kind, *flat)
    return " ".join([command(*words)[1:-1], *_where(case)])


def renew(case: Case) -> str:
    """The command that has our own credentials replaced by what the control plane issues for them."""
    name = case.setup.identity.name if case.setup.identity else "NAME"
    return " ".join([command("parallax", "certs", "renew", name)[1:-1], *_where(case)])


def copy_file(source: Path | None, target: Path | None) -> str:
    """The command that copies; capitals stand for a file that we do not know."""
    return command("cp", source or Path("CA_CERTIFICATE"), target or Path("CA_FILE"))[1:-1]


def put_back(case: Case, part: Part, cause: str) -> Finding:
    """Put back *part*, which is missing or damaged."""
    material = case.material
    if material is not None and part is material.ca:
        source = material.authority_path
        return failed(cause, "put the CA's certificate there", copy_file(source, part.path))
    elsewhere = case.setup.tls is not None and case.setup.tls.is_explicit
    place = ", and put certificate and key where the settings say" if elsewhere else ""
    return failed(cause, f"issue it again{place}", issue(case))


def _is_ours(material: Material, wanted: Identity) -> bool:
    """Whether `certs issue` may replace what is there."""
    try:
        return bool(material.chain) and identity_of(material.chain[0], wanted.trust_domain) == wanted
    except (IdentityError, VerificationError):
        return False


def _where(case: Case) -> list[str]:
    """The options that lead another command to the same certificates."""
    tls, file = case.setup.tls, case.setup.config_file
    places = []
    if tls is not None and tls.certs_dir != Path("certs") and not tls.is_explicit:
        places.append(command("--certs-dir", tls.certs_dir)[1:-1])
    if file is not None:
        places.append(command("--config", file)[1:-1])
    return places
