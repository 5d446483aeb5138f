"""`parallax policy`: who may call what, checked, explained and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import say, write_json, write_lines
from parallax.sdk.exits import FAILED
from parallax.security.errors import ConfigError
from parallax.security.identity import clip

if TYPE_CHECKING:
    from grpc import aio

    from parallax.protos import policy_pb2_grpc
    from parallax.sdk.client import ParallaxClient

app = typer.Typer(help="Who may call what.", no_args_is_help=True)

PolicyPath: TypeAlias = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="This one (PARALLAX_POLICY_FILE, or what is built in)."),
]
InForce: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--in-force", help="Ask the control plane what it goes by. Only an administrator is answered."
    ),
]


@app.command("check")
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="By default PARALLAX_POLICY_FILE.")
    ] = None,
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Say whether FILE is a policy, and all that is wrong with it.

    Exit code 0 if it is one, 1 if not. A control plane that runs takes a good one over when it is written.
    """
    from parallax.runtime.policy import Policy
    from parallax.runtime.policy_file import read_text
    from parallax.runtime.policy_text import read_policy
    from parallax.security.files import show

    path = file or adopt_settings(config, None).policy_file
    if path is None:
        raise ConfigError("there is no policy to check: name its file, or set PARALLAX_POLICY_FILE")
    found = read_policy(read_text(path))
    problems = () if isinstance(found, Policy) else found
    if as_json:
        write_json(
            {
                "file": path,
                "ok": not problems,
                "problems": [
                    {"line": each.line, "rule": each.rule, "problem": each.text} for each in problems
                ],
            }
        )
    elif isinstance(found, Policy):
        write_lines(f"{show(path)}: OK, {len(found.rules)} rules")
    else:
        write_lines(*(f"{show(path)}: {each}" for each in problems))
    if problems:
        raise typer.Exit(FAILED)


@app.command("explain")
def explain(
    *,
    caller: Annotated[
        str, typer.Option("--as", metavar="KIND/NAME", help="Who calls: client/ci, or anonymous.")
    ],
    call: Annotated[str, typer.Option(metavar="METHOD", help="What, such as Execute or AgentService/Link.")],
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="Of whom: an agent's id, or capability:NAME.")
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="As if this label were granted to the caller."),
    ] = None,
    target_label: Annotated[
        list[str] | None,
        typer.Option("--target-label", metavar="KEY=VALUE", help="As if it were granted to the target."),
    ] = None,
    file: PolicyPath = None,
    in_force: InForce = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Say whether a call would be let in, and by which rule.

    Exit code 0 if it would, 1 if not. Reads the policy's file; with --in-force the control plane answers,
    which knows the labels that are granted.
    """
    from parallax.protos import policy_pb2
    from parallax.runtime.policy import Target
    from parallax.runtime.policy_file import load_policy
    from parallax.runtime.question import Question
    from parallax.sdk.cli.options import tls_settings
    from parallax.sdk.client import READ_S

    settings = adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    asked = Question.read(caller, call, target, tls_settings(config, certs_dir).trust_domain)
    if in_force:
        if label or target_label or file is not None:
            raise ConfigError("the control plane knows file and labels: take --file and --label out")

        async def question(client: ParallaxClient) -> policy_pb2.ExplainPolicyResponse:
            request = policy_pb2.ExplainPolicyRequest(
                caller=asked.caller.short if asked.caller else "", method=asked.method, target=target
            )
            async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
                return await stub.ExplainPolicy(request, timeout=READ_S)

        answer = ask(question)
        allowed, rule, why = answer.allowed, answer.rule or None, answer.why
    else:
        decision = load_policy(file or settings.policy_file).decide(
            asked.caller,
            _labels(label),
            asked.method,
            Target(asked.target, _labels(target_label)) if asked.target else None,
        )
        allowed, rule, why = decision.allowed, decision.rule, decision.why
    if as_json:
        write_json({"allowed": allowed, "rule": rule, "why": why, "method": asked.method})
    else:
        write_lines(f"{'allowed' if allowed else 'refused'}: {why}")
    if not allowed:
        raise typer.Exit(FAILED)


@app.command("show")
def show_policy(
    *,
    file: PolicyPath = None,
    in_force: InForce = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
) -> None:
    """Write the policy to stdout, such as the one that is built in: a beginning for your own."""
    from parallax.protos import policy_pb2
    from parallax.runtime.policy_file import load_policy
    from parallax.sdk.client import READ_S

    settings = adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    if not in_force:
        write_lines(*load_policy(file or settings.policy_file).text.splitlines())
        return

    async def question(client: ParallaxClient) -> policy_pb2.GetPolicyResponse:
        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            return await stub.GetPolicy(policy_pb2.GetPolicyRequest(), timeout=READ_S)

    answer = ask(question)
    write_lines(*answer.text.splitlines())
    if answer.problem:
        say(f"the file holds something else, which cannot be used: {answer.problem}")


def _labels(given: list[str] | None) -> dict[str, str]:
    labels = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{clip(text)} is no label: write key=value")
        labels[key] = value
    return labels


def stub_of(channel: aio.Channel) -> policy_pb2_grpc.PolicyServiceAsyncStub:
    """The control plane's service, on *channel*."""
    from parallax.protos import policy_pb2_grpc

    return policy_pb2_grpc.PolicyServiceStub(channel)
