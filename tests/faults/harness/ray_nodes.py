"""A Ray cluster of several raylets on this machine: a head without cores, and a node with as many
as each line of the input says. Answers are JSON, one a line; it ends with its input.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Start the head, add nodes, end all."""
    from ray.cluster_utils import Cluster

    home = Path(tempfile.mkdtemp(prefix="interlace-nodes-"))
    shared = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    head = {"num_cpus": 0, "temp_dir": str(home / "ray"), **shared}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    logs = home / "ray" / "session_latest" / "logs"
    print(json.dumps({"address": cluster.address, "logs": str(logs)}), flush=True)
    for line in sys.stdin:
        node = cluster.add_node(num_cpus=int(line), **shared)
        raylet = node.all_processes["raylet"][0].process.pid
        print(json.dumps({"raylet": str(raylet)}), flush=True)
    cluster.shutdown()
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
