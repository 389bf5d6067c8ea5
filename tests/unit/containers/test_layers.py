"""Layers: the same members are the same bytes, and a tar is one that any engine reads."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers.errors import ImageError
from containers.image.blobs import BlobStore
from containers.image.layers import EPOCH, FileLayer, Member, archive, normalized, normalized_file, plain_files
from containers.image.oci import OciImage, saved


def content(chunks: Iterator[bytes]) -> bytes:
    return b"".join(chunks)


def opened(data: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(data))


def files(folder: Path, mode: int = 0o644, time: int = 1) -> Path:
    (folder / "deep").mkdir(parents=True)
    for name in ("z", "deep/y", "a-b", "deep.txt"):
        (folder / name).write_text(name)
        (folder / name).chmod(mode)
        os.utime(folder / name, (time, time))
    return folder


def test_a_layer_is_the_same_whatever_the_folder_modes_and_times(tmp_path: Path) -> None:
    one = FileLayer(tuple(plain_files(files(tmp_path / "a", 0o600, 1), "model")), {})
    other = FileLayer(tuple(plain_files(files(tmp_path / "b" / "c", 0o644, 2_000_000_000), "model")), {})
    assert content(one.chunks()) == content(other.chunks())
    with opened(content(one.chunks())) as tar:
        assert tar.getnames() == ["model", "model/deep", "model/a-b", "model/deep/y", "model/deep.txt", "model/z"]
        assert {
            (member.mode, member.uid, member.gid, member.uname, member.mtime) for member in tar if member.isreg()
        } == {(0o644, 0, 0, "", EPOCH)}


def test_a_layer_knows_its_length_and_streams_in_small_pieces(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(3_000_001))
    layer = archive([Member("model/" + "x" * 150, tmp_path / "weights"), Member("a", b"text", 0o755)])
    pieces = list(layer.chunks())
    assert sum(map(len, pieces)) == layer.size
    assert max(map(len, pieces)) <= 1 << 20


def test_a_file_beyond_eight_gigabytes_has_a_header(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(9 << 30)
    layer = archive([Member("model/large", tmp_path / "large")])
    start = b"".join(piece for piece, _ in zip(layer.chunks(), range(4), strict=False))
    with tarfile.open(fileobj=io.BytesIO(start), mode="r|") as tar:
        assert [member.size for member in (tar.next(), tar.next()) if member] == [0, 9 << 30]
    assert layer.size > 9 << 30


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 << 20))
    chunks = archive([Member("model/weights", path)]).chunks()
    assert [len(next(chunks)) for _ in range(3)] == [512, 512, 1 << 20]
    os.truncate(path, 100)
    with pytest.raises(ImageError, match="changed while it was read"):
        content(chunks)


def test_a_layers_key_follows_its_members_and_nothing_else(tmp_path: Path) -> None:
    def key(folder: Path, mode: int = 0o644, digest: str = "d") -> str | None:
        folder.mkdir(exist_ok=True)
        (folder / "w").write_bytes(b"12")
        return FileLayer((Member("model/w", folder / "w", mode),), {folder / "w": digest}).key

    assert key(tmp_path / "a") == key(tmp_path / "b")
    assert len({key(tmp_path / "a"), key(tmp_path / "a", 0o755), key(tmp_path / "a", digest="e")}) == 3
    assert FileLayer((Member("model/w", tmp_path / "a" / "w"),), {}).key is None


def given(members: list[tarfile.TarInfo]) -> list[bytes]:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return [sink.getvalue()[start : start + 700] for start in range(0, len(sink.getvalue()), 700)]


def info(name: str, **changes: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mtime, member.uid, member.uname, member.mode = 1700000000, 1000, "someone", 0o644
    for key, value in changes.items():
        setattr(member, key, value)
    return member


def test_what_an_engine_gives_is_freed_of_times_owners_and_names() -> None:
    engine = given(
        [
            info("venv", type=tarfile.DIRTYPE, mode=0o755),
            info("venv/a", size=5, pax_headers={"mtime": "1700000000.5", "SCHILY.xattr.security.capability": "cap"}),
            info("venv/b", type=tarfile.SYMTYPE, linkname="a"),
            info("venv/c", type=tarfile.LNKTYPE, linkname="venv/a"),
            info("venv/d/e", size=3),
        ]
    )
    with opened(content(normalized(engine, inside="opt", skip=["opt/venv/d"]))) as tar:
        found = {member.name: member for member in tar}
    assert list(found) == ["opt", "opt/venv", "opt/venv/a", "opt/venv/b", "opt/venv/c"]
    assert {(member.mtime, member.uid, member.uname) for member in found.values()} == {(EPOCH, 0, "")}
    assert found["opt/venv/a"].pax_headers == {"SCHILY.xattr.security.capability": "cap"}
    assert (found["opt/venv/b"].linkname, found["opt/venv/c"].linkname) == ("a", "opt/venv/a")


def test_an_engine_that_gives_paths_in_another_order_is_refused() -> None:
    with pytest.raises(ImageError, match="sent `opt/venv/a` after `opt/venv/b`"):
        content(normalized(given([info("venv/b"), info("venv/a")]), inside="opt"))


def test_a_layer_takes_away_and_keeps_what_it_was_asked_to() -> None:
    engine = given([info("etc", type=tarfile.DIRTYPE), info("etc/new", gid=42), info("etc/old")])
    changed = normalized(engine, inside="", only={"etc/new"}, removed=["etc/gone", "var/cache/x"],
                         skip=["var/cache"], keep_owners=True)  # fmt: skip
    with opened(content(changed)) as tar:
        assert [(member.name, member.gid) for member in tar] == [("etc/.wh.gone", 0), ("etc/new", 42)]


def test_a_tar_on_disk_is_put_in_order_and_hard_links_follow_their_file(tmp_path: Path) -> None:
    path = tmp_path / "base.tar"
    path.write_bytes(
        b"".join(given([info("./z", size=4), info("./a", type=tarfile.LNKTYPE, linkname="./z"), info("./b", gid=42)]))
    )
    with opened(content(normalized_file(path))) as tar:
        assert [(member.name, member.type, member.linkname) for member in tar] == [
            ("a", tarfile.REGTYPE, ""), ("b", tarfile.REGTYPE, ""), ("z", tarfile.LNKTYPE, "a")
        ]  # fmt: skip
        assert tar.getmember("b").gid == 42
        file = tar.extractfile("z")
        assert file is not None
        assert file.read() == b"xxxx"


def test_a_blob_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(ImageError, match="expected the blob"):
        store.add([b"one"], expected="sha256:" + "0" * 64)
    assert list((tmp_path / "blobs" / "sha256").iterdir()) == []
    blob = store.plain([b"one", b"two"])
    assert blob.digest == f"sha256:{hashlib.sha256(b'onetwo').hexdigest()}"
    assert (store.has(blob.digest, 6), store.has(blob.digest, 7)) == (True, False)
    assert content(blob.chunks()) == b"onetwo"


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "md5:" + "0" * 32, "sha256:" + "0" * 63])
def test_a_blob_is_named_by_a_digest_alone(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ImageError, match="not a sha256 digest"):
        BlobStore(tmp_path).path(digest)


def test_a_known_layer_is_not_read_again(tmp_path: Path) -> None:
    store, path = BlobStore(tmp_path / "images"), tmp_path / "w"
    path.write_bytes(b"weights")
    layer = FileLayer((Member("model/w", path),), {path: hashlib.sha256(b"weights").hexdigest()})
    assert store.known(layer) is None
    digest = store.hashed(layer).digest
    assert digest == f"sha256:{hashlib.sha256(content(layer.chunks())).hexdigest()}"
    path.write_bytes(b"another")  # as long, and said to be the same
    again = store.known(layer)
    assert again is not None
    assert again.digest == digest


def test_a_file_that_is_not_the_one_recorded_is_refused_by_name_and_nothing_is_learnt(tmp_path: Path) -> None:
    store, path = BlobStore(tmp_path / "images"), tmp_path / "w.safetensors"
    path.write_bytes(b"weightS")
    layer = FileLayer((Member("model/w", path),), {path: hashlib.sha256(b"weights").hexdigest()})
    with pytest.raises(ImageError, match=r"w\.safetensors is damaged: its sha256 is"):
        store.hashed(layer)
    assert store.known(layer) is None
    path.write_bytes(b"weights")
    assert store.hashed(layer) == store.known(layer)


def test_a_path_that_stands_twice_in_a_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "base.tar"
    path.write_bytes(
        b"".join(given([info("./etc", type=tarfile.DIRTYPE), info("etc", type=tarfile.DIRTYPE), info("a")]))
    )
    content(normalized_file(path))
    path.write_bytes(b"".join(given([info("./a", size=1), info("a", size=2)])))
    with pytest.raises(ImageError, match=r"`a` occurs twice in base\.tar"):
        content(normalized_file(path))


def image(tmp_path: Path) -> OciImage:
    store = BlobStore(tmp_path / "images")
    layers = (store.plain(archive([Member("a", b"1")]).chunks()), store.plain(archive([Member("b", b"2")]).chunks()))
    return OciImage({"Env": ["A=b"], "Labels": {"x": "y"}}, layers, ("base", "model"), {"title": "t"})


def test_what_the_engine_is_sent_leaves_out_what_it_has(tmp_path: Path) -> None:
    whole, thin = image(tmp_path), image(tmp_path)
    with opened(content(saved(whole, "x:1"))) as tar:
        names = tar.getnames()
    assert {
        "manifest.json",
        "index.json",
        "oci-layout",
        *(f"blobs/sha256/{layer.digest[7:]}" for layer in whole.layers),
    } <= {*names}
    with opened(content(saved(thin, "x:1", 1))) as tar:
        assert set(names) - set(tar.getnames()) == {f"blobs/sha256/{whole.layers[0].digest[7:]}"}


def test_the_same_image_has_the_same_digest_and_another_label_another(tmp_path: Path) -> None:
    one = image(tmp_path / "a")
    assert one.digest == image(tmp_path / "b").digest
    relabelled = OciImage({**one.settings, "Labels": {"x": "z"}}, one.layers, one.comments, one.annotations)
    assert relabelled.digest != one.digest
    assert relabelled.config_digest != one.config_digest
