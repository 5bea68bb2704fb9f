"""A real Slurm on this machine: one controller, and nodes that are namespaces with fake GPUs.

Every daemon is a child of the test process and dies with it; nothing outside one directory is
written. A node has its own host name, address, processes and shared memory, so killing its first
process is the crash of a machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FINAL_STATES = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "unshare", "setpriv")
_PATH = f"/usr/sbin:/sbin:{os.environ['PATH']}"


def reason_to_skip() -> str | None:
    """The first requirement of a cluster that this machine lacks; None if it lacks nothing."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    probe = subprocess.run(["unshare", "-numipf", "true"], capture_output=True, check=False)
    return "namespaces need root" if probe.returncode or os.geteuid() else None


class Cluster:
    """`num_nodes` nodes of 8 GPUs and 64 CPUs; a context manager."""

    def __init__(self, directory: Path, *, num_nodes: int) -> None:
        self.directory = directory
        self.nodes = [f"node{i}" for i in range(1, num_nodes + 1)]
        self.config = directory / "slurm.conf"
        self.takes_containers = False
        # Not from `random`, which tests seed: two clusters at a time must differ.
        self.bridge = f"mf{secrets.token_hex(4)}"
        self._network = ""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.config)}

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        cwd: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """A command of the user on the login machine; the controller never hangs a test."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **(variables or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(
        self, *arguments: str | Path, cwd: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> str:
        """`sbatch ARGUMENTS`; returns the number of the job."""
        return self.run(
            "sbatch", "--parsable", *arguments, cwd=cwd, variables=variables
        ).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields that `scontrol show job` has for it."""
        fields = self.run("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(
        self, job: str, states: Sequence[str] = FINAL_STATES, *, timeout: float = 60.0
    ) -> dict[str, str]:
        """The job's fields once it is in one of `states`."""
        deadline = time.monotonic() + timeout
        while True:
            fields = self.job(job)
            if fields["JobState"] in states:
                return fields
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {fields['JobState']}: {self.output(job)}")
            time.sleep(0.2)

    def hosts(self, job: str) -> list[str]:
        """The nodes of a job that runs or has run."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).stdout.split()

    def output(self, job: str) -> str:
        """The output of the batch script so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def kill_node(self, node: str) -> None:
        """The power fails: every process of the node is gone at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def start_node(self, node: str) -> None:
        index = self.nodes.index(node)
        address = f"{self._network}.{index + 11}"
        # --kill-child ends the namespace with its parent, which --pdeathsig ends with the test.
        init = [str(Path(__file__).with_name("node_init.sh")), self.directory, node, address]
        daemon = self._start_daemon(node, "unshare", "-numipf", "--kill-child", "--", *init)
        wait_until(lambda: _namespace(daemon.pid) != _namespace(os.getpid()), 30)
        device = f"{self.bridge}-{index}"
        _ip("link", "delete", device, check=False)
        _ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", str(daemon.pid))
        _ip("link", "set", device, "master", self.bridge, "up")

    def wait_for_nodes(self, *nodes: str, timeout: float = 60.0) -> None:
        """Until these nodes are idle and answer."""

        def ready() -> bool:
            listed = self.run("sinfo", "-hN", "-p", "train", "-t", "idle", "-o", "%N %T").stdout
            return set(nodes) <= {
                line.split()[0] for line in listed.splitlines() if "*" not in line
            }

        wait_until(ready, timeout)
        self.run("srun", f"-w{','.join(nodes)}", f"-N{len(nodes)}", "true")  # idle can be too early

    def stop(self) -> None:
        if "slurmctld" in self._daemons:
            subprocess.run(
                ["scancel", "--full", "--user=root"],
                env=self.environment,
                capture_output=True,
                timeout=20,
                check=False,
            )
        for name in [*self.nodes, "slurmctld", "munged"]:
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.kill()
                daemon.wait()
        for index in range(len(self.nodes)):
            _ip("link", "delete", f"{self.bridge}-{index}", check=False)
        _ip("link", "delete", self.bridge, check=False)

    def _start(self) -> None:
        self._network = _free_network()
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self._network}.1/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for name in ("munge", "state", "spool", "log", "dev", "ssh"):
            (self.directory / name).mkdir(parents=True)
        self._write_configuration()
        self._write_ssh()
        munge, log = self.directory / "munge", self.directory / "log"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        self._start_daemon(
            *("munged", "munged", "--force", "--foreground"),  # force: parents may be 0700
            *(f"--{name}-file={munge / name}" for name in ("key", "pid", "seed")),
            *(f"--socket={munge / 'socket'}", f"--log-file={log / 'munged.log'}"),
        )
        wait_until((munge / "socket").is_socket, 30)
        own_hosts = 'mount --make-rprivate /; mount --bind "$0/hosts" /etc/hosts; exec "$@"'
        self._start_daemon(
            *("slurmctld", "unshare", "-m", "bash", "-c", own_hosts, self.directory),
            *("slurmctld", "-D", "-f", self.config),
        )
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes(*self.nodes)

    def _start_daemon(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        with (self.directory / "log" / f"{name}.console").open("ab") as console:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        return self._daemons[name]

    def _write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(len(self.nodes) + 1)
        template = Path(__file__).with_name("slurm.conf.in").read_text()
        lines, gpus = [], []
        hosts = ["127.0.0.1 localhost", f"{self._network}.1 {host}"]
        for gpu in range(8):
            (self.directory / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")  # must be a device
        for index, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True)):
            address = f"{self._network}.{index + 11}"
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port} "
                "CPUs=64 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"
            )
            gpus.append(f"NodeName={node} Name=gpu File={self.directory}/dev/nvidia[0-7]")
            hosts.append(f"{address} {node}")
        text = template.replace("@DIR@", str(self.directory)).replace("@HOST@", host)
        text = text.replace("@ADDRESS@", f"{self._network}.1").replace("@PORT@", str(ports[0]))
        self.config.write_text(text + "\n".join(lines) + "\n")
        (self.directory / "gres.conf").write_text("\n".join(gpus) + "\n")
        self._write_plugin()
        (self.directory / "hosts").write_text("\n".join(hosts) + "\n")

    def _write_plugin(self) -> None:
        """The options of pyxis, where Slurm's headers are installed."""
        library = self.directory / "containers.so"
        self.takes_containers = Path("/usr/include/slurm/spank.h").exists()
        if self.takes_containers:
            source = Path(__file__).with_name("containers.c")
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        text = f"required {library}\n" if self.takes_containers else ""
        (self.directory / "plugstack.conf").write_text(text)

    def _write_ssh(self) -> None:
        """Keys and settings with which one node may log in to another."""
        if shutil.which("sshd", path=_PATH) is None:
            return
        ssh = self.directory / "ssh"
        ssh.chmod(0o700)
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name], check=True
            )
        (ssh / "config").write_text(
            "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            f"  LogLevel ERROR\n  IdentityFile {ssh}/user\n"
        )
        (ssh / "sshd_config").write_text(
            f"HostKey {ssh}/host\nAuthorizedKeysFile {ssh}/user.pub\nStrictModes no\n"
            f"PermitRootLogin yes\nUsePAM no\nPidFile none\nSetEnv SLURM_CONF={self.config}\n"
        )


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: it did not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} not within {timeout:.0f} s")
        time.sleep(0.05)


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["ip", *arguments], env={"PATH": _PATH}, capture_output=True, text=True, check=check
    )
    return done.stdout


def _free_network() -> str:
    used = _ip("-4", "address") + _ip("-4", "route")
    networks = [f"10.231.{third}" for third in range(1, 251)]
    return secrets.choice([network for network in networks if f"{network}." not in used])


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
