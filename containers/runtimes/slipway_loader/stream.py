"""Reads safetensors files once: hashes every byte and gives the same bytes, from memory, to the engine.

The bytes lie in memory of this process before they are hashed, so whoever writes to the file meanwhile changes neither.
Some tensors of a file are given before its last byte was read. If its digest is wrong, the last ones are not given: an
error is raised, and the engine never answers a request.

The ranks of an engine on one host divide the files among themselves. A rank reads and hashes its own and hands the
memory to the others, so that each byte is read and hashed once.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compatibility.safetensors_headers import HeaderError, Tensor, header_length, parse_header
from registry.errors import Problem, VerificationError
from registry.manifest import FileRecord
from slipway_loader.digest_check import DigestCheck

# Bytes of a batch, unless one tensor has more. A thread that reads holds up to two batches.
BATCH = 64 << 20
# The memory of a batch begins up to a page before its first tensor.
_USUAL = BATCH + mmap.PAGESIZE
# References to memory that no tensor refers to: its batch's, and that of `sys.getrefcount` itself.
_UNUSED = 2
_CHUNK = 4 << 20
# Threads of a host that read and hash, at most, but one a rank: SHA-256 takes half a second a gigabyte and core.
MOST_WORKERS = 4

Gather = Callable[[Any], Sequence[Any]]
"""Gives every rank the values of all ranks, in their order; each calls it at the same time."""
Shard = tuple[Path, FileRecord]


@dataclass(frozen=True)
class Memory:
    """Memory that other processes can map, by the number of its descriptor in this process; a mapped one has none."""

    map: mmap.mmap
    descriptor: int | None = None

    @classmethod
    def of(cls, size: int) -> Memory:
        """Make it; its bytes live as long as this object does, or a mapping of them."""
        descriptor = os.memfd_create("slipway-weights", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return cls(mmap.mmap(descriptor, size), descriptor)

    def __del__(self) -> None:
        """Let other processes map it no longer."""
        if self.descriptor is not None:
            os.close(self.descriptor)


@dataclass(frozen=True)
class Batch:
    """Tensors that follow each other in a file; the first byte of the memory is the one ``begins`` bytes into it."""

    memory: Memory
    begins: int
    tensors: tuple[tuple[str, Tensor], ...]

    @property
    def is_used(self) -> bool:
        """Whether a tensor still refers to the memory."""
        return sys.getrefcount(self.memory.map) > _UNUSED


@dataclass(frozen=True)
class _Message:
    """What a rank sends to all ranks in a round.

    That is its batch, or what is wrong, or that it has no more; and whether an earlier round's memory is still used.
    """

    process: int
    descriptor: int | None = None
    size: int = 0
    begins: int = 0
    tensors: tuple[tuple[str, Tensor], ...] = ()
    problem: Problem | None = None
    ended: bool = False
    used: bool = False


def batches(path: Path, record: FileRecord, free: list[Memory], marks: Path | None = None) -> Iterator[Batch]:
    """Read a file, in its own order, into memory that is ``free`` to be used again, if there is any.

    Raises:
        VerificationError: It is not the file that ``record`` describes. It names the file.
    """
    waiting: Batch | None = None
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                raise _changed(path, f"changed: {size} bytes, {record.size} in the manifest")
            check = DigestCheck(file.fileno(), record.sha256, marks)
            first = _exactly(file.fileno(), 8)
            raw = _exactly(file.fileno(), header_length(first, path, size))
            check.update(first + raw)
            for group in _groups(parse_header(raw, path, size)):
                if waiting is not None:
                    yield waiting
                waiting = _read(file.fileno(), group, check, free)
            problem = check.problem()
    except OSError as error:
        raise _changed(path, f"can't be read: {error.strerror}") from error
    except HeaderError as error:
        raise _changed(path, f"changed: {error}") from error
    if problem is not None:
        raise _changed(path, problem)
    if waiting is not None:
        yield waiting


def verified(shards: Sequence[Shard], workers: int, free: list[Memory], marks: Path | None = None) -> Iterator[Batch]:
    """Read files, up to so many at a time, each one batch ahead; the order of batches is always the same.

    Raises:
        VerificationError: As `batches`.
    """
    left = deque(batches(path, record, free, marks) for path, record in shards)
    running: deque[tuple[Iterator[Batch], Future[Batch | None]]] = deque()
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="sha256") as pool:
        try:
            while left or running:
                while left and len(running) < workers:
                    file = left.popleft()
                    running.append((file, pool.submit(next, file, None)))
                file, reading = running.popleft()
                batch = reading.result()
                del reading
                if batch is not None:
                    running.append((file, pool.submit(next, file, None)))
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def divided(shards: Sequence[Shard], gather: Gather, workers: int, marks: Path | None = None) -> Iterator[Batch]:
    """Give every rank all batches; each file is read by one of the ranks on this host, with its share of ``workers``.

    Memory is used again once no rank's tensors refer to it. The engine still holds the last tensor of a round when it
    asks for the next, so that is looked at one round later.

    Raises:
        VerificationError: A file is not as it should be, in every rank.
    """
    me = (_host(), os.getpid())
    ranks = gather(me)
    here = [number for number, (host, _) in enumerate(ranks) if host == me[0]]
    own = here.index(ranks.index(me))
    free: list[Memory] = []
    mine = verified(shards[own :: len(here)], max(1, workers // len(here)), free, marks)
    rounds: deque[tuple[Batch | None, list[Batch]]] = deque()
    while True:
        read, earlier = rounds.popleft() if len(rounds) == 2 else (None, [])
        used = any(each.is_used for each in earlier)
        batch, message = _next(mine, used=used)
        everyone: Sequence[_Message] = gather(message)
        for each in everyone:
            if each.problem is not None:
                raise VerificationError("/", [each.problem])
        if read is not None and len(read.memory.map) == _USUAL and not any(each.used for each in everyone):
            free.append(read.memory)
        if all(each.ended for each in everyone):
            return
        # Each of several ranks gets copies on write: what a rank's engine does to a tensor, no other rank sees.
        shared = [everyone[number] for number in here if not everyone[number].ended]
        given = [batch] if batch is not None and len(here) == 1 else [_received(each) for each in shared]
        rounds.append((batch, given))
        yield from given
        del batch, given, read, earlier


def _next(mine: Iterator[Batch], *, used: bool) -> tuple[Batch | None, _Message]:
    try:
        batch = next(mine, None)
    except VerificationError as error:
        return None, _Message(os.getpid(), problem=error.problems[0])
    if batch is None:
        return None, _Message(os.getpid(), ended=True, used=used)
    memory = batch.memory
    message = _Message(os.getpid(), memory.descriptor, len(memory.map), batch.begins, batch.tensors, used=used)
    return batch, message


def _received(message: _Message) -> Batch:
    """Map the memory of a rank's batch, so that writing to it changes nothing in other processes."""
    descriptor = os.open(f"/proc/{message.process}/fd/{message.descriptor}", os.O_RDONLY)
    mapped = mmap.mmap(descriptor, message.size, mmap.MAP_PRIVATE)
    os.close(descriptor)
    return Batch(Memory(mapped), message.begins, message.tensors)


