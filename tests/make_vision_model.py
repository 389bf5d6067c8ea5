"""Make a vision-language model of two layers with random weights: Idefics 3's, with its processor and a chat template.

Of the architectures that accept images it is one that runs without torchvision, which the worker's environment and the
runtime for CPUs do not have. Run it with the lm-eval worker's environment::

    PYTHON tests/make_vision_model.py TOKENIZER DIRECTORY

TOKENIZER is the folder of a tokenizer, to which the tokens of images are added.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
)

_IMAGE, _WRAPPER = "<image>", "<fake_token_around_image>"
_ADDED = [_WRAPPER, _IMAGE, "<global-img>", "<end_of_utterance>"]
# Six patches a side, of which two by two become a token: one for each cell of the built-in pictures.
_SIDE, _PATCH, _SCALE = 84, 14, 2
_TOKENS = (_SIDE // _PATCH // _SCALE) ** 2
_TEMPLATE = (
    "{% for message in messages %}<|bos|>{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)


def main() -> None:
    """Write the model, its tokenizer and its processor."""
    source, folder = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": _ADDED})
    config = Idefics3Config(
        text_config={
            "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "vocab_size": -(-len(tokenizer) // 64) * 64, "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": _SIDE, "patch_size": _PATCH,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE), scale_factor=_SCALE, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).to(torch.float16).save_pretrained(folder)
    side = {"longest_edge": _SIDE}
    pictures = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    Idefics3Processor(pictures, tokenizer, image_seq_len=_TOKENS, chat_template=_TEMPLATE).save_pretrained(folder)
    (Path(folder) / "model.safetensors").chmod(0o644)  # a server runs as another user


if __name__ == "__main__":
    main()
