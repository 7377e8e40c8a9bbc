"""What a pack keeps and gives: states, padding, streams, and predictions against sample-by-sample arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import new_pack, new_trials, take_steps, three
from plain_trials import BASELINE, plain_trial
from torch import Tensor

from lora_vit import distributed
from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.metrics import METRICS, Predictions
from lora_vit.training.pack import Pack


@pytest.fixture(scope="module")
def setup():
    return build_setup(plain_trial(), Process())


@pytest.fixture
def pack(setup) -> Pack:
    return new_pack(three(), setup)


def matrices(pack: Pack) -> tuple[Tensor, ...]:
    return pack.flat.values_KP, pack.optimizer.exp_avg_KP, pack.optimizer.exp_avg_sq_KP


def tensors(pack: Pack) -> list[dict[str, Tensor]]:
    return [t for trial in pack.trials for t in (trial.state.values, trial.state.exp_avg, trial.state.exp_avg_sq)]


def test_saved_states_are_unpadded_and_stay_as_they_are(pack):
    take_steps(pack, 2)
    pack.pull()
    before = [{n: t.clone() for n, t in group.items()} for group in tensors(pack)]
    place = "encoder.layers.encoder_layer_1.mlp.0.lora_"
    for trial, rank in zip(pack.trials, (2, 5, 1), strict=True):
        for group in (trial.state.values, trial.state.exp_avg, trial.state.exp_avg_sq):
            assert group[place + "A"].shape == (rank, 32)
            assert group[place + "B"].shape == (48, rank)
            assert group["heads.head.weight"].shape == (4, 32)
            assert all(t.is_contiguous() and t.any() for t in group.values())
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in group.values())  # nothing else is held
    take_steps(pack, 1)
    for group, old in zip(tensors(pack), before, strict=True):
        assert all(torch.equal(group[n], old[n]) for n in old)
    pack.pull()
    for group, old in zip(tensors(pack), before, strict=True):
        assert not any(torch.equal(group[n], old[n]) for n in old)


@pytest.mark.parametrize("changes", [{}, {"lora.method": "dora"}, {"optimizer.name": "sgd"}])
def test_a_pack_of_saved_states_continues_bit_for_bit(changes, setup):
    pack = new_pack(three(changes), setup)
    take_steps(pack, 3)
    pack.pull()
    again = Pack(pack.trials, build_setup(plain_trial(), Process()))  # a trunk carries the adapters of one pack
    for mine, other in zip(matrices(again), matrices(pack), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(again.optimizer.updates_K1, pack.optimizer.updates_K1)
    assert again.step_in_epoch == 3
    rates = pack.learning_rates()
    assert torch.equal(again.learning_rates(), rates)
    for lr_K1 in rates[:2]:
        assert torch.equal(again.step(lr_K1, False), pack.step(lr_K1, False))
    assert torch.equal(again.loss_sum_K, pack.loss_sum_K)
    assert torch.equal(again.step_K, pack.step_K)


@pytest.mark.parametrize("changes", [{}, {"lora.method": "dora"}, {"optimizer.name": "sgd"}])
def test_padded_ranks_stay_zero(changes, setup):
    pack = new_pack(three(changes), setup)
    take_steps(pack, 3)
    for matrix_KP in matrices(pack):
        for k, row_P in enumerate(matrix_KP):
            unpadded = pack.export(k, matrix_KP).values()
            assert row_P.count_nonzero() == sum(t.count_nonzero() for t in unpadded)


def test_trials_of_one_seed_and_epoch_share_a_stream(setup, monkeypatch):
    trials = new_trials(three())
    trials[2].state.epoch = 1
    later = Pack(trials, setup)
    assert later.stream_of_trial == [0, 1, 2]  # of seeds 1 and 2, and 1 again in another epoch
    assert later.step_K.tolist() == [0, 0, 7]
    asked = []
    for stream in later.streams:
        monkeypatch.setattr(stream, "batch_ids", lambda e, i, s=stream: asked.append((s.seed, e, i)) or s.ids[:8])
    later.step(later.learning_rates()[0], False)
    assert list(dict.fromkeys(at[:2] for at in asked)) == [(1, 0), (2, 0), (1, 1)]
    assert {at[2] for at in asked} == {0, 1, 2, 3}, "the batches after it are read ahead where that pays"


@pytest.mark.parametrize(("of", "streams"), [([0, 2], [0, 0]), ([0, 1, 2], [0, 1, 0])])
def test_the_model_sees_each_streams_images_once(of, streams, setup):
    pack, seen = new_pack([three()[i] for i in of], setup), []
    pack.model.register_forward_hook(lambda model, args, out: seen.extend(args))
    take_steps(pack, 1)
    assert seen[1] == streams
    torch.testing.assert_close(seen[0], torch.cat([s.batch(0, 0)[0] for s in pack.streams]), rtol=0, atol=0)


def test_learning_rates_of_the_rest_of_the_epoch(setup):
    linear = {"optimizer.lr": 0.1}
    warm = {"optimizer.lr": 0.2, "optimizer.warmup": 0.9, "optimizer.schedule": "cosine"}
    constant = {"optimizer.lr": 0.3, "optimizer.schedule": "constant"}
    trials = new_trials([plain_trial(changes) for changes in (linear, warm, constant)])
    for trial in trials:
        trial.state.step_in_epoch = 5
    trials[1].state.epoch = 1
    rates = Pack(trials, setup).learning_rates()
    assert rates.shape == (2, 3, 1)
    # 14 steps: linear from 0.1; step 12 of a warm-up of 13 (0.9 of 14, rounded); constant
    expected = [[0.1 * 9 / 14, 0.2 * 13 / 14, 0.3], [0.1 * 8 / 14, 0.2, 0.3]]
    assert rates[..., 0].tolist() == [pytest.approx(row, rel=1e-12) for row in expected]


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32)])
def test_a_step_begins_with_each_trials_settings(precision, dtype):
    """Those of the second of two processes, which has the second half of each batch."""
    changes = {"trainer.precision": precision}
    trials = new_trials([plain_trial(changes | {"seed": s, "optimizer.label_smoothing": s / 10}) for s in (1, 2, 0)])
    for trial in trials:
        trial.state.step_in_epoch, trial.state.loss_sum = 2, 0.1 + trial.config.seed
    trials[1].state.epoch = 1
    pack = Pack(trials, build_setup(trials[0].config, Process(1, 2)))
    assert pack.position_B.tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(pack.smoothing_K1, torch.tensor([[0.1], [0.2], [0.0]], dtype=dtype), rtol=0, atol=0)
    loss_sum_K = torch.tensor([1.1, 2.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(pack.loss_sum_K, loss_sum_K, rtol=0, atol=0)
    assert pack.step_K.tolist() == [pack.step_of(t) for t in trials] == [2, 9, 2]
    assert pack.first_bad_step_K.tolist() == [-1, -1, -1]
    assert {t.dtype for t in (pack.step_K, pack.first_bad_step_K, pack.position_B)} == {torch.int64}
    assert pack.global_batch == 8
    assert pack.learning_rates().dtype == dtype
    assert pack.forward is pack.model


def test_predictions_are_each_trials_own_and_kept_until_the_next_step(pack):
    take_steps(pack, 2)
    for split in ("val", "test"):
        first = pack.predict(split)
        assert [p.ids.tolist() for p in first] == [pack.setup.data.splits[split].tolist()] * 3
        assert len({p.loss for p in first}) == 3
        assert pack.predict(split) is first
    assert pack.predict("val") is not pack.predict("test")
    take_steps(pack, 1)
    assert [a.loss != b.loss for a, b in zip(pack.predict("test"), first, strict=True)] == [True] * 3


def test_parameter_counts(setup):
    pack = new_pack(three(), setup)
    base = sum(p.numel() for p in setup.build_model.original.parameters())
    head = 4 * 32 + 4
    for k, rank in enumerate((2, 5, 1)):
        adapter = 2 * rank * (4 * (32 + 32) + 2 * (32 + 48))  # two blocks
        counts = {"trainable": adapter + head, "adapter": adapter, "head": head, "total": base + adapter + head}
        assert pack.parameter_counts(k) == counts
    full = new_pack([plain_trial(BASELINE | {"lora.method": "full"})])
    assert full.parameter_counts(0) == {"trainable": base + head, "adapter": 0, "head": head, "total": base + head}


def test_a_compiled_pack_runs_the_compiled_model(setup, monkeypatch):
    calls = []

    def compiler(model, dynamic):
        return lambda *args: calls.append(len(args)) or model(*args)

    monkeypatch.setattr(torch, "compile", compiler)
    pack = new_pack(three({"trainer.compile": True}), setup)
    losses = take_steps(pack, 1)
    assert calls == [2]
    assert losses == take_steps(new_pack(three(), setup), 1)
    assert calls == [2]


@pytest.mark.slow  # torch takes seconds to import its compiler
def test_every_kind_of_pack_is_compiled(monkeypatch):
    graphs, whole = [], torch.compile
    backend = lambda gm, _: graphs.append(gm) or gm  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda model, **how: whole(model, backend=backend, **how))
    small = {"model.num_layers": 1, "trainer.compile": True}
    setup = build_setup(plain_trial(small), Process())
    for rank in range(1, 10):  # torch by itself stops at eight
        take_steps(new_pack([plain_trial({**small, "lora.rank": rank})], setup), 1)
        assert len(graphs) == rank


K, CLASSES = 3, 8
IDS = np.array([2, 20, 7, 3, 11, 19, 8])  # of the split, in its order; the data set has others
LABELS = np.arange(25) * 7 % CLASSES
LOGITS = 2 * torch.randn(K, 25, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Table:
    """A pack's model that looks its logits up; an image holds its sample id. It notes the batches that it sees."""

    def __init__(self, fits: int) -> None:
        self.training, self.fits = True, fits
        self.seen: list[list[int]] = []

    def __call__(self, images, stream_of_trial):
        assert stream_of_trial == [0] * K
        assert not torch.is_grad_enabled()
        assert not self.training
        ids = images[:, 0, 0, 0].long()
        if len(ids) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(ids.tolist())
        return LOGITS[:, ids]

    def train(self, mode: bool = True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)


