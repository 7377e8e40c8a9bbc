"""Trackers: where a trial's figures go beside its own files.

A tracker is a class that ``_target_`` in ``conf/tracker/NAME.yaml`` names, made with the settings beside it.
``start(trial)`` starts the run of a :class:`Tracked` trial, or resumes it. ``scalars(step, values)`` takes a step,
counted from 1, and its figures by name. ``finish(status)`` ends the run: completed, failed, interrupted, or running if
another process resumes it.
"""

import inspect
import os
import time
from collections.abc import Mapping
from contextvars import copy_context
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

from lora_vit.config.names import flat
from lora_vit.config.rules import refuse
from lora_vit.errors import one_line
from lora_vit.files import locked
from lora_vit.records import TrialRecord

TAGS = {"loss": "train/loss", "lr": "train/learning_rate", "images_per_second": "train/images_per_second"}
# What TensorBoard's view shows of a trial: five columns by itself, the first of the alphabet by these last words.
COLUMNS = ("lora.alpha", "lora.dropout", "lora.rank", "optimizer.lr", "lora.method", "seed", "optimizer.weight_decay")
OFF: dict[str, str] = {}  # what could not be started in this process, and why: a dead server takes minutes to say so


def maker(name: str, settings: Any) -> Any:
    """What makes the tracker that a configuration describes, when it is called. Raises ConfigError if nothing can."""
    own = {**settings} if isinstance(settings, Mapping) else {}
    key, target = f"tracker.{name}._target_", own.pop("_target_", None)
    try:
        kind = resolve_name(str(target or ""))
    except Exception as error:  # anything, of a module of one's own
        refuse(key, target, f"cannot be imported ({one_line(error)}): give module.Class, of a module that Python finds")
    if lacking := {"start", "scalars", "finish"} - {*dir(kind)}:
        refuse(key, target, f"has no {min(lacking)}: give a class with start, scalars and finish")
    try:
        inspect.signature(kind).bind(**own)
    except TypeError as error:
        refuse(f"tracker.{name}", own, f"is not what {target} takes ({error}): give that, as tracker.{name}.KEY=VALUE")
    if kind.__module__ == __name__ and not find_spec(library := kind.__name__.lower()):  # ours are named as libraries
        refuse(key, target, f"needs {library}: pip install 'lora_vit[{library}]'")
    return lambda: kind(**own)


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
        self._wanted, self._begun = dict(record.config["tracker"]), dict[str, Any]()

    def row(self, row: Mapping[str, Any]) -> None:
        """Hand on the row of a logged step or of an epoch."""
        named = {TAGS.get(key, f"val/{key[4:]}" if key.startswith("val_") else ""): row[key] for key in row}
        if values := {tag: value for tag, value in named.items() if tag and value is not None}:
            self._call("scalars", row["step"], values)

    def finish(self, status: str) -> None:
        """End the runs, once."""
        if self._begun or status == "completed":
            self._call("finish", status)
        self._wanted.clear()

    def _call(self, method: str, *given: Any) -> None:
        off = OFF.keys() & self._wanted.keys() - self._begun.keys()  # another trial could not start these
        self.record.untracked |= {name: OFF[name] for name in off}
        for name in sorted(self._wanted.keys() - off):
            try:
                if name not in self._begun:
                    tracker = maker(name, self._wanted[name])()
                    tracker.start(self)
                    self._begun[name] = tracker
                getattr(self._begun[name], method)(*given)
            except (Exception, SystemExit) as error:
                del self._wanted[name]
                self.record.untracked[name] = why = one_line(error)
                OFF.update({} if name in self._begun else {name: why})
                print(f"note: the tracker {name} has failed, trial {self.record.trial_id} trains without it: {why}")


