"""Whatever is done to a release folder, verification says so, and says all of it."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from release_folder import FILES, forged, make_release, passing

from registry import VerificationError, verify
from registry.__main__ import REFUSED, main
from registry.signing import SigningKey, load_or_create_key
from registry.verdict import Verdict


def problems_of(folder: Path, key: SigningKey) -> dict[str, str]:
    with pytest.raises(VerificationError) as caught:
        verify(folder, [key.public])
    return {problem.what: problem.why for problem in caught.value.problems}


def test_a_release_as_it_was_sealed_passes(release: Path, signing_key: SigningKey) -> None:
    report = verify(release, [signing_key.public])
    assert report.manifest.name == "demo-awq"
    assert report.keyid == signing_key.public.keyid
    assert report.files == len(FILES)
    assert report.bytes == sum(map(len, FILES.values()))


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_byte_changed_in_any_file_is_named(release: Path, signing_key: SigningKey, name: str) -> None:
    data = bytearray((release / name).read_bytes())
    data[random.Random(name).randrange(len(data))] ^= 1
    (release / name).write_bytes(data)
    found = problems_of(release, signing_key)
    assert found.keys() == {name}
    assert "sha256" in found[name]


def test_all_that_is_wrong_is_named_at_once(release: Path, signing_key: SigningKey) -> None:
    (release / "config.json").write_bytes(b"{}")
    (release / "tokenizer.json").unlink()
    (release / "extra.bin").write_bytes(b"x")
    (release / "sub").mkdir()
    (release / "sub" / "deep").write_bytes(b"x")
    found = problems_of(release, signing_key)
    assert {name: why.partition(":")[0] for name, why in found.items()} == {
        "config.json": "changed",
        "tokenizer.json": "missing",
        "extra.bin": "extra",
        "sub/deep": "extra",
    }


@pytest.mark.parametrize("byte", range(0, 2000, 97))
def test_a_byte_changed_in_the_manifest_is_named(release: Path, signing_key: SigningKey, byte: int) -> None:
    path = release / "release/manifest.json"
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    assert "altered" in problems_of(release, signing_key)["release/signature.json"]


def test_a_verdict_edited_to_pass_is_refused(tmp_path: Path, signing_key: SigningKey) -> None:
    failed = Verdict(gate="drift", status="fail", reason="lost 3 points")
    make_release(tmp_path, signing_key, verdicts=[failed, passing("scan"), passing("load")])
    assert problems_of(tmp_path, signing_key) == {"gate drift": "fail: lost 3 points"}
    path = tmp_path / "release/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"fail"', b'"pass"'))
    assert problems_of(tmp_path, signing_key).keys() == {"release/signature.json"}


def test_gates_that_are_absent_or_inconclusive_block(tmp_path: Path, signing_key: SigningKey) -> None:
    unsure = Verdict(gate="scan", status="inconclusive", reason="no database", cause="database-absent")
    make_release(tmp_path / "a", signing_key, verdicts=[unsure, passing("load")])
    assert problems_of(tmp_path / "a", signing_key) == {
        "gate drift": "the release has no verdict of it",
        "gate scan": "inconclusive: no database",
    }
    let_through = unsure.accepting({"database-absent": "none can be had here"})
    make_release(tmp_path / "b", signing_key, verdicts=[let_through, passing("drift"), passing("load")])
    verify(tmp_path / "b", [signing_key.public])


def test_a_release_by_another_key_is_refused(release: Path, tmp_path: Path) -> None:
    other = load_or_create_key(tmp_path / "other.pem")
    assert "not trusted" in problems_of(release, other)["release/signature.json"]


def _swap_signature(folder: Path, key: SigningKey) -> None:
    (folder / "release/signature.json").write_bytes(key.sign(b"{}").to_bytes())


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder, _: (folder / "release/manifest.json").unlink(), "release/manifest.json"),
        (lambda folder, _: (folder / "release/signature.json").unlink(), "release/signature.json"),
        (lambda folder, _: (folder / "release/signature.json").write_bytes(b"{}"), "release/signature.json"),
        (_swap_signature, "release/signature.json"),
        (lambda folder, key: forged(folder, key, {"surprise": 1}), "release/manifest.json"),
        (lambda folder, key: forged(folder, key, {"created": "2026-99-99T00:00:00Z"}), "release/manifest.json"),
        (
            lambda folder, key: forged(folder, key, {"files": {"../x": {"sha256": "0" * 64, "size": 1}}}),
            "release/manifest.json",
        ),
    ],
)
def test_a_release_whose_documents_are_spoiled_is_refused(
    release: Path, signing_key: SigningKey, spoil: Callable[[Path, SigningKey], object], named: str
) -> None:
    spoil(release, signing_key)
    assert named in problems_of(release, signing_key)


def test_links_and_pipes_are_refused_and_not_followed(release: Path, signing_key: SigningKey, tmp_path: Path) -> None:
    original = tmp_path / "elsewhere"
    original.write_bytes((release / "config.json").read_bytes())
    (release / "config.json").unlink()
    (release / "config.json").symlink_to(original)
    (release / "loop").symlink_to(release, target_is_directory=True)
    os.mkfifo(release / "pipe")
    found = problems_of(release, signing_key)
    assert "symlink" in found["config.json"]
    assert "symlink" in found["loop"]
    assert found["pipe"] == "not a plain file"


def test_a_linked_release_folder_inside_is_refused(release: Path, signing_key: SigningKey, tmp_path: Path) -> None:
    (release / "release").rename(tmp_path / "moved")
    (release / "release").symlink_to(tmp_path / "moved")
    assert "symlink" in problems_of(release, signing_key)["release"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda _: None, "there is no such folder"),
        (lambda path: path.mkdir(), "this folder is none: it has no release/manifest.json"),
        (lambda path: path.write_text("x"), "there is no such folder"),
    ],
)
def test_a_folder_that_is_none_or_empty(
    tmp_path: Path, signing_key: SigningKey, make: Callable[[Path], None], why: str
) -> None:
    make(tmp_path / "x")
    assert problems_of(tmp_path / "x", signing_key) == {"release": why}


def test_the_message_stays_short_and_the_list_stays_whole(release: Path, signing_key: SigningKey) -> None:
    for number in range(50):
        (release / f"extra-{number:02}").write_bytes(b"")
    with pytest.raises(VerificationError, match="and 47 more") as caught:
        verify(release, [signing_key.public])
    assert len(caught.value.problems) == 50


def test_a_folder_that_cannot_be_walked_is_no_release_and_no_crash(
    release: Path, signing_key: SigningKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key.pub").write_bytes(signing_key.public.pem())
    arguments = ["verify", str(release), "--key", str(tmp_path / "key.pub")]
    (release / os.fsdecode(b"caf\xe9")).write_bytes(b"")
    assert main(arguments) == REFUSED
    with pytest.raises(VerificationError, match="its name is not UTF-8"):
        verify(release, [signing_key.public])
    (release / os.fsdecode(b"caf\xe9")).unlink()
    (release / "locked").mkdir()
    scan = os.scandir

    def scandir(path: Path) -> object:  # root reads everything
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        assert main(arguments) == REFUSED
        with pytest.raises(VerificationError, match="locked: can't be read: Permission denied"):
            verify(release, [signing_key.public])
    place = os.open(release, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=place)
        deeper = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = deeper
    os.close(place)
    assert main(arguments) == REFUSED
    with pytest.raises(VerificationError, match="more than 100 folders deep"):
        verify(release, [signing_key.public])
    subprocess.run(["rm", "-rf", release / "d"], check=True)  # pytest's own way of removing it recurses
