"""Errors cross the wire as what they are, and a peer cannot make them anything else."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.status import ERROR_KEY, RETRY_KEY, error_of, status_of, trailers_of
from parallax.security import errors
from parallax.security.errors import (
    ConfigError,
    Expired,
    IdentityError,
    InvalidRequest,
    InvalidTransition,
    NoSuchAgent,
    NotAuthorized,
    ParallaxError,
    Superseded,
    TaskFailed,
    Unavailable,
    UntrustedChain,
    VerificationError,
    WrongIdentity,
)


def family(cls: type[ParallaxError]) -> Iterator[type[ParallaxError]]:
    """*cls* and everything below it."""
    yield cls
    for child in cls.__subclasses__():
        yield from family(child)


# Ours, not those that tests define.
EVERY_ERROR = [cls for cls in family(ParallaxError) if cls.__module__.startswith("parallax.")]


def make(cls: type[ParallaxError], message: str = "what went wrong") -> ParallaxError:
    return TaskFailed("HANDLER_FAILED", message) if issubclass(cls, TaskFailed) else cls(message)


def across(exc: ParallaxError) -> ParallaxError:
    """*exc* as the other side raises it."""
    return error_of(status_of(exc), str(exc), trailers_of(exc))


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_every_error_arrives_as_the_same_class_with_its_text(cls: type[ParallaxError]) -> None:
    arrived = across(make(cls))
    assert type(arrived) is cls
    assert "what went wrong" in str(arrived)


def test_every_error_is_drawn_in_one_module() -> None:
    assert {cls.__module__ for cls in EVERY_ERROR} == {errors.__name__}
    assert all(cls.__name__ in (errors.__doc__ or "") for cls in EVERY_ERROR)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (ConfigError, StatusCode.FAILED_PRECONDITION),
        (IdentityError, StatusCode.INVALID_ARGUMENT),
        (InvalidRequest, StatusCode.INVALID_ARGUMENT),
        (VerificationError, StatusCode.UNAUTHENTICATED),
        (Expired, StatusCode.UNAUTHENTICATED),
        (NotAuthorized, StatusCode.PERMISSION_DENIED),
        (NoSuchAgent, StatusCode.NOT_FOUND),
        (Superseded, StatusCode.FAILED_PRECONDITION),
        (Unavailable, StatusCode.UNAVAILABLE),
        (ParallaxError, StatusCode.INTERNAL),
    ],
)
def test_status_that_others_see(cls: type[ParallaxError], code: StatusCode) -> None:
    assert status_of(make(cls)) is code


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_trailers_can_be_sent(cls: type[ParallaxError]) -> None:
    """gRPC's rules for metadata: lower-case keys, printable ASCII values."""
    for key, value in trailers_of(make(cls, "ü\n")):
        assert key == key.lower()
        assert value.isascii()
        assert value.isprintable()


def test_an_error_of_a_subclass_arrives_as_the_nearest_one_that_is_known() -> None:
    class Local(Expired):
        pass

    assert type(across(Local("x"))) is Expired


@given(st.integers(0, 99_999_999))
def test_retry_after_arrives(milliseconds: int) -> None:
    arrived = across(Unavailable("busy", retry_after=timedelta(milliseconds=milliseconds)))
    assert isinstance(arrived, Unavailable)
    assert arrived.retry_after == timedelta(milliseconds=milliseconds)


@pytest.mark.parametrize("text", ["", "soon", "-1", "1.5", "²", "٣", "9" * 9, "9" * 5_000, "1\n"])
def test_retry_after_that_cannot_be_believed_is_a_second(text: str) -> None:
    arrived = error_of(StatusCode.UNAVAILABLE, "busy", [(ERROR_KEY, "Unavailable"), (RETRY_KEY, text)])
    assert isinstance(arrived, Unavailable)
    assert arrived.retry_after == timedelta(seconds=1)


