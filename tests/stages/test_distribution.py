"""A real registry, spoken to directly: what is sent, what is not, and what is attached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers.errors import ImageError
from containers.image import base as bases
from containers.image import referrers
from containers.image.blobs import BlobStore
from containers.image.build import model_layers, push_layers
from containers.image.distribution import DistributionError, Registry, parse
from containers.image.oci import INDEX, MANIFEST, OciImage
from registry.digests import digest_of
from stages.loopback_registry import serving


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A registry on loopback."""
    with serving(tmp_path / "registry") as served:
        yield served


def checkpoint(folder: Path, *shards: bytes, tokenizer: str = "{}") -> tuple[Path, dict[str, str]]:
    folder.mkdir()
    for number, data in enumerate(shards):
        (folder / f"model-{number}.safetensors").write_bytes(data * 100_000)
    (folder / "tokenizer.json").write_text(tokenizer)
    known = {path.name: digest_of(path.read_bytes()).removeprefix("sha256:") for path in folder.iterdir()}
    return folder, known


def pushed(
    address: str, store: BlobStore, name: str, folder: Path, known: dict[str, str]
) -> tuple[OciImage, tuple[int, int, int]]:
    with Registry(address) as registry:
        blobs = push_layers(registry, name, (), model_layers(folder, known), store)
        image = OciImage({"Labels": {}}, tuple(blobs), tuple("model" for _ in blobs), {})
        registry.put_blob(name, image.config)
        registry.put_manifest(name, "1", image.manifest)
        traffic = registry.traffic
    return image, (traffic.sent, traffic.skipped, traffic.mounted)


def test_a_scheme_that_changes_one_shard_moves_that_shard_only(address: str, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "images")
    first, _ = pushed(address, store, "demo-awq", *checkpoint(tmp_path / "one", b"a", b"b", b"c"))
    second, (sent, skipped, mounted) = pushed(
        address, store, "demo-gptq", *checkpoint(tmp_path / "two", b"a", b"x", b"c")
    )
    assert [left.digest == right.digest for left, right in zip(first.layers, second.layers, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert 100_000 < sent < 110_000
    assert mounted == sum(layer.size for layer in second.layers) - second.layers[1].size
    _, (sent, skipped, mounted) = pushed(address, store, "demo-gptq", *checkpoint(tmp_path / "again", b"a", b"x", b"c"))
    assert (sent < 5000, skipped > 300_000, mounted) == (True, True, 0)


def test_a_changed_tokenizer_moves_kilobytes(address: str, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "images")
    pushed(address, store, "demo", *checkpoint(tmp_path / "one", b"a", b"b"))
    _, (sent, _, _) = pushed(address, store, "demo", *checkpoint(tmp_path / "two", b"a", b"b", tokenizer='{"new": 1}'))
    assert sent < 10_000


def test_what_is_not_known_by_digest_arrives_whole(address: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "one", b"a")
    image, _ = pushed(address, BlobStore(tmp_path / "images"), "demo", folder, {})
    with Registry(address) as registry:
        for layer in image.layers:
            assert digest_of(b"".join(registry.blob("demo", layer.digest, layer.size))) == layer.digest


def test_a_base_comes_by_digest_blob_by_blob_and_is_not_fetched_twice(address: str, tmp_path: Path) -> None:
    image, _ = pushed(address, BlobStore(tmp_path / "a"), "library/base", *checkpoint(tmp_path / "one", b"a"))
    reference = f"{address}/library/base:1@{image.digest}"
    store, said = BlobStore(tmp_path / "b"), list[str]()
    base = bases._fetched(reference, store, said.append)
    assert (base.digest, [layer.diff_id for layer in base.layers]) == (image.digest, image.diff_ids)
    assert all(store.has(layer.digest, layer.size) for layer in base.layers)
    assert bases._fetched(reference, store, said.append) == base or len(said) == 1
    with pytest.raises(ImageError, match="is not in its registry"):
        bases._fetched(f"{address}/library/base:1@sha256:{'0' * 64}", store, said.append)


KIND = "application/vnd.cyclonedx+json"


def test_documents_are_attached_once_and_found_by_the_image(address: str, tmp_path: Path) -> None:
    image, _ = pushed(address, BlobStore(tmp_path / "images"), "demo", *checkpoint(tmp_path / "one", b"a"))
    with Registry(address) as registry:
        subject = referrers.subject_of(registry, "demo", image.digest)

        def attach(data: bytes) -> referrers.Attached:
            return referrers.attach(registry, "demo", subject, KIND, data, title="a.json", annotations={"of": "demo"})

        first, *others = (attach(data) for data in (b"{}", b'{"other": 1}', b"[]", b"[1]"))
        assert all(each.is_new for each in (first, *others))
        sent = registry.traffic.sent
        assert attach(b"{}") == referrers.Attached(first.digest, is_new=False)
        assert registry.traffic.sent == sent
        found = referrers.referrers(registry, "demo", image.digest)
        assert [each.digest for each in found] == [each.digest for each in (first, *others)]  # the newest last
        assert {(each.kind, each.annotations["of"]) for each in found} == {(KIND, "demo")}
        assert [referrers.document(registry, "demo", each) for each in found] == [b"{}", b'{"other": 1}', b"[]", b"[1]"]


def test_what_others_attached_stays_as_it_was(address: str, tmp_path: Path) -> None:
    image, _ = pushed(address, BlobStore(tmp_path / "images"), "demo", *checkpoint(tmp_path / "one", b"a"))
    theirs = {"artifactType": "theirs", "annotations": {"a": "b"}}
    entry = {"mediaType": MANIFEST, "digest": image.digest, "size": 1, **theirs}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry], "annotations": {"by": "others"}}
    tag = image.digest.replace(":", "-")
    with Registry(address) as registry:
        registry.put_manifest("demo", tag, json.dumps(index).encode(), INDEX)
        subject = referrers.subject_of(registry, "demo", image.digest)
        ours = referrers.attach(registry, "demo", subject, KIND, b"{}", title="a.json")
        found = registry.manifest("demo", tag)
    assert found is not None
    document = json.loads(found[0])
    assert entry in document["manifests"]
    assert {each["digest"] for each in document["manifests"]} == {image.digest, ours.digest}
    assert document["annotations"] == {"by": "others"}


