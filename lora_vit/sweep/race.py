"""A sweep with ``sweep.margin``: its cells race. Which trials it has and wants, as the records say. Knows no torch."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Console

from lora_vit.analysis.load import as_float
from lora_vit.analysis.race import Race, Rules, decide, typical_trials, wanted
from lora_vit.records import State
from lora_vit.sweep.plan import Job, SweepRun, without_seed
from lora_vit.terminal import print_table


class SweepRace:
    """The race of a sweep: all decisions come from the records, so that any command at any time goes on with it.

    Attributes:
        cells: a trial of each cell with the first seed, in the order that ties are settled in (by cell id).
        jobs: every trial of the race that has been looked for, by cell and number of its seed.
        states: of those that have ended.
    """

    def __init__(self, run: SweepRun, joined: list[Job]):
        """``run``: what the command asks for; ``joined``: of cells that earlier commands have raced here."""
        self.run, options = run, run.options
        self.first = run.jobs[0].config.seed
        asked, images = {job.cell_id: job for job in run.jobs}, {job.config.data.content for job in run.jobs}
        settings = [set(without_seed(job.overrides)) for job in run.jobs]
        for job in joined:  # not what has become another cell, whose weights or images have changed
            if job.config.data.content in images and set(without_seed(job.overrides)) not in settings:
                asked.setdefault(job.cell_id, job)
        self.cells = [asked[cell] for cell in sorted(asked)]
        self.plan = {"margin": options.margin, "first_seeds": options.first_seeds, "most_seeds": options.most_seeds,
                     "seed": self.first, "cells": sorted(asked)}  # fmt: skip
        self.rules = Rules.of(self.plan)
        self.jobs: dict[tuple[int, int], Job] = {}
        self.states: dict[tuple[int, int], State] = {}
        self.race = Race(np.zeros(0), np.zeros(0), [])

    def job(self, cell: int, number: int) -> Job:
        """The cell's trial with the race's ``number``-th seed."""
        if (cell, number) not in self.jobs:
            self.jobs[cell, number] = self.cells[cell].with_seed(self.first + number)
        return self.jobs[cell, number]

    def look(self, workers: int) -> list[Job]:
        """Read the records and decide; the trials that are wanted next, none where the race has ended."""
        shape = (len(self.cells), self.rules.most_seeds)
        y, failed, images = np.full(shape, np.nan), np.zeros(shape, dtype=bool), [math.inf]
        for place in np.ndindex(shape):
            job = self.job(*place)
            if place not in self.states:
                state = self.run.state_of(job)
                if state.record is None or not self.run.is_ended(job, state):
                    continue
                self.states[place] = state
            record, failed[place] = self.states[place].record, True
            if record is not None and record.status == "completed":
                accuracy = as_float(record.metrics.get("val_accuracy"))
                y[place], failed[place] = (accuracy, False) if 0 <= accuracy <= 1 else (np.nan, True)
                images.append(record.data.get("val") or math.inf)
        self.race = decide(y, failed, self.rules, 1 / min(images))
        known = [row[np.isfinite(row)] for row in y]
        spreads = [float(row.var(ddof=1)) for row in known if len(row) > 1]
        self.spread = math.sqrt(sum(spreads) / len(spreads)) if spreads else 0.0
        return [self.job(*place) for place in wanted(self.race, y, failed, self.rules, workers)]

    def ended_jobs(self) -> list[Job]:
        """The trials that have ended, by cell."""
        return [self.jobs[place] for place in sorted(self.states)]

    def failed(self) -> list[str]:
        """Ids of the trials that have ended as failed; for Hydra, that of the cell's first trial comes with each."""
        places = [place for place, state in self.states.items() if state.status != "completed"]
        return [job.trial_id for cell, number in places for job in (self.jobs[cell, number], self.jobs[cell, 0])]

    def standing(self) -> str:
        """Where the race stands, in a line."""
        race, trials, k = self.race, len(self.states), len(self.cells)
        if not race.seeds:
            return f"race: {k} cells, {trials} trials so far, at least {k * self.rules.first_seeds}"
        if not race.ended:
            return (f"race: {len(race.survivors)} of {k} cells are left after {race.seeds} seeds, {trials} trials so "
                    f"far, about {race.expected(self.rules)} more if the means stay")  # fmt: skip
        end = f"{self.cells[race.selected].cell_label} is selected" if race.selected is not None else "not resolved"
        return f"race: {end} after {race.seeds} seeds, {trials} trials"

    def show(self, console: Console, most: int) -> None:
        """Print the cells: who is left and by how much its mean may still fall, and who left when."""
        race, rows = self.race, []
        for i, mean in enumerate(race.means):
            exit = race.exits.get(i)
            room = "" if not np.isfinite(race.room[i]) else f"{100 * race.room[i]:.2f}"
            if exit is None:
                state = "selected" if i == race.selected else "left over" if race.ended else "in"
            elif exit.behind is None:
                state = f"out: failed at seed {self.first + exit.seeds - 1}"
            else:
                state = f"out after {exit.seeds} seeds: behind {self.cells[exit.behind].cell_label}"
            order = (exit is not None, -race.seeds_of(i), -mean if np.isfinite(mean) else 0.0)
            text = f"{100 * mean:.2f}" if np.isfinite(mean) else "-"
            rows.append((order, (self.cells[i].cell_label, text, str(race.seeds_of(i)), room, state)))
        rows.sort(key=lambda row: row[0])
        header = ("cell", "mean val accuracy", "seeds", "may fall by", "")
        print_table(console, self.standing(), header, [row for _, row in rows], most)

    def sizes(self) -> str:
        """How many trials the race may take, in a line."""
        k, rules = len(self.cells), self.rules
        spread, whose = (self.spread, "have here") if self.spread else (0.6 * rules.margin, "may have")
        typical = max(len(self.states) + self.race.expected(rules), typical_trials(k, spread, rules) if k > 1 else 0)
        if self.race.seeds:
            typical = len(self.states) + self.race.expected(rules)
        return (f"a race of {k} cells takes at least {k * rules.first_seeds} trials, at most {k * rules.most_seeds}, "
                f"typically about {typical} (where trials of a cell spread by {100 * spread:.2f} points, as they "
                f"{whose}); {len(self.states)} have ended")  # fmt: skip
