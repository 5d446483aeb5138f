"""A user's agent, from the `module:attribute` that names it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

from parallax.sdk.agent import SecureAgent
from parallax.security.errors import ConfigError, ParallaxError
from parallax.security.identity import clip

_FLAGS = {
    "agent_id": "--id",
    "name": "--name",
    "capabilities": "--capability",
    "max_concurrency": "--max-concurrency",
    "labels": "--label",
}


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What the command line says of an agent; None and empty are not said."""

    agent_id: str | None
    name: str | None
    capabilities: tuple[str, ...]
    max_concurrency: int | None
    labels: Mapping[str, str]

    @property
    def given(self) -> list[str]:
        """The options that were used."""
        return [_FLAGS[field.name] for field in fields(self) if getattr(self, field.name)]


def load_agent(target: str, options: AgentOptions) -> SecureAgent:
    """
    The agent that *target* names, importing from the current directory first.

    A class whose constructor is `SecureAgent`'s gets *options*, and without an id among them the one that
    the certificate on this host names; one that needs no argument gets none, and an instance has been
    given what it needs.

    Raises:
        ConfigError: One line: there is no such module or attribute, it is no agent, its code fails, or
            the options do not suit it.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        hint = (
            f", such as {module_name.removesuffix('.py').replace('/', '.')}:MyAgent"
            if module_name.isprintable()
            else ""
        )
        raise ConfigError(f"{clip(target)} is not MODULE:CLASS{hint}")
    found: object = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name} has no {clip(attribute)}: {_offer(sys.modules[module_name])}")
        found = getattr(found, part)
    if isinstance(found, SecureAgent):
        if options.given:
            raise ConfigError(
                f"{target} is an instance already, so {' and '.join(options.given)} cannot change it: "
                "name its class, or leave them out"
            )
        return found
    if isinstance(found, type) and issubclass(found, SecureAgent):
        return _build(target, found, options)
    raise ConfigError(
        f"{target} is no SecureAgent but {type(found).__name__}: {_offer(sys.modules[module_name])}"
    )


def _import(name: str) -> ModuleType:
    here = str(_here())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        return importlib.import_module(name)
    except Exception as exc:  # the user's code may raise anything
        missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"there is no module {missing}, neither in {here} nor installed: "
                "go to the directory that it lies in, or set PYTHONPATH"
            ) from None
        raise _failure(f"importing {name}", exc) from exc


def _build(target: str, agent: type[SecureAgent], options: AgentOptions) -> SecureAgent:
    if options.agent_id is None and not options.given and _accepts(agent):
        return _make(target, agent)
    agent_id = _own_id(target) if options.agent_id is None else options.agent_id
    positional = (agent_id, options.name or agent_id, options.capabilities)
    named: dict[str, object] = {}
    if options.max_concurrency is not None:
        named["max_concurrency"] = options.max_concurrency
    if options.labels:
        named["labels"] = options.labels
    if not _accepts(agent, *positional, **named):
        stated = " and ".join(options.given or ["an id"])
        raise ConfigError(
            f"{target} takes {inspect.signature(agent)}, which {stated} do not fit: "
            "make an instance in its module and name that"
        )
    return _make(target, agent, *positional, **named)


def _own_id(target: str) -> str:
    """What the one certificate on this host says."""
    from parallax.security.agent_id import get_agent_id

    try:
        return get_agent_id()
    except ConfigError as exc:
        raise ConfigError(
            f"{target} needs an id: give --id NAME, as it is in its certificate ({exc})"
        ) from None


def _make(
    target: str, agent: Callable[..., SecureAgent], *positional: object, **named: object
) -> SecureAgent:
    try:
        return agent(*positional, **named)
    except ParallaxError:
        raise
    except Exception as exc:  # the user's code may raise anything
        raise _failure(f"making {target}", exc) from exc


def _accepts(agent: type[SecureAgent], *positional: object, **named: object) -> bool:
    try:
        inspect.signature(agent).bind(*positional, **named)
    except TypeError:
        return False
    return True


def _failure(what: str, exc: Exception) -> ConfigError:
    """One line about *exc*, raised by the user's code; the place is the last in a file of the user's."""
    if os.environ.get("LOG_LEVEL", "").lower() == "debug":
        traceback.print_exception(exc)
        hint = "see above"
    else:
        hint = "LOG_LEVEL=debug shows the traceback"
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_here())]
    place = f" ({Path(own[-1].filename).relative_to(_here())}, line {own[-1].lineno})" if own else ""
    return ConfigError(f"{what} failed: {type(exc).__name__}: {exc}{place}: {hint}")


def _offer(module: ModuleType) -> str:
    """The agents that *module* has, for a message."""
    agents = [
        name
        for name, value in vars(module).items()
        if isinstance(value, SecureAgent)
        or (isinstance(value, type) and issubclass(value, SecureAgent) and value is not SecureAgent)
    ]
    return f"it has {', '.join(sorted(agents))}" if agents else "it has no SecureAgent"


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError(
            "the current directory is gone: go to the one that the agent's module lies in"
        ) from None
