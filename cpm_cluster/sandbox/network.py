"""The nodes' network: a bridge of this machine, and a cable from it to the network namespace of each host."""

from __future__ import annotations

import json
import socket
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from cpm_cluster.sandbox.commands import run, succeeds
from cpm_cluster.sandbox.mounts import mount_points
from cpm_cluster.sandbox.state import Host, Sandbox, SandboxError

HOSTS = Path("/etc/hosts")
BEGIN, END = "# cpm sandbox: names of its nodes\n", "# cpm sandbox: end\n"


def require_free(state: Sandbox) -> None:
    """Raises SandboxError where another sandbox is up, or another network has the addresses."""
    other = owner(state)
    if other not in (None, _mark(state)):
        raise SandboxError(
            f"the network interface {state.bridge} belongs to {other}: take that down first, cpm sandbox down --root"
        )
    for route in json.loads(run(["ip", "-json", "-4", "route"])):
        if route["dst"] == "default" or route.get("dev") == state.bridge:
            continue
        if IPv4Network(route["dst"]).overlaps(state.subnet):
            raise SandboxError(f"the sandbox uses {state.subnet}, and so does {route.get('dev')} ({route['dst']})")


def up(state: Sandbox) -> None:
    """Bridge, nodes and names; what is there already stays, and cut links are mended.

    Raises:
        SandboxError: the kernel lacks something, or names are resolved elsewhere.
    """
    _make_bridge(state)
    for host in state.hosts:
        _make_host(state, host)
    if not succeeds(["iptables", "-C", *_rule(state)]):
        run(["iptables", "-I", *_rule(state)])
    write_names(state, HOSTS)
    _require_names(state)


def down(state: Sandbox) -> None:
    """Remove what `up` made."""
    for host in state.hosts:
        # not left to the end of the namespace, which a process in it could delay
        if _link(host.link):
            run(["ip", "link", "delete", host.link])
        for path in (host.netns, host.uts):
            if path in mount_points():
                run(["umount", str(path)])
    if is_up(state):
        run(["ip", "link", "delete", state.bridge])
    if succeeds(["iptables", "-C", *_rule(state)]):
        run(["iptables", "-D", *_rule(state)])
    remove_names(HOSTS)


def is_up(state: Sandbox) -> bool:
    """Whether the bridge is there, and is that of this sandbox."""
    return owner(state) == _mark(state)


def is_up_elsewhere(state: Sandbox) -> bool:
    """Whether bridge and nodes are those of a sandbox in another folder."""
    return owner(state) not in (None, _mark(state))


def owner(state: Sandbox) -> str | None:
    """Whose the bridge is, as its alias says; None where there is no bridge."""
    found = _link(state.bridge)
    return str(found.get("ifalias", "something else")) if found else None


def link_is_up(host: Host) -> bool:
    """Whether the node's cable is plugged in."""
    return "UP" in _link(host.link).get("flags", [])


def write_names(state: Sandbox, hosts: Path) -> None:
    """Put the nodes' names at the head of a hosts file, where they win.

    In place: the file may be a mount, which cannot be replaced.
    """
    remove_names(hosts)
    lines = [f"{host.address} {host.name}\n" for host in state.hosts]
    hosts.write_text("".join([BEGIN, *lines, END, hosts.read_text()]))


def remove_names(hosts: Path) -> None:
    """Take out what `write_names` added; the rest stays as it is, to the byte."""
    text = hosts.read_text()
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        hosts.write_text(before + rest.partition(END)[2])


def _make_bridge(state: Sandbox) -> None:
    if not _link(state.bridge):
        run(["ip", "link", "add", state.bridge, "address", _hardware_address(state.login_address), "type", "bridge"])
        run(["ip", "link", "set", state.bridge, "alias", _mark(state)])
    run(["ip", "address", "replace", f"{state.login_address}/{state.subnet.prefixlen}", "dev", state.bridge])
    run(["ip", "link", "set", state.bridge, "up"])


def _make_host(state: Sandbox, host: Host) -> None:
    for kind, path in (("net", host.netns), ("uts", host.uts)):
        if path not in mount_points():
            path.touch()
            run(["unshare", f"--{kind}={path}", "true"])
    run([*host.enter, "hostname", host.name])
    if not _link(host.link):
        inner = ["name", "eth0", "address", _hardware_address(host.address), "netns", str(host.netns)]
        run(["ip", "link", "add", host.link, "type", "veth", "peer", *inner])
        run(["ip", "link", "set", host.link, "master", state.bridge])
    run([*host.enter, "ip", "address", "replace", f"{host.address}/{state.subnet.prefixlen}", "dev", "eth0"])
    for interface in ("lo", "eth0"):
        run([*host.enter, "ip", "link", "set", interface, "up"])
    run(["ip", "link", "set", host.link, "up"])


def _hardware_address(address: IPv4Address) -> str:
    """The same each time, since the others remember it when a cable is replaced; 02 is for local use."""
    return ":".join(f"{byte:02x}" for byte in b"\x02\x00" + address.packed)


def _rule(state: Sandbox) -> list[str]:
    """Frames between nodes pass the firewall: dockerd drops what is forwarded, and with br_netfilter that is these."""
    same_bridge = ["-i", state.bridge, "-o", state.bridge]
    return ["FORWARD", *same_bridge, "-m", "comment", "--comment", "cpm sandbox", "-j", "ACCEPT"]


def _require_names(state: Sandbox) -> None:
    for host in state.hosts:
        try:
            found = socket.gethostbyname(host.name)
        except OSError as error:
            found = str(error)
        if found != str(host.address):
            raise SandboxError(f"{host.name} is {host.address} in {HOSTS}, and yet it resolves to {found}")


def _link(name: str) -> dict[str, Any]:
    """What `ip` knows of an interface; empty if there is none of that name."""
    if not Path("/sys/class/net", name).exists():
        return {}
    found: list[dict[str, Any]] = json.loads(run(["ip", "-json", "link", "show", "dev", name]))
    return found[0]


def _mark(state: Sandbox) -> str:
    """The bridge's alias, by which it is known to be ours."""
    return f"the sandbox in {state.root}"
