"""Asks a Ray cluster for its nodes without a token: exits 0 if it answers, 1 if it does not.

A process of its own, since a process that has loaded Ray sends the token it has loaded.
"""

import sys
from typing import Any

CLIENT = "ray://"
ANSWER_SECONDS = 30.0


def admitted(address: str) -> bool:
    """Whether what listens at an address answers somebody without a token: Ray's control store at
    `HOST:PORT`, or its server for clients at `ray://HOST:PORT`, behind which the store may be out
    of reach from here.
    """
    if address.startswith(CLIENT):
        return admitted_as_client(address.removeprefix(CLIENT))
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - compiled

    try:
        GcsClient(address=address).get_all_node_info(timeout=10)
    except Exception:
        # Refused, or unreachable: in both cases nobody came in.
        return False
    return True


def admitted_as_client(place: str) -> bool:
    """Whether the server for clients at `HOST:PORT` answers; only a refusal counts as none."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

    # Generated code and grpc have no types.
    messages: Any = ray_client_pb2
    services: Any = ray_client_pb2_grpc
    channel: Any = init_grpc_channel(place)
    ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    try:
        services.RayletDriverStub(channel).ClusterInfo(
            ping, metadata=[("client_id", "stranger")], timeout=ANSWER_SECONDS
        )
    except grpc.RpcError as error:
        # To somebody who was let in it says, for one, that it does not know this client.
        refusal: Any = error
        return refusal.code() != grpc.StatusCode.UNAUTHENTICATED
    return True


if __name__ == "__main__":
    sys.exit(0 if admitted(sys.argv[1]) else 1)
