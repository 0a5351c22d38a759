"""Gets the real Kubernetes that `make test-kubernetes` runs against: kube-apiserver, kube-controller-manager and kubectl.

Nobody packages the first two for Debian 12, but it has their whole source (package `kubernetes`, 1.20.2, with every dependency): this
builds them once a machine, into `$XDG_CACHE_HOME/narrows/kubernetes/VERSION-RECIPE` (`~/.cache` without it), which `make clean` and
`make distclean` leave. A second run finds them.

Run as `/usr/bin/python3 tools/kubernetes.py`, by root if packages are missing; only the standard library is at hand. A step that fails
says what to do and ends with exit status 69. The last line of standard output is the folder.
"""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.setup import ROOT, apt, fail, run

PACKAGES = ROOT / "tools" / "apt-kubernetes.txt"
GO = Path("/usr/lib/go-1.19/bin/go")
REFLECT2 = Path("/usr/share/gocode/src/github.com/modern-go/reflect2")
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kubectl")
RECIPE = "1"  # of patch(), generate() and compile_(): with another one everything is built anew
RELEASE = "1.20."  # later sources of Debian have kubectl alone
PACKAGE = "k8s.io/kubernetes"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "narrows" / "kubernetes"


def is_built(folder: Path) -> bool:
    return all((folder / name).exists() for name in PROGRAMS)


