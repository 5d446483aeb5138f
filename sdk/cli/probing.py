"""The facts that a diagnosis needs: from the environment, the disk, the network and the control plane."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from parallax.runtime.address import parse_address
from parallax.runtime.settings import VARIABLES, load_settings
from parallax.sdk.cli.case import Answers, Case, Material, Part, Served, Setup, Speech, Way
from parallax.sdk.cli.host_checks import PREFIX
from parallax.sdk.cli.options import serve_no_metrics
from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.config import VARIABLES as TLS_VARIABLES
from parallax.security.config import MTLSConfig, get_mtls_config
from parallax.security.errors import ConfigError, ParallaxError
from parallax.security.files import read_file, show
from parallax.security.identity import Identity, Kind, control_plane
from parallax.security.keys import is_encrypted, key_to_pem, parse_key
from parallax.security.layouts import Layout, authority_paths, find_authority, leaf_paths
from parallax.security.material import load_credentials
from parallax.security.provider import sources
from parallax.security.snapshot import Content, Source

WITHIN_S: Final = 5.0  # for each step on the network
_LAST_WORD_S: Final = 1.0  # gRPC's servers speak at once, be it SETTINGS or an alert
# The connection preface of HTTP/2 and empty SETTINGS (RFC 9113 §3.4); the answer begins with SETTINGS too.
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_TYPE: Final = 3
_SETTINGS: Final = 4
_PIPE_BYTES: Final = 60_000  # a pipe takes so much before somebody reads
# Not variables of the settings, but read all the same.
_OTHERS: Final = ("PARALLAX_CA_PASSPHRASE",)
# What a server's last word means (RFC 8446 §6.2), by the end of OpenSSL's name for it.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "it saw no certificate",
    "UNKNOWN_CA": "it does not know our CA",
    "CERTIFICATE_EXPIRED": "it is expired by the clock there",
    "CERTIFICATE_REVOKED": "it is revoked",
    "BAD_CERTIFICATE": "it is bad, or not valid yet by the clock there",
    "UNSUPPORTED_CERTIFICATE": "it is not for clients",
}


def collect_setup(
    config: Path | None, certs_dir: Path | None, identity: str | None, address: str | None
) -> Setup:
    """What the environment, the file *config* and the arguments say together."""
    problems: list[str] = []
    settings = tls = who = None
    try:
        settings = load_settings(config, identity=identity, control_plane=address)
    except ConfigError as exc:
        problems.append(str(exc))
    try:
        tls = get_mtls_config(config_file=config, certs_dir=certs_dir)
    except ConfigError as exc:
        problems.append(str(exc))
    with suppress(ParallaxError):  # one that is wrong is among the problems already
        short = settings.identity if settings else identity or "client/cli"
        who = Identity.parse_short(short, tls.trust_domain) if tls else Identity.parse_short(short)
    if settings is not None:
        address = settings.control_plane
    elif address is not None:
        try:
            parse_address(address)
        except ConfigError:
            address = None
    return Setup(
        problems=tuple(dict.fromkeys(problems)),
        variables=frozenset(name for name in os.environ if name.startswith(PREFIX)),
        known=frozenset({*VARIABLES.values(), *TLS_VARIABLES.values(), *_OTHERS}),
        tls=tls,
        identity=who,
        address=address,
        config_file=config,
    )


def collect(case: Case, section: str) -> Case:
    """*case* with the facts of *section*, as far as the others lead there."""
    tls, who, address = case.setup.tls, case.setup.identity, case.setup.address
    match section:
        case "material" if tls is not None and tls.enabled and who is not None:
            return replace(case, material=_material(tls, who, case.now))
        case "way" if address is not None and tls is not None:
            return replace(case, way=_way(address))
        case "served" if case.way is not None and case.way.reached and address and tls is not None:
            return replace(case, served=_served(address, tls, case.material))
        case "answers" if case.served is not None and _may_call(case):
            return replace(case, answers=asyncio.run(_answers(case)))
    return case


def _material(tls: MTLSConfig, who: Identity, now: datetime) -> Material:
    authority, authority_path = _authority(tls.certs_dir)
    try:
        source = sources(tls, who)
    except ParallaxError as exc:
        return Material(problem=str(exc), authority=authority, authority_path=authority_path)
    cert, cert_pem = _read("CERT", source.cert)
    key, key_pem = _read("KEY", source.key, private=True)
    ca, ca_pem = _read("CA", source.ca)
    chain: tuple[x509.Certificate, ...] = ()
    private = bundle = None
    if cert_pem is not None:
        try:
            chain = parse_certificates(cert_pem)
        except ParallaxError as exc:
            cert = replace(cert, defect=str(exc))
    if key_pem is not None:
        try:
            private = parse_key(key_pem)
        except ParallaxError as exc:
            key = replace(key, defect=str(exc), is_encrypted=is_encrypted(key_pem))
    if ca_pem is not None:
        try:
            bundle = TrustBundle.parse(ca_pem)
        except ParallaxError as exc:
            ca = replace(ca, defect=str(exc))
    verdict = ""
    try:
        load_credentials(source, who, now)
    except ParallaxError as exc:
        verdict = str(exc)
    flat = None if tls.is_explicit else leaf_paths(tls.certs_dir, Layout.FLAT, who.name).cert
    return Material(
        is_flat=source.cert == flat,
        cert=cert,
        key=key,
        ca=ca,
        chain=chain,
        private=private,
        bundle=bundle,
        verdict=verdict,
        authority=authority,
        authority_path=authority_path,
    )


def _authority(directory: Path) -> tuple[x509.Certificate | None, Path | None]:
    """The CA's certificate in *directory*, if it can be read."""
    try:
        layout = find_authority(directory)
        if layout is None:
            return None, None
        path = authority_paths(directory, layout).cert
        return parse_certificates(read_file(path, remedy=""))[0], path
    except ParallaxError:
        return None, None


