"""Make a vision-language model of two layers that answers by chat: Idefics 3's, with its processor.

Its weights are random but for the letters' rows of its head. They are fitted to questions about images, so that it
answers others of the kind right; nothing else is trained. The architecture is one of those that accept images without
torchvision, which neither the worker's environment nor the runtime for CPUs has. Run it with the lm-eval worker's
environment, the checkout on its path::

    PYTHONPATH=. PYTHON tests/make_vision_model.py TOKENIZER ROWS DIRECTORY

TOKENIZER is the folder of a tokenizer, to which the tokens of images are added; ROWS is a file of the task `images`.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
)

from evals.drift import images

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
    source, data, folder = sys.argv[1:]
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
    model = Idefics3ForConditionalGeneration(config).eval()
    side = {"longest_edge": _SIDE}
    pictures = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=_TOKENS, chat_template=_TEMPLATE)
    fit(model, processor, [json.loads(line) for line in Path(data).read_text().splitlines()])
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (Path(folder) / "model.safetensors").chmod(0o644)  # a server runs as another user


def fit(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, rows: list[dict[str, Any]]) -> None:
    """Fit the letters' rows of the head to the right answers by ridge regression on what flows into it."""
    flowing = []
    for row in rows:
        shown = Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")
        parts = [{"type": "image", "image": shown}, {"type": "text", "text": images.prompt(row)}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            flowing.append(model.model(**inputs).last_hidden_state[0, -1])
    found = torch.stack(flowing)
    right = torch.nn.functional.one_hot(torch.tensor([row["answer"] for row in rows])) * 4.0 - 1
    fitted = torch.linalg.solve(found.T @ found + 0.1 * torch.eye(found.shape[1]), found.T @ right)
    model.lm_head.weight.data[images.tokens(processor.tokenizer, "ABCD")] = fitted.T


if __name__ == "__main__":
    main()
