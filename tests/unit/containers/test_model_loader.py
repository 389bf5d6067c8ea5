"""What the loader of every runtime's image refuses, without vLLM: changed files, settings, arguments, a broken plugin.

That vLLM loads a model through it is asserted by every release, whose images it is in (`tests/end_to_end`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from release_folder import FILES, make_release
from slipway_loader.stream import Memory, Shard, divided, verified

from containers.image.build import folder_layers, model_layers
from containers.image.model_loader import list_of_layers, loader_layer
from homes import DEMO
from pipeline.compatibility.safetensors_headers import read_header
from registry.errors import VerificationError
from registry.manifest import FileRecord
from registry.served_files import TRUST, check_before_start, expected_files, is_weights
from registry.signing import SigningKey, load_or_create_key, public_path

ADAPTER = DEMO / "adapters" / "tests"
STARTED = "the server started with"
# From any working directory to the root.
UP = "/".join([".."] * 20)


def placed(root: Path) -> Path:
    """The demo and an adapter where an image has them, without anything that says what they should be."""
    shutil.copytree(DEMO / "model", root / "model")
    shutil.copytree(ADAPTER, root / "adapters" / "tests")
    return root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The root of a container of a release's image."""
    root = placed(tmp_path / "image")
    layers = [*model_layers(root / "model", {}), *folder_layers({"/adapters/tests": root / "adapters" / "tests"}, {})]
    with tarfile.open(fileobj=io.BytesIO(b"".join(list_of_layers(layers).chunks()))) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture
def volume(tmp_path: Path, key: SigningKey) -> Path:
    """The root of a container with a signed release on a volume, its adapter mounted too, and the key it trusts."""
    root = tmp_path / "volume"
    model = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    adapter = {f"adapters/tests/{path.name}": path.read_bytes() for path in ADAPTER.iterdir()}
    evidence = {name: data for name, data in FILES.items() if name.startswith("release/")}
    make_release(root / "model", key, files={**model, **adapter, **evidence})
    shutil.copytree(root / "model" / "adapters", root / "adapters")
    (root / TRUST).mkdir(parents=True)
    (root / TRUST / "release.pub").write_bytes(key.public.pem())
    return root


def load(root: Path, manifest_digest: str | None = None) -> int:
    """What a start does: check all files but the weights, then read the weights; return the bytes of the latter."""
    expected = expected_files(root, manifest_digest)
    check_before_start(root, expected)
    shards = [(root / name, record) for name, record in sorted(expected.files.items()) if is_weights(name)]
    return sum(tensor.bytes for batch in verified(shards, 2, []) for _, tensor in batch.tensors)


