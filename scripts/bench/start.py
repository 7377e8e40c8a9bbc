"""What it costs to begin: help, configuration, and from the command to the first training step, by part.

    python scripts/bench/start.py [--rounds 5]

The parts of a start are measured inside one process that does what ``python -m lora_vit.train experiment=quickstart``
does; the commands are measured as processes, taking turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, report

PARTS = """
import json, time
marks = [("python", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
from lora_vit import api
mark("import hydra")
config = api.compose(["experiment=quickstart"])
mark("compose and validate")
import torch, torchvision
mark("import torch and torchvision")
from lora_vit.build import build_setup
from lora_vit.distributed import Process
mark("import lora_vit")
setup = build_setup(config, Process())
mark("data and weights")
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun
pack = Pack([TrialRun(config)], setup)
mark("adapters, optimizer")
pack.step(pack.learning_rates()[0], False)
mark("first step")
print(json.dumps({b[0]: b[1] - a[1] for a, b in zip(marks, marks[1:])}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commands = {
        "python -c pass": ["-c", "pass"],
        "--help": ["-m", "lora_vit.train", "--help"],
        "--cfg job": ["-m", "lora_vit.train", "--cfg", "job"],
        "summarize --help": ["-m", "lora_vit.summarize", "--help"],
        "first step": ["-c", PARTS],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, command in commands.items():
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *command], cwd=folder, check=True, capture_output=True, text=True
                )
                seconds[name].append(time.perf_counter() - start)
            for part, value in json.loads(done.stdout).items():
                parts.setdefault(part, []).append(value)
    rows = [
        {"what": name, "min s": min(v), "median s": statistics.median(v)}
        for name, v in [*seconds.items(), *((f"- {p}", v) for p, v in parts.items())]
    ]
    report(rows, machine(), args.json)


if __name__ == "__main__":
    main()
