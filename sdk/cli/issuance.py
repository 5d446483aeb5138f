"""`parallax ca policy`: what certificates may be like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import say_error, write_json, write_table

if TYPE_CHECKING:
    from grpc import aio

    from parallax.protos import issuance_pb2, issuance_pb2_grpc
    from parallax.sdk.client import ParallaxClient


def policy(
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Show by which policy the control plane issues certificates.

    The first rule that covers an identity decides. If the policy's file cannot be
    used, stderr says why. Only client/admin may.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    answer = ask(_in_force)
    if as_json:
        write_json({"rules": list(map(_to_json, answer.rules)), "problem": answer.problem or None})
        return
    write_table(("HOLDER", "LIFETIME", "FROM", "TO", "KEYS", "NAMES"), map(_as_cells, answer.rules))
    if answer.problem:
        say_error(f"{answer.problem} (the policy before is in force)")


async def _in_force(client: ParallaxClient) -> issuance_pb2.GetIssuancePolicyResponse:
    from parallax.protos import issuance_pb2
    from parallax.sdk.client import READ_S

    async with client._asking(_issuance) as stub:  # noqa: SLF001 - our own
        return await stub.GetIssuancePolicy(issuance_pb2.GetIssuancePolicyRequest(), timeout=READ_S)


def _issuance(channel: aio.Channel) -> issuance_pb2_grpc.IssuanceServiceAsyncStub:
    from parallax.protos import issuance_pb2_grpc

    return issuance_pb2_grpc.IssuanceServiceStub(channel)


def _to_json(rule: issuance_pb2.IssuanceRule) -> dict[str, object]:
    return {
        "holder": rule.holder or None,
        "lifetime_seconds": rule.lifetime.ToSeconds(),
        "shortest_seconds": rule.shortest.ToSeconds(),
        "longest_seconds": rule.longest.ToSeconds(),
        "keys": list(rule.keys),
        "sans": None if rule.any_san else list(rule.sans),
    }


def _as_cells(rule: issuance_pb2.IssuanceRule) -> tuple[str, ...]:
    from parallax.security.issuance_policy import spell

    lives = (spell(each.ToTimedelta()) for each in (rule.lifetime, rule.shortest, rule.longest))
    names = "as granted" if rule.any_san else ", ".join(rule.sans) or "none"
    return rule.holder or "everybody else", *lives, ", ".join(rule.keys), names
