"""Who may call what, and as whom: the whole policy, written out once more by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import pytest

from parallax.control_plane.authorization import POLICY, authorize, removable, speaker
from parallax.control_plane.registry import AgentRef
from parallax.protos import dispatch_pb2, registry_pb2, session_pb2
from parallax.runtime.gate import Anonymous, Caller
from parallax.runtime.roles import Role, role_of
from parallax.security.errors import IdentityError, NotAuthorized
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.verification import Peer


def peer(short: str) -> Peer:
    """The authenticated holder of `<kind>/<name>`."""
    identity = Identity.parse_short(short, DEFAULT_TRUST_DOMAIN)
    return Peer(identity, 1, b"\0" * 32, datetime(2030, 1, 1, tzinfo=UTC), b"\1" * 32)


CALLERS: Final[dict[str, Caller]] = {
    "agent": peer("agent/agent-1"),
    "client": peer("client/cli"),
    "admin": peer("client/admin"),
    "service": peer("service/agent-proxy"),
    "control plane": peer("service/control-plane"),
    "anonymous": Anonymous(),
}

REGISTRY: Final = "/parallax.v1.RegistryService"
CERTIFICATES: Final = "/parallax.v1.CertificateService"
HEALTH: Final = "/grpc.health.v1.Health"
REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

EVERYBODY: Final = {"agent", "client", "admin", "service", "control plane", "anonymous"}

# Who of CALLERS may call it; nobody else may.
ALLOWED: Final[dict[str, set[str]]] = {
    f"{REGISTRY}/Register": {"agent", "anonymous"},
    f"{REGISTRY}/Heartbeat": {"agent", "anonymous"},
    f"{REGISTRY}/Deregister": {"agent", "admin", "anonymous"},
    f"{REGISTRY}/GetAgent": {"client", "admin", "anonymous"},
    f"{REGISTRY}/ListAgents": {"client", "admin", "anonymous"},
    f"{REGISTRY}/WatchAgents": {"client", "admin", "anonymous"},
    "/parallax.v1.DispatchService/Execute": {"client", "admin", "anonymous"},
    "/parallax.v1.DispatchService/Link": {"client", "admin", "anonymous"},
    "/parallax.v1.SessionService/Connect": {"agent", "anonymous"},
    "/parallax.v1.LedgerService/ListCertificates": {"admin"},
    "/parallax.v1.AuditService/ListAuditEntries": {"admin"},
    "/parallax.v1.RootService/GetRootRotation": {"admin"},
    "/parallax.v1.RootService/RotateRoot": {"admin"},
    "/parallax.v1.RootService/AbortRootRotation": {"admin"},
    f"{CERTIFICATES}/Renew": EVERYBODY,
    f"{CERTIFICATES}/AcknowledgeTrustBundle": EVERYBODY,
    f"{CERTIFICATES}/GetTrustBundle": EVERYBODY,
    f"{CERTIFICATES}/WatchTrustBundle": EVERYBODY,
    f"{HEALTH}/Check": EVERYBODY,
    f"{HEALTH}/List": EVERYBODY,
    f"{HEALTH}/Watch": EVERYBODY,
    REFLECTION: {"client", "admin", "anonymous"},
    # Nobody serves these.
    "": set(),
    "/": set(),
    "Execute": set(),
    "parallax.v1.DispatchService/Execute": set(),
    "/parallax.v1.DispatchService/execute": set(),
    "/parallax.v1.DispatchService/Execute/": set(),
    "/parallax.v1.DispatchService/Other": set(),
    "/parallax.v2.DispatchService/Execute": set(),
    "/parallax.v1.SessionService/Connect ": set(),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": set(),
    "/grpc.channelz.v1.Channelz/GetServers": set(),
}


class TestPolicy:
    @pytest.mark.parametrize("who", CALLERS)
    @pytest.mark.parametrize("method", ALLOWED)
    def test_is_this_table(self, who: str, method: str) -> None:
        if who in ALLOWED[method]:
            authorize(CALLERS[who], method)
        else:
            with pytest.raises(NotAuthorized, match="may not call"):
                authorize(CALLERS[who], method)

    def test_has_no_other_rows(self) -> None:
        assert {method for method, callers in ALLOWED.items() if callers} == POLICY.keys()

    def test_covers_every_method_that_is_served(self) -> None:
        """A new method without a row would be refused to everybody: decide who may call it."""
        services = [
            service
            for file in (dispatch_pb2, registry_pb2, session_pb2)
            for service in file.DESCRIPTOR.services_by_name.values()
        ]
        assert {f"/{s.full_name}/{m.name}" for s in services for m in s.methods} <= POLICY.keys()

    def test_error_names_caller_and_method(self) -> None:
        with pytest.raises(NotAuthorized, match=r"spiffe://parallax\.local/agent/agent-1 may not call '/x'"):
            authorize(CALLERS["agent"], "/x")
        with pytest.raises(NotAuthorized, match="an anonymous caller may not call"):
            authorize(Anonymous(), "/x")

    @pytest.mark.parametrize("who", ["client", "service"])
    def test_error_says_what_only_the_administrator_may(self, who: str) -> None:
        with pytest.raises(NotAuthorized, match=r"; act as --identity client/admin$"):
            authorize(CALLERS[who], f"{REGISTRY}/Deregister")
        with pytest.raises(NotAuthorized, match=r"; act as another --identity$"):
            authorize(CALLERS[who], f"{REGISTRY}/Register")

    def test_error_is_not_filled_by_hostile_input(self) -> None:
        with pytest.raises(NotAuthorized) as caught:
            authorize(Anonymous(), "/x\n" * 10_000)
        assert len(str(caught.value)) < 250
        assert "\n" not in str(caught.value)


class TestRole:
    @pytest.mark.parametrize(
        ("short", "role"),
        [
            ("client/admin", Role.ADMIN),
            ("client/admin2", Role.CLIENT),
            ("client/admin.x", Role.CLIENT),
            ("client/xadmin", Role.CLIENT),
            ("client/cli", Role.CLIENT),
            ("agent/admin", Role.AGENT),
            ("agent/cli", Role.AGENT),
            ("service/admin", Role.SERVICE),
            ("service/control-plane", Role.SERVICE),
            ("service/agent-proxy", Role.PROXY),
            ("service/agent-proxy-2", Role.SERVICE),
            ("client/agent-proxy", Role.CLIENT),
            ("agent/agent-proxy", Role.AGENT),
        ],
    )
    def test_comes_from_kind_and_whole_name(self, short: str, role: Role) -> None:
        assert role_of(peer(short)) is role

    def test_of_nobody_is_anonymous(self) -> None:
        assert role_of(Anonymous()) is Role.ANONYMOUS


class TestSpeaker:
    @pytest.mark.parametrize("stated", ["", "agent-1"])
    def test_is_the_agent_of_the_certificate(self, stated: str) -> None:
        caller = peer("agent/agent-1")
        assert speaker(caller, stated) == (AgentRef("agent-1", verified=True), caller.identity)

    @pytest.mark.parametrize(
        "stated",
        [
            "agent-2",
            "agent-1 ",
            "Agent-1",
            "agent-11",
            "agent/agent-1",
            "anonymous/agent-1",
            "spiffe://parallax.local/agent/agent-2",
            "../agent-1",
            "\x00",
        ],
    )
    def test_cannot_be_somebody_else(self, stated: str) -> None:
        with pytest.raises(NotAuthorized, match="may not speak for"):
            speaker(peer("agent/agent-1"), stated)

    @pytest.mark.parametrize("short", ["client/cli", "client/admin", "service/agent-proxy"])
    @pytest.mark.parametrize("stated", ["", "cli", "agent-1"])
    def test_is_an_agent(self, short: str, stated: str) -> None:
        with pytest.raises(NotAuthorized, match="is not an agent"):
            speaker(peer(short), stated)

    def test_without_a_certificate_is_an_unverified_agent(self) -> None:
        assert speaker(Anonymous(), "agent-1") == (AgentRef("agent-1", verified=False), None)

    @pytest.mark.parametrize(
        "stated",
        [
            "",
            "/",
            "..",
            "a..b",
            "a/b",
            "A",
            "ä",
            "a\x00",
            "a\nb",
            "a" * 64,
            "a" * 300,
            "anonymous/a",
            "-a",
            "a.",
        ],
    )
    def test_without_a_certificate_still_needs_a_name(self, stated: str) -> None:
        with pytest.raises(IdentityError, match="not a name"):
            speaker(Anonymous(), stated)


class TestRemovable:
    @pytest.mark.parametrize(
        ("stated", "ref"),
        [("agent-1", AgentRef("agent-1")), ("anonymous/a", AgentRef("a", verified=False))],
    )
    def test_by_the_administrator_is_anybody(self, stated: str, ref: AgentRef) -> None:
        assert removable(peer("client/admin"), stated) == ref

    @pytest.mark.parametrize("stated", ["", "agent/agent-1", ".."])
    def test_by_the_administrator_needs_a_name(self, stated: str) -> None:
        with pytest.raises(IdentityError):
            removable(peer("client/admin"), stated)

    def test_by_an_agent_is_itself(self) -> None:
        assert removable(peer("agent/agent-1"), "") == AgentRef("agent-1")
        with pytest.raises(NotAuthorized):
            removable(peer("agent/agent-1"), "agent-2")

    @pytest.mark.parametrize("short", ["client/cli", "client/admin2", "agent/admin", "service/admin"])
    def test_by_those_who_only_look_like_the_administrator_is_not_everybody(self, short: str) -> None:
        with pytest.raises(NotAuthorized):
            removable(peer(short), "agent-1")

    @pytest.mark.parametrize("stated", ["agent-1", "anonymous/agent-1"])
    def test_by_anonymous_callers_is_unverified(self, stated: str) -> None:
        assert removable(Anonymous(), stated) == AgentRef("agent-1", verified=False)

    @pytest.mark.parametrize("stated", ["", "anonymous/", "anonymous/anonymous/a", "agent/a", "anonymous/.."])
    def test_by_anonymous_callers_needs_a_name(self, stated: str) -> None:
        with pytest.raises(IdentityError):
            removable(Anonymous(), stated)