def built() -> Path | None:
    """What an earlier run built by this recipe; also for `tests/support/kubernetes/real.py`."""
    found = [one for one in cache().glob(f"*-{RECIPE}") if is_built(one)]
    return max(found, key=lambda one: one.stat().st_mtime, default=None)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two runs at once build once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def own_apt(folder: Path) -> list[str]:
    """apt-get's options by which it reads source packages from where this machine has its packages, in an apt configuration of their own:
    the machine's sources and lists stay as they are. Whichever files name Debian (also a mirror of it) are copied with `deb` turned into
    `deb-src`, so that their options (keys, trust) hold here too."""
    shown = subprocess.run(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(SOURCESENTRY)", "Created-By: Packages"],
                           capture_output=True, text=True, check=False).stdout
    entries = [line.removeprefix("Debian|").rpartition(":") for line in shown.splitlines() if line.startswith("Debian|")]
    if not entries:
        fail("apt", "apt knows no source of Debian packages", "check /etc/apt/sources.list, run apt-get update, then this again")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True)
    (folder / "lists" / "partial").mkdir(parents=True)
    for number, name in enumerate(sorted({name for name, _, _ in entries})):
        text, wanted = Path(name).read_text(), {int(line) for other, _, line in entries if other == name}
        if name.endswith(".sources"):
            (folder / "parts" / f"{number}.sources").write_text(re.sub(r"^Types:.*$", "Types: deb-src", text, flags=re.M))
        else:
            lines = [line for at, line in enumerate(text.splitlines(), 1) if at in wanted]
            (folder / "parts" / f"{number}.list").write_text("".join(re.sub(r"^\s*deb\s", "deb-src ", line) + "\n" for line in lines))
    chosen = {"Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": folder / "parts", "Dir::State::lists": folder / "lists",
              "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "", "APT::Sandbox::User": "root"}
    return [option for key, value in chosen.items() for option in ("-o", f"{key}={value}")]


def source(work: Path) -> tuple[str, Path]:
    """Debian's version and the unpacked source, in the place where Go looks for it."""
    options = own_apt(work / "apt")
    hint = "check the network and /etc/apt/sources.list, then run make test-kubernetes again"
    run("apt", ["apt-get", *options, "update", "-q"], hint)
    shown = subprocess.run(["apt-get", *options, "source", "--print-uris", "-q", "kubernetes"], capture_output=True, text=True,
                           check=False).stdout
    found = re.search(r" kubernetes_(\S+)\.dsc ", shown)
    version = found[1] if found else ""
    if not version.startswith(RELEASE):
        fail("source", f"the source package kubernetes is {version or 'not there'}, not {RELEASE}x",
             "Debian 12 has it: run this there (later ones have kubectl's alone)")
    tree = work / "go" / "src" / PACKAGE
    if not (work / f"unpacked-{version}").exists():
        shutil.rmtree(tree, ignore_errors=True)
        (work / "packed").mkdir(exist_ok=True)
        run("source", ["apt-get", *options, "source", "-q", "--download-only", "kubernetes"], hint, work / "packed")
        tree.parent.mkdir(parents=True, exist_ok=True)
        # apt has checked it against the signed index; dpkg-source would need the key of who uploaded it
        run("source", ["dpkg-source", "--no-check", "-x", str(work / "packed" / f"kubernetes_{version}.dsc"), str(tree)],
            "is there room for 300 MB in the cache folder?")
        (work / f"unpacked-{version}").touch()
    return version, tree


def patch(tree: Path) -> None:
    """The vendored reflect2 ends newer Go in a nil pointer at the first map."""
    vendored = tree / "vendor" / "github.com" / "modern-go" / "reflect2"
    if not REFLECT2.is_dir():
        fail("patch", f"{REFLECT2} is missing", "apt-get install --reinstall golang-github-modern-go-reflect2-dev")
    shutil.rmtree(vendored)
    shutil.copytree(REFLECT2, vendored)


def generate(tree: Path, env: dict[str, str]) -> None:
    """OpenAPI's definitions of all kinds: the only generated file that is not in the source. Server-side apply goes by it."""
    marked = re.compile(r"^// \+k8s:openapi-gen=", re.M)
    folders: set[str] = set()
    for under, name in (("pkg", "pkg"), ("cmd", "cmd"), ("plugin", "plugin"), ("staging/src", "vendor")):
        for path in (tree / under).rglob("*.go"):
            inside = path.relative_to(tree / under)
            if inside.parts[:2] in (("k8s.io", "code-generator"), ("k8s.io", "sample-apiserver")) or path.name.endswith("_test.go"):
                continue
            if marked.search(path.read_text(errors="replace")):
                folders.add(f"{PACKAGE}/{name}/{inside.parent}")
    hint = "remove the cache folder and run make test-kubernetes again"
    run("generate", [
        str(GO), "run", "./vendor/k8s.io/kube-openapi/cmd/openapi-gen", "--logtostderr", "-i", ",".join(sorted(folders)),
        "-p", f"{PACKAGE}/pkg/generated/openapi", "-O", "zz_generated.openapi",
        "-h", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt", "-r", "/dev/null"], hint, tree, **env)


def compile_(tree: Path, version: str, into: Path, env: dict[str, str]) -> None:
    upstream = re.sub(r"^.*\+really|-[^-]*$", "", version)
    major, minor, _ = upstream.split(".", 2)
    told = {"gitVersion": f"v{upstream}", "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean", "gitCommit": "debian",
            "buildDate": "1970-01-01T00:00:00Z"}
    flags = " ".join(["-s", "-w", *(f"-X {where}.{key}={value}" for key, value in told.items() for where in (
        f"{PACKAGE}/vendor/k8s.io/component-base/version", f"{PACKAGE}/vendor/k8s.io/client-go/pkg/version"))])
    for name in PROGRAMS:
        print(f"kubernetes: compiling {name} {upstream}", flush=True)
        began = time.monotonic()
        run("compile", [str(GO), "build", "-trimpath", "-ldflags", flags, "-o", str(into / name), f"./cmd/{name}"],
                      "see the compiler's message above; it needs 3 GB of memory and 2 GB in the cache folder", tree, **env)
        print(f"kubernetes: {name} took {time.monotonic() - began:.0f} s", flush=True)


def build() -> Path:
    work = cache() / "work"
    work.mkdir(exist_ok=True)
    print("kubernetes: getting Debian's source", flush=True)
    version, tree = source(work)
    folder = cache() / f"{version}-{RECIPE}"
    env = {"GOPATH": str(work / "go"), "GOCACHE": str(work / "gocache"), "GO111MODULE": "off", "CGO_ENABLED": "0", "GOFLAGS": ""}
    patch(tree)
    generate(tree, env)
    made = work / "programs"
    made.mkdir(exist_ok=True)
    compile_(tree, version, made, env)
    for old in cache().glob("*-*"):
        if old.is_dir() and old != folder:
            shutil.rmtree(old)
    made.rename(folder)
    shutil.rmtree(work)  # 2 GB that only an interrupted build goes on with
    return folder


def main() -> None:
    start = time.monotonic()
    apt(PACKAGES)
    if (folder := built()) is None:
        with alone(cache()):
            folder = built() or build()
        print(f"kubernetes: done in {time.monotonic() - start:.0f} s", flush=True)
    print(folder)


if __name__ == "__main__":
    main()
