"""The control plane without its doors: follows the sources, and publishes what follows from them."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from controlplane.model.mesh import Mesh
from controlplane.model.problems import Problem, Severity
from controlplane.model.security import ROOT_NAMESPACE
from controlplane.server.hub import Hub
from controlplane.sources.cluster import Cluster, Together
from controlplane.sources.folder import Changes, Folder
from controlplane.translate.catalog import Catalog

SOURCES = ("--config", "the cluster")
FILES, CLUSTER = range(2)  # an object that both have is that of the files

log = logging.getLogger("narrows.controlplane")


class Plane:
    """`load` first, then `follow` what `sources.watch` says. `generation` counts the changes that were applied."""

    def __init__(self, paths: Iterable[Path], trust_domain: str = "", root_namespace: str = ROOT_NAMESPACE,
                 cluster: Cluster | None = None) -> None:
        self.folder = Folder(paths)
        self.cluster = cluster
        self._together = Together()
        self.mesh = Mesh(root_namespace)
        self.catalog = Catalog(self.mesh, trust_domain)
        self.hub = Hub(self.catalog, self._converged)
        self.generation = 0
        self.loaded = False
        self.started = time.time()
        self._problems: list[Problem] = []
        self.on_converged: Callable[[float], None] = _ignore
        self.leads: Callable[[], bool] | None = None  # None: there is no election

    def load(self) -> None:
        self._apply(self._of(FILES, self.folder.refresh()), "read the configuration")
        self.loaded = self.cluster is None

    def follow(self, changed: Iterable[Path] | None) -> None:
        """Look at these files, or at everything."""
        self._apply(self._of(FILES, self.folder.refresh(changed)), "applied a change")

    def follow_cluster(self) -> None:
        """Look at what the API server told since. With the first whole state of the cluster the configuration is loaded."""
        if self.cluster is not None:
            self._apply(self._of(CLUSTER, self.cluster.refresh()), "applied a change of the cluster")
            self.loaded = self.loaded or self.cluster.synced

    def problems(self) -> list[Problem]:
        """Everything that is wrong now, in the order of files and lines."""
        return self._problems

    def _of(self, source: int, changes: Changes) -> Changes:
        return changes if self.cluster is None else self._together.take(source, changes)

    def _of_cluster(self) -> list[Problem]:
        return [] if self.cluster is None else [*self.cluster.problems(), *self._together.problems(SOURCES)]

    def _apply(self, changes: Changes, what: str) -> None:
        begin = time.monotonic()
        touched = self.mesh.apply(changes.puts, changes.deletes)
        differ = self.hub.publish(touched)
        problems = sorted({*self.folder.problems(), *self._of_cluster(), *self.mesh.problems()})
        before, self._problems = set(self._problems), problems
        new = [problem for problem in problems if problem not in before]
        if changes or new or len(problems) != len(before):
            self.generation += 1
            log.info(what, extra={
                "generation": self.generation, "documents": changes.documents, "objects": len(changes.puts),
                "deleted": len(changes.deletes), "hosts": len(touched.hosts), "addresses": differ,
                "problems": len(problems), "milliseconds": round((time.monotonic() - begin) * 1000, 1)})
        for problem in new:
            level = logging.ERROR if problem.severity is Severity.ERROR else logging.WARNING
            log.log(level, problem.message, extra={
                "file": problem.place.file, "line": problem.place.line, "object": problem.about, "hint": problem.hint})

    def _converged(self, seconds: float) -> None:
        self.on_converged(seconds)


def _ignore(_seconds: float) -> None:
    return
