"""Merge a trained adapter into plain torchvision weights: ``python -m lora_vit.merge FOLDER --out FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_vit.commands import add_common, completed_record, recorded_config, run_command
from lora_vit.records import RecordError, replacing

TOLERANCE = 1e-3
"""Largest allowed difference of a logit between the merged model and base plus adapter, both in fp32."""


def merge_folder(folder: Path, out: Path, root: str | None, device: str) -> int:
    """Write the merged weights after comparing them, on val, with base and adapter apart."""
    if out.suffix != ".safetensors":
        raise RecordError(f"--out {out}: give a file name that ends in .safetensors")
    record = completed_record(folder)
    config = recorded_config(record, root, device)
    config.trainer.precision = "fp32"
    import torch
    from safetensors.torch import save
    from torchvision.models import VisionTransformer

    from lora_vit.build import build_setup
    from lora_vit.config import ConfigError
    from lora_vit.distributed import Process
    from lora_vit.lora.merge import load_adapter, merged_state_dict, read_adapter
    from lora_vit.models.vit import build_trunk
    from lora_vit.models.weights import load_trunk_weights

    adapter = read_adapter(folder)
    setup = build_setup(config, Process())
    m, classes = config.model, len(adapter.card["class_names"])
    trunk = build_trunk(m.image_size, m.patch_size, m.num_layers, m.num_heads, m.hidden_dim, m.mlp_dim)
    if m.weights is not None:
        digest = load_trunk_weights(trunk, m.name, m.weights)
        if digest != adapter.card["base"]["sha256"]:
            raise ConfigError(f"model.weights={m.weights} are not the weights this adapter was trained on")
    state = merged_state_dict(trunk.state_dict(), adapter)
    merged = VisionTransformer(
        m.image_size, m.patch_size, m.num_layers, m.num_heads, m.hidden_dim, m.mlp_dim, num_classes=classes
    )
    merged.load_state_dict(state)
    trunk.heads.add_module("head", torch.nn.Linear(m.hidden_dim, classes))
    apart = load_adapter(trunk, folder)
    largest, changed, count = 0.0, 0, 0
    with torch.no_grad():
        merged.to(setup.device).eval()
        apart.to(setup.device).eval()
        for batch in setup.eval_stream("val", 64):
            a, b = apart(batch.images), merged(batch.images)
            largest = max(largest, float((a - b).abs().max()))
            changed += int((a.argmax(-1) != b.argmax(-1)).sum())
            count += len(a)
    print(f"largest logit difference {largest:.2e}, {changed} of {count:,} predictions changed on val")
    if largest > TOLERANCE:
        raise RecordError(f"{folder}: the merged model differs by {largest:.2e} > {TOLERANCE:g}; nothing written")
    with replacing(out) as file:
        file.write(save({name: t.contiguous() for name, t in state.items()}))
    print(loading_line(m.name, m.image_size, classes, out))
    return 0


def loading_line(name: str, image_size: int, classes: int, out: Path) -> str:
    """How to load the merged file into plain torchvision."""
    load = f'load_state_dict(safetensors.torch.load_file("{out}"))'
    if name == "vit_tiny":
        return (
            f"torchvision.models.VisionTransformer(image_size={image_size}, patch_size=8, num_layers=6, num_heads=4, "
            f"hidden_dim=128, mlp_dim=512, num_classes={classes}).{load}"
        )
    return f"torchvision.models.{name}(num_classes={classes}, image_size={image_size}).{load}"


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(prog="python -m lora_vit.merge", description=__doc__)
    add_common(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    args = parser.parse_args()
    run_command(lambda: merge_folder(args.folder, args.out, args.data_root, args.device))


if __name__ == "__main__":
    main()
