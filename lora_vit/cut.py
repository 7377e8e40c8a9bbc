"""Lower ranks without training again: ``lora-vit cut FOLDER --rank R --out DIR`` of a trial, ``lora-vit ranks SWEEP``.

What is cut is a trial of its own, that every command takes: its config says its rank and the one that was trained.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from lora_vit.cli import add_trial, completed_trial, main
from lora_vit.config import from_dict, ids, to_dict
from lora_vit.config.names import CUT, METHOD
from lora_vit.errors import ConfigError, RecordError
from lora_vit.records import read_record, state_of, write_record
from lora_vit.sweep.__main__ import find
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.terminal import from_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    add = parser.add_argument
    add("--rank", "--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="to cut to, where lower")
    add("--out", type=Path, help="cut the one trial, to one rank, into this new folder; else a sweep's highest rank")
    add("--data-root", help="where the data set is, if not where it was trained from")
    add("--verify", action="store_true", help="then train the lowest rank that may be the best, and compare the two")


def cut(folder: str | Path, rank: int, out: str | Path | None = None, by: str = "layer",
        weights: str | None = None) -> Path:  # fmt: skip
    """Write a completed trial's adapter at a lower rank, without figures, as no data is read; returns the new folder.

    ``out``: None for a place beside the trial, where it may be already; ``by``: as of :func:`.lora.adapter.cut`; the
    rest as of :func:`.evaluate.evaluate`.
    """
    from lora_vit.lora import adapter

    folder, record, _ = completed_trial(folder, weights, "cpu")
    config = from_dict(record.config)
    lora, highest = config.lora, config.lora.rank or 0
    if lora.cut or not 1 <= rank < highest:
        has = f"has rank {highest}" + (f", cut from {lora.cut}" if lora.cut else "") if highest else "has no adapter"
        raise ConfigError(f"--rank {rank} is impossible: trial {record.trial_id} {has}: give one trained above that")
    alpha = lora.effective_scaling() / replace(lora, rank=rank, alpha=1.0).effective_scaling()  # so that scaling stays
    how = str(highest) + " by threshold" * (by == "threshold")
    config.lora, config.tracker = replace(lora, rank=rank, alpha=alpha, cut=how), {}  # no tracker has seen it train
    trial_id, cell_id = ids(config)
    place = folder.parent / trial_id if out is None else Path(out)
    if out is not None and place.exists():
        raise RecordError(f"--out {out} is there already: give a new folder")
    if state_of(place).status != "completed":
        tensors, card = adapter.read_adapter(folder)
        smaller = adapter.cut(tensors, rank, by)
        gone = sum(int(t.count_nonzero() - smaller[name].count_nonzero()) for name, t in tensors.items())
        counts = {name: count - gone * (name != "head") for name, count in record.parameters.items()}
        place.mkdir(parents=True, exist_ok=True)
        card = {**card, "trial_id": trial_id, "lora": vars(config.lora)}
        adapter.write_adapter(place, adapter.Adapter(smaller, card))
        write_record(place, replace(record, trial_id=trial_id, cell_id=cell_id, config=to_dict(config), best={},
                                    metrics={"epoch": record.metrics["epoch"]}, parameters=counts))  # fmt: skip
    return place


def run(args: argparse.Namespace) -> int:
    """Cut one trial, or each completed one of a sweep's highest rank, whose cuts are measured in one pack."""
    if args.out is not None:
        if len(args.rank) > 1:
            raise ConfigError(f"--out {args.out}: give the one --rank to cut to")
        place = cut(args.folder, args.rank[0], args.out, weights=args.weights)
        print(f"python -m lora_vit.evaluate {from_here(place)} measures it")
        return 0
    from lora_vit.trained import trained_pack
    from lora_vit.training.loop import complete, computing

    sweep = Sweep.existing(find(args.folder))
    done = [trial for trial in sweep.trials.values() if sweep.state_of(trial).status == "completed"]
    highest = max((trial.config.lora.rank or 0 for trial in done), default=0)
    if not (lower := sorted({rank for rank in args.rank if rank < highest})):
        raise ConfigError(f"--rank {args.rank}: the highest completed in {sweep.folder} is {highest}: give lower ones")
    for folder in [sweep.folder_of(trial) for trial in done if trial.config.lora.rank == highest]:
        cuts = [cut(folder, rank, None, by, args.weights) for rank in lower for by in ("layer", "threshold")]
        if missing := [one for one in cuts if "val_loss" not in read_record(one).metrics]:
            print(f"{folder}: cut from rank {highest} to {', '.join(map(str, lower))}", flush=True)
            _, _, config = completed_trial(folder, args.weights, args.device, args.data_root)
            for part in [[one] for one in missing] if config.lora.trains_trunk else [missing]:
                pack = trained_pack(part, config, writes=True)
                with computing(pack.setup.device, config.trainer.deterministic):
                    complete(pack)
    print(verify(sweep) if args.verify else f"python -m lora_vit.summarize {from_here(sweep.folder)}")
    return 0


def verify(sweep: Sweep) -> str:
    """Train the lowest rank whose cut may be the best, as an ordinary trial for each seed; how the two compare."""
    from lora_vit.analysis.core import summarize
    from lora_vit.analysis.stats import t_interval
    from lora_vit.analysis.texts import seeds, signed
    from lora_vit.sweep.worker import work

    summary, value = summarize(sweep.folder), f"val_{sweep.metric}"
    cells = summary.cells[summary.cells[METHOD].str.contains(rf"{CUT}\d+$")]
    near = cells[cells["mark"].isin(["best", "candidate"])].sort_values("lora.rank", kind="stable")
    cell = (near if len(near) else cells).iloc[0]
    records = [read_record(Path(f)) for f in summary.trials.loc[summary.trials["cell"] == cell["cell"], "folder"]]
    configs = [from_dict({**one.config, "lora": {**one.config["lora"], "cut": None}}) for one in records]
    trained = [Trial(config, label=f"rank={config.lora.rank} seed={config.seed}") for config in configs]
    with sweep.changing():
        sweep.extend([trial for trial in trained if trial.trial_id not in sweep.trials])
    work(sweep.folder)
    trials = summarize(sweep.folder, metric=sweep.metric).trials.set_index("seed")
    new, old = (trials.loc[trials["cell"] == name, value] for name in (trained[0].cell_id, cell["cell"]))
    d = t_interval((new - old).to_numpy(), 1 / records[0].data["val"])
    told = "the two differ" if d.low > 0 or d.high < 0 else "the seeds do not tell the two apart"
    return (f"{cell['label']}: trained at that rank instead, {signed(d.mean)} points (95 % interval {signed(d.low)} "
            f"to {signed(d.high)}, {seeds(d.n)}): {told}")  # fmt: skip


if __name__ == "__main__":
    main("cut")
