"""A private Ray for several campaigns, one after another or at a time: `python -m tests.shared_ray` prints its address.

It ends when its standard input is closed. The campaigns join it with `ray.address=ADDRESS`.
"""

import logging
import sys

import ray
from ray._private import services


def main() -> None:
    """Starts it, and waits."""
    services.resolve_ip_for_localhost = lambda host: host  # as for a campaign's own cluster (ray_cluster.py)
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=16,
        resources={"room": 100},
        object_store_memory=500 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
