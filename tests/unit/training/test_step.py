"""Steps of a pack against plain torchvision, torch.optim and cross_entropy; and what a trial that goes bad does."""

from __future__ import annotations

import math

import pytest
import torch
from packs import new_pack, three
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import VisionTransformer

from lora_vit import distributed
from lora_vit.training.pack import Pack, sample_losses


class Plain:
    """A trial in plain PyTorch: torchvision's model with W + s B A as its weights, torch's loss and optimizer."""

    def __init__(self, pack: Pack, k: int):
        self.config, setup = pack.trials[k].config, pack.setup
        m = self.config.model
        sizes = (m.image_size, m.patch_size, m.num_layers, m.num_heads, m.hidden_dim, m.mlp_dim)
        self.model = VisionTransformer(*sizes, num_classes=len(setup.data.class_names)).double()
        base = {n: p.double() for n, p in setup.build_model.original.state_dict().items()}
        self.base = {n: p.detach() for n, p in self.model.state_dict().items()} | base
        self.trained = {n: t.clone().requires_grad_() for n, t in pack.export(k, pack.flat.values_KP).items()}
        lora = self.config.lora
        self.scaling = lora.alpha / (math.sqrt(lora.rank) if lora.scaling == "rslora" else lora.rank)
        o = self.config.optimizer
        how = {"lr": o.lr, "weight_decay": o.weight_decay, "betas": tuple(o.betas), "eps": o.eps}
        self.optimizer = torch.optim.AdamW(self.trained.values(), **how)

    def weights(self) -> dict[str, Tensor]:
        state = dict(self.base)
        for name, tensor in self.trained.items():
            if name.startswith("heads."):
                state[name] = tensor
            elif name.endswith("lora_A"):
                module, layer = name.removesuffix(".lora_A").rsplit(".", 1)
                weight = f"{module}.{layer}.weight"
                update = self.scaling * self.trained[f"{module}.{layer}.lora_B"] @ tensor
                if layer in "qkv":  # torchvision has the three in one matrix
                    weight = f"{module}.in_proj_weight"
                    update = torch.cat([update if other == layer else torch.zeros_like(update) for other in "qkv"])
                state[weight] = state[weight] + update
        return state

    def step(self, images: Tensor, labels: Tensor, lr: float) -> float:
        o = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        logits = functional_call(self.model, self.weights(), (images,))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=o.label_smoothing)
        loss.backward()
        if o.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(self.trained.values()), o.clip_norm)
        self.optimizer.step()
        return loss.item()


def test_an_epoch_of_a_pack_equals_plain_pytorch():
    pack = new_pack(three({"model.head_dropout": 0.0, "lora.dropout": 0.0, "data.augment": "crop_flip"}))
    plain = [Plain(pack, k) for k in range(3)]
    losses, expected = [], []
    for i, lr_K1 in enumerate(pack.learning_rates()):
        batches = [pack.streams[g].batch(0, i) for g in pack.stream_of_trial]
        expected.append([p.step(*b[:2], float(lr)) for p, b, lr in zip(plain, batches, lr_K1[:, 0], strict=True)])
        losses.append(pack.step(lr_K1, False).tolist())
    assert len(losses) == 7
    # fp64, products and sums in another order over seven steps
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-10, atol=1e-10)
    for k, p in enumerate(plain):
        for name, tensor in pack.export(k, pack.flat.values_KP).items():
            torch.testing.assert_close(tensor, p.trained[name].detach(), rtol=1e-8, atol=1e-10)
    sums = torch.tensor(expected, dtype=torch.float64).sum(0)
    torch.testing.assert_close(pack.loss_sum_K, sums, rtol=1e-10, atol=1e-10)
    assert pack.step_K.tolist() == [7, 7, 7]
    assert pack.first_bad_step_K.tolist() == [-1, -1, -1]


@pytest.fixture(scope="module")
def untroubled():
    """What a pack comes to in four steps, with the states before, on the way and after."""
    pack = new_pack(three())
    rows = [state_of(pack)]
    for lr_K1 in pack.learning_rates()[:4]:
        pack.step(lr_K1, False)
        rows.append(state_of(pack))
    return rows


