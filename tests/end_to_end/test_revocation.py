"""Revoking over real connections: who is refused from then on, who is not, and what ends."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from grpc import StatusCode, aio

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.registry import AgentRef
from parallax.protos import (
    certificate_pb2,
    certificate_pb2_grpc,
    dispatch_pb2,
    dispatch_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    link_pb2,
    registry_pb2,
    registry_pb2_grpc,
    revocation_pb2,
    revocation_pb2_grpc,
    session_pb2_grpc,
    task_pb2,
)
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import certificates_to_pem
from parallax.security.errors import TaskFailed
from parallax.security.identity import Identity
from parallax.security.keys import generate_key, key_id, key_to_pem
from parallax.security.profiles import LeafProfile, leaf_template
from parallax.security.request import new_request
from parallax.security.revocation import WITHDRAWN
from parallax.security.verification import CertificateId
from tests.end_to_end.raw_link import Patient

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Leaf, Pki, Serve, Until

WITHIN_S = 15.0

Revoke = revocation_pb2.RevokeRequest
Serial = revocation_pb2.CertificateSerial


class Counts(SecureAgent):
    """Counts as far as it is told, and never ends."""

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        for number in range(data):
            yield number, 1.0
        await asyncio.Event().wait()


class Slow(SecureAgent):
    """Never answers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        if task == "wait":
            self.begun.set()
            await asyncio.Event().wait()
        return data, 1.0


# Asking for it.


async def revoke(
    fleet: Fleet, who: str | Leaf = "client/admin", **target: Any
) -> revocation_pb2.RevokeResponse:
    target.setdefault("reason", revocation_pb2.REVOCATION_REASON_KEY_COMPROMISE)
    async with fleet.channel(who) as channel:
        stub = revocation_pb2_grpc.RevocationServiceStub(channel)
        answer: revocation_pb2.RevokeResponse = await stub.Revoke(Revoke(**target), timeout=WITHIN_S)
        return answer


async def revoke_leaf(fleet: Fleet, leaf: Leaf, **options: Any) -> revocation_pb2.RevokeResponse:
    return await revoke(fleet, certificate=serial_of(leaf, fleet.pki), **options)


async def reinstate(fleet: Fleet, short: str) -> revocation_pb2.Revocation:
    async with fleet.channel("client/admin") as channel:
        stub = revocation_pb2_grpc.RevocationServiceStub(channel)
        request = revocation_pb2.ReinstateRequest(identity=short)
        answer: revocation_pb2.ReinstateResponse = await stub.Reinstate(request, timeout=WITHIN_S)
        return answer.revocation


async def listed(fleet: Fleet, page_size: int = 0) -> list[revocation_pb2.Revocation]:
    request = revocation_pb2.ListRevocationsRequest(page_size=page_size)
    found: list[revocation_pb2.Revocation] = []
    async with fleet.channel("client/admin") as channel:
        stub = revocation_pb2_grpc.RevocationServiceStub(channel)
        while True:
            page = await stub.ListRevocations(request, timeout=WITHIN_S)
            found += page.revocations
            request.page_token = page.next_page_token
            if not request.page_token:
                return found


def serial_of(leaf: Leaf, pki: Pki) -> Serial:
    issuer = key_id(pki.authority.certificate.public_key())
    return Serial(serial=f"{leaf.certificate.serial_number:x}", issuer=issuer.hex())


async def list_agents(fleet: Fleet, leaf: Leaf | str) -> None:
    """A call that every client may make, on a connection of its own."""
    async with fleet.channel(leaf) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.ListAgents(registry_pb2.ListAgentsRequest(), timeout=WITHIN_S)


def is_revoked(error: aio.AioRpcError) -> bool:
    trailers = dict(error.trailing_metadata() or ())
    return error.code() is StatusCode.UNAUTHENTICATED and trailers == {"parallax-error": "Revoked"}


async def is_refused(call: Awaitable[object]) -> bool:
    """Whether *call* is refused for a revocation; any other end of it is an error."""
    with pytest.raises(aio.AioRpcError) as refused:
        await call
    return is_revoked(refused.value)


# Who is refused, and who is not.


async def test_a_certificate_revoked_by_serial_is_refused_and_its_holder_goes_on_with_another(
    fleet: Fleet, pki: Pki
) -> None:
    stolen, other = pki.issue("client/cli"), pki.issue("client/cli")
    await list_agents(fleet, stolen)
    answer = await revoke_leaf(fleet, stolen)
    assert not answer.already
    assert await is_refused(list_agents(fleet, stolen))
    await list_agents(fleet, other)


