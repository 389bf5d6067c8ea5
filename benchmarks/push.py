"""A checkpoint of gigabytes into a registry: Slipway's layers, against copying and hashing it, and against Docker.

    .venv/bin/python benchmarks/push.py [--gigabytes 4] [--shards 4] [--without-docker]

In one run, on the same files, one after the other: ``cp`` and ``sha256sum``; Slipway's image to a fresh local registry,
in a process of its own whose peak memory is read from the kernel; the same image once more; a second scheme that
differs in one shard; and ``docker build`` with ``docker push`` to another fresh registry. Prints seconds, ratios,
and bytes read (of the files), written (by the registry) and sent. The files are random: weights don't compress either.
Needs Debian's docker-registry, an engine, and disk for six times the size. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # not this folder, whose `stages` is another
SETTINGS: dict[str, object] = {"Labels": {}, "Env": []}


def make(folder: Path, gigabytes: float, shards: int) -> dict[str, str]:
    """Write the checkpoint; return its files' digests, as an artifact store knows them."""
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 4096}')
    (folder / "tokenizer.json").write_text("{}" * 5000)
    size = int(gigabytes * 1e9 / shards)
    for number in range(shards):
        with (folder / f"model-{number + 1:05}-of-{shards:05}.safetensors").open("wb") as file:
            for start in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - start)))
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """Sha256 of every file, by its name."""
    command = ["sha256sum", *sorted(path.name for path in folder.iterdir())]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[1]: line.split()[0] for line in lines}


def push(folder: Path, known: Path, registry: str, home: Path, name: str) -> dict[str, float]:
    """Push the checkpoint's image without a runtime below, in a process of its own; say what it took."""
    command = [sys.executable, __file__, "--push", str(folder), str(known), registry, str(home), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def pushed(folder: str, known: str, registry: str, home: str, name: str) -> None:
    """The process that is measured."""
    from containers.image.blobs import BlobStore
    from containers.image.build import model_layers, push_layers
    from containers.image.distribution import Registry
    from containers.image.oci import OciImage

    began, before = time.monotonic(), read_bytes()
    store = BlobStore(Path(home))
    layers = model_layers(Path(folder), json.loads(Path(known).read_text()))
    with Registry(registry) as target:
        blobs = push_layers(target, name, (), layers, store)
        image = OciImage(SETTINGS, tuple(blobs), tuple("model" for _ in blobs), {})
        target.put_blob(name, image.config)
        digest = target.put_manifest(name, "1", image.manifest)
        traffic = target.traffic
    seconds = time.monotonic() - began
    told = {"seconds": seconds, "peak_bytes": peak(), "sent": traffic.sent, "read": read_bytes() - before}
    print(json.dumps({**told, "skipped": traffic.skipped, "mounted": traffic.mounted, "digest": digest}))


def read_bytes() -> int:
    """Bytes that this process has read, from the page cache or the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def peak() -> int:
    """The most memory that this process ever held, in bytes; getrusage's may be that of the one before the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def stored(folder: Path) -> int:
    """Bytes that a registry keeps."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(*command: str, **options: str) -> float:
    """Seconds of a command; the benchmark ends where it fails."""
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=options.get("cwd"))
    return time.monotonic() - began


def docker(folder: Path, registry: str) -> tuple[float, float]:
    """Seconds of ``docker build`` and of ``docker push`` of the same content."""
    from containers.engine.engine import connect
    from containers.scan.trivy import engine_variables
    from pipeline.settings import Settings

    settings = Settings.read()
    client = connect(settings.docker_host, settings.home)
    os.environ.update(engine_variables(client))
    lines = ["FROM scratch", *(f"COPY {path.name} /model/" for path in sorted(folder.glob("*.safetensors")))]
    (folder / "Dockerfile").write_text("\n".join([*lines, "COPY config.json tokenizer.json /model/", ""]))
    tag = f"{registry}/by-docker:1"
    try:
        build = timed("docker", "build", "-q", "-t", tag, ".", cwd=str(folder))
        return build, timed("docker", "push", "-q", tag)
    finally:
        subprocess.run(["docker", "image", "rm", "-f", tag], check=False, capture_output=True)
        (folder / "Dockerfile").unlink()


def main() -> None:
    """Measure and print."""
    from stages.loopback_registry import serving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--without-docker", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where the files go; a temporary folder otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name, serving(Path(name) / "registry") as registry:
        folder = Path(name)
        (folder / "known.json").write_text(json.dumps(make(folder / "one", arguments.gigabytes, arguments.shards)))
        os.sync()
        copying = timed("cp", "-r", str(folder / "one"), str(folder / "copy"))
        summing = timed("sha256sum", *map(str, sorted((folder / "one").iterdir())))
        shutil.rmtree(folder / "copy")
        os.sync()
        print(f"cp {copying:.1f} s + sha256sum {summing:.1f} s = {copying + summing:.1f} s")
        first = push(folder / "one", folder / "known.json", registry, folder / "home", "demo-awq")
        show("image to the registry", first, copying + summing, stored(folder / "registry" / "blobs"))
        again = push(folder / "one", folder / "known.json", registry, folder / "home", "demo-awq")
        show("the same once more", again, copying + summing, 0)
        other(folder)
        before = stored(folder / "registry" / "blobs")
        second = push(folder / "two", folder / "known-two.json", registry, folder / "home", "demo-gptq")
        show("another scheme, one shard changed", second, 0, stored(folder / "registry" / "blobs") - before)
        shutil.rmtree(folder / "two")
        shutil.rmtree(folder / "registry" / "blobs")
        if not arguments.without_docker:
            with serving(folder / "other-registry") as fresh:
                build, sent = docker(folder / "one", fresh)
            print(f"docker build {build:.1f} s + docker push {sent:.1f} s = {build + sent:.1f} s: "
                  f"{(build + sent) / first['seconds']:.1f} times Slipway's")  # fmt: skip


def other(folder: Path) -> None:
    """A second scheme: links to all files of the first, but for one shard of its own."""
    (folder / "two").mkdir()
    for path in (folder / "one").iterdir():
        (folder / "two" / path.name).hardlink_to(path)
    shard = min((folder / "two").glob("*.safetensors"))
    size = shard.stat().st_size
    shard.unlink()
    shard.write_bytes(os.urandom(1 << 20) + bytes(size - (1 << 20)))
    (folder / "known-two.json").write_text(json.dumps(digests(folder / "two")))


def show(what: str, told: dict[str, float], floor: float, written: int) -> None:
    """Print one run."""
    ratio = f", {floor / told['seconds']:.2f} times the speed of cp + sha256sum" if floor else ""
    print(f"{what}: {told['seconds']:.1f} s{ratio}; peak memory {told['peak_bytes'] / 1e6:.0f} MB")
    moved = {name: told[name] for name in ("read", "sent")} | {"written by the registry": written}
    moved |= {"there already": told["skipped"], "mounted": told["mounted"]}
    print("  " + ", ".join(f"{name} {value / 1e6:,.1f} MB" for name, value in moved.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--push"]:
        pushed(*sys.argv[2:])
    else:
        main()
