"""What is measured: clusters of raftkv and of etcd on loopback, and the bare echo. Starts them below target/bench/,
knows who leads, and reads from the kernel and from their own metrics what they cost."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

HOME = Path("target/bench")
READY_SECONDS = 120
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """Something that cannot be measured; its text is one line."""


def ask(port, path, body=None, method=None, timeout=5):
    """Status and body of one request; raises OSError or HTTPException where there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def wait_for(what, condition, seconds=READY_SECONDS, pause=0.01):
    """Polls until `condition` gives something true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = condition()
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            found = None
        if found:
            return found
        time.sleep(pause)
    raise Failed(f"after {seconds} s still not: {what}")


def free_ports():
    """The first of a hundred ports that nobody has: below those that the kernel takes for outgoing connections."""
    blocks = range(10_000, 32_000, 100)
    first = os.getpid() % len(blocks)
    for base in [*blocks[first:], *blocks[:first]]:
        try:
            for port in range(base, base + 100):
                with socket.socket() as listener:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise Failed("there are no hundred free ports in a row")


def written_bytes():
    """What the disk below HOME has taken, whoever wrote it; None where the kernel does not tell. Not `write_bytes` of
    /proc/PID/io: that counts the page cache's whole folio, megabytes perhaps, for each byte that is changed in it."""
    device = HOME.parent.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(stat.read_text().split()[6]) * 512 if stat.exists() else None


