"""Where the key lives: the first start, who may read it, what may be plugged in, and what happens when the files change."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from controlplane.ca.authority import Authority, OwnCertificate
from controlplane.ca.material import MaterialError, fingerprint, parse
from controlplane.ca.store import Files, Folder, StoreError
from tests.support.authority import Pair, authority, openssl, rsa_key

NOW = datetime.now(UTC)


def modes(folder: Path) -> dict[str, int]:
    return {str(one.relative_to(folder)): stat.S_IMODE(one.lstat().st_mode) for one in folder.rglob("*") if not one.is_symlink()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "ca")
    made.open("cluster.local", NOW)
    return made


def test_the_first_start_makes_a_root_that_is_its_owners_alone_and_the_second_keeps_it(tmp_path: Path) -> None:
    before = os.umask(0)  # the modes are ours, not the shell's
    try:
        folder = Folder(tmp_path / "ca")
        assert folder.open("cluster.local", NOW)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert modes(folder.path) == {"lock": 0o600, "v1": 0o700, "v1/ca-key.pem": 0o600, "v1/ca-cert.pem": 0o600, "v1/root-cert.pem": 0o600}
    root = fingerprint(folder.read(NOW).certificate)
    again = Folder(tmp_path / "ca")
    assert not again.open("cluster.local", NOW) and fingerprint(again.read(NOW).certificate) == root
    assert "O = cluster.local, CN = Narrows root" in openssl("x509", "-noout", "-subject", "-in", folder.path / "current" / "ca-cert.pem")


def test_of_many_that_start_first_one_makes_the_root(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from datetime import datetime, UTC; from controlplane.ca.store import Folder\n"
            "sys.stdin.read(1); print(Folder(Path(sys.argv[1])).open('cluster.local', datetime.now(UTC)))")
    racing = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ca")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
              for _ in range(6)]
    for one in racing:
        assert one.stdin is not None
        one.stdin.write("x")
        one.stdin.flush()
    said = [one.communicate(timeout=30)[0].strip() for one in racing]
    assert sorted(said) == ["False"] * 5 + ["True"]
    assert [one for one in os.listdir(tmp_path / "ca") if one.startswith("v")] == ["v1"]


def test_whoever_died_while_making_the_root_leaves_nothing_that_is_in_the_way(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "ca")
    folder.path.mkdir(mode=0o700)
    (folder.path / ".making").mkdir()
    (folder.path / ".making" / "ca-key.pem").write_text("half")
    (folder.path / ".making-link").symlink_to("v9")
    assert folder.open("cluster.local", NOW)
    key = fingerprint(folder.read(NOW).certificate)
    (folder.path / "current").unlink()  # died between the two renames
    assert not folder.open("cluster.local", NOW) and fingerprint(folder.read(NOW).certificate) == key


def damage_mode(path: Path, mode: int) -> Any:
    return lambda top: (top / path).chmod(mode)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_mode(Path("."), 0o750), "may be entered by others (mode 0750); chmod 0700"),
        (damage_mode(Path("v1"), 0o701), "may be entered by others (mode 0701); chmod 0700"),
        (damage_mode(Path("v1/ca-key.pem"), 0o644), "ca-key.pem is open to others (mode 0644); chmod 0600"),
        (damage_mode(Path("v1/ca-key.pem"), 0o620), "ca-key.pem is open to others (mode 0620); chmod 0600"),
        (lambda top: os.chown(top / "v1/ca-key.pem", 12345, 0), "ca-key.pem is owned by uid 12345, and this process runs as uid 0"),
        (lambda top: os.chown(top, 12345, 0), "is owned by uid 12345"),
        (lambda top: (top / "v1/ca-key.pem").unlink(), "has no ca-key.pem; put it back from a copy"),
        (lambda top: os.rename(top / "v1/ca-key.pem", top / "v1/k") or (top / "v1/ca-key.pem").symlink_to("k"), "is a link; put the file"),
        (lambda top: (top / "v1/ca-key.pem").write_text("-----BEGIN PRIVATE KEY-----\n"), "the authority's key cannot be read"),
        (lambda top: (top / "v1/ca-key.pem").write_bytes(authority("x").key_pem), "the key is not that of the authority's certificate"),
        (lambda top: (top / "v1/root-cert.pem").write_bytes(b""), "the root bundle cannot be read"),
        (lambda top: (top / "v1/root-cert.pem").write_bytes(b"x" * (1 << 20) + b"x"), "has more than 1048576 bytes"),
        (lambda top: (top / "current").unlink() or (top / "current").symlink_to("/etc"), "a set beside it (v1, v2, ...) is expected"),
        (lambda top: (top / "current").unlink() or (top / "current").mkdir(), "is no link to a set"),
        (lambda top: (top / "current").unlink() or (top / "v2").mkdir(), "has v1, v2 and no link that says which is in force"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
def test_a_folder_that_is_not_in_order_is_refused_with_what_to_do(folder: Folder, damage: Any, said: str) -> None:
    damage(folder.path)
    with pytest.raises((StoreError, MaterialError), match=re.escape(said)):
        folder.open("cluster.local", NOW)
        folder.read(NOW)


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for path, said in (("gone/ca", "gone is no folder; make it"), ("file", "file is no folder; remove it"), ("link", "link is no folder")):
        with pytest.raises(StoreError, match=said):
            Folder(tmp_path / path).open("cluster.local", NOW)


# -- plugged-in files -----------------------------------------------------------------------------------------------


def test_what_is_plugged_in_is_checked_as_a_whole() -> None:
    root, other = authority("root"), authority("other")
    narrow, wide = authority("narrow", pathlen=0), authority("wide", pathlen=1)
    between = authority("between", root)
    lower = authority("lower", between)
    ended = authority("ended", begins=timedelta(days=-9), lasts=timedelta(days=8))
    table: list[tuple[Pair, list[Pair], list[Pair], str]] = [
        (between, [], [root], ""),
        (between, [between, root], [root], ""),
        (lower, [between], [root], ""),
        (lower, [lower, between], [other, root], ""),
        (root, [], [root], ""),
        (authority("in", wide), [], [wide], ""),
        (lower, [], [root], "add it"),
        (between, [], [other], "is signed by CN=root, and neither the chain nor the root bundle holds that certificate"),
        (between, [], [between], "is not self-signed; intermediates belong into the chain"),
        (authority("leaf", root, ca=False), [], [root], "basicConstraints has no CA:true"),
        (authority("mute", root, signs=False), [], [root], "keyUsage has no keyCertSign"),
        (authority("in", narrow), [], [narrow], "allows 0 authorities below it (pathlen), and 1 are there"),
        (authority("in", authority("mid", wide)), [], [wide], "add it"),
        (authority("late", root, begins=timedelta(hours=1)), [], [root], "look at this machine's clock"),
        (ended, [], [ended], "expired at"),
        (authority("under", ended), [], [ended], "expired at"),
        (authority("root"), [], [root], "signed by CN=root, and neither"),  # the same name, another key
    ]
    for own, chain, roots, said in table:
        pem = own.key_pem, own.pem, b"".join(one.pem for one in chain), b"".join(one.pem for one in roots)
        if said:
            with pytest.raises(MaterialError, match=re.escape(said)):
                parse(*pem, NOW)
        else:
            made = parse(*pem, NOW)
            assert made.certificate == own.certificate and made.roots[0] in [one.certificate for one in roots]
    mid = authority("mid", wide)
    deep = authority("deep", mid)
    with pytest.raises(MaterialError, match="allows 1 authorities below it"):
        parse(deep.key_pem, deep.pem, mid.pem, wide.pem, NOW)


def test_keys_that_peers_would_not_take_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for key, said in ((rsa_key(1024), "RSA of 1024 bits"), (ec.generate_private_key(ec.SECP521R1()), "P-256, P-384 or RSA is expected")):
        one = authority("root", key=key)
        with pytest.raises(MaterialError, match=said):
            parse(one.key_pem, one.pem, b"", one.pem, NOW)
    root = authority("root")
    from tests.support.authority import private_pem

    with pytest.raises(MaterialError, match="of a kind that peers would not take"):
        parse(private_pem(ed25519.Ed25519PrivateKey.generate()), root.pem, b"", root.pem, NOW)


def plugged(folder: Path, own: Pair, root: Pair) -> Files:
    files = Files(folder / "key", folder / "cert", None, folder / "root")
    files.key.write_bytes(own.key_pem)
    files.key.chmod(0o640)
    files.certificate.write_bytes(own.pem)
    files.roots.write_bytes(root.pem)
    return files


def test_a_plugged_in_key_may_be_read_by_a_group_and_nobody_else(tmp_path: Path) -> None:
    root = authority("root")
    files = plugged(tmp_path, authority("between", root), root)
    assert len(files.read(NOW).intermediates) == 1
    files.key.rename(tmp_path / "..data")
    files.key.symlink_to("..data")  # as Kubernetes mounts a secret
    assert files.read(NOW).roots == (root.certificate,)
    (tmp_path / "..data").chmod(0o644)
    with pytest.raises(StoreError, match=r"open to others \(mode 0644\); chmod 0640"):
        files.read(NOW)


def test_changed_files_come_into_force_whole_and_unusable_ones_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = authority("root")
    first, second = authority("first", root), authority("second", root)
    files = plugged(tmp_path, first, root)
    one = Authority(files)
    assert not one.refresh() and one.problem == ""
    files.certificate.write_bytes(second.pem)  # the key comes a moment later
    assert not one.refresh() and "the key is not that of" in one.problem and one.material.certificate == first.certificate
    assert [line.message for line in caplog.records if line.levelname == "ERROR"] == [
        "the files of the certificate authority cannot be used; what was in force before stays"
    ]
    assert not one.refresh() and len([line for line in caplog.records if line.levelname == "ERROR"]) == 1  # said once
    files.key.write_bytes(second.key_pem)
    assert one.refresh() and one.problem == "" and one.material.certificate == second.certificate
    files.roots.unlink()
    assert not one.refresh() and "No such file" in one.problem and one.material.certificate == second.certificate
    files.roots.write_bytes(root.pem)
    assert not one.refresh() and one.problem == ""


def test_an_authority_that_ends_soon_is_warned_of_once_a_day(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now, root = [NOW], authority("root", lasts=timedelta(days=40))
    one = Authority(plugged(tmp_path, root, root), lambda: now[0])
    warned = []
    for hours in range(0, 24 * 15, 6):
        now[0] = NOW + timedelta(hours=hours)
        caplog.clear()
        one.refresh()
        if any("ends soon" in line.message for line in caplog.records):
            warned.append(hours // 24)
    assert warned == [10, 11, 12, 13, 14]


def test_our_own_certificate_is_renewed_at_half_of_its_time_and_when_the_authority_changes(tmp_path: Path) -> None:
    now = [NOW]
    root = authority("root")
    files = plugged(tmp_path, authority("first", root), root)
    one = Authority(files, lambda: now[0])
    own = OwnCertificate(one, ("control-plane", "127.0.0.1"))
    first = own.serving
    text = openssl("x509", "-noout", "-text", stdin=first.chain.decode())
    assert "DNS:control-plane, IP Address:127.0.0.1" in text and "TLS Web Client" not in text and "spiffe" not in text
    now[0] = NOW + timedelta(hours=11)
    assert not own.renew() and own.serving is first
    now[0] = NOW + timedelta(hours=12, minutes=1)
    assert own.renew() and own.serving.not_after == now[0].replace(microsecond=0) + timedelta(hours=24)
    assert own.serving.key != first.key and not own.renew()
    second = authority("second", root)
    files.key.write_bytes(second.key_pem)
    files.certificate.write_bytes(second.pem)
    assert one.refresh() and own.renew() and second.pem in own.serving.chain
