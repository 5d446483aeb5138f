"""What is issued over real mTLS, and what is not: hostile requests, one thing wrong each, and the policy."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from grpc import StatusCode, aio

from parallax.control_plane.audit import Entry
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.certificate_service import RENEW
from parallax.control_plane.ledger import Wanted
from parallax.control_plane.refusals import CALL
from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.sdk import exits
from parallax.security.profiles import lifetime_of
from parallax.security.verification import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve, Until

KEY: Final = ec.generate_private_key(ec.SECP256R1())
ADMIN: Final = ("--identity", "client/admin")


async def renew(fleet: Fleet, leaf: Leaf | str, csr: bytes) -> x509.Certificate:
    """What *leaf* is renewed to; raises AioRpcError."""
    async with fleet.channel(leaf) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        response = await stub.Renew(certificate_pb2.RenewRequest(csr=csr), timeout=10)
    return x509.load_der_x509_certificate(response.chain[0])


def csr(
    *,
    name: str = "agent-1",
    sans: Sequence[x509.GeneralName] = (),
    extensions: Sequence[x509.ExtensionType] = (),
    key: Any = KEY,
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    asked = [*extensions, *([x509.SubjectAlternativeName(sans)] if sans else [])]
    for extension in asked:
        builder = builder.add_extension(extension, critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def of_somebody_elses_key() -> bytes:
    theirs = ec.generate_private_key(ec.SECP256R1())
    ours, other = (
        key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) for key in (KEY, theirs)
    )
    return csr().replace(ours, other)


URI: Final = x509.UniformResourceIdentifier
BAD: Final = StatusCode.INVALID_ARGUMENT
NOT: Final = StatusCode.PERMISSION_DENIED


# Requests.


@pytest.mark.parametrize(
    ("make", "code", "why"),
    [
        (lambda: csr(name="agent-2"), NOT, "may not ask for the subject 'agent-2'"),
        (lambda: csr(sans=[URI("spiffe://parallax.local/agent/agent-2")]), NOT, "may not ask for the name"),
        (lambda: csr(sans=[URI("spiffe://parallax.local/service/control-plane")]), NOT, "may not ask for"),
        (lambda: csr(sans=[x509.DNSName("control-plane.parallax.local")]), NOT, "may not ask for the name"),
        (lambda: csr(sans=[x509.DNSName("elsewhere.example")]), NOT, "may not ask for the name"),
        (lambda: csr(sans=[x509.DNSName("*.agents.parallax.local")]), NOT, "may not ask for the name"),
        (lambda: csr(sans=[x509.IPAddress(ip_address("10.0.0.1"))]), NOT, "may not ask for the name"),
        (lambda: csr(sans=[x509.RFC822Name("agent-1@parallax.local")]), NOT, "may not ask for the name"),
        (lambda: csr(extensions=[x509.BasicConstraints(ca=True, path_length=None)]), BAD, "CA:TRUE"),
        (
            lambda: csr(extensions=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])]),
            BAD,
            "extended key usage",
        ),
        (lambda: csr(key=rsa.generate_private_key(65537, 1024)), BAD, "RSA key of 1024 bits"),  # noqa: S505
        (lambda: csr(key=rsa.generate_private_key(3, 2048)), BAD, "an exponent that is not usual"),
        (lambda: csr(key=ec.generate_private_key(ec.SECP521R1())), BAD, "curve secp521r1"),
        (lambda: csr(key=ed25519.Ed25519PrivateKey.generate()), BAD, "Ed25519 key, which gRPC peers cannot"),
        (of_somebody_elses_key, BAD, "not signed with the key"),
        (
            lambda: csr(extensions=[x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), bytes(1 << 20))]),
            BAD,
            "more than 16,384",
        ),
        (lambda: csr() + b"\0", BAD, "not a certificate request"),
        (lambda: csr()[:-1], BAD, "not a certificate request"),
        (lambda: b"", BAD, "not a certificate request"),
    ],
)
async def test_a_request_with_one_thing_wrong_is_refused_with_that_reason(
    fleet: Fleet, make: Callable[[], bytes], code: StatusCode, why: str
) -> None:
    with pytest.raises(aio.AioRpcError) as refused:
        await renew(fleet, "agent/agent-1", make())
    assert (refused.value.code(), why in (refused.value.details() or "")) == (code, True), refused.value
    issued, _ = await fleet.plane.ledger.page(Wanted("parallax.local/agent"))
    assert not [entry for entry in issued if entry.requested_by]
    await fleet.plane.refusals.enter()
    page = await AuditReader(fleet.plane._engine).page(0)
    audited = [Entry.decode(*entry).deed for entry in page.kept]
    reason = "not_authorized" if code is NOT else "invalid_request"
    assert [(deed.by, deed.subject, deed.detail["reason"]) for deed in audited if deed.action == CALL] == [
        ("spiffe://parallax.local/agent/agent-1", RENEW, reason)
    ]


async def test_the_same_request_with_nothing_wrong_is_granted(fleet: Fleet) -> None:
    asked = csr(
        sans=[URI("spiffe://parallax.local/agent/agent-1"), x509.DNSName("localhost")],
        extensions=[x509.BasicConstraints(ca=False, path_length=None)],
        key=ec.generate_private_key(ec.SECP384R1()),
    )
    new = await renew(fleet, "agent/agent-1", asked)
    assert str(identity_of(new, "parallax.local")) == "spiffe://parallax.local/agent/agent-1"


async def test_a_key_that_another_identity_has_is_refused_whether_it_was_issued_or_seen(
    fleet: Fleet, pki: Pki, until: Until
) -> None:
    key, seen = ec.generate_private_key(ec.SECP256R1()), pki.issue("agent/agent-2")
    await renew(fleet, seen, csr(name="agent-2", key=key))
    while await fleet.plane.ledger.user_of(seen.key.public_key()) is None:
        await asyncio.sleep(0.01)
    for taken in (key, seen.key):
        with pytest.raises(aio.AioRpcError, match="another identity has a certificate for; make a new key"):
            await renew(fleet, "agent/agent-1", csr(key=taken))
    await renew(fleet, "agent/agent-1", csr(key=ec.generate_private_key(ec.SECP256R1())))


# The policy.


def save(path: Path, rules: str) -> Path:
    path.write_text(f'[[issue]]\nholder = "agent/agent-1"\n{rules}\n')
    return path


def fresh(name: str = "agent-1") -> bytes:
    return csr(name=name, key=ec.generate_private_key(ec.SECP256R1()))


async def test_what_is_renewed_keeps_to_the_policy_and_others_are_as_ever(
    serve: Serve, pki: Pki, tmp_path: Path
) -> None:
    rules = 'longest = "1h"\nsans = ["127.0.0.0/8"]'
    async with serve(issuance_file=save(tmp_path / "issuance.toml", rules)) as fleet:
        new = await renew(fleet, "agent/agent-1", fresh())
        assert lifetime_of(new) == timedelta(hours=1)
        names = new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["agent-1.agents.parallax.local"]
        assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1")]
        other = await renew(fleet, "agent/agent-2", fresh("agent-2"))
        assert lifetime_of(other) == timedelta(days=1)
        with pytest.raises(aio.AioRpcError, match="may not ask for the name 'localhost'"):
            await renew(fleet, "agent/agent-1", csr(sans=[x509.DNSName("localhost")]))


async def test_a_policy_that_changes_is_in_force_without_a_restart_and_a_bad_one_is_not(
    serve: Serve, tmp_path: Path, until: Until
) -> None:
    path = save(tmp_path / "issuance.toml", 'keys = ["rsa-2048"]')
    async with serve(issuance_file=path) as fleet:
        with pytest.raises(aio.AioRpcError, match="admits no key on the curve secp256r1") as refused:
            await renew(fleet, "agent/agent-1", fresh())
        assert refused.value.code() is StatusCode.PERMISSION_DENIED
        save(path, 'keys = ["p256"]')
        await until(lambda: "p256" in fleet.plane._issuance_file.current.rules[0].keys)
        await renew(fleet, "agent/agent-1", fresh())
        save(path, 'keys = ["none"]')
        await until(lambda: bool(fleet.plane._issuance_file.problem))
        await renew(fleet, "agent/agent-1", fresh())
        assert (await fleet.metrics())["parallax_issuance_policy_stale"] == 1
        status, text = await fleet.http("/readyz")
        assert (status, json.loads(text)["detail"]["issuance policy"]) == (
            200,
            "not usable, the one before is in force",
        )
        code, out, err = await run(fleet, "ca", "policy", *ADMIN)
        assert (code, "p256" in out) == (exits.OK, True)
        assert "issuance.toml: rule 1, line 1: keys has 'none', which is none" in err


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n"])
async def test_an_empty_file_loosens_nothing(serve: Serve, tmp_path: Path, until: Until, text: str) -> None:
    """As a file is that was cut off at its begin: without a rule, what this one forbids would be issued."""
    path = save(tmp_path / "issuance.toml", 'keys = ["rsa-2048"]')
    async with serve(issuance_file=path) as fleet:
        path.write_text(text)
        await until(lambda: bool(fleet.plane._issuance_file.problem))
        with pytest.raises(aio.AioRpcError, match="admits no key on the curve secp256r1") as refused:
            await renew(fleet, "agent/agent-1", fresh())
        assert refused.value.code() is StatusCode.PERMISSION_DENIED
        assert (await fleet.metrics())["parallax_issuance_policy_stale"] == 1
        save(path, 'keys = ["p256"]')
        await until(lambda: not fleet.plane._issuance_file.problem)
        await renew(fleet, "agent/agent-1", fresh())


# The commands.


async def run(fleet: Fleet, *arguments: str) -> tuple[int, str, str]:
    """The command against *fleet*: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "parallax.sdk.cli",
        *arguments,
        env=fleet.pki.environment | {"PARALLAX_CONTROL_PLANE": fleet.address, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_policy_is_shown_to_the_administrator(serve: Serve, tmp_path: Path) -> None:
    rules = 'lifetime = "12h"\nlongest = "2d"\nkeys = ["p256"]\nsans = ["localhost", "10.0.0.0/8"]'
    async with serve(issuance_file=save(tmp_path / "issuance.toml", rules)) as fleet:
        code, out, err = await run(fleet, "ca", "policy", *ADMIN)
        assert (code, err) == (exits.OK, "")
        assert out.splitlines()[1].split() == [
            *("agent/agent-1", "12h", "1m", "2d", "p256", "localhost,", "10.0.0.0/8"),
        ]
        code, out, err = await run(fleet, "ca", "policy", "--json", *ADMIN)
        assert (code, err) == (exits.OK, "")
        first, usual = json.loads(out)["rules"]
        assert (first["holder"], first["longest_seconds"], first["keys"]) == (
            "agent/agent-1",
            172_800,
            ["p256"],
        )
        assert (usual["holder"], usual["longest_seconds"], usual["sans"]) == (None, 31_536_000, None)
        code, out, err = await run(fleet, "ca", "policy")
        assert (code, out) == (exits.NO_PERMISSION, "")


async def test_a_certificate_is_shown_by_its_numbers_as_openssl_writes_them_and_by_its_holder(
    fleet: Fleet,
) -> None:
    new = await renew(fleet, "agent/agent-1", fresh())
    serial, fingerprint = f"{new.serial_number:040X}", new.fingerprint(hashes.SHA256()).hex(":").upper()
    for what in (serial, fingerprint):
        code, out, err = await run(fleet, "certs", "show", what, "--json", *ADMIN)
        assert (code, err) == (exits.OK, "")
        [entry] = json.loads(out)
        assert int(entry["serial"], 16) == new.serial_number
    code, out, err = await run(fleet, "certs", "show", "agent/agent-1", *ADMIN)
    assert (code, err) == (exits.OK, "")
    assert entry["fingerprint"] in out
    assert (await run(fleet, "certs", "show", serial))[0] == exits.NO_PERMISSION


@pytest.mark.parametrize(
    ("what", "code", "why"),
    [
        ("ab" * 32, exits.FAILED, "holds no such certificate"),
        ("agent/nobody", exits.FAILED, "holds no such certificate"),
        ("agent-1", exits.CONFIG, "not a serial or a fingerprint: 'agent-1'"),
        ("a" * 65, exits.CONFIG, "not a serial or a fingerprint"),
    ],
)
async def test_what_is_not_there_is_said(fleet: Fleet, what: str, code: int, why: str) -> None:
    ended, out, err = await run(fleet, "certs", "show", what, *ADMIN)
    assert (ended, out) == (code, "")
    assert why in err
