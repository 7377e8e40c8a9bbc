"""The view of a single run: a progress bar on a terminal, plain lines elsewhere."""

from rich.table import Column, Table

from lora_vit.terminal import Progress, make_console
from lora_vit.training.loop import Reporter
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun, epoch_figures


class RunReporter(Reporter):
    """Progress of one trial."""

    def __init__(self) -> None:
        self.console = make_console()
        self._progress = Progress("nothing", 0, quiet=True)  # until the first pack is there

    def started(self, pack: Pack) -> None:
        """Print the data, the place and the table of parameters, and start the bar."""
        trial, setup, steps = pack.trials[0], pack.setup, pack.steps_per_epoch
        env = setup.environment
        self.console.print(setup.data.line(setup.transform.image_size), markup=False)
        self.console.print(
            f"trial {trial.name} on {env['device']}, {env['precision']}, {setup.process.world_size} process(es)"
        )
        counts, columns = trial.record.parameters, (Column(name, justify="right") for name in ("count", "share"))
        table = Table("parameters", *columns, box=None, pad_edge=False)
        for name in ("adapter", "head", "trainable", "total"):
            table.add_row(name, f"{counts[name]:,}", f"{counts[name] / counts['total']:.2%}")
        self.console.print(table)
        if trial.config.lora.method == "lora":
            lora, factor = trial.config.lora, trial.config.lora.effective_scaling()
            self.console.print(f"LoRA rank {lora.rank}, alpha {lora.alpha:g}: effective scaling {factor:g}")
        self._progress = Progress("training", trial.config.trainer.epochs * steps, False, "steps", pack.step_of(trial))
        self.console = self._progress.console  # lines go above the bar

    def advance(self, pack: Pack) -> None:
        self._progress.advance(1)

    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None:
        self._progress.figures = f"loss {losses[0]:.4f}  lr {rates[0]:.2e}  {images_per_second:,.0f} images/s"

    def epoch(self, trial: TrialRun, row: dict[str, float]) -> None:
        self.console.print(f"epoch {trial.state.epoch}/{trial.config.trainer.epochs}  {epoch_figures(row)}")

    def close(self) -> None:
        self._progress.close()