def state_of(pack: Pack) -> list[Tensor]:
    o = pack.optimizer
    return [t.clone() for t in (pack.flat.values_KP, o.exp_avg_KP, o.exp_avg_sq_KP, o.updates_K1)]


@pytest.mark.parametrize("bad_step", [0, 1])
@pytest.mark.parametrize("trouble", ["loss", "gradient", "infinite gradient", "norm"])
def test_a_trial_that_goes_bad_stays_as_it_was_and_the_others_go_on(trouble, bad_step, untroubled, monkeypatch):
    pack = new_pack(three())
    differentiate = pack.flat.differentiate

    def troubled(loss, **how):
        differentiate(loss, **how)
        if int(pack.step_K[0]) == bad_step and trouble != "loss":
            row = pack.flat.grads_KP[1]
            if trouble == "norm":
                row.fill_(1e200)  # each finite, its square not
            else:
                row[3] = math.nan if trouble == "gradient" else -math.inf

    def losses(*given):
        found = sample_losses(*given)
        if trouble == "loss" and int(pack.step_K[0]) == bad_step:
            found = found + torch.tensor([0.0, math.inf, 0.0], dtype=found.dtype)[:, None]
        return found

    monkeypatch.setattr(pack.flat, "differentiate", troubled)
    monkeypatch.setattr("lora_vit.training.pack.sample_losses", losses)
    for i, lr_K1 in enumerate(pack.learning_rates()[:4]):
        pack.step(lr_K1, False)
        for now, other, frozen in zip(state_of(pack), untroubled[i + 1], untroubled[bad_step], strict=True):
            assert torch.equal(now[[0, 2]], other[[0, 2]])
            assert torch.equal(now[1], (frozen if i >= bad_step else other)[1])  # its loss is fine again after that
        assert pack.first_bad_step_K.tolist() == [-1, -1 if i < bad_step else bad_step, -1]
    assert pack.step_K.tolist() == [4, 4, 4]


def test_losses_gradients_and_the_stop_are_summed_over_processes(monkeypatch):
    alone, seen = new_pack(three()), []
    expected = alone.step(alone.learning_rates()[0], False)
    gradients = alone.flat.grads_KP.clone()

    def as_if_three(tensor):
        seen.append(tensor)
        return tensor.mul_(3)

    monkeypatch.setattr(distributed, "sum_over_processes_", as_if_three)
    pack = new_pack(three())
    clipped = []
    step = pack.optimizer.step
    monkeypatch.setattr(pack.optimizer, "step", lambda lr, ok, norm: (clipped.append(norm.clone()), step(lr, ok, norm)))
    losses_K = pack.step(pack.learning_rates()[0], True)
    assert [t.data_ptr() for t in seen] == [pack.flat.buffer.data_ptr()]
    assert pack.flat.stop.tolist() == [3]
    torch.testing.assert_close(losses_K, 3 * expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pack.loss_sum_K, 3 * expected.double(), rtol=1e-12, atol=1e-12)
    free = torch.linalg.vector_norm(gradients[2], dim=0)  # a trial that does not clip keeps its gradients
    torch.testing.assert_close(clipped[0][2, 0], 3 * free, rtol=1e-12, atol=1e-12)
    pack.step(pack.learning_rates()[0], False)
    assert pack.flat.stop.tolist() == [0]


def test_dropout_masks_change_with_the_step_and_not_with_the_pack():
    pack = new_pack(three({"lora.dropout": 0.5}))
    zero = torch.zeros(3, 1, dtype=torch.float64)
    with torch.no_grad():
        for name, p in pack.model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(generator=torch.Generator().manual_seed(0))
    same_batch = pack.streams[0].batch
    for stream in pack.streams:
        stream.batch = lambda epoch, step: same_batch(0, 0)
    first, second = pack.step(zero, False), pack.step(zero, False)
    assert not (first == second).any()
    pack.step_K.zero_()
    torch.testing.assert_close(pack.step(zero, False), first, rtol=0, atol=0)
