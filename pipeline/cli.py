"""``slipway``: take a model from pinned weights to a signed, promoted release that deployments can pull.

Progress goes to stderr, results to stdout; `pipeline.commands.show.EXIT_STATUSES` lists the exit statuses.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import click
from rich.markup import escape

from pipeline.commands import (
    aliases,
    bundling,
    images,
    initial,
    loading,
    locking,
    machine,
    planning,
    publishing,
    registered,
    releasing,
    scanning,
    serving,
)
from pipeline.commands.show import EXIT_STATUSES, FAILED, INTERRUPTED, USAGE, live, progress
from pipeline.errors import SettingsError, SlipwayError, SpecError
from pipeline.settings import Settings


class _Group(click.Group):
    """Shows an expected error as one line, and exits with the status of its kind."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - as click has it
        """Run the command."""
        from containers.errors import ContainerError
        from evals.errors import EvaluationError
        from registry.errors import FileSystemError, RegistryError

        try:
            with live:
                _sweep_what_was_left()
                return super().invoke(ctx)
        except (SpecError, SettingsError, FileSystemError) as error:
            _die(str(error), USAGE)
        except (SlipwayError, ContainerError, EvaluationError, RegistryError) as error:
            _die(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            _die(f"can't use {error.filename}: {error.strerror}")
        except KeyboardInterrupt:
            _die(
                "interrupted: everything that was started has ended; the same command continues from here", INTERRUPTED
            )


def _sweep_what_was_left() -> None:
    """Remove containers that a killed run left; heavy modules are imported only if there are some."""
    from containers.engine.owner import left_behind

    settings = Settings.read()
    if left_behind(settings.home):
        from pipeline.orchestration.release import sweep

        sweep(settings)


def _die(message: str, status: int = FAILED) -> NoReturn:
    progress.print(f"[red]error:[/] {escape(message)}")
    sys.exit(status)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"Exit status: {'; '.join(f'{status} {meaning}' for status, meaning in EXIT_STATUSES.items())}.",
)
@click.version_option(package_name="slipway")
def main() -> None:
    """Take language models from pinned weights to signed, promoted releases.

    State is kept in $SLIPWAY_HOME (default: .slipway in the checkout; installed: ~/.local/share/slipway).
    """


for _command in (
    *(initial.init, planning.plan, releasing.release, publishing.publish, publishing.push),
    *(registered.status, registered.pull, registered.verify, registered.report),
    *(aliases.promote, aliases.rollback, aliases.canary, aliases.history, aliases.gc),
    *(loading.load, loading.compare, bundling.bundle, bundling.metrics),
    *(serving.serve, serving.keys),
    *(machine.doctor, machine.ui, machine.stop),
    *(images.image, locking.lock, scanning.rescan),
):
    main.add_command(_command)
