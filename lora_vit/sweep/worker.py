"""A worker of a sweep: takes packs of open trials, trains them on one device, and leaves records."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from lora_vit.config import to_dict
from lora_vit.errors import NO_SPACE, ConfigError, Interrupted, TrialFailed, one_line, out_of_memory, reporting
from lora_vit.records import State
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import ENDED, FREE, Claims
from lora_vit.sweep.pack_size import PackSizes, free_memory, take_gpu
from lora_vit.sweep.packs import Packs
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.source import source_of
from lora_vit.sweep.trial import Group, Trial
from lora_vit.sweep.view import ending
from lora_vit.terminal import make_console
from lora_vit.training.loop import Reporter, train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.trial import ClaimLost, Setup, TrialRun

POLL_EVERY = 0.5  # seconds between looks while other processes hold what is left
POLL_EVERY_TRIAL = 0.001  # or so many for each trial of a large sweep, whose folder takes long to list
OF_THE_DEVICE = re.compile("CUDA error|CUDA driver|cuDNN error|CUBLAS_STATUS|NCCL error")  # nothing works after these


def work(folder: Path) -> None:
    """Be a worker of a sweep on a device of its own, until no trial is open or held by others; raises as it does."""
    say = functools.partial(make_console().print, markup=False)
    with StopRequest() as stop, Claims(folder).living() as claims:
        sweep = Sweep.existing(folder)
        say(f"a worker of {folder}: {len(sweep.planned)} trials are planned")
        Worker(sweep, claims, stop, say).work()
    say("no trial is left to train")


def exit_code(folder: Path) -> int:
    try:
        with reporting():
            work(folder)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Worker(Reporter):
    """Trains a sweep's open trials on one device until none is left.

    A worker's own trouble (no images, a sick GPU, a full disk) is never a trial's end: it gives back what it cannot
    train. A trial fails by a loss that is not finite, or by an error that two processes have seen.
    """

    def __init__(self, sweep: Sweep, claims: Claims, stop: StopRequest, say: Callable[[str], None]):
        self.sweep, self.claims, self.stop, self.say = sweep, claims, stop, say
        take_gpu(sweep.planned, claims.held)
        self.sizes = PackSizes(sweep, claims, stop, say)
        self.packs, self.source = Packs(sweep, claims), source_of(sweep)
        self._last_error = ""  # of a trial, if the one before this ended by it

    def work(self) -> None:
        """Train until no trial is left. Raises ConfigError (some cannot be trained here), TrialFailed, Interrupted."""
        for group, trials in self.claimed():
            try:
                self.train_pack(group, trials, self.sizes.setup_of(trials[0]))
            except ConfigError as error:  # what the group trains on cannot be had here
                self.give_up([trial.trial_id for trial in group.trials], str(error))
            except ClaimLost as error:
                self.say(f"{error} was taken over by another process")
            finally:
                for trial in trials:
                    self.claims.release(trial.trial_id)
        for name, why in self.packs.skip.items():
            raise ConfigError(f"{len(self.packs.skip)} trials cannot be trained here: {name}: {why}")

    def claimed(self) -> Iterator[tuple[Group, list[Trial]]]:
        """Claim pack after pack, and wait while others hold what is left, until nothing is left that we can train."""
        strays = False  # whether the last look found free trials, none for us
        asked = -1  # trials that had ended when we asked for more
        while True:
            self.stop.heed()
            standing = self.packs.look()
            if standing == ENDED or (standing != FREE and asked != self.claims.ended()):
                asked = self.claims.ended()  # another worker may just have asked
                is_new = self.source.extend()
                standing = self.packs.look() if is_new or standing == ENDED else standing
            if standing == ENDED:
                return
            is_vain = True
            for pack in self.packs.take(self.sizes.of, strays):
                is_vain, asked = False, -1
                yield pack
                self.stop.heed()
            strays = is_vain and standing == FREE
            if is_vain:
                self.stop.sleep(max(POLL_EVERY, len(self.sweep.trials) * POLL_EVERY_TRIAL))

    def give_up(self, trial_ids: list[str], why: str) -> None:
        self.say(f"{len(trial_ids)} trials cannot be trained here: {why}")
        self.packs.skip.update(dict.fromkeys(trial_ids, why))

    def train_pack(self, group: Group, trials: list[Trial], setup: Setup) -> None:
        """Train trials together that stand at one step of their epochs; after an error, each half by itself."""
        parts: list[list[str]] = []
        by_step: dict[int, list[TrialRun]] = {}
        with contextlib.ExitStack() as opened:
            for run in filter(None, (self.open(trial, setup) for trial in trials)):
                opened.callback(run.close)
                by_step.setdefault(run.state.step_in_epoch, []).append(run)
            for members in by_step.values():
                parts += self.train_together(group, members, setup)
        if parts:
            free_memory()
        for part in parts:
            self.train_pack(group, [trial for trial in trials if trial.trial_id in part], setup)

    def open(self, trial: Trial, setup: Setup) -> TrialRun | None:
        """Open a claimed trial; None: its folder does not fit what is here, so it is left to others."""
        folder, name, plan = self.sweep.folder_of(trial), trial.trial_id, self.sweep.plan
        config = yaml.safe_dump({**to_dict(trial.config), "sweep": plan["options"]}, sort_keys=False)
        files = {"config.yaml": config, "overrides.yaml": yaml.safe_dump(trial.overrides), "hydra.yaml": plan["hydra"]}
        board = self.sweep.folder / "tensorboard" / trial.board
        try:
            folder.mkdir(exist_ok=True)
            return TrialRun.open(trial.config, folder, setup, files, board, mine=lambda: self.claims.mine(name))
        except ConfigError as error:
            self.claims.release(name)
            self.give_up([name], str(error))
            return None

    def started(self, pack: Pack) -> None:
        self.say(f"training {', '.join(run.name for run in pack.trials)}")

    def advance(self, pack: Pack) -> None:
        """Called after every step: others see how far the trials are."""
        for run in pack.trials:
            self.claims.progress[run.name] = run.state.epoch + pack.step_in_epoch / pack.steps_per_epoch

    def left(self, trial: TrialRun) -> None:
        self.claims.release(trial.name, ENDED)
        self.say(ending(self.sweep.trials[trial.name], State(trial.record.status, trial.record), self.sweep.metric))

    def train_together(self, group: Group, runs: list[TrialRun], setup: Setup) -> list[list[str]]:
        """Train a pack; ids of the halves that resume after an error. Raises TrialFailed (device), OSError (disk)."""
        try:
            with self.sizes.fitting(group, len(runs), setup):
                train_trials(runs, setup, self, self.stop)
            self._last_error = ""
            return []
        except Exception as error:
            if isinstance(error, (Interrupted, ClaimLost)) or (isinstance(error, OSError) and error.errno in NO_SPACE):
                raise
            if isinstance(error, RuntimeError) and OF_THE_DEVICE.search(str(error)) and not out_of_memory(error):
                raise TrialFailed(f"the device of this worker is broken, restart it: {one_line(error)}") from None
            if len(runs) == 1:
                self.blame(runs[0], error)
            text = one_line(error)
            error.with_traceback(None)  # its frames hold the pack
        rest = [run.name for run in runs if run.record.status == "running"]
        half = max(1, len(rest) // 2)
        if len(runs) > 1:
            self.say(f"a pack of {len(runs)} ended ({text}): packs of {half} resume from its checkpoints")
        return [part for part in (rest[:half], rest[half:]) if part]

    def blame(self, run: TrialRun, error: Exception) -> None:
        """An error of a trial alone: record it as failed if another process saw it too, else leave it to another."""
        text = one_line(error)
        if _alike(self.claims.seen_elsewhere(run.name), text):
            run.fail(text, error=error)
            self.left(run)
        else:
            run.interrupt()
            self.claims.release(run.name, FREE, text)
            self.give_up([run.name], text)
            if _alike(self._last_error, text):  # then this process is to blame
                raise TrialFailed(f"two trials in a row ended here with the same error: {text}")
            self._last_error = text


def _alike(one: str, other: str) -> bool:
    """Whether two errors say the same but for their numbers: a full GPU's names free bytes and processes."""
    return re.sub(r"[\d.]+", "#", one) == re.sub(r"[\d.]+", "#", other)
