"""What runs this installation's workers, as its settings have it."""

from __future__ import annotations

from containers.hardware.gpu import gpus
from pipeline.settings import Settings
from pipeline.workers.launchers.local import Local
from pipeline.workers.launchers.task import Launcher
from registry.progress import Progress


def launcher(settings: Settings, progress: Progress) -> Launcher:
    """Give what runs workers: processes of this machine, where nothing else is configured.

    Raises:
        SettingsError: what is configured can't be read.
    """
    if settings.workers is None:
        return Local(settings, progress)
    from pipeline.workers.launchers.container import Containers  # noqa: PLC0415 - for those who have somewhere else
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
    """Whether a worker gets a GPU, there or here.

    Raises:
        SettingsError: what is configured can't be read.
    """
    if settings.workers is None:
        return bool(gpus())
    from pipeline.workers.launchers.placement import placement  # noqa: PLC0415 - for those who have somewhere else

    return placement(settings.workers).gpus > 0


def are_here(settings: Settings) -> bool:
    """Whether workers run on this machine.

    Raises:
        SettingsError: what is configured can't be read.
    """
    if settings.workers is None:
        return True
    from pipeline.workers.launchers.placement import Container, placement  # noqa: PLC0415 - for those who have somewhere else

    return isinstance(placement(settings.workers), Container)
