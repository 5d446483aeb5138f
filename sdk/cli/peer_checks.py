"""The checks on the way to the control plane and on who answers there. Pure; `security` judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from parallax.sdk.cli.case import Case, Finding, Served, Speech, Status, failed, ok, skipped, split
from parallax.sdk.cli.host_checks import check_path, spells
from parallax.sdk.cli.mending import (
    OTHER_ADDRESS,
    SET_CLOCK,
    START,
    START_MUTUAL,
    TLS_ON,
    copy_file,
    issue_for,
    renew,
)
from parallax.sdk.cli.render import distance, instant
from parallax.sdk.exits import UNAVAILABLE, exit_code
from parallax.security.certificate import subject_of
from parallax.security.errors import (
    Expired,
    IdentityError,
    NotAuthorized,
    ParallaxError,
    Unavailable,
    VerificationError,
)
from parallax.security.identity import clip, control_plane
from parallax.security.pinned import is_self_signed
from parallax.security.tls import is_loopback
from parallax.security.verification import Usage, authenticate, identity_of

# The way there.


def check_address(case: Case) -> Finding:
    """It may be dialled."""
    address, tls = case.setup.address, case.setup.tls
    if address is None:
        return skipped("the settings cannot be read")
    if tls is not None and not tls.enabled and not is_loopback(address):
        return failed(f"plaintext does not dial {clip(address)}", "switch TLS on", TLS_ON)
    return ok(address)


def check_name(case: Case) -> Finding:
    """The host's name can be looked up."""
    if case.way is None:
        return skipped("there is no address")
    if case.way.name_problem:
        return failed(
            f"{clip(_host(case))} cannot be looked up: {case.way.name_problem}",
            "correct the name, or the resolver",
            OTHER_ADDRESS,
        )
    return ok(", ".join(case.way.resolved))


def check_port(case: Case) -> Finding:
    """Somebody listens."""
    if case.way is None or case.way.name_problem:
        return skipped("there is nowhere to connect to")
    if case.way.port_problem:
        return failed(
            f"{case.setup.address}: {case.way.port_problem}",
            "start the control plane there; if it runs, correct PARALLAX_CONTROL_PLANE or the firewall",
            START,
        )
    return ok(f"open at {case.way.reached}")


def check_protocol(case: Case) -> Finding:
    """It speaks what we speak."""
    served, tls = case.served, case.setup.tls
    if served is None or tls is None:
        return skipped("nobody has been reached")
    match served.speech:
        case Speech.NOTHING:
            return failed(
                "accepts connections and says nothing",
                "it hangs, or something in between swallows the traffic: start it again",
                START,
            )
        case Speech.OTHER:
            return failed(
                f"speaks neither TLS nor HTTP/2: {clip(repr(served.heard)[2:-1])}",
                "another program has this port: correct the address",
                OTHER_ADDRESS,
            )
        case Speech.HTTP2 if tls.enabled:
            return failed(
                "does not speak TLS but plaintext HTTP/2",
                "start it with TLS",
                START_MUTUAL,
            )
        case Speech.TLS if not tls.enabled:
            return failed("speaks TLS, which is off here", "switch it on", TLS_ON)
        case Speech.TLS if not served.problem and served.alpn != "h2":
            return failed(
                "speaks TLS, but not HTTP/2 (no ALPN h2): it is no gRPC server",
                "another program has this port: correct the address",
                OTHER_ADDRESS,
            )
        case _:
            return ok(str(served.speech))


def check_handshake(case: Case) -> Finding:
    """TLS comes about."""
    served = _secured(case)
    if isinstance(served, Finding):
        return served
    if served.problem:
        return failed(
            f"the handshake fails: {served.problem}",
            "TLS 1.2 or newer on both sides; see its log",
            f"LOG_LEVEL=debug {START}",
        )
    return ok(served.version or "done")


def check_server_chain(case: Case) -> Finding:
    """Its certificate comes from our CA, whatever the time."""
    served = _secured(case)
    if isinstance(served, Finding):
        return served
    bundle = case.material.bundle if case.material else None
    if not served.chain or bundle is None:
        return skipped("there is no certificate or no CA to compare")
    try:
        check_path(served.chain, bundle, case.now, Usage.SERVER)
    except Expired:
        return ok("from our CA; that one's validity is the next check's")
    except VerificationError as exc:
        path = case.material.ca.path if case.material else None
        return failed(
            f"its certificate, {subject_of(served.chain[0])}, is not from our CA: {exc}",
            "give both sides the same CA certificate, and certificates that it issued",
            copy_file(Path("CA_OF_THE_CONTROL_PLANE"), path),
        )
    return ok("from our CA")


def check_server_validity(case: Case) -> Finding:
    """Its certificate is within its validity, by this host's clock."""
    served = _secured(case)
    if isinstance(served, Finding):
        return served
    if not served.chain:
        return skipped("it showed no certificate")
    leaf = served.chain[0]
    if case.now < leaf.not_valid_before_utc:
        return failed(
            f"its certificate is not valid before {instant(leaf.not_valid_before_utc)} "
            f"({distance(leaf.not_valid_before_utc, case.now)}): the clock of this host, which says "
            f"{instant(case.now)}, is probably wrong",
            "set the clocks of both hosts",
            SET_CLOCK,
        )
    if case.now > leaf.not_valid_after_utc:
        mine = case.material.chain[0] if case.material and case.material.chain else None
        both = mine is not None and case.now > mine.not_valid_after_utc
        doubt = "; ours too: is this host's clock right?" if both else ""
        return failed(
            f"its certificate expired {distance(leaf.not_valid_after_utc, case.now)}, at "
            f"{instant(leaf.not_valid_after_utc)}{doubt}",
            "issue it again on its host",
            issue_for(case, control_plane(_trust_domain(case))),
        )
    return ok(f"ends {distance(leaf.not_valid_after_utc, case.now)}")