class Node:
    """One process and its directory."""

    def __init__(self, name, port, command):
        self.name, self.port, self.command = name, port, command
        self.dir = HOME / name
        self.process = None

    def start(self):
        self.dir.parent.mkdir(parents=True, exist_ok=True)
        with open(self.dir.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, how=signal.SIGTERM):
        if self.process:
            self.process.send_signal(how)
            self.process.wait()
            self.process = None

    def runs(self):
        return self.process is not None

    def cpu_seconds(self):
        """User and system time."""
        # Behind the name, in parentheses, comes the state, the third field; the times are the 14th and 15th.
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND

    def memory_bytes(self, field):
        """`VmHWM`, the most that there ever was, or `VmRSS`, what there is."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M)[1]) * 1024

    def disk_bytes(self):
        return sum(path.stat().st_blocks * 512 for path in self.dir.rglob("*") if path.is_file())

    def metric(self, name):
        text = ask(self.port, "/metrics")[1].decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


class Cluster:
    """Nodes of one system. What differs between systems is in the classes below."""

    def __init__(self, nodes):
        self.nodes = nodes

    def start(self, *places):
        """Starts the nodes at `places`, or all, with nothing on disk if all."""
        if not places:
            for node in self.nodes:
                shutil.rmtree(node.dir, ignore_errors=True)
                node.dir.with_suffix(".log").unlink(missing_ok=True)
        for place in places or range(len(self.nodes)):
            self.nodes[place].start()

    def start_ready(self):
        self.start()
        for node in self.nodes:
            self.wait_ready(node)
        self.leader()
        return self

    def wait_ready(self, node):
        def ready():
            if node.process.poll() is not None:
                lines = node.dir.with_suffix(".log").read_text().splitlines()
                raise Failed(f"{node.name} has ended: {lines[-1] if lines else 'it says nothing'}")
            return self.is_ready(node)

        wait_for(f"{node.name} is ready", ready)

    def stop(self):
        for node in self.nodes:
            node.end()

    def leader(self):
        """The node that all running ones take for the leader."""

        def agreed():
            leaders = {self.leader_of(node) for node in self.nodes if node.runs()}
            return leaders.pop() if len(leaders) == 1 and None not in leaders else None

        return wait_for("the nodes agree on a leader", agreed)

    def cost(self):
        """What all nodes together have taken since they started; to be subtracted from a later one."""
        running = [node for node in self.nodes if node.runs()]
        return {
            "cpu": sum(node.cpu_seconds() for node in running),
            "written": written_bytes(),
            "syncs": sum(self.syncs(node) for node in running),
        }

    def peak_bytes(self):
        return max(node.memory_bytes("VmHWM") for node in self.nodes if node.runs())

    def caught_up(self, node, index):
        return self.applied(node) >= index


class Raftkv(Cluster):
    """Its defaults."""

    name = "raftkv"

    def __init__(self, binary, count, called=name):
        port = free_ports()
        self.clients = lambda clients: ["--protocol", "http", "--connections", str(clients)]
        members = ",".join(f"http://127.0.0.1:{port + 50 + id}" for id in range(1, count + 1))
        nodes = []
        for id in range(1, count + 1):
            listen = f"127.0.0.1:{port + id}"
            command = [binary, "--id", str(id), "--cluster", members, "--listen", listen]
            node = Node(f"{called}-{id}", port + id, command)
            node.command += ["--data-dir", str(node.dir)]
            nodes.append(node)
        super().__init__(nodes)

    def is_ready(self, node):
        return ask(node.port, "/readyz")[0] == 200

    def status(self, node):
        return json.loads(ask(node.port, "/status")[1])

    def leader_of(self, node):
        leader = self.status(node)["leader"]
        return self.nodes[leader - 1] if leader else None

    def applied(self, node):
        return self.status(node)["applied"]

    def snapshots(self, node):
        """A number that changes with each snapshot taken."""
        return self.status(node)["snapshot"]["index"]

    def syncs(self, node):
        return node.metric("raftkv_wal_fsync_seconds_count")

    def write(self, node, key, timeout):
        """Whether a write was acknowledged."""
        return ask(node.port, f"/{key}", b"v", "PUT", timeout)[0] == 204

    def compact(self):
        """Its log is compacted by itself."""


class Etcd(Cluster):
    """Its defaults, but for a quota that a large state needs, and silence. Loaded over gRPC, which is its best: clients
    share four connections, as they do in its own benchmark."""

    name = "etcd"

    def __init__(self, binary, count, called=name):
        port = free_ports()
        self.clients = lambda clients: self.grpc(clients)
        members = ",".join(f"n{id}=http://127.0.0.1:{port + 50 + id}" for id in range(1, count + 1))
        nodes = []
        for id in range(1, count + 1):
            client, peer = f"http://127.0.0.1:{port + id}", f"http://127.0.0.1:{port + 50 + id}"
            command = [binary, "--name", f"n{id}", "--listen-client-urls", client, "--advertise-client-urls", client]
            command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            command += ["--initial-cluster", members, "--initial-cluster-state", "new"]
            command += ["--quota-backend-bytes", str(8 << 30), "--logger", "zap", "--log-level", "error"]
            node = Node(f"{called}-{id}", port + id, command)
            node.command += ["--data-dir", str(node.dir)]
            nodes.append(node)
        super().__init__(nodes)

    @staticmethod
    def grpc(clients):
        connections = min(clients, 4)
        return ["--protocol", "etcd", "--connections", str(connections), "--pipeline", str(clients // connections)]

    def is_ready(self, node):
        return json.loads(ask(node.port, "/health")[1])["health"] == "true"

    def status(self, node):
        return json.loads(ask(node.port, "/v3/maintenance/status", b"{}")[1])

    def leader_of(self, node):
        leader = self.status(node).get("leader")
        ids = {self.status(other)["header"]["member_id"]: other for other in self.nodes if other.runs()}
        return ids.get(leader)

    def applied(self, node):
        return int(self.status(node)["raftAppliedIndex"])

    def snapshots(self, node):
        return node.metric("etcd_debugging_snap_save_total_duration_seconds_count")

    def syncs(self, node):
        log = node.metric("etcd_disk_wal_fsync_duration_seconds_count")
        return log + node.metric("etcd_disk_backend_commit_duration_seconds_count")

    def write(self, node, key, timeout):
        encoded = [base64.b64encode(text).decode() for text in (key.encode(), b"v")]
        body = json.dumps({"key": encoded[0], "value": encoded[1]})
        return ask(node.port, "/v3/kv/put", body.encode(), "POST", timeout)[0] == 200

    def compact(self):
        """Old revisions go, as they would where etcd is looked after."""
        node = self.leader()
        revision = int(self.status(node)["header"]["revision"])
        body = json.dumps({"revision": str(revision), "physical": True})
        ask(node.port, "/v3/kv/compaction", body.encode(), timeout=600)


class EtcdJson(Etcd):
    """The same etcd, loaded through its gateway: the very load that raftkv gets, HTTP/1.1 and a connection a client."""

    name = "etcd-json"

    def __init__(self, binary, count):
        super().__init__(binary, count)
        self.clients = lambda clients: ["--protocol", "etcd-json", "--connections", str(clients)]


class Echo(Cluster):
    """The floor: hyper alone."""

    name = "echo"

    def __init__(self, binary, count=1):
        port = free_ports()
        self.clients = lambda clients: ["--protocol", "plain", "--connections", str(clients)]
        super().__init__([Node("echo", port, [binary, f"127.0.0.1:{port}"])])

    def is_ready(self, node):
        return ask(node.port, "/")[0] == 200

    def leader(self):
        return self.nodes[0]

    def syncs(self, node):
        return 0

    def compact(self):
        """It keeps nothing."""
