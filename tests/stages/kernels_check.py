"""Runs inside the CPU runtime: its linear layers against NumPy, and small models that its engine answers with.

Beside it lie `evals/drift/packed.py`, as the reference for packed weights, and tiny checkpoints of compressed-tensors
in ``compressed``. Prints one JSON document behind ``checked:
``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import packed  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file, save_file
from slipway_kernels import unquantized
from slipway_kernels.worker import Worker, _quantized_by
from transformers import AutoTokenizer, LlamaForCausalLM
from vllm import LLM, SamplingParams, plugins
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.plugins import load_general_plugins

MODEL = Path("/check/model")
# Of rank 4 on every linear layer, with text of its own kind.
ADAPTER, ITS_TEXT = Path("/check/adapter"), Path("/check/adapter.jsonl")
COMPRESSED = Path("/check/compressed")
# The layer that is looked at, where all have one format.
LAYER = "model.layers.1.mlp.down_proj"
# (inputs, outputs): such as vLLM's own kernel takes, and such as it does not.
SHAPES = ((256, 96), (384, 40), (128, 8))
GROUPS = (32, 64, 128, -1)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) → (n * bits / 32, m): GPTQ's words."""
    parts = values.astype(np.uint32).reshape(-1, 32 // bits, values.shape[1])
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
    packed: np.ndarray = np.bitwise_or.reduce(parts << shifts, axis=1)
    return packed.view(np.int32)


def pack_awq(values: np.ndarray) -> np.ndarray:
    """(n, m) → (n, m / 8): AWQ's words."""
    ordered = values.reshape(len(values), -1, 8)[:, :, _AWQ_ORDER].reshape(values.shape)
    return np.ascontiguousarray(pack(np.ascontiguousarray(ordered.T), 4).T)


def quantized(method: str, bits: int, values: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, Any]:
    """A layer's tensors as a checkpoint has them; ``values`` is (in, out), the others (groups, out)."""
    if method == "awq":
        return {"qweight": pack_awq(values), "qzeros": pack_awq(zeros), "scales": scales}
    words = np.ascontiguousarray(pack(np.ascontiguousarray((zeros - 1).T), bits).T)
    return {"qweight": pack(values, bits), "qzeros": words, "scales": scales}


def described(method: str, bits: int, group: int) -> dict[str, Any]:
    """A checkpoint's ``quantization_config``."""
    common = {"quant_method": method, "bits": bits, "group_size": group}
    if method == "awq":
        return {**common, "zero_point": True, "version": "gemm"}
    return {**common, "sym": True, "desc_act": False}


def packed_layer(method: str, bits: int, group: int, shape: tuple[int, int]) -> dict[str, Any]:
    """What multiplies a layer, how far it is off, and which of its parameters are kept."""
    random = np.random.default_rng(1)
    inputs, outputs = shape
    count = 1 if group == -1 else inputs // group
    values = random.integers(0, 2**bits, (inputs, outputs))
    zeros = (
        random.integers(1, 2**bits, (count, outputs)) if method == "awq" else np.full((count, outputs), 2**bits // 2)
    )
    # As many digits as bfloat16 has, in which vLLM loads them.
    scales = (random.integers(1, 255, (count, outputs)) / 2**12).astype(np.float16)
    parts = quantized(method, bits, values, zeros, scales)
    config = described(method, bits, group)
    made = AutoAWQConfig.from_config(config) if method == "awq" else AutoGPTQConfig.from_config(config)
    linear = AutoAWQMarlinLinearMethod(made) if method == "awq" else AutoGPTQLinearMethod(made)
    layer = torch.nn.Module()
    layer.bias = None
    linear.create_weights(layer, inputs, [outputs], inputs, outputs, torch.bfloat16, weight_loader=lambda *_: None)
    for name, part in parts.items():
        getattr(layer, name).data.copy_(torch.from_numpy(part))
    linear.process_weights_after_loading(layer)
    weight = packed.unpack_linear(parts, config)
    return {
        "method": method, "bits": bits, "group": group, "shape": shape, "kernel": type(linear.kernel).__name__,
        **off(lambda x, bias: linear.apply(layer, x, bias), weight),
        "left": sorted(name for name, value in layer.named_parameters() if value.numel()),
    }  # fmt: skip


def compressed_layers(folder: Path) -> dict[str, Any]:
    """`compressed_layer` of one layer of a checkpoint; of a mixture, of all that its groups name."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    named = [name for group in stated["config_groups"].values() for name in group["targets"]]
    stored = load_file(folder / "model.safetensors")
    return {name: compressed_layer(name, stored, stated) for name in ([LAYER] if named == ["Linear"] else named)}


def compressed_layer(name: str, stored: dict[str, torch.Tensor], stated: dict[str, Any]) -> dict[str, Any]:
    """Which of vLLM's schemes and kernels take a layer of compressed-tensors, and the relative error of its outputs; or
    why none does."""
    config = CompressedTensorsConfig.from_config(json.loads(json.dumps(stated)))
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    numbers = {key: (part.float() if part.is_floating_point() else part).numpy() for key, part in parts.items()}
    weight = packed.unpack_linear(numbers, stated, name)
    outputs, inputs = weight.shape
    try:
        layer = ReplicatedLinear(
            inputs, outputs, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=name
        )
    except ValueError as refusal:
        return {"refused": str(refusal)}
    for key, part in parts.items():
        parameter = getattr(layer, key)
        parameter.weight_loader(parameter, part)
    layer.quant_method.process_weights_after_loading(layer)
    torch.manual_seed(2)
    x = torch.randn(33, inputs).to(torch.bfloat16)
    exact = x.double().numpy() @ weight.T.astype(np.float64)
    error = np.linalg.norm(layer(x)[0].double().numpy() - exact) / np.linalg.norm(exact)
    return {"scheme": type(layer.scheme).__name__, "kernel": _quantized_by(layer), "error": float(error)}


def plain_layer(kind: torch.dtype, shape: tuple[int, int]) -> dict[str, Any]:
    """The same of a layer that is not quantized."""
    inputs, outputs = shape
    layer = torch.nn.Module()
    torch.manual_seed(1)
    layer.weight = torch.nn.Parameter(torch.randn(outputs, inputs).to(kind), requires_grad=False)
    weight = layer.weight.float().numpy().copy()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return {
        "kind": str(kind), "shape": shape, "kernel": unquantized.used_by(layer),
        **off(lambda x, bias: layer.cpu_linear(x, layer.weight, bias), weight, kind),
        "left": [name for name, value in layer.named_parameters() if value.numel()],
    }  # fmt: skip


def off(apply: Any, weight: np.ndarray, kind: torch.dtype = torch.bfloat16) -> dict[str, float]:  # noqa: ANN401 - a layer
    """The largest errors: ``float32`` in what sums in float32 and a rounded result allow, ``rounded`` in what weights
    rounded to 16 bits add to that."""
    sums, rounded = [0.0], [0.0]
    torch.manual_seed(2)
    for rows in (1, 5, 33):
        x = torch.randn(rows, weight.shape[1]).to(kind)
        for bias in (None, torch.randn(weight.shape[0]).to(kind)):
            given = apply(x, bias)
            assert given.dtype == kind
            exact = x.double().numpy() @ weight.T.astype(np.float64)
            size = np.abs(x.double().numpy()) @ np.abs(weight.T.astype(np.float64))
            if bias is not None:
                exact = exact + bias.double().numpy()
            error, step = np.abs(given.double().numpy() - exact), torch.finfo(kind).eps
            sums.append(float(np.max(error / (step * np.abs(exact) + 2**-18 * size))))
            rounded.append(float(np.max(error / (step * (np.abs(exact) + size)))))
    return {"float32": max(sums), "rounded": max(rounded)}


def checkpoint(folder: Path, method: str, bits: int, group: int) -> Path:
    """The demo's model rounded to nearest."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim != 2:
            tensors[name] = tensor.half()
            continue
        weight = tensor.float().numpy().T
        grouped = weight.reshape(-1 if group > 0 else 1, group if group > 0 else len(weight), weight.shape[1])
        top = 2**bits - 1
        low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
        if method == "awq":
            scales = np.maximum((high - low) / top, 1e-6)
            zeros = np.clip(np.round(-low / scales), 0, top)
        else:
            scales = np.maximum(np.maximum(high, -low) / (top // 2), 1e-6)
            zeros = np.full_like(scales, 2**bits // 2)
        values = np.clip(np.round(grouped / scales[:, None]) + zeros[:, None], 0, top).reshape(weight.shape)
        parts = quantized(method, bits, values.astype(int), zeros.astype(int), scales.astype(np.float16))
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{part}": torch.from_numpy(np.ascontiguousarray(content)) for part, content in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in MODEL.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = described(method, bits, group)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answered(model: Path) -> str:
    """What the engine says to the demo's canary."""
    engine = LLM(
        str(model), dtype="bfloat16", enforce_eager=True, max_model_len=128,
        worker_cls="slipway_kernels.worker.Worker",
    )  # fmt: skip
    said = engine.generate('if __name__ == "__main', SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    return str(said[0].outputs[0].text)


def adapted(model: Path) -> dict[str, Any]:
    """How likely a packed model's engine finds an adapter's text, with it and without, in nats a token.

    ``exact`` is what transformers computes in float32 of the same weights, unpacked and with the adapter added to them;
    ``off`` is the mean distance of the engine's tokens from its.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [json.loads(line)["text"] for line in ITS_TEXT.read_text().splitlines()[:8]]
    prompts = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    engine = LLM(
        str(model), dtype="bfloat16", enforce_eager=True, max_model_len=256, enable_lora=True, max_lora_rank=8,
        lora_target_modules=sorted(json.loads((ADAPTER / "adapter_config.json").read_text())["target_modules"]),
        worker_cls="slipway_kernels.worker.Worker",
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    exact = exactly(model, prompts)
    found = {}
    for name, lora in (("with", LoRARequest("adapter", 1, str(ADAPTER))), ("without", None)):
        told = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, lora_request=lora, use_tqdm=False)
        found[name] = np.array(
            [
                places[token].logprob
                for each in told
                for token, places in zip(each.prompt_token_ids[1:], each.prompt_logprobs[1:], strict=True)
            ]
        )
    return {
        "exact": float(-exact.mean()),
        **{name: float(-scores.mean()) for name, scores in found.items()},
        "off": float(np.abs(found["with"] - exact).mean()),
    }


def exactly(model: Path, prompts: list[list[int]]) -> np.ndarray:
    """The log-likelihood of each token after the first, of the unpacked weights with the adapter, in float32."""
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())["quantization_config"]
    adapter = load_file(ADAPTER / "adapter_model.safetensors")
    told = json.loads((ADAPTER / "adapter_config.json").read_text())
    reference = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    weights = reference.state_dict()
    for stem in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {part: tensors[f"{stem}.{part}"].numpy() for part in ("qweight", "qzeros", "scales")}
        added = [adapter[f"base_model.model.{stem}.lora_{side}.weight"].float() for side in "BA"]
        unpacked = torch.from_numpy(packed.unpack_linear(parts, config)).float()
        weights[f"{stem}.weight"].copy_(unpacked + told["lora_alpha"] / told["r"] * added[0] @ added[1])
    scores = []
    with torch.no_grad():
        for ids in prompts:
            logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scores.append(logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
    return np.concatenate(scores)


def refusals() -> list[str]:
    """What is said where the plugin has not run, and where it can't."""
    said = []
    with contextlib.suppress(TypeError):
        try:
            Worker()
        except RuntimeError as error:
            said.append(str(error))
    sys.modules["slipway_kernels.packed"] = None  # type: ignore[assignment]  # as if it could not be imported
    try:
        load_general_plugins()
    except ImportError as error:
        said.append(str(error))
    del sys.modules["slipway_kernels.packed"]
    plugins.plugins_loaded = False
    return said


def main() -> None:
    """Check layers, then models."""
    refused = refusals()
    load_general_plugins()
    layers = []
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "file:///tmp/check", 0, "gloo")
        initialize_model_parallel(1)
        for method, bits in (("awq", 4), ("gptq", 4), ("gptq", 8)):
            for group in GROUPS:
                layers += [packed_layer(method, bits, group, shape) for shape in SHAPES]
    model_config = ModelConfig(str(MODEL), dtype="bfloat16")
    with set_current_vllm_config(VllmConfig(model_config=model_config)):
        compressed = {folder.name: compressed_layers(folder) for folder in sorted(COMPRESSED.iterdir())}
        plain = [plain_layer(kind, shape) for kind in (torch.bfloat16, torch.float16) for shape in SHAPES]
    models = {"plain": MODEL}
    for method, bits, group in (("awq", 4, 64), ("gptq", 4, 64), ("gptq", 8, -1)):
        models[f"{method}-{bits}"] = checkpoint(Path(f"/check/{method}-{bits}"), method, bits, group)
    answers = {name: answered(folder) for name, folder in models.items()}
    with Path("/proc/self/maps").open() as maps:
        builds = sorted({Path(line.split()[-1]).name for line in maps if "/vllm/_C" in line})
    print(
        "checked:",
        json.dumps(
            {
                "layers": layers,
                "plain": plain,
                "compressed": compressed,
                "answers": answers,
                "adapted": adapted(Path("/check/awq-4")),
                "builds": builds,
                "refused": refused,
            }
        ),
    )


if __name__ == "__main__":
    main()
