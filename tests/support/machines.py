"""Machines that are namespaces of this one: each with a network address, a host name, processes and a disk of its own.

They are joined by a bridge in a network namespace around them, which sees their cables: it can cut one, slow it down,
and a machine can be switched off with all its processes. Needs Linux, iproute2, util-linux and either root or user
namespaces: `why_not` says what is missing.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from longctx.command_line import meeting_of

ADDRESS = "10.77.0.{}"  # of machine number n, from 1 on
UNSHARE_USER, ENTER_USER = (
    ([], []) if os.geteuid() == 0 else (["--user", "--map-root-user"], ["-U", "--preserve-credentials"])
)


@cache
def why_not() -> str:
    """Why this machine cannot be several; empty: it can."""
    words = ["unshare", *UNSHARE_USER, "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c"]
    commands = "ip link add bridge type bridge && ip link add cable type veth peer name eth0 && tc -V"
    try:
        made = subprocess.run([*words, commands], capture_output=True, text=True)
    except OSError as error:
        return f"namespaces: {error}"
    return f"namespaces: {made.stderr.strip()}" if made.returncode else ""


class Job:
    """A command on a machine; what it prints goes to a file."""

    def __init__(self, process: subprocess.Popen, output: Path) -> None:
        self.process, self.output = process, output

    @property
    def text(self) -> str:
        """What it has printed so far, on both streams."""
        return self.output.read_text(errors="replace")

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Until it has printed `words`. Raises AssertionError if it ends without, or takes longer."""
        end = time.monotonic() + seconds
        while words not in self.text:
            assert self.process.poll() is None, f"{words!r} was not printed:\n{self.text[-3000:]}"
            assert time.monotonic() < end, f"{words!r} was not printed in {seconds} s:\n{self.text[-3000:]}"
            time.sleep(0.1)

    def wait(self, seconds: float = 90) -> int:
        """Its exit status. Raises AssertionError if it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s:\n{self.text[-3000:]}") from None

    def signal(self, number: int) -> None:
        """Sends a signal to the command itself, not to what it has started."""
        for child in _children(self.process.pid):
            os.kill(child, number)


class Machine:
    """`disk` is a path that all machines have and each sees a folder of its own at; `shared` they see alike."""

    def __init__(self, network: Network, number: int) -> None:
        self.network, self.name, self.address = network, f"machine{number}", ADDRESS.format(number)
        self.number, self.jobs = number, 0
        self.folder = network.folder / self.name
        (self.folder / "home").mkdir(parents=True)
        (self.folder / "hosts").write_text(network.hosts)
        self.process = subprocess.Popen(
            [*network.enter, "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sleep", "infinity"]
        )  # fmt: skip
        network.started.append(self.process)
        self.init = _only_child(self.process.pid)
        self.enter = ["nsenter", "-t", str(self.init), *ENTER_USER, "-n", "-u", "-m", "-p", f"--wd={network.shared}"]
        network.do(f"ip link add cable{number} type veth peer name eth0 netns {self.init}")
        network.do(f"ip link set cable{number} master bridge up")
        self.do(
            f"hostname {self.name}", "ip link set lo up", f"ip address add {self.address}/24 dev eth0",
            "ip link set eth0 up", f"mount --bind {shlex.quote(str(self.folder))} {shlex.quote(str(network.disk))}",
            f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts",
        )  # fmt: skip

    def do(self, *commands: str) -> None:
        """Commands of a shell on the machine, one after the other."""
        subprocess.run([*self.enter, "sh", "-ec", "\n".join(commands)], check=True)

    def start(self, words: list[str], **environment: str) -> Job:
        """A command in the folder of the network that all machines share."""
        self.jobs += 1
        output = self.network.folder / f"{self.name}-{self.jobs}.txt"
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "VIRTUAL_ENV", "PYTHONPATH")}
        known = kept | {"HOME": str(self.network.disk / "home"), "OMP_NUM_THREADS": "1"} | environment
        with output.open("w") as file:
            process = subprocess.Popen(
                [*self.enter, "env", "-i", *(f"{key}={value}" for key, value in known.items()), *words],
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return Job(process, output)

    def torchrun(self, ranks: int, words: list[str], *options: str, **environment: str) -> Job:
        """`words` on `ranks` processes of this machine, which meets the others at the first."""
        meeting = meeting_of(len(self.network.machines), self.network.machines[0].name)
        launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", str(ranks)]
        return self.start([*launcher, *options, *words], **environment)

    def cut(self) -> None:
        """From now on no packet comes or goes, and nobody is told."""
        self.network.do(f"ip link set cable{self.number} down")

    def mend(self) -> None:
        self.network.do(f"ip link set cable{self.number} up")

    def slow(self, rate: str) -> None:
        """What comes to the machine and leaves it takes as long as at `rate` (of tc: `1mbit`)."""
        shape = f"root tbf rate {rate} burst 32kbit latency 1s"
        self.network.do(f"tc qdisc add dev cable{self.number} {shape}")
        self.do(f"tc qdisc add dev eth0 {shape}")

    def switch_off(self) -> None:
        """As if its power had failed: the others hear nothing of it."""
        self.cut()
        os.kill(self.init, signal.SIGKILL)
        self.process.wait()


class Network:
    """So many machines; they are gone at the end of the `with`."""

    def __init__(self, folder: Path, machines: int) -> None:
        self.folder, self.disk, self.shared = folder, folder / "disk", folder / "shared"
        self.disk.mkdir()
        self.shared.mkdir()
        names = [f"{ADDRESS.format(n)} machine{n}" for n in range(1, machines + 1)]
        self.hosts = "\n".join(["127.0.0.1 localhost", *names]) + "\n"
        self.process = subprocess.Popen(["unshare", *UNSHARE_USER, "--net", "--mount", "sleep", "infinity"])
        self.started = [self.process]
        try:
            self._join(machines)
        except BaseException:
            self.__exit__()
            raise

    def _join(self, machines: int) -> None:
        self.enter = ["nsenter", "-t", str(self.process.pid), *ENTER_USER, "-n", "-m"]
        _until(lambda: os.readlink(f"/proc/{self.process.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        self.do("ip link add bridge type bridge")
        self.do("ip link set bridge up")
        self.machines = [Machine(self, number) for number in range(1, machines + 1)]

    def do(self, command: str) -> None:
        """A command where the cables are."""
        subprocess.run([*self.enter, *shlex.split(command)], check=True)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in reversed(self.started):
            process.kill()
            process.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _only_child(pid: int) -> int:
    _until(lambda: bool(_children(pid)))
    (child,) = _children(pid)
    own = os.readlink("/proc/self/ns/mnt")
    _until(lambda: os.readlink(f"/proc/{child}/ns/mnt") != own and "sleep" in Path(f"/proc/{child}/comm").read_text())
    return child


def _until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "namespaces were not made in time"
        time.sleep(0.01)