async def test_a_certificate_is_refused_on_a_connection_that_was_there_before(fleet: Fleet, pki: Pki) -> None:
    stolen = pki.issue("client/cli")
    async with fleet.channel(stolen) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.ListAgents(registry_pb2.ListAgentsRequest(), timeout=WITHIN_S)
        await revoke_leaf(fleet, stolen)
        assert await is_refused(stub.ListAgents(registry_pb2.ListAgentsRequest(), timeout=WITHIN_S))


async def test_the_same_serial_of_another_issuer_is_not_meant(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.issue("client/cli")
    await revoke(fleet, certificate=Serial(serial=f"{leaf.certificate.serial_number:x}", issuer="ab" * 32))
    await list_agents(fleet, leaf)


async def test_a_serial_that_its_issuer_has_given_twice_says_nothing_of_whom_is_meant(
    fleet: Fleet, pki: Pki, until: Until
) -> None:
    twins = [twin(pki, short) for short in ("client/cli", "client/ci")]
    for leaf in twins:
        await list_agents(fleet, leaf)
    await until(lambda: not len(fleet.plane.ledger))
    fingerprint = twins[0].certificate.fingerprint(hashes.SHA256()).hex()
    for target in ({"certificate": serial_of(twins[0], pki)}, {"fingerprint": fingerprint}):
        with pytest.raises(aio.AioRpcError, match="client/ci, client/cli"):
            await revoke(fleet, **target)
    for leaf in twins:
        await list_agents(fleet, leaf)


def twin(pki: Pki, short: str) -> Leaf:
    """A leaf with a serial that others have, too."""
    leaf, key, issuer = pki.issue(short), generate_key(), pki.authority
    who = Identity.parse_short(short)
    template = leaf_template(who, key.public_key(), issuer.certificate, LeafProfile(), pki.now, serial=1)
    certificate = template.sign(issuer.key, hashes.SHA256())
    chain = certificates_to_pem((certificate,))
    return replace(leaf, key_pem=key_to_pem(key), chain_pem=chain, key=key, certificate=certificate)


async def test_a_certificate_that_the_ledger_knows_is_found_by_its_serial_or_its_fingerprint(
    fleet: Fleet, pki: Pki
) -> None:
    first, second = pki.issue("client/cli"), pki.issue("client/cli")
    for leaf in (first, second):
        await list_agents(fleet, leaf)
    while len(await entries(fleet, "client/cli")) < 2:
        await asyncio.sleep(0.01)
    by_serial = await revoke(fleet, certificate=Serial(serial=f"{first.certificate.serial_number:x}"))
    by_fingerprint = await revoke(fleet, fingerprint=second.certificate.fingerprint(hashes.SHA256()).hex())
    for leaf, answer in ((first, by_serial), (second, by_fingerprint)):
        assert answer.revocation.identity == "spiffe://parallax.local/client/cli"
        assert answer.revocation.not_after.ToDatetime(UTC) == leaf.certificate.not_valid_after_utc
        assert await is_refused(list_agents(fleet, leaf))
    assert all(entry.revoked for entry in await entries(fleet, "client/cli"))


async def entries(fleet: Fleet, holder: str) -> list[ledger_pb2.LedgerEntry]:
    async with fleet.channel("client/admin") as channel:
        stub = ledger_pb2_grpc.LedgerServiceStub(channel)
        request = ledger_pb2.ListCertificatesRequest(holder=holder)
        return list((await stub.ListCertificates(request, timeout=WITHIN_S)).certificates)


async def test_of_an_identity_that_is_revoked_nothing_is_good_and_of_others_everything(
    fleet: Fleet, pki: Pki
) -> None:
    seen, never_seen = pki.issue("client/cli"), pki.issue("client/cli")
    await list_agents(fleet, seen)
    await revoke(fleet, identity="client/cli")
    assert await is_refused(list_agents(fleet, seen))
    assert await is_refused(list_agents(fleet, never_seen))
    assert await is_refused(list_agents(fleet, pki.issue("client/cli", now=datetime.now(UTC))))
    await list_agents(fleet, "client/ci")


async def test_after_reinstatement_what_was_issued_before_stays_revoked_and_the_next_is_good_at_once(
    fleet: Fleet, pki: Pki
) -> None:
    seen, never_seen = (pki.issue("client/cli", now=datetime.now(UTC)) for _ in range(2))
    await list_agents(fleet, seen)
    await revoke(fleet, identity="client/cli")
    await reinstate(fleet, "client/cli")
    assert await is_refused(list_agents(fleet, seen))
    assert await is_refused(list_agents(fleet, never_seen))
    await list_agents(fleet, pki.issue("client/cli", now=datetime.now(UTC)))


def below(pki: Pki, name: str) -> CertificateAuthority:
    """A CA below that of *pki*."""
    key, root = generate_key(), pki.authority
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(pki.now - timedelta(minutes=5))
        .not_valid_after(pki.now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(root.key, hashes.SHA256())
    )
    return CertificateAuthority(certificate, key, root.bundle)


def issue_below(authority: CertificateAuthority, short: str, pki: Pki) -> Leaf:
    key = generate_key()
    issued = authority.issue(Identity.parse_short(short), key.public_key(), LeafProfile(), pki.now)
    chain_pem = certificates_to_pem(issued.chain)
    return type(pki.issue(short))(key_to_pem(key), chain_pem, issued.bundle.pem, key, issued.chain[0])


async def test_what_is_below_a_revoked_intermediate_is_refused(fleet: Fleet, pki: Pki) -> None:
    revoked, sister = (below(pki, f"Intermediate {number}") for number in (1, 2))
    leaves = [issue_below(each, "client/cli", pki) for each in (revoked, sister)]
    for leaf in leaves:
        await list_agents(fleet, leaf)
    issuer = key_id(pki.authority.certificate.public_key()).hex()
    await revoke(fleet, certificate=Serial(serial=f"{revoked.certificate.serial_number:x}", issuer=issuer))
    assert await is_refused(list_agents(fleet, leaves[0]))
    await list_agents(fleet, leaves[1])


# What is open.


def stream_of(kind: str, channel: aio.Channel) -> Any:
    """A stream of *kind*, to be read from."""
    match kind:
        case "watch":
            return registry_pb2_grpc.RegistryServiceStub(channel).WatchAgents(
                registry_pb2.WatchAgentsRequest()
            )
        case "roots":
            request = certificate_pb2.WatchTrustBundleRequest()
            return certificate_pb2_grpc.CertificateServiceStub(channel).WatchTrustBundle(request)
        case "link":
            return dispatch_pb2_grpc.DispatchServiceStub(channel).Link()
        case "session":
            return session_pb2_grpc.SessionServiceStub(channel).Connect()
    raise AssertionError(kind)


async def opened(kind: str, channel: aio.Channel) -> Any:
    """The same, once the control plane has answered."""
    stream = stream_of(kind, channel)
    if kind in {"link", "session"}:
        hello = link_pb2.Hello(
            protocol_version=1,
            min_protocol_version=1,
            instance_id=secrets.token_bytes(16) if kind == "session" else b"",
            description=registry_pb2.AgentDescription(capabilities=["raw"], max_concurrency=1),
        )
        await stream.write(link_pb2.LinkFrame(hello=hello))
    await stream.read()
    return stream


async def end_of(stream: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as ended:
        async with asyncio.timeout(WITHIN_S):
            while await stream.read() is not aio.EOF:
                pass
    return ended.value


@pytest.mark.parametrize("by", ["serial", "name"])
@pytest.mark.parametrize(
    ("kind", "who"),
    [("watch", "client/cli"), ("roots", "client/cli"), ("link", "client/cli"), ("session", "agent/agent-1")],
)
async def test_a_stream_whose_caller_is_revoked_ends_and_no_other(
    fleet: Fleet, pki: Pki, kind: str, who: str, by: str
) -> None:
    stolen = pki.issue(who)
    bystander = who if by == "serial" else "client/ci" if who.startswith("client") else "agent/agent-2"
    async with (
        fleet.channel(stolen) as channel,
        fleet.channel("client/ci" if kind == "session" else bystander) as other,
    ):
        ended = await opened(kind, channel)
        kept = await opened("watch" if kind == "session" else kind, other)
        before = await fleet.metrics()
        if by == "serial":
            await revoke_leaf(fleet, stolen)
        else:
            await revoke(fleet, identity=who)
        assert is_revoked(await end_of(ended))
        reason = 'parallax_authentication_failures_total{reason="revoked"}'
        after = await fleet.metrics()
        assert after[reason] == before.get(reason, 0) + 1
        assert after["parallax_revocations"] == 1
        await asyncio.sleep(0.2)  # nothing is to happen: whatever would end it, does so by now
        assert not kept.done()
        kept.cancel()


async def test_a_call_whose_caller_is_revoked_ends(fleet: Fleet, pki: Pki) -> None:
    stolen = pki.issue("client/cli")
    request = dispatch_pb2.ExecuteRequest(target="agent-1", task="wait", payload=task_pb2.Payload(data=b"7"))
    async with fleet.agent(Slow) as agent, fleet.channel(stolen) as channel:
        asked = asyncio.ensure_future(dispatch_pb2_grpc.DispatchServiceStub(channel).Execute(request))
        await agent.begun.wait()
        await revoke_leaf(fleet, stolen)
        async with asyncio.timeout(WITHIN_S):
            assert await is_refused(asked)


# What an agent holds that is revoked.


async def revoked(asked: asyncio.Future[Any], who: str) -> None:
    """Wait for the end of a task that *who* held: said to be for that, and not after the drain time."""
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(TaskFailed) as failed:
            await asked
    assert failed.value.code == "REVOKED"
    assert f"{who} was revoked while it held the task: " in str(failed.value)
    assert f"spiffe://parallax.local/agent/{who} is revoked: " in str(failed.value)


@pytest.mark.parametrize("by", ["serial", "name"])
async def test_the_tasks_of_a_session_that_is_revoked_end_as_such_at_once(
    fleet: Fleet, pki: Pki, by: str
) -> None:
    leaf = pki.issue("agent/agent-1")
    async with fleet.client() as client, fleet.raw_agent(leaf, agent_id="agent-1") as agent:
        asked = asyncio.create_task(client.analyze("agent-1", "echo", 7))
        await agent.task()
        if by == "serial":
            await revoke_leaf(fleet, leaf)
        else:
            await revoke(fleet, identity="agent/agent-1")
        await revoked(asked, "agent-1")
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(TaskFailed, match="NO_AGENT"):
                await client.analyze("agent-1", "echo", 8)
        assert is_revoked(await agent.refusal())
        assert (await fleet.metrics())['parallax_tasks_total{outcome="REVOKED"}'] == 1


async def test_the_tasks_of_whoever_hangs_up_while_another_is_revoked_are_lost(fleet: Fleet) -> None:
    async with fleet.client() as client, fleet.raw_agent(agent_id="agent-1") as agent:
        asked = asyncio.create_task(client.analyze("agent-1", "echo", 7))
        await agent.task()
        await revoke(fleet, identity="agent/agent-2")
        agent.hang_up()
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(TaskFailed, match="AGENT_LOST"):
                await asked


async def test_an_idempotent_task_of_an_agent_that_is_revoked_goes_to_another_and_no_other_does(
    fleet: Fleet,
) -> None:
    async with fleet.client() as client, fleet.raw_agent(agent_id="agent-1") as first:
        once = asyncio.create_task(client.analyze("capability:raw", "once", 7))
        await first.task()
        again = asyncio.create_task(client.analyze("capability:raw", "again", 7, idempotent=True))
        await first.task()
        async with fleet.raw_agent("agent/agent-2", agent_id="agent-2") as second:
            await revoke(fleet, identity="agent/agent-1")
            await revoked(once, "agent-1")
            task = await second.task()
            assert link_pb2.Work.FromString(task.work).name == "again"
            await second.answer(task.id, b"done")
            result = await again
            assert (result.value, result.agent_id) == (b"done", "agent-2")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await second.task()


@pytest.mark.parametrize("by", ["serial", "name"])
async def test_an_instance_keeps_its_tasks_while_one_of_its_two_sessions_is_not_revoked(
    fleet: Fleet, pki: Pki, by: str
) -> None:
    old, new, instance = pki.issue("agent/agent-1"), pki.issue("agent/agent-1"), secrets.token_bytes(16)
    async with fleet.client() as client, fleet.raw_agent(old, instance_id=instance) as first:
        asked = asyncio.create_task(client.analyze("agent-1", "echo", 7))
        task = await first.task()
        async with fleet.raw_agent(new, instance_id=instance) as second:
            if by == "serial":
                await revoke_leaf(fleet, old)
                assert is_revoked(await first.refusal())
                assert not asked.done()
                await second.answer(task.id, b"done")
                assert (await asked).value == b"done"
            else:
                await revoke(fleet, identity="agent/agent-1")
                await revoked(asked, "agent-1")
                assert is_revoked(await first.refusal())
                assert is_revoked(await second.refusal())


async def test_an_answer_in_parts_ends_as_revoked_after_the_parts_that_came(fleet: Fleet) -> None:
    heard: list[int] = []
    both = asyncio.Event()

    async def read(client: ParallaxClient) -> None:
        async with aclosing(client.stream("agent-1", "count", 2, returns=int, idempotent=True)) as parts:
            async for part in parts:
                heard.append(part.value)
                if len(heard) == 2:
                    both.set()

    async with fleet.agent(Counts), fleet.client() as client:
        reading = asyncio.create_task(read(client))
        async with asyncio.timeout(WITHIN_S):
            await both.wait()
        await revoke(fleet, identity="agent/agent-1")
        await revoked(reading, "agent-1")
        assert heard == [0, 1]


def leaf_in_use(pki: Pki, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((pki.directory / name / "cert.pem").read_bytes())


@pytest.mark.parametrize("by", ["serial", "name", "name, and it is reinstated"])
async def test_an_agent_that_is_dialled_and_revoked_is_left_and_not_dialled_again(
    fleet: Fleet, pki: Pki, until: Until, by: str
) -> None:
    dialled = fleet.agent(Slow, listen="127.0.0.1:0", session=False)
    async with dialled as agent, fleet.client() as client:
        assert (await client.analyze("agent-1", "echo", 7, wait_for_agent=WITHIN_S)).value == 7
        asked = asyncio.create_task(client.analyze("agent-1", "wait", 7))
        await agent.begun.wait()
        if by == "serial":
            issuer = key_id(pki.authority.certificate.public_key()).hex()
            serial = f"{leaf_in_use(pki, 'agent-1').serial_number:x}"
            await revoke(fleet, certificate=Serial(serial=serial, issuer=issuer))
        else:
            await revoke(fleet, identity="agent/agent-1")
        await revoked(asked, "agent-1")
        await until(lambda: len(fleet.plane.proxies) == 0)
        if "reinstated" in by:
            await reinstate(fleet, "agent/agent-1")
        with pytest.raises(TaskFailed, match="NO_AGENT"):
            await client.analyze("agent-1", "echo", 8)
        assert await client.agents() == []


async def test_an_agent_that_is_dialled_goes_on_when_an_older_certificate_of_it_is_revoked(
    fleet: Fleet, pki: Pki
) -> None:
    older = pki.issue("agent/agent-1")
    dialled = fleet.agent(Slow, listen="127.0.0.1:0", session=False)
    async with dialled as agent, fleet.client() as client:
        asked = asyncio.create_task(client.analyze("agent-1", "wait", 7, wait_for_agent=WITHIN_S))
        await agent.begun.wait()
        await revoke_leaf(fleet, older)
        assert (await client.analyze("agent-1", "echo", 7)).value == 7
        assert not asked.done()
        asked.cancel()


async def test_an_agent_that_is_dialled_and_has_renewed_since_is_not_taken_for_revoked_when_it_leaves(
    own_pki: Pki, serve: Serve, until: Until
) -> None:
    def proved_with() -> int | None:
        record = fleet.plane.registry.find(AgentRef("agent-1"))
        proof = record.registration.proof if record is not None and record.registration else None
        return proof.serial if proof is not None else None

    async with serve(tls=own_pki.tls(), lease_seconds=6.0) as fleet, fleet.client() as client:
        async with fleet.agent(Patient, listen="127.0.0.1:0", session=False) as agent:
            asked = asyncio.create_task(client.analyze("agent-1", "wait", 7, wait_for_agent=WITHIN_S))
            await agent.begun.wait()
            older = leaf_in_use(own_pki, "agent-1").serial_number
            own_pki.save("agent/agent-1")
            await until(lambda: proved_with() == leaf_in_use(own_pki, "agent-1").serial_number)
            issuer = key_id(own_pki.authority.certificate.public_key()).hex()
            admin, serial = own_pki.issue("client/admin"), Serial(serial=f"{older:x}", issuer=issuer)
            await revoke(fleet, admin, certificate=serial)
            assert (await client.analyze("agent-1", "echo", 7)).value == 7
            asyncio.get_running_loop().call_later(0.5, agent.release.set)  # while it leaves
        assert (await asked).value == 7


# Renewal.


async def renew(fleet: Fleet, leaf: Leaf, short: str) -> None:
    who = Identity.parse_short(short)
    request = certificate_pb2.RenewRequest(csr=new_request(who, generate_key(), ()))
    async with fleet.channel(leaf) as channel:
        await certificate_pb2_grpc.CertificateServiceStub(channel).Renew(request, timeout=WITHIN_S)


@pytest.mark.parametrize("by", ["serial", "name"])
async def test_what_is_revoked_is_not_renewed(fleet: Fleet, pki: Pki, by: str) -> None:
    leaf = pki.issue("client/cli")
    await renew(fleet, leaf, "client/cli")
    if by == "serial":
        await revoke_leaf(fleet, leaf)
    else:
        await revoke(fleet, identity="client/cli")
    assert await is_refused(renew(fleet, leaf, "client/cli"))


@pytest.mark.parametrize("by", ["serial", "name"])
async def test_what_is_revoked_while_it_is_renewed_is_handed_nothing(fleet: Fleet, pki: Pki, by: str) -> None:
    leaf, current = pki.issue("client/cli"), fleet.plane.revocations.current
    issuer = key_id(pki.authority.certificate.public_key())

    def entered(_: IssuedCertificate) -> None:
        """The next one is recorded, and not handed out yet."""
        if by == "serial":
            current.revoke(CertificateId(issuer, leaf.certificate.serial_number))
        else:
            current.cut(Identity.parse_short("client/cli"), WITHDRAWN)

    fleet.plane.ledger.follow(entered)
    assert await is_refused(renew(fleet, leaf, "client/cli"))


# What is asked for, and what is not meant.


async def test_again_it_changes_nothing(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.issue("client/cli")
    for again in (False, True):
        assert (await revoke_leaf(fleet, leaf)).already is again
        assert (await revoke(fleet, identity="client/ci")).already is again
    assert len(await listed(fleet)) == 2


async def test_what_is_revoked_is_listed_page_by_page(fleet: Fleet, pki: Pki) -> None:
    for _ in range(3):
        await revoke_leaf(fleet, pki.issue("client/cli"))
    await revoke(fleet, identity="agent/agent-1", reason=revocation_pb2.REVOCATION_REASON_SUPERSEDED)
    await revoke(fleet, identity="agent/agent-2")
    await reinstate(fleet, "agent/agent-2")
    found = await listed(fleet, page_size=2)
    assert found == await listed(fleet)
    assert [entry.identity.rpartition("/")[2] for entry in found] == ["", "", "", "agent-1", "agent-2"]
    assert [bool(entry.serial) for entry in found] == [True, True, True, False, False]
    assert [entry.HasField("reinstated_at") for entry in found] == [False] * 4 + [True]
    assert found[3].reason == revocation_pb2.REVOCATION_REASON_SUPERSEDED
    assert {entry.revoked_by for entry in found} == {"spiffe://parallax.local/client/admin"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({}, "state what to revoke"),
        ({"certificate": Serial(serial="ABC")}, "not a serial in lower-case hex"),
        ({"certificate": Serial(serial="0", issuer="ab" * 32)}, "not a serial"),
        ({"certificate": Serial(serial="ab" * 32, issuer="ab" * 32)}, "of 20 octets at most"),
        ({"certificate": Serial(serial="ab")}, "knows no certificate ab: state its issuer"),
        ({"certificate": Serial(serial="ab", issuer="ab")}, "no issuer, 64 digits"),
        ({"fingerprint": "ab"}, "no fingerprint, 64 digits"),
        ({"fingerprint": "ab" * 32}, "knows no certificate with that fingerprint"),
        ({"identity": "agent-1"}, "not <kind>/<name>"),
        ({"identity": "agent/agent-1", "reason": 8}, "8 is no reason"),
    ],
)
async def test_what_is_not_meant_is_refused_and_says_so(
    fleet: Fleet, target: dict[str, Any], says: str
) -> None:
    with pytest.raises(aio.AioRpcError, match=says) as refused:
        await revoke(fleet, **target)
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    assert await listed(fleet) == []


async def test_what_is_not_revoked_is_not_reinstated(fleet: Fleet) -> None:
    with pytest.raises(aio.AioRpcError, match="nothing to reinstate") as refused:
        await reinstate(fleet, "client/cli")
    assert refused.value.code() is StatusCode.FAILED_PRECONDITION


async def test_what_is_dated_ahead_of_the_clock_has_to_be_revoked_by_itself(
    fleet: Fleet, pki: Pki, until: Until
) -> None:
    """By its date it would be one from after the reinstatement."""
    leaf = pki.issue("client/cli", now=datetime.now(UTC) + timedelta(minutes=4))
    await list_agents(fleet, leaf)
    await until(lambda: not len(fleet.plane.ledger))
    await revoke(fleet, identity="client/cli")
    with pytest.raises(aio.AioRpcError, match="dated ahead of the clock"):
        await reinstate(fleet, "client/cli")
    await revoke_leaf(fleet, leaf)
    await reinstate(fleet, "client/cli")
    assert await is_refused(list_agents(fleet, leaf))


@pytest.mark.parametrize("who", ["service/control-plane", "service/agent-proxy", "client/admin"])
async def test_what_nobody_could_take_back_has_to_be_meant(fleet: Fleet, who: str) -> None:
    says = "you are" if who == "client/admin" else "the control plane itself is"
    with pytest.raises(aio.AioRpcError, match=f"{says}.*--force"):
        await revoke(fleet, identity=who)
    assert await listed(fleet) == []
    await revoke(fleet, identity=who, force=True)
    if who == "client/admin":
        assert await is_refused(listed(fleet))


async def test_the_certificate_that_the_control_plane_serves_with_has_to_be_meant(
    fleet: Fleet, pki: Pki
) -> None:
    issuer = key_id(pki.authority.certificate.public_key()).hex()
    serial = f"{leaf_in_use(pki, 'control-plane').serial_number:x}"
    with pytest.raises(aio.AioRpcError, match=r"the control plane itself is .*--force"):
        await revoke(fleet, certificate=Serial(serial=serial, issuer=issuer))
    assert await listed(fleet) == []


async def test_the_ca_above_the_certificate_that_one_acts_with_has_to_be_meant(
    fleet: Fleet, pki: Pki
) -> None:
    authority = below(pki, "Intermediate 1")
    admin = issue_below(authority, "client/admin", pki)
    issuer = key_id(pki.authority.certificate.public_key()).hex()
    target = Serial(serial=f"{authority.certificate.serial_number:x}", issuer=issuer)
    with pytest.raises(aio.AioRpcError, match=r"you are .*--force"):
        await revoke(fleet, admin, certificate=target)
    await revoke(fleet, certificate=target)


async def test_the_certificate_that_one_acts_with_has_to_be_meant(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.issue("client/admin")
    with pytest.raises(aio.AioRpcError, match=r"you are .*--force"):
        await revoke_leaf(fleet, leaf, who=leaf)
    await revoke_leaf(fleet, leaf)
    assert await is_refused(revoke_leaf(fleet, leaf, who=leaf))


# What survives.


@pytest.mark.parametrize("by", ["serial", "name"])
async def test_what_was_acknowledged_is_refused_from_the_first_call_on_after_kill_9(
    children: Children, pki: Pki, tmp_path: Path, by: str
) -> None:
    data = {"PARALLAX_DATA_DIR": str(tmp_path / "data")}
    child, fleet = await children.fleet(pki, **data)
    leaf = pki.issue("client/cli")
    if by == "serial":
        await revoke_leaf(fleet, leaf)
    else:
        await revoke(fleet, identity="client/cli")
    await child.stop(signal.SIGKILL)
    _, fleet = await children.fleet(pki, **data)
    assert await is_refused(list_agents(fleet, leaf))
    await list_agents(fleet, "client/ci")


async def test_what_cannot_be_recorded_is_refused_and_what_was_revoked_stays_so(
    children: Children, pki: Pki, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    plane, fleet = await children.fleet(pki, PARALLAX_DATA_DIR=str(data))
    stolen, other = pki.issue("client/cli"), pki.issue("client/cli")
    await revoke_leaf(fleet, stolen)
    (data / "parallax.db").rename(data / "aside")
    with pytest.raises(aio.AioRpcError) as refused:
        await revoke_leaf(fleet, other)
    assert refused.value.code() is StatusCode.UNAVAILABLE
    assert dict(refused.value.trailing_metadata() or ())["parallax-error"] == "StorageFailed"
    await plane.said("nothing is recorded", fault="missing")
    assert await is_refused(list_agents(fleet, stolen))
    await list_agents(fleet, other)
