"""Enrollment over real sockets: somebody without a certificate, a control plane, and what may go wrong."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import ssl
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.control_plane.audit import Deed, Entry
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.edge import bounds
from parallax.control_plane.edge.allowance import Limits
from parallax.control_plane.refusals import CALL
from parallax.control_plane.revoked import RevokedIdentity
from parallax.protos import enrollment_pb2, enrollment_pb2_grpc
from parallax.runtime.http import App, HttpPort, Receive, Scope, Send, answer_json
from parallax.sdk import SecureAgent
from parallax.sdk import enrolling as enrolling_module
from parallax.sdk.cli.self_sign import sign_self
from parallax.sdk.enrolling import Edge, Enrolling
from parallax.security.authority import CertificateAuthority
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import (
    EnrollmentError,
    InvalidRequest,
    NotAuthorized,
    ParallaxError,
    Revoked,
    StorageFailed,
    Unavailable,
    UntrustedChain,
    WrongIdentity,
)
from parallax.security.https import server_context, unverified_context
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind, control_plane
from parallax.security.keys import generate_key, key_id
from parallax.security.layouts import Layout
from parallax.security.newcomer import Newcomer
from parallax.security.profiles import LeafProfile
from parallax.security.request import new_request, request_to_pem
from parallax.security.revocation import Reason
from parallax.security.root_pin import RootPin
from parallax.security.tokens import REFUSED, Grant, Token
from tests.control_plane.test_enrollment import REQUESTS
from tests.end_to_end.test_audit import told
from tests.end_to_end.test_revocation import list_agents
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Serve, Until

AGENT = Identity.parse_short("agent/agent-7")
TokenRequest = enrollment_pb2.CreateTokenRequest


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


@pytest.fixture
async def fleet(serve: Serve) -> AsyncIterator[Fleet]:
    async with serve(http_listen="127.0.0.1:0") as running:
        yield running


async def token(
    fleet: Fleet, names: str = "agent-7", ttl: float = 600, uses: int = 1, kind: str = "agent", **labels: str
) -> str:
    """The secret of a new token, made as an administrator would."""
    grant = enrollment_pb2.TokenGrant(kind=kind, names=names, uses=uses, labels=labels)
    request = TokenRequest(grant=grant)
    request.ttl.FromTimedelta(timedelta(seconds=ttl))
    async with fleet.channel("client/admin") as channel:
        made = await enrollment_pb2_grpc.EnrollmentServiceStub(channel).CreateToken(request, timeout=10)
    assert made.pins == [str(RootPin.of(fleet.pki.authority.certificate))]
    assert made.http_port == fleet.http_port
    return str(made.secret)


def enrolling(fleet: Fleet, *, pin: RootPin | None = None, domain: str = DEFAULT_TRUST_DOMAIN) -> Enrolling:
    pin = pin or RootPin.of(fleet.pki.authority.certificate)
    return Enrolling(Edge("127.0.0.1", fleet.http_port), {pin}, domain)


async def redeem(
    fleet: Fleet, secret: str, identity: Identity = AGENT, key: Any = None, **how: Any
) -> Credentials:
    asking = enrolling(fleet, **how)
    return await asyncio.to_thread(asking.redeem, secret, identity, key or generate_key())


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def ask(
    port: int,
    body: bytes | None,
    *,
    method: str = "POST",
    path: str = "/v1/enrollments",
    source: str = "127.0.0.1",
    headers: dict[str, str] | None = None,
) -> Answer:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(
        "127.0.0.1", port, timeout=10, context=context, source_address=(source, 0)
    )
    try:
        connection.request(method, path, body, {"content-type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        content = response.read()
        return Answer(response.status, json.loads(content or b"{}"), dict(response.getheaders()))
    finally:
        connection.close()


def body(secret: str, identity: str = "agent/agent-7", request: str = "") -> bytes:
    pem = request or request_to_pem(new_request(AGENT, generate_key()))
    return json.dumps({"token": secret, "identity": identity, "request": pem}).encode()


# From a token to a task.


async def test_whoever_enrolled_works_and_renews(fleet: Fleet, tmp_path: Path, until: Until) -> None:
    newcomer = Newcomer(tmp_path / "elsewhere", Layout.PARALLAX, AGENT)
    secret, key = await token(fleet), newcomer.key()
    newcomer.save(await redeem(fleet, secret, key=key))
    tls = MTLSConfig(enabled=True, certs_dir=tmp_path / "elsewhere", verify_client=True)
    agent = Echo("agent-7", "Echo", ["echo"], tls=tls, control_plane=fleet.address)
    async with agent, fleet.client() as client:
        assert (await client.analyze("agent-7", "x", 7)).value == 7
        await agent.rotate_certificates()
        assert (await client.analyze("agent-7", "x", 8)).value == 8
    with pytest.raises(EnrollmentError):  # used, so that the token is spent for its own key, too
        await redeem(fleet, secret, key=key)


@pytest.mark.parametrize("layout", list(Layout))
async def test_every_layout_is_written_and_read(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    from parallax.security.layouts import find_layout, locate
    from parallax.security.material import load_credentials

    monkeypatch.setenv("HOME", str(tmp_path))
    newcomer = Newcomer(tmp_path / "certs", layout, AGENT)
    given = await redeem(fleet, await token(fleet), key=newcomer.key())
    newcomer.save(given)
    assert find_layout(tmp_path / "certs", AGENT.name) is layout
    read = load_credentials(locate(tmp_path / "certs", AGENT.name), AGENT, datetime.now(UTC))
    assert read.parts == given.parts
    assert not (tmp_path / "certs" / ".agent-7.enrolling").exists()


async def test_an_answer_that_was_lost_is_given_to_a_second_attempt(fleet: Fleet, tmp_path: Path) -> None:
    """Otherwise whoever lost it would be left with a spent token and no certificate."""
    secret = await token(fleet)
    await redeem(fleet, secret, key=Newcomer(tmp_path, Layout.PARALLAX, AGENT).key())  # and the process ends
    again = Newcomer(tmp_path, Layout.PARALLAX, AGENT)
    again.save(await redeem(fleet, secret, key=again.key()))


# The one answer.


async def test_whatever_is_wrong_with_a_token_the_answer_is_the_same(fleet: Fleet) -> None:
    spent, short, other, mine = (
        await token(fleet),
        await token(fleet, ttl=1),
        await token(fleet, "agent-8"),
        await token(fleet),
    )
    await redeem(fleet, spent)
    await asyncio.sleep(1.1)  # until it has ended, which it may have done before
    wrong = [
        spent,
        short,
        other,
        f"{mine[:-1]}{'A' if mine[-1] != 'A' else 'B'}",
        f"plxt_{'a' * 12}_{'a' * 43}",
        "guess",
        "",
    ]
    answers = [await asyncio.to_thread(ask, fleet.http_port, body(each)) for each in wrong]
    assert {(each.status, *each.body.items()) for each in answers} == {
        (403, ("error", "EnrollmentError"), ("message", REFUSED))
    }
    assert [(deed.detail["reason"], deed.detail["count"]) for deed in await refusals(fleet)] == [
        ("enrollment_error", "7")
    ]
    assert len({tuple(sorted(each.headers.items())) for each in answers}) == 1


async def guess_a_thousand_times(port: int, path: str, guess: bytes, enough: asyncio.Event) -> list[bytes]:
    """What status each of them gets, a hundred from each of ten addresses, or more until it is *enough*."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(guess)}\r\n\r\n".encode() + guess

    async def guesses(source: str) -> list[bytes]:
        statuses = list[bytes]()
        while len(statuses) < 100 or not enough.is_set():
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=unverified_context(), local_addr=(source, 0)
            )
            writer.write(request)
            statuses.append((await reader.read())[9:12])
            writer.close()
        return statuses

    guessed = await asyncio.gather(*(guesses(f"127.0.0.{number}") for number in range(2, 12)))
    return [status for each in guessed for status in each]


