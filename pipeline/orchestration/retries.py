"""How a step ends that ran into an expected error: tried again where that may help, else in one line.

Dagster's `RetryPolicy` would try again what a person interrupted, too.
"""

from __future__ import annotations

from typing import NoReturn

from dagster import AssetExecutionContext, Failure, OpExecutionContext, RetryRequested

from pipeline.expected_errors import is_transient

_MOST = 2
_FIRST_WAIT_SECONDS = 5


def fail(context: AssetExecutionContext | OpExecutionContext, error: Exception) -> NoReturn:
    """End the step of ``context``: a network, an engine or MLflow is asked again after 5 and after 10 seconds.

    Raises:
        RetryRequested: the error is transient, and the step was not yet tried three times.
        Failure: any other, with the error's line as its description.
    """
    tried = context.retry_number
    if not is_transient(error) or tried >= _MOST:
        raise Failure(str(error), allow_retries=False) from error
    wait = _FIRST_WAIT_SECONDS * 2**tried
    context.log.warning("trying again in %d s: %s", wait, error)
    raise RetryRequested(max_retries=_MOST, seconds_to_wait=wait) from error
