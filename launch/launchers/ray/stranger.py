"""Asks a Ray cluster for its nodes without a token: exits 0 if it answers, 1 if it does not.

A process of its own, since a process that has loaded Ray sends the token it has loaded.
"""

import sys


def admitted(address: str) -> bool:
    """Whether the control store at `HOST:PORT` answers somebody without a token."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - compiled

    try:
        GcsClient(address=address).get_all_node_info(timeout=10)
    except Exception:
        # Refused, or unreachable: in both cases nobody came in.
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if admitted(sys.argv[1]) else 1)
