"""The checks on what this host was told and on what lies on its disk. Pure; the verdicts are `security`'s."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509

from parallax.sdk.cli.case import Case, Finding, Material, failed, ok, skipped, split
from parallax.sdk.cli.facts import SOON, key_type_of
from parallax.sdk.cli.mending import SET_CLOCK, TLS_ON, copy_file, issue, put_back
from parallax.sdk.cli.render import distance, instant
from parallax.security.bundle import TrustBundle
from parallax.security.certificate import find_extension, is_signed_by, issuer_of, subject_of
from parallax.security.errors import Expired, IdentityError, VerificationError
from parallax.security.files import command, show
from parallax.security.identity import Identity, Kind, clip
from parallax.security.keys import fits
from parallax.security.path import find_path
from parallax.security.pinned import is_self_signed
from parallax.security.verification import Usage, identity_of

PREFIX: Final = "PARALLAX_"
_ALIKE: Final = 0.85  # TLS_ENABLE and TLS_ENABLED are; CONTROL_PLANE_PORT and CONTROL_PLANE are not
# What Kubernetes puts into the environment of every pod beside a service called parallax-….
_KUBERNETES: Final = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)")


# What this host was told.


def check_settings(case: Case) -> Finding:
    """Every setting can be understood."""
    if case.setup.problems:
        return failed(case.setup.problems[0], "correct that setting")
    return ok(f"{len(case.setup.variables & case.setup.known)} variables set, each of them usable")


def check_variables(case: Case) -> Finding:
    """Every variable that looks like ours is one, or at least no misspelt one."""
    unknown = sorted(case.setup.variables - case.setup.known)
    for name in unknown:
        if _KUBERNETES.fullmatch(name):
            continue
        stems = {known.removeprefix(PREFIX): known for known in sorted(case.setup.known)}
        similar = difflib.get_close_matches(name.removeprefix(PREFIX), stems, n=1, cutoff=_ALIKE)
        if similar and (meant := stems[similar[0]]) not in case.setup.variables:
            return failed(
                f"{clip(name)[1:-1]} means nothing: {meant} does",
                "spell it so",
                f'export {meant}="${name}"; unset {name}' if name.isidentifier() else "",
            )
        if name.startswith("PARALLAX_TLS_"):
            return failed(f"{clip(name)[1:-1]} means nothing", "remove it", f"unset {name}")
    return ok(f"without meaning here: {clip(', '.join(unknown))}" if unknown else "none is misspelt")


def check_agreement(case: Case) -> Finding:
    """The TLS settings do not contradict one another."""
    tls = case.setup.tls
    if tls is None:
        return skipped("the settings cannot be read")
    if not tls.enabled and (tls.verify_client or tls.is_explicit):
        what = "client certificates are required" if tls.verify_client else "a key is named"
        return failed(f"TLS is off, though {what}", "switch it on", TLS_ON)
    if not tls.enabled:
        return ok("TLS is off: plaintext, on loopback only", "switch it on for anything but a trial", TLS_ON)
    if tls.allow_insecure:
        return ok(
            "TLS is on, and falls back to plaintext on loopback if its material is unusable",
            "do without in production",
            "unset PARALLAX_TLS_ALLOW_INSECURE",
        )
    return ok("TLS is on")


# What lies on this host's disk.


def check_files(case: Case) -> Finding:
    """The three files are there."""
    match case.material:
        case None:
            return skipped(_why_no_material(case))
        case Material(problem=problem) if problem:
            cause, remedy, typed = split(problem)
            return failed(cause, remedy, typed if "parallax certs" not in remedy else issue(case))
        case material:
            for part in (material.cert, material.key, material.ca):
                if part.problem and not part.is_denied:
                    return put_back(case, part, split(part.problem)[0])
            return ok(", ".join(part.name for part in (material.cert, material.key, material.ca)))


def check_permissions(case: Case) -> Finding:
    """We can read them, and nobody else the key."""
    material = case.material
    if material is None or material.problem:
        return skipped("there are no files")
    for part in (material.cert, material.key, material.ca):
        if part.is_denied:
            return failed(*split(part.problem))
    return ok("the key is closed to others, and everything readable")


def check_content(case: Case) -> Finding:
    """They hold what they should."""
    material = case.material
    if material is None or material.problem:
        return skipped("there are no files")
    for part in (material.cert, material.key, material.ca):
        if part.is_encrypted and part.path:
            key = show(part.path)
            typed = command("openssl", "pkey", "-in", key, "-out", f"{key}.new")[1:-1]
            swap = command("mv", f"{key}.new", key)[1:-1]
            return failed(f"{part.name}: {part.defect}", "decrypt it", f"(umask 077 && {typed}) && {swap}")
        if part.defect:
            return put_back(case, part, f"{part.name}: {part.defect}")
    if not (material.chain and material.private and material.bundle):
        return skipped("not all of it can be read")
    return ok(f"a certificate ({key_type_of(material.chain[0])}), a key and a CA")


def check_pair(case: Case) -> Finding:
    """The key is the certificate's."""
    material = case.material
    if material is None or not material.chain or material.private is None:
        return skipped("certificate or key cannot be read")
    if not fits(material.private, material.chain[0]):
        return failed(
            f"{material.key.name} does not fit {material.cert.name}",
            "put both files of one pair there, or issue both again",
            issue(case),
        )
    return ok("the key fits the certificate")