def predictions_of(process: Process, most: int = 256, fits: int = 99) -> tuple[list[Predictions], Table]:
    """What a pack of the table predicts in a process, and the table, where so many images fit into memory."""
    setup = SimpleNamespace(
        samples=SimpleNamespace(gather=lambda ids: (torch.from_numpy(ids), torch.from_numpy(LABELS[ids]))),
        transform=SimpleNamespace(eval=lambda images: images.view(-1, 1, 1, 1).double()),
        data=SimpleNamespace(splits={"val": IDS}, labels=LABELS),
        device=torch.device("cpu"),
        process=process,
        most_evaluated=most,
    )
    model = Table(fits)
    return Pack.predict(SimpleNamespace(setup=setup, model=model, K=K, _predictions={}), "val"), model  # type: ignore[arg-type]


def check(found: list[Predictions]) -> None:
    assert len(found) == K
    for k, p in enumerate(found):
        probability = torch.softmax(LOGITS[k], -1).numpy()
        assert p.ids.tolist() == IDS.tolist()
        assert p.labels.tolist() == LABELS[IDS].tolist()
        assert p.predicted.tolist() == [int(probability[i].argmax()) for i in IDS]
        true = np.array([probability[i, LABELS[i]] for i in IDS])
        dtypes = [a.dtype for a in vars(p).values() if isinstance(a, np.ndarray)]
        assert dtypes == [np.int64, np.int64, np.int64, np.float32, np.float32, bool, np.float32]
        np.testing.assert_allclose(p.true_probability, true, rtol=1e-6)  # rounded to fp32
        np.testing.assert_allclose(p.top_probability, probability.max(1)[IDS], rtol=1e-6)
        order = np.argsort(-probability, 1)[:, :5]
        assert p.in_first_five.tolist() == [LABELS[i] in order[i] for i in IDS]
        brier = ((probability - np.eye(CLASSES)[LABELS]) ** 2).sum(1)[IDS]
        np.testing.assert_allclose(p.brier, brier, rtol=1e-6)
        assert p.loss == pytest.approx(-np.log(true).mean(), rel=1e-12)
        accuracy = sum(probability[i].argmax() == LABELS[i] for i in IDS) / 7
        assert METRICS["accuracy"].of(p) == accuracy
    assert len({p.loss for p in found}) == K
    assert {*np.concatenate([p.in_first_five for p in found])} == {True, False}


@pytest.mark.parametrize(
    ("world_size", "most", "fits", "size"),
    [(1, 256, 99, 85), (1, 11, 99, 3), (2, 6, 99, 2), (3, 2, 99, 1), (1, 11, 2, 1), (1, 13, 2, 2), (1, 256, 3, 3)],
)
def test_shares_of_all_processes_add_up(world_size, most, fits, size, monkeypatch):
    """Each sample is seen once, in the split's order; a batch counts images times trials, and halves until it fits."""
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "sum_over_processes_", lambda t: shares.append(t.clone()) or t)
    for rank in range(world_size):
        _, model = predictions_of(Process(rank, world_size), most, fits)
        own = IDS[rank::world_size].tolist()
        assert model.seen == [own[i : i + size] for i in range(0, len(own), size)]
        assert model.training
    sums = [sum(shares[i::2]) for i in (0, 1)]
    monkeypatch.setattr(distributed, "sum_over_processes_", lambda t: t.copy_(sums.pop(0)))
    check(predictions_of(Process(0, world_size))[0])
