"""The quantizers for real, on the demo model. What they cost: the loss on held-out text, counted here from the packed
weights themselves, so that neither the quantizer's nor an engine's code is trusted with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from containers.hardware.gpu import gpus
from homes import DEMO
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import WorkerFailed
from pipeline.quantization import quantize as quantize_module
from pipeline.quantization.quantize import QuantizationRecord, quantize
from pipeline.settings import Settings
from pipeline.store.artifacts import FINISHED, ArtifactDraft, Recipe, Store
from pipeline.workers.runner import Workers
from registry.digests import digest_file
from stages.demo_checkpoints import Checkpoint, make_checkpoint, quantize_demo
from ui_server import workers_of

AWQ = {"method": "awq", "backend": "autoawq", "group_size": 64}
GPTQ = {"method": "gptq", "backend": "gptqmodel", "group_size": 64}
QUANTIZERS = Path(quantize_module.__file__).parent / "quantizers"
HELD_OUT = Path(__file__).parent / "held_out_loss.py"

Quantized = Callable[[dict[str, Any]], Checkpoint]


@pytest.fixture
def run_worker(machine: Settings) -> Workers:
    """The machine's own environments: no stage here needs an engine or a home."""
    return Workers(machine, print)


@pytest.fixture
def loss(tmp_path: Path, run_worker: Workers) -> Callable[[Path], float]:
    """Nats a token on held-out text."""

    def measure(folder: Path) -> float:
        scratch = Path(tempfile.mkdtemp(prefix="loss-", dir=tmp_path))
        request = {"checkpoint": str(folder), "model": str(DEMO / "model"), "text": str(DEMO / "heldout.jsonl")}
        return float(str(run_worker("autoawq", HELD_OUT, request, scratch)["loss"]))

    return measure


def test_autoawq_loses_little_and_the_same_request_gives_the_same_bytes(
    checkpoint: Quantized, loss: Callable[[Path], float], machine: Settings, tmp_path: Path
) -> None:
    first, again = checkpoint(AWQ), make_checkpoint(tmp_path, AWQ, machine)
    assert {path.name: digest_file(path) for path in first.folder.iterdir()} == {
        path.name: digest_file(path) for path in again.folder.iterdir()
    }
    assert [line for line in first.lines if "quantized: 3 of 4 layers" in line]
    assert first.record.bits_per_weight < 4.5
    spoiled = checkpoint(AWQ | {"clone_saved_weights": False})
    before = loss(DEMO / "model")
    # Measured: 0.009 nats a token with the remedy, 0.28 without.
    assert loss(first.folder) - before < 0.03
    if first.record.device == "cpu":
        assert loss(spoiled.folder) - before > 0.1


def test_gptqmodel_loses_little_at_four_bits_and_much_at_two(
    checkpoint: Quantized, loss: Callable[[Path], float], machine: Settings, tmp_path: Path
) -> None:
    four, again = checkpoint(GPTQ), make_checkpoint(tmp_path, GPTQ, machine)
    for name in ("model.safetensors", "config.json"):
        assert digest_file(four.folder / name) == digest_file(again.folder / name)
    assert [line for line in four.lines if "quantized: 3 of 4 layers" in line]
    assert four.record.device in {"cpu", "cuda"}
    two = checkpoint(GPTQ | {"bits": 2})
    assert (two.folder / "model.safetensors").stat().st_size < (four.folder / "model.safetensors").stat().st_size
    before = loss(DEMO / "model")
    # Measured: 0.008 nats a token at 4 bits, 0.17 at 2.
    assert loss(four.folder) - before < 0.03
    assert loss(two.folder) - before > 0.08


def test_gptqmodel_makes_awq_too(checkpoint: Quantized, loss: Callable[[Path], float]) -> None:
    folder = checkpoint(AWQ | {"backend": "gptqmodel"}).folder
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    assert loss(folder) - loss(DEMO / "model") < 0.03


@pytest.mark.parametrize("changes", [{"bits": 8}, {"desc_act": True, "symmetric": False}, {"group_size": -1}])
def test_gptqmodel_makes_what_a_scheme_may_ask_for(changes: dict[str, Any], machine: Settings, tmp_path: Path) -> None:
    assert make_checkpoint(tmp_path, GPTQ | changes, machine, samples=8).record.layers == 28


def test_autogptq_works_on_a_gpu_and_without_one_names_the_way_out(
    loss: Callable[[Path], float], machine: Settings, tmp_path: Path
) -> None:
    scheme = GPTQ | {"backend": "autogptq"}
    if gpus():
        assert loss(make_checkpoint(tmp_path, scheme, machine).folder) - loss(DEMO / "model") < 0.03
        return
    with pytest.raises(WorkerFailed, match=r"GPU only.*`backend: gptqmodel`"):
        make_checkpoint(tmp_path, scheme, machine)