@pytest.mark.timeout(90)
async def test_a_thousand_guesses_are_refused_and_counted_and_keep_nobody_out(fleet: Fleet) -> None:
    secret = await token(fleet)
    guess = body(f"plxt_{'a' * 12}_{'a' * 43}")
    redeemed = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        guesses = guess_a_thousand_times(fleet.http_port, "/v1/enrollments", guess, redeemed)
        guessing = group.create_task(guesses)
        await redeem(fleet, secret)
        redeemed.set()
    statuses = guessing.result()
    assert len(statuses) >= 1_000
    assert set(statuses) == {b"403", b"503"}
    counted = await fleet.metrics()
    name = "parallax_enrollments_total"
    refused, deferred = counted[f'{name}{{outcome="refused"}}'], counted[f'{name}{{outcome="deferred"}}']
    assert refused + deferred == len(statuses)
    assert refused >= 10 * Limits().refusals.burst
    assert counted[f'{name}{{outcome="enrolled"}}'] == 1
    audited = Counter[str]()
    for deed in await refusals(fleet):
        assert re.fullmatch(r"127\.0\.0\.\d+", deed.source)
        audited[deed.detail["reason"]] += int(deed.detail["count"])
    assert audited == {"enrollment_error": refused, "unavailable": deferred}


async def test_who_was_turned_away_is_told_when_to_come_back(fleet: Fleet) -> None:
    statuses = []
    while (answer := await asyncio.to_thread(ask, fleet.http_port, body("guess"))).status == 403:
        statuses.append(answer.status)
    assert len(statuses) >= Limits().refusals.burst
    assert (answer.status, answer.body["error"]) == (503, "Unavailable")
    assert 1 <= int(answer.headers["retry-after"]) <= 2


