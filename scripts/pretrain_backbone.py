"""Pretrain the embedded backbone ``vit_tiny`` on images drawn by formula.

The idea is that of Kataoka et al., "Pre-training without Natural Images" (ACCV 2020): classes are made
by a random formula, samples by varying its parameters, and a network that learns to tell the classes
apart learns features that transfer. Here a class is a *glyph*: two or three strokes, each a quadratic
Bezier curve, a longer quadratic B-spline, or a closed loop. A sample jitters the control points and
varies pose, thickness, sharpness, resolution, contrast, colour and noise. No photograph and no
drawing made by a person is used.

    python scripts/pretrain_backbone.py --out lora_vit/models/vit_tiny.safetensors
    python scripts/pretrain_backbone.py --steps 20 --out smoke.safetensors      # seconds, to try it

Shape letters: B image, C class, S stroke, N control point, P curve point, X pixel per side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

IMAGE_SIZE = 32
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_STROKES = 3
CONTROL_POINTS = 6  # the largest stroke kind (the loop) has six; the others leave some unused
CURVE_POINTS = 48  # close enough together that a long stroke shows no beads
BEZIER, SPLINE, LOOP = 0, 1, 2


def stroke_basis() -> Tensor:
    """Matrices that turn control points into curve points, one per stroke kind: ``(3, P, N)``.

    All three kinds are linear in their control points, so one product draws a mixed batch.
    """
    t = torch.linspace(0.0, 1.0, CURVE_POINTS)
    basis = torch.zeros(3, CURVE_POINTS, CONTROL_POINTS)
    basis[BEZIER, :, :3] = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)

    # A chain of quadratic Beziers over five points that meet, smoothly, at the midpoints of the inner legs.
    eye = torch.eye(CONTROL_POINTS)
    knots = [eye[0], (eye[1] + eye[2]) / 2, (eye[2] + eye[3]) / 2, eye[4]]
    basis[SPLINE] = _chain([(knots[i], eye[i + 1], knots[i + 1]) for i in range(3)], t)

    mid = [(eye[i - 1] + eye[i]) / 2 for i in range(CONTROL_POINTS)]
    legs = [(mid[i], eye[i], mid[(i + 1) % CONTROL_POINTS]) for i in range(CONTROL_POINTS)]
    basis[LOOP] = _chain(legs, t)
    return basis


def _chain(legs: list[tuple[Tensor, Tensor, Tensor]], t: Tensor) -> Tensor:
    """Rows of the basis of joined quadratic Beziers, the parameter ``t`` in [0, 1] running over all legs."""
    rows = []
    for value in (t * len(legs)).tolist():
        leg = min(int(value), len(legs) - 1)
        u = value - leg
        start, control, end = legs[leg]
        rows.append((1 - u) ** 2 * start + 2 * u * (1 - u) * control + u**2 * end)
    return torch.stack(rows)


@dataclass(frozen=True)
class Glyphs:
    """The classes: their control points and which strokes they have."""

    control_CSN2: Tensor  # in [-1, 1], x to the right and y down
    kind_CS: Tensor  # BEZIER, SPLINE or LOOP
    present_CS: Tensor  # 1.0 where the class has the stroke, else 0.0


def make_glyphs(classes: int, generator: torch.Generator) -> Glyphs:
    """Draw the formula of every class.

    Half of the open strokes start where the stroke before ended, as handwriting does. Each glyph is scaled to
    fill the frame, so that size tells nothing about the class.
    """
    g = generator
    shape = (classes, MAX_STROKES)
    control = torch.rand(*shape, CONTROL_POINTS, 2, generator=g) * 2 - 1
    kind = torch.multinomial(torch.tensor([0.4, 0.35, 0.25]), math.prod(shape), True, generator=g).view(shape)
    strokes = torch.randint(2, MAX_STROKES + 1, (classes, 1), generator=g)
    present = (torch.arange(MAX_STROKES) < strokes).float()

    angle = torch.linspace(0, 2 * math.pi, CONTROL_POINTS + 1)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    radius = 0.3 + 0.5 * torch.rand(*shape, 1, 2, generator=g)
    centre = (torch.rand(*shape, 1, 2, generator=g) * 2 - 1) * 0.6
    loop = centre + radius * circle + 0.1 * torch.randn(*shape, CONTROL_POINTS, 2, generator=g)
    control = torch.where((kind == LOOP)[..., None, None], loop, control)

    joined = torch.rand(shape, generator=g) < 0.5
    last = torch.where(kind == SPLINE, 4, 2)
    rows = torch.arange(classes)
    for s in range(1, MAX_STROKES):
        end = control[rows, s - 1, last[:, s - 1]]
        join = joined[:, s] & (kind[:, s] != LOOP)
        control[:, s, 0] = torch.where(join[:, None], end, control[:, s, 0])

    points = stroke_basis()[kind] @ control
    absent = (present == 0)[..., None, None]
    low = points.masked_fill(absent, math.inf).amin(dim=(1, 2))[:, None, None]
    high = points.masked_fill(absent, -math.inf).amax(dim=(1, 2))[:, None, None]
    half = ((high - low) / 2).clamp_min(0.3)
    return Glyphs((control - (low + high) / 2) / half, kind, present)


class GlyphSampler:
    """Renders batches of ``(image, class)``; the same generator state gives the same batch."""

    def __init__(self, glyphs: Glyphs, generator: torch.Generator) -> None:
        self.glyphs = glyphs
        self.generator = generator
        self.basis_3PN = stroke_basis()
        self.mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        self.std = torch.tensor(STD).view(1, 3, 1, 1)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def _chance(self, probability: float, count: int) -> Tensor:
        return (torch.rand(count, generator=self.generator) < probability).view(-1, 1, 1, 1)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return normalised images ``(B, 3, 32, 32)`` and labels ``(B,)``."""
        label = torch.randint(len(self.glyphs.kind_CS), (size,), generator=self.generator)
        ink = self._low_resolution(self._ink(label))
        return (self._colour(ink).clamp(0, 1) - self.mean) / self.std, label

    def _ink(self, label: Tensor) -> Tensor:
        """Coverage in [0, 1] of every pixel, ``(B, 1, X, X)``.

        The pen is a Gaussian, which is separable: the sum over curve points is one (X, P) by (P, X) product
        per image. A point weighs as much as the piece of curve it stands for, so that speed along the curve
        does not show; the exponential saturates crossings.
        """
        size = len(label)
        control = self.glyphs.control_CSN2[label]
        control = control + 0.09 * torch.randn(control.shape, generator=self.generator)
        points = self.basis_3PN[self.glyphs.kind_CS[label]] @ control

        turn = self._uniform(-0.3, 0.3, size)
        shear = self._uniform(-0.3, 0.3, size)
        scale = self._uniform(0.6, 1.0, size, 2)
        cos, sin = turn.cos(), turn.sin()
        rotate = torch.stack([cos, -sin, sin, cos], dim=-1).view(size, 2, 2)
        skew = torch.eye(2).repeat(size, 1, 1)
        skew[:, 0, 1] = shear
        affine = rotate @ skew * scale[:, None, :]
        shift = self._uniform(-0.12, 0.12, size, 1, 2)

        step = F.pad((points[..., 1:, :] - points[..., :-1, :]).norm(dim=-1), (1, 1))
        length = (step[..., 1:] + step[..., :-1]) / 2 * self.glyphs.present_CS[label][..., None]
        points = (points.flatten(1, 2) @ affine.mT + shift + 1) * (IMAGE_SIZE / 2) - 0.5
        length = length.flatten(1) * scale.mean(dim=1, keepdim=True) * (IMAGE_SIZE / 2)

        pen = self._uniform(0.8, 2.0, size, 1)
        grid = torch.arange(IMAGE_SIZE, dtype=torch.float32).view(1, -1, 1)
        spread = torch.exp(-((grid[..., None] - points[:, None]) ** 2) / (2 * pen.view(-1, 1, 1, 1) ** 2))
        across, down = spread.unbind(dim=-1)
        weight = length / (pen * math.sqrt(2 * math.pi))
        density = (down * weight[:, None, :]) @ across.mT
        return (1 - torch.exp(-self._uniform(1.5, 6.0, size, 1, 1) * density))[:, None]

    def _low_resolution(self, ink: Tensor) -> Tensor:
        """Scan some images at 8 or 16 pixels, as small data sets are, and enlarge them again."""
        size = len(ink)
        for side, probability in ((8, 0.5), (16, 0.1)):
            small = F.avg_pool2d(ink, IMAGE_SIZE // side)
            small = torch.where(self._chance(0.5, size), (small * 16).round() / 16, small)
            large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
            ink = torch.where(self._chance(probability, size), large, ink)
        return ink

    def _colour(self, ink: Tensor) -> Tensor:
        """Bright grey on dark for most images; any ink on any paper, shaded, for the rest."""
        size = len(ink)
        bright, dark = self._uniform(0.6, 1.0, size, 1, 1, 1), self._uniform(0.0, 0.1, size, 1, 1, 1)
        grey = dark + (bright - dark) * ink

        paper, contrast = self._uniform(0, 1, size, 3, 1, 1), self._uniform(0.35, 0.9, size, 3, 1, 1)
        pigment = torch.where(paper > 0.5, paper - contrast, paper + contrast)
        axis = torch.linspace(-1, 1, IMAGE_SIZE)
        slope = self._uniform(-0.2, 0.2, size, 2, 1, 1)
        shade = slope[:, :1] * axis.view(1, 1, 1, -1) + slope[:, 1:] * axis.view(1, 1, -1, 1)
        coloured = paper + (pigment - paper) * ink + shade

        image = torch.where(self._chance(0.75, size), grey.expand_as(coloured), coloured)
        level = torch.where(self._chance(0.4, size), self._uniform(0.0, 0.1, size, 1, 1, 1), torch.zeros(1))
        return image + level * torch.randn(image.shape, generator=self.generator)


def build_model(classes: int) -> VisionTransformer:
    """``vit_tiny``: 17 tokens of width 128, depth 6, 1.2 M parameters without the head."""
    return VisionTransformer(
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_layers=6,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
        num_classes=classes,
    )


def save_backbone(model: nn.Module, path: Path, facts: dict[str, int | float]) -> None:
    """Write the weights without the head, in one move, so that a reader never sees half a file.

    The facts are one metadata entry: safetensors orders several entries differently in every process.
    """
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items() if not k.startswith("heads.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, metadata={"pretraining": json.dumps(facts, sort_keys=True)})
    partial.chmod(0o644)  # safetensors writes for the owner only; this file is to be shipped
    os.replace(partial, path)


def train(args: argparse.Namespace) -> float:
    """Train, save every ``--save-every`` steps and at the end; return the accuracy over the last steps.

    Every sample is drawn afresh, so this training accuracy is measured on images not seen before.
    """
    torch.manual_seed(args.seed)
    glyphs = make_glyphs(args.classes, torch.Generator().manual_seed(args.seed))
    sampler = GlyphSampler(glyphs, torch.Generator().manual_seed(args.seed + 1))
    model = build_model(args.classes)
    # torchvision starts the head at zero; a small start lets the backbone learn from the first step.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    # Biases, norms and positions say where things are; decay would only pull them to an arbitrary zero.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 or n == "conv_proj.weight"]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 or n == "conv_proj.weight")]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    recent: deque[float] = deque(maxlen=200)
    start = time.perf_counter()
    facts = {"seed": args.seed, "classes": args.classes, "batch_size": args.batch_size}

    for step in range(1, args.steps + 1):
        image, label = sampler.batch(args.batch_size)
        logits = model(image)
        loss = F.cross_entropy(logits, label, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        recent.append((logits.argmax(1) == label).float().mean().item())
        accuracy = sum(recent) / len(recent)
        if step % args.log_every == 0 or step == args.steps:
            spent = time.perf_counter() - start
            shown = f"loss {loss.item():.3f} accuracy {accuracy:.4f} {spent:.0f} s"
            print(f"step {step}/{args.steps} {shown}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save_backbone(model, args.out, {**facts, "steps": step, "accuracy": round(accuracy, 4)})
    return accuracy


def parse_args() -> argparse.Namespace:
    """Command-line options; the defaults make the file that ships with the package."""
    parser = argparse.ArgumentParser(description="Pretrain vit_tiny on glyphs drawn by formula.")
    default = Path(__file__).resolve().parents[1] / "lora_vit" / "models" / "vit_tiny.safetensors"
    parser.add_argument("--out", type=Path, default=default, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="the peak of the one-cycle schedule")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--log-every", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saves")
    return parser.parse_args()


def main() -> None:
    """Run the pretraining."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    accuracy = train(args)
    print(f"final training accuracy {accuracy:.4f} -> {args.out}")


if __name__ == "__main__":
    main()
