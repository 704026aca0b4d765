"""Many GPUs: weights sharded by FSDP2, and heads for tokens where several devices share a video (context
parallelism).

    torchrun --nproc_per_node 8 ttt_minute.py --stage 9s --preset 5b --init_from COGVIDEOX --data DIR
    --context_parallel 2

The network of ttt_minute.py knows nothing of this. What looks at one token needs nothing else, so each of C
devices takes an even share of the tokens through the blocks. Three things look across tokens: local
attention, full or window attention, and a scan. All of them keep heads apart, so around their method mix an
all-to-all turns all heads of own tokens into own heads of all tokens, and back (2309.14509). torchrun ends
the others when a process dies; NCCL's watchdog ends a hang.
"""

import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from tqdm import tqdm

from dataset import UserError


def join(device, batches, context=1, shard=0):
    """Joins the processes that torchrun started: (this process's device, place). Every `context` neighbours
    share a video, every `shard` a copy of the weights (0: all). Raises UserError where so many processes
    cannot share `batches`, the videos a step of each stage."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    shard = shard or world_size
    if world_size % context or world_size % shard:
        raise UserError(f"--context_parallel {context}, --shard {shard} do not divide {world_size} processes")
    if any(batch % (world_size // context) for batch in batches):
        raise UserError(f"{world_size // context} groups of processes cannot share batches of {batches}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The first process draws the world and decodes videos alone, while the others wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(minutes=30))
    if rank:                                                  # only the first process prints
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    weights = init_device_mesh(device.type, (world_size // shard, shard), mesh_dim_names=("copies", "shard"))
    weights = weights["shard"] if shard == world_size else weights
    videos = init_device_mesh(device.type, (world_size // context, context), mesh_dim_names=("videos", "own"))
    return device, functools.partial(place, device, weights, videos["own"] if context > 1 else None)


def place(device, weights, context, make):
    """The network that make() returns in the first process, sharded over all: only there it is whole in
    memory. On GPUs weights are gathered in bf16; gradients are summed in fp32, over other videos and other
    tokens of the same alike."""
    first = make() if dist.get_rank() == 0 else None          # the others get its class, config, shards
    kind = [first and (type(first), first.config)]
    dist.broadcast_object_list(kind, device=torch.device("cpu"))
    network, config = kind[0]
    with torch.device("meta"):
        model = network(config)
    half = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)     # autocast casts inputs
    for module in *model.blocks, model:
        fully_shard(module, mesh=weights, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)                                        # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, first.state_dict() if first else {}, options=options)
    if context is None:
        return model
    model.through_blocks = functools.partial(through_blocks, context, model.through_blocks)
    for block in model.blocks:
        block.attention.mix = functools.partial(over_heads, context, block.attention.mix, False)
        if (both := block.global_layer) is not None:
            both.layer.mix = functools.partial(over_heads, context, both.layer.mix, True)
            # Own tokens lie as stored; mix puts all of them into scan order.
            both.scan = functools.partial(torch.nn.Module.__call__, both.layer)
    return model


def through_blocks(context, run, x, time, layout, texts):
    """Own tokens of x [B, L, D] through the blocks, and all of them again. L is padded to equal shares."""
    L, C, rank = x.shape[1], context.size(), context.get_local_rank()
    share = -(-L // C)
    own = nnf.pad(x, (0, 0, 0, share * C - L))[:, rank * share:(rank + 1) * share]
    own = run(own, time, layout, min(max(texts - rank * share, 0), share))
    whole = DTensor.from_local(own, context, [Shard(1)]).redistribute(placements=[Replicate()])
    # All C devices go on with all tokens, each with its part of the loss: their gradients on these add up.
    return whole.to_local(grad_placements=[Partial()])[:, :L]


def over_heads(context, mix, in_scan_order, layout, tokens, parameters=()):
    """mix(layout, tokens, parameters) with all heads of own tokens -> the same. tokens [B, H, L/C, ...],
    parameters [H, ...]; what has one head serves all of them."""
    C, rank = context.size(), context.get_local_rank()
    if tokens[0].shape[1] % C:
        raise UserError(f"--context_parallel {C} does not divide the {tokens[0].shape[1]} heads of a layer")
    own = [p if len(p) == 1 else p.unflatten(0, (C, -1))[rank] for p in parameters]
    tokens = [y.expand(-1, C, *y.shape[2:]) if y.shape[1] == 1 else y for y in tokens]
    tokens = [exchange(y, context, gather=2, cut=1)[:, :, :layout.tokens] for y in tokens]
    if in_scan_order:
        tokens = [layout.to_scan(y, dim=2) for y in tokens]
    y = mix(layout, tokens, own)
    if in_scan_order:
        y = layout.from_scan(y, dim=2)
    return exchange(nnf.pad(y, (0, 0, 0, -layout.tokens % C)), context, gather=1, cut=2)


def exchange(y, context, gather, cut):
    """An all-to-all among the devices that share a video: each has a part of axis `gather` and afterwards a
    part of axis `cut`."""
    y = DTensor.from_local(y.contiguous(), context, [Shard(gather)])
    return y.redistribute(placements=[Shard(cut)]).to_local()
