"""Whether BPF works here: compiles and loads a trivial program with BCC in a short-lived child. The only importer of bcc.

BCC costs 70 MB on import and 140 when it compiles, and gives nothing back: so never in the agent. The child runs this
very file, which therefore imports nothing but the standard library.

Kernel headers, in this order: BCC_KERNEL_SOURCE as the environment has it; the running kernel's build tree; Debian's
header packages (`-amd64` and `-common`: either alone fails) merged by symlinks; the stub tree in bpf/headers.
The stubs suffice for programs that use nothing but uapi structs, and ours do not use anything else.
"""
from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BPF = Path(__file__).parents[2] / "bpf"
PROBE = BPF / "probe.c"
STUB_HEADERS = BPF / "headers"
STUB_VERSION = "395776"  # 6.10.0 as LINUX_VERSION_CODE; bpf/headers/include/linux/version.h says the same
DEADLINE = 60.0  # s; it takes 0.4, with a cold cache of LLVM's pages several

# How the child's answer begins: libbcc warns on stdout too, and what C has buffered comes out after Python's, at exit.
_ANSWER = b"narrows-bpf "
_CGROUP_SOCK_ADDR, _CGROUP_INET4_CONNECT = 18, 10  # linux/bpf.h: program type, expected attach type


@dataclass(frozen=True, slots=True)
class Check:
    """`problem` is "" when the program was loaded, else what is missing and what to do. `headers` says which were used;
    `loaded` is what the kernel says about the program (`prog_type`, `prog_tag`, ...)."""

    problem: str
    headers: str
    loaded: dict[str, str]


class CompileError(Exception):
    """What is missing and what to do. The compiler's own words went to stderr."""


def check(source: Path = PROBE, *, deadline: float = DEADLINE) -> Check:
    """Compile `source` and load its function `narrows_probe` as a connect hook, which attaches nothing. Never raises for
    what the machine lacks; blocks for up to `deadline` seconds."""
    with tempfile.TemporaryDirectory(prefix="narrows-bpf-") as folder:
        headers, environment = find_headers(Path("/"), Path(folder))
        try:
            done = subprocess.run([sys.executable, __file__, "child", str(source)], env={**os.environ, **environment},
                                  stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline, check=False)
        except subprocess.TimeoutExpired:
            return Check(f"compiling {source} took longer than {deadline:g} s; is the machine overloaded?", headers, {})
    noise = done.stderr.decode(errors="replace")
    try:
        answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(_ANSWER))[len(_ANSWER):])
    except (ValueError, StopIteration):
        return Check(f"the child ended with {done.returncode}: {noise.strip()[-500:] or 'silence'}", headers, {})
    return Check(_problem(answer, noise, headers), headers, answer.get("loaded", {}))


def find_headers(root: Path, scratch: Path) -> tuple[str, dict[str, str]]:
    """(what a person calls them, the environment that makes BCC use them). A merged tree is made in `scratch`."""
    if given := os.environ.get("BCC_KERNEL_SOURCE"):
        return f"BCC_KERNEL_SOURCE={given}", {}
    build = root / "lib/modules" / os.uname().release / "build"
    if (build / "include/linux/kconfig.h").exists():
        return f"build tree {build}", {}
    # the kernel's own version if there is one, else the newest: the pair needs not be the running kernel's for uapi
    commons = sorted((root / "usr/src").glob("linux-headers-*-common"), key=lambda path: _version(path.name))
    for common in reversed(commons):
        stem = common.name.removesuffix("-common")
        for flavour in sorted((root / "usr/src").glob(f"{stem}-*")):
            if flavour != common and (flavour / "include/generated").is_dir():
                _merge(common, flavour, scratch / "merged")
                return f"{common} merged with {flavour.name}", {"BCC_KERNEL_SOURCE": str(scratch / "merged")}
    return f"stubs in {STUB_HEADERS}", {"BCC_KERNEL_SOURCE": str(STUB_HEADERS), "BCC_LINUX_VERSION_CODE": STUB_VERSION}


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in "".join(c if c.isdigit() else " " for c in name).split())