@pytest.mark.parametrize("way", ["image", "volume"])
def test_two_hundred_random_changes_of_one_byte_are_refused(way: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(way)
    assert load(root) > 8_000_000
    files = [path for folder in ("model", "adapters") for path in sorted((root / folder).rglob("*")) if path.is_file()]
    kinds = {
        "weights": [path for path in files if is_weights(path.relative_to(root).as_posix())],
        "adapter": [path for path in files if path.is_relative_to(root / "adapters")],
        "tokenizer": [path for path in files if path.name.startswith("tokenizer")],
        "configuration": [path for path in files if path.name.endswith("config.json") and path.parent.name == "model"],
    }
    chance = random.Random(20)
    for number in range(200):
        path = chance.choice(kinds[list(kinds)[number % len(kinds)]])
        place, mask = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        change(path, place, mask)
        with pytest.raises(VerificationError) as refused:
            load(root)
        assert {Path(problem.what) for problem in refused.value.problems} <= {
            Path("/") / path.relative_to(root), path
        }  # fmt: skip
        change(path, place, mask)
    assert load(root) > 8_000_000


def change(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "model" / "extra.safetensors").write_bytes(b"x"), "/model/extra.safetensors: extra"),
        (lambda root: (root / "model" / "added.jinja").write_text("x"), "/model/added.jinja: extra"),
        (lambda root: (root / "model" / "tokenizer.json").unlink(), "/model/tokenizer.json: missing"),
        (lambda root: (root / "model" / "model.safetensors").unlink(), "/model/model.safetensors: missing"),
        (lambda root: shutil.copytree(ADAPTER, root / "adapters" / "other"), "/adapters/other/"),
        (lambda root: linked(root / "model" / "config.json"), "/model/config.json: a symlink"),
        (lambda root: os.truncate(root / "model" / "model.safetensors", 100), "changed: 100 bytes"),
    ],
)
def test_files_that_are_extra_missing_or_links_are_refused_before_the_start(
    image: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(image)
    with pytest.raises(VerificationError) as refused:
        check_before_start(image, expected_files(image))
    assert said in str(refused.value)


def linked(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere.json")
    path.symlink_to("../elsewhere.json")


def test_another_release_or_signer_on_the_volume_is_refused(volume: Path, tmp_path: Path) -> None:
    digest = "sha256:" + hashlib.sha256((volume / "model/release/manifest.json").read_bytes()).hexdigest()
    assert load(volume, digest)
    with pytest.raises(VerificationError, match="its digest is"):
        load(volume, "sha256:" + "0" * 64)
    load_or_create_key(tmp_path / "other.pem")
    shutil.copy(public_path(tmp_path / "other.pem"), volume / TRUST / "release.pub")
    with pytest.raises(VerificationError, match=r"signature\.json"):
        load(volume)


def test_an_empty_digest_accepts_no_release(volume: Path) -> None:
    with pytest.raises(VerificationError, match="its digest is"):
        load(volume, "")


def test_a_manifest_that_is_no_plain_file_is_refused_without_waiting_for_it(volume: Path) -> None:
    manifest = volume / "model/release/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(VerificationError, match=r"manifest\.json"):
        load(volume)
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    with pytest.raises(VerificationError, match=r"/model/release/manifest\.json: can't be read"):
        load(volume)


def test_without_a_manifest_a_policy_refuses_and_without_list_and_policy_nothing_starts(volume: Path) -> None:
    shutil.rmtree(volume / "model" / "release")
    with pytest.raises(VerificationError, match=r"/model/release/manifest\.json"):
        load(volume)
    shutil.rmtree(volume / TRUST)
    with pytest.raises(VerificationError, match="this image lists no files"):
        load(volume)
    with pytest.raises(VerificationError, match="no trust policy is mounted"):
        load(volume, "sha256:" + "0" * 64)


def test_a_signed_adapter_is_in_the_release_or_beside_it(volume: Path) -> None:
    shutil.rmtree(volume / "model" / "adapters")
    assert load(volume)
    shutil.rmtree(volume / "adapters")
    with pytest.raises(VerificationError, match=r"/model/adapters/tests/.*: missing"):
        load(volume)


def shards_of(folder: Path, count: int) -> list[Shard]:
    """Safetensors files with tensors of several types and sizes, among them none and a whole batch."""
    folder.mkdir()
    chance = random.Random(3)
    made = []
    for number in range(count):
        header, data = {}, b""
        for tensor, (dtype, shape) in enumerate([("BF16", [3, 5]), ("I32", [7]), ("F32", [0]), ("U8", [1 << 20])]):
            size = {"BF16": 2, "I32": 4, "F32": 4, "U8": 1}[dtype] * int.__mul__(*shape, *[1] * (2 - len(shape)))
            offsets = [len(data), len(data) + size]
            header[f"{number}.{tensor}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            data += chance.randbytes(size)
        raw = json.dumps(header).encode()
        path = folder / f"model-{number}.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        made.append((path, FileRecord(sha256=digest, size=path.stat().st_size)))
    return made


def test_the_bytes_given_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipway_loader.stream.BATCH", 16)
    shards = shards_of(tmp_path / "model", 3)
    assert given(verified(shards, 2, [])) == contents(shards)


def test_memory_is_used_again_but_not_what_the_engine_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(tmp_path / "model", 8)
    made = []
    of = Memory.of

    def counted(size: int) -> Memory:
        made.append(size)
        return of(size)

    monkeypatch.setattr(Memory, "of", counted)
    kept = {}
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number, batch in enumerate(divided(shards, lambda value: [value], 1)):
        for name, tensor in batch.tensors:
            if number % 4 == 0:
                kept[name] = memoryview(batch.memory.map)[tensor.start - batch.begins : tensor.end - batch.begins]
    assert len(made) < 8
    del batch
    # Memory is free again once the engine lets go of it.
    kept_maps = {id(part.obj) for part in kept.values()}
    assert len(list(Path("/proc/self/fd").iterdir())) == before + len(kept_maps)
    assert {name: hashlib.sha256(part).hexdigest() for name, part in kept.items()}.items() <= contents(shards).items()


def given(batches: Iterator[Any]) -> dict[str, str]:
    return {
        name: hashlib.sha256(batch.memory.map[tensor.start - batch.begins : tensor.end - batch.begins]).hexdigest()
        for batch in batches
        for name, tensor in batch.tensors
    }


def contents(shards: Sequence[Shard]) -> dict[str, str]:
    return {
        name: hashlib.sha256(path.read_bytes()[tensor.start : tensor.end]).hexdigest()
        for path, _ in shards
        for name, tensor in read_header(path).items()
    }


def rank(number: int, shards: Sequence[Shard], to_other: Connection, result: Connection) -> None:
    """One of two ranks: tells what it was given, and how many bytes it read from files."""

    def gather(value: Any) -> list[Any]:  # noqa: ANN401 - as `slipway_loader.stream` has it
        to_other.send(value)
        other = to_other.recv()
        return [value, other] if number == 0 else [other, value]

    def read() -> int:
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    before = read()
    try:
        found: object = given(divided(shards, gather, 2))
    except VerificationError as error:
        found = str(error.problems[0])
    result.send((found, read() - before))


def of_two_ranks(shards: Sequence[Shard]) -> list[tuple[Any, int]]:
    """What two processes say, of which each is a rank."""
    context = multiprocessing.get_context("fork")
    ends = context.Pipe()
    results = [context.Pipe(duplex=False) for _ in ends]
    processes = [
        context.Process(target=rank, args=(number, shards, end, results[number][1])) for number, end in enumerate(ends)
    ]
    for process in processes:
        process.start()
    said = [receiver.recv() for receiver, _ in results]
    for process in processes:
        process.join(20)
    return said


@pytest.mark.parametrize("count", [1, 3])
def test_two_ranks_are_given_all_and_read_each_file_once_between_them(tmp_path: Path, count: int) -> None:
    shards = shards_of(tmp_path / "model", count)
    (first, read), (second, also_read) = of_two_ranks(shards)
    assert first == second == contents(shards)
    size = sum(record.size for _, record in shards)
    assert size <= read + also_read < 1.1 * size + 50_000


def test_what_one_rank_finds_wrong_stops_both(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "model", 3)
    path = shards[1][0]
    change(path, path.stat().st_size - 1, 1)
    assert [said for said, _ in of_two_ranks(shards)] == [f"{path}: changed: another sha256 than in the manifest"] * 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loader's layer, and a module in vLLM's place that says with which arguments it was started."""
    folder = tmp_path_factory.mktemp("layer")
    python = f"python3.{sys.version_info.minor}"
    layer = io.BytesIO(b"".join(loader_layer(python).chunks()))
    with tarfile.open(fileobj=layer) as archive:
        archive.extractall(folder, filter="data")
    site = folder / "opt/venv/lib" / python / "site-packages"
    (site / "server.py").write_text(f"import sys\nprint({STARTED!r}, *sys.argv[1:])\n")
    return site


@dataclasses.dataclass(frozen=True)
class Started:
    """How a start ended."""

    status: int
    output: str
    errors: str


def start(site: Path, root: Path, *arguments: str, module: str = "server", **environment: str) -> Started:
    """Start the entry point in a Python that has nothing of ours but the layer."""
    dependencies = sysconfig.get_path("purelib")
    program = (
        f"import sys; sys.path[:0] = [{str(site)!r}, {dependencies!r}]; from pathlib import Path; "
        f"from slipway_loader.__main__ import main; main(Path({str(root)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, module, "--model", "/model", *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    return Started(done.returncode, done.stdout, done.stderr)


def test_what_is_right_is_started_with_the_loader(installed: Path, image: Path, volume: Path) -> None:
    done = start(installed, image, "--lora-modules", "tests=/adapters/tests", "--root-path", "/etc")
    assert (done.status, done.output) == (
        0, f"{STARTED} --model /model --lora-modules tests=/adapters/tests --root-path /etc --load-format slipway\n"
    )  # fmt: skip
    assert start(installed, volume, "--load-format", "slipway").status == 0
    assert start(installed, image, "--generation-config", "vllm", "--served-model-name", "usr", "--seed=-1").status == 0
    parsers = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    assert start(installed, image, *parsers).status == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--load-format", "dummy"], {}, "--load-format dummy: only `slipway` verifies"),
        (["--load_format=safetensors"], {}, "--load-format safetensors: only `slipway` verifies"),
        ([], {"VLLM_PLUGINS": "slipway_kernels"}, "VLLM_PLUGINS: it leaves `slipway_loader` out"),
        ([], {"VLLM_PLUGINS": ""}, "VLLM_PLUGINS: it leaves `slipway_loader` out"),
        ([], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING: "),
        ([], {"VLLM_SERVER_DEV_MODE": "1"}, "VLLM_SERVER_DEV_MODE: what vLLM loads by it is not verified: unset it"),
        ([], {"VLLM_MODEL_REDIRECT_PATH": "/model/x.json"}, "VLLM_MODEL_REDIRECT_PATH: "),
        ([], {"SLIPWAY_MANIFEST": "sha256:0"}, "/etc/slipway-trust: no trust policy is mounted"),
        (["--tokenizer", "/usr"], {}, "/usr: not among the files that were signed (--tokenizer)"),
        (["--model", "facebook/opt-125m"], {}, "facebook/opt-125m: not among the files that were signed (--model)"),
        (["--hf_config_path=usr"], {}, "usr: not among the files that were signed (--hf-config-path)"),
        (["--chat-template", f"{UP}/usr/x.yaml"], {}, f"{UP}/usr/x.yaml: not among the files that were signed"),
        (["--config=/usr/x.yaml"], {}, "/usr/x.yaml: not among the files that were signed (--config)"),
        (["--lora-modules", "x=/usr"], {}, "/usr: not among the files that were signed (--lora-modules)"),
        (['--lora-modules={"name":"x","path":"/usr"}'], {}, "/usr: not among the files that were signed"),
        (["--lora-modules", "x=some/adapter"], {}, "some/adapter: not among the files that were signed"),
        (["--lora-modules", "tests=/adapters/tests", "x=usr"], {}, "usr: not among the files that were signed"),
        (["--lora-mod", "x=some/adapter"], {}, "x=some/adapter: not among the files that were signed (--lora-mod)"),
        (['--default-mm-loras={"audio":"some/adapter"}'], {}, "some/adapter: not among the files that were signed"),
        (["--default-mm-loras.audio", "usr"], {}, "usr: not among the files that were signed (--default-mm-loras)"),
        (["--generation-config", "usr"], {}, "usr: not among the files that were signed (--generation-config)"),
        (["--config", "x.yaml"], {}, "x.yaml: not among the files that were signed (--config)"),
        (["--chat-template", "{{ messages }}"], {}, "{{ messages }}: not among the files that were signed"),
        (["--root-path", "/etc", "-sc", '{"model":"/usr"}'], {}, "/usr: not among the files that were signed (-sc)"),
        (["--quantization-config", "~/x.yaml"], {"HOME": "/usr"}, "~/x.yaml: not among the files that were signed"),
        (["--quantization-config", "/a b/x"], {}, "/a b/x: not among the files that were signed"),
    ],
)
def test_a_setting_that_goes_round_the_loader_stops_the_start(
    installed: Path, image: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    (image / "usr").mkdir()
    (image / "usr" / "x.yaml").touch()
    (image / "a b").mkdir()
    (image / "a b" / "x").touch()
    done = start(installed, image, *arguments, **environment)
    assert (done.status, done.output) == (78, "")
    assert f"slipway loader: refused: {said}" in done.errors
    assert len(done.errors.splitlines()) == 1


def test_the_name_of_a_file_on_a_volume_is_shown_without_control_characters(installed: Path, image: Path) -> None:
    (image / "model" / "\x1b[2J\nslipway loader: {}").touch()
    done = start(installed, image)
    assert (done.status, done.errors) == (
        78, "slipway loader: refused: /model/\\x1b[2J slipway loader: {}: extra: not in the manifest\n"
    )  # fmt: skip


def test_a_changed_configuration_stops_the_start_with_one_line(installed: Path, image: Path) -> None:
    change(image / "model" / "config.json", 10, 1)
    done = start(installed, image)
    assert (done.status, done.output, done.errors) == (
        78, "", "slipway loader: refused: /model/config.json: changed: another sha256 than in the manifest\n"
    )  # fmt: skip


def test_a_missing_or_broken_plugin_stops_the_start(installed: Path, image: Path, tmp_path: Path) -> None:
    for spoil in ("missing", "another", "broken"):
        site = tmp_path / spoil
        shutil.copytree(installed, site)
        information = site / "slipway_loader-1.dist-info"
        if spoil == "missing":
            shutil.rmtree(information)
        elif spoil == "another":
            (information / "entry_points.txt").write_text("[vllm.general_plugins]\nslipway_loader = os:getcwd\n")
        else:
            (site / "slipway_loader" / "__init__.py").write_text("import nothing_of_this_name\n")
        done = start(site, image)
        assert done.status != 0
        assert done.output == ""
        assert spoil == "broken" or "refused: plugin slipway_loader: it is not installed" in done.errors


def test_what_the_engine_refuses_is_the_last_line_and_the_status(installed: Path, image: Path) -> None:
    """What stands for vLLM fails as the engine's process does: it leaves the reason, and ends with another error."""
    (installed / "failing.py").write_text(
        "from registry.errors import Problem, VerificationError\nfrom slipway_loader import refuse\n"
        "refuse(VerificationError('/', [Problem('/model/model.safetensors', 'changed')]))\nraise RuntimeError('core')\n"
    )
    done = start(installed, image, module="failing")
    assert done.status == 78
    assert done.errors.splitlines()[-1] == "slipway loader: refused: /model/model.safetensors: changed"