def test_calibration_of_too_few_tokens_is_refused(tmp_path: Path, run_worker: Workers) -> None:
    calibration = tmp_path / "short.jsonl"
    calibration.write_text('{"text": "import os"}\n')
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    with pytest.raises(WorkerFailed, match="blocks of 200: at least 512 are needed"):
        quantize(
            DEMO / "model",
            calibration,
            1,
            200,
            Scheme.model_validate(GPTQ),
            tmp_path / "output",
            run_worker,
            tmp_path / "scratch",
            print,
        )
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize("method", ["fp8", "fp8-block", "mxfp4"])
def test_formats_without_calibration(checkpoint: Quantized, machine: Settings, tmp_path: Path, method: str) -> None:
    scheme = {"method": method, "backend": "llmcompressor"}
    first, again = checkpoint(scheme), make_checkpoint(tmp_path, scheme, machine)
    assert first.record.calibration is None
    for name in ("model.safetensors", "config.json"):
        assert digest_file(first.folder / name) == digest_file(again.folder / name)


@pytest.mark.parametrize(
    "scheme",
    [
        GPTQ,
        pytest.param(AWQ, marks=pytest.mark.long),
        pytest.param(AWQ | {"backend": "gptqmodel"}, marks=pytest.mark.long),
        pytest.param({"method": "w8a8", "backend": "llmcompressor"}, marks=pytest.mark.long),
        pytest.param({"method": "w4a16", "backend": "llmcompressor", "group_size": 64}, marks=pytest.mark.long),
    ],
    ids=lambda scheme: f"{scheme['method']} by {scheme['backend']}",
)
def test_killed_after_each_of_three_layers_it_continues_and_ends_with_the_same_bytes(
    machine: Settings, tmp_path: Path, scheme: dict[str, Any]
) -> None:
    whole, store = make_checkpoint(tmp_path / "whole", scheme, machine, samples=8), Store(tmp_path / "store")
    recipe = Recipe("quantized", {}, scheme, "1")
    lines: list[str] = []

    def make(draft: ArtifactDraft) -> None:
        try:
            quantize_demo(draft.folder, draft.scratch, Scheme.model_validate(scheme), machine, 8, print)
        finally:
            lines[:] = (draft.scratch / "output.log").read_text(errors="replace").replace("\r", "\n").splitlines()

    for count in (1, 2, 3):
        with killed(store, recipe, count), pytest.raises(WorkerFailed, match="was killed"):
            store.obtain(recipe, make)
    made = store.obtain(recipe, make)
    assert made.sha256 == {path.name: digest_file(path) for path in whole.folder.iterdir()}
    assert [line for line in lines if "3 of 4 layers were finished before a run was cut off" in line]
    assert list((store.root / ".making").iterdir()) == []


def test_data_free_continues_at_the_file_that_it_was_killed_in(machine: Settings, tmp_path: Path) -> None:
    source = tmp_path / "source"
    four_files(source)
    scheme = Scheme.model_validate({"method": "mxfp4", "backend": "llmcompressor"})

    def make(draft: ArtifactDraft) -> None:
        quantize(source, None, 0, 0, scheme, draft.folder, Workers(machine, print), draft.scratch, print)

    whole = Store(tmp_path / "whole").obtain(Recipe("quantized", {}, {}, "1"), make)
    store, recipe = Store(tmp_path / "store"), Recipe("quantized", {}, {}, "1")
    for count in (1, 2, 3):
        with killed(store, recipe, count), pytest.raises(WorkerFailed, match="was killed"):
            store.obtain(recipe, make)
        (kept,) = store.kept_for_next_try().values()
        assert count <= len(list(kept.glob("*.safetensors"))) < 4
    assert store.obtain(recipe, make).sha256 == whole.sha256


def four_files(folder: Path) -> None:
    """A Llama of four layers, each in a file of its own that takes a while to quantize."""
    wide, narrow = 1 << 15, 256
    rows = {
        **{f"self_attn.{name}_proj": (narrow, narrow) for name in "qkvo"},
        "mlp.gate_proj": (wide, narrow), "mlp.up_proj": (wide, narrow), "mlp.down_proj": (narrow, wide),
    }  # fmt: skip
    numbers = np.random.default_rng(0)
    folder.mkdir()
    places: dict[str, str] = {}
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{norm}.weight": np.ones(narrow, "f2") for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, shape in rows.items():
            tensors[f"{prefix}.{name}.weight"] = numbers.standard_normal(shape, "f4").astype("f2")
        if layer == 0:
            tensors["model.embed_tokens.weight"] = numbers.standard_normal((narrow, narrow), "f4").astype("f2")
            tensors["model.norm.weight"] = np.ones(narrow, "f2")
        name = f"model-{layer + 1:05}-of-00004.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    total = sum(path.stat().st_size for path in folder.iterdir())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": narrow, "vocab_size": narrow,
        "intermediate_size": wide, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


KEEPING = """
import sys
sys.path.insert(0, {folder!r})
import torch
from finished_layers import FinishedLayers
from pathlib import Path
from slipway_worker import main

def work(request, report):
    layers, found = FinishedLayers(request, "cpu", 2, report), []
    for _ in range(2):
        (value,) = layers.kept("value", lambda: (torch.tensor(float(Path("value").read_text())),))
        found.append(float(value))
        layers.next()
    return {{"found": found}}

main(work)
"""


