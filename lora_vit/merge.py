"""Merge a trained adapter into weights of the backbone's names: ``lora-vit merge FOLDER --out FILE``."""

import argparse
from pathlib import Path

from lora_vit.cli import add_trial, check_out, completed_trial, main
from lora_vit.config import SIZES
from lora_vit.errors import RecordError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")


def merge(folder: str | Path, out: str | Path, weights: str | None = None, device: str = "auto") -> str:
    """Write a completed trial's merged weights to a file; returns the lines of Python that load it.

    They are compared with base and adapter apart first, on made images. The rest as of :func:`.evaluate.evaluate`.
    """
    check_out(out := Path(out), "--out", ".safetensors")
    if out.exists():  # perhaps the adapter, or the base
        raise RecordError(f"--out {out} is there already: give a new file")
    folder, _, config = completed_trial(folder, weights, device)
    from lora_vit.lora.adapter import write_tensors
    from lora_vit.trained import TrainedModel

    trained, library, name = TrainedModel(folder, config.model, device), config.model.library, config.model.name
    trained.compare(trained.merged, f"{folder}: the merged model")
    write_tensors(out, trained.merged.state_dict(), trained.about)
    base = trained.adapter.card["base"]
    if library == "torchvision":
        made = "torchvision.models.VisionTransformer(" + "".join(f"{k}={base[k]}, " for k in SIZES)
    else:
        made = f"timm.create_model({name!r}, img_size={base['image_size']}, "
    lines = f"import safetensors.torch, {library}\nmodel = {made}num_classes={len(trained.class_names)})"
    return f"{lines}\nmodel.load_state_dict(safetensors.torch.load_file({str(out)!r}))"


def run(args: argparse.Namespace) -> int:
    lines = merge(args.folder, args.out, args.weights, args.device)
    print(f"lora_vit.preprocessing({str(args.out)!r})(FILE) prepares a picture for it:\n{lines}")
    return 0


if __name__ == "__main__":
    main("merge")
