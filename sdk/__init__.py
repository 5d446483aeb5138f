"""
What users import: the agent to subclass, and the client that gives it work.

Each is imported when it is first used (PEP 562): the command's `--help` needs neither, nor gRPC.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from parallax.sdk.agent import SecureAgent
    from parallax.sdk.agents import AgentEvent, AgentInfo
    from parallax.sdk.client import ParallaxClient
    from parallax.sdk.proxy import SecureGrpcAgentProxy
    from parallax.sdk.result import Result
    from parallax.sdk.sync_client import SyncParallaxClient

__all__ = [
    "AgentEvent",
    "AgentInfo",
    "ParallaxClient",
    "Result",
    "SecureAgent",
    "SecureGrpcAgentProxy",
    "SyncParallaxClient",
]

_HOME: Final = {
    "AgentEvent": "agents",
    "AgentInfo": "agents",
    "ParallaxClient": "client",
    "Result": "result",
    "SecureAgent": "agent",
    "SecureGrpcAgentProxy": "proxy",
    "SyncParallaxClient": "sync_client",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # so that this is asked once
    return value


def __dir__() -> list[str]:
    return __all__
