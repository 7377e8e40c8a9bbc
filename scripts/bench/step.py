"""One training step: ours against the frozen floor, plain LoRA modules, full fine-tuning and PEFT.

    pip install -e ".[bench]"
    python scripts/bench/step.py --batch 4 --rounds 10
    python scripts/bench/step.py --model timm:vit_small_patch14_dinov2 --precision bf16
    python scripts/bench/step.py --model vit_l_16 --only "ours, K = 4" "ours, recomputed" "PEFT, recomputed"

Every contender has the same weights, threads, images and trained tensors (PEFT adapts q, k, v, o and both MLP layers
of HF's own ViT, or timm's fused qkv and the others, where it is right); the frozen logits are compared first. The
*floor* is our trunk without adapters and with the gradient through all blocks: what any adapter method on this trunk
has to pay. *Recomputed*: blocks are computed again in backward (trainer.checkpoint_activations, and PEFT with its
library's own). *K = 4*: a pack of four trials, by trial.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import interleaved, machine, paired_ratio, peak_memory, report
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit.api import compose
from lora_vit.build import DTYPES, ModelFactory
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.lora.backbones import timm_model
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import remove_adapter, use_own_attention
from lora_vit.models.vit import PackedViT
from lora_vit.training.pack import Pack
from lora_vit.training.trial import Setup, TrialRun

CLASSES, SIZE = 200, 224
RANK, ALPHA = 8, 32.0
AGAIN = "trainer.checkpoint_activations=true"
OURS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "ours, dropout 0.1": ("lora.dropout=0.1",),
    "ours, DoRA": ("lora=dora",),
    "full fine-tuning": ("lora=full",),
    "ours, DoRA, dropout 0.1": ("lora=dora", "lora.dropout=0.1"),
    "ours, recomputed": (AGAIN,),
    "ours, K = 4": (),
    "ours, K = 4, recomputed": (AGAIN,),
}
USUAL = ["floor", *list(OURS)[:4], "plain LoRA modules", "PEFT", "PEFT, DoRA"]
NAMES = [*USUAL, *(name for name in OURS if name not in USUAL), "PEFT, recomputed"]


def trial(*overrides: str) -> TrialConfig:
    """The headline task with overrides; its images, which no step here reads, are made up."""
    return compose(["data=fake", *overrides])


def our_step(build: Any, configs: list[TrialConfig], images: Tensor, labels: Tensor) -> Callable[[], object]:
    """The training step of a pack as the loop takes it, of a model that ``build`` makes; its trials share images."""
    samples: Any = SimpleNamespace(data=SimpleNamespace(splits={"train": np.arange(len(labels))}))
    transform: Any = SimpleNamespace(dtype=images.dtype)
    setup = Setup(build, samples, transform, images.device, Process(), {}, {})
    pack = Pack([TrialRun(config) for config in configs], setup)
    lr_K1 = torch.full((pack.K, 1), configs[0].optimizer.lr, device=images.device)
    labels_KB = labels.expand(pack.K, -1)
    return lambda: pack.update(images, labels_KB, lr_K1, False)


def torch_step(model: nn.Module, logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], object]:
    """An ordinary training step with torch's AdamW."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.03)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits(x).float(), y).backward()
        optimizer.step()

    return step


