"""Errors over HTTP and back."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from parallax.control_plane.edge.status import body_of, error_of, retry_after, status_of
from parallax.security import errors
from parallax.security.errors import EnrollmentError, ParallaxError, Unavailable


def subclasses(cls: type[ParallaxError]) -> list[type[ParallaxError]]:
    return [cls, *(each for child in cls.__subclasses__() for each in subclasses(child))]


OURS = [each for each in subclasses(ParallaxError) if each.__module__ == errors.__name__]


# Nobody has a task done here.
@pytest.mark.parametrize("cls", [each for each in OURS if each is not errors.TaskFailed])
def test_every_error_arrives_as_the_class_it_was(cls: type[ParallaxError]) -> None:
    sent = cls("why")
    told = error_of(status_of(sent), json.dumps(body_of(sent)).encode(), retry_after(sent))
    assert type(told) is cls
    assert str(told) == body_of(sent)["message"]
    assert (str(told) == "why") is (cls is not errors.StorageFailed)


def test_where_a_server_keeps_its_files_is_not_told() -> None:
    said = body_of(errors.StorageFailed("/var/lib/parallax/parallax.db is full", errors.Fault.FULL))[
        "message"
    ]
    assert said == "the control plane cannot record anything now (full): its log says what to do"


def test_when_to_ask_again_is_in_whole_seconds() -> None:
    assert retry_after(Unavailable("", retry_after=timedelta(milliseconds=1))) == "1"
    assert retry_after(Unavailable("", retry_after=timedelta(seconds=1.5))) == "2"
    assert retry_after(EnrollmentError("")) is None
    told = error_of(503, b'{"error": "Unavailable", "message": "later"}', "7")
    assert isinstance(told, Unavailable)
    assert told.retry_after == timedelta(seconds=7)


@pytest.mark.parametrize("retry", [None, "", "soon", "-1", "9" * 30, "²"])
def test_a_time_that_is_none_is_a_second(retry: str | None) -> None:
    told = error_of(503, b"", retry)
    assert isinstance(told, Unavailable)
    assert told.retry_after == timedelta(seconds=1)


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b"{}", b'{"error": 1, "message": []}', b'{"error": "Nobody"}']
)
def test_what_somebody_elses_program_answers_is_known_by_its_status(body: bytes) -> None:
    assert type(error_of(403, body)) is errors.NotAuthorized
    assert type(error_of(418, body)) is ParallaxError
    assert str(error_of(418, body)) == "it answered with status 418"


def test_a_word_that_does_not_fit_its_status_does_not_count() -> None:
    body = b'{"error": "Unavailable", "message": "try for ever"}'
    assert type(error_of(403, body)) is errors.NotAuthorized
