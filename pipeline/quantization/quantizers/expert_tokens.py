"""How many calibration tokens reach each expert, counted by hooks while a quantizer runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class ExpertTokens:
    """Counts, for each module named ``experts``, the tokens that are sent to each of them.

    Quantizers run a layer several times over the same text, so only the first ``tokens`` tokens of each layer count.
    transformers 5 calls ``experts`` once with the experts' numbers for each token; older versions, and what splits
    experts for a quantizer, call each expert with its own tokens. Models that do neither (Llama 4 sends every token
    through every expert) are not counted.
    """

    def __init__(self, model: Module, tokens: int) -> None:
        """Hook the experts of ``model``, which ``tokens`` calibration tokens will go through."""
        self._tokens = tokens
        self._seen: dict[str, int] = {}
        self._counts: dict[str, list[int]] = {}
        self._numbered: set[str] = set()  # those that are called with the experts' numbers
        modules = dict(model.named_modules())
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            experts = [child for number, child in module.named_children() if number.isdecimal()]
            count = len(experts) or getattr(module, "num_experts", 0)
            if last != "experts" or not count:
                continue
            self._seen[name], self._counts[name] = 0, [0] * count
            modules[parent].register_forward_pre_hook(self._pass(name), with_kwargs=True)
            module.register_forward_pre_hook(self._chosen(name), with_kwargs=True)
            for number, expert in enumerate(experts):
                expert.register_forward_pre_hook(self._sent(name, number), with_kwargs=True)

    def found(self) -> dict[str, list[int]]:
        """Tokens for each expert, by the name of the experts' module; modules that were never called are left out."""
        return {name: counts for name, counts in self._counts.items() if any(counts)}

    def _counting(self, name: str) -> bool:
        return self._seen[name] <= self._tokens

    def _pass(self, name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(_module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            states = _first(args, kwargs)
            if states is not None:
                self._seen[name] += states.numel() // states.shape[-1]

        return hook

    def _chosen(self, name: str) -> Any:  # noqa: ANN401 - a hook
        """``experts(states, numbers, weights)``: the experts' numbers are the integers among the arguments."""

        def hook(_module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            import torch

            counts = self._counts[name]
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype in {torch.int32, torch.int64}:
                    self._numbered.add(name)
                    if self._counting(name):
                        found = torch.bincount(value.flatten().clamp(max=len(counts)), minlength=len(counts))
                        self._counts[name] = [a + b for a, b in zip(counts, found.tolist(), strict=False)]
                    return

        return hook

    def _sent(self, name: str, number: int) -> Any:  # noqa: ANN401 - a hook
        """``experts[number](states)``: every row is a token."""

        def hook(_module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            states = _first(args, kwargs)
            if states is not None and name not in self._numbered and self._counting(name):
                self._counts[name][number] += states.numel() // states.shape[-1]

        return hook


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states that a module is called with."""
    import torch

    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