def check_chain(case: Case) -> Finding:
    """There is a path to the CA, whatever the time."""
    material = case.material
    if material is None or not material.chain or material.bundle is None:
        return skipped("certificate or CA cannot be read")
    leaf, bundle = material.chain[0], material.bundle
    wanted = case.setup.identity
    if len(material.chain) == 1 and is_self_signed(leaf) and wanted and wanted.kind is not Kind.SERVICE:
        return ok("self-signed: the control plane lets it in while it is pinned there")
    try:
        check_path(material.chain, bundle, case.now)
    except Expired:
        return ok(f"issued by {issuer_of(leaf)}; that one's validity is the next check's")
    except VerificationError as exc:
        if material.authority and material.authority_path and is_signed_by(leaf, material.authority):
            return failed(
                f"{material.ca.name} is another CA than {material.cert.name} was issued by: {exc}",
                "put the right CA's certificate there",
                copy_file(material.authority_path, material.ca.path),
            )
        return failed(
            f"{material.cert.name}: {exc}", "issue it again with the CA that all trust", issue(case)
        )
    return ok(f"issued by {issuer_of(leaf)}, which {material.ca.name} holds")


def check_validity(case: Case) -> Finding:
    """Nothing on the path has ended."""
    material = case.material
    if material is None or not material.chain:
        return skipped("the certificate cannot be read")
    leaf = material.chain[0]
    if case.now > leaf.not_valid_after_utc:
        ended = (
            f"expired {distance(leaf.not_valid_after_utc, case.now)}, at {instant(leaf.not_valid_after_utc)}"
        )
        return failed(
            f"{material.cert.name} {ended}", "compare this host's clock, or issue it again", issue(case)
        )
    for issuer in _issuers(material.chain, material.bundle):
        if case.now > issuer.not_valid_after_utc:
            return failed(
                f"the CA {subject_of(issuer)} expired at {instant(issuer.not_valid_after_utc)}",
                "begin with a new CA in a new directory, and give it to all",
                "parallax certs generate --certs-dir NEW_DIRECTORY",
            )
    left = distance(leaf.not_valid_after_utc, case.now)
    if leaf.not_valid_after_utc - case.now < SOON:
        return ok(f"ends {left}", "issue it again before that", issue(case))
    return ok(f"ends {left}")


def check_clock(case: Case) -> Finding:
    """Nothing begins in the future: if it does, it is this host that lives in the past."""
    material = case.material
    if material is None or not material.chain:
        return skipped("nothing to compare with")
    for each in (*material.chain, *_issuers(material.chain, material.bundle)):
        if case.now < each.not_valid_before_utc:
            begins = distance(each.not_valid_before_utc, case.now)
            return failed(
                f"{subject_of(each)} is not valid before {instant(each.not_valid_before_utc)} ({begins}): "
                f"this host's clock says {instant(case.now)} and is probably wrong",
                "set the clock, or have the certificate issued by a host whose clock is right",
                SET_CLOCK,
            )
    return ok(f"{instant(case.now)}, which no certificate contradicts")


def check_identity(case: Case) -> Finding:
    """The certificate names who we act as."""
    material, wanted = case.material, case.setup.identity
    if material is None or not material.chain or wanted is None:
        return skipped("the certificate cannot be read" if wanted else "there is no identity to compare with")
    try:
        found = identity_of(material.chain[0], wanted.trust_domain)
    except (IdentityError, VerificationError) as exc:
        return failed(f"{material.cert.name} is not for {wanted}: {exc}", "issue it again", issue(case))
    if found != wanted:
        return failed(
            f"{material.cert.name} belongs to {found}, not to {wanted}",
            f"act as --identity {found.short}, or issue one for {wanted.short}",
            issue(case),
        )
    if wanted.kind is Kind.SERVICE and not spells(material.chain[0], wanted):
        return failed(
            f"{material.cert.name} lacks the DNS name {wanted.dns_name}, so that nobody can dial it",
            "issue it again",
            issue(case),
        )
    return ok(str(found))


def check_credentials(case: Case) -> Finding:
    """What a process that starts with them would say: the last word."""
    material = case.material
    if material is None or material.problem:
        return skipped("there are none")
    if material.verdict:
        return failed(split(material.verdict)[0], "issue them again", issue(case))
    return ok("a process starts with them")


def check_path(
    chain: Sequence[x509.Certificate], bundle: TrustBundle, now: datetime, usage: Usage | None = None
) -> None:
    """Raise unless there is a path at the moment of the leaf's life that is nearest to *now*."""
    leaf = chain[0]
    moment = max(leaf.not_valid_before_utc, min(now, leaf.not_valid_after_utc))
    find_path(chain, bundle, moment, (usage or Usage.CLIENT).oid)


def spells(leaf: x509.Certificate, identity: Identity) -> bool:
    """Whether TLS finds the DNS name of *identity* in the SANs, if there are any (as gRPC does)."""
    sans = find_extension(leaf, x509.SubjectAlternativeName)
    if sans is None:
        return True  # it names the identity, so its CN is that name or a bare one; the call has the last word
    names = sans.get_values_for_type(x509.DNSName)
    return any(Identity.from_dns(name, identity.trust_domain) == identity for name in names)


def _issuers(chain: Sequence[x509.Certificate], bundle: TrustBundle | None) -> list[x509.Certificate]:
    """The intermediates, and the roots that issued the last of *chain*."""
    roots = bundle.roots if bundle else ()
    return [*chain[1:], *(root for root in roots if is_signed_by(chain[-1], root))]


def _why_no_material(case: Case) -> str:
    tls = case.setup.tls
    return "TLS is off: not read" if tls is not None and not tls.enabled else "the settings cannot be read"
