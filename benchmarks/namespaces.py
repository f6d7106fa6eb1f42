"""Network: one namespace per rank on this machine, joined by links whose rate can be set.

Linux, root, and `ip` and `tc` of iproute2. Everything is named after the process that made it, so
that a later one finds what a killed one left behind.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from megatron_moe_comp.report.network_results import rate_bits

PREFIX = "moe-network"
INTERFACE = "link0"
MIN_BURST_BYTES = 16 * 1024
BURST_SECONDS = 0.5e-3

Device = tuple[str, str]
"""Namespace and interface."""


class NetworkError(Exception):
    """A network that cannot be built here; the message says why and what to do."""


def burst_bytes(rate: str) -> int:
    """Returns how much an idle link lets through at full speed.

    A message is not to start with a part that costs nothing: half a millisecond of the rate is
    little of it. The kernel's timers need as much at high rates, and full packets at low ones.
    """
    return max(MIN_BURST_BYTES, int(rate_bits(rate) / 8 * BURST_SECONDS))


def set_rate(devices: Sequence[Device], rate: str) -> None:
    """Limits what leaves through each interface to a rate, or to nothing with none."""
    for namespace, interface in devices:
        change = ("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root")
        if rate == "none":
            _run(*change, "noqueue")
        else:
            burst = str(burst_bytes(rate))
            _run(*change, "tbf", "rate", rate, "burst", burst, "latency", "100ms")


def require() -> None:
    """Raises NetworkError where this machine cannot build a network; removes what others left."""
    if sys.platform != "linux":
        raise NetworkError("network namespaces need Linux.")
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root. Run as root, for example with sudo.")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NetworkError(
                f"`{tool}` was not found. Install iproute2: apt-get install iproute2"
            )
    remove_leftovers()
    with Network(2) as network:
        for devices in network.devices:
            set_rate(devices, "100mbit")


class Network:
    """Ranks in namespaces of their own: two share a cable, more are at a switch.

    With a rate, every rank can send that much and receive that much at the same time.
    """

    def __init__(self, num_ranks: int) -> None:
        owner = f"{PREFIX}-{os.getpid()}"
        self.namespaces = [f"{owner}-{rank}" for rank in range(num_ranks)]
        self.addresses = [f"10.55.0.{rank + 1}" for rank in range(num_ranks)]
        self._switch = f"{owner}-switch"
        self._has_switch = num_ranks > 2
        self.devices: list[list[Device]] = [[(name, INTERFACE)] for name in self.namespaces]
        """Of each rank: what it sends through, and with a switch what it receives through."""
        if self._has_switch:
            for rank, devices in enumerate(self.devices):
                devices.append((self._switch, f"port{rank}"))

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(os.getpid())

    def _build(self) -> None:
        for name in (*self.namespaces, *([self._switch] if self._has_switch else [])):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        if self._has_switch:
            _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "switch", "up")
            for devices in self.devices:
                (_, port) = devices[1]
                self._add_cable(*devices)
                _run("ip", "-n", self._switch, "link", "set", port, "master", "switch")
        else:
            self._add_cable(*(device for devices in self.devices for device in devices))
        for name, address in zip(self.namespaces, self.addresses, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)

    def _add_cable(self, a: Device, b: Device) -> None:
        ends = [("name", interface, "netns", namespace) for namespace, interface in (a, b)]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for namespace, interface in (a, b):
            _run("ip", "-n", namespace, "link", "set", interface, "up")


def sent_bytes() -> int:
    """Returns what has left through this process's own link, headers included."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def remove_leftovers() -> None:
    """Removes what is left of owners that are no more: files, and namespaces with processes."""
    files = {path.name: path for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*-*")}
    for name in (*files, *_namespaces()):
        owner = int(name.removeprefix(f"{PREFIX}-").split("-")[0])
        if not Path(f"/proc/{owner}").exists():
            _remove(owner)
            if name in files:
                shutil.rmtree(files[name])


def _namespaces() -> list[str]:
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return [name for name in names if re.fullmatch(rf"{PREFIX}-\d+-\w+", name)]


def _remove(owner: int) -> None:
    """Ends every process in an owner's namespaces and removes them, with their links."""
    for name in _namespaces():
        if name.startswith(f"{PREFIX}-{owner}-"):
            while pids := _run("ip", "netns", "pids", name).split():
                for pid in map(int, pids):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            _run("ip", "netns", "delete", name)


def _run(*command: str) -> str:
    """Returns what a command printed.

    Raises:
        NetworkError: it failed.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}. In a container, it needs the "
            "capabilities NET_ADMIN and SYS_ADMIN: docker run --privileged."
        )
    return done.stdout
