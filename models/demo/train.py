"""Train the demo model and write everything `models/demo/` holds besides the scripts: `python models/demo/train.py`.

Needs torch 2.13.0, transformers, tokenizers and safetensors. Ten minutes on two CPU cores. Seeded: the same
machine, thread count and pins give the same weights; the text and every set cut from it are the same anywhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import data
import measure
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
BOS, EOS, PAD = range(3)
ARCHITECTURE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
STEPS, BATCH, WINDOW, WARM_UP, COOL_DOWN = 1200, 8, 256, 50, 400
MUON_RATE, ADAMW_RATE = 0.012, 0.002


class Encoder:
    """The tokenizer as `data` and `measure` want it: plain lists of ids, no special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE of the architecture's vocabulary on `texts`; special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(model: LlamaForCausalLM, stream: torch.Tensor, steps: int) -> None:
    """Train in place on windows of `stream`: Muon for the layers' matrices, AdamW for the rest.

    The learning rates warm up over `WARM_UP` steps, stay flat, and fall linearly to zero over the last `COOL_DOWN`.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step, steps)) for each in optimizers]
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(_batches(stream, steps)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step} of {steps}: {loss.item():.4f} nats a token, {seconds:.0f} s", flush=True)


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in fp16 and the JSON files that transformers 4.51 and later and vLLM read."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private; a container's user must read it
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **ARCHITECTURE,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "mlp_bias": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "torch_dtype": "float16",
            "use_cache": True,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "special_tokens_map.json", dict(SPECIAL))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(index): {"content": token, **plain} for index, token in enumerate(SPECIAL.values())}
    _write_json(
        folder / "tokenizer_config.json",
        {
            **SPECIAL,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "model_max_length": ARCHITECTURE["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def main() -> None:
    """Train, cut the sets, measure, and write it all with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: beside this script)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    parser.add_argument("--keep-model", action="store_true", help="train nothing: cut and measure with the model there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.manual_seed(data.SEED)
    torch.set_num_threads(2)
    split = data.standard_library()
    if arguments.keep_model:
        tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer([source.text for source in split.training])
    encoder = Encoder(tokenizer)
    stream = torch.tensor([i for source in split.training for i in (BOS, *encoder.encode(source.text), EOS)])
    print(f"{len(split.training)} files, {len(stream)} tokens", flush=True)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, rms_norm_eps=1e-6, attn_implementation="sdpa"))
    untrained = copy.deepcopy(model)
    if not arguments.keep_model:
        train(model, stream, arguments.steps)
        write_model(model, tokenizer, out / "model")
    model.load_state_dict(load_file(out / "model" / "model.safetensors"))  # measured as it is kept, in fp16
    documents, items = data.held_out_documents(split, encoder), data.cloze(split, encoder)
    data.write_jsonl(out / "calibration.jsonl", data.calibration(split, encoder))
    data.write_jsonl(out / "heldout.jsonl", documents)
    data.write_jsonl(out / "cloze.jsonl", items)
    figures = {
        "untrained": measure.figures(untrained, encoder, BOS, documents, items),
        "trained": measure.figures(model, encoder, BOS, documents, items),
    }
    print(json.dumps(figures, indent=2), flush=True)
    training = {
        "steps": arguments.steps,
        "batch": BATCH,
        "window": WINDOW,
        "seed": data.SEED,
        "muon_rate": MUON_RATE,
        "adamw_rate": ADAMW_RATE,
        "tokens_in_text": len(stream),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    _write_json(out / "provenance.json", _provenance(split, training, figures, out))


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / min(COOL_DOWN, steps))


def _batches(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield windows of `WINDOW` + 1 tokens without replacement, shuffled anew (and shifted) every pass."""
    generator = torch.Generator().manual_seed(data.SEED)
    queue: list[torch.Tensor] = []
    for _ in range(steps):
        if len(queue) < BATCH:
            shift = int(torch.randint(WINDOW, (1,), generator=generator))
            windows = stream[shift : shift + (len(stream) - shift) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
            queue = list(windows[torch.randperm(len(windows), generator=generator)])
        yield torch.stack([queue.pop() for _ in range(BATCH)])


def _provenance(
    split: data.Split, training: dict[str, object], figures: dict[str, dict[str, float]], out: Path
) -> dict[str, object]:
    made = sorted([*out.glob("*.jsonl"), *(out / "model").iterdir()])
    return {
        "text": {
            "source": f"CPython {platform.python_version()} standard library",
            "licence": "PSF-2.0",
            "sha256": split.digest(),
            "training_files": len(split.training),
            "held_out_files": [source.path for source in split.held_out],
        },
        "training": training,
        "figures": figures,
        "files": {path.relative_to(out).as_posix(): sha256(path.read_bytes()).hexdigest() for path in made},
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
