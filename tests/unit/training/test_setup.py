"""What trials share is handed to their streams whole."""

from __future__ import annotations

import pytest
from plain_trials import plain_trial

from lora_vit.build import build_setup
from lora_vit.distributed import Process

CONFIG = plain_trial({"seed": 5, "data.batch_size": 4})


@pytest.mark.parametrize("rank", [0, 1])
def test_streams_are_of_the_trial_and_of_this_process(rank):
    setup = build_setup(CONFIG, Process(rank, 2, 0))
    assert setup.data is setup.samples.data
    train, val = setup.train_stream(CONFIG), setup.eval_stream("val", 3)
    for stream in (train, val):
        assert stream.samples is setup.samples
        assert stream.transform is setup.transform
    assert (train.seed, train.steps_per_epoch) == (5, len(setup.data.splits["train"]) // 4)
    whole = build_setup(CONFIG, Process())
    first = whole.train_stream(CONFIG).batch(1, 2).ids
    assert train.batch(1, 2).ids.tolist() == first[2 * rank : 2 * rank + 2].tolist()
    assert val.ids.tolist() == setup.data.splits["val"][rank::2].tolist()
    assert [len(batch.ids) for batch in val] == [3] * (len(val.ids) // 3) + [len(val.ids) % 3] * (len(val.ids) % 3 > 0)
    assert setup.eval_stream("test", 3).ids.tolist() == setup.data.splits["test"][rank::2].tolist()
