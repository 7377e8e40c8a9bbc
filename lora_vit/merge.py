"""Merge a trained adapter into weights of the backbone's names: ``python -m lora_vit.merge FOLDER --out FILE``."""

from __future__ import annotations

import json
from pathlib import Path

from lora_vit.commands import check_out, completed_record, recorded_config, run_command, trial_parser
from lora_vit.records import RecordError, replacing

TOLERANCE = 1e-3
"""Largest difference of a logit between the merged model and base plus adapter, both in fp32, relative to the largest
logit (or 1): both round each product."""
CHECKED = 16
"""Made images that are classified both ways before anything is written."""


def merge_folder(folder: Path, out: Path, weights: str | None, device: str) -> int:
    """Write the merged weights after comparing them, on made images, with base and adapter apart."""
    if out.suffix != ".safetensors":
        raise RecordError(f"--out {out}: give a file name that ends in .safetensors")
    check_out(out, "--out")
    config = recorded_config(completed_record(folder), device, weights)
    import torch
    from safetensors.torch import save

    from lora_vit import randomness
    from lora_vit.build import ModelFactory, choose_device
    from lora_vit.distributed import Process
    from lora_vit.lora.adapter import bind, merged_state_dict, put_on, read_adapter
    from lora_vit.lora.backbones import SIZES, TORCHVISION, new_backbone

    where = choose_device(device, Process())
    adapter = read_adapter(folder)
    names = adapter.card["class_names"]
    factory = ModelFactory(config, len(names), where, torch.float32)
    bind(adapter, factory.base)
    if factory.note:
        print(factory.note)
    state = merged_state_dict(factory.original, adapter)
    merged = new_backbone(factory.base, len(names))
    merged.load_state_dict(state)
    put_on(factory.original, adapter)
    side = factory.inputs["image_size"]
    images = torch.rand(CHECKED, 3, side, side, generator=randomness.generator("merge")) * 4 - 2
    with torch.no_grad():
        apart, together = (m.to(where).eval()(images.to(where)) for m in (factory.original, merged))
    largest = float((apart - together).abs().max())
    changed = int((apart.argmax(-1) != together.argmax(-1)).sum())
    print(f"largest logit difference {largest:.2e}, {changed} of {CHECKED} predictions changed on made images")
    if not largest <= TOLERANCE * max(1.0, float(apart.abs().max())):
        raise RecordError(f"{folder}: the merged model differs by {largest:.2e}; nothing written")
    about = {"class_names": names, "model": config.model.name, **factory.inputs}
    metadata = {"lora_vit": json.dumps(about, sort_keys=True)}  # with several entries the bytes are not stable
    with replacing(out) as file:
        file.write(save({name: t.contiguous() for name, t in state.items()}, metadata))
    of_torchvision = factory.base["architecture"] == TORCHVISION
    sizes = {key: factory.base[key] for key in (SIZES if of_torchvision else ("image_size",))}
    arguments = ", ".join(f"{key}={value}" for key, value in {**sizes, "num_classes": len(names)}.items())
    print(f"import safetensors.torch, {config.model.library}")
    if of_torchvision:
        print(f"model = torchvision.models.VisionTransformer({arguments})")
    else:
        print(f"model = timm.create_model({config.model.name!r}, {arguments.replace('image_size', 'img_size')})")
    print(f"model.load_state_dict(safetensors.torch.load_file({str(out)!r}))")
    return 0


def main() -> None:
    """Command-line entry."""
    parser = trial_parser("merge", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    args = parser.parse_args()
    run_command(lambda: merge_folder(args.folder, args.out, args.weights, args.device))


if __name__ == "__main__":
    main()
