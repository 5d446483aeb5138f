"""A limit on payloads must never become one on a stream that many tasks share."""

from __future__ import annotations

import pytest

from parallax.runtime.channel import MESSAGE_OVERHEAD_BYTES, channel_options, message_limits, session_options
from parallax.runtime.outcome import LARGEST_LIMIT_BYTES

RECEIVE, SEND = "grpc.max_receive_message_length", "grpc.max_send_message_length"


def test_a_message_may_be_larger_than_its_payload() -> None:
    assert dict(message_limits(7)) == {RECEIVE: 7 + MESSAGE_OVERHEAD_BYTES, SEND: 7 + MESSAGE_OVERHEAD_BYTES}


def test_an_agent_takes_whatever_a_control_plane_may_be_set_to_send() -> None:
    """gRPC ends the stream over its limit; the handler fails the one task."""
    options = dict(session_options(7))
    assert options[RECEIVE] == LARGEST_LIMIT_BYTES + MESSAGE_OVERHEAD_BYTES
    assert options[SEND] == 7 + MESSAGE_OVERHEAD_BYTES


@pytest.mark.parametrize("options", [channel_options(7), session_options(7)])
def test_no_proxy_of_the_environment_comes_between(options: list[tuple[str, int]]) -> None:
    assert dict(options)["grpc.enable_http_proxy"] == 0
