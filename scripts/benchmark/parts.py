"""The parts of the measurement. Each takes the systems in turn, A B A B …, on a cluster that starts from nothing, and
returns the markdown for its place in the page."""

import json
import signal
import statistics
import subprocess
import time

from . import pages
from .load import Generator
from .servers import HOME, Echo, Etcd, EtcdJson, Raftkv, wait_for

KEYS = 100_000
VALUE_BYTES = 128
MANY_VALUE_BYTES = 100
# A write that is not answered in this time is tried anew, while a cluster starts or has no leader.
RETRY_SECONDS = 0.05

COSTS = [
    ("CPU of all servers, 100,000 operations", "cpu", "s"),
    ("CPU of the generator, 100,000 operations", "generator", "s"),
    ("syncs, an operation", "syncs", ""),
    ("written to the disk, an operation", "written", "bytes"),
    ("peak memory of a node", "memory", "MB"),
]
LATENCIES = [
    ("operations", "rate", "1/s"),
    ("p50", "p50", "ms"),
    ("p99", "p99", "ms"),
    ("p99, corrected", "corrected_p99", "ms"),
]
FLOOR = [metric for metric in COSTS if metric[1] in ("cpu", "generator", "memory")]


class Bench:
    """What the parts have at hand: the programs, how often, how long."""

    def __init__(self, programs, pairs, seconds, trials, many_keys):
        self.programs, self.pairs, self.seconds = programs, pairs, seconds
        self.trials, self.many_keys = trials, many_keys
        self.generator = Generator(programs["raftkv"])
        self.systems = [Raftkv] + ([Etcd] if programs.get("etcd") else [])
        self.running = []
        # The machine's own, before anything was measured.
        self.load_before = 0.0

    def start(self, system, *how):
        program = {"raftkv": "raftkv", "etcd": "etcd", "etcd-json": "etcd", "echo": "echo"}[system.name]
        cluster = system(self.programs[program], *how)
        self.running.append(cluster)
        return cluster

    def ready(self, system, *how):
        return self.start(system, *how).start_ready()

    def stop(self):
        """All that runs, whatever happened."""
        for cluster in self.running:
            cluster.stop()
        self.running = []

    def sync_floor(self):
        """Median microseconds of one fdatasync, by the bytes of its frame."""
        HOME.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([self.programs["sync"], str(HOME)], capture_output=True, text=True, check=True)
        return {frame: figure["p50_us"] for frame, figure in json.loads(done.stdout).items()}

    def compare(self, systems, count, flags, clients, prepare=None):
        """The same load on each system in turn, `pairs` times: {system: {metric: [values]}} and the last figures."""
        results, figures = {}, {}
        for pair in range(self.pairs):
            for system in systems:
                cluster = self.ready(system, count)
                if prepare and system is not Echo:
                    prepare(cluster)
                for number in clients:
                    print(f"pair {pair + 1}: {count} × {system.name}, {number} clients", flush=True)
                    values, last = self.generator.measure(cluster, self.seconds, *flags, clients=number)
                    collected = results.setdefault(number, {}).setdefault(system.name, {})
                    for key, value in values.items():
                        collected.setdefault(key, []).append(value)
                    figures.setdefault(number, {})[system.name] = last
                self.stop()
        return results, figures


def writes(bench):
    flags = ["--keys", str(KEYS), "--value-bytes", str(VALUE_BYTES)]
    systems = [*bench.systems, *([EtcdJson] if Etcd in bench.systems else []), Echo]
    text, groups = "", {}
    for count in (3, 1):
        results, figures = bench.compare(systems, count, flags, (64, 256))
        for clients, by_system in results.items():
            text += f"\n{nodes(count)}, {clients} clients, {VALUE_BYTES} bytes to {KEYS:,} keys at the leader:"
            text += "\n\n"
            text += pages.compare(LATENCIES + COSTS, by_system, "echo")
            servers = {system: values["rate"] for system, values in by_system.items() if system != "echo"}
            groups[f"{count} × {clients} clients"] = servers
        if count == 3:
            curves = {system: last["writes"]["curve"] for system, last in figures[64].items() if system != "echo"}
            pages.curves("writes-latency.svg", "Latency of writes, three nodes, 64 clients", curves)
    pages.bars("writes.svg", "Writes a second, nodes × clients", groups)
    return text + "\n![Writes a second](performance/writes.svg)\n![Latency](performance/writes-latency.svg)\n"


def reads(bench):
    def fill(cluster):
        bench.generator.fill(cluster, KEYS, VALUE_BYTES)

    flags = ["--keys", str(KEYS), "--value-bytes", str(VALUE_BYTES), "--reads", "100"]
    systems = [*bench.systems, *([EtcdJson] if Etcd in bench.systems else []), Echo]
    text, groups = "", {}
    for consistency in ("linearizable", "stale"):
        results, _ = bench.compare(systems, 3, [*flags, "--consistency", consistency], (64,), fill)
        text += f"\nThree nodes, 64 clients, {consistency} reads of {VALUE_BYTES} bytes at the leader"
        text += " (etcd's serializable)" if consistency == "stale" else ""
        text += ":\n\n" + pages.compare(LATENCIES + FLOOR, results[64], "echo")
        groups[consistency] = {system: values["rate"] for system, values in results[64].items()}
    pages.bars("reads.svg", "Reads a second, three nodes, 64 clients", groups)
    return text + "\n![Reads a second](performance/reads.svg)\n"