# What is wrong with the request.


async def test_a_good_token_is_told_what_is_wrong_with_the_request(fleet: Fleet) -> None:
    secret = await token(fleet)
    pem = request_to_pem(new_request(AGENT, generate_key(), ["localhost"]))
    answer = await asyncio.to_thread(ask, fleet.http_port, body(secret, request=pem))
    assert (answer.status, answer.body["error"]) == (403, "NotAuthorized")
    assert "may not ask for the name 'localhost'" in answer.body["message"]
    await redeem(fleet, secret)


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (b"", 400, "field required"),
        (b"nonsense", 400, "json decode error"),
        (b'{"token": "secret-7"}', 400, "identity: field required"),
        (b'{"token": 7, "identity": "agent/agent-7", "request": ""}', 400, "token: input should be a valid"),
        (body("secret-7", "agent"), 400, "not <kind>/<name>"),
        (body("secret-7", "agent/../x"), 400, "not <kind>/<name>|not a name"),
        (body("secret-7", "agent/ca"), 400, "reserved"),
        (body("secret-7", request="nonsense"), 400, "not a certificate request"),
        (body("secret-7" * 100), 400, "token: string should have at most"),
        (body("secret-7", request="x" * 40_000), 400, "request: string should have at most"),
        (bytes(64 * 1024 + 1), 413, "more than 65,536 bytes"),
        (b'{"secret-7": 1, ' + body("x")[1:], 400, "the body: extra inputs are not permitted"),
        (b'{"token": "secret-7\xff"}', 400, "there was an error parsing the body"),
        (b'{"token": "\\ud800"}', 400, "token: input should be a valid string"),
        (b'{"token": NaN}', 400, "token: input should be a valid string"),
        (b'{"token": ' + b"7" * 5_000 + b"}", 400, "there was an error parsing the body"),
        (b'{"token":' * 7_000, 400, "there was an error parsing the body"),
    ],
)
async def test_what_cannot_be_read_is_refused_and_not_repeated(
    fleet: Fleet, sent: bytes, status: int, said: str
) -> None:
    answer = await asyncio.to_thread(ask, fleet.http_port, sent)
    assert (answer.status, answer.body["error"]) in {(status, "InvalidRequest"), (status, "IdentityError")}
    assert any(part in answer.body["message"] for part in said.split("|")), answer.body
    assert "secret-7" not in str(answer)
    audited = await refusals(fleet)
    assert "secret-7" not in str(audited)
    assert [(deed.source, deed.detail["count"]) for deed in audited] == [("127.0.0.1", "1")]


