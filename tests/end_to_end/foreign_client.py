"""
A gRPC client that has a certificate and a server's address, and nothing of ours: it learns the schema there.

`python foreign_client.py ADDRESS SERVER_NAME KEY CERT CA`; writes what it found as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main(address: str, server_name: str, *files: str) -> dict[str, Any]:
    """Ask for services and health, and have one task done."""
    key, certificate, ca = (Path(file).read_bytes() for file in files)
    options = [("grpc.ssl_target_name_override", server_name)]
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(address, credentials, options) as channel:
        found = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(found)
        method = pool.FindServiceByName("parallax.v1.DispatchService").FindMethodByName("Execute")
        request_class, response_class = map(GetMessageClass, (method.input_type, method.output_type))
        payload = {"data": b'{"n": 1}', "content_type": "application/json"}
        request = request_class(target="capability:echo", task="hello", payload=payload)
        execute = channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        health: Any = health_pb2_grpc.HealthStub(channel)  # its methods are made at run time
        return {
            "services": sorted(found.get_services()),
            "response": MessageToDict(execute(request, timeout=10)),
            "health": {
                name: health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
                for name in ("", "parallax.v1.DispatchService")
            },
            "ours": sorted(name for name in sys.modules if name.startswith("parallax")),
        }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