def lone(bench):
    """One client, one write after the other: latency is all that there is."""
    flags = ["--keys", str(KEYS), "--value-bytes", str(VALUE_BYTES)]
    text = ""
    for count in (1, 3):
        results, floors = {}, []
        for pair in range(bench.pairs):
            floors.append(bench.sync_floor())
            for system in bench.systems:
                print(f"pair {pair + 1}: {count} × {system.name}, one client", flush=True)
                values, _ = bench.generator.measure(bench.ready(system, count), bench.seconds, *flags, clients=1)
                bench.stop()
                collected = results.setdefault(system.name, {})
                for key, value in values.items():
                    collected.setdefault(key, []).append(value)
        floor = [by_frame["512"] / 1000 for by_frame in floors]
        text += f"\n{nodes(count)}, one client:\n\n" + pages.compare(LATENCIES[:3] + COSTS[:1], results)
        text += f"\nOne fdatasync behind 512 bytes: {pages.spread(floor)} ms; behind 4 KiB: "
        text += f"{pages.spread([by_frame['4096'] / 1000 for by_frame in floors])} ms.\n"
        for system, values in results.items():
            target = [each + 0.1 for each in floor]
            text += f"p50 of {system}: {pages.spread(pages.ratios(values['p50'], floor))} × that sync, "
            text += f"{pages.spread(pages.ratios(values['p50'], target))} × (sync + 100 µs).\n"
    return text


def memory(bench):
    """A large state: what it takes, how a follower that has none of it catches up, how a member restarts with it."""
    results = {}
    for pair in range(bench.pairs):
        for system in bench.systems:
            print(f"pair {pair + 1}: {system.name}, {bench.many_keys:,} keys", flush=True)
            values = large_state(bench, bench.start(system, 3))
            bench.stop()
            for key, value in values.items():
                results.setdefault(system.name, {}).setdefault(key, []).append(value)
    metrics = [
        ("time to write them all", "fill", "s"),
        ("memory of the leader then", "resident", "MB"),
        ("its peak", "peak", "MB"),
        ("on its disk", "disk", "MB"),
        ("a follower with nothing catches up in", "catch_up", "s"),
        ("a member restarts in", "restart", "s"),
        ("its peak memory by then", "restart_peak", "MB"),
    ]
    head = f"\nThree nodes, the third not started; {bench.many_keys:,} keys of {MANY_VALUE_BYTES} bytes, written once:"
    return head + "\n\n" + pages.compare(metrics, results)


def large_state(bench, cluster):
    for node in cluster.nodes[:2]:
        wipe_and_start(cluster, node)
    for node in cluster.nodes[:2]:
        cluster.wait_ready(node)
    begin = time.monotonic()
    bench.generator.fill(cluster, bench.many_keys, MANY_VALUE_BYTES)
    values = {"fill": time.monotonic() - begin}
    cluster.compact()
    leader = cluster.leader()
    values["resident"] = leader.memory_bytes("VmRSS") / 1e6
    values["peak"] = leader.memory_bytes("VmHWM") / 1e6
    values["disk"] = leader.disk_bytes() / 1e6
    index, third = cluster.applied(leader), cluster.nodes[2]
    begin = time.monotonic()
    wipe_and_start(cluster, third)
    wait_for("the third has caught up", lambda: cluster.applied(third) >= index)
    values["catch_up"] = time.monotonic() - begin
    third.end()
    begin = time.monotonic()
    third.start()
    wait_for("the third is ready", lambda: cluster.is_ready(third) and cluster.applied(third) >= index)
    values["restart"] = time.monotonic() - begin
    values["restart_peak"] = third.memory_bytes("VmHWM") / 1e6
    return values


def failover(bench):
    """kill -9 of the leader until the next write that is acknowledged at a survivor."""
    results = {system.name: {"time": []} for system in bench.systems}
    clusters = [bench.ready(system, 3) for system in bench.systems]
    for trial in range(bench.trials):
        for cluster in clusters:
            leader = cluster.leader()
            survivor = next(node for node in cluster.nodes if node is not leader)
            begin = time.monotonic()
            leader.end(signal.SIGKILL)
            until_written(cluster, survivor, f"failover-{trial}")
            results[cluster.name]["time"].append(1000 * (time.monotonic() - begin))
            leader.start()
            cluster.wait_ready(leader)
    bench.stop()
    text = f"\nThree nodes, {bench.trials} trials each; a write that has no answer in {RETRY_SECONDS * 1000:.0f} ms is "
    text += "sent anew (etcd's through its gateway):\n\n"
    return text + pages.compare([("kill -9 of the leader to the next write", "time", "ms")], results)


