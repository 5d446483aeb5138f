"""Who may call what, and as whom: the whole policy, written out once more by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import pytest

from parallax.control_plane.authorization import removable, speaker
from parallax.control_plane.registry import AgentRef
from parallax.runtime.authorization import Authorization
from parallax.runtime.caller import Anonymous, Caller
from parallax.runtime.methods import METHODS
from parallax.runtime.policy_text import built_in_policy
from parallax.security.errors import IdentityError, NotAuthorized
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.verification import Peer


def peer(short: str) -> Peer:
    """The authenticated holder of `<kind>/<name>`."""
    identity = Identity.parse_short(short, DEFAULT_TRUST_DOMAIN)
    end, issued = datetime(2030, 1, 1, tzinfo=UTC), datetime(2029, 1, 1, tzinfo=UTC)
    return Peer(identity, 1, b"\0" * 32, end, b"\1" * 32, issued, ())


CALLERS: Final[dict[str, Caller]] = {
    "agent": peer("agent/agent-1"),
    "client": peer("client/cli"),
    "admin": peer("client/admin"),
    "service": peer("service/agent-proxy"),
    "control plane": peer("service/control-plane"),
    "anonymous": Anonymous(),
}

authorize = Authorization(built_in_policy(), DEFAULT_TRUST_DOMAIN).authorize

REGISTRY: Final = "/parallax.v1.RegistryService"
CERTIFICATES: Final = "/parallax.v1.CertificateService"
POLICY: Final = "/parallax.v1.PolicyService"
AGENT: Final = "/parallax.v1.AgentService"
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
    "/parallax.v1.EnrollmentService/CreateToken": {"admin"},
    "/parallax.v1.EnrollmentService/ListTokens": {"admin"},
    "/parallax.v1.EnrollmentService/RevokeToken": {"admin"},
    "/parallax.v1.EnrollmentService/ListEnrollmentRequests": {"admin"},
    "/parallax.v1.EnrollmentService/ApproveEnrollment": {"admin"},
    "/parallax.v1.EnrollmentService/RejectEnrollment": {"admin"},
    "/parallax.v1.LedgerService/ListCertificates": {"admin"},
    "/parallax.v1.AuditService/ListAuditEntries": {"admin"},
    "/parallax.v1.RevocationService/Revoke": {"admin"},
    "/parallax.v1.RevocationService/Reinstate": {"admin"},
    "/parallax.v1.RevocationService/ListRevocations": {"admin"},
    "/parallax.v1.RevocationFeedService/WatchRevocations": EVERYBODY,
    "/parallax.v1.PinService/Pin": {"admin"},
    "/parallax.v1.PinService/Unpin": {"admin"},
    "/parallax.v1.PinService/ListPins": {"admin"},
    "/parallax.v1.LedgerService/FindCertificates": {"admin"},
    "/parallax.v1.IssuanceService/GetIssuancePolicy": {"admin"},
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
    f"{POLICY}/GetPolicy": {"admin"},
    f"{POLICY}/ExplainPolicy": {"admin"},
    f"{POLICY}/ListLabels": {"admin"},
    f"{POLICY}/ChangeLabels": {"admin"},
    f"{POLICY}/WatchPolicy": {"agent", "anonymous"},
    f"{AGENT}/Analyze": {"client", "admin", "service", "anonymous"},
    f"{AGENT}/AnalyzeStream": {"client", "admin", "service", "anonymous"},
    f"{AGENT}/Link": {"client", "admin", "service", "anonymous"},
    f"{AGENT}/GetCapabilities": {"client", "admin", "service", "anonymous"},
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


class TestBuiltInPolicy:
    @pytest.mark.parametrize("who", CALLERS)
    @pytest.mark.parametrize("method", ALLOWED)
    def test_is_this_table(self, who: str, method: str) -> None:
        if who in ALLOWED[method]:
            authorize(CALLERS[who], method)
        else:
            with pytest.raises(NotAuthorized, match="may not call"):
                authorize(CALLERS[who], method)

    def test_has_no_other_rows(self) -> None:
        assert {method for method, callers in ALLOWED.items() if callers} == METHODS

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

    def test_by_an_agent_that_only_looks_like_the_administrator_is_not_everybody(self) -> None:
        with pytest.raises(NotAuthorized):
            removable(peer("agent/admin"), "agent-1")

    @pytest.mark.parametrize("stated", ["agent-1", "anonymous/agent-1"])
    def test_by_anonymous_callers_is_unverified(self, stated: str) -> None:
        assert removable(Anonymous(), stated) == AgentRef("agent-1", verified=False)

    @pytest.mark.parametrize("stated", ["", "anonymous/", "anonymous/anonymous/a", "agent/a", "anonymous/.."])
    def test_by_anonymous_callers_needs_a_name(self, stated: str) -> None:
        with pytest.raises(IdentityError):
            removable(Anonymous(), stated)
