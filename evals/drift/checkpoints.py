"""Loads a checkpoint, packed layers unpacked, into lm-eval's HF backend, for workers that ask no server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import images  # type: ignore[import-not-found]  # beside this script
from packed import unpack_experts, unpack_linear  # type: ignore[import-not-found]  # beside this script
from slipway_worker import WorkerError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

    from evals.drift.asking import AnswersRequest

# A tensor that each quantized layer has and no other: of AWQ and GPTQ, of compressed-tensors, and of DeepSeek V3.
_MARKS = ("qweight", "weight_scale", "weight_scale_inv")
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape"),
    *("weight_global_scale", "input_global_scale"),
)
# The end of the name of experts that are fused into one tensor, as GPT-OSS has them.
_BLOCKS = "_blocks"
# Transformers' class of models with a tower, by the key of config.json that describes it.
_KINDS = {"vision_config": "AutoModelForImageTextToText", "audio_config": "AutoModelForMultimodalLM"}
_CACHE_SCALES = (".k_scale", ".v_scale")
BATCH_SIZE = 64
# On a CPU float32 is both exact and the fastest; a GPU holds large models in half precision only.
DTYPES = {"cpu": "float32", "cuda": "float16"}


def load(folder: Path, request: AnswersRequest, report: Callable[[str], None]) -> tuple[HFLM, dict[str, str | int]]:
    """Load the checkpoint into lm-eval's HF backend; also return what identifies the engine.

    Raises:
        WorkerError: if the folder holds no checkpoint that this environment can load.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    device = request.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    image_processor = _processor(folder) if images.are_asked(request["tasks"]) else None
    report("loading the checkpoint")
    dtype = DTYPES[device]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = read(folder, dtype).to(device=device, dtype=getattr(torch, dtype)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WorkerError(f"the checkpoint in {folder} cannot be loaded: {error}") from error
    model = _backend(report)(pretrained=network, tokenizer=tokenizer, batch_size=BATCH_SIZE, device=device)
    model.processor = image_processor
    # Two machines' answers are paired only where the same kernels computed them.
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    engine = {"name": "hf", "device": device, "processor": processor, "dtype": dtype, "batch_size": BATCH_SIZE}
    return model, {**engine, **{name: metadata.version(name) for name in ("transformers", "torch")}}


def read(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """Return the network of a checkpoint; of a quantized one with plain linear layers that hold the unpacked weights.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: it cannot be loaded, or its packed format is unknown.
    """
    import torch
    import transformers

    configuration = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in configuration:
        return _unpacked(folder, configuration["quantization_config"])
    kind = next((kind for tower, kind in _KINDS.items() if tower in configuration), "AutoModelForCausalLM")
    found: PreTrainedModel = getattr(transformers, kind).from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
    )
    return found


def packed_layers(folder: Path) -> set[str]:
    """Return the names of a checkpoint's packed layers, from its files' headers alone."""
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            names += tensors.keys()
    return {module for module, _, last in (name.rpartition(".") for name in names) if last in _MARKS}


def _unpacked_weights(folder: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """Return a quantized checkpoint's tensors, packed layers as plain float32 weights.

    Raises:
        FormatError: if the packed format is unknown.
        KeyError: if a packed layer lacks a tensor.
        WorkerError: nothing in it is packed.
    """
    import torch
    from safetensors.torch import load_file

    tensors = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    packed, fused = packed_layers(folder), [name for name in tensors if name.endswith(_BLOCKS)]
    if not packed and not fused:
        raise WorkerError(f"{folder} says that it is quantized, but no packed layer is in it")
    for layer in sorted(packed):
        parts = {part: tensors.pop(f"{layer}.{part}", None) for part in _PARTS}
        arrays = {
            part: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            for part, tensor in parts.items()
            if tensor is not None
        }
        tensors[f"{layer}.weight"] = torch.from_numpy(unpack_linear(arrays, quantization, layer))
    for name in fused:
        experts = name.removesuffix(_BLOCKS)
        blocks, scales = tensors.pop(name), tensors.pop(f"{experts}_scales")
        tensors[experts] = torch.from_numpy(unpack_experts(blocks.numpy(), scales.numpy()))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_CACHE_SCALES)}


def _unpacked(folder: Path, quantization: dict[str, Any]) -> PreTrainedModel:
    import torch
    import transformers

    tensors = _unpacked_weights(folder, quantization)
    configuration = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    del configuration.quantization_config
    architecture = getattr(transformers, configuration.architectures[0])
    network: PreTrainedModel = architecture.from_pretrained(
        None, config=configuration, state_dict=tensors, dtype=torch.float32
    )
    return network


def _processor(folder: Path) -> Any:  # noqa: ANN401 - one of transformers' many
    """Return what turns a conversation with images into the network's input.

    Raises:
        WorkerError: there is none that works in this environment.
    """
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        told = " ".join(str(error).split())[:300]
        raise WorkerError(f"the processor of images in {folder} cannot be loaded: {told}") from error


def _backend(report: Callable[[str], None]) -> type[HFLM]:
    """Return lm-eval's HF backend with the methods that divergence and images need; it reports its progress."""
    import torch
    from lm_eval.models import huggingface
    from lm_eval.models.huggingface import HFLM

    huggingface.tqdm = _bars(report)

    class Backend(HFLM):  # type: ignore[misc]  # lm-eval's classes are untyped here
        """Lm-eval's HF backend, which also returns the likeliest tokens, and takes images."""

        processor: Any = None

        def score_letters(self, image: str, text: str, letters: Sequence[str]) -> list[float]:
            """Return each letter's log-probability as the first token of the reply to an image and a text."""
            from jinja2 import TemplateError
            from PIL import Image

            try:
                shown = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
                parts = [{"type": "image", "image": shown}, {"type": "text", "text": text}]
                wanted = images.tokens(self.tokenizer, letters)
                inputs = self.processor.apply_chat_template(
                    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
                    return_tensors="pt",
                )  # fmt: skip
            except (OSError, ValueError, TypeError, TemplateError) as error:
                raise WorkerError(f"the model can't be shown an image: {error}") from error
            with torch.no_grad():
                logits = self.model(**inputs.to(self.device, self.model.dtype)).logits[0, -1]
            scores: list[float] = torch.log_softmax(logits.float(), dim=-1)[wanted].tolist()
            return scores

        def top(self, prompts: Sequence[list[int]], count: int) -> list[list[tuple[list[int], list[float]]]]:
            """Return for each prompt, at each place but the first, the likeliest tokens and their log-probabilities."""
            found = []
            for prompt in prompts:
                logits = self._model_call(torch.tensor([prompt], device=self.device))[0, :-1]
                values, tokens = torch.log_softmax(logits.float(), dim=-1).topk(count, dim=-1)
                found.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))
            return found

    return Backend


def _bars(report: Callable[[str], None]) -> type[Any]:
    """Return a class in place of `tqdm`'s progress bars that reports a count now and then."""
    from slipway_counting import Counter

    class Bar:
        def __init__(
            self, iterable: Sequence[Any] = (), *, total: int = 0, disable: bool = False, desc: str = "", **_: object
        ) -> None:
            self._iterable = iterable
            hidden = disable or not (total or len(iterable))
            self._counter = None if hidden else Counter(report, desc, total or len(iterable), "prompts")

        def __iter__(self) -> Iterator[Any]:
            for each in self._iterable:
                yield each
                self.update()

        def update(self, amount: int = 1) -> None:
            if self._counter is not None:
                self._counter.add(amount)

        def close(self) -> None:
            pass

    return Bar