def _read(what: str, source: Source, *, private: bool = False) -> tuple[Part, bytes | None]:
    """
    One part, and its content as far as it can be had.

    A key that is open to others is denied, and read all the same: the other checks can go on.
    """
    if isinstance(source, Content):
        return Part(source.name), source.data
    part = Part(show(source), source)
    remedy = f"put it there (PARALLAX_TLS_{what}_FILE)"
    try:
        content = read_file(source, remedy=remedy)
    except ConfigError as exc:
        # What `read_file` caught stands behind its error, though it is not shown.
        denied = isinstance(exc.__context__, PermissionError)
        return replace(part, problem=str(exc), is_denied=denied), None
    if private:
        try:
            read_file(source, remedy=remedy, private=True)
        except ConfigError as exc:
            return replace(part, problem=str(exc), is_denied=True), content
    return part, content


def _way(address: str) -> Way:
    host, port = parse_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        return Way(name_problem=_reason(exc))
    resolved = tuple(dict.fromkeys(str(each[4][0]) for each in found))
    problem = ""
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(WITHIN_S)
            try:
                connection.connect(where)
            except OSError as exc:
                problem = problem or _reason(exc)
            else:
                return Way(resolved, reached=str(where[0]))
    return Way(resolved, port_problem=problem)


def _served(address: str, tls: MTLSConfig, material: Material | None) -> Served:
    """What is behind the port: TLS first, plaintext if it knows no TLS."""
    host, port = parse_address(address)
    try:
        with socket.create_connection((host, port), WITHIN_S) as raw:
            return _secured(raw, control_plane(tls.trust_domain).dns_name, material)
    except ssl.SSLError as exc:
        reason = exc.reason or ""
        if reason.endswith(tuple(_ALERTS)):  # TLS 1.2 has it within the handshake
            return Served(Speech.TLS, version="TLSv1.2", alpn="h2", presented=True, refusal=_say_alert(exc))
        if "ALERT" in reason or "PROTOCOL" in reason:
            return Served(Speech.TLS, problem=_say_alert(exc))
    except OSError:
        pass  # it went away, or said nothing: perhaps it knows no TLS
    return _plain(host, port)


