"""Trackers: where a trial's figures go beside its own files.

A tracker is a class that ``_target_`` in ``conf/tracker/NAME.yaml`` names, made with the settings beside it. It has
``start(trial)``: begin the run of a :class:`Tracked` trial, or continue it; ``scalars(step, values)``: take figures by
name, of a step that is counted from 1 over all epochs; ``finish(status)``: the trial is completed, failed or
interrupted, or running where another process trains it on.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_vit.config.names import flat
from lora_vit.errors import ConfigError, one_line
from lora_vit.files import locked
from lora_vit.records import TrialRecord

TAGS = {"loss": "train/loss", "lr": "train/learning_rate", "images_per_second": "train/images_per_second"}
OFF: dict[str, str] = {}  # what could not be started in this process, and why: a dead server takes minutes to say so


def make(name: str, settings: Any) -> Any:
    """The tracker that a configuration describes. Raises ConfigError where its class or what it needs is missing."""
    target = settings.get("_target_") if isinstance(settings, Mapping) else None
    module, _, kind = str(target).rpartition(".")
    try:
        return getattr(import_module(module), kind)(**{key: settings[key] for key in settings if key != "_target_"})
    except Exception as error:
        remedy = f"pip install 'lora_vit[{name}]' for one of ours, or give your module.Class and its settings"
        raise ConfigError(f"tracker.{name}._target_={target} cannot be made ({one_line(error)}): {remedy}") from None


class Tracked:
    """A trial as its trackers see it. It sends them rows; a tracker that fails is reported once and then left out."""

    def __init__(self, record: TrialRecord, folder: Path, board: Path | None = None, step: int = 0):
        """``board``: of event files, named by what a sweep varies; ``step``: from which it resumes, 0: from scratch."""
        self.record, self.folder, self.board, self.step = record, folder, board or folder / "tensorboard", step
        self.run = f"{record.trial_id}-{record.started:.0f}"  # the same when it resumes, another one from scratch
        self.name = (board or folder).name.removesuffix(f"_{record.trial_id}")
        self.group = folder.absolute().parent.name  # the sweep's name; single runs are ``runs``
        settings = {**flat(record.config), "seed": record.config["seed"]}
        self.settings = {key: value for key, value in settings.items() if value is not None}  # that decide the numbers
        self._trackers = {name: make(name, own) for name, own in record.config["tracker"].items() if name not in OFF}
        self._is_started = False
        record.untracked |= OFF

    def row(self, row: Mapping[str, Any]) -> None:
        """Hand on the row of a logged step or of an epoch."""
        named = {TAGS.get(key, f"val/{key[4:]}" if key.startswith("val_") else ""): row[key] for key in row}
        if values := {tag: value for tag, value in named.items() if tag and value is not None}:
            self._call("scalars", row["step"], values)

    def finish(self, status: str) -> None:
        """End the runs, once."""
        if self._is_started or status == "completed":
            self._call("finish", status)
        self._trackers.clear()

    def _call(self, method: str, *given: Any) -> None:
        if not self._is_started:
            self._is_started = True
            self._call("start", self)
        for name, tracker in [*self._trackers.items()]:
            try:
                getattr(tracker, method)(*given)
            except Exception as error:
                del self._trackers[name]
                self.record.untracked[name] = why = one_line(error)
                OFF.update({name: why} if method == "start" else {})
                print(f"note: the tracker {name} has failed, trial {self.record.trial_id} trains without it: {why}")


class TensorBoard:
    """Event files."""

    def start(self, trial: Tracked) -> None:
        """What came after the step that a trial resumes from is superseded."""
        from torch.utils.tensorboard import SummaryWriter

        self.record = trial.record
        self.writer = SummaryWriter(str(trial.board), purge_step=trial.step + 1 if trial.step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        if "train/loss" not in values:  # of an epoch
            self.writer.flush()

    def finish(self, status: str) -> None:
        """Of a trial that is completed: what a sweep varies, and the final metric.

        The view shows five columns by itself, the first of the alphabet: short names bring the main ones there.
        """
        c = self.record.config
        hparams = {
            **{key: c["lora"][key] or 0 for key in ("alpha", "dropout", "rank")},
            "lr": c["optimizer"]["lr"],
            "method": c["lora"]["method"],
            "seed": c["seed"],
            "targets": " ".join(c["lora"]["targets"] or []),
            "weight_decay": c["optimizer"]["weight_decay"],
        }
        if status == "completed":
            name = f"val_{c['trainer']['metric']}"
            self.writer.add_hparams(hparams, {f"final/{name}": self.record.metrics[name]}, run_name=".")
        self.writer.close()


class MLflow:
    """A sweep is an experiment; a trial is a run, with its settings as parameters and its ids as tags."""

    def __init__(self, uri: str | None, experiment: str | None):
        import mlflow

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 let a dead server hold training up for long
        self.mlflow, self.uri, self.experiment = mlflow, uri, experiment

    def start(self, trial: Tracked) -> None:
        """Continue the run that has this one's tag, if any, after the last step of each of its figures."""
        with locked(trial.folder.parent / ".mlflow.lock"):  # workers that make one database at once spoil it
            client: Any = self.mlflow.MlflowClient(self.uri)
            known = client.get_experiment_by_name(name := self.experiment or trial.group)
            place = known.experiment_id if known else client.create_experiment(name)
        self.record, self.client, self.last, self.waiting = trial.record, client, dict[str, int](), list[Any]()
        for known in client.search_runs([place], f"tags.run = '{trial.run}'"):
            self.run = known.info.run_id
            for tag in known.data.metrics:
                self.last[tag] = max(figure.step for figure in client.get_metric_history(self.run, tag))
            client.update_run(self.run, "RUNNING")
            return
        ids = {"trial": trial.record.trial_id, "cell": trial.record.cell_id, "run": trial.run}
        self.run = client.create_run(place, int(1000 * trial.record.started), ids, trial.name).info.run_id
        client.log_batch(self.run, params=[self.mlflow.entities.Param(*pair) for pair in trial.settings.items()])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Collect them, over thirty rows or to the end of an epoch: a server takes a while to answer."""
        new = {tag: value for tag, value in values.items() if step > self.last.get(tag, 0)}
        self.waiting += [self.mlflow.entities.Metric(*one, int(1000 * time.time()), step) for one in new.items()]
        if "train/loss" not in values or len(self.waiting) > 90:
            self._send()

    def _send(self) -> None:
        self.client.log_batch(self.run, self.waiting)
        self.waiting = []

    def finish(self, status: str) -> None:
        self._send()
        if status != "running":
            state = {"completed": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
            self.client.set_terminated(self.run, state, int(1000 * (self.record.finished or time.time())))


class WandB:
    """Weights & Biases: a sweep is a group, a trial a run. Of a run that continues it drops what it has by itself."""

    library = "wandb"

    def __init__(self, **options: Any):
        self.init, self.options = import_module(self.library).init, options

    def start(self, trial: Tracked) -> None:
        self.begin(trial, id=trial.run, name=trial.name, reinit="create_new")  # trials of a pack are side by side

    def begin(self, trial: Tracked, **names: str) -> None:
        """Begin a run, or continue that of these names."""
        self.run = self.init(group=trial.group, config=trial.settings, resume="allow", **names, **self.options)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, status: str) -> None:
        self.run.finish({"completed": 0, "failed": 1}.get(status, 255))


class Trackio(WandB):
    """Trackio, whose functions are those of W&B; it finds a run by its name, and would keep twice what it has."""

    library = "trackio"

    def start(self, trial: Tracked) -> None:
        self.begin(trial, name=f"{trial.name} {trial.run}")
        self.next = self.run._next_step

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step >= self.next:
            super().scalars(step, values)

    def finish(self, status: str) -> None:
        self.run.finish()