def check_server_identity(case: Case) -> Finding:
    """It is the control plane that answers, under the name that we verify."""
    served = _secured(case)
    if isinstance(served, Finding):
        return served
    if not served.chain:
        return skipped("it showed no certificate")
    leaf, wanted = served.chain[0], control_plane(_trust_domain(case))
    try:
        found = identity_of(leaf, wanted.trust_domain)
    except (IdentityError, VerificationError) as exc:
        return failed(
            f"its certificate does not say who it is: {exc}", "issue it again", issue_for(case, wanted)
        )
    if found != wanted:
        return failed(
            f"{found} answers there, not {wanted}",
            f"correct the address, or give that server the certificate of {wanted.short}",
            OTHER_ADDRESS,
        )
    if not spells(leaf, wanted):
        return failed(
            f"its certificate lacks the DNS name {wanted.dns_name}, which clients verify",
            "issue it again on its host",
            issue_for(case, wanted),
        )
    try:
        bundle = case.material.bundle if case.material else None
        if bundle is not None:
            authenticate(served.chain, bundle, wanted.trust_domain, case.now, Usage.SERVER)
    except Expired:
        return ok(f"{found}; its validity is another check's")
    except VerificationError as exc:
        if check_server_chain(case).status is Status.FAILED:
            return ok(f"{found}, by its own word alone")
        return failed(
            f"its certificate is not good for a server: {exc}", "issue it again", issue_for(case, wanted)
        )
    return ok(str(found))


def check_authentication(case: Case) -> Finding:
    """It knows who we are."""
    answers, served, tls = case.answers, case.served, case.setup.tls
    if tls is None or not tls.enabled:
        if answers is None:
            return skipped("it cannot be called")
        return _call_failed(answers.health) if answers.health else ok("nobody is authenticated in plaintext")
    if served is None or served.speech is not Speech.TLS or served.problem:
        return skipped("there is no TLS connection")
    if not served.presented:
        return skipped("there is no usable certificate of ours to show")
    if served.refusal:
        return _refused(case, served.refusal)
    if not served.asks:
        text = "it asks nobody for a certificate: nobody is authenticated there"
        if "verify_client" in tls.model_fields_set and not tls.verify_client:
            return ok(f"{text}, as PARALLAX_TLS_VERIFY_CLIENT=false says")
        return failed(
            text,
            "start it so that it does",
            START_MUTUAL,
        )
    if answers is None:
        return skipped("it cannot be called with these credentials")
    if answers.health is not None:
        return _call_failed(answers.health)
    return ok(f"as {case.setup.identity}")


def check_authorization(case: Case) -> Finding:
    """It lets us do what our kind is for."""
    answers, who = case.answers, case.setup.identity
    if answers is None or answers.health is not None or who is None:
        return skipped("it cannot be called")
    if answers.listing is not None:
        if isinstance(answers.listing, NotAuthorized):
            return failed(
                f"{answers.listing}"[:300],
                "act as an identity that may",
                "export PARALLAX_IDENTITY=client/cli",
            )
        return _call_failed(answers.listing)
    if answers.agents is None:
        return skipped(f"what {who.kind}s may do cannot be tried without doing it")
    if not answers.agents:
        return ok(
            "may read; no agent is registered", "start one", "parallax agent run MODULE:CLASS --id NAME"
        )
    ready = [verified for state, verified in answers.agents if state == "ready"]
    count = f"may read; {len(ready)} of {len(answers.agents)} agents ready"
    if not ready:
        return replace(
            failed(
                f"{count}: a task would end in NO_AGENT",
                "start one that is registered again",
                "parallax agent run MODULE:CLASS --id NAME",
            ),
            code=UNAVAILABLE,
        )
    if not any(ready):
        return ok(f"{count}, none of them verified", "call them with --allow-unverified")
    return ok(count)


def _secured(case: Case) -> Served | Finding:
    """What a TLS peer showed; or why there is nothing to judge."""
    tls = case.setup.tls
    if tls is None or not tls.enabled:
        return skipped("TLS is off")
    if case.served is None or case.served.speech is not Speech.TLS:
        return skipped("nobody speaks TLS there")
    return case.served


def _refused(case: Case, cause: str) -> Finding:
    """Our certificate is not let in."""
    material = case.material
    if material is not None and material.chain and is_self_signed(material.chain[0]):
        return failed(
            f"it does not let in our certificate, which is self-signed: {cause}",
            "have it pinned; if 'parallax certs pins' lists it as to be exchanged, exchange it",
            renew(case),
        )
    return failed(
        f"it refuses our certificate: {cause}",
        "its log has the reason ('TLS handshake failed'): does it trust our CA, is its clock right?",
        copy_file(material.ca.path if material else None, Path("CA_OF_THE_CONTROL_PLANE")),
    )


def _call_failed(error: ParallaxError) -> Finding:
    cause, remedy, typed = split(str(error))
    code = exit_code(error)
    refused = isinstance(error, VerificationError | NotAuthorized)
    advice = remedy or ("issue our certificate again" if refused else "see its log, and try again")
    return replace(
        failed(
            cause, advice, typed or (f"LOG_LEVEL=debug {START}" if isinstance(error, Unavailable) else "")
        ),
        code=code,
    )


def _host(case: Case) -> str:
    return (case.setup.address or "").rpartition(":")[0]


def _trust_domain(case: Case) -> str:
    return case.setup.tls.trust_domain if case.setup.tls else ""