AUTOGPTQ = """
import sys
sys.path.insert(0, {folder!r})
import torch
from autogptq import resumable
from finished_layers import FinishedLayers
from slipway_worker import main

def work(request, report):
    from auto_gptq.quantization.gptq import GPTQ

    torch.cuda.synchronize = lambda: None  # it waits for a GPU, and here is none
    found = []
    for inputs in (torch.randn(4, 64, 64), None):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({{"proj": torch.nn.Linear(64, 32, bias=False)}})
        finished = FinishedLayers(request, "cpu", 1, report)
        linear = resumable(GPTQ, model, finished)(model["proj"])
        linear.quantizer.configure(4, perchannel=True, sym=True, mse=False)
        linear.add_batch(inputs, None)
        parts = linear.fasterquant(group_size=32)
        found.append([tensor.tolist() for tensor in (*parts, model["proj"].weight)])
        finished.next()
    return {{"found": found}}

main(work)
"""


@pytest.mark.long
def test_autogptq_takes_over_what_was_found_for_a_layer_without_its_inputs(tmp_path: Path, run_worker: Workers) -> None:
    script, folder = tmp_path / "taking_over.py", tmp_path / "folder"
    script.write_text(AUTOGPTQ.format(folder=str(QUANTIZERS)))
    folder.mkdir()
    found: Any = run_worker("autogptq", script, {}, folder)["found"]
    first, again = found
    assert first == again
    assert len(first) == 4


def test_a_layer_is_taken_over_only_whole_and_for_the_same_request(tmp_path: Path, run_worker: Workers) -> None:
    script, folder = tmp_path / "keeping.py", tmp_path / "folder"
    script.write_text(KEEPING.format(folder=str(QUANTIZERS)))
    folder.mkdir()

    def found(value: int, request: dict[str, Any]) -> tuple[list[float], str]:
        (folder / "value").write_text(str(value))
        result: Any = run_worker("autoawq", script, request, folder)
        return result["found"], (folder / "output.log").read_text()

    assert found(1, {"bits": 4})[0] == [1, 1]
    kept = folder / "finished" / "layer-00001"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    values, log = found(2, {"bits": 4})
    assert values == [1, 2]
    assert "what was kept of layer 2 is damaged: it is quantized again" in log
    assert "quantized: 2 of 2 layers" in log
    values, log = found(3, {"bits": 8})
    assert values == [3, 3]
    assert "what an earlier run has finished was made with another request" in log


@contextlib.contextmanager
def killed(store: Store, recipe: Recipe, count: int) -> Iterator[None]:
    """Kill the worker as soon as so many layers are finished."""
    draft = store.root / ".making" / f"{recipe.stage}-{recipe.key}"
    ended = threading.Event()

    def finished() -> list[Path]:
        try:
            paths = list((draft / "scratch" / FINISHED).iterdir())
        except FileNotFoundError:  # also while the next try takes over what the one before it has finished
            return []
        return [path for path in paths if "-0000" in path.name and path.suffix != ".part"]

    def kill() -> None:
        while len(finished()) < count and not ended.wait(0.002):
            pass
        for pid in workers_of(draft):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.long
@pytest.mark.parametrize("scheme", [{"method": "w8a8"}, {"method": "w4a16", "group_size": 64}, {"method": "nvfp4"}])
def test_formats_with_calibration(
    checkpoint: Quantized, machine: Settings, tmp_path: Path, scheme: dict[str, Any]
) -> None:
    scheme = {"backend": "llmcompressor", **scheme}
    first, again = checkpoint(scheme), make_checkpoint(tmp_path, scheme, machine)
    assert [line for line in first.lines if "quantized: 3 of 4 layers" in line]
    for name in ("model.safetensors", "config.json"):
        assert digest_file(first.folder / name) == digest_file(again.folder / name)


@pytest.mark.parametrize(
    "scheme",
    [
        GPTQ,
        pytest.param(AWQ, marks=pytest.mark.long),
        pytest.param({"method": "w4a16", "backend": "llmcompressor", "group_size": 64}, marks=pytest.mark.long),
    ],
    ids=lambda scheme: scheme["backend"],
)
def test_conversations_go_through_the_chat_template_whole(
    machine: Settings, tmp_path: Path, scheme: dict[str, Any]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    texts = [json.loads(line)["text"] for line in (DEMO / "calibration.jsonl").read_text().splitlines()[:24]]
    chats = [[{"role": "user", "content": text[:80]}, {"role": "assistant", "content": text[80:240]}] for text in texts]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    def calibrated(template: Path | None) -> QuantizationRecord:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name in ("output", "scratch"):
            (folder / name).mkdir()
        return quantize(
            DEMO / "model", data, 24, 200, Scheme.model_validate(scheme), folder / "output", Workers(machine, print),
            folder / "scratch", print, chat_template=template,
        )  # fmt: skip

    with pytest.raises(WorkerFailed, match=r"the model has no chat template: name one by `serve: {chat_template: "):
        calibrated(None)
    record = calibrated(template)
    assert record.calibration is not None
    assert record.calibration.sha256 == digest_file(data)
