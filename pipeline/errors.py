"""Errors of the pipeline. Their messages say what happened, where, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class SlipwayError(Exception):
    """Base of the errors that are shown as one line instead of a traceback."""


class SpecError(SlipwayError):
    """A model's file is not valid; the message has the path of the key."""


class UnsupportedModelError(SpecError):
    """A scheme in a model's file can't be applied to the model; the message names schemes that can."""


class SettingsError(SlipwayError):
    """An environment variable has an invalid value, or the home can't be used."""


class StoreError(SlipwayError):
    """An artifact is damaged, or can't be written."""


class WorkerFailed(SlipwayError):
    """A worker failed; the message has its error or its last output."""


class UnansweredError(WorkerFailed):
    """The cluster that runs workers does not answer; a later try may succeed."""


class SourceError(SlipwayError):
    """A source can't be resolved, can't be pulled, or is refused."""


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Let an error of a source within the block begin with the key of the model's file that names the source."""
    try:
        yield
    except SourceError as error:
        raise type(error)(f"`{key}`: {error}") from error


class UnreachableError(SourceError):
    """A hub does not answer, or is too busy; a later try may succeed."""


class ChangedSourceError(SourceError):
    """A file is no longer the one that was listed or locked; what was downloaded of it is of no use."""


class PublishError(SlipwayError):
    """A release can't be published: the place holds something else, or refuses."""


class PlanError(SlipwayError):
    """A model can't be planned, or does not fit on the disk or CPU."""


class QuantizeError(SlipwayError):
    """A scheme can't be quantized: its calibration or the model does not fit."""


class CheckpointError(SlipwayError):
    """A quantized checkpoint does not match its scheme; the message lists every problem."""
