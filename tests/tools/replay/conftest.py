"""Small runs that all tests of the replay share; none of them writes into one."""

import numpy as np
import pytest

import tools.replay.against  # what the tool imports late: here once for all forks
import tools.replay.run  # noqa: F401
from recipes.common.anomalies import recovery
from recipes.common.anomalies.events import Event
from recipes.common.recipe import AdamW, Batch, Checkpoints, Constant, Evaluation, Layout, Monitor, Reaction
from tests.support.small_runs import run, write_data
from tests.support.tiny import tiny_config, tiny_recipe

OPTIONS = {
    "evaluation": Evaluation(),
    "checkpoints": Checkpoints(every_steps=3, keep_last=9),
    "monitor": Monitor(activations_every_steps=2),
    "optimizer": AdamW(lr=1e-3, eps=1e-6, clip=0.5),
    "schedule": Constant(warmup_steps=4),
    "layouts": {1: Layout(), 2: Layout(tensor=2), 4: Layout(pipeline=2)},
    "num_params": 140_992,
}


IN_TWO = {"mask_documents": True, "batch": Batch(seq_len=16, micro_seqs=2, global_seqs=4)}


def config(**fields):
    return tiny_config("llama", attention_bias=True, **fields)


class OneEvent:
    """Stands in for the detectors: step 6 diverges, the first time that it comes."""

    failures = ()

    def __init__(self, detectors=None):
        self.of_step_time, self.seen = detectors is not None, 0

    def push(self, step, values):
        self.seen = max(self.seen, step)
        return [] if self.of_step_time or step != 6 else [Event(6, 6, None, 1.0, "diverged", True, "loss", 0, number=6)]

    def resumed(self, step):
        pass


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Token shards in which a document ends every few tokens."""
    folder = write_data(tmp_path_factory.mktemp("replay") / "data")
    path = folder / "train_00000.bin"
    ids = np.fromfile(path, dtype="<u2")
    ids[5::11] = 2
    ids.tofile(path)
    return folder


@pytest.fixture(scope="session")
def plain(data):
    """One process, fp32, documents masked, two micro batches a step, 8 steps, checkpoints of steps 3, 6 and 8."""
    recipe = tiny_recipe(data, **OPTIONS | IN_TWO | {"model": config()})
    run(recipe, 1, data.parent / "plain")
    return data.parent / "plain"


@pytest.fixture(scope="session")
def on_tensor_ranks(data):
    """The same on two tensor ranks, 5 steps."""
    recipe = tiny_recipe(data, **OPTIONS | IN_TWO | {"model": config(), "steps": 5})
    run(recipe, 2, data.parent / "on_tensor_ranks")
    return data.parent / "on_tensor_ranks"


@pytest.fixture(scope="session")
def with_dropout(data):
    """Two data ranks of two stages, bf16, dropout in the attention, 4 steps."""
    recipe = tiny_recipe(data, **OPTIONS | {"model": config(attention_dropout=0.2), "deepspeed": "zero1_bf16.json", "steps": 4})
    run(recipe, 4, data.parent / "with_dropout")
    return data.parent / "with_dropout"


@pytest.fixture(scope="session")
def rewound(data):
    """A run that went back from step 6 to step 3, left out what it had read, and lowered its learning rate for two steps."""
    reaction = Reaction(action="rewind", lr_factor=0.5, lr_steps=2, max_rewinds=1)
    recipe = tiny_recipe(data, **OPTIONS | {"model": config(), "reaction": reaction})
    kept = recovery.AnomalyDetector
    recovery.AnomalyDetector = OnceDiverged
    try:
        run(recipe, 1, data.parent / "rewound")
    finally:
        recovery.AnomalyDetector = kept
    return data.parent / "rewound"


class OnceDiverged(OneEvent):
    """The same, but the second time that step 6 comes is as usual."""

    times = 0

    def push(self, step, values):
        if self.of_step_time or step != 6:
            return []
        type(self).times += 1
        return super().push(step, values) if type(self).times == 1 else []
