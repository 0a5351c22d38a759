"""Loads the programs of bpf/ into the kernel and pins them, in a child that ends: the agent never pays for the compiler.

    python -m agent.capture.loader child PINS CACHE SOURCES HOOKS     one JSON line: {"hooks": {name: "" or why not}, ...}

Compiling takes a second, so what came of it is kept in CACHE (a directory of root's, 0700) by the hash of sources, kernel release and this
file; with it the child needs no BCC. A hook whose program the kernel refuses is left out alone, and `Loaded` says why. Links are made by
whoever enrols a pod (egress.py); here those that are pinned get the new program in place of the old one, without a gap.
"""
from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from agent.capture import bpf_call
from agent.capture.bpf_call import MapShape
from agent.capture.pins import PinError, Pins

SOURCES = Path(__file__).parents[2] / "bpf"
FILES = ("connect.c", "sockops.c", "peername.c", "getsockopt.c", "setsockopt.c", "sk_lookup.c", "listen.c", "lasthop.c", "observe.c")
HEADERS = ("program.h", "narrows.h")
DEADLINE = 120.0  # s; it takes 2, on a machine that is busy and cold 20
POD, PROXY, NETNS = "pod", "proxy", "netns"
NETNS_HERE = 0x6E61727221776F73  # NARROWS_NETNS_HERE of bpf/narrows.h
_ANSWER = b"narrows-loader "
# BPF_PROG_TYPE_CGROUP_SOCK_ADDR, _SOCK_OPS, _CGROUP_SOCKOPT, _SK_LOOKUP
_SOCK_ADDR, _SOCK_OPS, _SOCKOPT, _SK_LOOKUP = 18, 13, 25, 30


@dataclass(frozen=True, slots=True)
class Hook:
    """`attach` is linux/bpf.h's enum bpf_attach_type; `on` says whose cgroup it is linked to, or that it is to a namespace."""

    name: str
    kind: int
    attach: int
    on: tuple[str, ...]
    lack: str  # what is not done without it; "" when nothing in its direction can be captured then
    inward: bool = False

    @property
    def program(self) -> str:
        return f"narrows_{self.name}"

    def link(self, number: int | str) -> str:
        """The name of its link's pin, by a cgroup's id or a namespace's cookie. None of one direction is taken for one of the other."""
        return f"in-{number}-{self.name.replace('_', '-')}" if self.inward else f"{number}_{self.name}"


HOOKS = (
    Hook("sockops", _SOCK_OPS, 3, (POD, PROXY), ""),
    Hook("getsockopt", _SOCKOPT, 21, (PROXY,), ""),
    Hook("getpeername4", _SOCK_ADDR, 29, (POD,), "applications see the proxy's address as their peer's"),
    Hook("getpeername6", _SOCK_ADDR, 30, (POD,), "applications see the proxy's address as their peer's"),
    Hook("setsockopt", _SOCKOPT, 22, (POD,), "applications with CAP_NET_RAW may set our mark"),
    # last: from here on connects are captured, and everything else must stand
    Hook("connect4", _SOCK_ADDR, 10, (POD,), ""),
    Hook("connect6", _SOCK_ADDR, 11, (POD,), ""),
)
# What comes in: needs no other hook, and no other hook needs it.
INGRESS = (
    Hook("listen", _SOCK_OPS, 3, (PROXY,), "", True),
    Hook("lasthop4", _SOCK_ADDR, 10, (PROXY,), "", True),
    Hook("lasthop6", _SOCK_ADDR, 11, (PROXY,), "", True),
    Hook("sk_lookup", _SK_LOOKUP, 36, (NETNS,), "", True),
)
# Observation's, which has pins of its own (observe.py): it comes and goes without capture.
OBSERVE = (Hook("observe", _SOCK_OPS, 3, (), "round trips and retransmits of connections are not told"),)


class LoadError(Exception):
    """Nothing was loaded. Says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Template:
    """A program of which each pod has its own: the instructions, and which map is loaded where."""

    code: bytes
    maps: dict[int, str]

    def load(self, hook: Hook, pins: Pins, cookie: int) -> int:
        """The program for the namespace of this cookie. OSError with the verifier's words, or that a pin is missing."""
        opened: dict[int, int] = {}
        try:
            for at, name in self.maps.items():
                opened[at] = bpf_call.pinned(pins.maps / name)
            return bpf_call.load_program(f"nw_{hook.name}", hook.kind, hook.attach,
                                         bpf_call.with_number(bpf_call.with_maps(self.code, opened), NETNS_HERE, cookie))
        finally:
            for fd in opened.values():
                os.close(fd)