class TensorBoard:
    """Event files."""

    def start(self, trial: Tracked) -> None:
        """What came after the step that a trial resumes from is superseded."""
        from torch.utils.tensorboard import SummaryWriter

        self.record, self.settings = trial.record, trial.settings
        self.writer = SummaryWriter(str(trial.board), purge_step=trial.step + 1 if trial.step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        if "train/loss" not in values:  # of an epoch
            self.writer.flush()

    def finish(self, status: str) -> None:
        """Of a trial that is completed: what a sweep varies, and the final metric."""
        if status == "completed":
            c = self.record.config
            hparams = {key.rpartition(".")[2]: self.settings.get(key, 0) for key in COLUMNS}
            hparams["targets"], name = " ".join(c["lora"]["targets"] or []), f"val_{c['trainer']['metric']}"
            self.writer.add_hparams(hparams, {f"final/{name}": self.record.metrics[name]}, run_name=".")
        self.writer.close()


class MLflow:
    """A sweep is an experiment; a trial is a run, with its settings as parameters and its ids as tags."""

    def __init__(self, uri: str | None, experiment: str | None):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 let a dead server hold training up for long
        self.mlflow, self.uri, self.experiment = resolve_name("mlflow"), uri, experiment

    def start(self, trial: Tracked) -> None:
        """Continue the run that has this one's tag, if any, after the last step of each of its figures."""
        with locked(trial.folder.parent / ".mlflow.lock"):  # workers that make one database at once spoil it
            client: Any = self.mlflow.MlflowClient(self.uri)
            known = client.get_experiment_by_name(name := self.experiment or trial.group)
            place = known.experiment_id if known else client.create_experiment(name)
        there = client.search_runs([place], f"tags.run = '{trial.run}'")
        ids = {"trial": trial.record.trial_id, "cell": trial.record.cell_id, "run": trial.run}
        run = there[0] if there else client.create_run(place, int(1000 * trial.record.started), ids, trial.name)
        self.record, self.client, self.run, self.waiting = trial.record, client, run.info.run_id, list[Any]()
        self.last = {tag: max(m.step for m in client.get_metric_history(self.run, tag)) for tag in run.data.metrics}
        settings = {} if there else trial.settings
        client.log_batch(self.run, params=[self.mlflow.entities.Param(*pair) for pair in settings.items()])
        client.update_run(self.run, "RUNNING")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Collect them, over thirty rows or to the end of an epoch: a server takes a while to answer."""
        new = {tag: value for tag, value in values.items() if step > self.last.get(tag, 0)}
        self.waiting += [self.mlflow.entities.Metric(*one, int(1000 * time.time()), step) for one in new.items()]
        if "train/loss" not in values or len(self.waiting) > 90:
            self.client.log_batch(self.run, self.waiting)
            self.waiting = []

    def finish(self, status: str) -> None:
        self.scalars(0, {})  # sends what waits
        if status != "running":
            state = {"completed": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
            self.client.set_terminated(self.run, state, int(1000 * (self.record.finished or time.time())))


class WandB:
    """Weights & Biases: a sweep is a group, a trial a run. A run that continues drops the steps that it has."""

    library, next_step = "wandb", "step"
    names: ClassVar = {"id": "{0.run}", "name": "{0.name}", "group": "{0.group}", "reinit": "create_new"}

    def __init__(self, **options: Any):
        self.init, self.options = resolve_name(f"{self.library}:init"), options

    def start(self, trial: Tracked) -> None:
        own = {key: text.format(trial) for key, text in self.names.items()} | {"resume": "allow", **self.options}
        self.run = copy_context().run(self.init, config=trial.settings, **own)  # of two in one, Trackio ends the first
        self.next = getattr(self.run, self.next_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step >= self.next:
            self.run.log(values, step=step)

    def finish(self, status: str) -> None:
        self.run.finish({"completed": 0, "failed": 1}.get(status, 255))


class Trackio(WandB):
    """Trackio, whose functions are those of W&B; it finds a run by its name, and knows no status."""

    library, next_step, names = "trackio", "_next_step", {"name": "{0.name} {0.run}", "group": "{0.group}"}

    def finish(self, status: str) -> None:
        self.run.finish()
