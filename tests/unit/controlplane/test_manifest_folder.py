"""A folder of manifests: what is good is applied, what is refused keeps its last good version, whatever happens to the rest."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from controlplane.sources.folder import FILE_BOUND, Changes, Folder
from controlplane.sources.watch import Watch
from tests.support.manifests import service, virtual_service


def named(changes: Changes) -> tuple[list[str], list[str]]:
    return sorted(one.meta.key.name for one in changes.puts), sorted(key.name for key in changes.deletes)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "a.yaml").write_text(service("a") + service("b", ip="10.96.0.11"))
    (tmp_path / "c.json").write_text('{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}, "spec": {"selector": {"a": "b"}}}')
    (tmp_path / "notes.txt").write_text("not a manifest")
    (tmp_path / ".hidden.yaml").write_text(service("hidden"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.yml").write_text(service("d", ip="10.96.0.12"))
    found = Folder([tmp_path])
    assert named(found.refresh()) == (["a", "b", "c", "d"], [])
    return found


def test_what_did_not_change_is_not_put_again(folder: Folder, tmp_path: Path) -> None:
    assert not folder.refresh()
    os.utime(tmp_path / "a.yaml")
    assert not folder.refresh()  # read again, and the same


def test_a_change_of_one_object_is_one_put(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a") + service("b", ip="10.96.0.99"))
    assert named(folder.refresh([tmp_path / "a.yaml"])) == (["b"], [])
    (tmp_path / "a.yaml").write_text(service("a"))
    assert named(folder.refresh()) == ([], ["b"])


def test_a_removed_file_takes_its_objects_along(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").unlink()
    assert named(folder.refresh([tmp_path / "a.yaml"])) == ([], ["a", "b"])


def test_a_refused_document_keeps_its_last_good_version_and_says_so(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a", ip="nonsense") + service("b", ip="10.96.0.99"))
    assert named(folder.refresh()) == (["b"], [])
    assert [str(one) for one in folder.problems()] == [
        f"{tmp_path}/a.yaml:6: Service default/a: spec.clusterIP 'nonsense' is no IP address; the last good version stays in force"
    ]
    (tmp_path / "a.yaml").write_text(service("a", ip="10.96.0.98") + service("b", ip="10.96.0.99"))
    assert named(folder.refresh()) == (["a"], []) and folder.problems() == []


@pytest.mark.parametrize("broken", ["\n---\na: [b\n", "\n---\nkind: Service\n", "\n---\n- a list\n"])
def test_a_document_that_could_be_anything_keeps_what_is_missing_from_its_file(folder: Folder, tmp_path: Path, broken: str) -> None:
    (tmp_path / "a.yaml").write_text(broken + service("b", ip="10.96.0.99"))
    assert named(folder.refresh()) == (["b"], [])
    (tmp_path / "a.yaml").write_text(service("b", ip="10.96.0.99"))
    assert named(folder.refresh())[1] == ["a"]


def test_a_file_that_cannot_be_read_keeps_its_objects(folder: Folder, tmp_path: Path) -> None:
    for content, said in ((b"\xff\xfe\x00", "is not UTF-8 text"), (b"#" * (FILE_BOUND + 1), "is larger than 8 MiB")):
        (tmp_path / "a.yaml").write_bytes(content)
        assert not folder.refresh()
        assert [one.message for one in folder.problems()] == [said]


def test_of_two_definitions_that_of_the_first_file_counts_until_it_goes(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text(service("a", ip="10.96.9.9"))
    assert [str(one.addresses[0]) for one in folder.refresh().puts] == ["10.96.9.9"]  # type: ignore[union-attr]
    assert [str(one) for one in folder.problems()] == [
        f"{tmp_path}/a.yaml:5: Service default/a: is already defined in {tmp_path}/0.yaml:5, whose version is in force; remove one of them"
    ]
    (tmp_path / "0.yaml").unlink()
    assert [str(one.addresses[0]) for one in folder.refresh().puts] == ["10.96.0.10"]  # type: ignore[union-attr]
    assert folder.problems() == []


def test_of_two_paths_that_hold_an_object_the_one_given_first_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.yaml").write_text(service("x", ip=f"10.96.0.{ord(name)}"))
    folder = Folder([tmp_path / "b", tmp_path / "a" / "x.yaml"])
    assert [str(one.addresses[0]) for one in folder.refresh().puts] == ["10.96.0.98"]  # type: ignore[union-attr]
    assert [problem.place.file for problem in folder.problems()] == [f"{tmp_path}/a/x.yaml"]


def test_the_same_object_twice_in_one_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a") + service("a"))
    folder = Folder([tmp_path])
    folder.refresh()
    assert [str(one) for one in folder.problems()] == [
        f"{tmp_path}/a.yaml:9: Service default/a: is already defined in line 5; remove one of them"
    ]


def test_one_file_can_be_named_and_one_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.manifest").write_text(service("a"))
    folder = Folder([tmp_path / "one.manifest", tmp_path / "gone.yaml"])
    assert named(folder.refresh()) == (["a"], [])
    assert [str(one) for one in folder.problems()] == [f"{tmp_path}/gone.yaml: is not there; look at --config"]


# -- watching -------------------------------------------------------------------------------------------------------


async def within(watch: Watch) -> set[Path] | None:
    async with asyncio.timeout(5):
        return await watch.changes()


async def test_a_file_that_is_written_renamed_into_place_or_removed_is_seen(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    watch = Watch([tmp_path])
    try:
        (tmp_path / "a.yaml").write_text("a: 1")
        assert await within(watch) == {tmp_path / "a.yaml"}
        (tmp_path / ".a.tmp").write_text("a: 2")
        (tmp_path / ".a.tmp").rename(tmp_path / "sub" / "a.yaml")
        assert await within(watch) == {tmp_path / "sub" / "a.yaml"}
        (tmp_path / "a.yaml").unlink()
        assert await within(watch) == {tmp_path / "a.yaml"}
    finally:
        watch.close()


async def test_the_swap_of_a_mounted_configmap_and_a_new_folder_mean_everything(tmp_path: Path) -> None:
    for version in ("..1", "..2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.yaml").write_text(
            virtual_service(f"vs{version[2:]}", "hosts: [a]\nhttp: [{route: [{destination: {host: a}}]}]")
        )
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    folder, watch = Folder([tmp_path]), Watch([tmp_path])
    try:
        assert named(folder.refresh()) == (["vs1"], [])
        (tmp_path / "..tmp").symlink_to("..2")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
        assert await within(watch) is None
        assert named(folder.refresh()) == (["vs2"], ["vs1"])
        (tmp_path / "new").mkdir()
        assert await within(watch) is None
        (tmp_path / "new" / "b.yaml").write_text(service("b"))
        assert await within(watch) == {tmp_path / "new" / "b.yaml"}
    finally:
        watch.close()


async def test_of_a_named_file_only_that_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    watch = Watch([tmp_path / "a.yaml"])
    try:
        (tmp_path / "b.yaml").write_text("b: 1")
        (tmp_path / "a.yaml").write_text("a: 2")
        assert await within(watch) == {tmp_path / "a.yaml"}
    finally:
        watch.close()


async def test_many_writes_are_one_change(tmp_path: Path) -> None:
    watch = Watch([tmp_path])
    try:
        for number in range(200):
            (tmp_path / f"{number}.yaml").write_text("a: 1")
        assert len(await within(watch) or ()) == 200
    finally:
        watch.close()
