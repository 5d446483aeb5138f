"""A limit on payloads must never become one on a stream that many tasks share."""

from __future__ import annotations

import asyncio
import socket

import pytest
from grpc import aio

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


async def test_a_client_dials_a_control_plane_that_is_away_again_and_again() -> None:
    """By itself gRPC would pause for ever longer: for 15 seconds before the sixth time."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        host, port = listener.getsockname()
        async with aio.insecure_channel(f"{host}:{port}", options=channel_options(7)) as channel:
            channel.get_state(try_to_connect=True)
            async with asyncio.timeout(10):
                for _ in range(6):
                    caller, _ = await loop.sock_accept(listener)
                    caller.close()
