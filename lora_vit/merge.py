"""Merge a trained adapter into weights of the backbone's names: ``lora-vit merge FOLDER --out FILE``."""

import argparse
from pathlib import Path

from lora_vit.cli import add_trial, check_out, completed_trial, main
from lora_vit.config import SIZES
from lora_vit.errors import RecordError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")


def run(args: argparse.Namespace) -> int:
    """Compare the merged weights with base and adapter apart, on made images; write them, say how to load them."""
    check_out(args.out, "--out", ".safetensors")
    if args.out.exists():  # perhaps the adapter, or the base
        raise RecordError(f"--out {args.out} is there already: give a new file")
    _, config = completed_trial(args)
    from lora_vit.lora.adapter import write_tensors
    from lora_vit.trained import TrainedModel

    trained, library, name = TrainedModel(args.folder, config), config.model.library, config.model.name
    trained.compare(trained.merged, f"{args.folder}: the merged model")
    write_tensors(args.out, trained.merged.state_dict(), trained.about)
    base = trained.adapter.card["base"]
    if library == "torchvision":
        made = "torchvision.models.VisionTransformer(" + "".join(f"{k}={base[k]}, " for k in SIZES)
    else:
        made = f"timm.create_model({name!r}, img_size={base['image_size']}, "
    print(f"lora_vit.preprocessing({str(args.out)!r})(FILE) prepares a picture for it:")
    print(f"import safetensors.torch, {library}\nmodel = {made}num_classes={len(trained.class_names)})")
    print(f"model.load_state_dict(safetensors.torch.load_file({str(args.out)!r}))")
    return 0


if __name__ == "__main__":
    main("merge")