@dataclass(frozen=True, slots=True)
class Loaded:
    """`hooks`: by name "" or why the kernel refuses it. `cached`: nothing had to be compiled. `headers`: which the compiler used.
    `lookup`: what ingress.py makes each pod's program of; None when that hook was not asked for, or nothing is pinned.
    """

    hooks: dict[str, str]
    cached: bool
    headers: str
    lookup: Template | None = None

    @property
    def problem(self) -> str:
        """"" when connects can be captured, else why not."""
        return self._lacking(HOOKS)

    @property
    def ingress_problem(self) -> str:
        """The same of connections that come in."""
        return self._lacking(INGRESS)

    def _lacking(self, hooks: tuple[Hook, ...]) -> str:
        return "; ".join(f"{hook.name}: {self.hooks[hook.name]}" for hook in hooks if not hook.lack and self.hooks.get(hook.name))


def load(pins: Pins, cache: Path, *, sources: Path = SOURCES, deadline: float = DEADLINE, hooks: tuple[Hook, ...] = HOOKS) -> Loaded:
    """These hooks and the maps that they use. Blocks for up to `deadline` seconds. LoadError when there is no BCC, no root, or a pin that
    is not ours."""
    return _run(str(pins.root), cache, sources, deadline, hooks)


def probe(cache: Path, *, deadline: float = DEADLINE) -> Loaded:
    """Which hooks the kernel takes, as `load` says it; afterwards nothing is there but the cache."""
    return _run("", cache, SOURCES, deadline, (*HOOKS, *INGRESS, *OBSERVE))


def _run(root: str, cache: Path, sources: Path, deadline: float, hooks: tuple[Hook, ...]) -> Loaded:
    argv = [sys.executable, "-m", "agent.capture.loader", "child", root, str(cache), str(sources), ",".join(hook.name for hook in hooks)]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline, check=False,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES.parent), os.environ.get("PYTHONPATH", "")])})
    except subprocess.TimeoutExpired:
        raise LoadError(f"loading the BPF programs took longer than {deadline:g} s; is the machine overloaded?") from None
    noise = done.stderr.decode(errors="replace").strip()
    try:
        answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(_ANSWER))[len(_ANSWER):])
    except (ValueError, StopIteration):
        raise LoadError(f"the loader ended with {done.returncode}: {noise[-500:] or 'silence'}") from None
    if "error" in answer:
        wrong = next((line for line in noise.splitlines() if "error:" in line), "")
        raise LoadError(answer["error"] + (f" ({wrong.strip()})" if wrong else ""))
    lookup = answer["lookup"] and Template(base64.b64decode(answer["lookup"]["code"]),
                                           {int(at): name for at, name in answer["lookup"]["maps"].items()})
    return Loaded(answer["hooks"], answer["cached"], answer["headers"], lookup)


# ---- in the child ------------------------------------------------------------------------------------------------------