def start(bench):
    """Three fresh nodes to the first write that is acknowledged."""
    results = {system.name: {"time": []} for system in bench.systems}
    for trial in range(bench.trials):
        for system in bench.systems:
            cluster = bench.start(system, 3)
            begin = time.monotonic()
            cluster.start()
            until_written(cluster, cluster.nodes[0], f"start-{trial}")
            results[system.name]["time"].append(1000 * (time.monotonic() - begin))
            bench.stop()
    text = f"\n{bench.trials} trials each; a write that has no answer in {RETRY_SECONDS * 1000:.0f} ms is sent anew:"
    return text + "\n\n" + pages.compare([("three fresh nodes to the first write", "time", "ms")], results)


def until_written(cluster, node, key):
    wait_for("a write is acknowledged", lambda: cluster.write(node, key, RETRY_SECONDS), pause=0.005)


def snapshot(bench):
    """Windows of writes on a large state: those in which a snapshot was taken beside those in which none was."""
    results = {}
    for pair in range(bench.pairs):
        for system in bench.systems:
            print(f"pair {pair + 1}: {system.name}, snapshots of {bench.many_keys:,} keys", flush=True)
            cluster = bench.ready(system, 3)
            bench.generator.fill(cluster, bench.many_keys, MANY_VALUE_BYTES)
            cluster.compact()
            quiet, busy = windows(bench, cluster)
            bench.stop()
            values = results.setdefault(system.name, {})
            for key, seen in (("quiet", quiet), ("busy", busy)):
                if seen:
                    values.setdefault(f"{key}_p99", []).append(statistics.median(p99 for p99, _ in seen))
                    values.setdefault(f"{key}_max", []).append(max(longest for _, longest in seen))
            values.setdefault("taken", []).append(len(busy))
    metrics = [
        ("p99 of windows with no snapshot", "quiet_p99", "ms"),
        ("p99 of windows with one", "busy_p99", "ms"),
        ("longest write with no snapshot", "quiet_max", "ms"),
        ("longest write with one", "busy_max", "ms"),
        ("windows with one, of 12", "taken", ""),
    ]
    text = f"\nThree nodes, {bench.many_keys:,} keys, 64 clients, 12 windows of 5 s:\n\n"
    return text + pages.compare(metrics, results)


def windows(bench, cluster):
    quiet, busy = [], []
    flags = ["--keys", str(bench.many_keys), "--value-bytes", str(MANY_VALUE_BYTES)]
    flags += ["--warm-up", "0s", "--duration", "5s"]
    count = lambda: [cluster.snapshots(node) for node in cluster.nodes]
    for _ in range(12):
        before = count()
        latency = bench.generator.run(cluster, *flags)["writes"]["latency"]
        seen = quiet if count() == before else busy
        seen.append((latency["p99_us"] / 1000, latency["max_us"] / 1000))
    return quiet, busy


def growth(bench):
    """Writes to a store of 10,000 keys and to one of 10,000,000, in turn: each is at rest while the other is measured."""
    results = {}
    for system in bench.systems:
        values, clusters = results.setdefault(system.name, {}), {}
        for keys in (10_000, 10_000_000):
            print(f"{system.name}: {keys:,} keys", flush=True)
            clusters[keys] = bench.ready(system, 3, f"{system.name}-of-{keys}")
            bench.generator.fill(clusters[keys], keys, MANY_VALUE_BYTES)
        for pair in range(bench.pairs):
            for keys, cluster in clusters.items():
                print(f"pair {pair + 1}: {system.name}, {keys:,} keys", flush=True)
                flags = ["--keys", str(keys), "--value-bytes", str(MANY_VALUE_BYTES)]
                measured, _ = bench.generator.measure(cluster, bench.seconds, *flags)
                for key, value in measured.items():
                    values.setdefault(f"{key}-{keys}", []).append(value)
        values["kept"] = pages.ratios(values["rate-10000000"], values["rate-10000"])
        values["dearer"] = pages.ratios(values["cpu-10000000"], values["cpu-10000"])
        bench.stop()
    metrics = [
        ("writes with 10,000 keys", "rate-10000", "1/s"),
        ("writes with 10,000,000 keys", "rate-10000000", "1/s"),
        ("the second by the first", "kept", ""),
        ("CPU with 10,000 keys, 100,000 writes", "cpu-10000", "s"),
        ("CPU with 10,000,000 keys, 100,000 writes", "cpu-10000000", "s"),
        ("the second by the first", "dearer", ""),
        ("peak memory of a node", "memory-10000000", "MB"),
    ]
    return "\nThree nodes, 64 clients:\n\n" + pages.compare(metrics, results)


def wipe_and_start(cluster, node):
    subprocess.run(["rm", "-rf", str(node.dir)], check=True)
    cluster.start(cluster.nodes.index(node))


def nodes(count):
    return "Three nodes" if count == 3 else "One node"


PARTS = {
    "writes": writes,
    "reads": reads,
    "lone": lone,
    "memory": memory,
    "failover": failover,
    "start": start,
    "snapshot": snapshot,
    "growth": growth,
}
# Takes long, and with etcd tens of gigabytes: only where asked for.
ON_REQUEST = {"growth"}
