"""Worker: sends a schedule of requests to a completions server with aiperf, and writes the outcome of each.

Open loop: every request is sent at its due time, whether earlier ones are answered or not. Latency counts from the due
time, so that a stall of the server or of the client is included (no coordinated omission).

Request: ``url``, ``models`` (the names that requests go to in turn), ``tokenizer`` (folder), ``prompts`` (JSON lines
with ``text``), ``schedule`` (`Schedule` as JSON: ``requests``, ``warmup``, ``prefix_tokens``), ``skip`` (how many
prompts of the text were sent before), ``request_timeout_s``, ``seed``, ``output`` (an empty folder, receives
``requests.jsonl``). Meanwhile ``progress.json`` in the working folder has the progress. Result: ``aiperf_version``,
``exit_status``, ``is_complete``, ``warmup_errors``, ``prompts_used`` and ``client``, the processor time of the client.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

from slipway_counting import Count
from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    from evals.load.load_test import ClientRequest, DueRequest

# How long aiperf may take beyond the traffic itself (start, tokenizer, exports) before it counts as hung.
_OVERHEAD_SECONDS = 90.0
_POLL_SECONDS = 0.5
_REPORT_SECONDS = 5.0
# About ten times the processor share of a process at 0.
_NICENESS = -10
# Text beyond this is not read: it holds more different prompts than any test sends.
_ENOUGH_CHARACTERS = 16_000_000


class SentRequest(TypedDict, total=False):
    """What became of a request, as `evals.load.requests.RequestRecord` reads it."""

    number: Required[int]
    due_ms: Required[int]
    model: str
    start_ms: float
    late_ms: float
    end_ms: float
    latency_ms: float
    ttft_ms: float
    tpot_ms: float | None
    input_tokens: float | None
    output_tokens: float | None
    error: str | None


def work(request: ClientRequest, report: Report) -> dict[str, object]:
    """Cut prompts, warm the server up, run aiperf, and write one row a request."""
    output = Path(request["output"])
    planned, warmup = request["schedule"]["requests"], request["schedule"]["warmup"]
    watch = Watch(Path("progress.json"), len(planned))
    watch.tell("preparing")
    deck = Deck(Path(request["prompts"]), Path(request["tokenizer"]), request["seed"], request["skip"])
    shared = deck.cut(request["schedule"]["prefix_tokens"])
    measured, warming = (_with_prefixes(each, deck, shared) for each in (planned, warmup))
    watch.tell("warm-up")
    models = request["models"]
    errors = _warm_up(request, warming, [each["output_tokens"] for each in warmup])
    last = planned[-1]["due_ms"]
    report(f"warmed up with {len(warming)} requests; {len(measured)} follow, the last after {last / 1000:.0f} s")
    folder = Path.cwd() / "aiperf"
    started = time.monotonic()
    status = _run_aiperf(request, _dataset(folder, measured, planned, models), folder, last, watch, report)
    seconds = time.monotonic() - started
    rows, summary, start = _rows(folder, [each["due_ms"] for each in planned])
    if len(models) > 1:
        rows = [{**row, "model": models[row["number"] % len(models)]} for row in rows]
    (output / "requests.jsonl").write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    watch.tell("done")
    return {
        "aiperf_version": summary.get("aiperf_version"),
        "exit_status": status,
        "is_complete": bool(summary.get("is_complete")) and not summary.get("was_cancelled"),
        "warmup_errors": errors,
        "prompts_used": deck.used,
        "client": {"seconds": seconds, **watch.cost(start / 1000, rows)},
    }


class Deck:
    """Gives different pieces of a text as prompts: no two begin at the same token.

    So no request finds another's prompt in the server's prefix cache. They overlap where the text is short. The starts
    follow steps of about 0.618 of the text, coprime to its length, which reach every token before any token twice. They
    do not depend on the lengths: a deck with ``skip`` continues where another one of that text and seed ended.
    """

    def __init__(self, prompts: Path, tokenizer: Path, seed: int, skip: int) -> None:
        self.used = skip
        self._text = "\n".join(_texts(prompts))
        self._offsets = _offsets(self._text, tokenizer)
        self._places = len(self._offsets)
        first = max(1, int(self._places * 0.618))
        self._step = next(n for n in range(first, self._places + 2) if math.gcd(n, self._places) == 1)
        self._begin = random.Random(seed).randrange(max(1, self._places))  # noqa: S311 - it is no secret
        self._dealt: set[str] = set()

    def cut(self, lengths: Sequence[int]) -> list[str]:
        """Return a piece of each length, in tokens."""
        return [self._next(length, lengths) for length in lengths]

    def _next(self, length: int, lengths: Sequence[int]) -> str:
        while self.used < self._places:
            at = (self._begin + self.used * self._step) % self._places
            self.used += 1
            if at + length > self._places:
                continue
            stretch = self._text[self._offsets[at][0] : self._offsets[at + length - 1][1]]
            if stretch not in self._dealt:
                self._dealt.add(stretch)
                return stretch
        raise self._too_little(lengths)

    def _too_little(self, lengths: Sequence[int]) -> WorkerError:
        return WorkerError(
            f"the prompts' text has {self._places} tokens, too few for all the different prompts that are sent, of up "
            f"to {max(lengths)}: hand in more text, or lower the profile's lengths, rate or seconds"
        )


def _with_prefixes(planned: Sequence[DueRequest], deck: Deck, shared: Sequence[str]) -> list[str]:
    own = deck.cut([each["input_tokens"] for each in planned])
    return [
        text if each["prefix"] is None else f"{shared[each['prefix']]}\n\n{text}"
        for each, text in zip(planned, own, strict=True)
    ]


def _offsets(text: str, folder: Path) -> list[tuple[int, int]]:
    """The characters that each token of the text stands for."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise WorkerError(
            f"{folder} has no tokenizer.json, which prompts are cut with: save the fast tokenizer with it"
        )
    from tokenizers import Tokenizer  # noqa: PLC0415 - the worker's own

    return list(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).offsets)


