"""The specification as tests, in the order of the paper; the exercises; what the README measures and draws.

    python -m pytest -q test_ttt.py           # on a laptop, without a GPU
    python -m pytest -rs -k exercise_03       # one exercise, the reference's answer and yours
    python test_ttt.py --experiment 9         # the plot of an experiment among the exercises
    python test_ttt.py --bench                # time and memory of the scan and of a training step
    python test_ttt.py --figure               # the README's picture, assets/figure.png
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dataset
import sample
import ttt_minute
from dataset import UserError
from ttt_minute import (STAGES, TTT, Config, DiT, FullAttention, Layout, LocalAttention, Stage, alphas_cumprod, decays, diffusion_loss,
                        gelu_derivatives, is_new, jit, load_checkpoint, lr_at, make_optimizers, rope_table, rotate, scan_order, scan_rope,
                        step_autograd, tile_J, tile_normalise, tl, trains, ttt_scan)

TINY = Config(channels=4, height=4, width=6, text_len=3, text_dim=8, depth=2, heads=2, head_width=16, time_dim=16, mini_batch=8, eta_mlp=3.0,
              gate_init=0.1)


SLOW = pytest.mark.slow


def relative(x, y):
    return ((x - y).norm() / y.norm().clamp_min(1e-30)).item()


def random_latents(config, segments, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 12 * segments + 1, config.channels, config.height, config.width, generator=generator)
    text = torch.randn(batch, segments, config.text_len, config.text_dim, generator=generator)
    return latents, text


# ----------------------------------------------------------------------------------------------------
# The inner loop (sections 2.2, 2.3, 3.4)
# ----------------------------------------------------------------------------------------------------


def scan_inputs(kind, B=2, H=3, L=37, width=8, dtype=torch.float64, std=0.3, eta=0.3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    E = width if kind == "linear" else 4 * width
    weights = [std * normal(H, width, E), 0.1 * normal(H, E)]
    if kind == "mlp":
        weights += [std * normal(H, E, width), 0.1 * normal(H, width)]
    q, k = (F.normalize(normal(B, H, L, width), dim=-1) for _ in "qk")
    v, step = normal(B, H, L, width), eta * torch.rand(B, H, L, generator=generator).to(dtype)
    return weights, [q, k, v, step, 1 + 0.1 * normal(H, width), 0.1 * normal(H, width)]


def scan_gradients(kind, weights, inputs, backend, mini_batch=8, checkpoint=2):
    """Output, last weights and every gradient, by name, of a loss that reads both results."""
    leaves = [x.detach().clone().requires_grad_() for x in (*weights, *inputs)]
    out, last = ttt_scan(kind, leaves[:len(weights)], *leaves[len(weights):], mini_batch, backend=backend, checkpoint=checkpoint)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() for y in (out, *last))
    names = ["W1", "b1", "W2", "b2"][:len(weights)]
    gradients = dict(zip(names + ["q", "k", "v", "eta", "ln_gamma", "ln_beta"], torch.autograd.grad(loss, leaves)))
    return {"out": out, **{f"last {name}": w for name, w in zip(names, last)}, **{f"d {name}": g for name, g in gradients.items()}}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("backend", ["dual", "torch"])
@pytest.mark.parametrize("L, mini_batch, checkpoint", [(37, 8, 2), (16, 16, 1), (5, 8, 3), (1, 4, 4), (64, 16, 16)])
def test_every_form_equals_the_definition_with_all_gradients(kind, backend, L, mini_batch, checkpoint):
    """Eq 13 and 14 by autograd, by the naive dual form, by the primal form with its closed-form backward."""
    weights, inputs = scan_inputs(kind, L=L)
    definition = scan_gradients(kind, weights, inputs, "autograd", mini_batch, checkpoint)
    for name, value in scan_gradients(kind, weights, inputs, backend, mini_batch, checkpoint).items():
        assert relative(value, definition[name]) < 1e-11, name


def test_gelu_and_its_derivatives_are_those_of_autograd():
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    y = F.gelu(x, approximate="tanh")
    first, = torch.autograd.grad(y.sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    for mine, theirs in zip(gelu_derivatives(x.detach().clone(), order=2), (y, first, second)):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_without_steps_the_output_is_q_plus_layernorm_of_f(kind):
    weights, (q, k, v, eta, gamma, beta) = scan_inputs(kind)
    out, last = ttt_scan(kind, weights, q, k, v, 0 * eta, gamma, beta, 8)
    y = q @ weights[0] + weights[1][:, None]
    if kind == "mlp":
        y = F.gelu(y, approximate="tanh") @ weights[2] + weights[3][:, None]
    expected = q + gamma[:, None] * F.layer_norm(y, y.shape[-1:], eps=1e-8) + beta[:, None]
    assert relative(out, expected) < 1e-12
    for before, after in zip(weights, last):
        assert torch.equal(before.expand_as(after), after)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_ragged_last_mini_batch_is_one_smaller_step(kind):
    """Padding changes nothing: the last 5 of 37 tokens are a step of 5 tokens."""
    weights, inputs = scan_inputs(kind, B=1)
    out, last = ttt_scan(kind, weights, *inputs, 8)
    W = [w if w.ndim == 3 else w[:, None] for w in weights]
    gamma, beta = inputs[4][:, None], inputs[5][:, None]
    pieces = []
    for start in range(0, 37, 8):
        q, k, v, eta = (x[0, :, start:start + 8] for x in inputs[:4])
        z, W = step_autograd(W, q, k, v, eta[..., None], gamma, beta, 1e-8)
        pieces.append(z)
    assert relative(out[0], torch.cat(pieces, dim=1)) < 1e-12
    assert relative(last[0][0], W[0]) < 1e-12


def test_one_large_mini_batch_reads_weights_that_have_seen_every_token():
    """Not causal inside a mini-batch (eq 14): the last token changes the first output; across mini-batches it does not."""
    weights, inputs = scan_inputs("mlp", B=1, H=1, L=16)
    changed = [x.clone() for x in inputs]
    changed[2][:, :, -1] += 1
    for mini_batch, moves in (16, True), (8, False):
        first = [ttt_scan("mlp", weights, *x, mini_batch)[0][0, 0, 0] for x in (inputs, changed)]
        assert torch.equal(*first) != moves


def test_weights_may_differ_between_videos_of_a_batch():
    weights, inputs = scan_inputs("mlp")
    per_video = [torch.stack([w, 2 * w]) for w in weights]
    out, _ = ttt_scan("mlp", per_video, *inputs, 8)
    second, _ = ttt_scan("mlp", [2 * w for w in weights], *(x[1:] if x.ndim > 2 else x for x in inputs), 8)
    assert relative(out[1:], second) < 1e-12


def test_the_state_stays_in_fp32_when_the_inputs_are_bf16():
    weights, inputs = scan_inputs("mlp", dtype=torch.bfloat16)
    out, last = ttt_scan("mlp", weights, *inputs, 8)
    assert out.dtype == torch.bfloat16 and {w.dtype for w in last} == {torch.float32}


def test_the_inner_loop_learns_what_it_is_shown():
    """Eight keys with fixed values, shown again and again: f recalls them better and better."""
    torch.manual_seed(0)
    width, b = Config().head_width, Config().mini_batch
    k = F.normalize(torch.randn(8, width), dim=-1)
    target = F.layer_norm(torch.randn(8, width), (width,))
    weights = [Config().ttt_std * torch.randn(1, width, 4 * width), torch.zeros(1, 4 * width), Config().ttt_std * torch.randn(1, 4 * width, width), torch.zeros(1, width)]
    cosine = []
    for tokens in (64, 256, 1024):
        keys = k.repeat(tokens // 8, 1)[None, None]
        values = keys + target.repeat(tokens // 8, 1)
        eta = torch.full(keys.shape[:3], Config().eta_mlp / (width * b))
        out, _ = ttt_scan("mlp", weights, keys, keys, values, eta, torch.ones(1, width), torch.zeros(1, width), b)
        cosine.append(F.cosine_similarity((out - keys)[0, 0, -8:], target).mean().item())
    assert cosine[0] < cosine[1] < cosine[2] and cosine[1] > 0.9 and cosine[2] > 0.95


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_closed_form_backward_keeps_less_than_half_of_what_autograd_keeps(kind):
    weights, inputs = scan_inputs(kind, B=1, H=4, L=1024, width=32, dtype=torch.float32, eta=0.01)

    def bytes_kept(backend):
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            leaves = [x.clone().requires_grad_() for x in (*weights, *inputs)]
            result = ttt_scan(kind, leaves[:len(weights)], *leaves[len(weights):], 16, backend=backend, checkpoint=4)
        del result
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    assert bytes_kept("torch") < bytes_kept("autograd") / 2


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and still alive; .peak is the most there were at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages[storage._cdata] = weakref.ref(storage, functools.partial(self.forget, storage._cdata, storage.nbytes()))
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result

    def forget(self, key, size, _):
        del self.storages[key]
        self.live -= size


def scan_and_back(kind, weights, inputs, backend, mini_batch, checkpoint=4):
    """Forward and backward, as training does it."""
    leaves = [x.detach().requires_grad_() for x in (*weights, *inputs)]
    out, _ = ttt_scan(kind, leaves[:len(weights)], *leaves[len(weights):], mini_batch, backend=backend, checkpoint=checkpoint)
    out.sum().backward()


def peak_bytes(*scan):
    with PeakMemory() as memory:
        scan_and_back(*scan)
    return memory.peak


def test_the_closed_form_backward_needs_less_than_half_of_the_memory_of_autograd_at_its_peak():
    weights, inputs = scan_inputs("mlp", B=1, H=4, L=1024, width=32, dtype=torch.float32, eta=0.01)
    assert peak_bytes("mlp", weights, inputs, "torch", 32) < peak_bytes("mlp", weights, inputs, "autograd", 32) / 2


@pytest.mark.parametrize("change, message", [
    (dict(kind="cubic"), "neither"), (dict(backend="abacus"), "no backend"), (dict(weights=[torch.zeros(3, 8, 8)] * 2), "shapes")])
def test_a_wrong_call_of_the_scan_says_what_is_wrong(change, message):
    weights, inputs = scan_inputs("linear")
    call = dict(kind="linear", weights=weights, backend="auto") | change
    with pytest.raises(ValueError, match=message):
        ttt_scan(call["kind"], call["weights"], *inputs, 8, backend=call["backend"])


# ----------------------------------------------------------------------------------------------------
# One sequence out of many segments (section 3.2)
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_scan_order_and_back_is_the_identity(segments):
    layout = Layout(segments, 5, (12 * segments + 1, 2, 3))
    x = torch.randn(2, layout.tokens, 7)
    for order in layout, layout.reverse():
        assert torch.equal(order.from_scan(order.to_scan(x)), x)


def test_a_story_is_scanned_text_by_text_and_segment_by_segment():
    """One token a frame, two of text: stored as 4 texts then frames 0 .. 24."""
    layout = Layout(2, 2, (25, 1, 1))
    frame = torch.arange(25) + 4
    forward = torch.cat([torch.tensor([0, 1]), frame[:13], torch.tensor([2, 3]), frame[13:]])
    assert torch.equal(scan_order(layout, "cpu"), forward)
    backward = torch.cat([torch.tensor([2, 3]), frame[13:].flip(0), torch.tensor([0, 1]), frame[:13].flip(0)])
    assert torch.equal(scan_order(layout.reverse(), "cpu"), backward)


def test_rope_counts_along_the_order_given_and_leaves_text_alone():
    layout = Layout(2, 2, (25, 2, 2))
    for order in layout, layout.reverse():
        table = scan_rope(order, 16, 10000.0, torch.device("cpu"))
        video = scan_order(order, torch.device("cpu")) >= 4
        assert torch.equal(table[video], rope_table(layout.grid, 16, 10000.0, torch.device("cpu")))
        assert (table[~video] == 1).all()


def test_rope_depends_on_the_distance_only():
    """Turned q and k of tokens the same (t, h, w) step apart have the same product; the angles are those of the paper."""
    grid = (5, 4, 3)
    q, k = torch.randn(2, 32, dtype=torch.float64)
    table = rope_table(grid, 32, 10000.0, torch.device("cpu"))
    turned_q, turned_k = (rearrange(rotate(x.expand(60, 32), table), "(t h w) F -> t h w F", t=5, h=4) for x in (q, k))
    product = (turned_q[1:, 2:, 1:] * turned_k[:-1, :-2, :-1]).sum(-1)
    assert torch.allclose(product, product[0, 0, 0].expand_as(product), atol=1e-5)
    angle = torch.cat([2 / 10000 ** (torch.arange(0, 8, 2) / 8), 3 / 10000 ** (torch.arange(0, 12, 2) / 12), 1 / 10000 ** (torch.arange(0, 12, 2) / 12)])
    even, odd = q[0::2], q[1::2]
    expected = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1).flatten()
    assert torch.allclose(turned_q[2, 3, 1], expected, atol=1e-5)


def test_a_layout_with_the_wrong_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="25 latent frames"):
        Layout(2, 2, (24, 1, 1))


# ----------------------------------------------------------------------------------------------------
# Attention inside a segment, and what each layer sees (section 3.2)
# ----------------------------------------------------------------------------------------------------


def test_local_attention_is_one_attention_a_segment_with_shared_frames_averaged():
    """By brute force: cut the segments out, attend in each alone, write back, average the frame two segments share."""
    torch.manual_seed(0)
    attention, layout = LocalAttention(TINY), Layout(3, 3, (37, 2, 3))
    x = torch.randn(2, layout.tokens, TINY.dim)
    total, count = torch.zeros_like(x), torch.zeros(layout.tokens, 1)
    alone = FullAttention(TINY)
    alone.load_state_dict(attention.state_dict())
    for i in range(3):
        text = torch.arange(3 * i, 3 * i + 3)
        video = 9 + torch.arange(12 * i * 6, (12 * i + 13) * 6)
        tokens = torch.cat([text, video])
        total[:, tokens] += alone(x[:, tokens], Layout(1, 3, (13, 2, 3)))
        count[tokens] += 1
    assert torch.allclose(attention(x, layout), total / count, atol=1e-5)


def test_at_one_segment_local_is_full():
    torch.manual_seed(0)
    local, full = LocalAttention(TINY), FullAttention(TINY)
    full.load_state_dict(local.state_dict())
    layout = Layout(1, 3, (13, 2, 3))
    x = torch.randn(1, layout.tokens, TINY.dim)
    assert torch.allclose(local(x, layout), full(x, layout), atol=1e-6)


@pytest.mark.parametrize("layer, reach", [("local", 1), ("swa", 1), ("full", 2), ("ttt_linear", 2), ("ttt_mlp", 2), ("mamba2", 2), ("gated_deltanet", 2)])
def test_who_can_see_another_segment_in_one_block(layer, reach):
    """Changing segment 2 moves segment 0 under full attention, TTT and the recurrences, under a window only what is within its reach;
    under local attention it never passes the shared frame."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, layer=layer, depth=1)
    model = DiT(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-3)                          # a slow decay, so that what is far can be seen in fp32
    latents, text = random_latents(config, 3)
    moved = latents.clone()
    moved[:, 25:] += 1                                        # frames that segment 2 owns
    t = torch.tensor([500])
    with torch.no_grad():
        change = (model(moved, text, t) - model(latents, text, t)).abs().amax(dim=(0, 2, 3, 4))
    assert (change[12:25] > 0).any() and (change[24] > 0)
    assert (change[:12] > 1e-7).any() == (reach == 2)
    if layer == "local":
        assert (change[:24] == 0).all()


# ----------------------------------------------------------------------------------------------------
# The other memories (section 4.1)
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("L, window", [(37, 8), (16, 16), (5, 8), (24, 3), (64, 100)])
def test_a_window_is_causal_attention_that_forgets(L, window):
    """Blockwise, against one attention with the whole mask, gradients included; a window as long as the sequence is causal attention."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, L, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    distance = torch.arange(L)[:, None] - torch.arange(L)
    masked = F.scaled_dot_product_attention(*inputs, attn_mask=(distance >= 0) & (distance < window))
    blocks = ttt_minute.window_attention(*inputs, window)
    assert relative(blocks, masked) < 1e-12
    if window >= L:
        assert relative(blocks, F.scaled_dot_product_attention(*inputs, is_causal=True)) < 1e-12
    weight = torch.randn(blocks.shape, generator=generator, dtype=torch.float64)
    for one, two in zip(*(torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (blocks, masked))):
        assert relative(one, two) < 1e-12


def test_the_window_is_the_papers_fraction_of_a_segment():
    assert Config(**ttt_minute.PRESETS["5b"]).window == 8192
    assert Config().window / (40 + 13 * 24) == pytest.approx(8192 / 17776, rel=0.01)


def delta_inputs(L, B=2, H=3, K=8, V=12):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(B, H, L, K), dim=-1) for _ in "qk")
    return [x.requires_grad_() for x in (q, k, normal(B, H, L, V), -normal(B, H, L).abs(), normal(B, H, L).sigmoid())]


def delta_step_by_step(q, k, v, g, beta):
    """The recurrence as SPEC and paper write it, a token at a time."""
    S, out = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[2]):
        S = g[:, :, t, None, None].exp() * S
        error = v[:, :, t] - torch.einsum("bhk, bhkv -> bhv", k[:, :, t], S)
        S = S + beta[:, :, t, None, None] * k[:, :, t, :, None] * error[:, :, None]
        out.append(torch.einsum("bhk, bhkv -> bhv", q[:, :, t], S) * q.shape[-1] ** -0.5)
    return torch.stack(out, dim=2), S


def ssd_inputs(L, B=2, H=4, P=6, G=2, N=5):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [x.requires_grad_() for x in (normal(B, H, L, P), normal(B, H, L).abs(), -normal(H).abs(), normal(B, G, L, N), normal(B, G, L, N))]


def ssd_step_by_step(x, dt, A, Bm, Cm):
    Bm, Cm = (y.repeat_interleave(x.shape[1] // y.shape[1], dim=1) for y in (Bm, Cm))
    S, out = torch.zeros(*x.shape[:2], x.shape[-1], Bm.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[2]):
        S = (dt[:, :, t] * A)[..., None, None].exp() * S + (dt[:, :, t, None] * x[:, :, t])[..., None] * Bm[:, :, t, None]
        out.append(torch.einsum("bhpn, bhn -> bhp", S, Cm[:, :, t]))
    return torch.stack(out, dim=2), S


@pytest.mark.parametrize("L, chunk", [(37, 8), (16, 16), (5, 64), (1, 4), (9, 1)])
@pytest.mark.parametrize("rule, steps, inputs", [(ttt_minute.gated_delta_rule, delta_step_by_step, delta_inputs),
                                                 (ttt_minute.ssd, ssd_step_by_step, ssd_inputs)])
def test_a_recurrence_in_chunks_is_the_recurrence_step_by_step(rule, steps, inputs, L, chunk):
    """Outputs, last state and every gradient, lengths that no chunk divides."""
    tensors, generator, gradients = inputs(L), torch.Generator().manual_seed(1), []
    chunked, plain = rule(*tensors, chunk=chunk), steps(*tensors)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in plain]
    for results in chunked, plain:
        loss = sum((y * weight).sum() for y, weight in zip(results, weights))
        gradients.append(torch.autograd.grad(loss, tensors))
    assert all((one - two).abs().max() < 1e-12 for one, two in zip((*chunked, *gradients[0]), (*plain, *gradients[1])))


def test_without_decay_and_with_beta_one_it_is_the_delta_rule():
    """A key seen again, with nothing like it in between, returns its newest value."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2, 0]][None, None]
    v = torch.arange(5, dtype=torch.float64)[None, None, :, None]
    out, S = ttt_minute.gated_delta_rule(2 * k, k, v, torch.zeros(1, 1, 5, dtype=torch.float64), torch.ones(1, 1, 5, dtype=torch.float64))
    assert out.flatten().tolist() == [0, 1, 2, 3, 4] and S.flatten().tolist() == [4, 1, 3, 0]


def test_the_gated_delta_rule_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason="pip install transformers")
    tensors = [x.detach() for x in delta_inputs(70)]
    theirs, state = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)(*(x.transpose(1, 2) for x in tensors), output_final_state=True)
    out, S = ttt_minute.gated_delta_rule(*tensors)
    assert relative(theirs.transpose(1, 2).double(), out) < 1e-5 and relative(state.double(), S) < 1e-5


def test_mamba2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    config = dataclasses.replace(TINY, layer="mamba2")
    torch.manual_seed(0)
    ours = ttt_minute.Mamba2(config)
    theirs = Mamba2Mixer(transformers.Mamba2Config(
        hidden_size=config.dim, num_heads=ours.heads, head_dim=config.head_width, state_size=ours.state, expand=2, n_groups=1, conv_kernel=4,
        use_conv_bias=True, use_bias=False, chunk_size=16, num_hidden_layers=1), layer_idx=0)
    names = {"conv.": "conv1d.", "norm": "norm.weight", "out.": "out_proj."}
    theirs.load_state_dict({functools.reduce(lambda name, pair: name.replace(*pair), names.items(), name): x for name, x in ours.state_dict().items()})
    x = torch.randn(2, 37, config.dim)
    assert relative(ours(x, Layout(1, 37, (13, 0, 0))), theirs(x)) < 1e-5


@pytest.mark.parametrize("layer", ["mamba2", "gated_deltanet"])
def test_memories_fade_within_a_thousand_tokens_as_published_or_as_slowly_as_asked(layer):
    def spans(decay):                                                                 # tokens until a memory has faded to 1/e, by head
        torch.manual_seed(0)
        made = ttt_minute.LAYERS[layer](Config(**ttt_minute.PRESETS["5b"] | dict(layer=layer, heads=32, head_width=16, decay=decay)))
        return 1 / (made.A_log.exp() * F.softplus(made.dt_bias))

    published = spans(1.0)
    assert published.min() > 1 / (16 * 0.1) and published.max() < 1 / (1 * 0.001) and published.max() > 30 * published.min()
    assert relative(spans(0.01), 100 * published) < 1e-5


@pytest.mark.parametrize("layer", ["ttt_linear", "ttt_mlp", "mamba2", "gated_deltanet"])
def test_states_are_as_large_as_in_the_papers_comparison(layer):
    """Mamba 2's is four times TTT-Linear's and half of TTT-MLP's; Gated DeltaNet's is made as large as Mamba 2's."""
    config = Config(**ttt_minute.PRESETS["5b"] | dict(layer=layer))
    sizes = {"ttt_linear": 1, "mamba2": 4, "gated_deltanet": 4, "ttt_mlp": 8}
    assert ttt_minute.state_size(config) / (config.dim * config.head_width) == pytest.approx(sizes[layer], rel=0.02)
    small, seen = dataclasses.replace(TINY, layer=layer), []
    with pytest.MonkeyPatch.context() as patch:
        for name in "ttt_scan", "ssd", "gated_delta_rule":
            patch.setattr(ttt_minute, name, lambda *args, scan=getattr(ttt_minute, name), **options: seen.append(scan(*args, **options)) or seen[-1])
        layout = Layout(1, 3, (13, 2, 3))
        ttt_minute.LAYERS[layer](small)(torch.randn(1, layout.tokens, small.dim), layout)
    state = seen[0][1]
    assert sum(x.numel() for x in (state if isinstance(state, tuple) else (state,))) == ttt_minute.state_size(small)


# ----------------------------------------------------------------------------------------------------
# Gate, both directions, block (eq 6 to 12)
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", list(ttt_minute.LAYERS))
def test_in_mixed_precision_as_on_a_gpu_loss_and_gradients_stay_close(layer):
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(TINY, layer=layer))
    latents, text = random_latents(TINY, 2)
    gradients = []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = diffusion_loss(model, latents, text, torch.tensor([500]), -latents)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 0.05


@pytest.mark.parametrize("layer", ["ttt_linear", "ttt_mlp"])
def test_closed_gates_make_the_network_the_base_network_exactly(layer):
    torch.manual_seed(0)
    base = DiT(dataclasses.replace(TINY, layer="local"))
    model = DiT(dataclasses.replace(TINY, layer=layer, gate_init=0.0))
    missing, extra = model.load_state_dict(base.state_dict(), strict=False)
    assert not extra and missing and all(is_new(name) for name in missing)
    latents, text = random_latents(TINY, 2)
    t = torch.tensor([10])
    assert torch.equal(model(latents, text, t), base(latents, text, t))


def test_a_gate_opens_text_and_video_apart_and_starts_at_a_tenth():
    gate, layout = ttt_minute.Gate(TINY), Layout(1, 3, (13, 2, 3))
    y = torch.ones(1, layout.tokens, TINY.dim)
    assert torch.allclose(gate(y, layout), torch.tensor(math.tanh(0.1)))
    gate.gate_text.data.zero_()
    out = gate(y, layout)
    assert (out[:, :3] == 0).all() and (out[:, 3:] > 0).all()


def test_both_directions_share_one_layer_but_not_the_gates():
    model = DiT(TINY)
    names = [name for name, _ in model.blocks[0].named_parameters() if "global_layer" in name]
    assert sum("W1" in name for name in names) == 1
    assert {name.split(".")[1] for name in names} == {"layer", "gate_forward", "gate_backward"}


def test_the_backward_direction_is_the_layer_on_the_reversed_story():
    torch.manual_seed(0)
    both, layout = ttt_minute.BothDirections(TINY), Layout(2, 3, (25, 2, 3))
    both.gate_forward.gate_text.data.zero_()
    both.gate_forward.gate_video.data.zero_()
    x = torch.randn(1, layout.tokens, TINY.dim)
    order = scan_order(layout.reverse(), torch.device("cpu"))
    expected = x.clone()
    expected[:, order] += math.tanh(0.1) * both.layer(x[:, order], layout.reverse())
    assert torch.allclose(both(x, layout), expected, atol=1e-6)


