"""Train the demo's two LoRA adapters and write what `models/demo/adapters/` holds besides scripts and README.

`tests` learns CPython's own unit tests, `manual` the prose of its language reference; the demo model was trained on
neither. Needs torch 2.13.0, transformers and safetensors. Seeded: the same machine, thread count and pins give the same
weights; the text is the same anywhere. Run it as `python models/demo/adapters/train.py`.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import torch  # noqa: E402 - behind the path of the demo's own modules
from measure import log_likelihoods  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 8
STEPS, BATCH, WINDOW, RATE, WARM_UP = 150, 4, 128, 4e-3, 10
BOS, EOS = 0, 1
DOCUMENT_TOKENS, DOCUMENTS = 120, 96
# Of each text, this share of files (or topics), the last in name order, is held out.
HELD_OUT = 0.1
_CODING = re.compile(rb"coding[:=](?! *utf-?8)")
_TOPICS = re.compile(r"^topics = ", re.MULTILINE)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained addition of rank `RANK`: ``W x + (ALPHA / RANK) B A x``."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        bound = 1 / math.sqrt(base.in_features)
        self.down = nn.Parameter(torch.empty(RANK, base.in_features).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        added: torch.Tensor = x @ self.down.t() @ self.up.t() * (ALPHA / RANK)
        return self.base(x) + added


def texts(name: str) -> list[str]:
    """Return the files or topics of an adapter's text, in name order."""
    library = Path(sysconfig.get_path("stdlib"))
    if name == "tests":
        files = (path.read_bytes() for path in sorted(library.glob("test/test_*.py")))
        return [raw.decode() for raw in files if not _CODING.search(raw[:200])]
    source = (library / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    topics = ast.literal_eval(_TOPICS.split(source)[-1])
    return [topics[topic] for topic in sorted(topics)]


def held_out(parts: Sequence[str], tokenizer: Tokenizer, name: str) -> list[dict[str, object]]:
    """Cut documents of whole lines, and draw `DOCUMENTS` of them."""
    cut = [
        block
        for text in parts
        for block in data.documents(text, Encoder(tokenizer), DOCUMENT_TOKENS)
        if data.is_plain(block)
    ]
    full = [block for block in cut if len(tokenizer.encode(block).ids) >= DOCUMENT_TOKENS // 2]
    chosen = random.Random(data.SEED).sample(full, DOCUMENTS)
    return [{"id": f"{name}#{number}", "text": text} for number, text in enumerate(chosen)]


class Encoder:
    """The tokenizer as `data` wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def adapt(model: LlamaForCausalLM) -> dict[str, LoraLinear]:
    """Put an adapter beside every target of the model; return them by the name of the layer."""
    generator = torch.Generator().manual_seed(data.SEED)
    model.requires_grad_(requires_grad=False)
    found = {}
    for name, module in list(model.named_modules()):
        for target in TARGETS:
            if isinstance(getattr(module, target, None), nn.Linear):
                layer = LoraLinear(getattr(module, target), generator)
                setattr(module, target, layer)
                found[f"{name}.{target}"] = layer
    return found


def train(model: LlamaForCausalLM, layers: dict[str, LoraLinear], stream: torch.Tensor, steps: int) -> None:
    """Train the adapters by AdamW on windows of the text; the rate warms up, then falls linearly to zero."""
    parameters = [p for layer in layers.values() for p in (layer.down, layer.up)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP, (steps - step) / steps)
    )
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(_batches(stream, steps)):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} of {steps}: {loss.item():.4f} nats, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def write(layers: dict[str, LoraLinear], folder: Path) -> None:
    """Write the adapter in the form of PEFT, in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, layer in layers.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.down.detach().to(torch.float16).contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.up.detach().to(torch.float16).contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "demo", "r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": sorted(TARGETS), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None, "use_dora": False,
        "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def bits_per_byte(model: LlamaForCausalLM, encoder: Encoder, documents: Sequence[dict[str, object]]) -> float:
    """Measure the model on documents, each from a BOS token on."""
    written = [str(document["text"]) for document in documents]
    nats = -sum(log_likelihoods(model, [([BOS], encoder.encode(text)) for text in written]))
    return nats / math.log(2) / sum(len(text.encode()) for text in written)


def main() -> None:
    """Train both, and write them with their held-out text and the figures."""
    torch.set_num_threads(2)
    tokenizer = Tokenizer.from_file(str(HERE.parent / "model" / "tokenizer.json"))
    encoder = Encoder(tokenizer)
    figures: dict[str, object] = {}
    for name in ("tests", "manual"):
        torch.manual_seed(data.SEED)
        parts = texts(name)
        kept = round(len(parts) * (1 - HELD_OUT))
        documents = held_out(parts[kept:], tokenizer, name)
        data.write_jsonl(HERE / f"{name}.jsonl", documents)
        stream = torch.tensor([i for text in parts[:kept] for i in (BOS, *encoder.encode(text), EOS)])
        print(f"{name}: {kept} texts, {len(stream)} tokens", flush=True)
        model = LlamaForCausalLM.from_pretrained(HERE.parent / "model", dtype=torch.float32)
        before = bits_per_byte(model.eval(), encoder, documents)
        layers = adapt(model)
        train(model, layers, stream, STEPS)
        write(layers, HERE / name)
        figures[name] = {
            "texts": len(parts),
            "texts_sha256": sha256("\0".join(parts).encode()).hexdigest(),
            "tokens": len(stream),
            "bits_per_byte_without": before,
            "bits_per_byte_with": bits_per_byte(model, encoder, documents),
            "sha256": sha256((HERE / name / "adapter_model.safetensors").read_bytes()).hexdigest(),
        }
        print(json.dumps(figures[name], indent=2), flush=True)
    document = {"rank": RANK, "alpha": ALPHA, "steps": STEPS, "seed": data.SEED, "torch": torch.__version__, **figures}
    (HERE / "provenance.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _batches(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield windows of `WINDOW` + 1 tokens, drawn anew for each step."""
    generator = torch.Generator().manual_seed(data.SEED)
    for _ in range(steps):
        starts = torch.randint(len(stream) - WINDOW - 1, (BATCH,), generator=generator)
        yield torch.stack([stream[start : start + WINDOW + 1] for start in starts.tolist()])


if __name__ == "__main__":
    main()
