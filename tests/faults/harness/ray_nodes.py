"""A Ray cluster of several raylets on this machine: a head without cores, and what the input says.

    N                   adds a node with so many cores
    drain RAYLET S      gives notice that a node, by its raylet, will be gone in S seconds

Answers are JSON, one a line; it ends with its input.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Start the head, add nodes, end all."""
    from ray.cluster_utils import Cluster

    home = Path(tempfile.mkdtemp(prefix="interlace-nodes-"))
    shared = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    head = {"num_cpus": 0, "temp_dir": str(home / "ray"), **shared}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    logs = home / "ray" / "session_latest" / "logs"
    print(json.dumps({"address": cluster.address, "logs": str(logs)}), flush=True)
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        words = line.split()
        if words[0] == "drain":
            print(json.dumps(drain(cluster.address, nodes[words[1]], float(words[2]))), flush=True)
            continue
        node = cluster.add_node(num_cpus=int(words[0]), **shared)
        raylet = str(node.all_processes["raylet"][0].process.pid)
        nodes[raylet] = node
        print(json.dumps({"raylet": raylet}), flush=True)
    cluster.shutdown()
    shutil.rmtree(home, ignore_errors=True)


def drain(address: str, node: Any, seconds: float) -> dict[str, str]:
    """Give notice as a cloud does before it takes a machine back; return what Ray says."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    accepted, why = GcsClient(address=address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int((time.time() + seconds) * 1000),
    )
    return {"accepted": str(accepted), "why": str(why)}


if __name__ == "__main__":
    main()