def test_adaln_scales_shifts_and_gates_text_and_video_apart():
    """Six vectors in the order shift, scale, gate for video, then for text: y = LN(x) (1 + scale) + shift."""
    adaln, layout = ttt_minute.AdaLN(TINY), Layout(1, 3, (13, 2, 3))
    adaln.linear.weight.data.zero_()
    adaln.linear.bias.data = torch.arange(1.0, 7.0).repeat_interleave(TINY.dim)
    x = torch.randn(1, layout.tokens, TINY.dim)
    y, gate = adaln(x, torch.zeros(1, TINY.time_dim), layout)
    normal = F.layer_norm(x, (TINY.dim,), eps=TINY.norm_eps)
    assert torch.allclose(y[:, 3:], normal[:, 3:] * 3 + 1, atol=1e-5) and (gate[:, 3:] == 3).all()
    assert torch.allclose(y[:, :3], normal[:, :3] * 6 + 4, atol=1e-5) and (gate[:, :3] == 6).all()


def test_the_layer_hands_the_scan_what_the_paper_says():
    """q and k of length 1, the target v - k normalised by the layer's own gamma and beta, eta as eta_base sigmoid / (F b)."""
    torch.manual_seed(0)
    layer, layout, seen = TTT(TINY).double(), Layout(1, 3, (13, 2, 3)), {}
    x = torch.randn(1, layout.tokens, TINY.dim, dtype=torch.float64)

    def spy(kind, weights, q, k, v, eta, *rest, **settings):
        seen.update(q=q, k=k, v=v, eta=eta)
        return ttt_scan(kind, weights, q, k, v, eta, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ttt_minute, "ttt_scan", spy)
        layer(x, layout)
    for name in "qk":
        assert torch.allclose(seen[name].norm(dim=-1), torch.ones(()).to(seen[name]), atol=1e-5)
    residual = seen["v"] - seen["k"]
    assert residual.mean(-1).abs().max() < 1e-5 and torch.allclose(residual.std(-1), torch.ones(()).to(residual), atol=1e-4)
    expected = TINY.eta_mlp * torch.sigmoid(layer.eta(x)) / (TINY.head_width * TINY.mini_batch)
    assert torch.allclose(seen["eta"], rearrange(expected, "B L H -> B H L").to(seen["eta"]), atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# CogVideoX, against diffusers (section 4.1)
# ----------------------------------------------------------------------------------------------------


def diffusers_cogvideox(folder, heads=2, head_width=16, depth=2, eps=1e-5, text_len=3, seed=0):
    """A small CogVideoX with random weights, as diffusers makes and saves it."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers transformers: the comparison with CogVideoX needs them")
    torch.manual_seed(seed)
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_width, num_layers=depth, norm_eps=eps, max_text_seq_length=text_len,
        in_channels=4, out_channels=4, sample_height=4, sample_width=6, text_embed_dim=8, time_embed_dim=16,
        use_rotary_positional_embeddings=True).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def run_diffusers(theirs, latents, text, t):
    """v of diffusers' network: all texts one after the other, RoPE over the whole video."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    _, T, _, h, w = latents.shape
    rope = get_3d_rotary_pos_embed(theirs.config.attention_head_dim, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), T)
    return theirs(latents, rearrange(text, "B S N d -> B (S N) d"), t, image_rotary_emb=rope, return_dict=False)[0]


@pytest.mark.parametrize("layer", list(ttt_minute.LAYERS))
@pytest.mark.parametrize("shape", [dict(), dict(heads=3, head_width=32, depth=1, eps=1e-6), dict(heads=1, head_width=64, depth=3, text_len=7)])
def test_with_closed_gates_every_layer_is_cogvideox(layer, shape, tmp_path):
    theirs = diffusers_cogvideox(tmp_path, **shape)
    model = DiT.from_cogvideox(tmp_path, layer, gate_init=0.0, mini_batch=8)
    for batch in 1, 2:
        latents, text = random_latents(model.config, 1, batch)
        t = torch.tensor([999, 20][:batch])
        with torch.no_grad():
            assert relative(model(latents, text, t), run_diffusers(theirs, latents, text, t)) < 1e-5


def test_full_attention_is_cogvideox_on_all_segments_at_once(tmp_path):
    theirs = diffusers_cogvideox(tmp_path)
    model = DiT.from_cogvideox(tmp_path, "full")
    latents, text = random_latents(model.config, 3, batch=2)
    t = torch.tensor([700, 5])
    with torch.no_grad():
        assert relative(model(latents, text, t), run_diffusers(theirs, latents, text, t)) < 1e-5


def test_the_comparison_with_diffusers_can_fail(tmp_path):
    """Another RoPE base, the next timestep, one parameter moved: each shows."""
    theirs = diffusers_cogvideox(tmp_path)
    latents, text = random_latents(TINY, 1)
    t = torch.tensor([500])
    expected = run_diffusers(theirs, latents, text, t)
    with torch.no_grad():
        assert relative(DiT.from_cogvideox(tmp_path, "local", rope_theta=9000.0)(latents, text, t), expected) > 1e-5
        assert relative(DiT.from_cogvideox(tmp_path, "local")(latents, text, t + 1), expected) > 1e-5
        model = DiT.from_cogvideox(tmp_path, "local")
        for name, parameter in model.named_parameters():
            old = parameter.clone()
            parameter.view(-1)[0] += 0.5
            changed = relative(model(latents, text, t), expected)
            parameter.copy_(old)
            assert changed > 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10 ** 9, 20_000])
def test_weights_return_to_diffusers_bit_for_bit(tmp_path, dtype, shard_bytes):
    diffusers_cogvideox(tmp_path / "a").to(dtype).save_pretrained(tmp_path / "a" / "transformer", max_shard_size="30KB")
    DiT.from_cogvideox(tmp_path / "a").save_cogvideox(tmp_path / "b", shard_bytes)
    import diffusers
    one, two = (diffusers.CogVideoXTransformer3DModel.from_pretrained(path, torch_dtype=dtype).state_dict()
                for path in (tmp_path / "a" / "transformer", tmp_path / "b"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) and two[name].dtype == dtype for name in one)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)


def test_a_cogvideox_folder_that_does_not_fit_is_named(tmp_path):
    diffusers_cogvideox(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())

    def refused(message, tensors=tensors, **changes):
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(fields | changes))
        with pytest.raises(UserError, match=message):
            DiT.from_cogvideox(tmp_path)

    refused("patch_size_t is 2", patch_size_t=2)
    refused("transformer_blocks.2.attn1.norm_k.bias is missing", num_layers=3)
    refused("transformer_blocks.1.* is not part of this network", num_layers=1)
    refused("proj_out.bias has shape", tensors | {"proj_out.bias": torch.zeros(3)})
    refused("ofs.weight is not part", tensors | {"ofs.weight": torch.zeros(3)})
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated or corrupt"):
        DiT.from_cogvideox(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        DiT.from_cogvideox(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="is a pickle"):
        DiT.from_cogvideox(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match="config.json"):
        DiT.from_cogvideox(tmp_path)


STORY = ["Mia the cat waves in the kitchen.", "Pip runs to the left.", "Here is the garden with its tree."]


@pytest.fixture(scope="session")
def cogvideox(tmp_path_factory):
    """A folder like CogVideoX's, written by diffusers, transformers and sentencepiece, with small random networks."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers transformers sentencepiece protobuf")
    transformers, sentencepiece = pytest.importorskip("transformers"), pytest.importorskip("sentencepiece")
    folder, words = tmp_path_factory.mktemp("cogvideox"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(STORY * 5), model_writer=words, vocab_size=34, pad_id=0, eos_id=1,
                                             unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(words.getvalue())
    (folder / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    torch.manual_seed(0)
    sizes = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(sizes).save_pretrained(folder / "text_encoder")
    diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_height=32, sample_width=48,
        scaling_factor=0.7, down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4).save_pretrained(folder / "vae")
    diffusers_cogvideox(folder / "transformer", text_len=48)
    return folder


def pipeline(folder):
    """diffusers' own pipeline over the same folder."""
    import diffusers
    import transformers
    return diffusers.CogVideoXPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(folder / "vae"),
        transformer=diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer"), scheduler=diffusers.CogVideoXDDIMScheduler())


def test_videos_are_coded_as_cogvideox_codes_them(cogvideox, capsys):
    codec, pipe = dataset.CogVideoXCodec(cogvideox), pipeline(cogvideox)
    assert "0.7" in capsys.readouterr().out and (codec.height, codec.width, codec.scale) == (32, 48, 0.7)
    frames = np.random.default_rng(0).integers(0, 256, (49, 32, 48, 3), np.uint8)
    latents = codec.encode(frames)
    pixels = rearrange(torch.from_numpy(frames), "t h w c -> 1 c t h w") / 127.5 - 1
    with torch.no_grad():
        theirs = pipe.vae.encode(pixels).latent_dist.mode()
        assert relative(latents, rearrange(theirs, "1 C t h w -> t C h w") * 0.7) < 1e-5
        seen = rearrange(pipe.decode_latents(latents[None])[0], "c t h w -> t h w c").add(1).mul(127.5).clamp(0, 255)
    assert codec.decode(latents).shape == (49, 32, 48, 3)
    assert np.abs(codec.decode(latents) - seen.numpy()).max() < 0.51
    wide = dataset.CogVideoXCodec(cogvideox / "vae", height=48, width=64, scale=1.0)
    assert wide.encode(np.zeros((5, 48, 64, 3), np.uint8)).shape == (2, 4, 6, 8) and wide.id != codec.id
    assert relative(wide.encode(frames) * 0.7, latents) < 1e-6


def test_text_is_embedded_as_cogvideox_embeds_it(cogvideox, capsys):
    encoder, pipe = dataset.T5Text(cogvideox, length=48), pipeline(cogvideox)
    assert relative(encoder.encode(STORY), pipe._get_t5_prompt_embeds(STORY, max_sequence_length=48)) < 1e-5
    assert "warning" not in capsys.readouterr().err
    marked, again = (dataset.T5Text(folder, length=48) for folder in (cogvideox / "text_encoder", cogvideox))
    assert torch.equal(marked.marks, again.marks) and marked.id == again.id
    start, *words, end, _ = encoder.words(f"{dataset.START}{STORY[0]}{dataset.END}")
    assert words == encoder.words(STORY[0])[:-1] and end == start + 1
    weight = encoder.model.get_input_embeddings().weight
    assert torch.equal(weight[[start, end]], encoder.marks) and 0.5 < encoder.marks.std() / weight[:34].std() < 2


def test_a_text_too_long_for_t5_keeps_its_scene_mark_and_is_named(cogvideox, capsys):
    encoder = dataset.T5Text(cogvideox, length=10)
    seen = []
    encoder.model.encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True)
    encoder.encode(["Mia.", STORY[0] + dataset.END], where="story.txt")
    assert "story.txt, segment 2" in capsys.readouterr().err and "segment 1" not in capsys.readouterr().err
    assert [len(ids) for ids in seen] == [10, 10] and seen[1][-2:] == encoder.words(dataset.END)[-2:] and seen[0][-1] == 0


def test_the_real_model_from_folders_to_a_video(cogvideox, tmp_path, capsys):
    """Ingest, fine-tune at 3 and 9 seconds, sample: real file formats and loading code, small tensors."""
    for name in "one", "two":
        write_footage(tmp_path / "videos", name, seconds=9.3, scenes=[dict(start=0.1, end=9.2, segments=STORY)])
    encoders = ["--vae", cogvideox, "--text_encoder", cogvideox, "--device", "cpu"]
    data, out = tmp_path / "data", tmp_path / "out"
    assert run(dataset, "--ingest", tmp_path / "videos", "--out", data, "--text_len", 48, *encoders) == 0
    assert load_file(data / "one.safetensors")["marks"].shape == (2, 8)
    shape = "--depth 2 --heads 2 --head_width 16 --height 4 --width 6 --channels 4 --text_len 48 --text_dim 8 --time_dim 16 --preset 5b".split()
    train = [*shape, "--data", data, "--out_dir", out, "--steps", 2, "--batch_size", 3, "--device", "cpu"]
    assert run(ttt_minute, "--stage", "3s", *train, "--init_from", cogvideox) == 0
    assert "--vae FOLDER" in capsys.readouterr().out and not list(out.glob("*/*/sample.mp4"))
    assert run(ttt_minute, "--stage", "9s", *train, "--vae", cogvideox) == 0
    base, tuned = DiT.from_cogvideox(cogvideox, "local"), load_checkpoint(out / "5b-ttt_mlp/9s/model.safetensors")
    assert relative(tuned.patch_in.weight, base.patch_in.weight) < 0.01 and (out / "5b-ttt_mlp/9s/sample.png").exists()
    assert tuned.config.recompute and tuned.config.micro_batch == 1 and set(tuned.encoders) == {"codec", "text_encoder"}

    story, video = tmp_path / "story.txt", tmp_path / "video.mp4"
    story.write_text("\n\n".join(dataset.mark_scene(STORY[:2])))
    make = ["--preset", "5b", "--stage", "9s", "--storyboard", story, "--out", video, "--out_dir", out, "--steps", 2]
    assert run(sample, *make, *encoders) == 0 and video.exists()
    capsys.readouterr()
    for flags, message in ((encoders[:2], "--text_encoder FOLDER is missing"), ([], "--vae FOLDER is missing"),
                           ([*encoders, "--vae_scale", 1], "scale-0.7, not .*scale-1")):
        assert run(sample, *make, *flags) == 2
        assert re.search(message, capsys.readouterr().err)
    assert run(ttt_minute, "--stage", "18s", *train) == 2 and "no video has 6 segments" in capsys.readouterr().err
    assert run(ttt_minute, "--stage", "30s", *train) == 2 and "--stage 18s" in capsys.readouterr().err
    assert run(ttt_minute, "--stage", "3s", *train, "--text_len", 40, "--init_from", cogvideox, "--out_dir", tmp_path / "b") == 2
    assert "--text_len 48" in capsys.readouterr().err


def copy_without(folder, target, missing):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(missing))
    return target


def test_folders_that_are_not_cogvideoxs_encoders_are_named(cogvideox, tmp_path):
    for missing, kind, message in (("diffusion_pytorch_model.safetensors", dataset.CogVideoXCodec, "no .safetensors"),
                                   ("model.safetensors", dataset.T5Text, "no .safetensors"),
                                   ("spiece.model", dataset.T5Text, "tokenizer")):
        with pytest.raises(UserError, match=message):
            kind(copy_without(cogvideox, tmp_path / missing, missing))
    with pytest.raises(UserError, match="no such folder"):
        dataset.CogVideoXCodec(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not the vae of CogVideoX|cannot read"):
        dataset.CogVideoXCodec(cogvideox / "transformer")
    for part, kind in ("vae", dataset.CogVideoXCodec), ("text_encoder", dataset.T5Text):
        weights, = (shutil.copytree(cogvideox, tmp_path / f"less-{part}") / part).glob("*.safetensors")
        tensors = load_file(weights)
        name = [name for name in tensors if name.endswith(".weight")][3]
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights, {"format": "pt"})
        with pytest.raises(UserError, match=f"tensor {re.escape(name)} is missing"):
            kind(tmp_path / f"less-{part}")
    cut = shutil.copytree(cogvideox / "vae", tmp_path / "cut") / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:10_000])
    with pytest.raises(UserError, match="cannot read"):
        dataset.CogVideoXCodec(cut.parent)
    with pytest.raises(UserError, match="--height 100: must be a multiple of 16"):
        dataset.open_encoders(size=(100, None))


def test_a_storyboard_is_checked_before_a_gpu_hour_is_spent(cogvideox, tmp_path, capsys):
    story = tmp_path / "story.txt"
    story.write_text("\n\n".join(dataset.mark_scene(STORY[:2]) + dataset.mark_scene(STORY[2:])))
    assert run(sample, "--preset", "5b", "--text_encoder", cogvideox, "--storyboard", story, "--check") == 0
    report = capsys.readouterr().out
    assert "3 segments, 9 seconds, 2 scenes" in report and "of 226 tokens" in report
    story.write_text(dataset.START + "word " * 300 + dataset.END)
    assert run(sample, "--storyboard", story, "--check") == 2
    captured = capsys.readouterr()
    assert "262 too many" in captured.out and "longer than the encoder's 40 tokens" in captured.err


@pytest.mark.parametrize("layer", list(ttt_minute.LAYERS))
def test_the_plan_counts_flops_and_memory_as_torch_does(layer):
    config = Config(**ttt_minute.PRESETS["5b"] | dict(layer=layer, depth=2, heads=4, height=8, width=8, text_len=30, text_dim=40, time_dim=64))
    model, (latents, text) = DiT(config), random_latents(config, 2)
    t = torch.tensor([500])

    def step():
        with FlopCounterMode(display=False, custom_mapping=unknown) as counter, sdpa_kernel(SDPBackend.MATH):
            diffusion_loss(model, latents, text, t, latents).backward()
        return counter.get_total_flops()

    unknown = {torch.ops.aten.baddbmm_: lambda bias, a, b, **_: 2 * math.prod(a) * b[-1],              # to the counter
               torch.ops.aten.linalg_solve_triangular: lambda a, b, **_: math.prod(a) * b[-1],
               torch.ops.aten.convolution_backward: lambda grad, x, weight, *_, **__: 4 * math.prod(grad) * math.prod(weight[1:])}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=unknown) as counter, sdpa_kernel(SDPBackend.MATH):
        model(latents, text, t)
    assert sum(ttt_minute.forward_flops(config, 2).values()) == pytest.approx(counter.get_total_flops(), rel=0.02)
    stage = Stage(2, 1, 1, 0, 0, everything=True)
    exact = sum(ttt_minute.step_flops(dataclasses.replace(config, recompute=False), stage).values())
    assert exact == pytest.approx(step(), rel=0.05)
    ttt_minute.prepare(model)
    assert sum(ttt_minute.step_flops(config, stage).values()) == pytest.approx(step(), rel=0.05)


@pytest.mark.parametrize("layer", list(ttt_minute.LAYERS))
def test_the_plan_counts_what_is_alive_in_a_block(layer, monkeypatch):
    config = Config(**ttt_minute.PRESETS["5b"] | dict(layer=layer, heads=4, height=16, width=16, text_len=32, time_dim=64))
    block, layout, time_embedding = ttt_minute.Block(config), Layout(5, 32, config.grid(5)), torch.randn(1, 64)
    x = torch.randn(1, layout.tokens, config.dim, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(ttt_minute, "SCAN_AT_ONCE", x.numel() // 4)

    def alive(train):
        with PeakMemory() as memory, torch.set_grad_enabled(train):
            with torch.autocast("cpu", torch.bfloat16):
                y = block(x, time_embedding, layout)
            if train:
                y.sum().backward()
        return memory.peak / (2 * x.numel())

    assert [alive(True), alive(False)] == pytest.approx(ttt_minute.ALIVE[layer], rel=0.12)


def test_a_minute_at_5b_is_sampled_on_one_gpu_of_80_gb():
    config = Config(**ttt_minute.PRESETS["5b"])
    training = [sum(ttt_minute.training_parts(config, STAGES["63s"], gpus, sharing).values()) for gpus, sharing in [(1, 1), (256, 8)]]
    assert ttt_minute.sampling_gb(config, 21) < 70 < training[0] and training[1] < 80


def test_half_of_the_heads_at_a_time_gives_the_same_scan(monkeypatch):
    for kind in "linear", "mlp":
        weights, inputs = scan_inputs(kind)
        with torch.no_grad():
            whole, last = ttt_scan(kind, weights, *inputs, 8)
            monkeypatch.setattr(ttt_minute, "SCAN_AT_ONCE", 100)
            parts, parts_last = ttt_scan(kind, weights, *inputs, 8)
        assert torch.equal(whole, parts) and all(torch.equal(a, b) for a, b in zip(last, parts_last))


@pytest.mark.parametrize("how", ["recompute", "compile"])
def test_recomputing_and_compiling_change_nothing_but_time_and_memory(how):
    if how == "compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler here")
    latents, text = random_latents(TINY, 2)
    results = []
    for config in TINY, dataclasses.replace(TINY, **{how: True}):
        torch.manual_seed(0)
        model = DiT(config)
        ttt_minute.prepare(model)
        diffusion_loss(model, latents, text, torch.tensor([500]), latents).backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(relative(results[1][name], gradient) < 1e-4 for name, gradient in results[0].items() if gradient.norm() > 1e-6)


# ----------------------------------------------------------------------------------------------------
# Diffusion (appendix A)
# ----------------------------------------------------------------------------------------------------


def test_the_noise_schedule_ends_in_pure_noise():
    alpha_bar = alphas_cumprod()
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    assert alpha_bar[-1] == 0 and abs(alpha_bar[0] - 0.99915) < 1e-6 and (alpha_bar.diff() < 0).all()
    assert (alphas_cumprod(3.0)[1:-1] < alpha_bar[1:-1]).all()


class Oracle(torch.nn.Module):
    """A model that knows x_0 and the noise, and remembers what it was asked."""

    def __init__(self, latents, noise):
        super().__init__()
        self.config, self.latents, self.noise, self.asked = TINY, latents, noise, []

    def forward(self, x, text, t):
        self.asked.append((t[0].item(), text.abs().sum().item()))
        alpha_bar = alphas_cumprod(TINY.snr_shift)[t].view(-1, 1, 1, 1, 1)
        return (alpha_bar.sqrt() * self.noise - (1 - alpha_bar).sqrt() * self.latents).float()


def test_the_true_v_has_no_loss_and_an_x0_error_weighted_by_its_noise_is_the_same_loss():
    latents, text = random_latents(TINY, 1, batch=2)
    noise, t = torch.randn_like(latents), torch.tensor([10, 900])
    assert diffusion_loss(Oracle(latents, noise), latents, text, t, noise) < 1e-12
    model = DiT(TINY)
    alpha_bar = alphas_cumprod(TINY.snr_shift)[t]
    a, s = (y.sqrt().float().view(-1, 1, 1, 1, 1) for y in (alpha_bar, 1 - alpha_bar))
    noisy = a * latents + s * noise
    x_0 = a * noisy - s * model(noisy, text, t)
    weighted = ((x_0 - latents).square() / s.square()).mean()
    assert torch.allclose(diffusion_loss(model, latents, text, t, noise), weighted, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_the_true_v_returns_x0(steps):
    latents, text = random_latents(TINY, 1)
    noise = torch.randn_like(latents)
    oracle = Oracle(latents, noise)
    assert torch.allclose(sample.ddim(oracle, noise, text, steps=steps), latents, atol=1e-4)
    asked = sorted({t for t, _ in oracle.asked}, reverse=True)
    assert asked[0] == 999 and len(asked) == steps
    if steps == 50:
        assert asked == list(range(999, 0, -20))


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_schedule_and_sampler_are_those_of_diffusers(snr_shift):
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers transformers: the comparison with CogVideoX needs them")
    scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=snr_shift, beta_schedule="scaled_linear", prediction_type="v_prediction",
                                                 timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False)
    assert torch.allclose(alphas_cumprod(snr_shift), scheduler.alphas_cumprod.double(), atol=1e-6)
    model = DiT(dataclasses.replace(TINY, snr_shift=snr_shift))
    latents, text = random_latents(TINY, 1)
    scheduler.set_timesteps(10)
    x = latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, text, t[None]), t, x, return_dict=False)[0]
    assert relative(sample.ddim(model, latents, text, steps=10, guidance=(1.0, 1.0)), x) < 1e-5


def test_guidance_rises_late_from_one_to_four():
    scale = [sample.guidance_scale(i, 50) for i in range(50)]
    assert scale[0] == 1 and abs(scale[-1] - 4) < 1e-12 and scale[25] < 1.01 and scale == sorted(scale)
    assert sample.guidance_scale(0, 1) == 1


def test_guidance_moves_away_from_the_negative_prompt_or_from_zeros():
    latents, text = random_latents(TINY, 1)
    zeros, named = Oracle(latents, latents), Oracle(latents, latents)
    sample.ddim(zeros, torch.randn_like(latents), text, steps=3)
    sample.ddim(named, torch.randn_like(latents), text, torch.ones_like(text), steps=3)
    assert [asked for _, asked in zeros.asked][2::2] == [0, 0]
    assert [asked for _, asked in named.asked][2::2] == [text.numel()] * 2


def test_guidance_goes_from_the_negative_v_beyond_the_conditional_one():
    """One step from pure noise gives x_0 = -v, and v = v_neg + w (v_cond - v_neg)."""

    class Echo(torch.nn.Module):
        config = TINY

        def forward(self, x, text, t):
            return torch.full_like(x, text.mean().item())

    noise, text = torch.randn(1, 13, 4, 4, 6), torch.full((1, 1, 3, 8), 2.0)
    latents = sample.ddim(Echo(), noise, text, text / 4, steps=1, guidance=(3.0, 3.0))
    assert torch.allclose(latents, torch.full_like(noise, -(0.5 + 3 * (2.0 - 0.5))))


# ----------------------------------------------------------------------------------------------------
# The model and its stages (sections 3.3 and 4.1, Table 2)
# ----------------------------------------------------------------------------------------------------


def test_the_model_has_cogvideox_5b_and_ttt_in_it():
    """5,570,283,072 parameters in 1024 tensors without TTT, 7.2 billion with it."""
    def count(layer):
        with torch.device("meta"):
            model = DiT(Config(**ttt_minute.PRESETS["5b"] | dict(preset="5b", layer=layer)))
        return len(list(model.parameters())), sum(parameter.numel() for parameter in model.parameters())

    assert count("local") == (1024, 5_570_283_072)
    assert round(count("ttt_mlp")[1] / 1e9, 1) == 7.2


def test_latents_that_do_not_fit_the_storyboard_are_refused():
    latents, text = random_latents(TINY, 2)
    with pytest.raises(ValueError, match="1 segments need latents"):
        DiT(TINY)(latents, text[:, :1], torch.tensor([0]))


