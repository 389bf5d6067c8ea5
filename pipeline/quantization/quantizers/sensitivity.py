"""Worker: measures the loss of each group of layers in each format, for `method: mixed`, and later that of the result.

The loss of a format is the divergence KL(p || q) of the next-token distributions p of the source and q of the model
with only these layers quantized, in nats a token, to second order: half the Fisher information of the change,

    1/2 E[(sum over positions t, layers l of <g_lt, dy_lt>)**2] / tokens,

with g_lt the gradient of log p(y) by the output of layer l at position t, the next tokens y drawn from p itself, and
dy_lt = Q(W) q(x) - W x the change of that output by rounding the weights, and the inputs where the format rounds these
too. The Fisher information is this divergence's Hessian (Martens, arXiv:1412.1193); that a mixture loses about the sum
of what its layers lose is HAWQ-V2's assumption (arXiv:1911.03852). Weights are rounded to the nearest here; GPTQ does
better afterwards, in every format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration_blocks import calibration_blocks  # type: ignore[import-not-found]
from compressed_tensors_config import layer_settings  # type: ignore[import-not-found]  # beside this script
from quantizer_common import prepare  # type: ignore[import-not-found]
from slipway_worker import Report, main

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from pipeline.quantization.mixture import FormatSettings, SensitivityRequest

# More text changes the losses little and costs time in proportion.
_TOKENS, _DRAWS = 16_384, 8
_E4M3_LARGEST = 448.0
Settings = Mapping[str, Any]


def work(request: SensitivityRequest, report: Report) -> dict[str, object]:
    """Give ``losses`` by group and format; or, of a finished ``checkpoint``, ``losses`` by group and the ``total``."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    device = prepare(request)
    import torch

    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    blocks = calibration_blocks(request, report).blocks[: max(1, _TOKENS // request["max_tokens"])]
    tokens = [torch.tensor(block, device=device) for block in blocks]
    report(f"loading the model on {device}")
    model = _load(Path(request["source"]), device)
    groups = request["groups"]
    if request["checkpoint"] is None:
        return {"losses": _Predictions(model, groups, request["formats"]).of(tokens, report)}
    return _measure(model, _load(Path(request["checkpoint"]), device), groups, tokens, report)


def _load(folder: Path, device: str) -> Module:
    """A model without dropout; on a CPU in float32, which every one multiplies. Packed weights are unpacked."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(run_compressed=False) if _is_quantized(folder) else None
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if device == "cpu" else "auto",
        local_files_only=True,
        use_safetensors=True,
        quantization_config=config,
    )
    found: Module = model.to(device).eval().requires_grad_(requires_grad=False)
    return found


def _is_quantized(folder: Path) -> bool:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "quantization_config", None) is not None


class _Predictions:
    """Sums up, while gradients flow back, what each format would change in each group: a score for each draw of y."""

    def __init__(
        self, model: Module, groups: Mapping[str, Sequence[str]], formats: Mapping[str, FormatSettings]
    ) -> None:
        self._model = model
        self._settings = {
            name: layer_settings(each["method"], each["bits"], each["group_size"]) for name, each in formats.items()
        }
        self._scores: dict[tuple[str, str], Tensor] = {}
        self._sums: dict[tuple[str, str], float] = {}
        self._groups = groups
        for group, layers in groups.items():
            for layer in layers:
                model.get_submodule(layer).register_forward_hook(self._watch(group))

    def of(self, tokens: list[Tensor], report: Report) -> dict[str, dict[str, float]]:
        """The loss of each format in each group."""
        import torch

        embedding = self._model.get_input_embeddings()
        for number, block in enumerate(tokens, 1):
            report(f"measuring: block {number} of {len(tokens)}")
            # The same tokens in every row of the batch, each row with next tokens of its own.
            states = embedding(block.expand(_DRAWS, -1)).requires_grad_()
            likelihoods = self._model(inputs_embeds=states, use_cache=False).logits.float().log_softmax(-1)
            chosen = torch.multinomial(likelihoods[0].detach().exp(), _DRAWS, replacement=True)
            torch.autograd.grad(likelihoods.gather(2, chosen.T[:, :, None]).sum(), states)
            for key, score in self._scores.items():
                self._sums[key] = self._sums.get(key, 0.0) + float((score**2).sum())
            self._scores.clear()
        count = 2 * _DRAWS * sum(map(len, tokens))
        return {
            group: {name: self._sums[group, name] / count for name in self._settings if (group, name) in self._sums}
            for group in self._groups
        }

    def _watch(self, group: str) -> Callable[..., None]:
        def forward(module: Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            states, weight = args[0][:1].detach(), module.weight.detach()
            output.register_hook(lambda gradient: self._add(group, states, weight, gradient))

        return forward

    def _add(self, group: str, states: Tensor, weight: Tensor, gradient: Tensor) -> None:
        import torch

        exact = torch.nn.functional.linear(states, weight)
        for name, (weights, inputs) in self._settings.items():
            if weight.shape[1] % max(1, weights.get("group_size", 1)):
                continue
            rounded = states if inputs is None else _rounded(states, inputs)
            change = torch.nn.functional.linear(rounded, _rounded(weight, weights)) - exact
            score = (gradient * change).sum(tuple(range(1, gradient.dim())), dtype=torch.float64)
            self._scores[group, name] = self._scores.get((group, name), 0.0) + score


def _rounded(values: Tensor, settings: Settings) -> Tensor:
    """Numbers rounded to the nearest that a format holds, with a scale for each row or for each of its groups."""
    import torch

    parts = values.float().unflatten(-1, (-1, settings.get("group_size", values.shape[-1])))
    largest = parts.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if settings["type"] == "float":
        scale = largest / _E4M3_LARGEST
        rounded = (parts / scale).to(torch.float8_e4m3fn).float()
    else:
        half = 2 ** (settings["num_bits"] - 1)
        scale = largest / (half - 0.5)
        rounded = (parts / scale).round().clamp(-half, half - 1)
    return (rounded * scale).flatten(-2).to(values.dtype)


def _measure(
    model: Module, quantized: Module, groups: Mapping[str, Sequence[str]], tokens: list[Tensor], report: Report
) -> dict[str, object]:
    """The divergence with each group's layers taken from the checkpoint, and with all of them."""
    import torch

    losses, total, count = dict.fromkeys(groups, 0.0), 0.0, sum(map(len, tokens))
    with torch.no_grad():
        for number, block in enumerate(tokens, 1):
            report(f"measuring: block {number} of {len(tokens)}")
            exact = _log_probabilities(model, block)
            total += _divergence(exact, quantized, block) / count
            for group, layers in groups.items():
                with _swapped(model, quantized, layers):
                    losses[group] += _divergence(exact, model, block) / count
    return {"losses": losses, "total": total}


@contextmanager
def _swapped(model: Module, quantized: Module, layers: Sequence[str]) -> Iterator[None]:
    """Let some layers of ``model`` be those of ``quantized`` for a while."""
    own = {name: model.get_submodule(name) for name in layers}
    for name in layers:
        model.set_submodule(name, quantized.get_submodule(name))
    try:
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def _log_probabilities(model: Module, block: Tensor) -> Tensor:
    found: Tensor = model(input_ids=block[None], use_cache=False).logits[0].float().log_softmax(-1)
    return found


def _divergence(exact: Tensor, model: Module, block: Tensor) -> float:
    """KL(exact || model), in nats, summed over a block's tokens."""
    import torch

    found = _log_probabilities(model, block)
    return float(torch.nn.functional.kl_div(found, exact, reduction="sum", log_target=True))


if __name__ == "__main__":
    main(work)