class TestClaim:
    """A peer's word for the class names the failure; it does not change its kind."""

    @pytest.mark.parametrize("code", [code for code in StatusCode if code is not StatusCode.OK])
    @pytest.mark.parametrize("cls", EVERY_ERROR)
    def test_of_a_class_of_another_status_is_not_believed(
        self, cls: type[ParallaxError], code: StatusCode
    ) -> None:
        claimed = error_of(code, "x", [(ERROR_KEY, cls.__name__)])
        if status_of(make(cls)) is code:
            assert type(claimed) is cls
        else:
            assert type(claimed) is type(error_of(code, "x"))

    def test_of_superseded_cannot_stop_an_agent_that_is_only_unavailable(self) -> None:
        arrived = error_of(StatusCode.UNAVAILABLE, "x", [(ERROR_KEY, "Superseded")])
        assert type(arrived) is Unavailable

    @pytest.mark.parametrize("name", ["", "KeyError", "Exception", "object", "ParallaxError\n", "__class__"])
    def test_of_something_unknown_is_ignored(self, name: str) -> None:
        assert type(error_of(StatusCode.NOT_FOUND, "x", [(ERROR_KEY, name)])) is NoSuchAgent

    def test_as_bytes_is_ignored(self) -> None:
        assert type(error_of(StatusCode.UNAUTHENTICATED, "x", [(ERROR_KEY, b"Expired")])) is VerificationError


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (StatusCode.UNAUTHENTICATED, VerificationError),
        (StatusCode.PERMISSION_DENIED, NotAuthorized),
        (StatusCode.NOT_FOUND, NoSuchAgent),
        (StatusCode.FAILED_PRECONDITION, InvalidTransition),
        (StatusCode.ABORTED, TaskFailed),
        (StatusCode.UNAVAILABLE, Unavailable),
        (StatusCode.INTERNAL, ParallaxError),
        (StatusCode.RESOURCE_EXHAUSTED, InvalidRequest),
        (StatusCode.DEADLINE_EXCEEDED, Unavailable),
        (StatusCode.CANCELLED, Unavailable),
        (StatusCode.UNIMPLEMENTED, ConfigError),
        (StatusCode.UNKNOWN, ParallaxError),
        (StatusCode.DATA_LOSS, ParallaxError),
        (StatusCode.OUT_OF_RANGE, ParallaxError),
        (StatusCode.ALREADY_EXISTS, ParallaxError),
    ],
)
def test_bare_status_of_somebody_elses_program(code: StatusCode, cls: type[ParallaxError]) -> None:
    assert type(error_of(code, "x")) is cls


@pytest.mark.parametrize(
    ("details", "cls"),
    [
        ("… Hostname Verification Check failed.", WrongIdentity),
        ("… CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", UntrustedChain),
        ("Socket closed", Unavailable),
        ("Connection refused", Unavailable),
    ],
)
def test_server_that_failed_our_checks_is_not_merely_unavailable(
    details: str, cls: type[ParallaxError]
) -> None:
    """gRPC says UNAVAILABLE for both; trying again helps only one."""
    assert type(error_of(StatusCode.UNAVAILABLE, details)) is cls


@pytest.mark.parametrize(
    ("details", "remedy"),
    [
        ("… Hostname Verification Check failed.", "another identity answers at that address"),
        ("… CERTIFICATE_VERIFY_FAILED: unable to get", "the same CA certificate"),
        ("… Connection refused", "is it running there"),
        ("… OPENSSL_internal:WRONG_VERSION_NUMBER: …", "set PARALLAX_TLS_ENABLED=true there"),
        ("… Socket closed", "PARALLAX_TLS_ENABLED differs"),
    ],
)
def test_a_connection_that_fails_says_what_to_do(details: str, remedy: str) -> None:
    text = str(error_of(StatusCode.UNAVAILABLE, details))
    assert text.startswith(f"{details}; ")
    assert remedy in text


def test_closed_socket_points_to_the_log_that_knows_why() -> None:
    assert "its log names the reason" in str(error_of(StatusCode.UNAVAILABLE, "Socket closed"))


@pytest.mark.parametrize("details", [None, ""])
def test_status_without_a_text_still_says_something(details: str | None) -> None:
    assert "NOT_FOUND" in str(error_of(StatusCode.NOT_FOUND, details))