def _merge(common: Path, flavour: Path, target: Path) -> None:
    """One tree of symlinks to both packages, where the flavour's generated parts lie beside the common headers."""
    for place in ("include", "arch/x86/include", "arch/arm64/include"):
        (target / place).mkdir(parents=True)
        for source in (common, flavour):
            for entry in sorted((source / place).iterdir()) if (source / place).is_dir() else ():
                link = target / place / entry.name
                if not link.exists():
                    link.symlink_to(entry)


def _problem(answer: dict[str, Any], noise: str, headers: str) -> str:
    stage, said = answer["stage"], answer.get("error", "")
    lines = [line for line in noise.splitlines() if "error:" in line] or [line for line in noise.splitlines() if line]
    detail = lines[0].strip() if lines else said
    if stage == "done":
        return ""
    if stage == "import":
        return (f"BCC does not load: {said}; install Debian's python3-bpfcc, and make the environment with "
                "--system-site-packages (PyPI's `bcc` is another program)")
    if stage == "compile":
        return f"the program does not compile with {headers}: {detail}; unset BCC_KERNEL_SOURCE to try other headers"
    return (f"the kernel refuses the program: {said}; it takes root or CAP_BPF and CAP_NET_ADMIN, and a kernel with "
            "CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF")


def _child(source: str) -> dict[str, Any]:
    try:
        from bcc import BPF as Program
    except Exception as error:
        return {"stage": "import", "error": str(error)}
    try:
        program = Program(src_file=source)
    except Exception as error:
        return {"stage": "compile", "error": str(error)}
    try:
        function = program.load_func("narrows_probe", _CGROUP_SOCK_ADDR, attach_type=_CGROUP_INET4_CONNECT)
    except Exception as error:
        return {"stage": "load", "error": str(error)}
    info = Path(f"/proc/self/fdinfo/{function.fd}").read_text().splitlines()
    loaded = {key: value.strip() for key, _, value in (line.partition(":") for line in info) if key.startswith("prog_")}
    return {"stage": "done", "loaded": loaded}


def compile_programs(sources: list[Path], include: Path) -> dict[str, Any]:
    """For a short-lived process (see the head of this file). One unit of all sources, which share program.h and its maps.

    Returns `programs`: by name the instructions, in which maps stand as numbers; `maps`: by name that number, type, key, value,
    entries and flags. What BCC itself loads of it ends with this process. CompileError says what is wrong with what.
    """
    with tempfile.TemporaryDirectory(prefix="narrows-bpf-") as folder:
        headers, environment = find_headers(Path("/"), Path(folder))
        os.environ.update(environment)
        try:
            from bcc import BPF as Program
            from bcc.libbcc import lib
        except Exception as error:
            raise CompileError(_problem({"stage": "import", "error": str(error)}, "", headers)) from None
        text = f'#include "{include}"\n' + "".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in sources)
        try:
            program = Program(text=text.encode(), cflags=[f"-I{include.parent}"])
        except Exception as error:
            raise CompileError(f"the programs do not compile with {headers}: {error}") from None
        module = program.module
        functions = [lib.bpf_function_name(module, at) for at in range(lib.bpf_num_functions(module))]
        # bcc declares no types of these: ctypes would cut a module's address to 32 bits
        tables = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(("bpf_num_tables", lib))(module)
        name_of = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)(("bpf_table_name", lib))
        number = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        asks = [number((f"bpf_table_{what}_id", lib)) for what in ("fd", "type", "key_size", "leaf_size", "max_entries", "flags")]
        maps = {name_of(module, at).decode(): [ask(module, at) for ask in asks] for at in range(tables)}
        return {"headers": headers, "maps": maps, "programs": {name.decode(): program.dump_func(name) for name in functions}}


def main() -> int:
    """`python -m agent.capture.bpf`: one line, and 1 when BPF does not work."""
    found = check()
    print(f"bpf: {found.problem}" if found.problem else f"bpf: compiles and loads with {found.headers}")
    return 1 if found.problem else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(f"\n{_ANSWER.decode()}{json.dumps(_child(sys.argv[2]))}")
    else:
        sys.exit(main())
