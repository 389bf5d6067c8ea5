"""What can go wrong in the pipeline, said so that a person knows what to do next."""

from __future__ import annotations


class SlipwayError(Exception):
    """The base of every error that is shown as one clear line instead of a traceback."""


class SpecError(SlipwayError):
    """A model's file is not what it should be; the message carries the path of the key."""


class UnsupportedModelError(SpecError):
    """A model's file asks for a scheme that can't be made of the model; the message says which can."""


class SettingsError(SlipwayError):
    """An environment variable or the place of the state is unusable."""


class StoreError(SlipwayError):
    """An artifact is damaged, or the disk refuses it."""


class WorkerFailed(SlipwayError):
    """A worker ended without a result; the message ends with its last output."""


class UnansweredError(WorkerFailed):
    """What runs workers elsewhere does not answer: the same may go well in a while."""


class SourceError(SlipwayError):
    """A source can't be resolved, pulled or trusted."""


class UnreachableError(SourceError):
    """A hub that does not answer, or is too busy to: the same may go well in a while."""


class PlanError(SlipwayError):
    """A model can't be planned for, or does not fit where it is to go."""


class QuantizeError(SlipwayError):
    """A scheme can't be quantized as asked."""


class CheckpointError(SlipwayError):
    """A quantized checkpoint is not what its scheme promised; the message lists every problem."""
