"""Files and folders of manifests -> changes of objects; the last good version of what is refused stays in force.

Per file it is known which objects it holds. A refused document keeps the last good version of its object. A document of
which nobody can tell what it was to be (broken YAML, no name) keeps every object of its file that is not in it any more, since it
may be one of those. An object that two files hold is that of the path that is given first, then of the file that is first by
name.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from controlplane.model.mesh import Object
from controlplane.model.problems import ObjectKey, Place, Problem, Severity, error
from controlplane.sources.kinds import read
from controlplane.sources.text import Broken, documents

SUFFIXES = (".yaml", ".yml", ".json")
FILE_BOUND = 8 << 20  # bytes; larger is a mistake, not a manifest
FILES_BOUND = 50_000
KEPT = "the last good version stays in force"


@dataclass(slots=True)
class Changes:
    """What differs from before. `documents` counts what was read for it."""

    puts: list[Object] = field(default_factory=list)
    deletes: list[ObjectKey] = field(default_factory=list)
    documents: int = 0

    def __bool__(self) -> bool:
        return bool(self.puts or self.deletes)


@dataclass(slots=True)
class _File:
    stamp: tuple[int, ...]
    held: dict[ObjectKey, Object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Parsed:
    """One file on its own: its good objects, refused ones by key, and whether a document could be any object."""

    objects: dict[ObjectKey, Object]
    refused: frozenset[ObjectKey]
    uncertain: bool
    problems: tuple[Problem, ...]
    documents: int


class Folder:
    """See the head of this file. `paths` are folders (all manifests below them, but nothing hidden) and files."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(paths)
        self._files: dict[Path, _File] = {}
        self._owners: dict[ObjectKey, set[Path]] = {}
        self._current: dict[ObjectKey, Object] = {}
        self._twice: set[ObjectKey] = set()
        self._missing: list[Problem] = []

    def refresh(self, only: Iterable[Path] | None = None) -> Changes:
        """Read the given files, or those of all that look changed. What is no manifest of ours is left."""
        changes, touched = Changes(), set()
        if only is None:
            found = self._find()
            paths = sorted(found | self._files.keys())
        else:
            paths = sorted(path for path in only if path in self.paths or path in self._files or path.suffix in SUFFIXES)
        for path in paths:
            touched |= self._look(path, changes, always=only is not None)
        for key in sorted(touched):
            self._settle(key, changes)
        return changes

    def problems(self) -> list[Problem]:
        """What is wrong with single documents, and objects that are defined twice."""
        found = list(self._missing)
        for file in self._files.values():
            found += file.problems
        for key in self._twice:
            first, *others = sorted(self._owners[key], key=self._rank)
            before = self._files[first].held[key].meta.place
            found += [error(self._files[path].held[key].meta.place, str(key),
                            f"is already defined in {before}, whose version is in force", "remove one of them")
                      for path in others]
        return sorted(found)

    def files(self) -> int:
        return len(self._files)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _find(self) -> set[Path]:
        found: set[Path] = set()
        self._missing = []
        for path in self.paths:
            if path.is_dir():
                found.update(_manifests(path))
            elif path.exists():
                found.add(path)
            else:
                self._missing.append(error(Place(str(path)), "", "is not there", "look at --config"))
        if len(found) > FILES_BOUND:
            self._missing.append(error(
                Place(str(self.paths[0])), "", f"has {len(found)} files; only the first {FILES_BOUND} by name are read",
                "put several objects into one file"))
            found = set(sorted(found)[:FILES_BOUND])
        return found

    def _look(self, path: Path, changes: Changes, always: bool) -> set[ObjectKey]:
        """Read one file if it looks changed, or always. Returns the objects that it held or holds."""
        before = self._files.get(path)
        try:
            stat = path.stat()
        except OSError:
            return self._forget(path)
        if not path.is_file():
            return self._forget(path)
        stamp = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_dev)
        if before is not None and before.stamp == stamp and not always:
            return set()
        parsed = read_file(path)
        held, old = dict(parsed.objects), before.held if before else {}
        problems = list(parsed.problems)
        for key, one in old.items():
            if key not in held and (parsed.uncertain or key in parsed.refused):
                held[key] = one
        kept = {str(key) for key in held if key in parsed.refused}
        for number, problem in enumerate(problems):
            if problem.severity is Severity.ERROR and problem.about in kept:
                problems[number] = replace(problem, hint=f"{problem.hint}; {KEPT}" if problem.hint else KEPT)
        self._files[path] = _File(stamp, held, problems)
        changes.documents += parsed.documents
        for key in old.keys() - held.keys():
            self._disown(key, path)
        for key in held:
            self._owners.setdefault(key, set()).add(path)
        return old.keys() | held.keys()

    def _forget(self, path: Path) -> set[ObjectKey]:
        file = self._files.pop(path, None)
        if file is None:
            return set()
        for key in file.held:
            self._disown(key, path)
        return set(file.held)

    def _rank(self, path: Path) -> tuple[int, Path]:
        """What comes first counts: the position of the path it was found by, then its name."""
        given = (number for number, root in enumerate(self.paths) if root == path or root in path.parents)
        return next(given, len(self.paths)), path

    def _disown(self, key: ObjectKey, path: Path) -> None:
        owners = self._owners[key]
        owners.discard(path)
        if not owners:
            del self._owners[key]

    def _settle(self, key: ObjectKey, changes: Changes) -> None:
        owners = self._owners.get(key, set())
        (self._twice.add if len(owners) > 1 else self._twice.discard)(key)
        if not owners:
            if self._current.pop(key, None) is not None:
                changes.deletes.append(key)
            return
        now = self._files[min(owners, key=self._rank)].held[key]
        if now != self._current.get(key):
            self._current[key] = now
            changes.puts.append(now)


def _manifests(folder: Path) -> Iterator[Path]:
    """A mounted ConfigMap's files are links through `..data`; its hidden folders are not entered, else all were there twice."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _manifests(entry)
        elif entry.suffix in SUFFIXES:
            yield entry


def read_file(path: Path) -> Parsed:
    """Parse one file. What is wrong with it is in `problems`; nothing is raised."""
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BOUND + 1)
        if len(data) > FILE_BOUND:
            return _unread(name, f"is larger than {FILE_BOUND >> 20} MiB", "split it")
        text = data.decode("utf-8-sig")
    except OSError as failed:
        return _unread(name, f"cannot be read: {failed.strerror}", "look at its permissions")
    except UnicodeDecodeError:
        return _unread(name, "is not UTF-8 text", "save it as UTF-8")
    return parse(name, text)


def _unread(name: str, message: str, hint: str) -> Parsed:
    return Parsed({}, frozenset(), True, (error(Place(name), "", message, hint),), 0)


def parse(name: str, text: str) -> Parsed:
    """The documents of a file called `name`."""
    objects: dict[ObjectKey, Object] = {}
    refused: set[ObjectKey] = set()
    problems: list[Problem] = []
    uncertain, count = False, 0
    for body in documents(text):
        count += 1
        if isinstance(body, Broken):
            problems.append(error(Place(name, body.line), "", body.message, body.hint))
            uncertain = True
            continue
        one = read(name, body)
        problems += one.problems
        if one.key is None:
            uncertain = uncertain or not one.ignored
        elif one.key in objects:
            problems.append(error(one.place, str(one.key), f"is already defined in line {objects[one.key].meta.place.line}",
                                  "remove one of them"))
        elif one.object is None:
            refused.add(one.key)
        else:
            objects[one.key] = one.object
    return Parsed(objects, frozenset(refused), uncertain, tuple(problems), count)