@pytest.mark.parametrize("wrong", REQUESTS)
async def test_a_request_with_one_thing_wrong_is_refused_with_its_reason_and_audited(
    fleet: Fleet, wrong: str
) -> None:
    make, error, text = REQUESTS[wrong]
    content, label = b64encode(make()).decode(), "CERTIFICATE REQUEST"
    pem = f"-----BEGIN {label}-----\n{content}\n-----END {label}-----\n"
    answer = await asyncio.to_thread(ask, fleet.http_port, body(await token(fleet), request=pem))
    assert answer.body["error"] == error.__name__
    assert re.search(text, answer.body["message"]) or wrong == "nonsense"
    assert not await fleet.plane.ledger.held(AGENT)
    (deed,) = await refusals(fleet)
    reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.__name__).lower()
    assert (deed.by, deed.source, deed.detail["reason"]) == ("unknown", "127.0.0.1", reason)


async def test_nobody_gets_a_name_that_is_not_for_him(fleet: Fleet) -> None:
    free, other, admin = map(Identity.parse_short, ("agent/agent-9", "agent/agent-8", "client/admin"))
    key = generate_key()
    await redeem(fleet, await token(fleet), key=key)

    secret = await token(fleet, "agent-8")
    with pytest.raises(InvalidRequest, match="another identity"):
        await redeem(fleet, secret, other, key)
    await redeem(fleet, secret, other)

    secret = await token(fleet, "agent-*", uses=2)
    with pytest.raises(NotAuthorized, match="has a certificate already"):
        await redeem(fleet, secret)
    await redeem(fleet, secret, free)

    with pytest.raises(NotAuthorized, match="needs a token for this name alone"):
        await redeem(fleet, await token(fleet, "adm*", kind="client"), admin)
    await redeem(fleet, await token(fleet, "admin", kind="client"), admin)


async def test_who_is_revoked_neither_enrolls_nor_waits_until_reinstated(fleet: Fleet) -> None:
    secret, log, by = await token(fleet), fleet.plane.revocations, "spiffe://parallax.local/client/admin"
    asking = enrolling(fleet)
    await log.revoke(RevokedIdentity(AGENT, Reason.KEY_COMPROMISE, by, datetime.now(UTC)))
    with pytest.raises(Revoked, match="parallax certs reinstate agent/agent-7"):
        await redeem(fleet, secret)
    with pytest.raises(Revoked, match="parallax certs reinstate agent/agent-7"):
        await asyncio.to_thread(asking.request, AGENT, generate_key())
    await log.reinstate(AGENT, by)
    await redeem(fleet, secret)
    assert await asyncio.to_thread(asking.request, AGENT, generate_key()) is None


async def test_labels_do_not_outlive_a_revocation(serve: Serve, tmp_path: Path) -> None:
    """Whoever is issued the name afterwards, by hand or by a pin, was granted nothing."""
    by = "spiffe://parallax.local/client/admin"
    async with serve(http_listen="127.0.0.1:0", data_dir=tmp_path / "data") as fleet:
        assert fleet.plane.enrollment is not None
        grant = Grant(DEFAULT_TRUST_DOMAIN, Kind.AGENT, AGENT.name, {"zone": "a"})
        made, _ = await fleet.plane.enrollment.tokens.create(grant, timedelta(hours=1), by)
        await redeem(fleet, made.text)
        assert fleet.plane.grants.labels_of(AGENT) == {"zone": "a"}
        now = datetime.now(UTC)
        await fleet.plane.revocations.revoke(RevokedIdentity(AGENT, Reason.KEY_COMPROMISE, by, now))
        await fleet.plane.revocations.reinstate(AGENT, by)
        assert fleet.plane.grants.labels_of(AGENT) == {}
    async with serve(http_listen="127.0.0.1:0", data_dir=tmp_path / "data") as fleet:
        assert fleet.plane.grants.labels_of(AGENT) == {}
        await redeem(fleet, await token(fleet))


