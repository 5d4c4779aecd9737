"""Faults to plant in a trainer before it is rehearsed. Each is a change that somebody might make."""

import torch
import torch.distributed as dist


def _in_first_layer(trainer, change):
    layers = trainer.stage.causal.get_submodule(trainer.stage.stack.layers)
    layers[trainer.stage.own_layers[0]].mlp.register_forward_hook(lambda module, args, output: change(output))


def cpu_tensor_in_a_collective(trainer, recorder):
    def change(hidden):
        dist.all_reduce(torch.zeros(4))
        return hidden

    _in_first_layer(trainer, change)


def item_in_a_layer(trainer, recorder):
    def change(hidden):
        return hidden * 2 if hidden.sum().item() == float("inf") else hidden

    _in_first_layer(trainer, change)


def missing_contiguous(trainer, recorder):
    def change(hidden):
        dist.all_reduce(hidden.detach().transpose(1, 2), group=trainer.grid.tensor_group)
        return hidden

    _in_first_layer(trainer, change)


def swapped_collectives_on_rank_1(trainer, recorder):
    def change(hidden):
        calls = [hidden.new_zeros(2), hidden.new_zeros(3)]
        for tensor in reversed(calls) if trainer.grid.rank == 1 else calls:
            dist.all_reduce(tensor)
        return hidden

    _in_first_layer(trainer, change)


def fp32_copy_of_the_logits(trainer, recorder):
    logits = trainer.stage.logits
    trainer.stage.logits = lambda hidden: logits(hidden).float().to(hidden.dtype)


def synchronous_copy(trainer, recorder):
    def change(hidden):
        return hidden * torch.ones(hidden.shape[-1], dtype=hidden.dtype).to(hidden.device)

    _in_first_layer(trainer, change)


def cast_in_a_layer(trainer, recorder):
    _in_first_layer(trainer, lambda hidden: hidden.float().to(hidden.dtype))


def copy_in_a_layer(trainer, recorder):
    _in_first_layer(trainer, lambda hidden: hidden.clone())