class PlainLoRA(nn.Module):
    """The usual LoRA module around a linear layer: three lines, nothing saved or recomputed."""

    def __init__(self, weight: Tensor, bias: Tensor, groups: int):
        super().__init__()
        self.weight, self.bias = weight, bias
        out, width = weight.shape
        self.lora_A = nn.Parameter(torch.randn(groups, RANK, width, device=weight.device) * 0.02)
        self.lora_B = nn.Parameter(torch.zeros(groups, out // groups, RANK, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        update = torch.cat([F.linear(F.linear(x, a[g]), b[g]) for g in range(len(a))], dim=-1)
        return F.linear(x, self.weight, self.bias) + update * (ALPHA / RANK)


class PlainBlock(nn.Module):
    """An encoder block with our attention's arithmetic and plain LoRA modules."""

    def __init__(self, block: nn.Module):
        super().__init__()
        attention = block.self_attention
        self.heads, self.first_token_only = attention.num_heads, attention.first_token_only
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.qkv = PlainLoRA(attention.in_proj_weight, attention.in_proj_bias, 3)
        self.out = PlainLoRA(attention.out_proj.weight, attention.out_proj.bias, 1)
        self.fc1 = PlainLoRA(block.mlp[0].weight, block.mlp[0].bias, 1)
        self.fc2 = PlainLoRA(block.mlp[3].weight, block.mlp[3].bias, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.ln_1.normalized_shape, self.ln_1.weight.to(x), self.ln_1.bias.to(x), self.ln_1.eps)
        q, k, v = self.qkv(y).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.first_token_only:
            q, x = q[:, :, :1], x[:, :1]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, self.ln_2.normalized_shape, self.ln_2.weight.to(x), self.ln_2.bias.to(x), self.ln_2.eps)
        return x + self.fc2(F.gelu(self.fc1(y)))


def hf_peft(trunk: VisionTransformer, head: nn.Linear, dora: bool) -> tuple[nn.Module, nn.Module]:
    """HF's ViT with the same weights, and PEFT on its q, k, v, o, fc1 and fc2."""
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    blocks = trunk.encoder.layers
    sizes = {"hidden_size": trunk.hidden_dim, "intermediate_size": trunk.mlp_dim, "num_hidden_layers": len(blocks),
             "num_attention_heads": blocks[0].self_attention.num_heads, "patch_size": trunk.patch_size}  # fmt: skip
    config = ViTConfig(num_labels=CLASSES, layer_norm_eps=1e-6, attn_implementation="sdpa", **sizes)
    hf = ViTForImageClassification(config)
    source, target = trunk.state_dict(), {}
    target["vit.embeddings.cls_token"] = source["class_token"]
    target["vit.embeddings.position_embeddings"] = source["encoder.pos_embedding"]
    for leaf in ("weight", "bias"):
        target[f"vit.embeddings.patch_embeddings.projection.{leaf}"] = source[f"conv_proj.{leaf}"]
        target[f"vit.layernorm.{leaf}"] = source[f"encoder.ln.{leaf}"]
        target[f"classifier.{leaf}"] = getattr(head, leaf)
        for i in range(len(trunk.encoder.layers)):
            ours, theirs = f"encoder.layers.encoder_layer_{i}", f"vit.layers.{i}"
            parts = source[f"{ours}.self_attention.in_proj_{leaf}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                target[f"{theirs}.attention.{name}_proj.{leaf}"] = part
            target[f"{theirs}.attention.o_proj.{leaf}"] = source[f"{ours}.self_attention.out_proj.{leaf}"]
            target[f"{theirs}.mlp.fc1.{leaf}"] = source[f"{ours}.mlp.0.{leaf}"]
            target[f"{theirs}.mlp.fc2.{leaf}"] = source[f"{ours}.mlp.3.{leaf}"]
            target[f"{theirs}.layernorm_before.{leaf}"] = source[f"{ours}.ln_1.{leaf}"]
            target[f"{theirs}.layernorm_after.{leaf}"] = source[f"{ours}.ln_2.{leaf}"]
    hf.load_state_dict(target)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora, modules_to_save=["classifier"])
    return hf, get_peft_model(copy.deepcopy(hf), lora)


def timm_peft(name: str, trunk: nn.Module, head: nn.Linear, dora: bool) -> tuple[nn.Module, nn.Module]:
    """timm's own model with the same weights, and PEFT on its blocks' qkv, proj, fc1 and fc2."""
    from peft import LoraConfig, get_peft_model

    model = timm_model(name, SIZE, CLASSES)
    model.load_state_dict({**trunk.state_dict(), **{f"head.{leaf}": t for leaf, t in head.state_dict().items()}})
    targets = r"blocks\..*\.(qkv|proj|fc1|fc2)"  # not patch_embed.proj
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora, modules_to_save=["head"])
    return model, get_peft_model(copy.deepcopy(model), lora)


