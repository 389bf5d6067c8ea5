"""What is put together and checked before the engine has a say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from containers.errors import ImageError, WheelError
from containers.image import base, build, profile, runtime, wheels
from containers.image.blobs import Blob, BlobStore
from containers.image.serving import LONGEST_CONTEXT, ServedAdapter, ServingConfiguration
from registry.digests import digest_file

BASE = base.BaseImage("sha256:" + "1" * 64, "sha256:" + "2" * 64, "a base")


def blob(folder: Path, data: bytes) -> Blob:
    return BlobStore(folder / "images").plain([data])


def checkpoint(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("name", profile.names())
def test_every_profile_renders_completely(name: str) -> None:
    loaded = profile.load(name)
    files = runtime.render(loaded)
    assert "${" not in "".join(files.values())
    assert f"{loaded.python} -m zipfile" in files["assemble.sh"]


def test_a_runtime_says_what_it_runs_with(tmp_path: Path) -> None:
    wheels, loader = blob(tmp_path, b"wheels"), blob(tmp_path, b"loader")
    put = runtime._put_together(profile.load("vllm-cuda13"), BASE, wheels, "sha256:w", (loader,))
    assert put.layers[-2:] == (wheels, loader)
    assert put.settings["Entrypoint"][1:3] == ["-m", "slipway_loader"]
    assert put.settings["User"] == "65534:65534"
    assert "NVIDIA_REQUIRE_CUDA=cuda>=13.0,driver>=580.65.06" in put.settings["Env"]
    assert put.settings["StopSignal"] == "SIGTERM"
    assert put.settings["Healthcheck"]["Test"][0] == "CMD"
    assert put.settings["Labels"]["slipway.base.digest"] == BASE.digest


def test_arguments_follow_from_the_checkpoint(tmp_path: Path) -> None:
    words = build.serving_arguments(profile.load("vllm-cpu"), checkpoint(tmp_path, max_position_embeddings=512), "demo")
    assert words[:4] == ("--model", "/model", "--served-model-name", "demo")
    assert words[words.index("--max-model-len") + 1] == "512"
    assert "--enforce-eager" in words
    assert words[words.index("--dtype") + 1] == "bfloat16"


def test_a_context_of_131072_tokens_is_capped(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, text_config={"max_position_embeddings": 131072})
    words = build.serving_arguments(profile.load("vllm-cuda13"), folder, "big")
    assert words[words.index("--max-model-len") + 1] == str(LONGEST_CONTEXT)
    # FP16 is asked in the precision in which every scheme of it computes.
    assert words[words.index("--dtype") + 1] == "float16"


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no readable config\.json"):
        build.serving_arguments(profile.load("vllm-cpu"), tmp_path, "demo")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ImageError, match=r"no \*\.safetensors"):
        build.serving_arguments(profile.load("vllm-cpu"), tmp_path, "demo")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "nested/modeling_x.py"])
def test_pickles_and_code_stay_out(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path) / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(ImageError, match=path.name):
        build._refuse_unwanted(tmp_path)


def test_apt_sources_of_the_suite_are_taken_and_no_third_partys(tmp_path: Path) -> None:
    files = {
        "debian.sources": "Types: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\nComponents: main\n",
        "old.list": "deb http://mirror/debian bullseye main\n",
        "docker.list": "deb http://mirror/linux/debian bookworm stable\n",
        "comment.list": "# deb http://mirror/debian bookworm main\n",
        "ubuntu.sources": "Types: deb\nURIs: http://mirror/ubuntu\nSuites: noble\nComponents: main\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "absent.list"]
    assert [path.name for path in base.sources_of("bookworm", paths)] == ["debian.sources"]


def test_a_file_is_a_layer_and_weights_come_first(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"more")
    (tmp_path / "tokenizer.json").write_text("{}")
    names = [[member.name for member in layer.members] for layer in build.model_layers(tmp_path, {})]
    assert names == [
        ["model/model-2.safetensors"], ["model/model.safetensors"], ["model/config.json"], ["model/tokenizer.json"],
    ]  # fmt: skip


def test_very_many_files_share_layers_so_that_engines_can_stack_them(tmp_path: Path) -> None:
    for number in range(250):
        (tmp_path / f"model-{number:05}.safetensors").touch()
    (tmp_path / "tokenizer.json").touch()
    layers = build.model_layers(tmp_path, {})
    assert len(layers) <= build.MOST_MODEL_LAYERS
    assert sum(len(layer.members) for layer in layers) == 251


@pytest.fixture
def fetched(tmp_path: Path) -> tuple[profile.RuntimeProfile, Path]:
    """A profile of two wheels and torch by version, and its fetched folder."""
    folder = tmp_path / "wheels"
    (folder / "installer").mkdir(parents=True)
    lock = []
    for name in ("one", "two_parts"):
        data = name.encode()
        (folder / f"{name}-1.0-py3-none-any.whl").write_bytes(data)
        lock.append(f"{name.replace('_', '-')}==1.0 --hash=sha256:{hashlib.sha256(data).hexdigest()}")
    (folder / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").write_bytes(b"torch")
    (folder / "wheels.json").write_text(json.dumps(wheels._digests(folder)))
    (tmp_path / "some.txt").write_text("\n".join(lock) + "\n")
    loaded = profile.RuntimeProfile(
        name="some", base=profile.Base(image="x@sha256:" + "0" * 64), python="python3.11", lock="some.txt",
        torch="2.13.0", entrypoint=("x",), user=1, folder=tmp_path,
    )  # fmt: skip
    return loaded, folder


def test_fetched_wheels_are_those_of_the_lock(fetched: tuple[profile.RuntimeProfile, Path]) -> None:
    wheels.check_wheels(*fetched)


def test_every_wrong_wheel_is_named(fetched: tuple[profile.RuntimeProfile, Path]) -> None:
    loaded, folder = fetched
    (folder / "one-1.0-py3-none-any.whl").write_bytes(b"another")
    (folder / "two_parts-1.0-py3-none-any.whl").unlink()
    (folder / "extra-1.0-py3-none-any.whl").touch()
    with pytest.raises(WheelError) as caught:
        wheels.check_wheels(loaded, folder)
    message = str(caught.value)
    assert "`one-1.0-py3-none-any.whl` changed since it was downloaded" in message
    assert "`one-1.0-py3-none-any.whl` has sha256" in message
    assert "`two-parts` is missing" in message
    assert "`extra-1.0-py3-none-any.whl` was not downloaded" in message
    assert "\n" not in message


def test_another_torch_is_refused(fetched: tuple[profile.RuntimeProfile, Path]) -> None:
    loaded, folder = fetched
    with pytest.raises(WheelError, match=r"is not torch 2\.12\.0"):
        wheels.check_wheels(loaded.model_copy(update={"torch": "2.12.0"}), folder)


def test_pips_hash_mismatch_names_the_wheel() -> None:
    output = [
        "Collecting one==1.0",
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated …",
        "one==1.0 from https://host/one-1.0.whl (from -r lock (line 1)):",
        "Expected sha256 aaa",
        "Got        bbb",
    ]
    assert "`one==1.0` does not have the hash that the lock names (Got        bbb)" in wheels._reason(output)


@pytest.mark.parametrize(("runtime", "slots"), [("vllm-cpu", "3"), ("vllm-cuda13", "2")])
def test_all_adapters_may_be_in_one_batch_and_only_the_layers_that_they_change_are_prepared(
    tmp_path: Path, runtime: str, slots: str
) -> None:
    adapters = {
        "manual": ServedAdapter(digest="sha256:1", rank=4, modules=("q_proj", "v_proj")),
        "tests": ServedAdapter(digest="sha256:2", rank=20, modules=("down_proj", "q_proj")),
    }
    serving = ServingConfiguration(adapters=adapters)
    words = build.serving_arguments(profile.load(runtime), checkpoint(tmp_path), "demo", serving)
    first = words.index("--enable-lora")
    assert words[first : first + 12] == (
        "--enable-lora", "--max-loras", slots, "--max-lora-rank", "32",
        "--lora-target-modules", "down_proj", "q_proj", "v_proj",
        "--lora-modules", "manual=/adapters/manual", "tests=/adapters/tests",
    )  # fmt: skip


def test_a_changed_adapter_changes_its_own_layer_alone(tmp_path: Path) -> None:
    def keys() -> list[str | None]:
        folders = {name: tmp_path / name for name in ("manual", "tests")}
        sha256 = {path: digest_file(path) for folder in folders.values() for path in folder.iterdir()}
        return [layer.key for layer in build.folder_layers(folders, sha256)]

    for name in ("manual", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    before = keys()
    (tmp_path / "tests" / "adapter_model.safetensors").write_bytes(b"changed")
    after = keys()
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