def test_the_stages_are_table_2():
    assert [(name, stage.segments, stage.steps, stage.batch) for name, stage in STAGES.items()][1:] == [
        ("3s", 1, 5000, 64), ("9s", 3, 5000, 64), ("18s", 6, 1000, 64), ("30s", 10, 500, 64), ("63s", 21, 250, 64)]
    assert STAGES["3s"].everything and (STAGES["3s"].lr_new, STAGES["3s"].lr_rest) == (1e-4, 1e-5)
    assert all(stage.lr_new == stage.lr_rest == 1e-5 and not stage.everything for name, stage in STAGES.items() if name in ("9s", "18s", "30s", "63s"))
    assert [Config(**ttt_minute.PRESETS["5b"]).grid(stage.segments) for stage in STAGES.values()][1:] == [
        (13, 30, 45), (37, 30, 45), (73, 30, 45), (121, 30, 45), (253, 30, 45)]


def test_a_stage_trains_what_table_2_says():
    model = DiT(TINY)
    later = {name for name, _ in model.named_parameters() if trains(name, STAGES["9s"])}
    kinds = {name.split(".")[2] for name in later}
    assert kinds == {"attention", "global_layer"}
    assert {name.split(".", 3)[3] for name in later if ".attention." in name} == {
        *(f"qkv.{i}.{part}" for i in range(3) for part in ("weight", "bias")), "norm_q.weight", "norm_q.bias", "norm_k.weight", "norm_k.bias",
        "out.weight", "out.bias"}
    assert all(trains(name, STAGES["3s"]) for name, _ in model.named_parameters())


def test_weight_decay_is_for_matrices_only():
    decayed = {name.split(".", 2)[2] for name, p in DiT(TINY).named_parameters() if name.startswith("blocks.0.") and decays(name, p)}
    assert {"global_layer.layer.W1", "global_layer.layer.W2", "global_layer.layer.qkv.0.weight", "mlp.up.weight"} <= decayed
    assert not any(word in name for name in decayed for word in ("b1", "b2", "bias", "gate", "ln_", "norm.weight", "norm_q", "norm_k"))


def test_learning_rates_warm_up_and_the_new_ones_fall_along_a_cosine():
    groups = make_optimizers(DiT(TINY), STAGES["3s"], TINY)[0].param_groups
    new, rest = ([group for group in groups if group["new"] == which] for which in (True, False))
    assert {(group["peak"], group["schedule"]) for group in new} == {(1e-4, "cosine")}
    assert {(group["peak"], group["schedule"]) for group in rest} == {(1e-5, "constant")}

    def lr(step, schedule, peak=1e-4):
        return lr_at(step, 1000, peak, schedule, TINY)

    assert lr(0, "cosine") == 1e-4 / 20 and lr(19, "cosine") == 1e-4
    assert abs(lr(999, "cosine") - 1e-5) < 1e-8 and lr(510, "cosine") == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-6)
    assert {lr(step, "constant") for step in (20, 500, 999)} == {1e-4}


def test_attention_is_brought_to_unit_scale_without_changing_the_network():
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(TINY, layer="local"))
    latents, text = random_latents(TINY, 2)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    before = model(latents, text, torch.tensor([500]))
    ttt_minute.unit_attention(model)
    assert relative(model(latents, text, torch.tensor([500])), before) < 1e-5
    for block in model.blocks:
        assert abs((block.attention.out.weight @ block.attention.qkv[2].weight).square().sum() / TINY.dim - 1) < 1e-4


def test_small_batches_see_all_noise_levels_equally_often(world):
    runs, stage = dataset.Runs(world, 1), Stage(1, 100, 4, 0, 0)
    t = torch.cat([batch[2] for step in range(25) for batch in ttt_minute.draw(runs, stage, Config(), "3s", step)])
    assert t.min() >= 0 and t.max() < 1000
    assert torch.histc(t.float(), bins=10, min=0, max=1000).sub(10).abs().max() <= 2
    other = torch.cat([batch[2] for step in range(25) for batch in ttt_minute.draw(runs, stage, Config(seed=1), "3s", step)])
    assert not torch.equal(t, other)


def test_a_batch_is_the_same_whole_and_in_micro_batches(world):
    """Gradient accumulation: the same videos, noise and noise levels, only fewer at once."""
    runs, stage = dataset.Runs(world, 1), Stage(1, 100, 5, 0, 0)
    whole, = ttt_minute.draw(runs, stage, Config(micro_batch=8), "3s", 7)
    parts = list(ttt_minute.draw(runs, stage, Config(micro_batch=2), "3s", 7))
    assert [len(part[0]) for part in parts] == [2, 2, 1]
    assert all(torch.equal(one, torch.cat(many)) for one, many in zip(whole, zip(*parts)))


def test_a_tiny_model_learns_eight_clips_by_heart():
    torch.manual_seed(0)
    model = DiT(TINY)
    latents, text = random_latents(TINY, 1, batch=8)
    optimizer, = make_optimizers(model, Stage(1, 1, 1, 0, 0, everything=True), TINY)
    noise, t = torch.randn_like(latents), torch.full((8,), 700)
    losses = []
    for _ in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        loss = diffusion_loss(model, latents, text, t, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# ----------------------------------------------------------------------------------------------------
# The command line: train, interrupt, resume, sample; and what goes wrong
# ----------------------------------------------------------------------------------------------------

SMALL = "--depth 1 --heads 1 --head_width 16 --time_dim 16 --steps 4 --batch_size 2 --device cpu".split()


def run(module, *flags):
    """Run a command as a user would; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            dataset.run_main(module.main)
        except SystemExit as stop:
            return stop.code or 0
    return 0


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """One short episode of the pocket world, from video files to latents on disk."""
    folder = tmp_path_factory.mktemp("world")
    assert run(dataset, "--render", 2, "--segments", 6, "--out", folder / "videos") == 0
    assert run(dataset, "--ingest", folder / "videos", "--out", folder / "latents") == 0
    return folder / "latents"


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """pretrain, 3s and 9s of a network with one block."""
    folder = tmp_path_factory.mktemp("out")
    assert run(ttt_minute, "--stage", "9s", "--data", world, "--out_dir", folder, *SMALL) == 0
    return folder


def test_one_command_trains_what_the_stage_needs_and_ends_with_a_video(trained):
    import imageio.v3 as imageio
    for stage in "pocket-local/pretrain", "pocket-ttt_mlp/3s", "pocket-ttt_mlp/9s":
        names = {path.name for path in (trained / stage).iterdir()}
        assert {"model.safetensors", "state", "log.jsonl", "loss.png", "sample.mp4", "sample.gif", "sample.png"} <= names
    frames = imageio.imread(trained / "pocket-ttt_mlp/9s/sample.mp4", plugin="FFMPEG")
    assert frames.shape == (3 * 48 + 1, 256, 384, 3)
    lines = [json.loads(line) for line in (trained / "pocket-ttt_mlp/9s/log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"stage", "step", "loss", "lr", "lr_new", "grad_norm", "ms", "tokens_per_second", "memory_gb"} <= set(lines[0])


def test_a_world_grows_by_the_episodes_it_lacks(tmp_path, capsys):
    def plan(*flags):
        assert run(ttt_minute, "--out_dir", tmp_path, *SMALL, "--steps", 1, *flags) == 0
        return capsys.readouterr().out

    assert "1 episode of a minute" in plan("--stage", "pretrain", "--episodes", 1)
    first = tmp_path / "pocket-world/latents-64x96/episode-0000000.safetensors"
    made = first.stat().st_mtime_ns
    assert "of a minute" not in plan("--stage", "3s", "--dry_run")
    assert "1 episode of a minute" in plan("--stage", "3s", "--episodes", 2)
    assert len(dataset.Runs(first.parent, 21)) == 2 and first.stat().st_mtime_ns == made
    assert run(ttt_minute, "--out_dir", tmp_path, *SMALL, "--stage", "9s", "--episodes", 1) == 2
    assert "holds 2 already" in capsys.readouterr().err


def test_a_later_stage_changes_only_what_it_trains(trained):
    before, after = (load_file(trained / f"pocket-ttt_mlp/{stage}/model.safetensors") for stage in ("3s", "9s"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(trains(name, STAGES["9s"]) for name in changed)
    assert any("global_layer.layer.W1" in name for name in changed) and any("attention" in name for name in changed)


def test_a_stage_may_start_from_any_weights_but_never_over_a_trained_one(trained, world, tmp_path, capsys):
    flags = ["--stage", "3s", "--data", world, "--init_from", trained / "pocket-local/pretrain/model.safetensors", *SMALL]
    assert run(ttt_minute, *flags, "--out_dir", tmp_path) == 0
    one, two = (load_file(folder / "pocket-ttt_mlp/3s/model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert run(ttt_minute, *flags, "--out_dir", tmp_path) == 2 and "--overwrite" in capsys.readouterr().err


def test_a_trained_stage_says_so_and_a_checkpoint_loads(trained, world, capsys):
    assert run(ttt_minute, "--stage", "9s", "--data", world, "--out_dir", trained, *SMALL) == 0
    assert "already trained" in capsys.readouterr().out
    model = load_checkpoint(trained / "pocket-ttt_mlp/9s/model.safetensors")
    assert model.config.layer == "ttt_mlp" and model.config.depth == 1


@pytest.mark.parametrize("stop_after, number", [(1, signal.SIGINT), (3, signal.SIGTERM)])
def test_an_interrupted_run_resumes_bit_for_bit(trained, world, tmp_path, monkeypatch, capsys, stop_after, number):
    """Ctrl-C or SIGTERM in the middle of a stage, then --resume: the same weights and the same log as without."""
    (tmp_path / "pocket-local").symlink_to(trained / "pocket-local")
    draw, calls = ttt_minute.draw, []

    def interrupting_draw(*args):
        calls.append(args[-1])
        if len(calls) == stop_after:
            signal.raise_signal(number)
        return draw(*args)

    flags = ["--stage", "3s", "--data", world, "--out_dir", tmp_path, *SMALL]
    monkeypatch.setattr(ttt_minute, "draw", interrupting_draw)
    assert run(ttt_minute, *flags) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(ttt_minute, "draw", draw)
    assert run(ttt_minute, *flags) == 2 and "--resume" in capsys.readouterr().err
    assert run(ttt_minute, *flags, "--resume") == 0
    one, two = (load_file(folder / "pocket-ttt_mlp/3s/model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[json.loads(line)["loss"] for line in (folder / "pocket-ttt_mlp/3s/log.jsonl").open()] for folder in (trained, tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_resumes_with_the_same_steps_batch_and_videos_only(trained, world, tmp_path, capsys):
    shutil.copytree(trained / "pocket-ttt_mlp/3s", tmp_path / "pocket-ttt_mlp/3s", ignore=shutil.ignore_patterns("model.safetensors"))
    (tmp_path / "pocket-local").symlink_to(trained / "pocket-local")
    index = json.loads((world / "index.json").read_text())
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "index.json").write_text(json.dumps(index | {"videos": index["videos"][:1]}))
    (fewer / index["videos"][0]["file"]).symlink_to(world / index["videos"][0]["file"])
    flags = ["--stage", "3s", "--out_dir", tmp_path, *SMALL, "--resume", "--data"]
    for changed, sentence in [((world, "--steps", 5), "steps 4, this one has 5"), ((world, "--batch_size", 1), "batch 2, this one has 1"),
                              ((fewer,), f"videos {len(dataset.Runs(world, 1))}, this one has {len(dataset.Runs(fewer, 1))}")]:
        assert sentence in str(run(ttt_minute, *flags, *changed)) + capsys.readouterr().err


def test_a_stage_can_be_given_minutes_in_place_of_steps(trained, world, tmp_path, monkeypatch, capsys):
    """On a machine that takes a second a step, a tenth of a minute is six steps, interrupted or not, and sees the whole schedule."""
    (tmp_path / "pocket-local").symlink_to(trained / "pocket-local")
    flags = ["--stage", "3s", "--data", world, "--out_dir", tmp_path, *[flag for flag in SMALL if flag not in ("--steps", "4")], "--minutes", 0.1]
    monkeypatch.setattr(ttt_minute.time, "perf_counter", map(float, itertools.count()).__next__)
    draw, calls = ttt_minute.draw, []

    def interrupting_draw(*args):
        calls.append(args[-1])
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(ttt_minute, "draw", interrupting_draw)
    assert run(ttt_minute, *flags) == 130
    assert "minutes 0.1, this one has 0.2" in str(run(ttt_minute, *flags[:-1], 0.2, "--resume")) + capsys.readouterr().err
    assert run(ttt_minute, *flags, "--resume") == 0
    rates = [json.loads(line)["lr_new"] for line in (tmp_path / "pocket-ttt_mlp/3s/log.jsonl").open()]
    stage = ttt_minute.POCKET_STAGES["3s"]
    assert rates == pytest.approx([lr_at(stage.steps * i // 6, stage.steps, stage.lr_new, "cosine", Config()) for i in range(6)])
    manifest = ttt_minute.read_checkpoint(tmp_path / "pocket-ttt_mlp/3s/model.safetensors", whole=False)[1]
    assert (manifest["steps"], manifest["minutes"]) == (6, 0.1)


def test_minutes_are_those_of_the_stage_and_earlier_stages_get_theirs_by_tokens(tmp_path, capsys):
    assert run(ttt_minute, "--stage", "9s", "--out_dir", tmp_path, "--minutes", 10, "--dry_run") == 0
    plan = capsys.readouterr().out
    assert "10.0 min x 4" in plan and "0.3 min x 8" in plan              # 800 x 4 x 3 and 40 x 8 x 1 segments
    assert run(ttt_minute, "--minutes", 10, "--steps", 10) == 2 and "not allowed with" in capsys.readouterr().err
    assert run(ttt_minute, "--minutes", 0) == 2 and "--minutes 0" in capsys.readouterr().err


def test_nan_stops_the_run_and_keeps_the_last_good_state(trained, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "pocket-local").symlink_to(trained / "pocket-local")
    loss = ttt_minute.diffusion_loss
    monkeypatch.setattr(ttt_minute, "diffusion_loss", lambda model, latents, text, t, noise: loss(model, latents, text, t, noise) * (math.nan if t.tolist() == bad else 1))
    bad = next(ttt_minute.draw(dataset.Runs(world, 1), dataclasses.replace(STAGES["3s"], batch=2), Config(), "3s", 2))[2].tolist()
    status = run(ttt_minute, "--stage", "3s", "--data", world, "--out_dir", tmp_path, *SMALL, "--checkpoint_every", 1)
    assert "nan at step 2 of stage 3s" in status and "000002" in status
    assert (tmp_path / "pocket-ttt_mlp/3s/state/000002").exists() and not (tmp_path / "pocket-ttt_mlp/3s/model.safetensors").exists()


def test_a_checkpoint_of_another_codec_or_text_encoder_is_refused(trained):
    path = trained / "pocket-ttt_mlp/9s/model.safetensors"
    model = load_checkpoint(path)
    flags = argparse.Namespace(vae=None, text_encoder=None, vae_scale=None)
    codec, text_encoder = sample.encoders_of(model, path, flags, "cpu")
    assert {"codec": codec.id, "text_encoder": text_encoder.id} == model.encoders
    for kind in model.encoders:
        others = model.encoders | {kind: "another"}
        with pytest.raises(UserError, match="not another.*--overwrite"):
            ttt_minute.load_weights(model, path, others)
        stranger = load_checkpoint(path)
        stranger.encoders = others
        with pytest.raises(UserError, match=f"{kind.replace('_', ' ')} another"):
            sample.encoders_of(stranger, path, flags, "cpu")


def test_a_stage_starts_from_weights_that_ship_if_they_fit(trained, world, tmp_path, monkeypatch, capsys):
    """An exported stage in assets/ stands in for training it; one of another shape does not."""
    monkeypatch.setattr(ttt_minute, "ASSETS", tmp_path / "assets")
    export = ["--export", tmp_path / "assets" / "pocket-local-pretrain.safetensors"]
    assert run(sample, "--stage", "pretrain", "--layer", "local", "--out_dir", trained, *export) == 0
    assert {tensor.dtype for tensor in load_file(export[1]).values()} == {torch.float16}
    own = trained / "pocket-local/pretrain/model.safetensors"
    assert export[1].stat().st_size < 0.6 * own.stat().st_size
    flags = ["--stage", "3s", "--data", world, "--out_dir", tmp_path / "out", "--dry_run", *SMALL]
    assert run(ttt_minute, *flags) == 0
    plan = capsys.readouterr().out
    assert f"starts from {export[1]}" in plan and "pretrain  " not in plan
    assert run(ttt_minute, *flags, "--depth", 2) == 0
    plan = capsys.readouterr().out
    assert "starts from" not in plan and "pretrain  " in plan


def test_a_storyboard_becomes_a_video_of_its_own_length(trained, tmp_path):
    import imageio.v3 as imageio
    story = tmp_path / "story.txt"
    story.write_text(dataset.storyboard_text(dataset.episode(dataset.TEST_SEEDS, 2)))
    assert run(sample, "--stage", "9s", "--storyboard", story, "--out", tmp_path / "video.mp4", "--out_dir", trained, "--steps", 2, "--device", "cpu") == 0
    assert len(imageio.imread(tmp_path / "video.mp4", plugin="FFMPEG")) == 97
    assert (tmp_path / "video.gif").exists() and (tmp_path / "video.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--layr", "local"], "--layer"), (["--layer", "ttt_mpl"], "ttt_mlp"), (["--stage", "10s"], "9s"), (["--depth", "two"], "invalid int"),
    (["--steps", "0"], "--steps 0"), (["--head_width", "20"], "multiple of 16"), (["--device", "cuda:99"], "--device cuda"),
    (["--data", "nowhere"], "nowhere"), (["--preset", "5b"], "--stage 3s"), (["--preset", "5b", "--stage", "3s"], "CogVideoX-5B's weights"),
    (["--preset", "5b", "--stage", "pretrain"], "stages 3s"), (["--init_from", "."], "--preset 5b"), (["--micro_batch", "0"], "--micro_batch 0"),
    (["--context_parallel", "2"], "--context_parallel 2"), (["--shard", "3"], "--shard 3"),
    (["--data", "nowhere", "--episodes", "3"], "--episodes 3"), (["--episodes", "0"], "--episodes 0")])
def test_a_users_mistake_is_one_sentence_and_exit_status_2(flags, message, tmp_path, capsys):
    if "cuda" in " ".join(flags) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert run(ttt_minute, "--out_dir", tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_is_refused(trained, world, tmp_path, capsys):
    for name in "pocket-local", "pocket-ttt_mlp":
        (tmp_path / name).symlink_to(trained / name)
    (tmp_path / "pocket-ttt_linear").symlink_to(trained / "pocket-ttt_mlp")
    flags = ["--data", world, "--out_dir", tmp_path, *SMALL]
    assert run(ttt_minute, "--stage", "18s", *flags, "--depth", 2) == 2
    assert "depth 1, this run has 2" in capsys.readouterr().err
    assert run(ttt_minute, "--stage", "18s", "--layer", "ttt_linear", *flags) == 2
    assert 'layer "ttt_mlp"' in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_a_damaged_checkpoint_is_named(trained, tmp_path, capsys, damage):
    path = tmp_path / "pocket-ttt_mlp/9s/model.safetensors"
    if damage != "missing":
        path.parent.mkdir(parents=True)
        path.write_bytes((trained / path.relative_to(tmp_path)).read_bytes()[:5000])
    if damage == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    assert run(sample, "--stage", "9s", "--out_dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert str(path) in error and {"cut": "corrupt", "foreign": "not written by", "missing": "python ttt_minute.py"}[damage] in error


# ----------------------------------------------------------------------------------------------------
# Many devices: processes that talk through gloo on the CPU (section P)
# ----------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
SHARED = dataclasses.replace(TINY, heads=4, mini_batch=7, gate_init=0.3)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def in_process(rank, count, port, work, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    work(*args)
    ttt_minute.LEAVING.set()
    torch.distributed.barrier()


def in_processes(count, work, *args):
    """work(*args) in processes that torchrun might have started; the first error in one is raised here."""
    torch.multiprocessing.spawn(in_process, (count, free_port(), work, args), nprocs=count)


def rejoin(context, shard):
    """Devices of this process in another arrangement of the same processes."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.is_initialized():
            patch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
            patch.setattr(ttt_minute.threading.Thread, "start", lambda self: None)
        return ttt_minute.join(CPU, context, shard)


def wide_open(config):
    """A network in which every part matters, gates and adaLN too, and rounding does not grow: with 0.2 the recurrences multiply a
    disturbance of 1e-7 by thousands."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def train_on(devices, config, segments, batch=4, steps=2):
    """Loss and gradient norm of two steps, the first gradients, the last weights, and a sampled video."""
    stage = Stage(segments, steps, batch, 1e-2, 1e-2, everything=True)
    model = ttt_minute.build(lambda: wide_open(config), devices)
    optimizers = make_optimizers(model, stage, config)
    ttt_minute.prepare(model)
    numbers, gradients = [], None
    latents, text = random_latents(config, segments, batch)
    noise, t = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([900, 500, 200, 700])[:batch]
    own = torch.arange(batch).chunk(devices.groups)[devices.group]
    for _ in range(steps):
        for group in optimizers[0].param_groups:
            group["lr"] = 1e-2
        loss = torch.zeros(())
        for part in own.split(config.micro_batch):
            share = diffusion_loss(model, latents[part], text[part], t[part], noise[part]) * len(part) / batch
            share.backward()
            loss += share.detach()
        gradients = gradients or {name: ttt_minute.whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        norm = ttt_minute.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        numbers.append([devices.sum(loss).item(), norm.item()])
        optimizers[0].step()
        model.zero_grad()
    weights = {name: ttt_minute.whole(x) for name, x in model.state_dict().items()}
    latents = sample.generate(model.eval(), text[0], text[1 % batch], steps=1, guidance=(2.0, 3.0))
    return numbers, gradients, weights, latents


def compare_arrangements(cases):
    """Each arrangement of the processes must do what one does; the first finds out for itself what that is."""
    for layer, segments, context, shard, micro_batch in cases:
        config = dataclasses.replace(SHARED, layer=layer, micro_batch=micro_batch, recompute=micro_batch == 1)
        many = train_on(rejoin(context, shard), config, segments)
        if torch.distributed.get_rank():
            continue
        one = train_on(ttt_minute.Devices(CPU), config, segments)
        errors = {"loss and norm": max(abs(a / b - 1) for row, alone in zip(many[0], one[0]) for a, b in zip(row, alone))}
        for what, ours, alone in ("gradients", many[1], one[1]), ("weights", many[2], one[2]):
            floor = 1e-3 * max(x.norm().item() for x in alone.values())
            errors[what] = max((ours[name] - x).norm().item() / max(x.norm().item(), floor) for name, x in alone.items())
        errors["video"] = relative(many[3], one[3])
        case = f"{layer}, {segments} segments, {context} share a video, {shard} a copy"
        print(f"{case:<62}" + "".join(f"  {what} {error:.0e}" for what, error in errors.items()), flush=True)
        assert errors["loss and norm"] < 1e-5 and errors["gradients"] < 5e-5 and errors["weights"] < 1e-3 and errors["video"] < 1e-4, (case, errors)


def test_many_processes_train_and_sample_like_one():
    """FSDP2, hybrid sharding, context parallelism and gradient accumulation, together and apart; shares that differ by a segment; heads
    that are fewer than devices."""
    in_processes(4, compare_arrangements, [("ttt_mlp", 3, 2, 2, 1), ("ttt_mlp", 1, 1, 4, 4), ("gated_deltanet", 5, 4, 1, 4), ("full", 2, 2, 4, 2)])


def test_a_layer_that_would_read_a_part_of_the_video_only_is_refused(monkeypatch):
    class Recurrent(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gru = torch.nn.GRU(config.dim, config.dim, batch_first=True)

        def forward(self, x, layout):
            return self.gru(x)[0]

    monkeypatch.setitem(ttt_minute.LAYERS, "recurrent", Recurrent)
    two = ttt_minute.Devices(CPU, count=2, context=2)
    for layer in ttt_minute.LAYERS:
        config = Config(layer=layer, backend="cuda")
        if layer == "recurrent":
            with pytest.raises(UserError, match="recurrent never calls layout.by_head"):
                ttt_minute.check_devices(two, config, {})
        else:
            ttt_minute.check_devices(two, config, {})
    ttt_minute.check_devices(ttt_minute.Devices(CPU), Config(layer="recurrent"), {})


@SLOW
@pytest.mark.parametrize("layer", list(ttt_minute.LAYERS))
@pytest.mark.parametrize("count", [2, 4])
def test_every_layer_in_every_arrangement_trains_and_samples_like_one_process(layer, count):
    arrangements = {2: [(1, 1), (1, 2), (2, 1), (2, 2)], 4: [(1, 4), (1, 2), (2, 4), (2, 2), (4, 4), (4, 1)]}[count]
    in_processes(count, compare_arrangements, [(layer, segments, context, shard, 2 - context // 4) for context, shard in arrangements
                                               for segments in (1, 3, 4, 5) if segments >= context])


def test_the_batch_of_a_step_is_the_same_samples_and_noise_for_any_number_of_processes(world):
    runs, stage, config = dataset.Runs(world, 1), Stage(1, 100, 8, 0, 0), Config(micro_batch=2)
    whole = [torch.cat(parts) for parts in zip(*ttt_minute.draw(runs, stage, config, "3s", 7))]
    for groups in 2, 4, 8:
        shares = [batch for group in range(groups) for batch in ttt_minute.draw(runs, stage, config, "3s", 7, group, groups)]
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*shares)))


@pytest.mark.parametrize("layer, sharing", [(layer, 2) for layer in ttt_minute.LAYERS] + [("gated_deltanet", 4), ("mamba2", 4)])
def test_the_plan_counts_what_devices_send_to_each_other(layer, sharing, monkeypatch):
    """A pass in bf16, with weights as FSDP2 casts them on GPUs and LayerNorm in fp32 as autocast has it there, by each device in turn;
    nobody answers."""
    config = dataclasses.replace(SHARED, layer=layer)
    model, (latents, text), sent = DiT(config).bfloat16(), random_latents(config, 5), []

    def send(out, x, received, own, group):
        out.zero_()
        sent.append(x.element_size() * (sum(own) - own[device]))

    monkeypatch.setattr(ttt_minute.dist, "all_to_all_single", send)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: F.layer_norm(x.float(), self.normalized_shape, self.weight.float(),
                                                                                  self.bias.float(), self.eps))
    for device in range(sharing):
        model.layout = functools.partial(ttt_minute.Part, device=device, devices=sharing)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(latents, text, torch.tensor([500]))
    assert sum(sent) / sharing == pytest.approx(ttt_minute.exchanged_bytes(config, 5, sharing), rel=0.02)


LAUNCH = SMALL + "--stage 3s --steps 6 --checkpoint_every 1".split()


def child(module, flags, environment, threads, stderr, change):
    """Runs a command in a process of its own, after change(), without the sample at its end."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    sample.show_stage = lambda *_: None
    sys.stderr = open(stderr, "w", buffering=1)
    change()
    status = run({"ttt_minute": ttt_minute, "dataset": dataset}[module], *flags)
    if isinstance(status, str):
        print(status, file=sys.stderr)
    os._exit(status if isinstance(status, int) else 1)


def unchanged():
    pass


def start(tmp_path, *flags, module="ttt_minute", count=1, change=unchanged):
    """Processes of a run, and the files of what they say on stderr. They are forked from a server that has imported everything."""
    context, port = torch.multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["test_ttt"])
    processes = []
    for rank in range(count):
        environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
        path = tmp_path / f"stderr-{time.time_ns()}-{rank}"
        settings = (environment, 1) if count > 1 else ({}, torch.get_num_threads())      # alone, as many threads give the same bits
        process = context.Process(target=child, args=(module, flags, *settings, path, change))
        process.start()
        processes.append((process, path))
    return processes