def contenders(model_name: str, batch: int, precision: str, names: list[str]) -> dict[str, Callable[[], object]]:
    """Steps by name; PEFT's first compares its frozen logits with ours."""
    of_timm = model_name.removeprefix("timm:") if model_name.startswith("timm:") else None
    kind = [f"model={model_name}"] if of_timm is None else ["model=timm", f"model.name={of_timm}"]
    kind += [f"model.image_size={SIZE}", "model.weights=null"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[precision]
    torch.manual_seed(0)
    x = torch.randn(batch, 3, SIZE, SIZE, device=device, dtype=dtype)
    y = torch.randint(CLASSES, (batch,), device=device)

    def made(*overrides: str) -> tuple[ModelFactory, TrialConfig]:
        rank = [] if "lora=full" in overrides else [f"lora.rank={RANK}"]
        config = trial(*kind, f"data.batch_size={batch}", *rank, *overrides)
        return ModelFactory(config, CLASSES, device, dtype), config

    def ours() -> PackedViT:
        factory, config = made()
        return factory([config])

    steps: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == "floor":
            model, config = ours(), made()[1]
            use_own_attention(remove_adapter(model.trunk))
            token: Any = model.trunk.class_token if of_timm is None else model.trunk.cls_token
            token.requires_grad_()
            steps[name] = our_step(lambda _, m=model: m, [config], x, y)
        elif name in OURS:
            factory, config = made(*OURS[name])
            steps[name] = our_step(factory, [config] * trials_of(name), x, y)
        elif name == "plain LoRA modules":
            model = ours()
            blocks = model.trunk.encoder.layers
            for key, block in list(blocks.named_children()):
                setattr(blocks, key, PlainBlock(block))
            steps[name] = torch_step(model, lambda im, m=model: _reset(m, im, y)[0], x, y)
        else:
            model = ours()
            head = nn.Linear(model.head.weight.shape[-1], CLASSES, device=device, dtype=dtype)
            use_own_attention(remove_adapter(model.trunk))
            trunk, head, dora = model.trunk.float(), head.float(), name == "PEFT, DoRA"
            plain, peft = hf_peft(trunk, head, dora) if of_timm is None else timm_peft(of_timm, trunk, head, dora)
            with torch.no_grad():
                features = model.trunk(x[:2].float())
                mine, theirs = head(features), _logits(plain.to(device).eval(), x[:2].float())
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
            peft.to(device, dtype)
            if "recomputed" in name and of_timm is None:
                peft.gradient_checkpointing_enable({"use_reentrant": False})
            elif "recomputed" in name:
                peft.get_base_model().set_grad_checkpointing()
            steps[name] = torch_step(peft, lambda im, m=peft: _logits(m, im), x, y)
    return steps


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def _reset(model: PackedViT, images: Tensor, y: Tensor) -> Tensor:
    state: DropoutState = model.head.state
    state.set(torch.zeros(1, dtype=torch.int64, device=y.device), torch.arange(len(y), device=y.device))
    return model(images, [0])


def trials_of(name: str) -> int:
    return 4 if "K = 4" in name else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="vit_b_16", metavar="NAME", help="vit_b_16, vit_l_16 or timm:NAME")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=USUAL)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="the process's own seconds: for one thread on a shared machine"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    left_out = () if not args.model.startswith("timm:") else ("plain LoRA modules",)  # written for torchvision's block
    names = [name for name in NAMES if name in ("floor", "ours", *args.only) and name not in left_out]
    steps = contenders(args.model, args.batch, args.precision, names)
    memory = {name: peak_memory(step) / 2**20 for name, step in steps.items()}
    seconds = interleaved(steps, args.rounds, clock=time.process_time if args.cpu_seconds else time.perf_counter)
    rows = [
        {
            "contender": name,
            "trials": trials_of(name),
            "min s": min(seconds[name]) / trials_of(name),
            "median s": sorted(seconds[name])[len(seconds[name]) // 2] / trials_of(name),
            "time / floor": paired_ratio(seconds, name, "floor") / trials_of(name),
            "time / ours": paired_ratio(seconds, name, "ours") / trials_of(name),
            "peak MiB over the model": memory[name],
            "memory / floor": memory[name] / memory["floor"],
            "memory / ours": memory[name] / memory["ours"],
        }
        for name in names
    ]
    facts = {
        **machine(),
        "model": args.model,
        "px": SIZE,
        "batch": args.batch,
        "rank": RANK,
        "precision": args.precision,
    }
    report(rows, facts, args.json)


if __name__ == "__main__":
    main()