async def test_what_cannot_be_written_enrolls_nobody_and_spends_no_token(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    secret, key, engine = await token(fleet), generate_key(), fleet.plane._engine
    await engine._on_thread(lambda: engine._file._db.execute("PRAGMA query_only = ON"))
    with pytest.raises(StorageFailed):
        await redeem(fleet, secret, key=key)
    assert "nothing is recorded" in caplog.messages
    caplog.clear()
    assert not await fleet.plane.ledger.held(AGENT)
    await engine._on_thread(lambda: engine._file._db.execute("PRAGMA query_only = OFF"))
    await redeem(fleet, secret, key=generate_key())


async def test_a_service_does_not_even_wait(fleet: Fleet) -> None:
    with pytest.raises(NotAuthorized, match="a service is not enrolled"):
        await asyncio.to_thread(enrolling(fleet).request, control_plane(), generate_key())


async def refusals(fleet: Fleet) -> list[Deed]:
    """What the audit log has of those who were refused."""
    await fleet.plane.refusals.enter()
    page = await AuditReader(fleet.plane._engine).page(0)
    deeds = [Entry.decode(*kept).deed for kept in page.kept]
    return [deed for deed in deeds if deed.action == CALL]


async def test_a_body_of_a_mebibyte_is_answered_or_cut_off(fleet: Fleet) -> None:
    """Who still sends when the answer comes may not get to read it."""
    with suppress(OSError, http.client.HTTPException):
        answer = await asyncio.to_thread(ask, fleet.http_port, bytes(1024 * 1024))
        assert answer.status == 413
    await redeem(fleet, await token(fleet))


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/metrics", "/v1/enrollments/"])
async def test_there_is_nothing_else(fleet: Fleet, path: str) -> None:
    answer = await asyncio.to_thread(ask, fleet.http_port, None, method="GET", path=path)
    assert answer.status == 404
    assert answer.body == {"error": "InvalidRequest", "message": "not found"}


async def test_other_methods_and_other_sites_get_nothing(fleet: Fleet) -> None:
    answer = await asyncio.to_thread(ask, fleet.http_port, None, method="GET")
    assert (answer.status, answer.body["error"]) == (405, "InvalidRequest")
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = await asyncio.to_thread(ask, fleet.http_port, None, method="OPTIONS", headers=asked)
    assert answer.status == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_who_does_not_finish_is_cut_off_and_others_are_served(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "BODY_S", 0.2)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.http_port, ssl=context)
    writer.write(b"POST /v1/enrollments HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408")
    await redeem(fleet, await token(fleet))


# Who answers.


async def test_who_shows_another_root_gets_no_token(fleet: Fleet) -> None:
    stranger = RootPin.of(CertificateAuthority.create(now=datetime.now(UTC)).certificate)
    with pytest.raises(UntrustedChain, match="does not show the root that is pinned"):
        await redeem(fleet, await token(fleet), pin=stranger)


class Impostor:
    """Serves the real bundle, which anybody can read, with its own certificate; notes what it hears."""

    def __init__(self, bundle_pem: bytes) -> None:
        self.heard: list[str] = []
        self._bundle = bundle_pem.decode()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.heard.append(scope["path"])
        await answer_json(send, 200, {"trust_domain": "parallax.local", "bundle": self._bundle})


async def test_who_shows_the_root_without_a_certificate_of_it_gets_no_token(fleet: Fleet) -> None:
    stranger, key = CertificateAuthority.create(now=datetime.now(UTC)), generate_key()
    issued = stranger.issue(control_plane(), key.public_key(), LeafProfile(), datetime.now(UTC))
    store = CredentialStore(control_plane(), Credentials(issued.chain, key, issued.bundle), datetime.now(UTC))
    impostor = Impostor(fleet.pki.authority.bundle.pem)
    async with HttpPort(impostor.app, "127.0.0.1:0", "X", context=server_context(store)) as port:
        asking = Enrolling(
            Edge("127.0.0.1", port.port), {RootPin.of(fleet.pki.authority.certificate)}, DEFAULT_TRUST_DOMAIN
        )
        with pytest.raises(UntrustedChain, match="the pinned root does not vouch for"):
            await asyncio.to_thread(asking.redeem, await token(fleet), AGENT, generate_key())
    assert impostor.heard == ["/v1/trust-bundle"]


