"""Layers of routed experts as vLLM configures them, and all-to-alls in threads, on the CPU."""

import threading
from types import SimpleNamespace

import torch
from checks import random_codes
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)

from vllm_ue8m0.codec import convert_scale_from_ue8m0
from vllm_ue8m0.plugin.config import Ue8m0Config
from vllm_ue8m0.plugin.moe import Ue8m0MoEMethod

E, TOPK, INNER = 4, 2, 128


def moe_config(
    hidden=256, ranks=1, rank=0, backend="allgather_reducescatter", eplb=False, max_num_tokens=8
):
    parallel = FusedMoEParallelConfig(
        tp_size=1, pcp_size=1, dp_size=ranks, ep_size=ranks, tp_rank=0, pcp_rank=0, dp_rank=rank,
        ep_rank=rank, sp_size=1, use_ep=ranks > 1, all2all_backend=backend, enable_eplb=eplb,
    )  # fmt: skip
    return FusedMoEConfig(
        num_experts=E, experts_per_token=TOPK, hidden_dim=hidden, intermediate_size=INNER,
        num_local_experts=E // ranks, num_logical_experts=E, activation=MoEActivation.SILU,
        device="cpu", routing_method=RoutingMethodType.DeepSeekV3, moe_parallel_config=parallel,
        in_dtype=torch.bfloat16, max_num_tokens=max_num_tokens,
    )  # fmt: skip


class Layer(torch.nn.Module):
    """What the method and vLLM's load balancer ask of RoutedExperts."""

    def __init__(self, moe):
        super().__init__()
        self.activation, self.expert_map = moe.activation, None
        self.global_num_experts, self.local_num_experts = moe.num_experts, moe.num_local_experts
        self.apply_router_weight_on_input = False

    def _expert_routing_tables(self):
        return None


def checkpoint(hidden=256, c=1.0, spread=0.0):
    """Per name: codes [E, N, K], scales [E, ..]: c * 2^k, times up to 1 + spread for no 2^k."""
    weights = {}
    for name, N, K in (("w13", 2 * INNER, hidden), ("w2", hidden, INNER)):
        sf = torch.randint(116, 121, (E, -(-N // 128), -(-K // 128)), dtype=torch.uint8)
        scale = convert_scale_from_ue8m0(sf) * c
        scale = scale * (1 + spread * torch.rand(scale.shape))
        weights[name] = random_codes(E, N, K, device="cpu"), scale
    return weights


def create(moe, prefix="experts", load=lambda *a: None, **options):
    """A method and its layer, with weights not loaded yet; load: the loader of them all."""
    config = Ue8m0Config.from_config(
        {"quant_method": "fp8", "weight_block_size": [128, 128], **options}
    )
    method, layer = Ue8m0MoEMethod(config, moe, prefix), Layer(moe)
    method.create_weights(
        layer, moe.num_local_experts, moe.hidden_dim, INNER, torch.bfloat16,
        weight_loader=load, unpadded_hidden_size=moe.hidden_dim_unpadded,
    )  # fmt: skip
    return method, layer


def load(method, layer, weights):
    """Load this rank's experts and build the kernel."""
    first = method.moe.moe_parallel_config.ep_rank * layer.local_num_experts
    mine = slice(first, first + layer.local_num_experts)
    for name, (codes, scale) in weights.items():
        getattr(layer, f"{name}_weight").data.copy_(codes[mine])
        getattr(layer, f"{name}_weight_scale_inv").data.copy_(scale[mine])
    method.process_weights_after_loading(layer)


def tokens(M, hidden=256):
    """x [M, hidden], weights and int64 ids [M, TOPK]."""
    ids = torch.rand(M, E).argsort(1)[:, :TOPK].contiguous()
    return torch.randn(M, hidden).bfloat16(), torch.rand(M, TOPK), ids


def run(method, layer, x, weights, ids):
    return method.apply(layer, x, weights, ids, None, None)


class Fabric:
    """All ranks of a group in one process, a thread for each; room: Buffer's."""

    def __init__(self, ranks, room=0):
        self.ranks, self.room, self.flags = ranks, room, []
        self.barrier = threading.Barrier(ranks, timeout=120)
        self.sent, self.returned = {}, {}

    def run(self, rank_main):
        """rank_main(rank) of every rank -> their results."""
        results = [None] * self.ranks

        def main(rank):
            try:
                results[rank] = rank_main(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


class Buffer:
    """A rank's end, with the calls of deep_ep.Buffer and nixl_ep.Buffer that vLLM makes.

    `room` ranks' tokens have a place in [local experts, room * max tokens, hidden].
    """

    def __init__(self, fabric, rank):
        self.fabric, self.rank = fabric, rank

    def dispatch(self, x, ids, max_tokens, capacity, **flags):
        fabric, local = self.fabric, E // self.fabric.ranks
        assert capacity == local * fabric.room
        fabric.flags.append(flags)
        fabric.sent[self.rank] = x, ids
        rows = torch.full((local, fabric.room * max_tokens, x.shape[1]), torch.nan, dtype=x.dtype)
        counts, places = torch.zeros(local, dtype=torch.int32), {}

        def receive():
            fabric.barrier.wait()
            for source in range(fabric.ranks):
                sent, wanted = fabric.sent[source]
                for token, slot in (wanted // local == self.rank).nonzero().tolist():
                    e = int(wanted[token, slot]) % local
                    rows[e, counts[e]] = sent[token]
                    places[source, token, slot] = e, int(counts[e])
                    counts[e] += 1

        return rows, counts, places, None, receive

    def combine(self, results, ids, weights, places, out, **flags):
        fabric, local = self.fabric, E // self.fabric.ranks
        fabric.returned[self.rank] = results, places
        fabric.barrier.wait()
        out.zero_()
        for token, slot in (ids >= 0).nonzero().tolist():
            rows, places = fabric.returned[int(ids[token, slot]) // local]
            row = rows[places[self.rank, token, slot]]
            out[token] = out[token] + weights[token, slot] * row.float()
        fabric.barrier.wait()  # the others have read
        return out, None, lambda: None

    low_latency_dispatch, low_latency_combine = dispatch, combine


def manager(fabric, rank):
    """vLLM's all-to-all manager of a rank."""
    return SimpleNamespace(
        world_size=fabric.ranks,
        max_num_ep_ranks=fabric.room,
        get_handle=lambda arguments: Buffer(fabric, rank),
    )


class Mover:
    """A rank's end of vLLM's load balancer, as its EplbCommunicator; strict where NCCL is blind."""

    def __init__(self, fabric, rank):
        self.fabric, self.rank, self.receives = fabric, rank, []

    def set_transfer_context(self, *context):
        pass

    def add_send(self, tensors, destination, expert_id):
        self.fabric.sent[self.rank, destination, expert_id] = [t.clone() for t in tensors]

    def add_recv(self, tensors, source, expert_id):
        self.receives.append((tensors, (source, self.rank, expert_id)))

    def execute(self):
        self.fabric.barrier.wait()
        for tensors, key in self.receives:
            for mine, sent in zip(tensors, self.fabric.sent[key], strict=True):
                assert (mine.shape, mine.dtype) == (sent.shape, sent.dtype)
                mine.copy_(sent)
        self.receives.clear()
        self.fabric.barrier.wait()
