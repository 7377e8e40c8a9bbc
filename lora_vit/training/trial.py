"""One trial on its way: begun, gone on with, saved, and how it ended."""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_vit import files, records
from lora_vit.config import TrialConfig, ids, to_dict
from lora_vit.errors import ConfigError, RecordError
from lora_vit.records import TrialRecord
from lora_vit.training.checkpoint import TrialState, load_checkpoint
from lora_vit.training.setup import Setup
from lora_vit.training.trackers import TrialFiles

OWN_FILES = (
    records.RECORD,
    records.METRICS,
    records.TIMING,
    records.LOG,
    records.PREDICTIONS,
    "adapter.safetensors",
    "adapter.json",
    records.CHECKPOINT,
    "tensorboard",
    ".hydra",
)


@dataclass(eq=False)
class Trial:
    """A trial: what it is, where it stands and where it writes (rank 0 only)."""

    config: TrialConfig
    record: TrialRecord
    state: TrialState
    files: TrialFiles | None = None

    @classmethod
    def without_files(cls, config: TrialConfig) -> Trial:
        """A new trial that nothing remembers."""
        return cls(config, TrialRecord(*ids(config), "running", to_dict(config)), TrialState())

    @classmethod
    def open(
        cls,
        config: TrialConfig,
        folder: Path,
        setup: Setup,
        launched: float,
        hydra_files: dict[str, str],
        tensorboard: Path | None = None,
    ) -> Trial:
        """The trial with its state and files, ready to train; the folder is locked.

        It begins anew where nothing is there, where ``trainer.resume=restart`` asks for it, and where it failed at a
        step; else it goes on from its checkpoint.

        Args:
            config: of the trial.
            folder: of the trial.
            setup: where and on what it trains.
            launched: when the command began (seconds since 1970): only what is older is restarted.
            hydra_files: name to text of what goes into ``.hydra/``.
            tensorboard: where event files go, if not below the folder.

        Raises:
            ConfigError: the folder, its data or its checkpoint are not this trial's.
        """
        there = records.state_of(folder, config)
        if there.problem:
            raise ConfigError(there.problem)
        record = there.record
        if record is None or _begins_anew(record, config, launched):
            _remove_own_files(folder, tensorboard)
            record = TrialRecord(*ids(config), "running", to_dict(config), started=time.time())
            state = TrialState()
        else:
            state = _last_state(folder, record, setup)
            record.config, record.error, record.finished = to_dict(config), None, None
            record.metrics, record.best = dict(state.last), dict(state.best)
        record.status = "running"
        record.environment, record.data = setup.environment, setup.data.card()
        trial = cls(config, record, state, TrialFiles(folder, record, state, tensorboard))
        write_hydra_files(folder, hydra_files)
        return trial

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.record.trial_id

    def done(self) -> bool:
        """Whether all epochs are trained."""
        return self.state.epoch >= self.config.trainer.epochs

    def save(self) -> None:
        """Write the checkpoint. Raises OSError (disk full, unwritable) and leaves the last good one."""
        if self.files is not None:
            self.files.save_checkpoint()

    def close(self) -> None:
        """Close the logs; the record stays as it was written last."""
        if self.files is not None:
            self.files.close()

    def complete(self) -> None:
        """Record that the trial is completed; its results are written."""
        self.record.status, self.record.finished = "completed", time.time()
        if self.files is not None:
            self.files.say(self.record.status)
            self.files.write_record()
            self.files.close()

    def interrupt(self) -> None:
        """Record that the trial was asked to stop; it goes on from its checkpoint."""
        self.record.status = "interrupted"
        self._end()

    def fail(self, message: str, step: int | None = None, error: BaseException | None = None) -> None:
        """Record that the trial failed, with the reason; ``step``: the training step that is to blame."""
        trace = "".join(traceback.format_exception(error)) if error is not None else None
        self.record.error = {"message": message, "step": step, "traceback": trace}
        self.record.status, self.record.finished = "failed", time.time()
        self._end(trace or message)

    def _end(self, said: str = "") -> None:
        if self.files is None:
            return
        with contextlib.suppress(OSError):  # a full disk is often the reason itself
            self.files.say(said or self.record.status)
            self.files.write_record()
        self.files.close()


def _begins_anew(record: TrialRecord, config: TrialConfig, launched: float) -> bool:
    restarted = config.trainer.resume == "restart" and record.started < launched
    return restarted or bool(record.error and record.error.get("step") is not None)


def _last_state(folder: Path, record: TrialRecord, setup: Setup) -> TrialState:
    """The checkpoint of a trial that was begun with this data and in this precision. Raises ConfigError for others."""
    fingerprint, precision = record.data.get("fingerprint"), record.environment.get("precision")
    for what, begun_with, now in (
        ("other splits (fingerprint", fingerprint, setup.data.fingerprint),
        ("another precision (trainer.precision=auto is", precision, setup.environment.get("precision")),
    ):
        if begun_with not in (None, now):
            raise ConfigError(
                f"{folder} was begun with {what} {begun_with} there, {now} here): go on where and with what it was "
                "begun, or train anew with trainer.resume=restart"
            )
    try:
        return load_checkpoint(folder, record.trial_id)
    except RecordError as error:
        raise ConfigError(str(error)) from None


def _remove_own_files(folder: Path, tensorboard: Path | None) -> None:
    """Remove what a trial writes, and nothing else."""
    for path in (*(folder / name for name in OWN_FILES), *([tensorboard] if tensorboard else [])):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_hydra_files(folder: Path, files: dict[str, str]) -> None:
    """Write ``.hydra/`` into a trial's folder."""
    if files:
        (folder / ".hydra").mkdir(exist_ok=True)
    for name, text in files.items():
        with files.replacing(folder / ".hydra" / name) as file:
            file.write(text.encode())


def ended_record(folder: Path, config: TrialConfig, launched: float) -> TrialRecord | None:
    """The record of a trial that has ended, for a run of this trial alone; None: it is open.

    Raises:
        ConfigError: the folder holds another trial, or a record that cannot be read.
    """
    state = records.state_of(folder, config)
    if state.problem:
        raise ConfigError(state.problem)
    return state.record if state.is_ended(config.trainer.resume == "restart", launched, retry_failed=True) else None


@contextlib.contextmanager
def locked_folder(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a trial's folder, made if need be.

    Raises ConfigError where another process holds it (unless we wait for it) or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(folder / ".lock", wait))
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is training there, wait for it or stop it") from None
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): give another folder") from None
        yield