async def test_an_agent_does_not_pass_for_the_control_plane(fleet: Fleet) -> None:
    """Its root is the right one, and a server's word for its trust domain would make its name right, too."""
    rogue = Identity.parse_short("agent/control-plane")
    leaf = fleet.pki.issue(rogue.short)
    store = CredentialStore(
        rogue, Credentials((leaf.certificate,), leaf.key, fleet.pki.authority.bundle), datetime.now(UTC)
    )
    impostor = Impostor(fleet.pki.authority.bundle.pem)
    async with HttpPort(impostor.app, "127.0.0.1:0", "X", context=server_context(store)) as port:
        pin = RootPin.of(fleet.pki.authority.certificate)
        asking = Enrolling(Edge("127.0.0.1", port.port), {pin}, DEFAULT_TRUST_DOMAIN)
        with pytest.raises(WrongIdentity, match=r"it is not spiffe://parallax.local/service/control-plane"):
            await asyncio.to_thread(asking.redeem, "plxt_secret", AGENT, generate_key())
    assert impostor.heard == ["/v1/trust-bundle"]


@pytest.mark.parametrize("status", [200, 403, 503])
@pytest.mark.parametrize("said", [b"[" * 100_000, b"\xff", b"7" * 5_000, b'{"bundle": "x"}'])
async def test_nonsense_from_whoever_answers_is_one_of_our_errors(
    said: bytes, status: int, rogue: CredentialStore
) -> None:
    async def answering(_scope: Scope, _receive: Receive, send: Send) -> None:
        later = (b"retry-after", b"000000000" + b"9" * 30)
        await send({"type": "http.response.start", "status": status, "headers": [later]})
        await send({"type": "http.response.body", "body": said})

    with pytest.raises(ParallaxError):
        await redeem_at(answering, rogue)