def _texts(path: Path) -> Iterator[str]:
    """The ``text`` of each line, until there is enough of it; lines as `evals.drift.json_lines` has them."""
    read = 0
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise WorkerError(f'{path}:{number} is not `{{"text": …}}`') from error
            yield text
            read += len(text)
            if read > _ENOUGH_CHARACTERS:
                return


@dataclass
class Watch:
    """Writes the progress to ``progress.json``, and adds up the processor time of the client itself."""

    file: Path
    total: int
    answered: int = 0
    errors: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)
    _read: int = 0
    _first: float | None = None

    def tell(self, phase: str) -> None:
        """Rewrite the file, atomically."""
        now = time.time()
        elapsed = 0.0 if self._first is None else now - self._first
        document = {
            "phase": phase, "total": self.total, "answered": self.answered, "errors": self.errors, "elapsed_s": elapsed,
            "tokens_per_second": self.tokens / elapsed if elapsed > 0 else 0.0,
            **{f"p{share}_latency_ms": _quantile(self.latencies, share) for share in (50, 95)},
            "p95_ttft_ms": _quantile(self.ttfts, 95),
        }  # fmt: skip
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(document))
        beside.rename(self.file)

    def look(self, export: Path) -> None:
        """Read the records since the last call, and the processor time until now."""
        self.cpu.append((time.time(), _session_cpu_seconds()))
        if not export.exists():
            return
        with export.open("rb") as stream:
            stream.seek(self._read)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))
        self.tell("load")

    def _take(self, record: Mapping[str, Any]) -> None:
        metadata, metrics = record["metadata"], record["metrics"]
        begun = metadata["request_start_ns"] / 1e9
        self._first = begun if self._first is None else min(self._first, begun)
        latency = _value(metrics, "request_latency")
        if record.get("error") is not None or latency is None:
            self.errors += 1
            return
        self.answered += 1
        self.latencies.append(latency)
        self.ttfts.append(_value(metrics, "time_to_first_token") or latency)
        self.tokens += int(_value(metrics, "output_sequence_length") or 0)

    def cost(self, start: float, rows: Sequence[SentRequest]) -> dict[str, float | None]:
        """The client's processor time: all of it, and the cores in use while requests were in flight.

        ``start`` is when the schedule began, in seconds since the epoch.
        """
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        ends = [row["end_ms"] for row in rows if row.get("end_ms") is not None]
        until = start + max(ends, default=0.0) / 1000
        during = [point for point in self.cpu if start <= point[0] <= until]
        cores = None
        if len(during) > 1 and during[-1][0] > during[0][0]:
            cores = (during[-1][1] - during[0][1]) / (during[-1][0] - during[0][0])
        return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "cores": cores, "schedule_began": start}


