"""The generated code in protos/ is what its .proto files give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROTOS = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the code generated now."""
    out = tmp_path_factory.mktemp("generated")
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    outputs = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", "-I", "parallax/protos=protos"),
        *(f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out=quiet:{out}"),
        *outputs,
        *(f"parallax/protos/{name}" for name in PROTOS),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return out / "parallax" / "protos"


def test_every_proto_gives_four_files_and_no_file_is_left_over() -> None:
    suffixes = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    expected = {name.removesuffix(".proto") + suffix for name in PROTOS for suffix in suffixes}
    assert {path.name for path in (ROOT / "protos").glob("*_pb2*.py*")} == expected


@pytest.mark.parametrize("proto", PROTOS)
def test_committed_code_is_current(generated: Path, proto: str) -> None:
    """Another version of grpcio-tools gives other files: it is pinned exactly."""
    stem = proto.removesuffix(".proto")
    for fresh in sorted(generated.glob(f"{stem}_pb2*")):
        committed = ROOT / "protos" / fresh.name
        assert committed.read_bytes() == fresh.read_bytes(), (
            f"protos/{fresh.name} is stale: run make generate"
        )