def cache_key(sources: Path) -> str:
    hashed = blake2b(os.uname().release.encode(), digest_size=16)
    for path in (*(sources / name for name in (*HEADERS, *FILES)), Path(__file__), Path(__file__).with_name("bpf.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def obtain(cache: Path, sources: Path) -> tuple[dict[str, Any], bool]:
    """(what the compiler made, whether it was there already)."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (found := cache.lstat()).st_uid != 0 or found.st_mode & 0o077:
        raise PinError(f"{cache} is not a directory of root's alone: programs for the kernel are not taken from it")
    kept = cache / f"{cache_key(sources)}.json"
    try:
        return json.loads(kept.read_bytes()), True
    except (OSError, ValueError):
        pass
    from agent.capture.bpf import compile_programs

    made = compile_programs([sources / name for name in FILES], sources / "program.h")
    made["programs"] = {name: base64.b64encode(code).decode() for name, code in made["programs"].items()}
    fresh = kept.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(made))
    fresh.rename(kept)
    for old in cache.glob("*.json"):
        if old != kept:
            old.unlink(missing_ok=True)
    return made, False


def install(pins: Pins | None, made: dict[str, Any], hooks: Iterable[Hook] = HOOKS) -> dict[str, str]:
    """Maps of these hooks are adopted or made, then programs loaded, then pins replaced; by hook "" or why not. Without pins all ends with
    this process."""
    with suppress(ValueError):  # no CAP_SYS_RESOURCE; maps count in it before Linux 5.11 only
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if pins is not None:
        pins.make()
    codes = {hook: base64.b64decode(made["programs"][hook.program]) for hook in hooks}
    used = {number for code in codes.values() for _, number in bpf_call.map_loads(code)}
    wanted = {name: described for name, described in made["maps"].items() if described[0] in used}
    adopted = pins is not None and all((pins.maps / name).exists() for name in wanted)
    maps: dict[int, int] = {}
    for name, (number, *shape) in wanted.items():
        maps[number] = _map(pins, name, MapShape(*shape)) if pins is not None else bpf_call.create_map(name, MapShape(*shape))
    said = {}
    for hook, unbound in codes.items():
        code = bpf_call.with_maps(unbound, {at: maps[number] for at, number in bpf_call.map_loads(unbound)})
        try:
            program = bpf_call.load_program(f"nw_{hook.name}", hook.kind, hook.attach, code)
        except OSError as error:
            said[hook.name] = str(error.strerror)
            continue
        said[hook.name] = ""
        if pins is not None and NETNS not in hook.on:
            _put_in_force(pins, hook, program, adopted)
        elif pins is not None:
            _renew(pins, hook, template(made, hook), adopted)
    return said


def template(made: dict[str, Any], hook: Hook) -> Template:
    names = {number: name for name, (number, *_) in made["maps"].items()}
    code = base64.b64decode(made["programs"][hook.program])
    return Template(code, {at: names[number] for at, number in bpf_call.map_loads(code)})


def _map(pins: Pins, name: str, shape: MapShape) -> int:
    path = pins.maps / name
    if not path.exists():
        fd = bpf_call.create_map(name, shape)
        bpf_call.pin(fd, path)
        return fd
    fd = bpf_call.pinned(path)
    if (found := bpf_call.map_shape(fd)) != shape:
        raise PinError(f"{path} is {found}, expected {shape}: another program's, or of a build whose NARROWS_LAYOUT was not raised; "
                       "`narrows capture clean` removes it")
    return fd


def _put_in_force(pins: Pins, hook: Hook, program: int, adopted: bool) -> None:
    """A pinned program of the same tag stays, unless a map is new: a tag does not tell which maps a program has. The pin goes before
    the links, so that a pod that is enrolled meanwhile has the new program too."""
    path = pins.programs / hook.name
    if path.exists():
        old = bpf_call.pinned(path)
        same = bpf_call.program_tag(old) == bpf_call.program_tag(program)
        os.close(old)
        if same and adopted:
            return
    fresh = path.with_name(f"{hook.name}-next")  # no moment without a pin: who enrols a pod meanwhile needs one
    fresh.unlink(missing_ok=True)
    bpf_call.pin(program, fresh)
    fresh.rename(path)
    for link in sorted(pins.links.glob(hook.link("*"))):
        _replace(link, program)


def _renew(pins: Pins, hook: Hook, own: Template, adopted: bool) -> None:
    """The same for the programs that pods have alone."""
    for link in sorted(pins.links.glob(hook.link("*"))):
        fd = bpf_call.pinned(link)
        try:
            old = bpf_call.program_of(bpf_call.linked(fd)[0])
        finally:
            os.close(fd)
        new = own.load(hook, pins, int(link.name.split("-")[1]))
        same = bpf_call.program_tag(old) == bpf_call.program_tag(new)
        os.close(old)
        if not same or not adopted:
            _replace(link, new)
        os.close(new)


def _replace(link: Path, program: int) -> None:
    try:
        fd = bpf_call.pinned(link)
    except FileNotFoundError:  # its pod has gone meanwhile
        return
    try:
        bpf_call.replace(fd, program)
    except OSError:  # its cgroup or namespace is gone; who enrols pods takes the pin away
        pass
    finally:
        os.close(fd)


def _child(root: str, cache: str, sources: str, names: str) -> dict[str, Any]:
    from agent.capture.bpf import CompileError

    try:
        os.close(bpf_call.create_map("nw_probe", MapShape(2, 4, 8, 1, 0)))  # BCC would call it a fault of the sources
        made, cached = obtain(Path(cache), Path(sources))
        hooks = [hook for hook in (*HOOKS, *INGRESS, *OBSERVE) if hook.name in names.split(",")]
        said = install(Pins(Path(root)) if root else None, made, hooks)
        answer = {"hooks": said, "cached": cached, "headers": made["headers"], "lookup": None}
        for hook in hooks:
            if root and NETNS in hook.on:
                own = template(made, hook)
                answer["lookup"] = {"code": base64.b64encode(own.code).decode(), "maps": own.maps}
        return answer
    except (CompileError, PinError) as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"the BPF programs are not loaded: {error}; it takes root or CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"}


if __name__ == "__main__":
    print(f"\n{_ANSWER.decode()}{json.dumps(_child(*sys.argv[2:6]))}", flush=True)