def test_a_list_that_another_client_overwrote_is_completed_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = pushed(address, BlobStore(tmp_path / "images"), "demo", *checkpoint(tmp_path / "one", b"a"))
    theirs = {"mediaType": MANIFEST, "digest": image.digest, "size": 1, "artifactType": "theirs"}
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [theirs]}).encode()
    put, overwritten = Registry.put_manifest, list[str]()

    def race(self: Registry, repository: str, name: str, data: bytes, media_type: str = MANIFEST) -> str:
        digest = put(self, repository, name, data, media_type)
        if not overwritten:
            overwritten.append(put(self, repository, name, index, INDEX))
        return digest

    monkeypatch.setattr(Registry, "put_manifest", race)
    with Registry(address) as registry:
        subject = referrers.subject_of(registry, "demo", image.digest)
        ours = referrers.attach(registry, "demo", subject, KIND, b"{}", title="a.json")
        found = {each.digest for each in referrers.referrers(registry, "demo", image.digest)}
    assert (len(overwritten), found) == (1, {image.digest, ours.digest})


def test_nothing_is_attached_to_an_image_that_its_registry_has_not(address: str) -> None:
    absent = f"sha256:{'0' * 64}"
    with Registry(address) as registry, pytest.raises(DistributionError, match=f"has no image demo@{absent}"):
        referrers.subject_of(registry, "demo", absent)


def test_a_registry_that_is_not_there_is_named() -> None:
    with (
        Registry("127.0.0.1:9") as registry,
        pytest.raises(DistributionError, match=r"127\.0\.0\.1:9 can't be reached"),
    ):
        registry.has("x", "sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("debian", ("docker.io", "library/debian", "")),
        ("nvidia/cuda:13", ("docker.io", "nvidia/cuda", "13")),
        ("nvidia/cuda:13@sha256:ab", ("docker.io", "nvidia/cuda", "sha256:ab")),
        ("127.0.0.1:5000/slipway/demo-awq:x", ("127.0.0.1:5000", "slipway/demo-awq", "x")),
        ("localhost/a", ("localhost", "a", "")),
    ],
)
def test_references_are_read_as_docker_reads_them(reference: str, parts: tuple[str, str, str]) -> None:
    assert parse(reference) == parts
