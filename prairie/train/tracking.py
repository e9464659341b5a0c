"""What follows a run beside metrics.jsonl: TensorBoard or MLflow, by one key. Both are optional; neither is the record.

Not here: what a line says (progress).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from prairie.errors import TrainingError


class Tracker(Protocol):
    """Takes each line of metrics.jsonl."""

    def write(self, line: Mapping[str, Any]) -> None: ...


@contextmanager
def tracking(name: str | None, folder: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Tracker | None]:
    """The tracker of this name, writing under `folder`; None for no name. Raises TrainingError if it is not installed.

    `settings` are told once, as the run's parameters. A run that is resumed goes on under the same title.
    """
    if name is None:
        yield None
        return
    tracker = _TRACKERS[name](folder, title, settings)
    try:
        yield tracker
    finally:
        tracker.close()


class _TensorBoard:
    """An event file in FOLDER/TITLE."""

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self.writer: Any = SummaryWriter(str(folder / title))
        self.writer.add_text("settings", "  \n".join(f"{key}: {value}" for key, value in settings.items()))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers_of(line).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _MLflow:
    """A run of the experiment `prairie` in FOLDER/mlflow.db."""

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise _missing("mlflow") from error
        folder.mkdir(parents=True, exist_ok=True)
        self.client: Any = mlflow.MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').absolute()}")
        found = self.client.get_experiment_by_name("prairie")
        experiment = found.experiment_id if found else self.client.create_experiment("prairie")
        runs = self.client.search_runs([experiment], f"tags.mlflow.runName = '{title}'", max_results=1)
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = self.client.create_run(experiment, run_name=title).info.run_id
        for key, value in settings.items():
            self.client.log_param(self.run_id, key, str(value)[:500])

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers_of(line).items():
            self.client.log_metric(self.run_id, name, value, step=line["step"])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


_TRACKERS: Mapping[str, type[_TensorBoard] | type[_MLflow]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow}


def numbers_of(line: Mapping[str, Any], before: str = "train/") -> dict[str, float]:
    """The numbers of a line under flat names: `train/loss`, `evaluation/tasks/numbers`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{before.removeprefix('train/')}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[f"{before}{name}"] = float(value)
    return found


def _missing(package: str) -> TrainingError:
    return TrainingError(
        f"`track: {package}` needs a package that is not installed", mend=f"pip install {package}, or leave `track` out"
    )
