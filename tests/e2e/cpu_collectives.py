"""What vLLM's CPU build lacks for data parallelism with expert parallelism, by gloo.

Its all-to-all allgather_reducescatter calls all_gatherv and reduce_scatterv of the communicator,
which raise NotImplementedError there (vLLM 0.32). Workers import this module because the option
worker_extension_cls names its class.
"""

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def all_gatherv(self, input_, dim=0, sizes=None):
    assert dim == 0
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    most = max(sizes)
    padded = input_.new_zeros(most, *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=self.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, input_, dim=0, sizes=None):
    assert dim == 0
    total = input_.clone()
    dist.all_reduce(total, group=self.cpu_group)
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]].contiguous()


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv


class Installed:
    """The name that worker_extension_cls asks for; it adds nothing to the worker."""
