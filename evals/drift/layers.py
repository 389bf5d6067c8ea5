"""Worker: measures the relative output error of each quantized linear layer on calibration text.

Request: as `LayersRequest` of `layer_errors` describes it. Result: `layers`, each with its `name` and its
`error`: || Y - Y' s || / || Y || in the Frobenius norm, Y the layer's output in FP16, Y' that of the unpacked weights.
Every block of the quantized network is fed what flows into FP16's, so an error is not counted again in the blocks
behind it. The scale s is the best one for each output channel: AWQ folds scales into neighbouring layers, which moves
an output and loses nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints  # type: ignore[import-not-found]  # beside this script
from slipway_counting import Counter
from slipway_worker import WorkerError, main

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from evals.drift.layer_errors import LayersRequest

Report = Callable[[str], None]
_EXPERTS = ".experts."


class Sums:
    """Sums over tokens of each output channel's squares and products, of FP16 and of the quantized layer."""

    def __init__(self) -> None:
        """Begin with sums of zero."""
        self.wanted: torch.Tensor | None = None
        self.total: list[torch.Tensor | float] = [0.0, 0.0, 0.0]

    def add(self, found: torch.Tensor) -> None:
        """Add a quantized layer's output, paired with FP16's, which came before."""
        assert self.wanted is not None  # noqa: S101 - FP16's block runs first
        ours, theirs = self.wanted.double().flatten(0, -2), found.double().flatten(0, -2)
        for number, product in enumerate((ours * ours, ours * theirs, theirs * theirs)):
            self.total[number] = self.total[number] + product.sum(dim=0)
        self.wanted = None

    def error(self) -> float:
        """Return the part of the error that no scale per channel explains, relative to FP16's output."""
        import torch

        own, both, other = (torch.as_tensor(value) for value in self.total)
        explained = both.square() / other.clamp_min(1e-30)
        return float((own - explained).clamp_min(0).sum().div(own.sum().clamp_min(1e-30)).sqrt())


def work(request: LayersRequest, report: Report) -> dict[str, object]:
    """Measure every packed layer.

    Raises:
        WorkerError: a checkpoint that cannot be loaded or is not of the source.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # A server starts beside it: threads that wait for each other on taken cores take six times as long.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    source, checkpoint = Path(request["source"]), Path(request["checkpoint"])
    report("measuring each layer's error")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        first, second = checkpoints.read(source).eval(), checkpoints.read(checkpoint).eval()
        packed = [name for name in checkpoints.packed_layers(checkpoint) if not drafts(name, first)]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WorkerError(f"{checkpoint} cannot be held against {source}: {error}") from error
    ours, theirs = dict(first.named_modules()), dict(second.named_modules())
    stored = dict(find_module(name, ours, first) for name in packed)
    absent = sorted(stored[name] for name in stored.keys() - ours.keys())
    if absent:
        raise WorkerError(f"{checkpoint} holds layers that {source} has not: {', '.join(absent[:3])}")
    sums = {name: Sums() for name in ours if name in stored}
    _watch(sums, ours, theirs)
    with torch.inference_mode(), Counter(report, "layers' errors", len(request["samples"]), "texts") as counter:
        for sample in request["samples"]:
            text = sample if isinstance(sample, str) else _rendered(sample, tokenizer, request["chat_template"])
            cut = {"truncation": True, "max_length": request["max_tokens"]}
            tokens = tokenizer(text, return_tensors="pt", add_special_tokens=text is sample, **cut)
            if tokens["input_ids"].shape[1]:
                first(input_ids=tokens["input_ids"], use_cache=False)
            counter.add()
    return {"layers": [{"name": stored[name], "error": each.error()} for name, each in sums.items()]}


def _rendered(messages: list[dict[str, str]], tokenizer: Any, template: str | None) -> str:  # noqa: ANN401 - transformers'
    """A conversation through the chat template, which writes the special tokens itself."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (TemplateError, ValueError) as error:
        raise WorkerError(f"the chat template can't render a conversation of the calibration data: {error}") from error


def _watch(sums: Mapping[str, Sums], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Run each quantized block after FP16's, on the same input, and add up the outputs of both layers."""

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: setattr(sums[name], "wanted", output)

    def count(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: sums[name].add(output)

    def follow(name: str) -> Callable[..., None]:
        return lambda _module, inputs, named, _output: theirs[name](*inputs, **named)

    for name in sums:
        ours[name].register_forward_hook(keep(name))
        theirs[name].register_forward_hook(count(name))
    for name in {_block(name) for name in sums}:
        ours[name].register_forward_hook(follow(name), with_kwargs=True)


def drafts(stored: str, network: PreTrainedModel) -> bool:
    """Whether a stored layer predicts further tokens (DeepSeek V3, Qwen 3.5): transformers loads none of these."""
    number = next((int(part) for part in stored.split(".") if part.isdecimal()), 0)
    return ".mtp." in f".{stored}" or number >= network.config.get_text_config().num_hidden_layers


def find_module(stored: str, modules: Mapping[str, Any], network: PreTrainedModel) -> tuple[str, str]:
    """Return the module that computes a stored layer, and the name to show.

    Transformers 5 has the experts of a block in one module, whatever its name is in the files: they count as one.
    """
    name = stored if stored in modules else _in_decoder(stored, network)
    above, experts, _ = stored.partition(_EXPERTS)
    if name in modules or not experts:
        return name, stored
    together = [each for each in modules if each.startswith(f"{_block(name)}.") and f"{each}.".endswith(_EXPERTS)]
    return (together[0], f"{above}{experts}".removesuffix(".")) if len(together) == 1 else (name, stored)


def _in_decoder(stored: str, network: PreTrainedModel) -> str:
    """Return the module of a layer that is stored under another name, as those of Gemma 3's decoder are."""
    decoder = network.get_decoder()
    name = next(name for name, module in network.named_modules() if module is decoder)
    parts = stored.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join([name, *parts[number - 1 :]])


def _block(name: str) -> str:
    """Return the block that a layer is in: up to the first number of its name (``model.layers.3``)."""
    parts = name.split(".")
    place = next((number for number, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: place + 1])


if __name__ == "__main__":
    main(work)