def finish(processes, seconds=120):
    """[(exit status, stderr)]; a process that hangs is a failure."""
    results, end = [], time.monotonic() + seconds
    for process, path in processes:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise AssertionError(f"still running after {seconds} s; stderr: {path.read_text()}")
        results.append((process.exitcode, path.read_text() if path.exists() else ""))
    return results


def weights_of(folder):
    return load_file(folder / "pocket-ttt_mlp/3s/model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="session")
def undisturbed(trained, world, tmp_path_factory):
    """Flags of a run, and what it ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = ["--data", world, "--init_from", trained / "pocket-local/pretrain/model.safetensors", *LAUNCH]
    assert run(ttt_minute, *flags, "--out_dir", folder) == 0
    return flags, weights_of(folder), folder


def kill_again_and_again(undisturbed, tmp_path, kills, seed=0):
    """kill -9 at random moments, half of them while a state is being written, until the run ends by itself; and again."""
    flags, expected, _ = undisturbed
    random, killed, inside, runs = np.random.default_rng(seed), 0, 0, 0
    while killed < kills:
        out, runs = tmp_path / str(runs), runs + 1
        state = out / "pocket-ttt_mlp/3s/state"
        while not (out / "pocket-ttt_mlp/3s/model.safetensors").exists():
            (process, stderr), = start(tmp_path, *flags, "--out_dir", out, "--resume")
            end = time.monotonic() + random.uniform(0.05, 2.5)
            wait_for_state, done = random.random() < 0.5, len(ttt_minute.saved_states(state.parent))
            while process.is_alive() and killed < kills and time.monotonic() < end + 5 * wait_for_state:
                if wait_for_state and any(state.glob(".*.partial/*")):
                    break
            if killed < kills and process.is_alive():
                process.kill()
                killed += 1
            process.join()
            inside += any(state.glob(".*.partial"))
            assert process.exitcode in (0, -9), stderr.read_text()
            assert len(ttt_minute.saved_states(state.parent)) >= min(done, 1)
        assert same(weights_of(out), expected)
    print(f"{killed} kills survived in {runs} runs, {inside} of them while a state was being written")
    assert inside or kills < 20                               # a few kills may all miss


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(undisturbed, tmp_path):
    kill_again_and_again(undisturbed, tmp_path, 5)


@SLOW
def test_a_run_killed_many_times_ends_with_the_same_weights(undisturbed, tmp_path):
    kill_again_and_again(undisturbed, tmp_path, 60, seed=1)


def slow_to_write():
    save = dataset.save_file

    def lingering(*args):
        save(*args)
        time.sleep(0.2)

    dataset.save_file = lingering


def kill_ingestion(world, tmp_path, kills):
    """Killed at random moments, half of them while a file is being written, and started again; the latents are those of an undisturbed ingestion, bit for bit."""
    random, killed, runs, inside = np.random.default_rng(2), 0, 0, 0
    while killed < kills:
        out, runs, status = tmp_path / str(runs), runs + 1, None
        while status != 0:
            (process, stderr), = start(tmp_path, "--ingest", world.parent / "videos", "--out", out, module="dataset", change=slow_to_write)
            end, wait_for_file = time.monotonic() + random.uniform(0.05, 0.8), random.random() < 0.5 or kills < 5
            while process.is_alive() and (killed >= kills or time.monotonic() < end + 5 * wait_for_file):
                if wait_for_file and killed < kills and any(out.glob(".*partial*")):
                    break
            killed += process.is_alive()
            process.kill()
            process.join()
            status, inside = process.exitcode, inside + any(out.glob(".*partial*"))
            assert status in (0, -9), stderr.read_text()
        for path in world.glob("*.safetensors"):
            assert same(load_file(path), load_file(out / path.name))
    print(f"{killed} kills in {runs} ingestions survived, {inside} of them while a file was being written")
    assert inside


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=SLOW)])
def test_a_killed_ingestion_goes_on(world, tmp_path, kills):
    kill_ingestion(world, tmp_path, kills)


@pytest.mark.parametrize("damage", ["cut", "a bit", "swapped", "folders swapped", "manifest", "missing"])
def test_a_damaged_state_is_found_and_the_one_before_taken(undisturbed, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.setattr(sample, "show_stage", lambda *_: None)
    flags, expected, folder = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    stage = tmp_path / "pocket-ttt_mlp/3s"
    (stage / "model.safetensors").unlink()
    before, newest = ttt_minute.saved_states(stage)
    file, = newest.glob("*.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "a bit":
        content = bytearray(file.read_bytes())
        content[-50] ^= 4
        file.write_bytes(content)
    elif damage == "swapped":
        shutil.copy(before / file.name, file)
    elif damage == "folders swapped":
        shutil.rmtree(newest)
        shutil.copytree(before, newest)
    elif damage == "manifest":
        path = newest / "manifest.json"
        path.write_text(path.read_text().replace('"step": 6', '"step": 4'))
    else:
        file.unlink()
    assert run(ttt_minute, *flags, "--out_dir", tmp_path, "--resume") == 0
    error = capsys.readouterr().err
    assert f"{newest} is damaged" in error and same(weights_of(tmp_path), expected)
    assert [path.name for path in ttt_minute.saved_states(stage)] == ["000005", "000006"]


def test_without_a_whole_state_resuming_is_refused(undisturbed, tmp_path, capsys):
    flags, _, folder = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pocket-ttt_mlp/3s/model.safetensors").unlink()
    for state in ttt_minute.saved_states(tmp_path / "pocket-ttt_mlp/3s"):
        (state / "manifest.json").write_text("{}")
    assert run(ttt_minute, *flags, "--out_dir", tmp_path, "--resume") == 2
    assert "no state is whole" in capsys.readouterr().err


def no_room_at_step_3():
    import resource
    draw = ttt_minute.draw

    def full(runs, stage, config, name, step, *share):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))       # larger files cannot be written any more
        return draw(runs, stage, config, name, step, *share)

    ttt_minute.draw = full


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_stops_the_run_with_a_sentence_and_costs_nothing(undisturbed, tmp_path, count):
    flags, expected, _ = undisturbed
    results = finish(start(tmp_path, *flags, "--out_dir", tmp_path, count=count, change=no_room_at_step_3))
    assert all(status == 2 and "could not be saved" in error and "File too large" in error and "000003" in error and "Traceback" not in error
               for status, error in results), results
    assert sorted(path.name for path in (tmp_path / "pocket-ttt_mlp/3s/state").iterdir()) == ["000002", "000003"]
    assert all(status == 0 for status, _ in finish(start(tmp_path, *flags, "--out_dir", tmp_path, "--resume", count=count)))
    assert all(relative(x, expected[name]) < 1e-4 for name, x in weights_of(tmp_path).items())
    assert count > 1 or same(weights_of(tmp_path), expected)


def test_a_folder_that_cannot_be_written_is_named(undisturbed, tmp_path, capsys):
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    folder = Path("/sys") if os.access(folder, os.W_OK) else folder                   # root may write anywhere else
    assert run(ttt_minute, *undisturbed[0], "--out_dir", folder / "out") == 2
    error = capsys.readouterr().err
    assert str(folder) in error.splitlines()[-1] and "Traceback" not in error


def test_a_loss_that_jumps_stops_the_run(undisturbed, tmp_path, monkeypatch):
    loss, calls = ttt_minute.diffusion_loss, []
    monkeypatch.setattr(sample, "show_stage", lambda *_: None)
    monkeypatch.setattr(ttt_minute, "diffusion_loss", lambda *args: (calls.append(1), loss(*args) * (1000 if len(calls) > 27 else 1))[1])        # three calls time the plan
    status = run(ttt_minute, *undisturbed[0], "--steps", 30, "--checkpoint_every", 8, "--out_dir", tmp_path)
    assert "jumped from" in status and "at step 24" in status and "000024" in status


def test_data_that_vanishes_in_the_middle_of_a_run_does_not_matter_to_it(undisturbed, world, tmp_path, monkeypatch):
    flags, expected, _ = undisturbed
    shutil.copytree(world, tmp_path / "data")
    monkeypatch.setattr(dataset.Runs, "in_memory", 0)
    monkeypatch.setattr(sample, "show_stage", lambda *_: None)
    draw, steps = ttt_minute.draw, []

    def vanishing(*args):
        steps.append(args)
        if len(steps) == 3:
            shutil.rmtree(tmp_path / "data")
        return draw(*args)

    monkeypatch.setattr(ttt_minute, "draw", vanishing)
    own = [tmp_path / "data" if flag == world else flag for flag in flags]
    assert run(ttt_minute, *own, "--out_dir", tmp_path) == 0
    assert same(weights_of(tmp_path), expected)
    assert run(ttt_minute, *own, "--out_dir", tmp_path, "--overwrite") == 2


def soon_silent():
    ttt_minute.BEAT, ttt_minute.SILENCE = 0.5, 4
    slow_down()


def slow_down():
    draw = ttt_minute.draw
    ttt_minute.draw = lambda *args: (time.sleep(0.3), draw(*args))[1]


@pytest.mark.parametrize("how, rank", [("SIGKILL", 1), ("SIGKILL", 0), ("SIGSTOP", 1)])
def test_when_one_process_dies_or_freezes_the_others_stop_with_a_sentence(undisturbed, tmp_path, how, rank):
    flags, _, _ = undisturbed
    processes = start(tmp_path, *flags, "--out_dir", tmp_path, "--steps", 1000, count=2, change=soon_silent)
    state = tmp_path / "pocket-ttt_mlp/3s"
    while not ttt_minute.saved_states(state):
        assert all(process.is_alive() for process, _ in processes), finish(processes)
        time.sleep(0.1)
    victim, survivor = processes[rank], processes[1 - rank]
    os.kill(victim[0].pid, getattr(signal, how))
    try:
        (status, error), = finish([survivor], seconds=60)
        assert status == 1 and "another process of this run has stopped" in error and "Traceback" not in error
    finally:
        victim[0].kill()
    assert ttt_minute.saved_states(state)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], pytest.param([signal.SIGTERM, signal.SIGINT], marks=SLOW)])
def test_sigterm_to_some_saves_in_all_and_a_resumed_run_is_the_same_bit_for_bit(undisturbed, tmp_path, signals):
    """Two processes; on resuming with one the numbers are the same up to rounding."""
    flags, expected, _ = undisturbed
    whole, part, alone = (tmp_path / name for name in ("whole", "part", "alone"))
    assert {status for status, _ in finish(start(tmp_path, *flags, "--out_dir", whole, count=2))} == {0}
    processes = start(tmp_path, *flags, "--out_dir", part, "--checkpoint_every", 100, count=2, change=slow_down)
    while not (part / "pocket-ttt_mlp/3s/log.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    for (process, _), number in zip(processes, signals):
        os.kill(process.pid, number)
    results = finish(processes)
    assert {status for status, _ in results} == {130} and "--resume" in results[0][1], results
    assert len(ttt_minute.saved_states(part / "pocket-ttt_mlp/3s")) == 1
    shutil.copytree(part, alone)
    assert {status for status, _ in finish(start(tmp_path, *flags, "--out_dir", part, "--resume", count=2))} == {0}
    assert same(weights_of(part), weights_of(whole))
    assert run(ttt_minute, *flags, "--out_dir", alone, "--resume") == 0
    for other in weights_of(alone), expected:
        assert all(relative(x, other[name]) < 1e-4 for name, x in weights_of(whole).items())


# ----------------------------------------------------------------------------------------------------
# Storyboards, the pocket world, its codec, ingestion, the loader
# ----------------------------------------------------------------------------------------------------


def test_a_storyboard_has_a_segment_a_paragraph_and_keeps_its_scene_marks(tmp_path):
    (tmp_path / "story.txt").write_text("<start_scene>One.\n\nTwo.<end_scene>\n\n<start_scene>Three.<end_scene>\n")
    board, = dataset.parse_storyboard(tmp_path / "story.txt")
    assert [(s.text, s.negative, s.scene) for s in board] == [
        ("<start_scene>One.", None, 0), ("Two.<end_scene>", None, 0), ("<start_scene>Three.<end_scene>", None, 1)]


def test_the_published_json_and_jsonl_read_the_same(tmp_path):
    video = [dict(text="One.", requires_scene_transition=False, neg_text="blur"), dict(text="Two.", requires_scene_transition=True, neg_text="")]
    (tmp_path / "story.json").write_text(json.dumps([video, video]))
    (tmp_path / "story.jsonl").write_text(json.dumps(video) + "\n" + json.dumps(video) + "\n")
    boards = dataset.parse_storyboard(tmp_path / "story.json")
    assert boards == dataset.parse_storyboard(tmp_path / "story.jsonl") and len(boards) == 2
    assert [(s.text, s.negative, s.scene) for s in boards[0]] == [
        ("<start_scene>One.<end_scene>", "blur", 0), ("<start_scene>Two.<end_scene>", None, 1)]


@pytest.mark.parametrize("name, text, message", [
    ("a.txt", "<start_scene>One.\n\nTwo.", "paragraph 1.*<end_scene>"), ("a.txt", "<start_sceen>One.<end_scene>", "paragraph 1.*did you mean <start_scene>"),
    ("a.txt", "<start_scene>One.<end_scene>\n\n<start_scene>Two. Send_scene", "paragraph 2.*did you mean <end_scene>"),
    ("a.txt", "<start_scene>One.\n\n<start_scene>Two.<end_scene>", "paragraph 2.*inside the scene of paragraph 1"), ("a.txt", "One.<end_scene>", "paragraph 1"),
    ("a.txt", "One.\n\nTwo.", "no scene marks"), ("a.txt", "  \n", "empty"), ("a.json", "[[{", "not JSON"), ("a.json", '[[{"txt": "One."}]]', "segment 1.*text"),
    ("a.jsonl", '[{"text": " "}]', "line 1, segment 1.*empty"), ("a.doc", "One.", "storyboard is"), ("a.json", '[[{"text": 1}]]', "must be text")])
def test_a_faulty_storyboard_is_explained(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        dataset.parse_storyboard(tmp_path / name)


def test_an_episode_is_the_same_on_every_machine_and_hides_its_colours():
    one, two = (dataset.episode(7, 21) for _ in range(2))
    assert one.segments == two.segments and one.rooms == two.rooms and len(one.segments) == 21
    assert np.array_equal(dataset.render(one, 64, 96)[:99], dataset.render(two, 64, 96)[:99])
    words = " ".join(dataset.PocketText().words(" ".join(segment.text for seed in range(20) for segment in dataset.episode(seed, 21).segments))).split()
    hidden = {*dataset.CHARACTER_COLOURS, *dataset.WALL_COLOURS, *dataset.FURNITURE_COLOURS, *dataset.FURNITURE}
    assert not hidden & set(words)


@pytest.mark.parametrize("segments", [1, 2, 3, 21])
def test_an_episode_has_the_length_asked_for_and_its_rooms_return(segments):
    for seed in range(20):
        episode = dataset.episode(seed, segments)
        rooms = [scene.room for scene in episode.scenes]
        assert sum(scene.segments for scene in episode.scenes) == segments == len(episode.segments)
        assert segments < 3 or len(rooms) > len(set(rooms))
        assert all(10 <= len(dataset.PocketText().words(segment.text)) <= 40 for segment in episode.segments)
    assert dataset.render(dataset.episode(0, 1), 64, 96).shape == (49, 64, 96, 3)


@pytest.mark.parametrize("height, decibels", [(64, 32), (128, 29)])
def test_the_codec_is_sharp_on_episodes_it_has_not_seen(height, decibels):
    codec, errors = dataset.PocketCodec(height, 3 * height // 2), []
    for seed in range(dataset.TEST_SEEDS, dataset.TEST_SEEDS + 3):
        frames = dataset.render(dataset.episode(seed, 2), codec.height, codec.width)
        latents = codec.encode(frames)
        assert latents.shape == (25, codec.channels, height // 8, 3 * height // 16) and 0.7 < latents.std() < 1.3
        errors.append(np.square(codec.decode(latents).astype(float) - frames).mean())
    assert 10 * math.log10(255 ** 2 / np.mean(errors)) >= decibels


def test_a_latent_depends_on_its_own_frames_so_segments_can_be_cut_anywhere():
    codec = dataset.PocketCodec()
    frames = dataset.render(dataset.episode(3, 2), codec.height, codec.width)
    whole, second = codec.encode(frames), codec.encode(frames[48:])
    assert torch.allclose(whole[13:], second[1:], atol=1e-4)


def test_any_word_has_a_fixed_vector_and_long_paragraphs_are_cut_with_a_warning(capsys):
    encoder = dataset.PocketText(length=6, dim=8)
    one, two = encoder.encode(["A cat sleeps.", "a CAT sleeps"])
    assert torch.equal(one, two) and (one[3:] == 0).all() and one[:3].abs().sum() > 0
    encoder.encode(["short", "one two three four five six seven"], where="story.txt")
    assert "story.txt, segment 2" in capsys.readouterr().err


def write_footage(folder, name="film", seconds=8.0, fps=10, scenes=None, size=(96, 160)):
    """A small video whose brightness tells the time: 255 at the end."""
    import imageio
    folder.mkdir(exist_ok=True)
    count = round(seconds * fps)
    with imageio.get_writer(folder / f"{name}.mp4", fps=fps, macro_block_size=2) as writer:
        for n in range(count):
            writer.append_data(np.full((*size, 3), round(255 * n / count), np.uint8))
    if scenes is not None:
        (folder / f"{name}.json").write_text(json.dumps(scenes))


class Plain:
    """A codec that keeps each latent's mean brightness, so that a test can read the time off a latent."""

    height, width, channels, down_space, down_time, threads, scale, id = 64, 96, 16, 8, 4, 2, 1.0, "plain"

    def encode(self, frames):
        groups = [frames[:1]] + [frames[n:n + 4] for n in range(1, len(frames), 4)]
        return torch.stack([torch.full((16, 8, 12), float(group.mean())) for group in groups])


def test_real_footage_is_resampled_cropped_trimmed_evenly_and_cut_into_segments(tmp_path):
    """A scene from 0.5 s to 7.5 s is 7 s: two segments, half a second trimmed at both ends, so it starts at 1.0 s."""
    write_footage(tmp_path / "videos", scenes=[dict(start=0.5, end=7.5, segments=["One.", "Two."])])
    dataset.ingest(tmp_path / "videos", tmp_path / "latents", Plain(), dataset.PocketText())
    latents, text = dataset.Runs(tmp_path / "latents", 2).batch([0])
    assert latents.shape == (1, 25, 16, 8, 12) and text.shape == (1, 2, 40, 64)
    seconds = latents[0, :, 0, 0, 0] / 255 * 8
    assert abs(seconds[0] - 1.0) < 0.2 and abs(seconds[-1] - 7.0) < 0.3 and (seconds.diff() > 0).all()
    expected = dataset.PocketText().encode(["<start_scene>One.", "Two.<end_scene>"])
    assert torch.allclose(text[0], expected, atol=2e-3)


def test_runs_of_segments_overlap_and_share_the_border_latent(world):
    short, long = dataset.Runs(world, 1), dataset.Runs(world, 3)
    assert len(short) == 12
    video, start = long.runs[0]
    latents, text = long.batch([0])
    pieces = [short.batch([short.runs.index((video, start + i))]) for i in range(3)]
    assert torch.equal(latents[:, :13], pieces[0][0]) and torch.equal(latents[:, 13:25], pieces[1][0][:, 1:])
    assert torch.equal(text[:, 2], pieces[2][1][:, 0])


def test_long_runs_are_stories_in_which_a_place_returns_if_there_are_any(world, tmp_path):
    assert dataset.returns(list("ABA")) and dataset.returns(list("AABCA")) and not dataset.returns(list("AAB")) and not dataset.returns([None, "A", None])
    places = [[episode_room(seed, i) for i in range(6)] for seed in range(2)]
    expected = [(video, start) for video in range(2) for start in range(4) if dataset.returns(places[video][start:start + 3])]
    assert dataset.Runs(world, 3).runs == expected and 0 < len(expected) < 8
    write_footage(tmp_path / "videos", seconds=9.3, scenes=[dict(start=0, end=9.2, segments=["One."] * 3)])
    dataset.ingest(tmp_path / "videos", tmp_path / "latents", Plain(), dataset.PocketText())
    assert len(dataset.Runs(tmp_path / "latents", 2)) == 2                    # no places told: every run


def episode_room(seed, i):
    return next(scene.room for scene in dataset.episode(seed, 6).scenes if scene.first <= i < scene.first + scene.segments)


@pytest.mark.parametrize("scenes, message", [
    (None, "film.json"), ("text", "list of scenes"), ([dict(start=0, end=2, segments=["One."])], "film"), ([dict(start=3, end=1, segments=["One."])], "scene 1"),
    ([dict(start=0, end=6.5, segments=["One."])], "2.*1|1.*2"), ([dict(start=0, end=90, segments=["One."] * 30)], "90.0 s"), ([dict(start=0, end=3, segments=[" "])], "empty"),
    ([dict(start=0, end=4, segments=["One."]), dict(start=3, end=7, segments=["Two."])], "scene 2")])
def test_a_video_that_cannot_be_used_is_named_and_the_others_are_kept(scenes, message, tmp_path):
    write_footage(tmp_path / "videos", scenes=scenes)
    write_footage(tmp_path / "videos", "good", seconds=4, scenes=[dict(start=0, end=3, segments=["One."])])
    with pytest.raises(UserError, match=message):
        dataset.ingest(tmp_path / "videos", tmp_path / "latents", Plain(), dataset.PocketText())
    assert len(dataset.Runs(tmp_path / "latents", 1)) == 1


def test_a_video_that_does_not_decode_is_named(tmp_path):
    write_footage(tmp_path / "videos", scenes=[dict(start=0, end=3, segments=["One."])])
    film = tmp_path / "videos" / "film.mp4"
    film.write_bytes(b"not a video" * 100)
    with pytest.raises(UserError, match="film.mp4"):
        dataset.ingest(tmp_path / "videos", tmp_path / "latents", Plain(), dataset.PocketText())


def test_a_video_smaller_than_the_target_or_shorter_than_its_storyboard_is_refused(tmp_path):
    write_footage(tmp_path / "videos", "low", size=(48, 80), scenes=[dict(start=0, end=3, segments=["One."])])
    write_footage(tmp_path / "videos", "brief", scenes=[dict(start=0, end=12, segments=["One."] * 4)])
    with pytest.raises(UserError, match="(?s)brief.mp4.*8.0 s.*brief.json last until 12.0 s.*low.mp4.*80 x 48 are smaller than 96 x 64"):
        dataset.ingest(tmp_path / "videos", tmp_path / "latents", Plain(), dataset.PocketText())
    assert not list((tmp_path / "latents").glob("*.safetensors"))


def test_the_loader_says_what_is_wrong_with_a_folder(world, tmp_path):
    with pytest.raises(UserError, match="no dataset here"):
        dataset.Runs(tmp_path, 1)
    with pytest.raises(UserError, match="7 segments, the longest has 6"):
        dataset.Runs(world, 7)
    for path in world.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="episode-0000000.safetensors"):
        dataset.Runs(tmp_path, 1)


