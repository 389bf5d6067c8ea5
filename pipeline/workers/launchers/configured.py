"""The launcher that this installation's settings choose."""

from __future__ import annotations

from containers.hardware.gpu import gpus
from pipeline.settings import Settings
from pipeline.workers.launchers.local import Local
from pipeline.workers.launchers.task import Launcher
from registry.progress import Progress


def launcher(settings: Settings, progress: Progress) -> Launcher:
    """Return the launcher of `SLIPWAY_WORKERS`; without it, workers are processes of this machine.

    Raises:
        SettingsError: the file that `SLIPWAY_WORKERS` names can't be read.
    """
    if settings.workers is None:
        return Local(settings, progress)
    from pipeline.workers.launchers.container import Containers  # noqa: PLC0415 - only if workers run elsewhere
    from pipeline.workers.launchers.jobs import Engine, Jobs  # noqa: PLC0415
    from pipeline.workers.launchers.kubernetes import KubernetesCluster  # noqa: PLC0415
    from pipeline.workers.launchers.placement import Container, Ray, placement  # noqa: PLC0415
    from pipeline.workers.launchers.ray import RayCluster  # noqa: PLC0415

    where = placement(settings.workers)
    if isinstance(where, Container):
        return Containers(where, settings, progress)
    engine: Engine = RayCluster(where) if isinstance(where, Ray) else KubernetesCluster(where)
    return Jobs(engine, where.store, progress)


def have_gpus(settings: Settings) -> bool:
    """Whether a worker gets a GPU, on this machine or elsewhere.

    Raises:
        SettingsError: the file that `SLIPWAY_WORKERS` names can't be read.
    """
    if settings.workers is None:
        return bool(gpus())
    from pipeline.workers.launchers.placement import placement  # noqa: PLC0415 - only if workers run elsewhere

    return placement(settings.workers).gpus > 0


def are_here(settings: Settings) -> bool:
    """Whether workers run on this machine.

    Raises:
        SettingsError: the file that `SLIPWAY_WORKERS` names can't be read.
    """
    if settings.workers is None:
        return True
    from pipeline.workers.launchers.placement import Container, placement  # noqa: PLC0415 - only if workers run elsewhere

    return isinstance(placement(settings.workers), Container)
