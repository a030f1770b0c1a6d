"""Waits until a Ray cluster (RAY_ADDRESS) has as many nodes as a job: wait_for_nodes.py NODES SECONDS."""

import sys
import time

import ray


def main(nodes: int, seconds: float) -> int:
    """Exit code: 0, or 1 if fewer than ``nodes`` nodes have joined after ``seconds`` seconds."""
    ray.init(address="auto", log_to_driver=False)
    deadline = time.monotonic() + seconds
    while (joined := sum(node["Alive"] for node in ray.nodes())) < nodes:
        if time.monotonic() > deadline:
            print(f"error: {joined} of {nodes} nodes joined Ray in {seconds:.0f} s", file=sys.stderr)
            return 1
        time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
