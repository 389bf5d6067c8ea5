"""lm-eval's language model over a server that speaks OpenAI's completions API: vLLM, in the image that ships.

Beside the worker that uses it. The requests are those of lm-eval's own `local-completions`; what differs is how many
are under way. That asks rolling likelihood a document at a time, encodes every context anew for each of its choices,
and by default sends one prompt a request.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

PROMPTS = 32  # a request
CONNECTIONS = 4
TIMEOUT_SECONDS = 600.0
_LIKELIEST = 20  # log-probabilities of a place that vLLM tells by default, at most
_CLAMPED = -9999.0  # how vLLM writes a log-probability that is no finite number

Scored = tuple[float, bool]


class ServerError(Exception):
    """The server refused a request or stopped; the message is one line."""


def wait_for_address(path: Path, patience: float = 3600.0) -> str:
    """Return the URL that appears in a file once the server is healthy.

    Raises:
        ServerError: the file says that the server did not start, or nothing for too long.
    """
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise ServerError("no server was announced")
        time.sleep(0.05)
    address = path.read_text(encoding="utf-8").strip()
    if not address.startswith("http"):
        raise ServerError(address or "the server did not start")
    return address


def model(
    address: Callable[[], str],
    name: str,
    tokenizer_folder: Path,
    report: Callable[[str], None],
    chat_template: Path | None = None,
) -> TemplateLM:
    """Return the language model; ``address`` gives the server's URL, waiting for it if need be.

    ``report`` is told how many items are answered, and of prompts that are longer than what is served, and so lose
    their beginning. ``chat_template`` is a file in place of the tokenizer's own template.

    Raises:
        OSError, ValueError: the folder holds no tokenizer, or the template can't be read.
    """
    import images  # type: ignore[import-not-found]  # beside this script
    import transformers
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from slipway_counting import Counter

    class Served(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped here
        """Log-likelihoods and greedy answers of the served model."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
            if chat_template is not None:
                self.tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
            self._encoded: dict[str, list[int]] = {}
            self._items: list[Any] = []
            self.asking = "asking"
            self.longest = 0
            self._rank, self._world_size = 0, 1

        @cached_property
        def max_length(self) -> int:
            """The most tokens of a prompt: the served context less one, since the server always generates a token."""
            # Adapters are listed too, without a length of their own.
            served = next(card for card in self._ask("/v1/models")["data"] if card["max_model_len"])
            return int(served["max_model_len"]) - 1

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            begin = self.tokenizer.bos_token_id
            return int(begin if begin is not None else self.tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            # The choices of an item share their context: each text is encoded once.
            if string not in self._encoded:
                self._encoded[string] = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
            return self._encoded[string]

        def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Scored]:
            self._items = [(request.task_name, request.doc_id) for request in requests]  # a group has several tasks
            scored: list[Scored] = super().loglikelihood(requests, disable_tqdm)
            return scored

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: object) -> list[Scored]:
            prompts = []
            for _, context, continuation in requests:
                self._needs(len(context) + len(continuation) + 1)
                whole = (context + continuation)[-self.max_length :]
                prompts.append((whole, max(1, len(whole) - len(continuation))))
            self._tell_cut(
                sum(len(context) + len(continuation) > self.max_length for _, context, continuation in requests)
            )
            items, self._items = self._items or list(range(len(prompts))), []
            return self._counted(prompts, self._score, items)

        def _needs(self, tokens: int) -> None:
            """Note how many tokens a prompt and its answer take."""
            self.longest = max(self.longest, tokens)

        def _counted(
            self, prompts: Sequence[tuple[list[int], int]], ask: Callable[..., list[Any]], items: Sequence[Any]
        ) -> list[Any]:
            """Ask `_in_order`, and report how many of the prompts' items are answered."""
            with Counter(report, self.asking, len(set(items)), "items") as counter:
                return _in_order(prompts, ask, Whole(items, counter.add))

        def _tell_cut(self, prompts: int) -> None:
            if prompts:
                report(
                    f"{prompts} prompts are longer than the {self.max_length} tokens served: their start is left out"
                )

        def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
            del disable_tqdm
            windows, owners = [], []
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                self._needs(len(tokens) + 2)
                rolling = utils.get_rolling_token_windows(
                    token_list=tokens, prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1, context_len=1,
                )  # fmt: skip
                for window in map(utils.make_disjoint_window, rolling):
                    windows.append((None, *window))
                    owners.append(number)
            totals = [0.0] * len(requests)
            self._items = owners
            for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[number] += score
            return totals

        def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
            del disable_tqdm

            def write(request: Instance) -> tuple[str, bool]:
                text, options = request.args[0], dict(request.args[1])
                options.pop("do_sample", None)
                most = int(options.pop("max_tokens", options.pop("max_gen_toks", 256)))
                until = options.pop("until", None) or []
                stop = [until] if isinstance(until, str) else list(until)
                whole, room = self.tok_encode(text), self.max_length - most
                self._needs(len(whole) + most + 1)
                if room < 1:
                    raise ServerError(f"{most} tokens are to be written, and {self.max_length} are served in all")
                options.setdefault("temperature", 0)
                body = {"prompt": whole[-room:], "max_tokens": most, "stop": stop, "seed": 1234, **options}
                return str(self._ask("/v1/completions", body)["choices"][0]["text"] or ""), len(whole) > room

            written = []
            with ThreadPoolExecutor(PROMPTS) as pool, Counter(report, self.asking, len(requests), "items") as counter:
                for each in pool.map(write, requests):
                    written.append(each)
                    counter.add()
            self._tell_cut(sum(cut for _, cut in written))
            return [text for text, _ in written]

        def chat(self, body: dict[str, Any]) -> dict[str, Any]:
            """Ask the chat API and return its reply."""
            reply = self._ask("/v1/chat/completions", body)
            self._needs(int((reply.get("usage") or {}).get("prompt_tokens") or 0) + int(body["max_tokens"]))
            return reply

        def score_letters(self, image: str, text: str, letters: Sequence[str]) -> list[float]:
            """Return each letter's log-probability as the first token of the reply to an image and a text.

            A vLLM without `logprob_token_ids` (`vllm-cuda12`'s) tells the likeliest tokens alone; another is NaN.
            """
            wanted = images.tokens(self.tokenizer, letters)
            parts = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
                {"type": "text", "text": text},
            ]
            body = {
                "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0, "seed": 1234,
                "logprobs": True, "top_logprobs": _LIKELIEST, "logprob_token_ids": wanted,
                "return_tokens_as_token_ids": True,
            }  # fmt: skip
            (first,) = self.chat(body)["choices"][0]["logprobs"]["content"]
            told = {each["token"]: each["logprob"] for each in first["top_logprobs"]}
            scores = [told.get(f"token_id:{token}", _CLAMPED) for token in wanted]
            return [score if score > _CLAMPED else float("nan") for score in scores]

        def top(self, prompts: Sequence[list[int]], count: int) -> list[list[tuple[list[int], list[float]]]]:
            """Return for each prompt, at each place but the first, the likeliest tokens and their log-probabilities."""
            self._needs(max(map(len, prompts), default=0) + 1)

            def ask(part: Sequence[tuple[list[int], int]]) -> list[list[tuple[list[int], list[float]]]]:
                choices = self._echo([tokens for tokens, _ in part], count)
                return [[_likeliest(place, count) for place in choice["top_logprobs"][1:]] for choice in choices]

            return self._counted([(tokens, 1) for tokens in prompts], ask, range(len(prompts)))

        def _score(self, part: Sequence[tuple[list[int], int]]) -> list[Scored]:
            scored = []
            choices = self._echo([tokens for tokens, _ in part], 1)
            for (_, start), choice in zip(part, choices, strict=True):
                own, best = choice["token_logprobs"][start:], choice["top_logprobs"][start:]
                finite = all(value is not None and value > _CLAMPED for value in own)
                greedy = finite and all(value == max(top.values()) for value, top in zip(own, best, strict=True))
                scored.append((sum(own) if finite else float("nan"), greedy))
            return scored

        def _echo(self, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
            body = {
                "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": count, "temperature": 0, "seed": 1234,
                "return_tokens_as_token_ids": True,
            }  # fmt: skip
            answer = self._ask("/v1/completions", body)
            return [choice["logprobs"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

        def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
            data = None if body is None else json.dumps({"model": name, **body}).encode()
            request = urllib.request.Request(  # noqa: S310 - the address of a server that was started for this
                f"{address()}{path}", data, {"Content-Type": "application/json"}
            )
            try:
                with _DIRECT.open(request, timeout=TIMEOUT_SECONDS) as answer:
                    found: dict[str, Any] = json.load(answer)
            except urllib.error.HTTPError as error:
                told = error.read(500).decode(errors="replace").strip()
                raise ServerError(f"the server answered {error.code}: {told}") from error
            except (OSError, ValueError) as error:
                raise ServerError(f"the server went away: {error}") from error
            return found

    return Served()


# Straight to the server on this machine, whatever proxy the environment names.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Whole:
    """Counts the items whose prompts are all answered; an item has one or more prompts."""

    def __init__(self, items: Sequence[Any], add: Callable[[int], None]) -> None:
        """``items`` has the item of each prompt; ``add`` is called with the number of items that were completed."""
        self._items = items
        self._left = Counts(items)
        self._add = add
        self._lock = Lock()

    def __call__(self, numbers: Sequence[int]) -> None:
        """Count these prompts as answered."""
        with self._lock:
            answered = [self._items[number] for number in numbers]
            self._left.subtract(answered)
            whole = sum(not self._left[item] for item in set(answered))
        self._add(whole)


def _in_order(
    prompts: Sequence[tuple[list[int], int]], ask: Callable[..., list[Any]], answered: Callable[[Sequence[int]], None]
) -> list[Any]:
    """Ask in requests of many prompts, longest first, several under way; return the answers in the order given.

    ``answered`` is told the numbers of the prompts of each request that came back.
    """
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number][0]), prompts[number][0]))
    found: list[Any] = [None] * len(prompts)

    def part(numbers: Sequence[int]) -> None:
        for number, answer in zip(numbers, ask([prompts[number] for number in numbers]), strict=True):
            found[number] = answer
        answered(numbers)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(part, _parts(order)))
    return found


def _parts(order: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), PROMPTS):
        yield order[start : start + PROMPTS]


def _likeliest(place: dict[str, float], count: int) -> tuple[list[int], list[float]]:
    ranked = sorted(place.items(), key=lambda entry: -entry[1])[:count]
    return [int(token.removeprefix("token_id:")) for token, _ in ranked], [value for _, value in ranked]