def _secured(raw: socket.socket, name: str, material: Material | None) -> Served:
    """
    What a TLS peer shows, and how it takes our certificate.

    Nothing is verified and nothing is told here: whom to trust is decided on the chain, by the
    checks, and what must be kept from others travels over gRPC's own channels only.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    presented = material is not None and _present(context, material)
    asked: list[str] = []

    def hear(_: object, direction: str, __: object, ___: object, message: Any, ____: object) -> None:
        if direction == "read":
            asked.append(getattr(message, "name", ""))

    # The only way to see that a server wants a certificate, other than failing to show one: that
    # would be counted there as an attack.
    context._msg_callback = hear  # type: ignore[attr-defined]  # noqa: SLF001
    with context.wrap_socket(raw, server_hostname=name) as connection:
        served = Served(
            Speech.TLS,
            version=connection.version() or "",
            alpn=connection.selected_alpn_protocol() or "",
            chain=_chain(connection),
            asks="CERTIFICATE_REQUEST" in asked,
            presented=presented,
        )
        if served.alpn != "h2":
            return served
        return replace(served, refusal=_refusal(connection))


def _refusal(connection: ssl.SSLSocket) -> str:
    """How the peer ends the connection once it has seen our certificate; empty if it goes on."""
    try:
        # Listen first: to who has closed already, one word more would cost us its last one.
        connection.settimeout(_LAST_WORD_S)
        try:
            first = connection.recv(64)
        except TimeoutError:  # it waits for us
            connection.settimeout(WITHIN_S)
            connection.sendall(_PREFACE)
            first = connection.recv(64)
    except ssl.SSLError as exc:
        return _say_alert(exc)
    except TimeoutError:
        return "it says nothing more"
    except OSError as exc:
        return _reason(exc)
    return "" if first else "it closes the connection without a word"


def _chain(connection: ssl.SSLSocket) -> tuple[x509.Certificate, ...]:
    """Leaf first. What Python calls so is public from 3.13 on, and there before."""
    source: Any = connection
    if not hasattr(source, "get_unverified_chain"):
        source = connection._sslobj  # type: ignore[attr-defined]  # noqa: SLF001
    ders = [_der(each) for each in source.get_unverified_chain() or ()]
    try:
        return tuple(map(x509.load_der_x509_certificate, ders))
    except ValueError:
        return ()


def _der(certificate: Any) -> bytes:
    if isinstance(certificate, bytes):
        return certificate
    text: str = certificate.public_bytes()  # PEM
    return ssl.PEM_cert_to_DER_cert(text)


def _present(context: ssl.SSLContext, material: Material) -> bool:
    """Whether *context* shows our certificate. It takes files alone: so pipes, and no key on a disk."""
    if not material.chain or material.private is None:
        return False
    contents = (certificates_to_pem(material.chain), key_to_pem(material.private))
    if max(map(len, contents)) > _PIPE_BYTES:
        return False
    ends = []
    try:
        for content in contents:
            reading, writing = os.pipe()
            ends.append(reading)
            os.write(writing, content)
            os.close(writing)
        context.load_cert_chain(f"/dev/fd/{ends[0]}", f"/dev/fd/{ends[1]}", password="")
    except (ssl.SSLError, OSError):
        return False
    else:
        return True
    finally:
        for end in ends:
            os.close(end)


def _plain(host: str, port: int) -> Served:
    """What a peer that knows no TLS says to HTTP/2."""
    heard = b""
    try:
        with socket.create_connection((host, port), WITHIN_S) as connection:
            connection.sendall(_PREFACE)
            while len(heard) <= _FRAME_TYPE and (more := connection.recv(64)):
                heard += more
    except OSError:
        return Served(Speech.NOTHING)
    if len(heard) > _FRAME_TYPE and heard[_FRAME_TYPE] == _SETTINGS:
        return Served(Speech.HTTP2)
    return Served(Speech.OTHER, heard) if heard else Served(Speech.NOTHING)


def _may_call(case: Case) -> bool:
    """Whether a call can get any further than the checks that have been made."""
    tls, served = case.setup.tls, case.served
    if tls is None or served is None:
        return False
    if not tls.enabled:
        return served.speech is Speech.HTTP2
    heard = served.speech is Speech.TLS and not served.problem and not served.refusal
    return heard and _is_usable(case.material)


def _is_usable(material: Material | None) -> bool:
    return material is not None and not material.problem and not material.verdict


async def _answers(case: Case) -> Answers:
    """What the control plane answers to calls that change nothing."""
    from parallax.sdk.client import ParallaxClient

    who = case.setup.identity
    if who is None:
        return Answers()
    serve_no_metrics()
    client = ParallaxClient(case.setup.address, case.setup.tls, identity=who.short)
    try:
        try:
            await client.__aenter__()
        except ParallaxError as exc:
            return Answers(health=exc)
        if who.kind is not Kind.CLIENT:
            return Answers()
        try:
            return Answers(agents=tuple((agent.state, agent.verified) for agent in await client.agents()))
        except ParallaxError as exc:
            return Answers(listing=exc)
    finally:
        await client.close()


def now() -> datetime:
    """What this host's clock says."""
    return datetime.now(UTC)


def _say_alert(exc: ssl.SSLError) -> str:
    reason = exc.reason or ""
    said = next((text for ending, text in _ALERTS.items() if reason.endswith(ending)), "")
    return said or reason.lower().replace("_", " ") or "the connection ends"


def _reason(exc: OSError | UnicodeError) -> str:
    if isinstance(exc, TimeoutError):
        return f"no answer within {WITHIN_S:g} s"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror.lower()
    return str(exc).lower() or type(exc).__name__
