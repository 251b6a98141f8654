"""One load on one cluster, and what it cost: `raftkv bench` makes it, /proc and the servers' metrics tell the rest."""

import json
import subprocess

from .servers import Failed

TIMEOUT_SECONDS = 3600


class Generator:
    """The program that makes the load, with what all loads have in common."""

    def __init__(self, binary):
        self.binary = binary

    def run(self, cluster, *flags, clients=64):
        """The figures of `raftkv bench` at the leader."""
        port = cluster.leader().port
        command = [self.binary, "bench", "--output", "json", *cluster.clients(clients), *flags]
        command.append(f"http://127.0.0.1:{port}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode != 0:
            raise Failed(f"{' '.join(command)}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def measure(self, cluster, seconds, *flags, clients=64):
        """A warm-up, then a load that is paid for to the last operation: {metric: value} and the figures."""
        self.run(cluster, "--warm-up", "0s", "--duration", "1s", *flags, clients=clients)
        before = cluster.cost()
        figures = self.run(cluster, "--warm-up", "0s", "--duration", f"{seconds}s", *flags, clients=clients)
        after = cluster.cost()
        kind = figures["writes"] or figures["reads"]
        operations = figures["operations"]
        if figures["failed"]:
            print(f"{cluster.name}: {figures['failures']}", flush=True)
        cost = {key: after[key] - before[key] for key in before if before[key] is not None}
        values = {
            "rate": figures["operations_per_second"],
            "p50": kind["latency"]["p50_us"] / 1000,
            "p99": kind["latency"]["p99_us"] / 1000,
            "corrected_p99": kind["corrected"]["p99_us"] / 1000,
            "cpu": 1e5 * cost["cpu"] / operations,
            "generator": 1e5 * figures["generator"]["cpu_seconds"] / operations,
            "syncs": cost["syncs"] / operations,
            "memory": cluster.peak_bytes() / 1e6,
        }
        if "written" in cost:
            values["written"] = cost["written"] / operations
        return values, figures

    def fill(self, cluster, keys, value_bytes):
        """Writes each key once, as fast as it goes."""
        flags = ["--keys", str(keys), "--distribution", "sequential", "--stop-after", str(keys), "--warm-up", "0s"]
        figures = self.run(cluster, *flags, "--value-bytes", str(value_bytes), "--timeout", "60s", clients=256)
        if figures["failed"]:
            print(f"{cluster.name}: filling: {figures['failures']}", flush=True)
        return figures