def test_writing_is_all_or_nothing(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        with dataset.atomic(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


# ----------------------------------------------------------------------------------------------------
# Evaluation: four axes, measured in pixels (4.2)
# ----------------------------------------------------------------------------------------------------

TEXT, MOTION, AESTHETICS, CONSISTENCY = sample.AXES


@pytest.fixture(scope="module")
def truth():
    """Two held-out episodes of six segments: [(episode, frames, scores)]."""
    episodes = [dataset.episode(dataset.TEST_SEEDS + seed, 6) for seed in (3, 8)]
    videos = [dataset.render(episode, 64, 96) for episode in episodes]
    return [(episode, video, sample.evaluate(video, episode)[0]) for episode, video in zip(episodes, videos)]


def test_the_truth_scores_full_marks_and_through_the_codec_nearly(truth):
    codec = dataset.PocketCodec()
    for episode, video, scores in truth:
        assert min(scores.values()) >= 0.95
        assert min(sample.evaluate(codec.decode(codec.encode(video)), episode)[0].values()) >= 0.9


def test_larger_videos_are_scored_alike():
    codec, episode = dataset.PocketCodec(128, 192), dataset.episode(dataset.TEST_SEEDS + 3, 6)
    video = dataset.render(episode, 128, 192)
    for frames, least in (video, 0.95), (codec.decode(codec.encode(video)), 0.9):
        assert min(sample.evaluate(frames, episode)[0].values()) >= least


def test_segments_of_other_episodes_lose_consistency_and_nothing_else():
    """Each segment of a story drawn with the hidden attributes of another episode: what is left of consistency is chance, 0.17 to 0.19."""
    strangers, videos, episode = {}, [], dataset.episode(dataset.TEST_SEEDS + 3, 6)
    for i in range(6):
        other = dataset.episode(dataset.TEST_SEEDS + 40 + i, 6)
        strangers[i] = dataclasses.replace(episode, colours=other.colours, rooms=other.rooms)
        videos.append(dataset.render(strangers[i], 64, 96)[48 * i + (i > 0):48 * i + 49])
    scores, returns = sample.evaluate(np.concatenate(videos), episode)
    expected = []
    for what, distance, _ in returns:
        now = first_of(episode, what) + distance
        here, there = (hidden(strangers[i], what) for i in (now, now - distance))
        expected.append(np.mean([a == b for a, b in zip(here, there)]))
    assert [same for *_, same in returns] == pytest.approx(expected) and np.mean(expected) < 0.5
    assert min(scores[axis] for axis in (TEXT, MOTION, AESTHETICS)) >= 0.95


def shown(episode, what, i):
    scene = next(scene for scene in episode.scenes if scene.first <= i < scene.first + scene.segments)
    return what == scene.room or what in scene.cast


def first_of(episode, what):
    return next(i for i in range(len(episode.segments)) if shown(episode, what, i))


def hidden(episode, what):
    return dataclasses.astuple(episode.rooms[what]) if what in episode.rooms else (episode.colours[what],)


def test_a_jittered_video_moves_unnaturally(truth):
    episode, video, scores = truth[0]
    jittered = video.copy()
    for t in range(1, len(video), 8):
        jittered[t:t + 4] = np.roll(video[t:t + 4], 4, axis=2)
    worse = sample.evaluate(jittered, episode)[0]
    assert worse[MOTION] < scores[MOTION] - 0.3 and worse[CONSISTENCY] > 0.9


def test_a_blurred_video_is_less_beautiful(truth):
    from PIL import ImageFilter
    episode, video, scores = truth[0]
    blurred = np.stack([np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(3))) for frame in video])
    worse = sample.evaluate(blurred, episode)[0]
    assert worse[AESTHETICS] < scores[AESTHETICS] - 0.1


def test_somebody_at_the_edge_is_cut_off_and_noise_scores_nothing():
    for x, y in (-0.1, 0.9), (1.6, 0.9), (0.5, 1.2), (0.5, 0.2):
        picture = np.zeros((128, 192, 3), np.uint8)
        dataset.paste(picture, {"Mia": (x, y, "stand", True)}, {"Mia": "red"})
        assert 0 < (picture > 0).any(-1).mean() < 0.2
    noise = np.random.default_rng(0).integers(0, 256, (145, 64, 96, 3), np.uint8)
    scores, _ = sample.evaluate(noise, dataset.episode(dataset.TEST_SEEDS, 3))
    assert scores[TEXT] < 0.4 and scores[MOTION] < 0.2 and scores[AESTHETICS] < 0.4


def test_furniture_that_changes_inside_a_scene_is_inconsistent():
    """The paper's first artefact: objects morph at the border of two segments of one scene."""
    seed = next(seed for seed in range(1000) if dataset.episode(dataset.TEST_SEEDS + seed, 2).scenes[0].segments == 2)
    episode = dataset.episode(dataset.TEST_SEEDS + seed, 2)
    room = episode.scenes[0].room
    before = episode.rooms[room]
    kind = next(kind for kind in dataset.FURNITURE if kind != before.furniture)
    other = dataclasses.replace(episode, rooms=episode.rooms | {room: dataclasses.replace(before, furniture=kind)})
    video = np.concatenate([dataset.render(episode, 64, 96)[:49], dataset.render(other, 64, 96)[49:]])
    scores, returns = sample.evaluate(video, episode)
    assert (room, 1, pytest.approx(2 / 3)) in returns and min(scores[axis] for axis in (TEXT, MOTION, AESTHETICS)) >= 0.95


def test_evaluation_writes_what_it_found_and_goes_on_where_it_stopped(trained, capsys, monkeypatch):
    flags = ["--stage", "9s", "--out_dir", trained, "--steps", 1, "--device", "cpu", "--evaluate", "--videos"]
    assert run(sample, *flags, 1) == 0
    report, folder = capsys.readouterr().out, trained / "pocket-ttt_mlp/9s"
    assert all(axis in report for axis in sample.AXES) and "chance" in report
    assert (folder / "consistency.png").exists() and (folder / "evaluation-0.mp4").exists()
    known, calls = json.loads((folder / "evaluation.json").read_text())["videos"]["0"], []
    evaluate = sample.evaluate
    monkeypatch.setattr(sample, "evaluate", lambda *args: calls.append(args) or evaluate(*args))
    assert run(sample, *flags, 2) == 0 and len(calls) == 1
    assert json.loads((folder / "evaluation.json").read_text())["videos"]["0"] == known
    assert run(sample, *flags, 1, "--seed", 1, "--guidance", 1, 2) == 0
    assert [path.name for path in folder.glob("evaluation-*.mp4")] == ["evaluation-1.mp4"], "a video of other settings is not left to be shown"
    assert run(sample, "--stage", "3s", *flags[2:], 1) == 2 and "9s and longer" in capsys.readouterr().err


@pytest.mark.parametrize("segments", [3, 6])
def test_what_a_place_seen_before_is_worth_is_seen_in_the_loss(segments, trained):
    """Nothing under local attention, but for the frames that neighbours share; something for a network that mixes all frames."""
    assert all(story.scenes[-1].room in [scene.room for scene in story.scenes[:-2]] for story in sample.stories_that_return(segments, 8))
    codec, words = dataset.PocketCodec(), dataset.PocketText()
    model = load_checkpoint(trained / "pocket-ttt_mlp/9s/model.safetensors").eval()
    assert all(max(map(abs, rises)) < 0.01 for _, _, *rises in sample.memory_in_loss(model, codec, words, segments, videos=2))

    class Mixer(torch.nn.Module):
        config = model.config

        def forward(self, latents, text, t):
            return -10 * latents.mean(1, keepdim=True).expand_as(latents)

    assert all(min(map(abs, rises)) > 0.001 for _, _, *rises in sample.memory_in_loss(Mixer(), codec, words, segments, videos=2))


@pytest.mark.parametrize("layer, least, most", [("ttt_mlp", 0.01, 0.1), ("local", -0.02, 0.002)])
def test_of_the_weights_that_ship_those_with_ttt_remember(layer, least, most):
    """Stories of six segments: what a place looked like before is worth something to TTT-MLP, and nothing to local attention."""
    path = ttt_minute.find_checkpoint("nowhere", Config(layer=layer), "63s")
    assert path.parent == ttt_minute.ASSETS and path.stat().st_size <= 4 << 20
    model = load_checkpoint(path).eval()
    (_, _, *rises), = sample.memory_in_loss(model, dataset.PocketCodec(), dataset.PocketText(), 6, videos=8, levels=(880,))
    assert all(least < rise < most for rise in rises)


def test_layers_are_compared_on_the_same_storyboards_and_one_without_weights_is_named(trained, capfd, monkeypatch):
    def no_training(command, check):
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(sample.subprocess, "run", no_training)
    assert run(sample, "--stage", "9s", "--out_dir", trained, "--steps", 1, "--device", "cpu", "--videos", 1, "--compare", "--layers", "ttt_mlp", "mamba2") == 0
    captured = capfd.readouterr()
    assert "mamba2: left out" in captured.err and "ttt_mlp" in captured.out and "rooms after 1-4" in captured.out
    folder = trained / "pocket-comparison/9s"
    assert list(json.loads((folder / "comparison.json").read_text())) == ["ttt_mlp"]
    assert (folder / "comparison.png").exists() and Image.open(folder / "comparison.gif").size == (192, 144)
    assert run(sample, "--stage", "9s", "--out_dir", trained / "nowhere", "--compare", "--layers", "swa") == 2
    assert "--preset pocket" in capfd.readouterr().err.replace("', '", " ")
    assert run(sample, "--preset", "small", "--stage", "9s", "--out_dir", trained, "--compare", "--layers", "ttt_mlp") == 2     # pocket's will not do
    assert "--preset small" in capfd.readouterr().err.replace("', '", " ")


def test_the_error_of_a_score_is_over_seeds_of_training_or_over_the_videos_of_one(capsys):
    def scored(*scores):
        videos = [{"scores": dict.fromkeys(sample.AXES, score), "returns": [["kitchen", 2, score]]} for score in scores]
        return dict(videos=videos, memory=[(880, 0.4, scores[0] / 10, 0.0)], steps=7, minutes=None, loss=0.5)

    sample.print_scores({"swa": [scored(0.2, 0.4) | {"steps": None}]})
    table = capsys.readouterr().out
    assert "those that ship took more steps" in table
    assert table.count("0.300 +- 0.100") == 4 and "0.300 (2)" in table
    sample.print_scores({"swa": [scored(0.2, 0.4), scored(0.3, 0.7), scored(0.6, 0.8)]})        # means 0.3, 0.5, 0.7
    table = capsys.readouterr().out
    assert table.count(f"0.500 +- {0.2 / 3 ** 0.5:.3f}") == 4 and "0.500 (6)" in table and "those that ship" not in table
    cells = {line[:36].strip(): line[36:].strip() for line in table.splitlines()}
    assert (cells["steps"], cells["minutes"], cells["last 40 losses of training"]) == ("7", "-", "0.500")
    assert (cells["loss of a last scene at t 880"], cells["after a stranger's colours"]) == ("0.400", "+0.0367")


def test_seeds_of_training_start_from_one_pretrain(trained, world, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sample, "memory_in_loss", functools.partial(sample.memory_in_loss, videos=1))
    for name in "pocket-local", "pocket-ttt_mlp":
        (tmp_path / name).symlink_to(trained / name)
    trainings = []

    def train(command, check):
        trainings.append(command)
        assert run(ttt_minute, *command[2:], "--data", world, *SMALL) == 0

    monkeypatch.setattr(sample.subprocess, "run", train)
    flags = ["--stage", "9s", "--out_dir", tmp_path, "--steps", 1, "--videos", 1, "--compare", "--layers", "ttt_mlp"]
    assert run(sample, *flags, "--train_seeds", 0, 1) == 0 and len(trainings) == 1           # seed 0 is there
    assert {path.name for path in tmp_path.iterdir()} == {"pocket-local", "pocket-ttt_mlp", "pocket-ttt_mlp-seed1", "pocket-comparison"}
    one, two = json.loads((tmp_path / "pocket-comparison/9s/comparison.json").read_text())["ttt_mlp"]
    assert (one["seed"], two["seed"]) == (0, 1) and one["steps"] == two["steps"] == 4 and one["loss"] != two["loss"]
    assert run(sample, *flags, "--minutes", 1) == 2                      # another budget is another experiment
    assert "was trained by steps, the others for 1 min; take another --out_dir" in capfd.readouterr().err


def test_what_ships_is_one_seed_and_was_trained_by_steps(tmp_path, capfd, monkeypatch):
    def no_training(command, check):
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(sample.subprocess, "run", no_training)
    assert ttt_minute.find_checkpoint(tmp_path, Config(seed=1), "63s") is None
    assert ttt_minute.find_checkpoint(tmp_path, Config(seed=1), "pretrain").parent == ttt_minute.ASSETS
    assert run(sample, "--stage", "63s", "--out_dir", tmp_path, "--compare", "--layers", "ttt_mlp", "--minutes", 2) == 2
    assert "'--minutes', '2.0'" in capfd.readouterr().err                # so it is trained


# ----------------------------------------------------------------------------------------------------
# Kernels (section 3.5). Every check takes the backend: output, last state and every gradient by name, against float64.
# ----------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(scope="session")
def interpreter():
    """Runs functions of this file in a process where Triton interprets its kernels on the CPU; they learn of it as they are defined."""
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
    pool.shutdown()


class RoundedProducts(TorchDispatchMode):
    """Rounds the operands of matrix products, as a path in `dtype` with sums and state in fp32 does."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        first = {torch.ops.aten.baddbmm.default: 1, torch.ops.aten.baddbmm_.default: 1, torch.ops.aten.bmm.default: 0}.get(op, len(args))
        rounded = [x.to(self.dtype).to(x.dtype) for x in args[first:]]
        return op(*args[:first], *rounded, **(kwargs or {}))


def kernel_inputs(kind, dtype, width, mini_batch, L, B, H, device):
    """Inputs already rounded to dtype, so that float64 sees the same numbers; q as the layer hands it over, [B, L, H, F] in memory."""
    weights, inputs = scan_inputs(kind, B=B, H=H, L=L, width=width, std=0.1, eta=1 / mini_batch)
    tokens = [x.to(dtype).to(device) for x in inputs[:4]]
    tokens[0] = tokens[0].transpose(1, 2).contiguous().transpose(1, 2)
    return [w.float().to(device) for w in weights], [*tokens, *(x.float().to(device) for x in inputs[4:])]


def kernel_errors(backend, kind, dtype, width, mini_batch, L, checkpoint, B=1, H=2, device="cpu"):
    """Relative error of a kernel, and of the torch path with operands of the same precision, by name."""
    weights, inputs = kernel_inputs(kind, dtype, width, mini_batch, L, B, H, device)
    truth = scan_gradients(kind, [w.double() for w in weights], [x.double() for x in inputs], "torch", mini_batch, checkpoint)
    ours = scan_gradients(kind, weights, inputs, backend, mini_batch, checkpoint)
    with RoundedProducts(dtype):
        torchs = scan_gradients(kind, weights, inputs, "torch", mini_batch, checkpoint)
    return {name: (relative(ours[name].double(), value), relative(torchs[name].double(), value)) for name, value in truth.items()}


TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 4e-2}          # the interpreter cuts bf16 off instead of rounding it


def check_kernel(interpreter, *case, **sizes):
    for name, (error, _) in interpreter(kernel_errors, "triton", *case, **sizes).items():
        assert error < TOLERANCE[case[1]], (name, error)


@pytest.mark.parametrize("kind, dtype, width, mini_batch, L, checkpoint, B", [
    ("linear", torch.float32, 32, 16, 37, 2, 2), ("linear", torch.float32, 64, 64, 1, 16, 1), ("linear", torch.bfloat16, 64, 32, 70, 3, 1),
    ("linear", torch.float16, 32, 64, 70, 16, 1), ("mlp", torch.float32, 32, 16, 55, 2, 1), ("mlp", torch.float32, 32, 32, 20, 3, 2),
    ("mlp", torch.float32, 64, 64, 70, 1, 1), ("mlp", torch.bfloat16, 64, 16, 20, 16, 1), ("mlp", torch.float16, 32, 32, 70, 1, 1)])
def test_the_triton_kernels_agree_with_float64(interpreter, kind, dtype, width, mini_batch, L, checkpoint, B):
    check_kernel(interpreter, kind, dtype, width, mini_batch, L, checkpoint, B=B)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("mini_batch", [16, 32, 64])
@pytest.mark.parametrize("checkpoint", [1, 3, 16])
@SLOW
def test_the_triton_kernels_agree_with_float64_everywhere(interpreter, kind, dtype, width, mini_batch, checkpoint):
    check_kernel(interpreter, kind, dtype, width, mini_batch, 4 * mini_batch + 5, checkpoint, B=2)


def test_in_half_precision_the_triton_kernels_err_no_more_than_twice_the_torch_path(interpreter):
    for name, (error, torchs) in interpreter(kernel_errors, "triton", "mlp", torch.float16, 32, 16, 50, 2).items():
        assert error < 2 * torchs + 1e-5, name


def in_pieces():
    """Gradients through out alone and through the last state alone, weights with a batch axis, and a scan without gradients."""
    weights, inputs = kernel_inputs("mlp", torch.float32, 32, 16, 20, 2, 1, "cpu")
    weights = [torch.stack([w, 2 * w]) for w in weights]
    worst = 0.0
    for which in 0, 1:
        gradients = []
        for backend in "torch", "triton":
            leaves = [x.clone().requires_grad_() for x in (*weights, *inputs)]
            out, last = ttt_scan("mlp", leaves[:4], *leaves[4:], 16, backend=backend, checkpoint=2)
            loss = out.square().sum() if which == 0 else sum(w.square().sum() for w in last)
            gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        worst = max([worst, *(((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(gradients[1], gradients[0]))])
    with torch.no_grad():
        results = [ttt_scan("mlp", weights, *inputs, 16, backend=backend) for backend in ("torch", "triton")]
    return max([worst, *(relative(a, b) for a, b in zip((results[1][0], *results[1][1]), (results[0][0], *results[0][1])))])


def test_triton_gradients_flow_through_either_result_and_weights_may_differ_by_video(interpreter):
    assert interpreter(in_pieces) < 1e-5


def one_operation():
    """opcheck, one graph without breaks, and activation checkpointing around the scan."""
    weights, inputs = kernel_inputs("linear", torch.float32, 32, 16, 20, 1, 2, "cpu")
    state = torch.cat([w[None].flatten(2) for w in weights], dim=-1).requires_grad_()
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(ttt_minute.scan_op, (state, *leaves, 16, 32, 1e-8, 2, True, "fp32"))
    gradients = []

    def scan(*tensors):
        return ttt_scan("linear", tensors[:2], *tensors[2:], 16, backend="triton")[0].square().sum()

    for run_it in scan, torch.compile(scan, fullgraph=True, backend="aot_eager"), functools.partial(torch.utils.checkpoint.checkpoint, scan, use_reentrant=False):
        leaves = [x.clone().requires_grad_() for x in (*weights, *inputs)]
        gradients.append(torch.autograd.grad(run_it(*leaves), leaves))
    return [all(torch.equal(a, b) for a, b in zip(gradients[0], other)) for other in gradients[1:]]


@pytest.mark.filterwarnings("ignore")
def test_to_the_compiler_and_to_checkpointing_the_scan_is_one_operation(interpreter):
    assert interpreter(one_operation) == [True, True]


def under_autocast():
    weights, inputs = kernel_inputs("linear", torch.float32, 32, 16, 20, 1, 2, "cpu")

    def scan():
        return ttt_scan("linear", weights, *inputs, 16, backend="triton")[0]

    exact = scan()
    with torch.autocast("cpu", torch.bfloat16):
        return relative(scan(), exact), torch.equal(scan(), torch.compile(scan, fullgraph=True, backend="aot_eager")())


@pytest.mark.filterwarnings("ignore")
def test_under_autocast_products_are_in_its_precision_compiled_or_not(interpreter):
    error, same = interpreter(under_autocast)
    assert 1e-4 < error < 1e-2 and same


def compiled(kernel, chip, kind, width, mini_batch, precision):
    """Compile a kernel for a chip that need not be here: registers and spilled bytes of a thread, shared memory in KB."""
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this system")
    function, E = getattr(ttt_minute, kernel), width if kind == "linear" else 4 * width
    constants = dict(F=width, E=E, b=mini_batch, KEEP=True, PRECISION=precision)
    tokens = {"bf16": "*bf16", "fp16": "*fp16"}.get(precision, "*fp32")
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name.endswith("_strides"):
            signature[name] = ("i64",) * 3 if "eta" in name else ("i64", "i64", "i64", "constexpr")
            values |= {} if "eta" in name else {(i, 3): 1}
            aligned |= {} if "eta" in name else {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name in ("H", "L", "every", "eps"):
            signature[name] = "fp32" if name == "eps" else "i32"
        else:
            signature[name], aligned[i,] = tokens if name in "q k v out dout dq dk dv".split() else "*fp32", [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(function, signature, values, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", chip, 32)
    result = triton.compile(source, target=target, options=ttt_minute.launch_options(width, E, (chip // 10, chip % 10), precision))
    assembler = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(chip).path
    ptxas = subprocess.run([assembler, "-v", f"--gpu-name=sm_{chip}{'a' if chip == 90 else ''}", "-o", "/dev/null", "-"],
                           input=result.asm["ptx"], capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", ptxas), re.search(r"(\d+) bytes spill stores", ptxas)
    return int(registers[1]), int(spilled[1]), result.metadata.shared / 1024


SHARED_KB = {80: 163, 89: 99, 90: 227}                           # KB a program may have
SPILLED = {("scan_kernel", "linear"): 0, ("scan_kernel", "mlp"): 700, ("scan_backward_kernel", "linear"): 2000, ("scan_backward_kernel", "mlp"): 5000}


def check_compiled(kernel, chip, kind, width, mini_batch, precision):
    registers, spilled, shared = compiled(kernel, chip, kind, width, mini_batch, precision)
    print(f"{kernel}, sm_{chip}, TTT-{kind}, F {width}, b {mini_batch}, {precision}: {registers} registers, {spilled} bytes spilled, {shared:.0f} KB shared")
    assert spilled <= SPILLED[kernel, kind] and shared <= SHARED_KB[chip]


@pytest.mark.parametrize("kernel, chip, kind", [("scan_kernel", 80, "mlp"), ("scan_kernel", 89, "mlp"), ("scan_kernel", 90, "mlp"), ("scan_kernel", 89, "linear"),
                                                ("scan_backward_kernel", 90, "linear"), ("scan_backward_kernel", 90, "mlp")])
def test_the_triton_kernels_compile_within_a_chips_registers_and_shared_memory(kernel, chip, kind):
    check_compiled(kernel, chip, kind, 64, 64, "bf16")


@pytest.mark.parametrize("kernel", ["scan_kernel", "scan_backward_kernel"])
@pytest.mark.parametrize("chip", list(SHARED_KB))
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("width, mini_batch, precision", [(64, 64, "bf16"), (64, 64, "fp16"), (64, 64, "tf32"), (64, 16, "bf16"), (32, 64, "bf16"), (32, 16, "bf16")])
@SLOW
def test_the_triton_kernels_compile_everywhere(kernel, chip, kind, width, mini_batch, precision):
    check_compiled(kernel, chip, kind, width, mini_batch, precision)


CPU_CASE = ("mlp", 64, 64, "float32", "fp32", "cpu")


@pytest.mark.parametrize("change, message", [
    ({}, "runs on NVIDIA GPUs, not on cpu.*TRITON_INTERPRET=1"), ({1: 48}, "heads of 32 or 64 .* not 48 and 64"), ({2: 8}, "16, 32 or 64 tokens, not 64 and 8"),
    ({3: "float64"}, "float32, bfloat16 and float16, not float64"), ({5: "mps"}, "not on mps")])
def test_what_triton_cannot_take_is_one_sentence(change, message):
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    case = [change.get(i, value) for i, value in enumerate(CPU_CASE)]
    with pytest.raises(ValueError, match=message) as error:
        ttt_minute.choose_backend("triton", *case)
    assert "\n" not in str(error.value) and '"torch" takes everything' in str(error.value)


def test_a_machine_without_triton_or_with_an_old_one_or_an_old_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(shared_memory_per_block_optin=99 << 10))
    on_gpu = [*CPU_CASE[:5], "cuda:0"]
    if ttt_minute.triton:
        assert "8.0 (Ampere) or newer, not 7.5" in ttt_minute.triton_cannot(*on_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert "128 KB of shared memory for products in fp32, this GPU has 99" in ttt_minute.triton_cannot(*on_gpu)
        assert ttt_minute.triton_cannot(*on_gpu[:3], "bfloat16", "bf16", "cuda:0") is None
        monkeypatch.setattr(ttt_minute.triton, "__version__", "3.1.0")
        assert "3.6 or newer, not 3.1.0" in ttt_minute.triton_cannot(*on_gpu)
    monkeypatch.setattr(ttt_minute, "triton", None)
    assert "no wheel for this system" in ttt_minute.triton_cannot(*on_gpu)


def test_auto_takes_torch_on_a_cpu_without_a_word_and_on_a_gpu_says_once_what_it_took(monkeypatch, capsys):
    assert ttt_minute.choose_backend("auto", *CPU_CASE) == "torch" and capsys.readouterr().err == ""
    on_gpu = [*CPU_CASE[:5], "cuda:0"]
    for reason, check, chosen, said in [(None, None, "triton", 'backend "triton"\n'), ("is busy", None, "torch", 'backend "torch"; "triton" is busy\n'),
                                        (None, "failed its self-check (dq)", "torch", 'backend "torch"; "triton" failed its self-check (dq)\n')]:
        monkeypatch.setattr(ttt_minute, "KERNELS", {"triton": lambda *case: reason})
        monkeypatch.setattr(ttt_minute, "self_check", lambda *case: check)
        ttt_minute.say_once.cache_clear()
        assert [ttt_minute.choose_backend("auto", *on_gpu) for _ in "ab"] == [chosen, chosen]
        assert capsys.readouterr().err == f"ttt_scan: {said}"


def self_checks():
    """What the self-check says of the kernels, of kernels that are wrong in one result, and of kernels that do not compile."""
    case, right = ("linear", 32, 16, "fp32", "cpu"), ttt_minute.KERNEL_SCANS["triton"]

    def one_gradient_wrong(kind, weights, expected, q, k, v, eta, *rest):
        return right(kind, weights, expected, q, k, v, eta + 0.02 * (eta - eta.detach()), *rest)

    def does_not_compile(*args):
        raise RuntimeError("out of shared memory\nand more")

    with torch.inference_mode():
        answers = [ttt_minute.self_check("triton", *case)]
    for scan in one_gradient_wrong, does_not_compile:
        ttt_minute.KERNEL_SCANS["triton"] = scan
        ttt_minute.self_check.cache_clear()
        answers.append(ttt_minute.self_check("triton", *case))
    ttt_minute.KERNEL_SCANS["triton"] = right
    return answers


def test_auto_trusts_a_kernel_only_after_it_agreed_with_torch_on_this_machine(interpreter):
    right, wrong, broken = interpreter(self_checks)
    assert right is None and "deta is off by 0.02, more than 0.001" in wrong and "RuntimeError: out of shared memory)" in broken


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=gpu)])
def test_on_a_gpu_a_kernel_errs_no_more_than_twice_the_torch_path(backend, dtype, kind):
    for width, mini_batch, L, checkpoint in (64, 64, 1000, 16), (64, 16, 333, 3), (32, 32, 100, 1):
        for name, (error, torchs) in kernel_errors(backend, kind, dtype, width, mini_batch, L, checkpoint, B=2, H=3, device="cuda").items():
            assert error < 2 * torchs + 1e-5, (width, mini_batch, name)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=gpu)])
def test_on_a_gpu_a_kernel_does_not_drift_over_ten_thousand_mini_batches(backend, kind):
    weights, inputs = kernel_inputs(kind, torch.bfloat16, 64, 64, 640_000, 1, 1, "cuda")
    with torch.no_grad():
        out, last = ttt_scan(kind, weights, *inputs, 64, backend=backend)
        truth, true_last = ttt_scan(kind, [w.double() for w in weights], *(x.double() for x in inputs), 64, backend="torch")
    errors = [relative(a.double(), b) for a, b in zip(out.chunk(10, dim=2), truth.chunk(10, dim=2))]
    assert max(errors) < 2 * errors[0]
    for before, after, true in zip(weights, last, true_last):
        assert relative(after - before, true - before) < 2e-2


# ----------------------------------------------------------------------------------------------------
# The CUDA kernel without a GPU: its arithmetic, emulated with the rounding points and the shards of ttt_kernel.cu
# ----------------------------------------------------------------------------------------------------


def bf16(x):
    """What a matrix product on tensor cores reads."""
    return x.to(torch.bfloat16).to(x.dtype)


class Emulated:
    """ttt_kernel.cu in torch: state, statistics and sums in fp32, operands of products in bf16, E cut over `tp` shards.

    The arguments are those of ttt_minute.mlp_scan. `rounded=False` in float64 leaves the algorithm alone: it must then be exact, rewinding included.
    """

    def __init__(self, q, k, v, eta, gamma, beta, W1, b1, W2, b2, eps, every, tp, rounded=True, dtype=torch.float32):
        self.tp, self.every, self.eps, self.R = tp, every, eps, bf16 if rounded else (lambda x: x)
        B, H, self.L, _ = q.shape
        self.videos, self.first = B, [x.to(dtype).flatten(0, 1) for x in (W1, b1[:, :, None], W2, b2[:, :, None])]
        self.q, self.k, self.v, self.eta = (self.cut(x.to(dtype)) for x in (q, k, v, eta[..., None]))
        self.gamma, self.beta = (x.to(dtype)[:, None].repeat(B, 1, 1) for x in (gamma, beta))

    def cut(self, x):
        """[B, H, L, .] -> [M, B H, 64, .]; what lies behind the end reads as zeros, eta included, as TMA fills it in."""
        return rearrange(F.pad(x, (0, 0, 0, -self.L % 64)), "B H (M b) F -> M (B H) b F", b=64)

    def join(self, x):
        return rearrange(x, "M (B H) b F -> B H (M b) F", B=self.videos)[:, :, :self.L]

    def shards(self, *pairs):
        """The sum over the cluster: every shard adds its own products, then shards are added in pairs, then pairs of pairs."""
        parts = [sum(x.chunk(self.tp, dim=-1)[rank] @ w.chunk(self.tp, dim=-2)[rank] for x, w in pairs) for rank in range(self.tp)]
        while len(parts) > 1:
            parts = [one + two for one, two in zip(parts[::2], parts[1::2])]
        return parts[0]

    def normalise(self, Z):
        Z = Z - Z.mean(-1, keepdim=True)
        r = torch.rsqrt(Z.square().mean(-1, keepdim=True) + self.eps)
        return Z * r, r

    def learn(self, W, t):
        """Steps 1 to 5 at mini-batch t: the new W, and the tiles that a backward pass saves (D1 = -G1, D2 = -G2)."""
        R, (W1, b1, W2, b2), k = self.R, W, self.k[t]
        X2, slope, _ = gelu_derivatives(k @ R(W1) + b1, order=2)
        X2, slope = R(X2), R(slope)
        Z2 = self.shards((X2, R(W2))) + b2
        xh, r = self.normalise(Z2)
        p = self.gamma * (self.gamma * xh + self.beta - (self.v[t] - k))
        D2 = -self.eta[t] * r * (p - p.mean(-1, keepdim=True) - xh * (p * xh).mean(-1, keepdim=True))
        D1 = (R(D2) @ R(W2).mT) * slope
        new = W1 + k.mT @ R(D1), b1 + D1.sum(-2, keepdim=True), W2 + X2.mT @ R(D2), b2 + D2.sum(-2, keepdim=True)
        return new, (X2, R(D1), R(D2), xh, r)

    def read(self, W, t):
        R, (W1, b1, W2, b2) = self.R, W
        X2 = R(F.gelu(self.q[t] @ R(W1) + b1, approximate="tanh"))
        xh, _ = self.normalise(self.shards((X2, R(W2))) + b2)
        return R(self.q[t] + self.gamma * xh + self.beta)

    def forward(self):
        W, out, self.kept = self.first, [], []
        for t in range(len(self.q)):
            if t % self.every == 0:
                self.kept.append(W)
            W, _ = self.learn(W, t)
            out.append(self.read(W, t))
        return self.join(torch.stack(out)), [w.reshape(self.videos, -1, *w.shape[1:]) for w in W]

    def backward(self, dout, dW):
        """Gradients of q, k, v, eta, gamma, beta (by video) and the first W, by replaying and rewinding each group; `drift` is how far a
        rewound W is from the one it was."""
        R, gamma, mean = self.R, self.gamma, lambda x: x.mean(-1, keepdim=True)
        D = self.cut(dout.to(self.q.dtype))
        dq, dk, dv, deta = (torch.zeros_like(x) for x in (self.q, self.k, self.v, self.eta))
        dgamma, dbeta = torch.zeros_like(gamma), torch.zeros_like(gamma)
        d1, c1, d2, c2 = (x.to(self.q.dtype).reshape(w.shape).clone() for x, w in zip(dW, self.first))
        over = lambda x: x.sum(-2, keepdim=True)
        self.drift = 0
        for start in reversed(range(0, len(self.q), self.every)):
            W, saved, biases = self.kept[start // self.every], {}, {}
            steps = range(start, min(start + self.every, len(self.q)))
            for t in steps:
                biases[t] = W[1], W[3]
                W, saved[t] = self.learn(W, t)
            for t in reversed(steps):
                X2, D1, D2, xh, r = saved[t]
                k, q, eta = self.k[t], self.q[t], self.eta[t]
                W1, b1, W2, b2 = W
                # 1-4: the output branch, at the updated W
                Xb, slope, _ = gelu_derivatives(q @ R(W1) + b1, order=2)
                Xb, slope = R(Xb), R(slope)
                xhb, rb = self.normalise(self.shards((Xb, R(W2))) + b2)
                dgamma, dbeta, p = dgamma + over(D[t] * xhb), dbeta + over(D[t]), D[t] * gamma
                U2 = rb * (p - mean(p) - xhb * mean(p * xhb))
                U1 = (R(U2) @ R(W2).mT) * slope
                d1, c1 = d1 + q.mT @ R(U1), c1 + over(U1)
                d2, c2 = d2 + Xb.mT @ R(U2), c2 + over(U2)
                dq[t] = D[t] + self.shards((R(U1), R(W1).mT))
                # 5: rewind
                W1, W2, (b1, b2) = W1 - k.mT @ D1, W2 - X2.mT @ D2, biases[t]
                W = W1, b1, W2, b2
                # 6: through the update and the inner gradient
                _, slope, bend = gelu_derivatives(k @ R(W1) + b1, order=2)
                slope, bend = R(slope), R((D2 @ R(W2).mT) * R(bend))
                A1 = k @ R(d1) + c1
                N, Z1 = R(A1 * slope), R(A1 * bend)
                # 7: the second order of the LayerNorm
                dG = -(self.shards((X2, R(d2)), (N, R(W2))) + c2)
                e = gamma * xh + self.beta - (self.v[t] - k)
                p = gamma * e
                s = mean(p * xh)
                G = r * (p - mean(p) - xh * s)
                deta[t], U = (dG * G).sum(-1, keepdim=True), eta * dG
                u, along = mean(U * xh), mean(U * G)
                w = r * (U - mean(U) - xh * u)
                h = gamma * gamma * w
                dZ2 = r * (h - mean(h) - xh * mean(h * xh) - s * w - u * G - xh * along)
                dgamma, dbeta, dv[t] = dgamma + over(w * (e + gamma * xh)), dbeta + over(gamma * w), R(-gamma * w)
                # 8, 9: through the first forward pass
                dZ1 = (D2 @ R(d2).mT + R(dZ2) @ R(W2).mT) * slope + Z1
                dk[t] = self.shards((D1, R(d1).mT), (R(dZ1), R(W1).mT)) - dv[t]
                d1, c1 = d1 + k.mT @ R(dZ1), c1 + over(dZ1)
                d2, c2 = d2 + N.mT @ D2 + X2.mT @ R(dZ2), c2 + over(dZ2)
            old = self.kept[start // self.every]
            self.drift = max(self.drift, *(relative(w, o) for w, o in zip(W, old) if w.shape[-2] > 1))
        by_video = lambda x, shape: rearrange(x, "(B H) a b -> B H a b", B=self.videos).reshape(shape)
        return [self.join(R(dq)), self.join(R(dk)), self.join(dv), self.join(deta)[..., 0],
                *(by_video(x, (self.videos, -1, x.shape[-1])) for x in (dgamma, dbeta)), *(by_video(x, w.shape) for x, w in zip((d1, c1, d2, c2), dW))]


def chip_inputs(B, H, L, std=0.02, eta_base=0.1, seed=0):
    """What TTT feeds the scan, as the kernel reads it: q, k, v in bf16, all else in fp32; here in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    W = [std * normal(B, H, 64, 256), std / 10 * normal(B, H, 256), std * normal(B, H, 256, 64), std / 10 * normal(B, H, 64)]
    q, k = (bf16(F.normalize(normal(B, H, L, 64), dim=-1)) for _ in "qk")
    v = bf16(k + F.layer_norm(normal(B, H, L, 64), (64,)))
    eta = eta_base * torch.sigmoid(normal(B, H, L) / 2) / (64 * 64)
    return [q, k, v, *(x.float().double() for x in (eta, 1 + 0.1 * normal(H, 64), 0.1 * normal(H, 64), *W))]


