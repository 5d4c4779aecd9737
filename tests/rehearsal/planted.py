"""Faults to plant in a trainer before it is rehearsed, several at once. Each is a change that somebody might make."""

import torch
import torch.distributed as dist


def _in_layer(trainer, number, change):
    layers = trainer.stage.causal.get_submodule(trainer.stage.stack.layers)
    layers[trainer.stage.own_layers[number]].mlp.register_forward_hook(lambda module, args, output: change(output))


def messages_and_waits(trainer, recorder):
    """Let the first layer break NCCL's rules, wait in every micro batch, and swap two collectives on rank 1."""

    def change(hidden):
        dist.all_reduce(torch.zeros(4))  # on the CPU
        dist.all_reduce(hidden.detach().transpose(1, 2), group=trainer.grid.tensor_group)  # not contiguous
        if hidden.sum().item() == float("inf"):
            hidden = hidden * 2
        hidden = hidden * torch.ones(hidden.shape[-1], dtype=hidden.dtype).to(hidden.device)  # a synchronous copy
        calls = [hidden.new_zeros(2), hidden.new_zeros(3)]
        for tensor in reversed(calls) if trainer.grid.rank == 1 else calls:
            dist.all_reduce(tensor)
        return hidden

    _in_layer(trainer, 0, change)


def more_work(trainer, recorder):
    """Cast in the first layer, copy in the second one, and make an fp32 copy of the logits."""
    _in_layer(trainer, 0, lambda hidden: hidden.float().to(hidden.dtype))
    _in_layer(trainer, 1, lambda hidden: hidden.clone())
    logits = trainer.stage.logits
    trainer.stage.logits = lambda hidden: logits(hidden).float().to(hidden.dtype)
