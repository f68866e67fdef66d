"""Start each job of Hydra's --multirun by torchrun: `hydra/launcher=torchrun`.

    dtrain train --multirun hydra/launcher=torchrun hydra.launcher.nproc_per_node=2
    strategy=ddp,fsdp

Without it a sweep's jobs run in `launch.nproc` ranks that the script starts itself. With it they
are what a person would type, so torchrun's own options apply. It is not in dtrain, because Hydra
takes plugins from the namespace package hydra_plugins alone. Source: Hydra's launcher plugins
(https://hydra.cc/docs/advanced/plugins/develop/).
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from dtrain.config.override import setting
from dtrain.config.secret import masked_override
from dtrain.report.files import summary_in
from dtrain.report.sweep import Told, show_job, show_sweep


@dataclass
class Torchrun:
    """Settings of the launcher.

    Args:
        nproc_per_node: ranks of each job.
        options: more options of torchrun, such as --max-restarts=1.
    """

    _target_: str = "hydra_plugins.dtrain_torchrun.TorchrunLauncher"
    nproc_per_node: int = 1
    options: list[str] = field(default_factory=lambda: ["--standalone"])


class TorchrunLauncher(Launcher):
    """Run the jobs of a sweep one after the other, each by torchrun in a folder of its own."""

    def __init__(self, nproc_per_node: int, options: list[str]) -> None:
        self.command = [
            sys.executable,
            "-m",
            "dtrain.launch.agent",
            *options,
            f"--nproc-per-node={nproc_per_node}",
        ]

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        folder, returns, jobs = Path(str(self.config.hydra.sweep.dir)), [], []
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            sweep = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with_index = OmegaConf.merge(
                sweep, {"hydra": {"job": {"id": str(index), "num": index}}}
            )
            place = (folder / str(with_index.hydra.sweep.subdir)).resolve()
            given = filter_overrides(overrides)
            jobs.append(Told(str(index), tuple(map(masked_override, given)), place))
            show_job(jobs[-1])
            command = [
                *self.command,
                "-m",
                "dtrain",
                "train",
                *_files(),
                *given,
                setting("hydra.run.dir", str(place)),
            ]
            if status := _run(command):
                jobs[-1].reason = f"torchrun ended with exit status {status}"
            returns.append(_outcome(place, status, given, sweep))
        show_sweep(jobs)
        return returns


def _files() -> list[str]:
    """Return the options of the command line that say where the configuration is."""
    asked = vars(get_args_parser().parse_args(sys.argv[1:]))
    given = {
        name: asked[name.replace("-", "_")] for name in ("config-dir", "config-path", "config-name")
    }
    return [f"--{name}={value}" for name, value in given.items() if value]


def _run(command: list[str]) -> int:
    """Return a command's exit status; on Ctrl-C, leave torchrun the time to end its ranks."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait(timeout=40)
        raise


def _outcome(folder: Path, status: int, overrides: Sequence[str], config: DictConfig) -> JobReturn:
    """Return what a sweeper gets: the validation loss, or else the loss."""
    result = JobReturn(overrides=list(overrides), cfg=config, working_dir=str(folder))
    if status:
        result.status = JobStatus.FAILED
        words = " ".join(map(masked_override, overrides))
        result.return_value = HydraException(f"{words}: torchrun ended with exit status {status}")
        return result
    summary = summary_in(folder)
    result.status = JobStatus.COMPLETED
    result.return_value = summary["loss"] if summary["val_loss"] is None else summary["val_loss"]
    return result


ConfigStore.instance().store(
    group="hydra/launcher", name="torchrun", node=Torchrun, provider="dtrain"
)
