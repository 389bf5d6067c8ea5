"""Two nodes of a Ray cluster until stdin ends: run by the Python of ``requirements/ray.txt`` (see `ray_cluster`).

`ray start` puts a second node's ports on every interface of the machine, since a loopback address is none that others
can reach; Ray's own cluster for tests does not.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

told = json.loads(sys.argv[1])
common = {"num_cpus": 2, "object_store_memory": 100_000_000, "node_ip_address": "127.0.0.1"}
dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": told["port"]}
cluster = Cluster()
cluster.add_node(**common, **dashboard, env_vars={"SLIPWAY_HOME": told["homes"][0]})
cluster.add_node(**common, resources={told["resource"]: 1}, env_vars={"SLIPWAY_HOME": told["homes"][1]})
print("two nodes", flush=True)
sys.stdin.read()
cluster.shutdown()