def _quantile(values: Sequence[float], share: float) -> float | None:
    """A percentile by nearest rank, as in all reports."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None


def _session_cpu_seconds() -> float:
    """Processor time of all processes of this session, so far: aiperf's are its own children's children."""
    session, ticks = os.getsid(0), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _warm_up(request: ClientRequest, prompts: Sequence[str], tokens: Iterable[int]) -> list[str]:
    """Send the prompts four at a time, discard the answers, and return the errors.

    A server that refuses them will refuse the traffic too, and is judged on that.
    """

    def send(model: str, prompt: str, output_tokens: int) -> str | None:
        body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0}
        call = urllib.request.Request(  # noqa: S310 - the sandbox's own http URL
            f"{request['url']}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(call, timeout=request["request_timeout_s"]).read()  # noqa: S310 - as above
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            return f"{type(error).__name__}: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sent = pool.map(send, itertools.cycle(request["models"]), prompts, tokens)
        return [error for error in sent if error is not None]


def _dataset(folder: Path, prompts: Sequence[str], planned: Sequence[DueRequest], models: Sequence[str]) -> Path:
    """Write aiperf's input: one row a request, named by its number, with its due time and its model."""
    folder.mkdir()
    path = folder / "dataset.jsonl"
    rows = (
        {
            "session_id": _name(number), "text": prompt, "timestamp": each["due_ms"],
            "output_length": each["output_tokens"], "extra": {"model": models[number % len(models)]},
        }
        for number, (prompt, each) in enumerate(zip(prompts, planned, strict=True))
    )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _name(number: int) -> str:
    return f"request-{number:06d}"