def _groups(tensors: dict[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    """Divide a file's tensors, in the order of their bytes, into batches."""
    group: list[tuple[str, Tensor]] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if group and tensor.end - group[0][1].start > BATCH:
            yield group
            group = []
        group.append((name, tensor))
    if group:
        yield group


def _read(file: int, group: Sequence[tuple[str, Tensor]], check: DigestCheck, free: list[Memory]) -> Batch:
    """Read the next bytes of a file, those of a group, and check them where they now lie."""
    start, end = group[0][1].start, group[-1][1].end
    begins = start - start % mmap.PAGESIZE  # so that tensors are aligned as in the file
    if end - begins > _USUAL:
        memory = Memory.of(end - begins)
    else:
        try:
            memory = free.pop()
        except IndexError:
            memory = Memory.of(_USUAL)
    with memoryview(memory.map) as view:
        for place in range(start - begins, end - begins, _CHUNK):
            with view[place : min(place + _CHUNK, end - begins)] as part:
                _fill(file, part)
                check.update(part)
    return Batch(memory, begins, tuple(group))


def _fill(file: int, part: memoryview) -> None:
    done = 0
    while done < len(part):
        count = os.readv(file, [part[done:]])
        if count == 0:
            raise OSError(errno.EIO, "it became shorter while it was read")
        done += count


def _exactly(file: int, count: int) -> bytes:
    data = bytearray(count)
    _fill(file, memoryview(data))
    return bytes(data)


def _host() -> str:
    """Name this host as far as processes can reach each other's memory on it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii") + str(
        Path("/proc/self/ns/pid").readlink()
    )


def _changed(path: Path, why: str) -> VerificationError:
    return VerificationError(path.parent, [Problem(str(path), why)])