KERNEL_NAMES = ["q", "k", "v", "eta", "ln_gamma", "ln_beta", "W1", "b1", "W2", "b2"]


def kernel_truth(inputs, backend="dual"):
    """The naive dual form in float64 (or another backend): output, last weights, gradients of a loss over both, and that loss's."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, last = ttt_scan("mlp", leaves[6:], *leaves[:6], 64, backend=backend)
    generator = torch.Generator().manual_seed(1)
    dout, *dlast = [bf16(torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in (out, *last)]
    return out.detach(), [w.detach() for w in last], torch.autograd.grad([out, *last], leaves, [dout, *dlast]), dout, dlast


def chip_errors(inputs, out, last, gradients, truth):
    """Relative errors by name: of what the scan adds to q, of how far W moved, of every gradient."""
    true_out, true_last, true_gradients, *_ = truth
    errors = {"out": relative(out.double() - inputs[0], true_out - inputs[0])}
    errors |= {f"moved {name}": relative(w.double().reshape(x.shape) - x, t - x) for name, w, t, x in zip(KERNEL_NAMES[6:], last, true_last, inputs[6:])}
    return errors | {f"d {name}": relative(g.double().sum(0) if g.ndim > t.ndim else g.double(), t) for name, g, t in zip(KERNEL_NAMES, gradients, true_gradients)}


def assert_within_gates(errors):
    for name, error in errors.items():
        assert error <= (2e-2 if name.startswith("d ") else 5e-3), f"{name}: {error:.1e}"


@pytest.mark.parametrize("tp, every, L", [(1, 16, 200), (2, 1, 200), (2, 3, 449), (4, 3, 200), (4, 16, 64), (2, 16, 1)])
def test_the_kernels_algorithm_is_exact_in_float64(tp, every, L):
    """Shards, replay and rewinding change nothing: the closed-form backward, walked back from W at the end of a group."""
    inputs = chip_inputs(2, 2, L, std=0.1, eta_base=12.0)
    truth = kernel_truth(inputs)
    emulated = Emulated(*inputs, 1e-8, every, tp, rounded=False, dtype=torch.float64)
    errors = chip_errors(inputs, *emulated.forward(), emulated.backward(*truth[3:]), truth)
    assert max(errors.values()) < 1e-12 and emulated.drift < 1e-14


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("every, L, std, eta_base", [(16, 1024, 0.02, 0.1), (3, 449, 0.02, 0.1), (1, 200, 0.02, 0.1), (16, 1024, 0.2, 12.0)])
def test_the_kernels_rounding_stays_within_the_gates(tp, every, L, std, eta_base):
    """bf16 operands, all else in fp32, against float64: output and change of W within 5e-3, gradients within 2e-2, rewinding within 1e-6."""
    inputs = chip_inputs(1, 2, L, std, eta_base)
    truth = kernel_truth(inputs)
    emulated = Emulated(*inputs, 1e-8, every, tp)
    assert_within_gates(chip_errors(inputs, *emulated.forward(), emulated.backward(*truth[3:]), truth))
    assert emulated.drift < 1e-6


def test_a_state_in_bf16_or_another_epsilon_would_leave_the_gates():
    """What the gates are for: both are ways in which a kernel can go wrong and still look right."""
    inputs = chip_inputs(1, 1, 1024)
    truth = kernel_truth(inputs)

    class Forgetful(Emulated):
        def learn(self, W, t):
            new, saved = super().learn(W, t)
            return tuple(bf16(w) for w in new), saved

    for wrong in Forgetful(*inputs, 1e-8, 16, 2), Emulated(*inputs, 1e-6, 16, 2):
        errors = chip_errors(inputs, *wrong.forward(), wrong.backward(*truth[3:]), truth)
        with pytest.raises(AssertionError):
            assert_within_gates(errors)


@pytest.fixture(scope="module")
def emulated_op():
    """The operator of the kernel, with the emulation in the kernel's place on a CPU."""
    def forward(q, k, v, eta, gamma, beta, W1, b1, W2, b2, eps, every, tp):
        emulated = Emulated(q, k, v, eta, gamma, beta, W1, b1, W2, b2, eps, every, tp)
        out, last = emulated.forward()
        kept = list(zip(*emulated.kept))
        tiles = [rearrange(torch.stack(kept[0]), "G (B H) F (s c) -> B H G s F c", s=4, B=len(q)), rearrange(torch.stack(kept[2]), "G (B H) (s c) F -> B H G s c F", s=4, B=len(q))]
        biases = rearrange(torch.cat([torch.stack(kept[1]), torch.stack(kept[3])], -1), "G (B H) one E -> B H G (one E)", B=len(q)).contiguous()
        return out.to(q.dtype), *(w.reshape(x.shape).clone() for w, x in zip(last, (W1, b1, W2, b2))), torch.stack([t.flatten(-2) for t in tiles], 4).contiguous(), biases

    def backward(q, k, v, eta, gamma, beta, dout, dlast, kept_W, kept_b, eps, every, tp):
        W1 = rearrange(kept_W[:, :, :, :, 0], "B H G s (F c) -> G B H F (s c)", c=64)
        W2 = rearrange(kept_W[:, :, :, :, 1], "B H G s (c F) -> G B H (s c) F", F=64)
        b1, b2 = rearrange(kept_b, "B H G E -> G B H E").split([256, 64], dim=-1)
        emulated = Emulated(q, k, v, eta, gamma, beta, W1[0], b1[0], W2[0], b2[0], eps, every, tp)
        emulated.kept = [tuple(x.flatten(0, 1) for x in (w1, c1[:, :, None], w2, c2[:, :, None])) for w1, c1, w2, c2 in zip(W1, b1, W2, b2)]
        return tuple(g.to(x.dtype).contiguous() for g, x in zip(emulated.backward(dout, dlast), (q, k, v, eta, eta, eta, *dlast)))

    ttt_minute.mlp_scan.register_kernel("cpu")(forward)
    ttt_minute.mlp_scan_backward.register_kernel("cpu")(backward)


def kernel_dtypes(inputs, device="cpu"):
    return [x.to(device, torch.bfloat16 if name in "qkv" else torch.float32) for name, x in zip(KERNEL_NAMES, inputs)]


def test_the_operator_hands_every_tensor_and_gradient_to_its_place(emulated_op, monkeypatch):
    """ttt_scan's path to the kernel and back with the emulation in its place: weights shared by videos, gradients through both results."""
    monkeypatch.setattr(ttt_minute, "cuda_refusal", lambda *_: None)
    monkeypatch.setattr(ttt_minute, "load_kernel", lambda: None)
    inputs = chip_inputs(2, 2, 200, std=0.05, eta_base=1.0)
    inputs[6:] = [w[0] for w in inputs[6:]]
    truth = kernel_truth(inputs)
    leaves = [x.requires_grad_() for x in kernel_dtypes(inputs)]
    out, last = ttt_scan("mlp", leaves[6:], *leaves[:6], 64, backend="cuda", checkpoint=3)
    assert out.dtype == torch.bfloat16 and {w.dtype for w in last} == {torch.float32}
    gradients = torch.autograd.grad([out, *last], leaves, [truth[3].to(out.dtype), *(d.float() for d in truth[4])])
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    assert relative(out.double(), truth[0]) < 5e-3
    for name, mine, true in zip(KERNEL_NAMES, gradients, truth[2]):
        assert mine.shape == true.shape and relative(mine.double(), true) < 2e-2, name
    _, last = ttt_scan("mlp", leaves[6:], *leaves[:6], 64, backend="cuda", checkpoint=3)
    _, expected = ttt_scan("mlp", leaves[6:], *leaves[:6], 64, backend="torch")
    mine, theirs = (torch.autograd.grad(w[0].square().sum(), leaves[1])[0].float() for w in (last, expected))      # nothing comes through the output
    assert relative(mine, theirs) < 2e-2


