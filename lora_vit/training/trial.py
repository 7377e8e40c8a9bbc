"""One trial from start or resume to its end, with its saving."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_vit import records
from lora_vit.config import TrialConfig, ids, to_dict, trial_id
from lora_vit.errors import ConfigError, RecordError
from lora_vit.files import locked, replacing
from lora_vit.records import TrialRecord
from lora_vit.training.checkpoint import TrialState, load_checkpoint
from lora_vit.training.setup import Setup
from lora_vit.training.trackers import ClaimLost, TrialFiles

OWN_FILES = (
    *(records.RECORD, records.METRICS, records.TIMING, records.LOG, records.PREDICTIONS, records.CHECKPOINT),
    *("adapter.safetensors", "adapter.json"),
    *(f".hydra/{name}.yaml" for name in ("config", "overrides", "hydra")),
)
"""What a trial writes, beside its folder ``tensorboard``."""


@dataclass(eq=False)
class TrialRun:
    """A trial: what it is, where it stands and where it writes (rank 0 only)."""

    config: TrialConfig
    record: TrialRecord
    state: TrialState
    files: TrialFiles | None = None

    @classmethod
    def without_files(cls, config: TrialConfig) -> TrialRun:
        """A new trial without files."""
        return cls(config, TrialRecord(*ids(config), "running", to_dict(config)), TrialState())

    @classmethod
    def open(
        cls,
        config: TrialConfig,
        folder: Path,
        setup: Setup,
        hydra_files: dict[str, str],
        tensorboard: Path | None = None,
        restart: bool = False,
        mine: Callable[[], bool] | None = None,
    ) -> TrialRun:
        """The trial with its state and files, ready to train; no other process may use the folder.

        It starts from scratch in a folder without a record and where it failed at a step; else it resumes.

        Args:
            config: of the trial.
            folder: of the trial, which is not completed unless it restarts.
            setup: where and on what it trains.
            hydra_files: name to text of what goes into ``.hydra/``.
            tensorboard: where event files go, if not below the folder.
            restart: remove what the trial left, and start from scratch.
            mine: whether the trial is still this process's, see :class:`TrialFiles`.

        Raises:
            ConfigError: the folder, its data or its checkpoint are not this trial's.
            ClaimLost: the trial is another process's now.
        """
        there = records.state_of(folder, config)
        if there.problem:
            raise ConfigError(there.problem)
        if mine is not None and not mine():
            raise ClaimLost(trial_id(config))
        _remove_temporary_files(folder)
        record = there.record
        if record is None or restart or (record.error or {}).get("step") is not None:
            _remove_own_files(folder, tensorboard)
            record = TrialRecord(*ids(config), "running", to_dict(config), started=time.time())
            state = TrialState()
        elif there.status == "completed":
            raise ValueError(f"{folder}: the trial is completed")  # its checkpoint is gone
        else:
            state = _last_state(folder, record, setup)
            record.config, record.error, record.finished = to_dict(config), None, None
            record.metrics, record.best = dict(state.last), dict(state.best)
        record.status = "running"
        record.environment, record.data = setup.environment, setup.data.card()
        trial = cls(config, record, state, TrialFiles(folder, record, state, tensorboard, mine))
        for name, text in hydra_files.items():
            (folder / ".hydra").mkdir(exist_ok=True)
            with replacing(folder / ".hydra" / name) as file:
                file.write(text.encode())
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

    def beat(self) -> None:
        """Give a sign of life, the time of ``record.json``; another thread may call this."""
        if self.files is not None and self.record.status == "running":
            with contextlib.suppress(OSError):  # a disk that cannot be written ends the training itself
                os.utime(self.files.folder / records.RECORD)

    def close(self) -> None:
        """Close the logs; the record stays as it was written last."""
        if self.files is not None:
            self.files.close()

    def complete(self) -> None:
        """Record that the trial is completed; its results are written, so that its checkpoint goes."""
        self.record.status, self.record.finished = "completed", time.time()
        if self.files is not None:
            self.files.write_record()
            self.files.say(self.record.status)
            (self.files.folder / records.CHECKPOINT).unlink(missing_ok=True)
            self.files.close()

    def interrupt(self) -> None:
        """Record that the trial was asked to stop; it resumes from its checkpoint."""
        self.record.status = "interrupted"
        self._end(self.record.status)

    def fail(self, message: str, step: int | None = None, error: BaseException | None = None) -> None:
        """Record that the trial failed, with the reason; ``step``: the training step that is to blame."""
        trace = "".join(traceback.format_exception(error)) if error is not None else None
        self.record.error = {"message": message, "step": step, "traceback": trace}
        self.record.status, self.record.finished = "failed", time.time()
        self._end(trace or message)

    def _end(self, said: str) -> None:
        if self.files is None:
            return
        try:
            with contextlib.suppress(OSError):  # a full disk is often the reason itself
                self.files.write_record()
                self.files.say(said)
        finally:
            self.files.close()


def _last_state(folder: Path, record: TrialRecord, setup: Setup) -> TrialState:
    """The checkpoint of a trial that started with this data and precision. Raises ConfigError for others."""
    precision = "another precision (trainer.precision=auto is"
    for what, there, here in (
        ("other splits (fingerprint", record.data.get("fingerprint"), setup.data.fingerprint),
        (precision, record.environment.get("precision"), setup.environment.get("precision")),
    ):
        if there not in (None, here):
            raise ConfigError(
                f"{folder} was started with {what} {there} there, {here} here): resume it where and with what it was "
                "started, or give trainer.resume=restart"
            )
    try:
        return load_checkpoint(folder, record.trial_id)
    except RecordError as error:
        raise ConfigError(str(error)) from None


def _remove_own_files(folder: Path, tensorboard: Path | None) -> None:
    """Remove what a trial writes, and nothing else."""
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for board in filter(None, (folder / "tensorboard", tensorboard)):
        if board.is_dir():
            shutil.rmtree(board)


def _remove_temporary_files(folder: Path) -> None:
    """Remove what processes left that were killed while they replaced a file."""
    for path in (folder / name for name in OWN_FILES):
        for temporary in path.parent.glob(f".{path.name}.*"):
            temporary.unlink(missing_ok=True)


def completed_record(folder: Path, config: TrialConfig) -> TrialRecord | None:
    """The record of a trial that is completed; None: there is something to train.

    Raises ConfigError where the folder holds another trial, or a record that cannot be read.
    """
    there = records.state_of(folder, config)
    if there.problem:
        raise ConfigError(there.problem)
    return there.record if there.status == "completed" else None


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a trial's folder, made if need be.

    Raises ConfigError if another process holds it or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is training there, wait for it or stop it") from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                remedy = "mount its file system with locks (Lustre: -o flock), or give a folder on another one"
                raise ConfigError(f"{folder} cannot be locked ({error.strerror}): {remedy}") from None
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): give another folder") from None
        yield
