"""Workers as an array of Slurm jobs, through submitit."""

import contextlib
import io
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from lora_vit.errors import ConfigError
from lora_vit.sweep.engines import LOG_LINES, Engine
from lora_vit.sweep.trial import digest
from lora_vit.sweep.worker import exit_code


class Job(submitit.helpers.Checkpointable):
    """What a job runs. On its time limit or preemption it saves, and submitit queues it again."""

    def __call__(self, folder: Path) -> int:
        return exit_code(folder)


class Slurm(Engine):
    outlives_us, poll_every = True, 10.0  # sites throttle those who ask often

    def __init__(self, parameters: dict[str, Any], folder: Path):
        """``parameters``: submitit's, by its names. Raises ConfigError if there is no Slurm."""
        self.folder = folder.resolve()
        # of a sweep's workers, also of those that an earlier command has started
        self.name = f"{parameters.pop('job_name')}-{digest(str(self.folder), 8)}"
        self.logs = self.folder / ".slurm"
        self.jobs: list[Any] = []
        times, general = parameters.pop("max_num_timeout"), ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")
        theirs = {key if key in general else f"slurm_{key}": value for key, value in parameters.items()}
        try:
            self.executor = submitit.AutoExecutor(self.logs, cluster="slurm", slurm_max_num_timeout=times)
            self.executor.update_parameters(name=self.name, **theirs)
        except RuntimeError:
            raise ConfigError("engine=slurm: no Slurm here (no srun): start the command on a login node") from None

    def number_of_workers(self, asked: str, trials: Sequence[Any]) -> int:
        if asked == "auto":  # Slurm does not say how many there could be
            raise ConfigError("sweep.workers=auto: say how many jobs Slurm is to run side by side, as sweep.workers=4")
        return min(int(asked), len(trials))

    def start(self, count: int) -> str:
        try:
            with contextlib.redirect_stderr(io.StringIO()), self.executor.batch():  # one array of jobs
                jobs = [self.executor.submit(Job(), self.folder) for _ in range(count)]
        except FailedJobError as error:
            said = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
            raise ConfigError(f"Slurm refuses the workers ({said[-1].strip()}): change engine.*") from None
        self.jobs += jobs
        array = jobs[0].job_id.partition("_")[0]
        return f"{count} workers: Slurm job {array}, logs in {self.logs}; `scancel -n {self.name}` ends them"

    def look(self) -> tuple[int, list[str]]:
        command = ["squeue", "--me", "--noheader", "--array", f"--name={self.name}", "--format=%i"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        is_away, texts = done.returncode != 0, []
        queue = {job.job_id for job in self.jobs} if is_away else set(done.stdout.split())  # of whichever command
        for job in [job for job in self.jobs if job.job_id not in queue]:
            self.jobs.remove(job)
            outcome, result = "lost", "it was killed, or its node died"
            with contextlib.suppress(Exception):  # no result, or half of one
                outcome, result = job._get_outcome_and_result()
            if outcome == "success" and result == 0:
                continue
            result = f"ended with code {result}" if outcome == "success" else result
            lines = str(result).strip().splitlines()[-1:]
            for path in (job.paths.stdout, job.paths.stderr):
                with contextlib.suppress(OSError):
                    lines += path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            if not job.paths.stdout.exists():
                lines.append(f"it left no log: do the nodes see {self.logs}?")
            texts.append("\n  ".join([f"worker {job.job_id} ({job.paths.stdout}):", *lines]))
        return len(queue), texts

    def stop(self, now: bool = False) -> None:
        subprocess.run(["scancel", "--me", f"--name={self.name}"], check=False)  # kills half a minute later (KillWait)

    def withdraw(self) -> None:
        """Those of every command for this folder: they could wait for days, and then start for nothing."""
        subprocess.run(["scancel", "--me", f"--name={self.name}", "--state=PENDING"], check=False)
