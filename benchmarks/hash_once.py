"""How much of a release's weights is read to hash them: with the digests handed on, and with each reader hashing anew.

    .venv/bin/python benchmarks/hash_once.py [GIGABYTES]

Takes four random weights files (1 GB together, if not told otherwise) from a folder through the artifact store as the
stages do: pulled and stored as `source`, stored again as a checkpoint, described for the manifest, stored as `release`.
Both ways run in a process of their own, one after the other, the page cache warm for both. Prints seconds, and the
bytes that the process read (``rchar`` of /proc/self/io) in times the weights' size; then both ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pipeline.sources import source as sources
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store
from registry import seal
from registry.manifest import Image, Quantizer, Source

FILES = 4
DIGEST = "sha256:" + "0" * 64


def main() -> None:
    """Run both ways and print a line for each, then the ratios."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder / "model", gigabytes)
        seconds, read = {}, {}
        for way in ("anew", "once"):
            command = [sys.executable, __file__, "--way", way, str(folder / "model"), str(folder / way)]
            answered = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            seconds[way], read[way] = answered["seconds"], answered["read"]
            print(f"{way}: {seconds[way]:.2f} s, {read[way] / size:.2f} times the weights read", flush=True)
    bytes_read, time_taken = (each["once"] / each["anew"] for each in (read, seconds))
    print(f"once / anew: {bytes_read:.2f} of the bytes, {time_taken:.2f} of the time")


def write_model(folder: Path, gigabytes: float) -> int:
    """Write weights that do not compress and what a model needs beside them; returns the bytes of the weights."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    random = np.random.default_rng(0)
    places = {f"layer.{number}": f"model-{number + 1:05}-of-{FILES:05}.safetensors" for number in range(FILES)}
    for tensor, file in places.items():
        values = random.integers(0, 2**16, int(gigabytes * 1e9 / FILES / 2), np.uint16).view(np.float16)
        save_file({tensor: values}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def release(model: Path, home: Path, *, once: bool) -> None:
    """Take the weights from the source to the manifest; with ``once`` each stage gets the digests of the one before."""
    home.mkdir()
    store = Store(home / "artifacts")

    def known(draft: ArtifactDraft, digests: dict[str, str]) -> None:
        if once:
            draft.sha256.update(digests)

    def pull(draft: ArtifactDraft) -> None:
        resolved = sources.resolve(f"file:{model}", memory=home / "digests.json")
        known(draft, sources.pull(resolved, draft.folder, home / "downloads", lambda _: None))

    def copy(of: Artifact, draft: ArtifactDraft) -> None:
        seal.place({name: of.folder / name for name in of.files}, draft.folder)
        known(draft, dict(of.sha256))

    def describe(of: Artifact, draft: ArtifactDraft) -> None:
        seal.place({name: of.folder / name for name in of.files}, draft.folder)
        manifest = seal.describe(
            draft.folder, model="demo", scheme="fp8", gates=[], sbom="config.json", known=of.files if once else None,
            source=Source(uri="file:model", revision=DIGEST, files=of.files),
            quantizer=Quantizer(
                backend="llmcompressor", version="0", method="fp8", parameters={}, pins_digest=DIGEST, calibration=None
            ),
            image=Image(reference="demo", digest=DIGEST, base_digest=DIGEST, pins_digest=DIGEST, runtime="vllm-cpu",
                minimum_driver=None),
        )  # fmt: skip
        known(draft, {name: file.sha256 for name, file in manifest.files.items()})

    source = store.obtain(Recipe("source", {}, {}, "1"), pull)
    checkpoint = store.obtain(Recipe("quantized", {}, {}, "1"), lambda draft: copy(source, draft))
    store.obtain(Recipe("release", {}, {}, "1"), lambda draft: describe(checkpoint, draft))


def read_bytes() -> int:
    """Bytes that this process has read, from the page cache or the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        began, before = time.monotonic(), read_bytes()
        release(Path(sys.argv[3]), Path(sys.argv[4]), once=sys.argv[2] == "once")
        print(json.dumps({"seconds": time.monotonic() - began, "read": read_bytes() - before}))
    else:
        main()