def _run_aiperf(request: ClientRequest, dataset: Path, folder: Path, last_ms: int, watch: Watch, report: Report) -> int:
    """Run aiperf to its end and report its progress; return its exit status, which is 0 even if the server died."""
    command = [
        *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "aiperf", "profile"),
        *("--model", request["models"][0], "--url", request["url"], "--endpoint-type", "completions", "--streaming"),
        *("--tokenizer", request["tokenizer"], "--use-server-token-count", "--use-legacy-max-tokens"),
        *("--input-file", str(dataset), "--custom-dataset-type", "single-turn", "--fixed-schedule"),
        *("--fixed-schedule-start-offset", "0"),
        *("--request-timeout-seconds", str(request["request_timeout_s"])),
        *("--extra-inputs", "temperature:0", "--extra-inputs", "ignore_eos:true"),
        *("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(folder)),
        *("--workers-max", "1", "--record-processors", "1", "--random-seed", str(request["seed"])),
    ]
    deadline = time.monotonic() + last_ms / 1000 + request["request_timeout_s"] + _OVERHEAD_SECONDS
    _go_first()
    with (folder / "console.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(folder))
        started = told = time.monotonic()
        try:
            while True:
                watch.look(folder / "profile_export.jsonl")
                try:
                    return process.wait(timeout=_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
                if time.monotonic() - told > _REPORT_SECONDS:
                    told = time.monotonic()
                    report(_how_it_goes(watch, told - started))
                if time.monotonic() > deadline:
                    raise WorkerError(f"aiperf did not end in time:\n{_tail(folder / 'console.log')}")
        finally:
            process.kill()
            process.wait()


def _go_first() -> None:
    """Raise the priority of this process and its children, where that is allowed (as root).

    A server that fills the machine's cores kept aiperf, which needs little, waiting for over a second, so that requests
    went out late. Users' requests come from elsewhere and wait for nothing. Linux weighs sessions against each other
    before it looks at a process's niceness within one (sched(7), "The autogroup feature"), so both are said.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        Path("/proc/self/autogroup").write_text(str(_NICENESS))


def _environment(folder: Path) -> dict[str, str]:
    """The environment variables of aiperf: times in UTC, caches under ``folder``, and no hub.

    HF_HUB_OFFLINE makes aiperf 0.13 fail with a local tokenizer, so the hub's address is one where nobody listens.
    """
    names = ("PATH", "LANG", "LC_ALL", "PYTHONNOUSERSITE", "PYTHONHASHSEED")
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "AIPERF_METRICS_EXPORT_FLUSH_INTERVAL": "1",
        "AIPERF_DATASET_MMAP_BASE_PATH": str(folder),
        "AIPERF_DATASET_MMAP_CACHE_ENABLED": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "TZ": "UTC",
    }


def _how_it_goes(watch: Watch, seconds: float) -> str:
    p95 = _quantile(watch.latencies, 95)
    told = [f"{watch.errors} errors"] if watch.errors else []
    told += [] if p95 is None else [f"p95 {p95:,.0f} ms"]
    done = watch.answered + watch.errors
    return str(Count("load test", done, watch.total, "requests", seconds, detail=", ".join(told)))


def _rows(folder: Path, due: Sequence[int]) -> tuple[list[SentRequest], dict[str, Any], float]:
    """One row a request that was due, the lost ones too; aiperf's own summary; the schedule's start, ms since 1970."""
    export, summary_file = folder / "profile_export.jsonl", folder / "profile_export_aiperf.json"
    if not export.exists() or not summary_file.exists():
        raise WorkerError(f"aiperf wrote no results:\n{_tail(folder / 'console.log')}")
    summary: dict[str, Any] = json.loads(summary_file.read_text())
    start = datetime.fromisoformat(summary["start_time"]).replace(tzinfo=UTC).timestamp() * 1000
    records = {}
    for line in filter(None, export.read_text().split("\n")):
        record = json.loads(line)
        records[record["metadata"]["conversation_id"]] = record
    return [_row(number, at, start, records.get(_name(number))) for number, at in enumerate(due)], summary, start


def _row(number: int, due_ms: int, start_ms: float, record: Mapping[str, Any] | None) -> SentRequest:
    """The outcome of one request, in milliseconds since the schedule's start; ``error`` is null where it succeeded."""
    if record is None:
        return {"number": number, "due_ms": due_ms, "error": "no record: it was never sent or never came back"}
    metadata, metrics = record["metadata"], record["metrics"]
    begun = metadata["request_start_ns"] / 1e6 - start_ms
    row: SentRequest = {
        "number": number, "due_ms": due_ms, "start_ms": begun, "late_ms": begun - due_ms,
        "end_ms": metadata["request_end_ns"] / 1e6 - start_ms,
    }  # fmt: skip
    error = record.get("error")
    if error is not None or metadata.get("was_cancelled"):
        detail = error or {}
        return {**row, "error": f"{detail.get('code') or ''} {detail.get('type') or 'cancelled'}".strip()}
    ttft, latency = _value(metrics, "time_to_first_token"), _value(metrics, "request_latency")
    if ttft is None or latency is None:
        return {**row, "error": "answered without a token"}
    return {
        **row,
        "latency_ms": begun - due_ms + latency,
        "ttft_ms": begun - due_ms + ttft,
        "tpot_ms": _value(metrics, "inter_token_latency"),
        "input_tokens": _value(metrics, "input_sequence_length"),
        "output_tokens": _value(metrics, "output_sequence_length"),
        "error": None,
    }


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    entry = metrics.get(name)
    return None if entry is None else entry["value"]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


if __name__ == "__main__":
    main(work)
