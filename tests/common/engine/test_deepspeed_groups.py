"""DeepSpeed works with our groups: what it asks of its own grid, ours answers alike, and a start makes few."""

import os

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch.testing._internal.distributed.fake_pg import FakeStore

from recipes.common.config.placement import coordinates
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.deepspeed_groups import Mpu, PipelineGroups
from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.grid import build_grid, rank_groups
from recipes.common.recipe import SGD, Layout
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks

MOST_CALLS = 16  # of new_group, a rank


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(2, 2, 2), (4, 2, 1), (3, 1, 2)])
def test_a_pipeline_gets_from_us_what_it_would_make(pipeline, tensor, data):
    found = run_ranks(_both_grids, pipeline * tensor * data, Layout(pipeline=pipeline, tensor=tensor))
    for ours, theirs in found:
        assert ours == theirs


def _both_grids(layout):
    grid = build_grid(layout, start_distributed("cpu"))
    topology = PipeModelDataParallelTopology(num_pp=grid.pipeline, num_mp=grid.tensor, num_dp=grid.data)
    answers = [_answers(each) for each in (PipelineGroups(grid, topology), PipelineParallelGrid(topology))]
    dist.barrier()
    return answers


def _answers(grid):
    """What every method without an argument returns, and every plain attribute that DeepSpeed's modules read."""
    found = {name: getattr(grid, name)() for name in dir(grid) if name.startswith("get_")}
    attributes = "pipe_parallel_size data_parallel_size model_parallel_size stage_id data_parallel_id pp_group dp_group"
    found |= {name: getattr(grid, name) for name in (*attributes.split(), "is_first_stage", "is_last_stage", "slice_group")}
    found["ranks of stages"] = [grid.stage_to_global(stage) for stage in range(grid.pipe_parallel_size)]
    return {name: dist.get_process_group_ranks(v) if isinstance(v, dist.ProcessGroup) else v for name, v in found.items()}


def test_deepspeed_sees_the_same_groups_without_a_pipeline():
    ranks = run_ranks(_mpu, 4)
    assert ranks == [((rank % 2, 2), (rank // 2, 2), 1.0 + 4 * (rank // 2), 2.0 + 2 * (rank % 2)) for rank in range(4)]


def _mpu():
    """((tensor rank, size), (data rank, size), and the sums of ranks over both groups)."""
    mpu = Mpu(build_grid(Layout(tensor=2), start_distributed("cpu")))
    sums = [torch.tensor(float(dist.get_rank())) for _ in range(2)]
    dist.all_reduce(sums[0], group=mpu.get_model_parallel_group())
    dist.all_reduce(sums[1], group=mpu.get_data_parallel_group())
    tensor = (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size())
    return tensor, (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()), sums[0].item(), sums[1].item()


STARTS = [  # rank, world size, layout
    (4100, 8192, Layout(tensor=8, pipeline=16, pipeline_schedule="zero_bubble_v", sequence_parallel=True)),
    (0, 8192, Layout(tensor=8, pipeline=16, pipeline_schedule="zero_bubble", sequence_parallel=True)),
    (511, 512, Layout(tensor=8, pipeline=4, sequence_parallel=True)),
    (300, 512, Layout(tensor=16, context=8, sequence_parallel=True)),
    (7, 2048, Layout()),
]


@pytest.mark.parametrize(("rank", "world", "layout"), STARTS, ids=str)
def test_a_start_makes_few_groups_at_any_size(rank, world, layout):
    """A whole trainer, DeepSpeed's engine included, as one rank of a job whose others are not there."""
    [made] = run_ranks(_groups_of_a_start, 1, rank, world, layout)
    own = coordinates(rank, world, layout)
    listed = rank_groups(own, layout.tensor // 8 or 1, layout.context)
    assert len(made) <= MOST_CALLS
    assert all(rank in ranks for ranks in made), "a rank takes part only in what it is in"
    assert {ranks for ranks in made if len(ranks) < world} == {ranks for ranks in listed.values() if len(ranks) < world}


def _groups_of_a_start(rank, world, layout):
    """The ranks of every group that a rank's start makes, on torch's backend for ranks that are not there."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    made, new_group = [], dist.new_group

    def counted(ranks=None, *args, **options):
        made.append(tuple(ranks))
        return new_group(ranks, *args, **options)

    dist.new_group = counted
    model = tiny_config("llama", num_hidden_layers=2 * layout.pipeline, num_attention_heads=16, num_key_value_heads=8)
    config = ds_config("zero1_fp32.json") | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"train_batch_size": world // layout.tensor // layout.pipeline}
    build_trainer(model, layout, SGD(lr=1.0), config, device_type="cpu", seq_len=64)
    return made


def test_the_process_group_is_started_without_a_device():
    """DeepSpeed, which would bind one, finds it started and wraps it."""
    assert run_ranks(_start_options, 2) == [(["backend", "timeout"], True)] * 2


def _start_options():
    asked, start = [], dist.init_process_group

    def recorded(backend, **options):
        asked.extend(["backend", *sorted(options)])
        return start(backend, **options)

    dist.init_process_group = recorded
    start_distributed("cpu")
    dist.barrier()
    return asked, deepspeed.comm.is_initialized()
