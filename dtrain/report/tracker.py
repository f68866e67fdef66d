"""Report to any experiment tracker that Accelerate knows: wandb, mlflow, aim, comet_ml, ..."""

from __future__ import annotations

from typing import Any

from dtrain.files.json_files import flat
from dtrain.report.base import Logger, Run


class Tracker(Logger):
    """Send figures to one of Accelerate's trackers.

    Args:
        name: Accelerate's name of the tracker.
        project: the project's or run's name there.
        options: further arguments of the tracker.

    Raises:
        ValueError: no such tracker, or its package or Accelerate is not installed.
    """

    def __init__(
        self, name: str, project: str = "dtrain", options: dict[str, Any] | None = None
    ) -> None:
        try:
            from accelerate import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        except ImportError:
            raise ValueError(
                "logger=tracker needs `accelerate`: pip install 'dtrain[accelerate]'"
            ) from None
        known = sorted(LOGGER_TYPE_TO_CLASS)
        if name not in known:
            raise ValueError(f"logger.tracker.name={name} is unknown: use {', '.join(known)}")
        if name not in [str(available) for available in get_available_trackers()]:
            raise ValueError(
                f"logger.tracker.name={name}: its package is not installed: pip install {name}"
            )
        self._class, self._state = LOGGER_TYPE_TO_CLASS[name], PartialState
        self._project, self._options = project, options or {}
        self._tracker: Any = None

    def start(self, run: Run) -> None:
        self._state(cpu=True)  # trackers ask it for the rank; the process group is there already
        folder = {"logging_dir": str(run.folder)} if self._class.requires_logging_directory else {}
        self._tracker = self._class(self._project, **folder, **self._options)
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        self._tracker.store_init_configuration(
            # some trackers take plain values alone
            {
                key: value if isinstance(value, int | float | str | bool) else str(value)
                for key, value in flat(run.config).items()
            }
        )

    def step(self, figures: dict[str, Any]) -> None:
        self._tracker.log(
            {k: v for k, v in figures.items() if k != "step" and v is not None},
            step=figures["step"],
        )

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()
            self._state._reset_state()
