"""What PEFT's LoRA does on the Vision Transformers of torchvision and timm, against weights with the update added.

    python scripts/peft_pitfalls.py

Small random models, nothing is downloaded, a few seconds. Every row is measured: adapters get random values, and the
logits are compared with those of a copy of the base whose weights are W + scaling B A. docs/peft_pitfalls.md explains
the rows and says what can be done.
"""

from __future__ import annotations

import copy
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timm import create_model
from torch import Tensor, nn
from torchvision.models import VisionTransformer

RANK, ALPHA = 4, 8
SCALING = ALPHA / RANK
PACKAGES = ("peft", "timm", "torchvision", "torch")
Row = tuple[str, str, str, bool]
"""Model, setting, what was measured, and whether that is what this page is about."""


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros, which hide everything
    return model.eval()


def timm_vit(name: str) -> nn.Module:
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    model = create_model(name, depth=2, embed_dim=64, num_heads=4, img_size=4 * patch, num_classes=5)
    for p in model.parameters():  # layer scale begins near zero, which hides everything
        nn.init.normal_(p, std=0.2)
    return model.eval()


def adapted(base: nn.Module, targets: list[str] | str, dropout: float = 0.0) -> PeftModel:
    """A copy with adapters that are not zero."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets)
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def updates(model: PeftModel) -> dict[str, Tensor]:
    """scaling B A of each adapter, by the name of its module in the base."""
    found = dict(model.named_parameters())
    pairs = {name.partition(".lora_A.")[0]: name for name in found if ".lora_A." in name}
    return {
        place.removeprefix("base_model.model.").replace(".base_layer", ""): SCALING
        * (found[name.replace("lora_A", "lora_B")] @ found[name]).detach()
        for place, name in pairs.items()
    }


def logits(base: nn.Module, images: Tensor, add: dict[str, Tensor]) -> Tensor:
    """Of a copy of the base with the updates in its weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for place, update in add.items():
            module = model.get_submodule(place)
            weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
            weight += update.view_as(weight)
        return model(images)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def images_for(model: nn.Module) -> Tensor:
    size = model.image_size if isinstance(model, VisionTransformer) else model.patch_embed.img_size[0]
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))


def output_projection_twice() -> Iterator[Row]:
    base = torchvision_vit()
    images = images_for(base)
    model = adapted(base, ["self_attention"])
    add = updates(model)
    twice = {place: 2 * update if "out_proj" in place else update for place, update in add.items()}
    with torch.no_grad():
        forward, merged = model(images), copy.deepcopy(model).merge_and_unload()(images)
    for what, found in (("forward", forward), ("merge_and_unload()", merged)):
        from_once, from_twice = (difference(found, logits(base, images, a)) for a in (add, twice))
        text = (
            f"{what}: differs from out_proj + update by {from_once:.0e}, from out_proj + 2 updates by {from_twice:.0e}"
        )
        yield "torchvision vit", "self_attention", text, from_once > 1e-2 and from_twice < 1e-5


def dropout_without_effect() -> Iterator[Row]:
    for targets in (["self_attention"], ["mlp.0", "mlp.3"]):
        base = torchvision_vit()
        model = adapted(base, targets, dropout=0.9).train()  # torchvision's own dropout is 0
        with torch.no_grad():
            a, b = model(images_for(base)), model(images_for(base))
        found = difference(a, b)
        setting = f"{', '.join(targets)}; lora_dropout=0.9"
        yield "torchvision vit", setting, f"two training passes differ by {found:.0e}", found == 0


def attention_left_out() -> Iterator[Row]:
    base = torchvision_vit()
    model = adapted(base, "all-linear")
    model(images_for(base)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name and "self_attention" in name}
    queries = any("self_attention" in place and "out_proj" not in place for place in updates(model))
    trained = sum(grad is not None for grad in grads.values())
    text = f"query, key, value adapted: {'yes' if queries else 'no'}; out_proj adapters with a gradient: {trained} of "
    yield "torchvision vit", "all-linear", f"{text}{len(grads)}", not queries and trained == 0


def output_projection_alone() -> Iterator[Row]:
    base = torchvision_vit()
    model = adapted(base, ["out_proj"])
    try:
        model(images_for(base)).sum().backward()
    except RuntimeError as error:
        text, seen = f"backward() raises {type(error).__name__}: {str(error)[:47]} ...", True
    else:
        text, seen = "backward() runs", False
    yield "torchvision vit", "out_proj", text, seen


def query_key_value() -> Iterator[Row]:
    biased = ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb"]
    plain = ["vit_small_patch16_dinov3", "vit_base_patch16_224"]
    for name in [*biased, *(f"{name}, bias separate" for name in biased), *plain]:
        base = timm_vit(name.split(",")[0])
        if "separate" in name:
            for block in base.blocks:
                block.attn.qkv_bias_separate = True
        images = images_for(base)
        model = adapted(base, ["qkv", "fc2"])
        found = model(images)
        found.sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if ".qkv.lora_" in n]
        add = updates(model)
        rest = {place: update for place, update in add.items() if "qkv" not in place}
        without, with_it = (difference(found, logits(base, images, a)) for a in (rest, add))
        trained = sum(grad is not None for grad in grads)
        text = f"differs from qkv by {without:.0e}, from qkv + update by {with_it:.0e}"
        text += f"; qkv's adapters with a gradient: {trained} of {len(grads)}"
        yield f"timm {name}", "qkv, fc2", text, trained == 0 and without < 1e-5 and with_it > 1e-2


def patch_embedding_too() -> Iterator[Row]:
    model = adapted(timm_vit("vit_base_patch16_224"), ["qkv", "proj"]).get_base_model()
    places = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    extra = [place for place in places if not place.startswith("blocks.")]
    text = f"{len(places)} adapters, outside the blocks: {', '.join(extra) or 'none'}"
    yield "timm vit_base_patch16_224", "qkv, proj", text, bool(extra)


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    "1 out_proj updated twice": output_projection_twice,
    "2 dropout without effect": dropout_without_effect,
    "3 attention left out": attention_left_out,
    "4 out_proj alone": output_projection_alone,
    "5 qkv adapters that are never called": query_key_value,
    "6 patch embedding taken along": patch_embedding_too,
}


def rows() -> list[tuple[str, ...]]:
    """Every check's rows: pitfall, model, target_modules, measured, seen or not."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [
            (pitfall, model, setting, measured, "seen" if seen else "–")
            for pitfall, check in CHECKS.items()
            for model, setting, measured, seen in check()
        ]
    about = {str(w.message) for w in told if "/peft/" in w.filename}
    return [*found, ("warnings from PEFT", "all of these", "", "; ".join(sorted(about)) or "none", "")]


def main() -> None:
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES) + f", Python {platform.python_version()}\n")
    print("| pitfall | model | target_modules | measured | |\n|---|---|---|---|---|")
    for row in rows():
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