async def test_an_answer_that_never_ends_is_cut_off(
    rogue: CredentialStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a little of it comes."""
    monkeypatch.setattr(enrolling_module, "ANSWER_S", 0.5)

    async def dripping(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with suppress(OSError):
            while True:
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.sleep(0.05)

    async with asyncio.timeout(10):
        with pytest.raises(Unavailable, match="does not answer"):
            await redeem_at(dripping, rogue)


@pytest.fixture
def rogue() -> CredentialStore:
    """What somebody shows whose CA is his own."""
    authority, key, now = (
        CertificateAuthority.create(now=datetime.now(UTC)),
        generate_key(),
        datetime.now(UTC),
    )
    issued = authority.issue(control_plane(), key.public_key(), LeafProfile(), now)
    return CredentialStore(control_plane(), Credentials(issued.chain, key, issued.bundle), now)


async def redeem_at(app: App, store: CredentialStore) -> Credentials:
    """What one gets for a token where *app* answers."""
    async with HttpPort(app, "127.0.0.1:0", "X", context=server_context(store)) as port:
        asking = Enrolling(Edge("127.0.0.1", port.port), set(), DEFAULT_TRUST_DOMAIN)
        return await asyncio.to_thread(asking.redeem, "plxt_secret", AGENT, generate_key())


async def test_where_nobody_listens_it_says_so() -> None:
    asking = Enrolling(Edge("127.0.0.1", free_port()), set(), DEFAULT_TRUST_DOMAIN)
    with pytest.raises(Unavailable, match="does not answer: Connection refused"):
        await asyncio.to_thread(asking.redeem, "plxt_secret", AGENT, generate_key())


# When it is there.


async def test_where_nobody_is_authenticated_nobody_enrolls(serve: Serve, pki: Pki) -> None:
    for tls in (pki.tls(verify_client=False), MTLSConfig(enabled=False)):
        async with serve(tls=tls, http_listen="127.0.0.1:0") as fleet:
            assert fleet.http_port == 0


async def test_nobody_but_the_administrator_makes_a_token(fleet: Fleet) -> None:
    import grpc

    for who in ("client/cli", "agent/agent-1", "service/agent-proxy"):
        async with fleet.channel(who) as channel:
            stub = enrollment_pb2_grpc.EnrollmentServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError, match="may not call") as refused:
                await stub.CreateToken(TokenRequest(), timeout=10)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_key_is_approved_and_no_name_whichever_program_asks(fleet: Fleet) -> None:
    key = generate_key()
    asking = enrolling(fleet)
    assert await asyncio.to_thread(asking.request, AGENT, key) is None
    async with fleet.channel("client/admin") as channel:
        stub = enrollment_pb2_grpc.EnrollmentServiceStub(channel)
        by_name = enrollment_pb2.ApproveEnrollmentRequest(which=AGENT.short)
        with pytest.raises(aio.AioRpcError, match="is no fingerprint") as refused:
            await stub.ApproveEnrollment(by_name, timeout=10)
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT
        assert await asyncio.to_thread(asking.request, AGENT, key) is None
        by_key = enrollment_pb2.ApproveEnrollmentRequest(which=key_id(key.public_key()).hex())
        await stub.ApproveEnrollment(by_key, timeout=10)
    assert await asyncio.to_thread(asking.request, AGENT, key) is not None


async def test_what_is_issued_is_entered_before_it_is_used_and_seen_after(fleet: Fleet, until: Until) -> None:
    credentials = await redeem(fleet, await token(fleet))
    (entry,) = await fleet.plane.ledger.held(AGENT)
    assert entry.seen_at is None
    assert entry.serial == f"{credentials.leaf.serial_number:x}"


LABELLED = """
[[rule]]
name = "auditors look"
who = ["label:team=audit"]
may = ["ListAgents"]
"""


async def test_the_policy_goes_by_the_labels_of_a_token_at_once_and_after_a_restart(
    serve: Serve, tmp_path: Path
) -> None:
    file, who = tmp_path / "policy.toml", Identity.parse_short("client/ci")
    file.write_text(LABELLED)
    again = partial(serve, http_listen="127.0.0.1:0", policy_file=file, data_dir=tmp_path / "data")

    async def may_look(fleet: Fleet) -> bool:
        with suppress(aio.AioRpcError):
            await list_agents(fleet, who.short)
            return True
        return False

    async with again() as fleet:
        assert not await may_look(fleet)
        await redeem(fleet, await token(fleet, "ci", kind="client", team="audit"), who)
        assert await may_look(fleet)
    async with again() as fleet:
        assert await may_look(fleet)
        await redeem(fleet, await token(fleet, "ci", kind="client", team="build"), who)
        assert not await may_look(fleet)


async def test_a_token_for_many_names_is_not_for_one_that_the_policy_lets_administer(
    serve: Serve, tmp_path: Path
) -> None:
    """Else whoever holds it becomes an administrator who was not issued a certificate yet."""
    file, olga = tmp_path / "policy.toml", Identity.parse_short("client/olga")
    file.write_text(
        '[[rule]]\nname = "operators"\nwho = ["client/admin", "client/olga"]\nmay = ["administration"]\n'
    )
    async with serve(http_listen="127.0.0.1:0", policy_file=file) as fleet:
        for_many = await token(fleet, "o*", uses=2, kind="client")
        with pytest.raises(NotAuthorized, match="client/olga needs a token for this name alone"):
            await redeem(fleet, for_many, olga)
        await redeem(fleet, for_many, Identity.parse_short("client/omar"))
        await redeem(fleet, await token(fleet, "olga", kind="client"), olga)


async def test_who_was_not_enrolled_is_in_the_audit_log_with_the_reason(fleet: Fleet) -> None:
    for _ in range(3):
        with pytest.raises(EnrollmentError):
            await redeem(fleet, "plxt_wrong")
    await fleet.plane.refusals.enter()
    (entry,) = await told(fleet, "call/refused")
    assert (entry.deed.source, entry.deed.subject) == ("127.0.0.1", "/v1/enrollments")
    assert (entry.deed.detail["reason"], entry.deed.detail["count"]) == ("enrollment_error", "3")


@pytest.mark.parametrize("path", ["enrollments", "enrollment-requests", "names", "pins", "exchanges"])
async def test_what_is_refused_is_audited_as_that_which_was_asked(fleet: Fleet, path: str) -> None:
    answer = await asyncio.to_thread(ask, fleet.http_port, b"{}", path=f"/v1/{path}")
    assert answer.status == 400
    (deed,) = await refusals(fleet)
    assert (deed.subject, deed.detail["reason"]) == (f"/v1/{path}", "invalid_request")


async def test_a_path_that_a_stranger_chooses_is_not_written_down(fleet: Fleet) -> None:
    body = bytes(bounds.MAX_BODY_BYTES + 1)  # so that it is refused before anybody looks where it goes
    answer = await asyncio.to_thread(ask, fleet.http_port, body, path="/v1/whatever-i-want")
    assert answer.status == 413
    (deed,) = await refusals(fleet)
    assert (deed.subject, deed.detail["reason"]) == ("", "invalid_request")


# Devices.


@pytest.mark.parametrize(
    ("path", "stated"),
    [
        ("/v1/names", {}),
        ("/v1/names", {"key": "00"}),
        ("/v1/names", {"key": "Z" * 64}),
        ("/v1/names", {"key": "0" * 64, "name": "agent-7"}),
        ("/v1/pins", {"identity": "agent/agent-7"}),
        ("/v1/pins", {"identity": "agent/agent-7", "certificate": "-----BEGIN CERTIFICATE-----"}),
        ("/v1/pins", {"identity": "agent/agent-7", "certificate": "x" * 9_000}),
        ("/v1/pins", {"identity": "service/control-plane", "certificate": "one that is good"}),
        ("/v1/pins", {"identity": "agent/../x", "certificate": "one that is good"}),
    ],
)
async def test_what_no_device_says_is_refused(fleet: Fleet, path: str, stated: dict[str, str]) -> None:
    if stated.get("certificate") == "one that is good":
        stated = stated | {"certificate": fleet.pki.issue("agent/agent-7").chain_pem.decode()}
    secret = await token(fleet)
    answer = await asyncio.to_thread(
        ask, fleet.http_port, json.dumps(stated | {"token": secret}).encode(), path=path
    )
    assert answer.status in {400, 401, 403}
    assert secret not in json.dumps(answer.body)


async def test_a_token_is_guessed_no_faster_where_names_are_allotted(fleet: Fleet) -> None:
    """What is refused there counts as elsewhere: the source is turned away."""
    guess = json.dumps({"token": Token.generate().text, "key": "0" * 64}).encode()
    limit, began, refused = Limits().refusals, time.monotonic(), 0
    while (answer := await asyncio.to_thread(ask, fleet.http_port, guess, path="/v1/names")).status == 403:
        refused += 1
    assert answer.status == 503
    assert limit.burst <= refused <= limit.burst + limit.per_s * (time.monotonic() - began)


async def test_a_pin_is_audited_with_the_token_that_it_was_for_and_who_gave_that(fleet: Fleet) -> None:
    secret, key = await token(fleet), generate_key()
    leaf = sign_self(AGENT, key, timedelta(days=1), datetime.now(UTC))
    assert await asyncio.to_thread(enrolling(fleet).register, secret, AGENT, leaf)
    (entry,) = await told(fleet, "pin/added")
    assert (entry.deed.by, entry.deed.subject) == (f"token {secret.split('_')[1]}", str(AGENT))
    assert entry.deed.detail["given_by"] == "spiffe://parallax.local/client/admin"


async def test_where_nobody_may_have_it_without_approval_a_name_grants_nothing(fleet: Fleet) -> None:
    key = generate_key()
    asking = enrolling(fleet)
    named = await asyncio.to_thread(asking.name, None, key)
    assert await asyncio.to_thread(asking.name, None, generate_key()) != named
    with pytest.raises(EnrollmentError):
        await asyncio.to_thread(asking.redeem, await token(fleet), named, key)
    assert await asyncio.to_thread(asking.request, named, key) is None
    assert await asyncio.to_thread(asking.name, None, key) == named