def test_the_operators_shapes_are_known_without_running_it(emulated_op):
    inputs = kernel_dtypes(chip_inputs(1, 2, 130))
    torch.library.opcheck(ttt_minute.mlp_scan, (*inputs, 1e-8, 2, 2), test_utils=("test_schema", "test_faketensor"))
    kept = ttt_minute.mlp_scan(*inputs, 1e-8, 2, 2)[5:]
    torch.library.opcheck(ttt_minute.mlp_scan_backward, (*inputs[:6], inputs[0], inputs[6:], *kept, 1e-8, 2, 2), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("change, message", [
    (dict(kind="linear"), "knows TTT-MLP"), (dict(width=32), "width 32"), (dict(mini_batch=16), "16 tokens"), (dict(q=torch.float32), "q is float32"),
    (dict(v="strided"), r"v .* is not contiguous"), (dict(k="shifted"), "k does not begin"), (dict(eta=torch.float64), "fp32"), ({}, "on cpu")])
def test_what_the_kernel_cannot_take_is_said_in_one_sentence(change, message):
    change, width = dict(change), change.get("width", 64)
    kind, mini_batch = change.get("kind", "mlp"), change.get("mini_batch", 64)
    weights, inputs = scan_inputs(kind, B=2, H=2, L=70, width=width, dtype=torch.float32)
    named = dict(zip(KERNEL_NAMES, kernel_dtypes(inputs)))
    for name in "q", "k", "v", "eta":
        how = change.get(name)
        if isinstance(how, torch.dtype):
            named[name] = named[name].to(how)
        elif how == "strided":
            named[name] = named[name].mT.contiguous().mT
        elif how == "shifted":
            named[name] = torch.zeros(named[name].numel() + 1, dtype=named[name].dtype)[1:].view(named[name].shape)
    with pytest.raises(UserError, match="ttt_scan: backend cuda: .*" + message) as error:
        ttt_scan(kind, weights, *named.values(), mini_batch, backend="cuda")
    assert "\n" not in str(error.value)


def test_a_kernel_that_cannot_be_built_says_what_is_missing(tmp_path, monkeypatch):
    """No compiler, no headers, headers of another commit, a build that fails: one sentence each; and auto never takes the kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":" + os.environ["PATH"])
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs nvcc"):
        ttt_minute.build_kernel()
    monkeypatch.setattr(shutil, "which", which)
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\ncase \"$*\" in --version) echo nvcc 99;; *) echo no such thing; exit 1;; esac\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("THUNDERKITTENS_ROOT", raising=False)
    with pytest.raises(UserError, match="set THUNDERKITTENS_ROOT"):
        ttt_minute.build_kernel()
    root = tmp_path / "kittens"
    monkeypatch.setenv("THUNDERKITTENS_ROOT", str(root))
    with pytest.raises(UserError, match="no include/kittens.cuh"):
        ttt_minute.build_kernel()
    (root / "include").mkdir(parents=True)
    (root / "include" / "kittens.cuh").write_text("")
    with pytest.raises(UserError, match="could not build ttt_kernel.cu; what it said is in ") as error:
        ttt_minute.build_kernel()
    assert "no such thing" in Path(str(error.value).split(" is in ")[1]).read_text() and not list(tmp_path.rglob("*.so"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "other"]:
        subprocess.run(["git", "-C", root, *command], check=True)
    with pytest.raises(UserError, match="is at commit .* written for 0b55588d"):
        ttt_minute.build_kernel()
    weights, inputs = scan_inputs("mlp", L=9)
    monkeypatch.setattr(ttt_minute, "scan_on_chip", lambda *_: pytest.fail("auto took the kernel"))
    ttt_scan("mlp", weights, *inputs, 8)


@pytest.fixture(scope="module")
def kernel_build(tmp_path_factory):
    if not shutil.which("nvcc") or not os.environ.get("THUNDERKITTENS_ROOT"):
        pytest.skip("building the kernel needs nvcc on PATH and ThunderKittens' headers in THUNDERKITTENS_ROOT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return ttt_minute.build_kernel()


def test_the_kernel_builds_and_spills_nothing(kernel_build):
    """static_asserts hold the shared memory and the registers to their budget; the compiler's own log holds what it made of them."""
    log = kernel_build.with_suffix(".log").read_text()
    kernels = re.findall(r"Function properties for _Z\d+(\w+_kernel)ILi(\d)E.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(kernels) == 5
    for name, tp, stack, spilled in kernels:
        assert (stack, spilled) == ("0", "0"), (name, tp)
    assert not re.findall("C75(?:07|08|09|10|12)", log)       # registers not handed over; products one after the other
    import ctypes
    library = ctypes.CDLL(str(kernel_build))                  # no libcuda is linked: it loads without a driver
    assert library.ttt_forward and library.ttt_backward
    library.ttt_scratch_bytes.restype = ctypes.c_size_t
    assert [library.ttt_scratch_bytes(tp) for tp in (2, 4)] == [ttt_minute.scratch_bytes(tp) for tp in (2, 4)]


# ----------------------------------------------------------------------------------------------------
# The CUDA kernel without a GPU: who waits for whom, read from its source and tried in every order
# ----------------------------------------------------------------------------------------------------

KERNEL = Path(ttt_minute.__file__).with_name("ttt_kernel.cu")
OWN = {"x2", "g1", "W", "dW", "a", "b", "c", "stored"}                # tiles of which every learner has its own


def c_expression(text, env):
    """The value of a small C++ expression."""
    return eval(re.sub(r"P::|g\.(?=every|groups|M\b)", "", text).replace("/", "//"), {"min": min, "fresh": int}, env)


def kernel_roles(source, name):
    """Lines of each role of a kernel, by the name in its `// ---- role` mark, and the counts its rings were given."""
    body = source[source.index(f" {name}(const"):]
    body = body[:body.index("\n}\n")]
    roles = {role: text.splitlines() for role, text in re.findall(r"// ---- (\w+)\n(.*?)(?=\n    } else|\n    }\n    everyone)", body, re.S)}
    return roles, {ring: counts for ring, *counts in re.findall(r"init_ring\(s\.(\w+), (.*?), (.*?)\);", body)}


def block_end(lines, start):
    """The line after the block that line `start` opens, or after the line itself."""
    depth = 0
    for i in range(start, len(lines)):
        depth += lines[i].split("//")[0].count("{") - lines[i].split("//")[0].count("}")
        if depth <= 0:
            return i + 1
    raise ValueError(f"no end of the block {lines[start]}")


def run_role(lines, env, role, learners, slots, ops):
    """Follows the source of one role and appends what it does to `ops`: waits, signals, team barriers, loads, reads and writes."""
    def places(text):                                         # k[t % STAGES], x2[*], W[*][now] -> [(name, learner, slot)]
        name, *index = re.findall(r"^\w+|\[.*?\]", text.strip())
        index = [i[1:-1] for i in index]
        everyone = index[:1] == ["*"]
        slot = c_expression(index[-1], env) if index and index[-1] != "*" else 0
        return [(name, i, slot) for i in (range(learners) if everyone else [role])] if name in OWN else [(name, None, slot)]

    i = 0
    while i < len(lines):
        line, end = lines[i], block_end(lines, i)
        code, _, tag = line.partition("//@")
        loop = re.match(r"\s*for \(int (\w+) = (.*?); \w+ (<|>=) (.*?); \w+(?:\+\+|--| -= (.*?))\)", code)
        if loop and re.search(r"wait_|signal_|barrier\(|expect_bytes|//@", "\n".join(lines[i:end])):
            name, first, up, last, step = loop.groups()
            first, last = c_expression(first, env), c_expression(last, env)
            for env[name] in range(first, last) if up == "<" else range(first, last - 1, -c_expression(step or "1", env)):
                run_role(lines[i + 1:end - 1], env, role, learners, slots, ops)
            i = end
            continue
        if declared := re.match(r"\s*(?:const )?int ((?:\w+ = [^;]*?)+);", code):
            for name, value in re.findall(r"(\w+) = ((?:[^,(]|\([^)]*\))*)", declared[1]):
                try:
                    env[name] = c_expression(value, env)
                except (NameError, SyntaxError):
                    pass                                      # ranks and columns: no wait depends on them
        skipped = "role == P::JUDGE" in code and role != 0
        for what, ring, item in re.findall(r"(wait_full|wait_empty|signal_full|signal_empty)\(s\.(\w+), (.*?)\);", code):
            item = c_expression(item, env)
            kind, bar = what.split("_")[0], (ring, what.split("_")[1], item % slots[ring])
            ops.append((kind, bar, item // slots[ring] % 2 ^ (what == "wait_empty")))
        if re.search(r"arrier\(\);", code):
            ops.append(("barrier",))
        if expect := re.search(r"expect_bytes\(s\.(\w+)\.full\[(.*?)\]", code):
            loads = [l for l in lines[i + 1:i + 3] if "load_async" in l]
            ops.append(("expect", (expect[1], "full", c_expression(expect[2], env)), len(loads)))
        if load := re.search(r"load_async\(.*?s\.(\w+)(\[.*?\])?.*s\.(\w+)\.full\[(.*?)\]\)", code):
            name, slot, ring, at = load.groups()
            names = ["x2[*]", "g1[*]"] if name == "saved" else [name + (slot or "")]
            ops.append(("load", (ring, "full", c_expression(at, env)), tuple((p, env["t"]) for n in names for p in places(n))))
        if tag and not skipped:
            uses = re.findall(r"([\w\[\]*% ]+?) (==|:=) ([^,;]+)", tag)
            reads, writes = (tuple((p, c_expression(v, env)) for n, how, v in uses if how == sign for p in places(n)) for sign in ("==", ":="))
            ops.append(("use", reads, writes))
        i += 1


def cta_programs(source, name, tp, M, every):
    """What every warpgroup of one multiprocessor does: {role: operations}, and how many arrivals each barrier waits for."""
    HS = 4 // tp
    learners = HS // 2 if tp == 1 and name == "ttt_forward_kernel" else HS
    forward = name == "ttt_forward_kernel"
    stages, copies = int(re.search(r"STAGES = (\d+)", source)[1]), 1 if tp == 1 else 2
    assert re.search(r"COPIES = TP == 1 \? 1 : 2", source)
    env = dict(TP=tp, NL=learners, TEAM=learners + (not forward), STAGES=stages, COPIES=copies, M=M, every=every, groups=-(-M // every))
    struct = re.search(r"struct " + ("Forward" if forward else "Backward") + r"Shared \{.*?\n\};", source, re.S)[0]
    slots = {ring: c_expression(size, env) for size, names in re.findall(r"Ring<(.*?)> (.*?);", struct) for ring in names.split(", ")}
    roles, counts = kernel_roles(source, name)
    arrivals = {}
    for ring, (full, empty) in counts.items():
        for kind, count in ("full", full), ("empty", empty):
            for slot in range(slots[ring]):
                arrivals[ring, kind, slot] = c_expression(count.replace("(TP == 1)", "1").replace("TP - 1", "1"), env)
    programs = {}
    for role, lines in roles.items():
        for index in range(learners) if role == "learners" else [None if role != "judge" else learners]:
            ops = []
            run_role(lines, dict(env, role=index), index, learners, slots, ops)
            programs[role if index is None or role == "judge" else f"learner {index}"] = ops
    return programs, arrivals


def explore(programs, arrivals, limit=2_000_000):
    """Tries every order in which the warpgroups and the transfers can go on. Returns the number of states, or says what went wrong.

    A barrier completes a phase when its arrivals and its bytes have come; a wait for a parity passes when the phase at hand has the
    other one, as on the chip. Every read names the contents it expects: a wait that is missing, or that passes a phase too early, is a
    read of something else in some order. An order in which nobody can go on is a deadlock.
    """
    names, programs = list(programs), list(programs.values())
    team = [i for i, name in enumerate(names) if "learner" in name or name == "judge"]
    bars = {bar: i for i, bar in enumerate(arrivals)}
    counts = list(arrivals.values())
    buffers = {p: i for i, p in enumerate(dict.fromkeys(p for ops in programs for op in ops for p, _ in
                                                        (op[2] if op[0] == "load" else op[1] + op[2] if op[0] == "use" else ())))}
    start = tuple([0] * len(programs)), tuple([(0, 0, 0)] * len(bars)), tuple([None] * len(buffers)), ()
    seen, todo = {start}, [start]

    def arrive(state_bars, bar, come, tx):
        phase, have, bytes_ = state_bars[bars[bar]]
        have, bytes_ = have + come, bytes_ + tx
        assert have <= counts[bars[bar]], f"too many arrivals at {bar}"
        if have == counts[bars[bar]] and bytes_ == 0:
            phase, have = phase + 1, 0
        return state_bars[:bars[bar]] + ((phase, have, bytes_),) + state_bars[bars[bar] + 1:]

    def write(contents, writes):
        contents = list(contents)
        for place, version in writes:
            contents[buffers[place]] = version
        return tuple(contents)

    while todo:
        pcs, state_bars, contents, flying = todo.pop()
        after = [(pcs, arrive(state_bars, bar, 0, -1), write(contents, writes), flying[:i] + flying[i + 1:])
                 for i, (bar, writes) in enumerate(flying)]
        at = [ops[pc] if pc < len(ops) else None for ops, pc in zip(programs, pcs)]
        if team and all(at[i] and at[i][0] == "barrier" for i in team):
            after.append((tuple(pc + (i in team) for i, pc in enumerate(pcs)), state_bars, contents, flying))
        for i, op in enumerate(at):
            if op is None or op[0] == "barrier":
                continue
            go = pcs[:i] + (pcs[i] + 1,) + pcs[i + 1:]
            if op[0] == "wait":
                if state_bars[bars[op[1]]][0] % 2 != op[2]:
                    after.append((go, state_bars, contents, flying))
            elif op[0] == "signal":
                after.append((go, arrive(state_bars, op[1], 4, 0), contents, flying))
            elif op[0] == "expect":
                after.append((go, arrive(state_bars, op[1], 1, op[2]), contents, flying))
            elif op[0] == "load":
                after.append((go, state_bars, contents, tuple(sorted(flying + (op[1:],)))))
            else:
                for place, version in op[1]:
                    if contents[buffers[place]] != version:
                        return f"{names[i]} wants {place} of {version} and finds {contents[buffers[place]]}"
                after.append((go, state_bars, write(contents, op[2]), flying))
        if not after and any(at):
            return "deadlock: " + ", ".join(f"{name} at {op}" for name, op in zip(names, at) if op)
        for state in after:
            if state not in seen:
                seen.add(state)
                todo.append(state)
        assert len(seen) < limit, "too many states"
    return len(seen)


def exchange_programs(source, tp, M):
    """The sum over a cluster of `tp`, M times, from the body of sum_over_cluster: one program a multiprocessor."""
    body = source[source.index("void sum_over_cluster("):]
    body = body[:body.index("\n}\n")].splitlines()
    programs = {}
    for rank in range(tp):
        peers, ops = [(rank + i) % tp for i in range(1, tp)], []
        for n in range(M):
            for line in body:
                if wait := re.search(r"wait_peer\(ring\.(\w+)\[0\], (.*)\);", line):
                    ops.append(("wait", ("sum", wait[1], rank), eval(wait[2], {"n": n})))
                elif "expect_bytes(ring.full" in line:
                    ops.append(("expect", ("sum", "full", rank), tp - 1))
                elif " send(" in line:
                    ops += [("load", ("sum", "full", peer), ((("from", peer, rank), n),)) for peer in peers]
                elif "return x.from[" in line:
                    ops.append(("use", tuple((("from", rank, peer), n) for peer in peers), ()))
                elif "arrive(ring.empty" in line:
                    ops += [("signal", ("sum", "empty", peer), 0) for peer in peers]
        programs[f"rank {rank}"] = ops
    return programs, {("sum", kind, rank): count for rank in range(tp) for kind, count in (("full", 1), ("empty", 4 * (tp - 1)))}


def test_a_threads_numbers_lie_where_tensor_cores_look_for_them():
    """Rows of 128 bytes whose chunks of 16 change places by the row, byte ^ (byte % 1024 / 128 * 16): all threads together fill a tile."""
    source, found = KERNEL.read_text(), {}
    first = re.search(r"uint32_t first = shared\(dynamic\) \+ (.*?);", source)[1]
    place = re.search(r"place\(const tile &t, At p\) \{ return (.*?); \}", source)[1]
    for quarter, lane, i in itertools.product(range(4), range(32), range(16)):
        names = {"quarter": lambda: quarter, "lane": lambda: lane, "first": 0, "i": i}
        names["first"] = eval(first.replace("/", "//"), names)
        at = eval(place.replace("p.", "").replace("(shared(t.data) - shared(dynamic))", "0").replace("/", "//"), names)
        row, column = 16 * quarter + 8 * (i % 2) + lane // 4, 16 * (i // 4) + 8 * (i // 2 % 2) + 2 * (lane % 4)
        byte = 128 * row + 2 * column
        assert at == byte ^ (byte % 1024 // 128 * 16)
        found[at] = row, column
    assert sorted(found) == list(range(0, 8192, 4))


MODELS = [("ttt_forward_kernel", 1), ("ttt_forward_kernel", 2), ("ttt_forward_kernel", 4), ("ttt_backward_kernel", 2), ("ttt_backward_kernel", 4)]


@pytest.mark.parametrize("name, tp", MODELS)
def test_the_kernels_barriers_hold_in_every_order(name, tp):
    """No deadlock, and nobody reads what is not there yet or no longer, for up to 6 mini-batches in groups of 3."""
    for M in 1, 2, 3, 6:
        states = explore(*cta_programs(KERNEL.read_text(), name, tp, M, 3))
        assert isinstance(states, int), states


@pytest.mark.parametrize("tp, M", [(2, 6), (4, 2)])
def test_the_sum_over_the_cluster_holds_in_every_order(tp, M):
    states = explore(*exchange_programs(KERNEL.read_text(), tp, M))
    assert isinstance(states, int), states


def without(source, name, line):
    """The source with one synchronisation taken out of a kernel, or None where that line is not one."""
    lines = source.splitlines()
    first = next(i for i, text in enumerate(lines) if f" {name}(" in text)
    last = next(i for i in range(first, len(lines)) if lines[i] == "}")
    found = [i for i in range(first, last) if re.match(r"\s*(wait_\w+|signal_\w+|\w+\.barrier|Learner<P>::barrier|tma::cluster::arrive|if \(.*arrive)\(?", lines[i])]
    return "\n".join(lines[:found[line]] + lines[found[line] + 1:]) + "\n" if line < len(found) else None


IMPLIED = "a learner waits for the same and a team barrier follows; it stays, so that who reads what TMA wrote has seen it arrive"
HARMLESS = {                                                  # what may go without harm between warpgroups, and why it stands there
    "learners: Learner<P>::barrier();": "orders the warps inside each learner before the first and after the last mini-batch",
    "producer: wait_empty(s.back, g.M - 1 - t);": "k and v are given back together with it",
    **dict.fromkeys(("judge: wait_full(s.kv, t - start);", "judge: wait_full(s.kv, start + t + 1);", "judge: wait_full(s.asked, g.M - 1 - t);",
                     "judge: wait_full(s.back, g.M - 1 - t);"), IMPLIED),
}


@pytest.mark.parametrize("name, tp", [("ttt_forward_kernel", 1), ("ttt_forward_kernel", 2), ("ttt_backward_kernel", 2)])
def test_taking_any_wait_or_signal_out_of_a_kernel_is_noticed(name, tp):
    source, missed, line = KERNEL.read_text(), [], 0
    while (changed := without(source, name, line)) is not None:
        try:
            fine = isinstance(explore(*cta_programs(changed, name, tp, 4, 2)), int)
        except AssertionError as error:                       # more arrivals than the barrier counts
            fine = "arrivals" not in str(error)
        if fine:
            at = next(i for i, (a, b) in enumerate(zip(changed.splitlines() + [""], source.splitlines())) if a != b)
            role = re.findall(r"// ---- (\w+)\n", "\n".join(source.splitlines()[:at]))[-1]
            missed.append(f"{role}: {source.splitlines()[at].split('//')[0].strip()}")
        line += 1
    print(name, tp, f"{line} taken out, {len(missed)} not noticed:", missed)
    assert line >= 12 and set(missed) <= set(HARMLESS)


def test_taking_a_wait_out_of_the_exchange_is_noticed():
    source = KERNEL.read_text()
    for wait in "wait_peer(ring.empty[0], n % 2 ^ 1);", "wait_peer(ring.full[0], n % 2);":
        assert source.count(wait) == 1
        assert isinstance(explore(*exchange_programs(source.replace(wait, ""), 2, 3)), str)
    assert isinstance(explore(*exchange_programs(source.replace("ring.full[0], n % 2)", "ring.full[0], n % 2 ^ 1)"), 2, 3)), str)


# ----------------------------------------------------------------------------------------------------
# The CUDA kernel on a Hopper GPU. Not yet run on one.
# ----------------------------------------------------------------------------------------------------


def has_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


hopper = [pytest.mark.hopper, pytest.mark.skipif(not has_hopper(), reason="needs a Hopper GPU (H100, H200)")]


def on_chip(inputs, every, tp, patch, dout, dlast):
    """Output, last weights and gradients by the kernel."""
    patch.setattr(ttt_minute, "cluster_size", lambda heads: tp)
    leaves = [x.requires_grad_() for x in kernel_dtypes(inputs, "cuda")]
    out, last = ttt_scan("mlp", leaves[6:], *leaves[:6], 64, backend="cuda", checkpoint=every)
    gradients = torch.autograd.grad([out, *last], leaves, [dout.to(out), *(d.to(w) for d, w in zip(dlast, last))])
    return [x.detach().cpu() for x in (out, *last, *gradients)]


HOPPER_CASES = [(1, 1, 192, 1, 1), (1, 1, 64, 16, 2), (2, 3, 449, 3, 2), (3, 5, 200, 3, 4), (1, 48, 1024, 16, 2), (1, 48, 1000, 16, 4), (1, 2, 600 * 64 - 17, 16, 2),
                (2, 48, 321, 16, 1), (1, 1, 1, 16, 4)]


def spiky_inputs(B, H, L):
    """Adversarial: large weights and steps, repeated keys, and values a thousand times too large."""
    inputs = chip_inputs(B, H, L, std=0.5, eta_base=12.0)
    inputs[1][:, :, ::2] = inputs[1][:, :, :1]
    inputs[2][:, :, ::7] = bf16(1000 * inputs[2][:, :, ::7])
    inputs[3][:, :, ::7] /= 1000
    return inputs


class TestOnHopper:
    pytestmark = hopper

    @pytest.mark.parametrize("B, H, L, every, tp", HOPPER_CASES)
    def test_the_kernel_is_within_the_gates(self, B, H, L, every, tp, monkeypatch):
        inputs = chip_inputs(B, H, L)
        truth = kernel_truth(inputs)
        results = on_chip(inputs, every, tp, monkeypatch, *truth[3:])
        assert_within_gates(chip_errors(inputs, results[0], results[1:5], results[5:], truth))

    @pytest.mark.parametrize("make", [chip_inputs, spiky_inputs])
    @pytest.mark.parametrize("tp", [1, 2, 4])
    def test_its_error_is_at_most_twice_that_of_the_same_rounding_in_torch(self, make, tp, monkeypatch):
        inputs = make(1, 4, 1000)
        truth = kernel_truth(inputs)
        results, emulated = on_chip(inputs, 16, tp, monkeypatch, *truth[3:]), Emulated(*inputs, 1e-8, 16, tp)
        theirs = chip_errors(inputs, *emulated.forward(), emulated.backward(*truth[3:]), truth)
        for name, error in chip_errors(inputs, results[0], results[1:5], results[5:], truth).items():
            assert error <= 2 * theirs[name] + 1e-4, name

    @pytest.mark.parametrize("tp", [1, 2, 4])
    def test_repeated_runs_are_bitwise_equal(self, tp, monkeypatch):
        inputs = chip_inputs(2, 24, 1000)
        dout, dlast = torch.ones_like(inputs[0]), [torch.ones_like(w) for w in inputs[6:]]
        first = on_chip(inputs, 16, tp, monkeypatch, dout, dlast)
        for _ in range(5):
            assert all(map(torch.equal, first, on_chip(inputs, 16, tp, monkeypatch, dout, dlast)))


# ----------------------------------------------------------------------------------------------------
# What the README promises
# ----------------------------------------------------------------------------------------------------


README = Path(ttt_minute.__file__).with_name("README.md").read_text()
SOURCES = "".join(Path(module.__file__).read_text() for module in (ttt_minute, dataset, sample))


def test_every_sentence_of_the_troubleshooting_table_is_one_the_program_says():
    table = README.split("## When something is wrong")[1].split("##")[0]
    sentences = [sentence for row in table.splitlines() for sentence in re.findall(r"`([^`]*)`", row.split("|")[1] if row.startswith("| `") else "")]
    assert len(sentences) >= 7
    for sentence in sentences:
        assert sentence in SOURCES, sentence


def mapped(text):
    """The README with every `name` file:line pointing at the line that defines the name."""
    def found(match):
        name, file = match[1], match[2]
        lines = Path(ttt_minute.__file__).with_name(file).read_text().splitlines()
        at = [number for number, line in enumerate(lines, 1) if re.match(rf"((class|def|struct) {name}\b|{name} = )", line)]
        return f"`{name}` {file}:{at[0] if at else 'not there'}"

    return re.sub(r"`(\w+)` ([\w.]+):(\d+|not there)", found, text)


def test_the_map_from_the_paper_points_at_the_lines():
    assert README.count(".py:") > 20 and "not there" not in mapped(README)
    assert mapped(README) == README, "lines have moved: python test_ttt.py --map"


def test_the_readmes_eighth_layer_works_like_the_seven(world, tmp_path, monkeypatch):
    """In chunks it is its recurrence; behind closed gates nothing; it trains and samples by name."""
    monkeypatch.setitem(ttt_minute.LAYERS, "retention", None)          # the name is gone again after the test
    names = dict(vars(ttt_minute))
    exec(re.search(r"```python\n(class Retention.*?)```", README, re.S)[1], names)
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, layer="retention")
    layer, x = ttt_minute.LAYERS["retention"](config).double(), torch.randn(2, 150, config.dim).double()
    q, k, v = rearrange(layer.qkv(x), "B L (three H F) -> three B H L F", three=3, H=config.heads)
    S, outs = 0, []
    for t in range(150):
        S = layer.log_rate[..., None].exp() * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None] @ S)[:, :, 0])
    y = rearrange(F.layer_norm(torch.stack(outs, 2), (config.head_width,)), "B H L F -> B L (H F)")
    assert relative(layer(x, Layout(1, 1, (13, 1, 1))), layer.out(y)) < 1e-6                             # its rates are float32
    model, latents = DiT(dataclasses.replace(config, gate_init=0.0)), random_latents(config, 2)
    local = DiT(dataclasses.replace(config, layer="local"))
    local.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not is_new(name)})
    assert torch.equal(model(*latents, torch.tensor([500])), local(*latents, torch.tensor([500])))
    assert run(ttt_minute, "--stage", "3s", "--layer", "retention", "--data", world, "--out_dir", tmp_path, *SMALL) == 0
    assert run(sample, "--stage", "3s", "--layer", "retention", "--steps", 1, "--out_dir", tmp_path, "--device", "cpu") == 0


# ----------------------------------------------------------------------------------------------------
# Exercises (stated in the README). Each test runs on the reference below and on exercises.py, where it is.
#
# A wrong answer is compared with what the likely mistakes give; the hint of the one that explains it is printed. Every run also
# checks that each mistake would be noticed.
# ----------------------------------------------------------------------------------------------------


@jit
def linear_loop(W1, b1, q, k, v, eta, gamma, beta, out, L, eps, F: tl.constexpr, b: tl.constexpr):
    row, column = tl.arange(0, F)[:, None], tl.arange(0, F)[None, :]
    W, bias = tl.load(W1 + row * F + column), tl.load(b1 + column)
    gamma, beta = tl.load(gamma + column), tl.load(beta + column)
    t = 0
    while t < L:
        token = t + tl.arange(0, b)
        at = token[:, None] * F + column
        k_t, eta_t = tl.load(k + at), tl.load(eta + token)[:, None]
        xh, r = tile_normalise(tl.dot(k_t, W) + bias, eps)
        G = eta_t * tile_J(gamma * (gamma * xh + beta - (tl.load(v + at) - k_t)), xh, r)
        W -= tl.dot(k_t.T, G)
        bias -= tl.sum(G, 0)[None, :]
        q_t = tl.load(q + at)
        xh, r = tile_normalise(tl.dot(q_t, W) + bias, eps)
        tl.store(out + at, q_t + gamma * xh + beta)
        t += b


class Reference:
    """The answers. Most are lines of ttt_minute.py."""

    linear_loop = linear_loop

    def l2_gradient(Z, target, gamma, beta, eps):
        xh, statistics = ttt_minute.normalise(Z, eps)
        return ttt_minute.J(gamma * (gamma * xh + beta - target), statistics)

    def linear_dual(W, q, k, v, eta, gamma, beta, eps):
        return ttt_minute.step_dual(W, q, k, v, eta, gamma, beta, eps)

    def mlp_primal(W, q, k, v, eta, gamma, beta, eps):
        W = ttt_minute.descend(W, k, ttt_minute.inner_gradient(W, k, beta - (v - k), eta, gamma, eps))
        return ttt_minute.read(W, q, gamma, beta, eps), W

    def reverse_order(segments, text, frame):
        return scan_order(Layout(segments, text, (12 * segments + 1, 1, frame), reversed=True), torch.device("cpu"))

    def segment_mask(segments, text, frame):
        words, video = torch.arange(segments * text), torch.arange((12 * segments + 1) * frame) // frame
        inside = [torch.cat([words // text == i, (video >= 12 * i) & (video <= 12 * i + 12)]) for i in range(segments)]
        return sum(own[:, None] & own for own in inside).bool()

    def delta_step(S, q, k, v, g, beta):
        S = g.exp() * S
        S = S + beta * k[:, None] * (v - k @ S)
        return q @ S / math.sqrt(len(q)), S

    def v_target(x_0, noise, alpha_bar):
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0

    def ddim_step(x, v, alpha_bar, next_bar):
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return next_bar.sqrt() * (a * x - s * v) + (1 - next_bar).sqrt() * (a * v + s * x)

    def both_directions(x, layer, order, alpha, beta):
        z = x + torch.tanh(alpha) * layer(x)
        return z + torch.tanh(beta) * layer(z[:, order])[:, order.argsort()]

    def mini_batch_curve(sizes, weights, k, v, eta, gamma, beta):
        curve = {}
        for b in sizes:
            begin = time.perf_counter()
            _, last = ttt_scan("mlp", weights, k, k, v, eta / b, gamma, beta, b)
            seconds = time.perf_counter() - begin
            curve[b] = recall_error(last, k, v, gamma, beta), seconds
        return curve

    def gate_curve(inits, steps, runs, config, weights):
        stage = Stage(1, steps, 2, 1e-3, 5e-4, everything=True)
        curves = {}
        for init in inits:
            own = dataclasses.replace(config, gate_init=init)
            model = ttt_minute.new_model(own, weights, runs.encoders)
            optimizer, = make_optimizers(model, stage, own)
            curves[init] = []
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"]
                loss = diffusion_loss(model, *next(ttt_minute.draw(runs, stage, own, "3s", step)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                curves[init].append(loss.item())
        return curves


exercise = pytest.mark.parametrize("source", ["reference", "yours"])


def written(source, *names):
    """The functions of an exercise, from the reference or from exercises.py; a skip that says what to write."""
    if source == "reference":
        return [getattr(Reference, name) for name in names]
    there = importlib.util.find_spec("exercises")
    module = importlib.import_module("exercises") if there else None
    for name in names:
        if not hasattr(module, name):
            answer = getattr(Reference, name)
            signature = str(inspect.signature(getattr(answer, "fn", answer))).replace("triton.language.core", "tl")
            pytest.skip(f"write {name}{signature} in exercises.py")
    return [getattr(module, name) for name in names]


def judge(answer, right, mistakes, tolerance=1e-9):
    """Passes where the answer is right; else fails with the hint of the mistake that gives the same."""
    def same(x, y):
        return x.shape == y.shape and relative(x, y) < tolerance

    answer, right = (torch.as_tensor(x).double() for x in (answer, right))
    mistakes = {hint: torch.as_tensor(wrong).double() for hint, wrong in mistakes.items()}
    for hint, wrong in mistakes.items():
        assert not same(wrong, right), f"this mistake would not be noticed: {hint}"
    if not same(answer, right):
        other = f"relative error {relative(answer, right):.1e}" if answer.shape == right.shape else f"shape {list(answer.shape)}, wanted {list(right.shape)}"
        pytest.fail(next((hint for hint, wrong in mistakes.items() if same(answer, wrong)), f"not yet: {other}"), pytrace=False)


def inner_step(kind):
    """Arguments of one mini-batch, float64: W, q, k, v, eta, gamma, beta, eps."""
    weights, (q, k, v, eta, gamma, beta) = scan_inputs(kind, B=1, L=10)
    W = tuple(w if w.ndim == 3 else w[:, None] for w in weights)
    return W, q[0], k[0], v[0], eta[0, :, :, None], gamma[:, None], beta[:, None], 1e-8


@exercise
def test_exercise_01_the_gradient_through_layernorm(source):
    """The derivative of 1/2 || gamma xh + beta - target ||^2 with respect to what LayerNorm normalises."""
    l2_gradient, = written(source, "l2_gradient")
    _, Z, target, _, _, gamma, beta, eps = inner_step("linear")
    leaf = Z.clone().requires_grad_()
    error = gamma * F.layer_norm(leaf, leaf.shape[-1:], eps=eps) + beta - target
    right, = torch.autograd.grad(0.5 * error.square().sum(), leaf)
    xh, statistics = ttt_minute.normalise(Z, eps)
    r, p = statistics[2], gamma * error.detach()

    def mean(x):
        return x.mean(-1, keepdim=True)

    judge(l2_gradient(Z, target, gamma, beta, eps), right, {
        "LayerNorm is not only a scale: a change that is the same in every channel changes nothing, so nothing of it may come back": r * (p - xh * mean(p * xh)),
        "LayerNorm undoes any change of scale, so the gradient has no part along xh": r * (p - mean(p)),
        "every channel moves the mean and the standard deviation of all: two terms are missing": r * p,
        "the chain rule passes through gamma on its way back, too": ttt_minute.J(error.detach(), statistics),
        "the loss has a 1/2 in front of the square": 2 * right})


@exercise
def test_exercise_02_the_dual_form_of_ttt_linear(source):
    """What the new weights would answer, without forming them first (section 3.4)."""
    linear_dual, = written(source, "linear_dual")
    W, q, k, v, eta, gamma, beta, eps = step = inner_step("linear")
    right, new = step_autograd(*step)
    gradient = ttt_minute.inner_gradient(W, k, beta - (v - k), eta, gamma, eps)

    def read(Z):
        return q + gamma * F.layer_norm(Z, Z.shape[-1:], eps=eps) + beta

    before, scores = q @ W[0] + W[1], q @ k.mT
    answer, weights = linear_dual(*step)
    judge(answer, right, {
        "the output reads the weights AFTER the step; this is what the old ones say": read(before),
        "the bias b1 takes a step too: where does the 1 in (q k^T + 1) come from?": read(before - scores @ gradient.G),
        "eta belongs to the token that is learned (a column of q k^T), not to the one that asks": read(before - eta * ((scores + 1) @ gradient.gZ)),
        "nothing is causal inside a mini-batch: every token reads the W that has seen all of them": read(before - (scores + 1).tril() @ gradient.G)})
    for mine, theirs in zip(weights, new):
        judge(mine, theirs, {})


@exercise
def test_exercise_03_the_primal_form_of_ttt_mlp(source):
    """Step, then read: the same numbers as the dual form, with fewer products."""
    mlp_primal, = written(source, "mlp_primal")
    W, q, k, v, eta, gamma, beta, eps = step = inner_step("mlp")
    right, new = step_autograd(*step)
    g = ttt_minute.inner_gradient(W, k, beta - (v - k), eta, gamma, eps)

    def read(W):
        return ttt_minute.read(W, q, gamma, beta, eps)

    def with_G1(G1):
        return ttt_minute.descend(W, k, g._replace(G1=G1))

    answer, weights = mlp_primal(*step)
    judge(answer, right, {
        "the output reads the weights AFTER the step (eq 14)": read(W),
        "both layers step at once: the gradient passes through the W2 that made the error, not through the new one": read(with_G1((g.G @ new[2].mT) * g.slopes[0])),
        "the way back leads through GELU: where is its slope?": read(with_G1(g.gX2)),
        "eta weighs each token's loss, once: it is in the gradients of both layers, and in neither twice": read(with_G1(eta * g.G1))})
    for mine, theirs in zip(weights, new):
        judge(mine, theirs, {})
    judge(answer, ttt_minute.step_dual(*step)[0], {})


@exercise
def test_exercise_04_a_story_told_backwards(source):
    """Two segments of two words, one token a frame: words are stored at 0..3, frames at 4..28."""
    reverse_order, = written(source, "reverse_order")
    first, second, right = list(range(4, 17)), list(range(17, 29)), [2, 3, *range(28, 16, -1), 0, 1, *range(16, 3, -1)]
    judge(reverse_order(2, 2, 1), torch.tensor(right), {
        "this is everything backwards: texts keep their order, and come before their own frames": torch.arange(29).flip(0),
        "a text stays readable: only the frames run backwards": torch.tensor([3, 2, *second[::-1], 1, 0, *first[::-1]]),
        "a text comes before its own segment's frames in this direction, too": torch.tensor([*second[::-1], 2, 3, *first[::-1], 0, 1]),
        "the last segment comes first": torch.tensor([0, 1, *first[::-1], 2, 3, *second[::-1]]),
        "a segment keeps its own frames: the first has 13, the others 12, in both directions": torch.tensor([2, 3, *range(28, 15, -1), 0, 1, *range(15, 3, -1)])})
    judge(reverse_order(5, 3, 4), scan_order(Layout(5, 3, (61, 2, 2), reversed=True), torch.device("cpu")), {})


@exercise
def test_exercise_05_who_sees_whom_inside_segments(source):
    """What local attention reads, found by its derivative."""
    segment_mask, = written(source, "segment_mask")
    config, layout = dataclasses.replace(TINY, heads=1, layer="local"), Layout(3, 2, (37, 1, 1))
    attention = LocalAttention(config)
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(x, layout).sum((0, 2)), torch.randn(1, layout.tokens, config.dim))
    right = jacobian[:, 0].abs().sum(-1) > 0                                          # [L, L]
    video = torch.arange(37)
    owner = torch.cat([torch.arange(6) // 2, (video - 1).clamp(min=0) // 12])
    words = torch.cat([torch.ones(6), torch.zeros(37)]).bool()
    judge(segment_mask(3, 2, 1), right, {
        "neighbours share a latent frame: frame 12 belongs to segments 0 and 1": owner[:, None] == owner,
        "attention inside a segment is not causal": right.tril(),
        "a text is read in its own segment only": right | words,
        "attention is local: segments that share nothing do not see each other": torch.ones_like(right)})


@exercise
def test_exercise_06_a_gated_delta_step(source):
    """Gated DeltaNet token by token (section 7 of ttt_minute.py): what a step does that TTT-Linear does with a gradient."""
    delta_step, = written(source, "delta_step")
    torch.manual_seed(0)
    K, V, L = 4, 6, 5
    q, k, v = torch.randn(L, K).double(), F.normalize(torch.randn(L, K).double(), dim=-1), torch.randn(L, V).double()
    g, beta = -torch.rand(L).double(), torch.rand(L).double()
    right, state = ttt_minute.gated_delta_rule(*(x[None, None] for x in (q, k, v, g, beta)))

    def run_through(step):
        S, outs = torch.zeros(K, V).double(), []
        for t in range(L):
            out, S = step(S, q[t], k[t], v[t], g[t], beta[t])
            outs.append(out)
        return torch.stack(outs)

    def read(S, q):
        return q @ S / K ** 0.5, S

    def write(S, k, v, beta):
        return S + beta * k[:, None] * (v - k @ S)

    judge(run_through(delta_step), right[0, 0], {
        "the state fades before its error is measured, not after": run_through(lambda S, q, k, v, g, beta: read(g.exp() * write(S, k, v, beta), q)),
        "a token reads the state that it has written to": run_through(
            lambda S, q, k, v, g, beta: (read(g.exp() * S, q)[0], write(g.exp() * S, k, v, beta))),
        "the delta rule stores what is missing: v minus what the state answers already": run_through(
            lambda S, q, k, v, g, beta: read(g.exp() * S + beta * k[:, None] * v, q)),
        "beta is how much of the error is written": run_through(lambda S, q, k, v, g, beta: read(write(g.exp() * S, k, v, 1), q)),
        "the answer is divided by sqrt(K), like the scores of attention": right[0, 0] * K ** 0.5})


@exercise
def test_exercise_07_v_prediction_and_a_ddim_step(source):
    """With the true v a step of any size leads along the same x_0 and noise (appendix A)."""
    v_target, ddim_step = written(source, "v_target", "ddim_step")
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 50).double()
    bar, after = alphas_cumprod()[[600, 300]]
    a, s, x = bar.sqrt(), (1 - bar).sqrt(), bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    v = a * noise - s * x_0
    judge(v_target(x_0, noise, bar), v, {
        "alpha-bar is a variance: signal and noise are scaled by the roots of it and of the rest": bar * noise - (1 - bar) * x_0,
        "v is where x_t moves as noise is turned in: mostly noise while x_t is clean, minus the signal in the end": -v,
        "v is not the noise, it is also made of the signal": noise,
        "v mixes the two crosswise: a noise - s x_0, where x_t is a x_0 + s noise": s * noise - a * x_0})

    def to_next(x_0, noise):
        return after.sqrt() * x_0 + (1 - after).sqrt() * noise

    judge(ddim_step(x, v, bar, after), to_next(x_0, noise), {
        "v is not the noise: it has to be turned into x_0 and noise first": to_next((x - s * v) / a, v),
        "x_0 is a x - s v: the sign turns around": to_next(a * x + s * v, noise),
        "a step ends at the NEXT noise level": x,
        "the noise goes along: DDIM keeps its direction and draws none": after.sqrt() * x_0})


@exercise
def test_exercise_08_gate_and_both_directions(source):
    """Eq 6 to 12 around any layer; with closed gates nothing changes, and only the gates can learn."""
    both_directions, = written(source, "both_directions")
    torch.manual_seed(0)
    x, order = torch.randn(2, 7, 3).double(), torch.tensor([1, 0, 6, 5, 4, 2, 3])
    alpha, beta, weight = torch.tensor(0.5).double(), torch.tensor(-1.5).double(), torch.randn(3, 3).double()

    def layer(x):                                             # anything that is not the same in both directions
        return (x @ weight).cumsum(1)

    right = (z := x + alpha.tanh() * layer(x)) + beta.tanh() * layer(z[:, order])[:, order.argsort()]
    judge(both_directions(x, layer, order, alpha, beta), right, {
        "what comes out of the reverse scan has to be put back in place": z + beta.tanh() * layer(z[:, order]),
        "the reverse direction reads Z, what the forward direction made": z + beta.tanh() * layer(x[:, order])[:, order.argsort()],
        "a gate is tanh(alpha): near 0 for small alpha, never beyond 1": (y := x + alpha * layer(x)) + beta * layer(y[:, order])[:, order.argsort()],
        "a gate adds to what was there, it does not replace it": z * 0 + right - x})
    closed, weight = torch.zeros((), dtype=torch.float64, requires_grad=True), weight.requires_grad_()
    out = both_directions(x, layer, order, closed, closed)
    to_weight, to_gate = torch.autograd.grad(out.square().sum(), (weight, closed))
    assert torch.equal(out, x), "with alpha = beta = 0 the old network is left exactly as it was"
    assert not to_weight.any() and to_gate, "with closed gates no gradient reaches the layer, only the gates: why does training start at 0.1?"


@exercise
def test_exercise_09_how_large_a_mini_batch(source):
    """Small mini-batches take more steps and remember better; large ones are faster."""
    mini_batch_curve, = written(source, "mini_batch_curve")
    inputs, sizes = mini_batch_experiment(512), (8, 16, 32, 64)
    curve, expected = mini_batch_curve(sizes, *inputs), Reference.mini_batch_curve(sizes, *inputs)
    weights, k, v, eta, gamma, beta = inputs
    for b in sizes:
        judge(curve[b][0], expected[b][0], {
            "the error of the LAST weights is asked for; these have learned nothing": recall_error(weights, k, v, gamma, beta),
            "eta is for a whole mini-batch: each of its b tokens gets eta / b": recall_error(ttt_scan("mlp", weights, k, k, v, eta, gamma, beta, b)[1], k, v, gamma, beta),
        }, tolerance=1e-5)
    losses = [curve[b][0] for b in sizes]
    assert losses == sorted(losses) and min(seconds for _, seconds in curve.values()) > 0


@exercise
def test_exercise_10_how_far_the_gate_is_open_at_first(world, source):
    """A closed gate starts where the pre-trained network is; an open one starts worse, and learns."""
    gate_curve, = written(source, "gate_curve")
    runs, weights = dataset.Runs(world, 1), ttt_minute.ASSETS / "pocket-local-pretrain.safetensors"
    curves = gate_curve((0.0, 1.0), 4, runs, Config(), weights)
    local = ttt_minute.new_model(Config(layer="local"), weights, runs.encoders)
    stage = Stage(1, 4, 2, 1e-3, 5e-4, everything=True)
    first = diffusion_loss(local, *next(ttt_minute.draw(runs, stage, Config(), "3s", 0))).item()
    assert [len(curve) for curve in curves.values()] == [4, 4]
    assert curves[0.0][0] == pytest.approx(first, rel=1e-5), "with closed gates the first loss is that of the pre-trained network"
    assert curves[1.0][0] > 1.01 * first, "an open gate disturbs the network at first; does every value start from a fresh network, on the same batch?"
    expected = Reference.gate_curve((1.0,), 2, runs, Config(), weights)[1.0]
    assert curves[1.0][:2] == pytest.approx(expected, rel=1e-3), "the second step follows from the first: does the optimizer step?"


@exercise
def test_exercise_11_the_loop_of_a_kernel(source, interpreter):
    """TTT-Linear in Triton, one head, in the interpreter."""
    written(source, "linear_loop")
    (W1, b1), inputs = loop_inputs()
    right, _ = ttt_scan("linear", (W1, b1), *inputs, 16)
    q, k, v, eta, gamma, beta = (x[0] for x in inputs[:4] + [x[None] for x in inputs[4:]])

    def scan(bias=1, eta=eta, late=False, forgetful=False):
        W, outs = (W1, b1[:, None]), []
        for t in range(0, 48, 16):
            q_t, k_t, v_t, eta_t = (x[:, t:t + 16] for x in (q, k, v, eta))
            W = (W1, b1[:, None]) if forgetful else W
            new = ttt_minute.descend(W, k_t, ttt_minute.inner_gradient(W, k_t, beta - (v_t - k_t), eta_t[..., None], gamma, 1e-8))
            new = new[0], W[1] + bias * (new[1] - W[1])
            outs.append(ttt_minute.read(W if late else new, q_t, gamma, beta, 1e-8))
            W = new
        return torch.cat(outs, dim=1)[0]

    judge(interpreter(run_linear_loop, source), right[0, 0], {
        "the output reads W after the step of its own mini-batch": scan(late=True),
        "the state lives from the first to the last turn of the loop: load it before, not inside": scan(forgetful=True),
        "the bias takes its step, too: the sum of G over the tokens": scan(bias=0),
        "eta weighs the gradient of each token": scan(eta=torch.ones_like(eta))}, tolerance=1e-5)


def loop_inputs():
    """W1, b1 and the usual six for one head of 16 channels, 48 tokens in mini-batches of 16."""
    return scan_inputs("linear", B=1, H=1, L=48, width=16, dtype=torch.float32)


def run_linear_loop(source):
    loop, = written(source, "linear_loop")
    weights, inputs = loop_inputs()
    out = torch.empty_like(inputs[0])
    loop[(1,)](*weights, *inputs, out, 48, 1e-8, F=16, b=16)
    return out[0, 0]


def mini_batch_experiment(tokens):
    """weights, k, v, eta, gamma, beta of an untrained TTT-MLP with two heads, and what it has to learn: v - k is a linear map of k."""
    weights, (_, k, _, eta, gamma, beta) = scan_inputs("mlp", B=1, H=2, L=tokens, width=32, dtype=torch.float32, std=0.2)
    truth = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
    return weights, k, k + F.layer_norm(k @ truth, [32]), torch.full_like(eta, 0.1), gamma, beta


def recall_error(weights, k, v, gamma, beta):
    """How far f with these weights is from answering v when shown k: a scan without steps only reads."""
    answer, _ = ttt_scan("mlp", weights, k, k, v, torch.zeros(k.shape[:3]), gamma, beta)
    return F.mse_loss(answer, v).item()
def experiment(number):
    """exercise_NN.png: the curves of exercise 9 or 10, by exercises.py where it has the function, else by the reference."""
    name = {9: "mini_batch_curve", 10: "gate_curve"}[number]
    own = importlib.util.find_spec("exercises") and hasattr(importlib.import_module("exercises"), name)
    curve, = written("yours" if own else "reference", name)
    labels = dict(title=f"exercise {number}, {'yours' if own else 'the reference'}")
    if number == 9:
        sizes = 2, 4, 8, 16, 32, 64, 128, 256
        found = curve(sizes, *mini_batch_experiment(512))
        with sample.plot(Path("exercise_09.png"), xlabel="b, tokens of a mini-batch", xscale="log", **labels) as axes:
            axes.plot(sizes, [found[b][0] for b in sizes], marker="o", label="what f has not learned (error of v)")
            axes.plot(sizes, [found[b][1] / found[sizes[-1]][1] for b in sizes], marker="s", label=f"time, in units of b = {sizes[-1]}")
            axes.set_yscale("log")
    else:
        with tempfile.TemporaryDirectory() as folder:
            dataset.render_world(Path(folder) / "videos", 4)
            dataset.ingest(Path(folder) / "videos", Path(folder) / "latents", dataset.PocketCodec(), dataset.PocketText())
            runs = dataset.Runs(Path(folder) / "latents", 1)
            found = curve((0.0, 0.1, 0.3, 1.0), 100, runs, Config(), ttt_minute.ASSETS / "pocket-local-pretrain.safetensors")
        with sample.plot(Path("exercise_10.png"), xlabel="step", ylabel="loss, mean of 10 steps", **labels) as axes:
            for init, losses in found.items():
                axes.plot(np.arange(9, 100), np.convolve(losses, np.ones(10) / 10, mode="valid"), label=f"gate_init {init}")
    print(f"look at exercise_{number:02}.png")


def figure(path=ttt_minute.ASSETS / "figure.png"):
    """The idea in a picture: attention inside segments, a hidden state that trains across them, a gate between the two."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    plot, axes = plt.subplots(figsize=(10, 4.6))

    def box(x, y, width, height, words="", colour="white", **settings):
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor="0.25"))
        axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", **settings)

    def arrow(start, end, **settings):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="0.25", **settings))

    rooms = dict(zip("ABC", ("#f4c7a1", "#b7d8c0", "#f4c7a1")))
    for segment, (name, room) in enumerate(zip(("the kitchen", "the garden", "the kitchen again"), rooms.values())):
        left = 0.2 + 4 * segment
        axes.text(left + 1.7, 5.35, f"segment {segment}: {name}", ha="center")
        box(left, 4.4, 0.7, 0.7, "text", "#d9d9ef", fontsize=8)
        for frame in range(6):
            box(left + 0.8 + 0.45 * frame, 4.4, 0.4, 0.7, "", room)
        box(left, 3.3, 3.45, 0.6, "attention inside the segment", "#efefef", fontsize=8)
        arrow((left + 1.7, 4.35), (left + 1.7, 3.95))
        for batch in range(2):
            x = left + 0.25 + 1.75 * batch
            box(x, 1.3, 1.2, 0.8, f"$W_{{{2 * segment + batch + 1}}}$", "#cfe3f6", fontsize=13)
            arrow((x + 0.6, 3.25), (x + 0.6, 2.15))
            arrow((x - (0.55 if batch else 1.05 if segment else 0.5), 1.7), (x, 1.7))
            arrow((x + 0.6, 1.25), (x + 0.6, 0.65))
        axes.text(left + 0.95, 2.62, "k, v: learn", fontsize=8)
        axes.text(left + 0.95, 0.92, "q: ask", fontsize=8)
        box(left, 0.0, 3.45, 0.6, r"$X' + \tanh(\alpha)\,Z$", "#fbeeb5")
    axes.text(12.3, 1.7, "a gradient step\non || f(k) - v ||$^2$\na mini-batch", va="center", fontsize=9)
    axes.text(12.3, 0.3, "the gate", va="center", fontsize=9)
    axes.text(12.3, 3.6, "CogVideoX,\n3 seconds", va="center", fontsize=9)
    axes.set(xlim=(-0.4, 14.6), ylim=(-0.2, 5.8))
    axes.axis("off")
    plot.savefig(path, dpi=110, bbox_inches="tight")
    print(f"look at {path}")


# ----------------------------------------------------------------------------------------------------
# python test_ttt.py --bench
# ----------------------------------------------------------------------------------------------------


def median_seconds(call, repeats=5):
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def bench_on_a_gpu():
    """Forward and backward of the scan at the paper's lengths: the kernel against the torch path, which a compiler may fuse."""
    if not torch.cuda.is_available():
        return print("kernels: no NVIDIA GPU here, nothing to time\n")
    print(f"scan on {torch.cuda.get_device_name()}: 48 heads, F 64, b 64, bf16, forward + backward; medians of 5")
    print(f"{'':<32} {'9 s':>12} {'63 s':>12}   (ms)")
    pieces = {name: torch.compile(getattr(ttt_minute, name)) for name in ("inner_gradient", "read", "backward_of_read", "backward_of_step")}
    for kind in "mlp", "linear":
        for backend in "torch", "torch, compiled", "triton":
            row = ""
            for segments in 3, 21:
                layout = Layout(segments, 226, (12 * segments + 1, 30, 45))
                weights, inputs = kernel_inputs(kind, torch.bfloat16, 64, 64, layout.tokens, 1, 48, "cuda")

                def scan():
                    scan_and_back(kind, weights, inputs, backend.removesuffix(", compiled"), 64, 16)
                    torch.cuda.synchronize()

                with pytest.MonkeyPatch.context() as patch:
                    for name, piece in pieces.items() if "compiled" in backend else ():
                        patch.setattr(ttt_minute, name, piece)
                    try:
                        row += f" {1000 * median_seconds(scan):>12.1f}"
                    except torch.OutOfMemoryError:
                        row += f" {'no memory':>12}"
            print(f"  {f'TTT-{kind}, {backend}':<30}{row}")
    print()


def bench():
    bench_on_a_gpu()
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, fp32; medians of 5\n")
    for H, width, b, B, L in (4, 64, 64, 1, 6400), (4, 32, 64, 8, 352):
        title = f"scan: B {B}, H {H}, F {width}, b {b}, {L} tokens, forward + backward"
        print(f"{title:<66} {'seconds':>8} {'peak MB':>8}")
        for kind in "mlp", "linear":
            weights, inputs = scan_inputs(kind, B=B, H=H, L=L, width=width, dtype=torch.float32, std=0.02, eta=0.01)
            for backend in "autograd", "dual", "torch":
                scan = kind, weights, inputs, backend, b
                seconds, peak = median_seconds(lambda: scan_and_back(*scan)), peak_bytes(*scan) / 1e6
                print(f"  {f'TTT-{kind}, backend {backend}':<64} {seconds:>8.3f} {peak:>8.1f}")
        print()
    print("training step of the pocket preset, relative to local: FLOPs, seconds, peak memory (the paper's Figure 6)")
    stages = {"3s": 8, "9s": 4, "18s": 2, "63s": 1}           # and videos in a batch
    print(f"{'layer':<16}" + "".join(f"{f'{stage} x {batch}':^28}" for stage, batch in stages.items()))
    local = {}
    for layer in sorted(ttt_minute.LAYERS, key="local".__ne__):
        row = ""
        for stage, batch in stages.items():
            segments = STAGES[stage].segments
            model = DiT(Config(layer=layer))
            latents, text = random_latents(model.config, segments, batch=batch)
            t, noise = torch.randint(1000, (batch,)), torch.randn_like(latents)

            def step():
                diffusion_loss(model, latents, text, t, noise).backward()

            seconds = median_seconds(step, 3)
            with PeakMemory() as memory:
                step()
            flops = sum(ttt_minute.step_flops(model.config, Stage(segments, 1, 1, 0, 0, everything=True)).values())
            local.setdefault(stage, (flops, seconds, memory.peak))
            ratios = [value / base for value, base in zip((flops, seconds, memory.peak), local[stage])]
            row += "{:>6.2f} {:>6.2f} {:>5.2f}         ".format(*ratios) if layer != "local" else f"{flops * batch / 1e9:>6.0f} G {seconds:>6.2f} s {memory.peak / 1e6:>5.0f} MB   "
        print(f"{layer:<16}{row}")


if __name__ == "__main__":
    parser = dataset.Parser("test_ttt.py", description="The tests run under pytest: python -m pytest -q test_ttt.py")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--bench", action="store_true", help="time the scan and a training step")
    action.add_argument("--experiment", type=int, choices=(9, 10), help="plot an experiment of the exercises")
    action.add_argument("--map", action="store_true", help="bring the README's line numbers up to date")
    action.add_argument("--figure", action="store_true", help="draw assets/figure.png")
    args = parser.parse_args()
    if args.map:
        Path(ttt_minute.__file__).with_name("README.md").write_text(mapped(README))
    elif args.experiment:
        experiment(args.experiment)
    else:
        figure() if args.figure else bench()
