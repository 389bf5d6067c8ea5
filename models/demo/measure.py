"""What the demo model knows: likelihood of held-out documents and accuracy on the cloze, without any harness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import data
import torch
from transformers import LlamaForCausalLM

_BATCH = 64


def figures(
    model: LlamaForCausalLM,
    encoder: data.Tokenizer,
    bos: int,
    documents: Sequence[Mapping[str, object]],
    items: Sequence[Mapping[str, object]],
) -> dict[str, float]:
    """Return nats per token, bits per byte (UTF-8) and perplexity over `documents`, and accuracy over `items`.

    A document is scored from a BOS token on. A cloze choice is scored by the sum of its tokens' log-likelihood after
    its context; the highest sum answers.
    """
    model.eval()
    texts = [str(document["text"]) for document in documents]
    sequences = [encoder.encode(text) for text in texts]
    nats = -sum(log_likelihoods(model, [([bos], ids) for ids in sequences]))
    tokens, size = sum(map(len, sequences)), sum(len(text.encode()) for text in texts)
    right = sum(_chosen(model, encoder, bos, items))
    return {
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / tokens),
        "cloze_accuracy": right / len(items),
        "documents": len(texts),
        "items": len(items),
    }


@torch.no_grad()
def log_likelihoods(model: LlamaForCausalLM, requests: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Return the log-likelihood, in nats, of each continuation after its context, in the order given."""
    order = sorted(range(len(requests)), key=lambda i: sum(map(len, requests[i])))
    results = [0.0] * len(requests)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        rows = [torch.tensor([*requests[i][0], *requests[i][1]]) for i in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # Padding stands on the right and attention is causal, so no mask is needed for the positions that are read.
        logits = model(input_ids=padded[:, :-1], use_cache=False).logits.float()
        scores = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")
        for row, i in enumerate(chosen):
            context, continuation = requests[i]
            first = len(context) - 1
            results[i] = float(scores[row, first : first + len(continuation)].double().sum())
    return results


def _chosen(
    model: LlamaForCausalLM, encoder: data.Tokenizer, bos: int, items: Sequence[Mapping[str, object]]
) -> list[bool]:
    requests = []
    for item in items:
        context = str(item["context"])
        choices = item["choices"]
        if not isinstance(choices, list):
            raise TypeError(f"`choices` of {item['id']!r} is no list")
        before = encoder.encode(context)
        requests += [([bos, *before], encoder.encode(context + choice)[len(before) :]) for choice in choices]
    scores = torch.tensor(log_likelihoods(model, requests)).view(len(items), -1)
    answers = torch.tensor([item["answer"] for item in items])
    return [bool(hit) for hit in scores.argmax(dim=1) == answers]
