"""Gradients of one block averaged across processes, while the next block already runs."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


class Averaging:
    """The gradients of a block on their way through all processes.

    They travel as one flat tensor of the block's size, followed by the number of processes that have a gradient for
    each parameter. A parameter without a gradient on any process keeps none, so that weight decay does not move it. If
    only some processes have one, the others count as zero.

    Args:
        parameters: The parameters of the block, the same on all processes.
        group: The processes. A separate group does not wait behind other messages, such as synchronised batch norms.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self.parameters = parameters
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
        present = parts[0].new_tensor([p.grad is not None for p in parameters])
        self.flat = torch.cat([*parts, present])
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def wait(self) -> None:
        """Wait until the averages have arrived, and put them in place."""
        assert self.work is not None
        self.work.wait()
        sizes = [p.numel() for p in self.parameters]
        *sums, present = self.flat.split([*sizes, len(sizes)])
        self.flat.div_(dist.get_world_size())
        for parameter, average, share in zip(self.parameters, sums, present, strict=True):
            if parameter.grad is not None or share > 0:  # looks at `share`, and waits for the device, only if it must
                # in the order of the parameter in memory, which fused optimizers take for granted
                parameter.grad = torch.empty_like(parameter).copy_(average.view_as(parameter))


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first one: running statistics of batch norms differ between processes."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)
