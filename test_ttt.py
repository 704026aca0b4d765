"""The specification as tests, in the order of the paper; then the exercises, and what the README measures.

    python -m pytest -q test_ttt.py           # on a laptop, without a GPU
    python -m pytest -q test_ttt.py -m slow   # more of the executed kernel; the page for votes, in a browser
    python -m pytest -rs -k exercise_03       # one exercise, the reference's answer and yours
    python test_ttt.py --experiment 9         # the plot of an experiment among the exercises
    python test_ttt.py --bench                # time and memory of the scan and of a training step
"""

import ast
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
import urllib.request
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as nnf
from einops import rearrange
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

import dataset
import sample
import ttt_minute
from appendix import hopper, kernels, memories
from dataset import FRAMES, SECONDS, SEGMENT, UserError
from ttt_minute import (INNER, LAYERS, PRESETS, STAGES, TTT, Config, DiT, FullAttention, Layout,
                        LocalAttention, Stage, alphas_cumprod, diffusion_loss, is_new, load_checkpoint, lr_at,
                        make_optimizer, read, rope_table, scan_order, scan_rope, step_autograd, trains,
                        ttt_scan)

TINY = Config(channels=4, height=4, width=6, text_len=3, text_dim=8, depth=2, heads=2, head_width=16,
              time_dim=16, mini_batch=8, eta_mlp=3.0, gate_init=0.1)
HERE, CPU, SLOW = Path(__file__).parent, torch.device("cpu"), pytest.mark.slow


def relative(x, y):
    return ((x - y).norm() / y.norm().clamp_min(1e-30)).item()


def normals(dtype=torch.float64):
    """normal(*shape): the same Gaussian numbers every time, rounded to dtype."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_latents(config, segments, batch=1):
    normal = normals(torch.float32)
    latents = normal(batch, FRAMES * segments + 1, config.channels, config.height, config.width)
    return latents, normal(batch, segments, config.text_len, config.text_dim)


def small_layout(segments=1):
    """Three tokens of text a segment, frames of 2 x 3 tokens: what TINY makes of its latents."""
    return Layout(segments, 3, (FRAMES * segments + 1, 2, 3))


# The inner loop (sections 2.2, 2.3, 3.4) ----------------------------------------------------------------


def scan_inputs(kind, B=2, H=3, L=37, width=8, dtype=torch.float64, std=0.3, eta=0.3):
    """Weights, and [q, k, v, eta, ln_gamma, ln_beta]."""
    normal, E = normals(dtype), width if kind == "linear" else 4 * width
    weights = [std * normal(H, width, E), 0.1 * normal(H, E)]
    if kind == "mlp":
        weights += [std * normal(H, E, width), 0.1 * normal(H, width)]
    q, k = (nnf.normalize(normal(B, H, L, width), dim=-1) for _ in "qk")
    v, step = normal(B, H, L, width), eta * normal(B, H, L).sigmoid()
    return weights, [q, k, v, step, 1 + 0.1 * normal(H, width), 0.1 * normal(H, width)]


def scan_gradients(kind, weights, inputs, backend, mini_batch=8, checkpoint=2):
    """Output, last weights and every gradient, by name, of a loss that reads both results."""
    leaves = [x.detach().clone().requires_grad_() for x in (*weights, *inputs)]
    own, tokens = leaves[:len(weights)], leaves[len(weights):]
    out, last = ttt_scan(kind, own, *tokens, mini_batch, backend=backend, checkpoint=checkpoint)
    loss = sum((y * normals(torch.bfloat16)(*y.shape).to(y)).sum() for y in (out, *last))
    return dict(zip(result_names(weights), (out, *last, *torch.autograd.grad(loss, leaves))))


def result_names(weights):
    names = ["W1", "b1", "W2", "b2"][:len(weights)]
    gradients = [*names, "q", "k", "v", "eta", "ln_gamma", "ln_beta"]
    return ["out", *(f"last {name}" for name in names), *(f"d {name}" for name in gradients)]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("eta", [0.3, 0.0])
def test_the_definition_is_a_loss_its_gradient_and_a_step(kind, eta):
    """Eq 13 and 14 for one video and head, written here once more. The last 5 of 37 tokens are a step of 5,
    so padding changes nothing; without a step size W stays and the output is q + LN(f(q; W))."""
    weights, inputs = scan_inputs(kind, B=1, H=1, eta=eta)
    (q, k, v, step), (gamma, beta) = (x[0, 0] for x in inputs[:4]), (x[0] for x in inputs[4:])

    def f(W, x):
        y = x @ W[0] + W[1]
        return nnf.gelu(y, approximate="tanh") @ W[2] + W[3] if kind == "mlp" else y

    def layer_norm(y):
        y = y - y.mean(-1, keepdim=True)
        return gamma * y / (y.square().mean(-1, keepdim=True) + 1e-8).sqrt() + beta

    def loss(W, some):
        return (step[some] / 2 * (layer_norm(f(W, k[some])) - (v - k)[some]).square().sum(-1)).sum()

    W, z = tuple(w[0] for w in weights), []
    for start in range(0, 37, 8):
        some = slice(start, start + 8)
        W = tuple(w - g for w, g in zip(W, torch.func.grad(loss)(W, some)))
        z.append(q[some] + layer_norm(f(W, q[some])))
    for backend in "autograd", "auto":
        out, last = ttt_scan(kind, weights, *inputs, 8, backend=backend)
        assert relative(out[0, 0], torch.cat(z)) < 1e-12
        assert all(relative(a[0, 0], b) < 1e-12 for a, b in zip(last, W))
        assert eta or all(torch.equal(a[0], b) for a, b in zip(last, weights))


@pytest.mark.parametrize("L, mini_batch, checkpoint",
                         [(37, 8, 2), (16, 16, 1), (5, 8, 3), (1, 4, 4), (64, 16, 16)])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("backend", ["dual", "primal", "torch"])
def test_every_form_equals_the_definition_with_all_gradients(kind, backend, L, mini_batch, checkpoint):
    """The naive dual form, the primal form, and the primal form with its closed-form backward, in float64."""
    inputs = scan_inputs(kind, L=L)
    definition = scan_gradients(kind, *inputs, "autograd", mini_batch, checkpoint)
    for name, value in scan_gradients(kind, *inputs, backend, mini_batch, checkpoint).items():
        assert relative(value, definition[name]) < 1e-11, name


def test_the_state_stays_in_fp32_when_the_inputs_are_bf16():
    for backend in "autograd", "primal", "torch":
        weights, inputs = scan_inputs("mlp", dtype=torch.bfloat16)
        out, last = ttt_scan("mlp", weights, *inputs, 8, backend=backend)
        assert out.dtype == torch.bfloat16 and {w.dtype for w in last} == {torch.float32}


def test_the_inner_loop_learns_what_it_is_shown():
    """Eight keys with fixed values, shown again and again: f recalls them better and better."""
    config, normal, cosine = Config(), normals(torch.float32), []
    F, b, f = config.head_width, config.mini_batch, ttt_minute.INNER["mlp"]
    k, target = nnf.normalize(normal(8, F), dim=-1), nnf.layer_norm(normal(8, F), (F,))
    weights = [mean + std * normal(1, *f.shapes(F)[name]) for name, (mean, std) in f.first.items()]
    for tokens in 64, 256, 1024:
        keys = k.repeat(tokens // 8, 1)[None, None]
        values = keys + target.repeat(tokens // 8, 1)
        eta = torch.full((1, 1, tokens), config.eta_mlp / (F * b))
        out, _ = ttt_scan("mlp", weights, keys, keys, values, eta, torch.ones(1, F), torch.zeros(1, F), b)
        cosine.append(nnf.cosine_similarity((out - keys)[0, 0, -8:], target).mean().item())
    assert cosine[0] < cosine[1] < cosine[2] and cosine[2] > 0.8


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and still alive; .peak is the most there were at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if torch.is_tensor(x)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                weakref.finalize(storage, self.forget, key, size)
                self.live += size
                self.peak = max(self.peak, self.live)
        return result

    def forget(self, key, size):
        self.alive.remove(key)
        self.live -= size


def scan_and_back(kind, weights, inputs, backend, mini_batch, checkpoint=4):
    """Forward and backward, as training does it."""
    leaves = [x.detach().requires_grad_() for x in (*weights, *inputs)]
    own, tokens = leaves[:len(weights)], leaves[len(weights):]
    ttt_scan(kind, own, *tokens, mini_batch, backend=backend, checkpoint=checkpoint)[0].sum().backward()


def peak_bytes(call, *arguments):
    with PeakMemory() as memory:
        call(*arguments)
    return memory.peak


def test_the_closed_form_needs_less_than_half_of_the_memory_of_autograd_at_its_peak():
    inputs = scan_inputs("mlp", B=1, H=4, L=1024, width=32, dtype=torch.float32, eta=0.01)
    closed, autograd = (peak_bytes(scan_and_back, "mlp", *inputs, how, 32) for how in ("torch", "autograd"))
    assert closed < autograd / 2


# One sequence out of many segments, and attention inside them (section 3.2) -----------------------------


def test_a_story_is_scanned_text_by_text_and_segment_by_segment_and_put_back():
    """One token a frame, two of text: stored as 4 texts, then all frames."""
    layout = Layout(2, 2, (2 * FRAMES + 1, 1, 1))
    frame = torch.arange(2 * FRAMES + 1) + 4
    one, two = [torch.tensor([0, 1]), frame[:FRAMES + 1]], [torch.tensor([2, 3]), frame[FRAMES + 1:]]
    assert torch.equal(scan_order(layout, CPU), torch.cat(one + two))
    backward = [two[0], two[1].flip(0), one[0], one[1].flip(0)]
    assert torch.equal(scan_order(layout.reverse(), CPU), torch.cat(backward))
    for order in small_layout(1), small_layout(3), small_layout(3).reverse():
        x = torch.randn(2, order.tokens, 7)
        assert torch.equal(order.from_scan(order.to_scan(x)), x)


def test_rope_counts_along_the_order_given_and_leaves_text_alone():
    layout = small_layout(2)
    for order in layout, layout.reverse():
        table, video = scan_rope(order, 16, CPU), scan_order(order, CPU) >= layout.text_tokens
        assert torch.equal(table[video], rope_table(layout.grid, 16, CPU)) and (table[~video] == 1).all()


@pytest.mark.parametrize("segments", [1, 3])
def test_local_attention_is_one_attention_a_segment_with_shared_frames_averaged(segments):
    """By brute force: cut the segments out, attend in each alone, write back, average the frame two share."""
    torch.manual_seed(0)
    attention, alone, layout = LocalAttention(TINY), FullAttention(TINY), small_layout(segments)
    alone.load_state_dict(attention.state_dict())
    x = torch.randn(2, layout.tokens, TINY.dim)
    total, count, frame = torch.zeros_like(x), torch.zeros(layout.tokens, 1), 2 * 3
    for i in range(segments):
        video = layout.text_tokens + torch.arange(FRAMES * i * frame, (FRAMES * (i + 1) + 1) * frame)
        tokens = torch.cat([torch.arange(3 * i, 3 * i + 3), video])
        total[:, tokens] += alone(x[:, tokens], small_layout(1))
        count[tokens] += 1
    assert torch.allclose(attention(x, layout), total / count, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_who_can_see_another_segment_in_one_block(layer):
    """Changing segment 2 moves segment 0 under full attention, TTT and the recurrences, under a window only
    what is within its reach; under local attention nothing but the shared frame."""
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(TINY, layer=layer, depth=1))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-3)                          # a slow decay, so that what is far can be seen
    latents, text = random_latents(TINY, 3)
    moved, t = latents.clone(), torch.tensor([500])
    moved[:, 2 * FRAMES + 1:] += 1                            # frames that segment 2 owns
    with torch.no_grad():
        change = (model(moved, text, t) - model(latents, text, t)).abs().amax(dim=(0, 2, 3, 4))
    assert change[2 * FRAMES] > 0
    assert (change[:FRAMES] > 1e-7).any() == (layer not in ("local", "swa"))
    assert layer != "local" or (change[:2 * FRAMES] == 0).all()


# The other memories (section 4.1) -----------------------------------------------------------------------


def results_and_gradients(results, inputs):
    """The results of a function, and the gradients of a loss that reads all of them."""
    loss = sum((y * normals()(*y.shape)).sum() for y in results)
    return [*results, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("L, window", [(37, 8), (16, 16), (5, 8), (24, 3), (64, 100)])
def test_a_window_is_causal_attention_that_forgets(L, window):
    """In blocks, against one attention with the whole mask, gradients included; as wide as the paper's."""
    normal = normals()
    inputs = [normal(2, 3, L, 8).requires_grad_() for _ in "qkv"]
    distance = torch.arange(L)[:, None] - torch.arange(L)
    masked = nnf.scaled_dot_product_attention(*inputs, attn_mask=(distance >= 0) & (distance < window))
    found = [results_and_gradients([y], inputs) for y in (memories.window_attention(*inputs, window), masked)]
    assert all(relative(one, two) < 1e-12 for one, two in zip(*found))
    assert Config(**PRESETS["5b"]).window == 8192
    assert Config().window / (40 + math.prod(Config().grid(1))) == pytest.approx(8192 / 17776, rel=0.01)


def delta_inputs(L, B=2, H=3, K=8, V=12):
    normal = normals()
    q, k = (nnf.normalize(normal(B, H, L, K), dim=-1) for _ in "qk")
    return q, k, normal(B, H, L, V), -normal(B, H, L).abs(), normal(B, H, L).sigmoid()


def delta_step_by_step(q, k, v, g, beta):
    """The recurrence as the paper writes it, a token at a time."""
    S, out = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[2]):
        S = g[:, :, t, None, None].exp() * S
        error = v[:, :, t] - torch.einsum("bhk, bhkv -> bhv", k[:, :, t], S)
        S = S + beta[:, :, t, None, None] * k[:, :, t, :, None] * error[:, :, None]
        out.append(torch.einsum("bhk, bhkv -> bhv", q[:, :, t], S) * q.shape[-1] ** -0.5)
    return torch.stack(out, dim=2), S


def ssd_inputs(L, B=2, H=4, P=6, G=1, N=5):
    normal = normals()
    return normal(B, H, L, P), normal(B, H, L).abs(), -normal(H).abs(), normal(B, G, L, N), normal(B, G, L, N)


def ssd_step_by_step(x, dt, A, Bm, Cm):
    Bm, Cm = (y.repeat_interleave(x.shape[1] // y.shape[1], dim=1) for y in (Bm, Cm))
    S, out = torch.zeros(*x.shape[:2], x.shape[-1], Bm.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[2]):
        written = (dt[:, :, t, None] * x[:, :, t])[..., None] * Bm[:, :, t, None]
        S = (dt[:, :, t] * A)[..., None, None].exp() * S + written
        out.append(torch.einsum("bhpn, bhn -> bhp", S, Cm[:, :, t]))
    return torch.stack(out, dim=2), S


@pytest.mark.parametrize("L, chunk", [(37, 8), (16, 16), (5, 64), (1, 4), (9, 1)])
@pytest.mark.parametrize("rule, steps, make", [(memories.gated_delta_rule, delta_step_by_step, delta_inputs),
                                               (memories.ssd, ssd_step_by_step, ssd_inputs)])
def test_a_recurrence_in_chunks_is_the_recurrence_step_by_step(rule, steps, make, L, chunk):
    """Outputs, last state and every gradient, lengths that no chunk divides."""
    inputs = [x.requires_grad_() for x in make(L)]
    both = rule(*inputs, chunk=chunk), steps(*inputs)
    found = [results_and_gradients(results, inputs) for results in both]
    assert all((one - two).abs().max() < 1e-12 for one, two in zip(*found))


def test_the_gated_delta_rule_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs, theirs = delta_inputs(70), inspect.unwrap(modeling.torch_chunk_gated_delta_rule)
    their_out, state = theirs(*(x.transpose(1, 2) for x in inputs), output_final_state=True)
    out, S = memories.gated_delta_rule(*inputs)
    assert relative(their_out.transpose(1, 2).double(), out) < 1e-5 and relative(state.double(), S) < 1e-5


def test_mamba2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    torch.manual_seed(0)
    ours = memories.Mamba2(dataclasses.replace(TINY, layer="mamba2"))
    theirs = Mamba2Mixer(transformers.Mamba2Config(
        hidden_size=TINY.dim, num_heads=ours.heads, head_dim=TINY.head_width, state_size=ours.state, expand=2,
        n_groups=1, conv_kernel=4, use_conv_bias=True, use_bias=False, chunk_size=16), layer_idx=0)
    weights = ours.state_dict()
    for our_part, their_part in ("conv.", "conv1d."), ("norm", "norm.weight"), ("out.", "out_proj."):
        weights = {name.replace(our_part, their_part): x for name, x in weights.items()}
    theirs.load_state_dict(weights)
    x = torch.randn(2, small_layout().tokens, TINY.dim)
    assert relative(ours(x, small_layout()), theirs(x)) < 1e-5


@pytest.mark.parametrize("layer, size",
                         [("ttt_linear", 1), ("mamba2", 4), ("gated_deltanet", 4), ("ttt_mlp", 8)])
def test_states_are_as_large_as_in_the_papers_comparison(layer, size, monkeypatch):
    """In D x F numbers: Mamba 2's and Gated DeltaNet's four times TTT-Linear's and half of TTT-MLP's."""
    config, states = dataclasses.replace(TINY, layer=layer, head_width=64), []
    for module, name in (ttt_minute, "ttt_scan"), (memories, "ssd"), (memories, "gated_delta_rule"):
        def spy(*args, scan=getattr(module, name), **options):
            states.append(scan(*args, **options))
            return states[-1]
        monkeypatch.setattr(module, name, spy)
    ttt_minute.layer_class(layer)(config)(torch.randn(1, small_layout().tokens, config.dim), small_layout())
    numbers = sum(x.numel() for x in tree_leaves(states[0][1]))
    assert numbers / (config.dim * 64) == pytest.approx(size, rel=0.02)


# Gate, both directions, block (eq 6 to 12) --------------------------------------------------------------


def test_the_layer_hands_the_scan_what_the_paper_says(monkeypatch):
    """q and k of length 1, the target v - k normalised by the layer's own gamma and beta, eta as eta_base
    sigmoid / (F b) (section 3.4)."""
    torch.manual_seed(0)
    layer, layout, seen = TTT(TINY).double(), small_layout(), {}
    x = torch.randn(1, layout.tokens, TINY.dim, dtype=torch.float64)

    def spy(kind, weights, q, k, v, eta, *rest, **settings):
        seen.update(q=q, k=k, v=v, eta=eta)
        return ttt_scan(kind, weights, q, k, v, eta, *rest, **settings)

    monkeypatch.setattr(ttt_minute, "ttt_scan", spy)
    layer.ln_gamma.data.fill_(2.0)
    layer.ln_beta.data.fill_(0.5)
    layer(x, layout)
    residual = (seen["v"] - seen["k"] - 0.5) / 2
    for ones in seen["q"].norm(dim=-1), seen["k"].norm(dim=-1), residual.std(-1), 1 + residual.mean(-1):
        assert torch.allclose(ones, torch.ones_like(ones), atol=1e-4)
    expected = TINY.eta_mlp * torch.sigmoid(layer.eta(x)) / (TINY.head_width * TINY.mini_batch)
    assert torch.allclose(seen["eta"], rearrange(expected, "B L H -> B H L").to(seen["eta"]), atol=1e-6)


def test_a_gate_opens_text_and_video_apart_and_starts_almost_closed():
    gate, y = ttt_minute.Gate(TINY), torch.ones(1, small_layout().tokens, TINY.dim)
    assert torch.allclose(gate(y, 3), torch.tensor(math.tanh(0.1)))
    gate.gate_text.data.zero_()
    assert (gate(y, 3)[:, :3] == 0).all() and (gate(y, 3)[:, 3:] > 0).all()


def test_the_backward_direction_is_the_same_layer_on_the_reversed_story():
    torch.manual_seed(0)
    both, layout = ttt_minute.BothDirections(TINY), small_layout(2)
    for gate in both.gate_forward.parameters():
        gate.data.zero_()
    x, order = torch.randn(1, layout.tokens, TINY.dim), scan_order(layout.reverse(), CPU)
    expected = x.clone()
    expected[:, order] += math.tanh(0.1) * both.layer(x[:, order], layout.reverse())
    assert torch.allclose(both(x, layout, layout.text_tokens), expected, atol=1e-6)


# CogVideoX, against diffusers (section 4.1) -------------------------------------------------------------

STORY = ["Mia the cat waves in the kitchen.", "Pip runs to the left.", "Here is the garden with its tree."]
SIZES = "--depth 2 --heads 2 --head_width 16 --height 4 --width 6 --channels 4 --text_dim 8 --time_dim 16"


def diffusers_cogvideox(folder, heads=2, head_width=16, depth=2, text_len=3):
    """A small CogVideoX with random weights, as diffusers makes and saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_width, num_layers=depth, in_channels=4,
        max_text_seq_length=text_len, sample_height=4, sample_width=6, text_embed_dim=8, time_embed_dim=16,
        out_channels=4, use_rotary_positional_embeddings=True).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def assert_equal_to_diffusers(theirs, model, segments):
    """All texts one after the other, RoPE over the whole video."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    latents, text = random_latents(model.config, segments, batch=2)
    t, size, T = torch.tensor([999, 20]), model.config.grid(1)[1:], latents.shape[1]
    rope = get_3d_rotary_pos_embed(theirs.config.attention_head_dim, ((0, 0), size), size, T)
    texts = rearrange(text, "B S N d -> B (S N) d")
    expected = theirs(latents, texts, t, image_rotary_emb=rope, return_dict=False)[0]
    assert relative(model(latents, text, t), expected) < 1e-5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", [dict(), dict(heads=3, head_width=32, depth=1, text_len=7)])
def test_with_closed_gates_every_layer_is_cogvideox(layer, shape, tmp_path):
    """One segment; full attention at three."""
    theirs = diffusers_cogvideox(tmp_path, **shape)
    model = DiT.from_cogvideox(tmp_path, layer, gate_init=0.0, mini_batch=8)
    assert_equal_to_diffusers(theirs, model, 3 if layer == "full" else 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_in_mixed_precision_as_on_a_gpu_loss_and_gradients_stay_close(layer):
    torch.manual_seed(0)
    model, gradients = DiT(dataclasses.replace(TINY, layer=layer)), []
    latents, text = random_latents(TINY, 2)
    for mixed in False, True:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = diffusion_loss(model, latents, text, torch.tensor([500]), -latents)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_return_to_diffusers_bit_for_bit(dtype, tmp_path):
    """From a pipeline's folder, in shards."""
    theirs = diffusers_cogvideox(tmp_path / "a").to(dtype)
    theirs.save_pretrained(tmp_path / "a" / "transformer", max_shard_size="30KB")
    DiT.from_cogvideox(tmp_path / "a").save_cogvideox(tmp_path / "b", dtype=dtype)
    again = type(theirs).from_pretrained(tmp_path / "b", torch_dtype=dtype).state_dict()
    assert same(again, theirs.state_dict())


def test_a_folder_that_is_not_cogvideoxs_network_is_named(tmp_path):
    """Another network, weights too many or too few, half a download, git-lfs's pointer, pickles, nothing."""
    diffusers_cogvideox(tmp_path / "good")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 22000000000\n"
    changes = [("norm_eps", 1e-6), ("use_rotary_positional_embeddings", False), ("num_layers", 3),
               ("num_layers", 1), ("weights", b"cut"), ("weights", pointer), ("weights", None)]
    for n, (part, content) in enumerate(changes):
        folder = shutil.copytree(tmp_path / "good", tmp_path / f"bad{n}")
        config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
        config.write_text(json.dumps(json.loads(config.read_text()) | {part: content}, default=str))
        if part == "weights":
            weights.write_bytes(content) if content else weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(UserError, match=re.escape(str(folder))):
            DiT.from_cogvideox(folder)
    with pytest.raises(UserError, match="nowhere"):
        DiT.from_cogvideox(tmp_path / "nowhere")


@pytest.fixture(scope="session")
def cogvideox(tmp_path_factory):
    """A folder like CogVideoX's, by diffusers, transformers and sentencepiece, with small random networks."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, words = tmp_path_factory.mktemp("cogvideox"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY * 5), model_writer=words, vocab_size=34, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(words.getvalue())
    settings = dict(tokenizer_class="T5Tokenizer", extra_ids=0)
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    sizes = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(sizes).save_pretrained(folder / "text_encoder")
    blocks = dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        sample_height=32, sample_width=48, scaling_factor=0.7, **blocks).save_pretrained(folder / "vae")
    diffusers_cogvideox(folder / "transformer", text_len=48)
    return folder


def test_the_real_model_from_folders_to_a_video(cogvideox, tmp_path, capsys):
    """Ingest, fine-tune at 3 and 9 seconds, sample: real file formats and loading code, small tensors."""
    scenes = [dict(start=0.1, end=3 * SECONDS + 0.2, segments=STORY)]
    film(tmp_path / "videos", seconds=3 * SECONDS + 0.3, scenes=scenes)
    encoders = ["--vae", cogvideox, "--text_encoder", cogvideox, "--device", "cpu"]
    data, out, story, video = (tmp_path / name for name in ("data", "out", "story.txt", "video.mp4"))
    assert run(dataset, "--ingest", tmp_path / "videos", "--out", data, "--text_len", 48, *encoders) == 0
    train = ["--preset", "5b", *SIZES.split(), "--text_len", 48, "--data", data, "--out_dir", out,
             "--steps", 2, "--batch_size", 2, "--device", "cpu"]
    assert run(ttt_minute, "--stage", "3s", *train, "--init_from", cogvideox) == 0
    assert "--vae FOLDER" in capsys.readouterr().out and not list(out.glob("*/*/sample.mp4"))
    assert run(ttt_minute, "--stage", "9s", *train, "--vae", cogvideox) == 0
    tuned = load_checkpoint(out / "5b-ttt_mlp/9s/model.safetensors")
    assert relative(tuned.patch_in.weight, DiT.from_cogvideox(cogvideox).patch_in.weight) < 0.01
    assert (out / "5b-ttt_mlp/9s/sample.png").exists() and tuned.config.recompute

    story.write_text("\n\n".join(dataset.mark_scene(STORY[:2])))
    make = ["--preset", "5b", "--stage", "9s", "--storyboard", story, "--out", video, "--out_dir", out]
    assert run(sample, *make, "--steps", 2, *encoders) == 0 and frames_of(video) == 2 * SEGMENT + 1
    refused(capsys, "0.7, not 1.0", sample, *make, *encoders, "--vae_scale", 1)


# Diffusion (appendix A) ---------------------------------------------------------------------------------


class Oracle:
    """A model that knows x_0 and the noise, and remembers when it was asked."""

    def __init__(self, latents, noise):
        self.config, self.latents, self.noise, self.asked = TINY, latents, noise, []

    def __call__(self, x, text, t):
        self.asked.append(t[0].item())
        alpha_bar = alphas_cumprod(TINY.snr_shift)[t].view(-1, 1, 1, 1, 1)
        return (alpha_bar.sqrt() * self.noise - (1 - alpha_bar).sqrt() * self.latents).float()


def test_the_true_v_has_no_loss_and_an_x0_error_weighted_by_its_noise_is_the_same_loss():
    latents, text = random_latents(TINY, 1, batch=2)
    noise, t = torch.randn_like(latents), torch.tensor([10, 900])
    assert diffusion_loss(Oracle(latents, noise), latents, text, t, noise) < 1e-12
    model, alpha_bar = DiT(TINY), alphas_cumprod(TINY.snr_shift)[t]
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
    assert torch.allclose(ttt_minute.ddim(oracle, noise, text, steps=steps), latents, atol=1e-4)
    asked = sorted(set(oracle.asked), reverse=True)
    assert asked[0] == 999 and len(asked) == steps and (steps != 50 or asked == list(range(999, 0, -20)))


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_schedule_and_sampler_are_those_of_diffusers(snr_shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=snr_shift, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False)
    alpha_bar, model = alphas_cumprod(snr_shift), DiT(dataclasses.replace(TINY, snr_shift=snr_shift))
    assert torch.allclose(alpha_bar, scheduler.alphas_cumprod.double(), atol=1e-6)
    assert alpha_bar[-1] == 0 and (snr_shift != 1 or abs(alpha_bar[0] - 0.99915) < 1e-6)
    latents, text = random_latents(TINY, 1)
    scheduler.set_timesteps(10)
    x = latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, text, t[None]), t, x, return_dict=False)[0]
    assert relative(ttt_minute.ddim(model, latents, text, steps=10, guidance=(1.0, 1.0)), x) < 1e-5


def test_guidance_rises_late_and_leads_from_the_negative_v_beyond_the_conditional_one():
    """One step from pure noise gives x_0 = -v, and v = v_neg + w (v_cond - v_neg); v_neg reads zeros where
    there is no negative prompt."""
    scale = [ttt_minute.guidance_scale(i, 50) for i in range(50)]
    assert scale[0] == 1 and abs(scale[-1] - 4) < 1e-12 and scale[25] < 1.01 and scale == sorted(scale)
    assert ttt_minute.guidance_scale(0, 1) == 1

    class Echo(torch.nn.Module):
        config = TINY

        def forward(self, x, text, t):
            return torch.full_like(x, text.mean().item())

    noise, text = torch.randn(1, FRAMES + 1, 4, 4, 6), torch.full((1, 1, 3, 8), 2.0)
    for negative, v_neg in (text / 4, 0.5), (None, 0.0):
        latents = ttt_minute.ddim(Echo(), noise, text, negative, steps=1, guidance=(3.0, 3.0))
        assert torch.allclose(latents, torch.full_like(noise, -(v_neg + 3 * (2.0 - v_neg))))


# The model and its stages (sections 3.3 and 4.1, Table 2) -----------------------------------------------


@pytest.mark.parametrize("layer, tensors, billions", [("local", 1024, 5.570_283_072), ("ttt_mlp", None, 7.2)])
def test_the_model_has_cogvideox_5b_and_ttt_in_it(layer, tensors, billions):
    with torch.device("meta"):
        model = DiT(Config(**PRESETS["5b"] | dict(preset="5b", layer=layer)))
    numbers = [parameter.numel() for parameter in model.parameters()]
    assert tensors in (len(numbers), None) and round(sum(numbers) / 1e9, 9 if tensors else 1) == billions


def test_the_stages_are_table_2():
    _, first, *later = STAGES.values()
    assert list(STAGES) == ["pretrain", "3s", "9s", "18s", "30s", "63s"]
    assert [stage.segments for stage in (first, *later)] == [1, 3, 6, 10, 21]
    assert [stage.steps for stage in (first, *later)] == [5000, 5000, 1000, 500, 250]
    assert {stage.batch for stage in (first, *later)} == {64}
    assert first.everything and (first.lr_new, first.lr_rest, first.schedule_new) == (1e-4, 1e-5, "cosine")
    assert all(stage.lr_new == stage.lr_rest == 1e-5 and not stage.everything for stage in later)
    assert Config(**PRESETS["5b"]).grid(21) == (21 * FRAMES + 1, 30, 45)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_stage_trains_what_table_2_says_and_decays_matrices_only(layer):
    """After the first stage the new parameters and local attention; W1 and W2 are matrices, b1 and b2 not."""
    for stage in "3s", "9s":
        model = DiT(dataclasses.replace(TINY, layer=layer))
        rest = {parameter: name for name, parameter in model.named_parameters()}
        for group in make_optimizer(model, STAGES[stage], TINY).param_groups:
            for parameter in group["params"]:
                name = rest.pop(parameter)
                small = parameter.ndim < 2 or re.search(r"\.(b1|b2|ln_gamma|ln_beta)$", name)
                assert group["weight_decay"] == (0 if small else 1e-4), name
                assert group["new"] == is_new(name) == (".global_layer." in name)
        assert bool(rest) == (stage == "9s")
        assert not re.search(r"\.(attention|global_layer)\.", " ".join(rest.values()))


def test_learning_rates_warm_up_and_the_new_ones_fall_along_a_cosine():
    lr = functools.partial(lr_at, steps=1000, peak=1e-4, warmup=TINY.warmup)
    assert lr(0, schedule="cosine") == 1e-4 / 20 and lr(19, schedule="cosine") == 1e-4
    assert abs(lr(999, schedule="cosine") - 1e-5) < 1e-8
    assert lr(510, schedule="cosine") == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-6)
    assert {lr(step, schedule="constant") for step in (20, 500, 999)} == {1e-4}


def test_small_batches_see_all_noise_levels_equally_often_and_some_without_text(world):
    def drawn(which, **fields):
        batches = [list(ttt_minute.draw(runs, stage, Config(**fields), "3s", step)) for step in range(25)]
        return torch.cat([batch[0][which] for batch in batches])

    runs, stage = dataset.Runs(world, 1), Stage(1, 100, 4, 0, 0)
    t = drawn(2)
    assert torch.histc(t.float(), bins=10, min=0, max=1000).sub(10).abs().max() <= 2 and t.max() < 1000
    assert not torch.equal(t, drawn(2, seed=1))
    assert 25 < (drawn(1, text_dropout=0.5) == 0).all(dim=(1, 2, 3)).sum() < 75


def test_a_batch_is_the_same_in_micro_batches_and_for_any_number_of_processes(world):
    """The same videos, noise and noise levels, only fewer at once."""
    runs, stage = dataset.Runs(world, 1), Stage(1, 100, 8, 0, 0)
    whole, = ttt_minute.draw(runs, stage, Config(micro_batch=8), "3s", 7)
    for groups, sizes in (1, [3, 3, 2]), (2, [3, 1] * 2), (4, [2] * 4):
        parts = []
        for group in range(groups):
            parts += ttt_minute.draw(runs, stage, Config(micro_batch=3), "3s", 7, group, groups)
        assert [len(part[0]) for part in parts] == sizes
        assert all(torch.equal(one, torch.cat(many)) for one, many in zip(whole, zip(*parts)))


def test_a_tiny_model_learns_eight_clips_by_heart():
    torch.manual_seed(0)
    model, losses = DiT(TINY), []
    latents, text = random_latents(TINY, 1, batch=8)
    optimizer = make_optimizer(model, Stage(1, 1, 1, 0, 0, everything=True), TINY)
    noise, t = torch.randn_like(latents), torch.full((8,), 700)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(60):
        loss = diffusion_loss(model, latents, text, t, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# The command line: train, interrupt, resume, sample; and what goes wrong --------------------------------

SMALL = "--depth 1 --heads 1 --head_width 16 --time_dim 16 --steps 4 --batch_size 2 --device cpu".split()
FEW = None, 2, (1.0, 4.0), 5.0                                # defaults of ddim: two steps will do in a test
CHILD = """
import json, sys, ttt_minute
ttt_minute.ddim.__defaults__ = None, 2, (1.0, 4.0), 5.0
{}
for module, words in json.loads(sys.argv[1]):
    sys.argv = [module + ".py", *words]
    __import__(module).main()
"""


@pytest.fixture(scope="session", autouse=True)
def few_steps():
    ttt_minute.ddim.__defaults__ = FEW


def run(module, *flags):
    """Run a command as a user would, in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            dataset.run_main(module.main)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return 1 if isinstance(stop.code, str) else stop.code or 0
    return 0


def run_alone(folder, *commands, before=""):
    """Run commands, (name of a module, flags) each, in a new process; `before` is Python run before them."""
    words = json.dumps([(module, [str(flag) for flag in flags]) for module, flags in commands])
    command = [sys.executable, "-c", CHILD.format(before), words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def refused(capsys, sentence, module, *flags):
    """Exit status 2, and on stderr no traceback but one line of error."""
    capsys.readouterr()
    status, said = run(module, *flags), capsys.readouterr().err
    error, = [line for line in said.splitlines() if "error:" in line]
    assert status == 2 and sentence in error and "Traceback" not in said, said[-2000:]


def frames_of(video):
    import imageio.v3 as imageio
    return len(imageio.imread(video, plugin="FFMPEG"))


def weights_of(folder, stage="pocket-ttt_mlp/3s"):
    return load_file(folder / stage / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two short episodes of the pocket world as latents on disk."""
    folder = tmp_path_factory.mktemp("world")
    dataset.make_world(folder, 2, segments=6)
    return folder


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """pretrain, 3s and 9s of a network with one block."""
    folder = tmp_path_factory.mktemp("out")
    flags = ["--stage", "9s", "--data", world, "--out_dir", folder, *SMALL, "--eta_mlp", 11]
    assert run(ttt_minute, *flags) == 0
    return folder


@pytest.fixture
def to_3s(trained, world, tmp_path):
    """Flags that train stage 3s in tmp_path from the same pretrain; --eta_mlp 11 makes it the same."""
    (tmp_path / "pocket-local").symlink_to(trained / "pocket-local")
    return ["--stage", "3s", "--data", world, "--out_dir", tmp_path, *SMALL]


def test_one_command_trains_what_the_stage_needs_and_ends_with_a_video(trained, world):
    for stage in "pocket-local/pretrain", "pocket-ttt_mlp/3s", "pocket-ttt_mlp/9s":
        names = {path.name for path in (trained / stage).iterdir()}
        assert {"model.safetensors", "state", "log.jsonl", "loss.png"} <= names
        assert {"sample.mp4", "sample.gif", "sample.png"} <= names
    assert frames_of(trained / "pocket-ttt_mlp/9s/sample.mp4") == 3 * SEGMENT + 1
    lines = [json.loads(line) for line in (trained / "pocket-ttt_mlp/9s/log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"stage", "loss", "lr", "lr_new", "grad_norm", "ms", "tokens_per_second"} <= set(lines[0])
    before, after = (weights_of(trained, f"pocket-ttt_mlp/{stage}") for stage in ("3s", "9s"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"blocks.0.global_layer.layer.W1", "blocks.0.attention.qkv.0.weight"} <= changed
    assert all(trains(name, STAGES["9s"]) for name in changed)


def test_the_essay_alone_trains_and_samples_and_the_length_of_a_segment_has_one_home(tmp_path):
    """Without the appendix, and with segments of 2 seconds: change one line, and everything follows. The
    pocket world is drawn, stages are trained with the essay's backends and layers and sampled, a film is
    ingested, a storyboard filmed."""
    for name in "ttt_minute.py", "dataset.py", "sample.py":
        text = re.sub(r"(?m)^SECONDS = 3", "SECONDS = 2", (HERE / name).read_text())
        (tmp_path / name).write_text(text)
    (tmp_path / "assets").symlink_to(HERE / "assets")
    (tmp_path / "story.txt").write_text("\n\n".join(segment.text for segment in dataset.held_out(4)))
    train = ["--stage", "9s", *SMALL, "--steps", 2, "--episodes", 1]
    show = ["--stage", "9s", "--steps", 2, "--device", "cpu"]
    start = ["--init_from", "out/pocket-local/pretrain/model.safetensors"]
    done = run_alone(
        tmp_path, ("ttt_minute", [*train, "--backend", "primal"]),
        ("ttt_minute", [*train, *start, "--layer", "full", "--backend", "autograd"]),
        ("ttt_minute", [*train, *start, "--layer", "local", "--seed", 1]),
        ("dataset", ["--render", 1, "--segments", 3, "--out", "films"]),
        ("dataset", ["--ingest", "films", "--out", "data"]),
        ("ttt_minute", [*train, *start, "--layer", "ttt_linear", "--backend", "dual", "--data", "data"]),
        ("sample", [*show, "--layer", "full", "--storyboard", "story.txt"]),
        ("sample", [*show, "--evaluate", "--videos", 1]),
        before="import sample; sample.memory_in_loss.__defaults__ = 2, (880,)")
    assert done.returncode == 0, done.stderr
    assert frames_of(tmp_path / "out/pocket-ttt_mlp/9s/sample.mp4") == 3 * 2 * dataset.FPS + 1
    assert frames_of(tmp_path / "out/pocket-full/9s/video.mp4") == 4 * 2 * dataset.FPS + 1


def test_no_import_runs_in_a_circle_and_the_essay_needs_no_appendix():
    files = [path for path in (*HERE.glob("*.py"), *HERE.glob("appendix/*.py")) if path.name != "test_ttt.py"]
    names, graph, at_the_top = {path.stem for path in files}, {}, {}
    for path in files:
        tree = ast.parse(path.read_text())
        for found, nodes in (graph, ast.walk(tree)), (at_the_top, tree.body):
            words = set()
            for node in nodes:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    words |= {*str(getattr(node, "module", "")).split(".")}
                    words |= {alias.name for alias in node.names}
            found[path.stem] = words & names
    assert graph["ttt_minute"] > at_the_top["ttt_minute"] == {"dataset"} and not graph["dataset"]
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize("flag", ["--recompute", pytest.param("--compile", marks=SLOW)])
def test_recomputing_and_compiling_change_nothing_but_time_and_memory(flag, trained, to_3s, tmp_path):
    assert run(ttt_minute, *to_3s, "--eta_mlp", 11, flag) == 0
    expected = weights_of(trained)
    assert all(relative(x, expected[name]) < 1e-4 for name, x in weights_of(tmp_path).items())


def test_a_stage_never_starts_over_a_trained_one_or_another_run(trained, world, tmp_path, capsys):
    flags = ["--stage", "3s", "--data", world, "--out_dir", tmp_path, *SMALL, "--eta_mlp", 11]
    start = "--init_from", trained / "pocket-local/pretrain/model.safetensors"
    lock = dataset.hold(tmp_path / "pocket-ttt_mlp/3s")
    refused(capsys, "another run", ttt_minute, *flags, *start)
    lock.close()
    assert run(ttt_minute, *flags, *start) == 0
    assert same(weights_of(tmp_path), weights_of(trained))
    refused(capsys, "--overwrite", ttt_minute, *flags, *start)
    refused(capsys, "mini_batch 64 and not 32", ttt_minute, *flags, "--mini_batch", 32)
    refused(capsys, "nowhere", ttt_minute, *flags, "--overwrite", "--data", "nowhere")  # and nothing is lost
    assert run(ttt_minute, *flags) == 0 and "already trained" in capsys.readouterr().out


@pytest.mark.parametrize("stop_after, number", [(2, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_run_resumes_bit_for_bit(stop_after, number, trained, to_3s, tmp_path, monkeypatch, capsys):
    """Ctrl-C or SIGTERM, then --resume, as the run was started: the same weights and log as without. The first
    draw is for first values."""
    draw, calls = ttt_minute.draw, []

    def interrupting_draw(*args):
        calls.append(args)
        if len(calls) == stop_after:
            signal.raise_signal(number)
        return draw(*args)

    monkeypatch.setattr(ttt_minute, "draw", interrupting_draw)
    assert run(ttt_minute, *to_3s, "--eta_mlp", 11) == 130
    assert "--resume" in "".join(capsys.readouterr())
    monkeypatch.setattr(ttt_minute, "draw", draw)
    for changed, sentence in [((), "--resume"), (("--resume", "--eta_mlp", 12), "eta_mlp 11.0 and not 12.0"),
                              (("--resume", "--batch_size", 1), "batch_size 2 and not 1")]:
        refused(capsys, sentence, ttt_minute, *to_3s, *changed)
    assert run(ttt_minute, *to_3s, "--resume") == 0 and same(weights_of(tmp_path), weights_of(trained))
    logs = [(folder / "pocket-ttt_mlp/3s/log.jsonl").open() for folder in (tmp_path, trained)]
    one, two = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert one == two and len(one) == 4


IN_THE_MIDDLE = """
import os
draw = ttt_minute.draw
def killed(*args):
    if args[4] == 3 and os.environ.get("RANK") != "0":
        os.kill(os.getpid(), 9)
    return draw(*args)
ttt_minute.draw = killed
"""
BETWEEN_TWO_FILES = """
import os, torch.distributed.checkpoint.filesystem as files
finish, calls = files.FileSystemWriter.finish, []
def killed(*args, **options):       # all tensors are written, and nothing yet says so
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return finish(*args, **options)
files.FileSystemWriter.finish = killed
"""


@pytest.mark.parametrize("kill, state", [(IN_THE_MIDDLE, "000003"), (BETWEEN_TWO_FILES, "000002")])
def test_after_kill_9_a_run_goes_on_and_ends_with_the_same_weights(kill, state, trained, to_3s, tmp_path):
    flags, folder = [*to_3s, "--eta_mlp", 11, "--checkpoint_every", 1], tmp_path / "pocket-ttt_mlp/3s"
    assert run_alone(HERE, ("ttt_minute", flags), before=kill).returncode == -signal.SIGKILL
    assert ttt_minute.whole_states(folder)[-1].name == state
    assert run(ttt_minute, *flags, "--resume") == 0 and same(weights_of(tmp_path), weights_of(trained))
    assert [path.name for path in ttt_minute.whole_states(folder)] == ["000003", "000004"]


def test_nan_stops_the_run_and_names_the_last_good_state(to_3s, tmp_path, monkeypatch, capsys):
    draw = ttt_minute.draw

    def spoilt(*args):
        for latents, *rest in draw(*args):
            yield latents * (math.nan if args[4] == 2 else 1), *rest

    monkeypatch.setattr(ttt_minute, "draw", spoilt)
    assert run(ttt_minute, *to_3s, "--checkpoint_every", 1) != 0
    error = capsys.readouterr().err
    assert "step 2 of stage 3s" in error and "state/000002" in error and "Traceback" not in error
    assert not (tmp_path / "pocket-ttt_mlp/3s/model.safetensors").exists()


MISTAKES = {
    ttt_minute: ["--layr", "--layer ttt_mpl", "--stage 10s", "--depth two", "--steps 0", "--device cuda:99",
                 "--preset 5b", "--preset 5b --stage pretrain", "--micro_batch 0", "--seed -1", "--resume",
                 "--seed 20261125123456", "--init_from nowhere", "--init_from FILE", "--height 64",
                 "--data nowhere", "--out_dir FILE", "--head_width 20"],
    sample: ["--layer swa", "--seed -999999", "--steps 0", "--out FILE/a.mp4", "--out a.avi", "--vae nowhere",
             "--guidance 1 nan", "--storyboard FILE", "--storyboard nowhere.txt"],
    dataset: ["--render 1 --out FILE", "--storyboard -1", "--out a --ingest nowhere"]}


@pytest.mark.parametrize("module", MISTAKES)
def test_a_users_mistake_is_quoted_in_one_sentence_before_any_work(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "make_world", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for mistake in MISTAKES[module]:
        *_, wrong = words = mistake.replace("FILE", __file__).split()
        refused(capsys, Path(__file__).name if "FILE" in mistake else wrong, module, *words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_checkpoint_that_does_not_fit_is_refused(trained, world, tmp_path, capsys):
    """Of another depth or layer; cut off."""
    good, cut = trained / "pocket-ttt_mlp/9s/model.safetensors", tmp_path / "cut.safetensors"
    flags = ["--stage", "18s", "--data", world, "--out_dir", tmp_path / "out", *SMALL, "--init_from"]
    cut.write_bytes(good.read_bytes()[:5000])
    for path, more in (good, ("--depth", 2)), (good, ("--layer", "ttt_linear")), (cut, ()):
        refused(capsys, str(path), ttt_minute, *flags, path, *more)


# Many devices: processes that talk through gloo on the CPU (appendix/devices.py) ------------------------

SHARED = dataclasses.replace(TINY, heads=8, mini_batch=7, gate_init=0.3)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def in_process(rank, count, port, cases):
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank))
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    ttt_minute.ddim.__defaults__ = FEW
    for case in cases:
        compare_with_one_process(*case)
    dist.destroy_process_group()


def wide_open(config):
    """A network in which every part matters, gates and adaLN too, and rounding does not grow."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()


def train_two_steps(model, config, segments, rank=0, world_size=1, context=1):
    """Losses and gradient norms, the first gradients, the last weights, and a sampled video."""
    optimizer = make_optimizer(model, Stage(segments, 2, 4, 0, 0, everything=True), config)
    (latents, text), t = random_latents(config, segments, 4), torch.tensor([900, 500, 200, 700])
    own, numbers, gradients = torch.arange(4).chunk(world_size // context)[rank // context], [], None
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(2):
        loss = torch.zeros(())
        for part in own.split(config.micro_batch):
            share = diffusion_loss(model, latents[part], text[part], t[part], latents[part].flip(1))
            share = share * len(part) / (4 * context)
            share.backward()
            loss += share.detach()
        gradients = gradients or {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        if world_size > 1:
            dist.all_reduce(loss)
        numbers += [loss.item(), norm.item()]
        optimizer.step()
        model.zero_grad()
    weights = {name: whole(x) for name, x in model.state_dict().items()}
    video = ttt_minute.generate(model.eval(), text[0], text[1], steps=1, guidance=(2.0, 3.0))
    return numbers, gradients, weights, video


def compare_with_one_process(layer, segments, context, shard, micro_batch):
    """An arrangement of these processes does what the first of them does alone."""
    from appendix import devices
    config = dataclasses.replace(SHARED, layer=layer, micro_batch=micro_batch, recompute=micro_batch == 1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.is_initialized():
            patch.setattr(dist, "init_process_group", lambda *args, **options: None)
        _, place = devices.join(CPU, [4], context, shard)
    model = place(lambda: wide_open(config))
    many = train_two_steps(model, config, segments, dist.get_rank(), dist.get_world_size(), context)
    if dist.get_rank() == 0:
        one = train_two_steps(wide_open(config), config, segments)
        case = f"{layer}, {segments} segments, {context} share a video, {shard} the weights"
        assert many[0] == pytest.approx(one[0], rel=1e-5), case
        for ours, alone, limit in (many[1], one[1], 5e-5), (many[2], one[2], 1e-3):       # gradients, weights
            floor = 1e-3 * max(x.norm() for x in alone.values())
            for name, x in alone.items():
                assert (ours[name] - x).norm() < limit * x.norm().clamp_min(floor), (case, name)
        assert relative(many[3], one[3]) < 1e-4, case


def test_many_processes_train_and_sample_like_one():
    """FSDP2, hybrid sharding, context parallelism and gradient accumulation, together and apart; tokens and
    segments that the processes do not divide."""
    cases = [("ttt_mlp", 3, 2, 2, 1), ("ttt_linear", 1, 1, 4, 4), ("gated_deltanet", 5, 4, 1, 4),
             ("full", 2, 2, 4, 2), ("mamba2", 1, 4, 4, 2), ("swa", 3, 4, 2, 2), ("local", 3, 2, 1, 2)]
    torch.multiprocessing.spawn(in_process, (4, free_port(), cases), nprocs=4)


def test_when_one_of_two_processes_dies_the_other_ends_and_one_alone_goes_on(trained, to_3s, tmp_path):
    """torchrun ends the sibling within a minute; the states of two processes are read by one."""
    flags = [*map(str, to_3s), "--eta_mlp", "11", "--checkpoint_every", "1"]
    (tmp_path / "train.py").write_text(CHILD.format(IN_THE_MIDDLE))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               free_port(), tmp_path / "train.py", json.dumps([("ttt_minute", flags)])]
    settings = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    states = ttt_minute.whole_states(tmp_path / "pocket-ttt_mlp/3s")
    assert done.returncode != 0 and len(states) == 2, done.stderr
    assert time.time() - (states[-1] / ".metadata").stat().st_mtime < 60
    assert run(ttt_minute, *flags, "--resume") == 0
    expected = weights_of(trained)
    assert all(relative(x, expected[name]) < 1e-4 for name, x in weights_of(tmp_path).items())


# Storyboards, the pocket world, its codec, ingestion, the loader (dataset.py) ---------------------------


def film(folder, name="film", seconds=8.0, scenes=None):
    """A small video of 10 frames a second whose brightness tells the time, 255 at the end."""
    import imageio_ffmpeg
    folder.mkdir(exist_ok=True)
    path, count = folder / f"{name}.mp4", round(10 * seconds)
    shades = (255 * np.arange(count) / count).round().astype(np.uint8)
    source = "-y -v error -f rawvideo -pix_fmt gray -s 160x96 -r 10 -i - -pix_fmt yuv420p"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *source.split(), f"file:{path}"]
    subprocess.run(command, input=shades.repeat(96 * 160).tobytes(), check=True)
    if scenes is not None:
        (folder / f"{name}.json").write_text(json.dumps(scenes))


ONE = [dict(start=0, end=SECONDS, segments=["One."])]           # a storyboard of one segment


class Plain:
    """A codec that keeps each latent's mean brightness, so that a test can read the time off a latent."""

    height, width, channels, scale, name = 64, 96, 16, 1.0, "plain"

    def encode(self, frames):
        groups = [frames[:1]] + [frames[n:n + 4] for n in range(1, len(frames), 4)]
        return torch.stack([torch.full((16, 8, 12), float(group.mean())) for group in groups])


def ingest(tmp_path, segments=1):
    """The latents of tmp_path / "videos", and the sentence that names what was left out."""
    error = ""
    try:
        dataset.ingest(tmp_path / "videos", tmp_path / "latents", Plain(), dataset.PocketText())
    except UserError as found:
        error = str(found)
    return dataset.Runs(tmp_path / "latents", segments), error


def test_a_storyboard_is_read_in_three_formats(tmp_path):
    """A paragraph a segment, scene marks around scenes; the published JSON and JSONL have negatives, too."""
    def read(name, text, encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        videos = dataset.parse_storyboard(tmp_path / name)
        return [[(s.text, s.negative, s.scene) for s in board] for board in videos]

    story = "<start_scene>One.\n\nTwo.<end_scene>\n\n<start_scene>Three.<end_scene>\n"
    expected = [[("<start_scene>One.", None, 0), ("Two.<end_scene>", None, 0),
                 ("<start_scene>Three.<end_scene>", None, 1)]]
    for between, encoding in ("\n\n", "utf-8"), ("\u2029", "utf-8-sig"), ("\n \r\n\u200b", "utf-16"):
        assert read("story.txt", story.replace("\n\n", between), encoding) == expected
    video = [dict(text="One.", requires_scene_transition=False, neg_text="blur"),
             dict(text="Two.", requires_scene_transition=True, neg_text="")]
    expected = [[("<start_scene>One.<end_scene>", "blur", 0), ("<start_scene>Two.<end_scene>", None, 1)]] * 2
    assert read("story.json", json.dumps([video, video])) == expected
    assert read("story.jsonl", 2 * (json.dumps(video) + "\n")) == expected


@pytest.mark.parametrize("name, text, message", [
    ("a.txt", " \n", "a.txt"), ("a.txt", "<start_sceen>One.<end_scene>", "<start_sceen>"),
    ("a.doc", "One.", "storyboard is"),
    ("a.json", "[[{", "a.json"), ("a.jsonl", '[{"text": " "}]', "segment 1.*text")])
def test_a_faulty_storyboard_is_explained(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        dataset.parse_storyboard(tmp_path / name)


@pytest.mark.parametrize("segments", [1, 2, 3, 21])
def test_an_episode_has_the_length_asked_for_its_rooms_return_and_it_hides_its_colours(segments):
    colours = {*dataset.CHARACTER_COLOURS, *dataset.WALL_COLOURS, *dataset.FURNITURE_COLOURS}
    for seed in range(20):
        episode, again = (dataset.episode(seed, segments) for _ in range(2))
        rooms = [scene.room for scene in episode.scenes]
        assert sum(scene.segments for scene in episode.scenes) == segments == len(episode.segments)
        assert segments < 3 or len(rooms) > len(set(rooms))
        for segment in episode.segments:
            words = dataset.PocketText().words(segment.text)
            assert 10 <= len(words) <= 40 and not colours & set(words)
        assert episode.segments == again.segments and episode.rooms == again.rooms
    clips = [dataset.render_scene(story, story.scenes[0], 64) for story in (episode, again)]
    assert np.array_equal(*clips) and clips[0].shape == (SEGMENT * episode.scenes[0].segments + 1, 64, 96, 3)


def test_the_codec_is_sharp_on_episodes_it_has_not_seen():
    codec, errors = dataset.PocketCodec(), []
    for seed in range(dataset.TEST_SEEDS, dataset.TEST_SEEDS + 3):
        frames = dataset.render(dataset.episode(seed, 2), 64, 96)
        latents = codec.encode(frames)
        assert latents.shape == (2 * FRAMES + 1, codec.channels, 8, 12) and 0.7 < latents.std() < 1.3
        errors.append(np.square(codec.decode(latents).astype(float) - frames).mean())
    assert 10 * math.log10(255 ** 2 / np.mean(errors)) >= 32


def test_a_latent_depends_on_its_own_frames_so_segments_can_be_cut_anywhere(tmp_path):
    """The world goes to latents scene by scene, and training joins them: like the whole video, encoded."""
    dataset.make_world(tmp_path, 1, segments=3)
    expected = dataset.PocketCodec().encode(dataset.render(dataset.episode(0, 3), 64, 96))
    assert torch.allclose(dataset.Runs(tmp_path, 3).batch([0])[0][0], expected, atol=2e-3)


def test_real_footage_is_resampled_cropped_trimmed_evenly_and_cut_into_segments(tmp_path):
    """A scene a second longer than two segments: half a second is trimmed at both ends."""
    scenes = [dict(start=0.5, end=2 * SECONDS + 1.5, segments=["One.", "Two."])]
    film(tmp_path / "videos", seconds=9, scenes=scenes)
    runs, _ = ingest(tmp_path, 2)
    latents, text = runs.batch([0])
    assert latents.shape == (1, 2 * FRAMES + 1, 16, 8, 12) and text.shape == (1, 2, 40, 64)
    seconds = latents[0, :, 0, 0, 0] / 255 * 9
    assert abs(seconds[0] - 1.0) < 0.2 and abs(seconds[-1] - 1 - 2 * SECONDS) < 0.3
    assert (seconds.diff() > 0).all()
    words = ["<start_scene>One.", "Two.<end_scene>"]
    assert torch.allclose(text[0], dataset.PocketText().encode(words), atol=2e-3)
    assert [segment.text for segment in runs.storyboard(0)] == words


def test_pictures_have_the_shape_in_which_a_player_shows_them(tmp_path):
    """Pixels twice as wide as high, and a telephone held upright: red grows to the right, green downwards."""
    import imageio_ffmpeg
    y, x = np.mgrid[0:96, 0:96] / 95 * 255
    picture, upright = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8), tmp_path / "upright.mp4"
    for name, options in ("wide", ["-vf", "setsar=2"]), ("flat", []):
        writer = imageio_ffmpeg.write_frames(str(tmp_path / f"{name}.mp4"), (96, 96), output_params=options)
        for frame in [None] + 80 * [picture]:
            writer.send(frame)
        writer.close()
    frame = dataset.read_frames(tmp_path / "wide.mp4", 0, 64, 96)[0].astype(int)        # of 2 : 1 3/4 stay
    assert abs(frame[:, 0, 0].mean() - 255 / 8) < 8 and abs(frame[:, -1, 0].mean() - 255 * 7 / 8) < 8
    assert frame[0, :, 1].mean() < 8 and frame[-1, :, 1].mean() > 247
    turn = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i"]
    subprocess.run([*turn, tmp_path / "flat.mp4", "-c", "copy", upright], check=True)
    frame = dataset.read_frames(upright, 0, 64, 64)[0].astype(int)
    assert np.ptp(frame[:, 32, 0]) > 200 and np.ptp(frame[32, :, 0]) < 20


def test_runs_overlap_share_the_border_latent_and_return_to_a_place_if_any_do(world, tmp_path):
    one, long, expected = dataset.Runs(world, 1), dataset.Runs(world, 3), []
    assert len(one) == 12
    video, start = long.runs[0]
    latents, text = long.batch([0])
    pieces = [one.batch([one.runs.index((video, start + i))]) for i in range(3)]
    assert torch.equal(latents[:, :FRAMES + 1], pieces[0][0]) and torch.equal(text[:, 2], pieces[2][1][:, 0])
    assert torch.equal(latents[:, FRAMES + 1:2 * FRAMES + 1], pieces[1][0][:, 1:])
    for video in range(2):
        places = sum([[scene.room] * scene.segments for scene in dataset.episode(video, 6).scenes], [])
        expected += [(video, i) for i in range(4) if places[i] == places[i + 2] != places[i + 1]]
    assert long.runs == expected and 0 < len(expected) < 8
    film(tmp_path / "videos", seconds=10, scenes=[dict(start=0, end=3 * SECONDS, segments=["One."] * 3)])
    assert len(ingest(tmp_path, 2)[0]) == 2                       # no places told: every run


@pytest.mark.parametrize("scenes, message", [
    (None, "film.json"), ("text", "list of scenes"), ([dict(start="soon", end=9, segments=["One."])], "soon"),
    ([dict(start=0, end=2 * SECONDS + 0.5, segments=["One."])], "2.*1"),
    ([dict(start=0, end=30 * SECONDS, segments=["One."] * 30)], f"{3 * SECONDS}.0 s")])
def test_a_video_that_cannot_be_used_is_named_and_the_others_are_kept(scenes, message, tmp_path):
    film(tmp_path / "videos", scenes=scenes)
    film(tmp_path / "videos", "e01:good", SECONDS + 1, ONE)            # no protocol of ffmpeg's
    runs, error = ingest(tmp_path)
    assert re.search(message, error) and "film.mp4" in error and len(runs) == 1


def test_on_a_full_disk_no_half_file_is_left_and_a_rerun_heals_it(tmp_path, monkeypatch):
    def full(tensors, path, *rest):
        save_file(tensors, path, *rest)
        raise OSError(28, "No space left on device")

    for name in "one", "two":
        film(tmp_path / "videos", name, SECONDS + 1, ONE)
        runs, error = ingest(tmp_path)
        monkeypatch.setattr(dataset, "save_file", full)
    assert len(runs) == 1 and "two.mp4" in error and "No space left" in error
    assert {path.name for path in (tmp_path / "latents").iterdir()} == {"index.json", "one.safetensors"}
    monkeypatch.undo()
    assert len(ingest(tmp_path)[0]) == 2


def test_a_folder_of_somebody_elses_files_is_not_written_to(tmp_path):
    film(tmp_path / "videos", "index", SECONDS + 1, ONE)
    shutil.copytree(tmp_path / "videos", tmp_path / "other")
    for out in "videos", "other":
        with pytest.raises(UserError, match="--out"):
            dataset.ingest(tmp_path / "videos", tmp_path / out, Plain(), dataset.PocketText())
        assert json.loads((tmp_path / out / "index.json").read_text()) == ONE


# Evaluation: four axes, measured in pixels (section 4.2), and memory in the loss ------------------------

TEXT, MOTION, AESTHETICS, CONSISTENCY = sample.AXES


@pytest.fixture(scope="module")
def truth():
    """A held-out episode of six segments, its frames, its scores."""
    episode = dataset.episode(dataset.TEST_SEEDS + 3, 6)
    video = dataset.render(episode, 64, 96)
    return episode, video, sample.evaluate(video, episode)[0]


def test_the_truth_scores_full_marks_and_through_the_codec_nearly(truth):
    (episode, video, scores), codec = truth, dataset.PocketCodec()
    coded, _ = sample.evaluate(codec.decode(codec.encode(video)), episode)
    assert all(scores[axis] >= 0.95 and coded[axis] >= 0.9 for axis in sample.AXES)


def hidden(episode, what):
    return episode.rooms[what] if what in episode.rooms else (episode.colours[what],)


def test_segments_of_other_episodes_lose_consistency_and_nothing_else(truth):
    """Each segment of a story drawn with the hidden attributes of another: of consistency chance is left."""
    episode, strangers, pieces, first, expected = truth[0], [], [], {}, []
    for i, segment in enumerate(episode.segments):
        other, scene = dataset.episode(dataset.TEST_SEEDS + 40 + i, 6), episode.scenes[segment.scene]
        strangers.append(dataclasses.replace(episode, colours=other.colours, rooms=other.rooms))
        begin = SEGMENT * (i - scene.first)
        pieces.append(dataset.render_scene(strangers[i], scene, 64)[begin + (i > 0):begin + SEGMENT + 1])
        for what in (scene.room, *scene.cast):
            then = first.setdefault(what, i)
            pairs = zip(hidden(strangers[i], what), hidden(strangers[then], what))
            alike = np.mean([here == there for here, there in pairs])
            expected += [(what, i - then, round(alike, 6))] if then < i else []
    scores, returns = sample.evaluate(np.concatenate(pieces), episode)
    assert sorted(expected) == sorted((what, after, round(alike, 6)) for what, after, alike in returns)
    assert scores[CONSISTENCY] < 0.5 and min(scores[axis] for axis in (TEXT, MOTION, AESTHETICS)) >= 0.95


def test_a_jittered_video_moves_unnaturally_and_a_blurred_one_is_less_beautiful(truth):
    episode, video, scores = truth
    jittered, blur = video.copy(), ImageFilter.GaussianBlur(3)
    for t in range(1, len(video), 8):
        jittered[t:t + 4] = np.roll(video[t:t + 4], 4, axis=2)
    worse, _ = sample.evaluate(jittered, episode)
    assert worse[MOTION] < scores[MOTION] - 0.3 and worse[CONSISTENCY] > 0.9
    blurred = np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in video])
    assert sample.evaluate(blurred, episode)[0][AESTHETICS] < scores[AESTHETICS] - 0.1


@pytest.mark.parametrize("layer, least, most", [("ttt_mlp", 0.01, 0.1), ("local", -0.02, 0.002)])
def test_of_the_weights_that_ship_those_with_ttt_remember(layer, least, most):
    """By how much the loss rises when earlier scenes had other colours: what memory is worth to a network."""
    for story in sample.stories_that_return(6, 4):
        *before, last = [scene.room for scene in story.scenes]
        assert last in before[:-1]
    path = ttt_minute.find_checkpoint("nowhere", Config(layer=layer), "63s")
    assert path.parent == ttt_minute.ASSETS and path.stat().st_size <= 4 << 20
    assert ttt_minute.find_checkpoint("nowhere", Config(layer=layer, seed=1), "63s") is None
    arguments = load_checkpoint(path), dataset.PocketCodec(), dataset.PocketText(), 6
    losses, = sample.memory_in_loss(*arguments, videos=4, levels=(880,)).values()
    rises = [numbers[0] for name, numbers in losses.items() if name != "loss"]
    assert all(least < rise < most for rise in rises), rises


def test_with_first_values_from_a_batch_a_network_remembers_before_it_is_trained(world):
    """Like finds like, and reads what was written: other colours in the same place before make the loss of a
    last scene rise. A layer that has read nothing adds nothing, so the network is disturbed little."""
    losses = []
    for first_values in True, False:
        model = ttt_minute.new_model(PRETRAINED, Config(first_values=first_values), dataset.Runs(world, 1))
        arguments = model, dataset.PocketCodec(), dataset.PocketText(), 6
        (loss, _), (rise, _), *_ = sample.memory_in_loss(*arguments, videos=4, levels=(880,))[880].values()
        losses.append(loss)
        assert rise > 0.003 or not first_values, rise
    assert losses[0] < losses[1] - 0.01, losses


def test_layers_are_compared_and_one_without_weights_is_named(trained, capsys, monkeypatch):
    fewer = functools.partial(sample.memory_in_loss, videos=2, levels=(880,))
    monkeypatch.setattr(sample, "memory_in_loss", fewer)
    flags = ["--compare", "--stage", "9s", "--out_dir", trained, "--steps", 1, "--videos", 1]
    assert run(sample, *flags, "--layers", "ttt_mlp", "mamba2") == 0
    captured, folder = capsys.readouterr(), trained / "pocket-comparison/9s"
    assert "mamba2 is left out" in captured.err
    assert all(word in captured.out for word in (*sample.AXES, "chance", "loss at t 880"))
    assert list(json.loads((folder / "comparison.json").read_text())) == ["ttt_mlp"]
    assert (folder / "consistency.png").exists() and (folder / "comparison.png").exists()
    assert Image.open(folder / "comparison.gif").size == (192, 144)


# Kernels (section 3.5): output, last state and every gradient by name, against float64 ------------------


@pytest.fixture(scope="session")
def interpreter():
    """Runs functions of this file in a process where Triton interprets its kernels on the CPU."""
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")                 # kernels learn of it as they are defined
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    yield lambda function, *args: pool.submit(function, *args).result()
    pool.shutdown()


def kernel_inputs(kind, dtype, width, mini_batch, L, B, H, device="cpu", std=0.1, eta=None):
    """Already rounded to dtype, so that float64 sees the same numbers; q as the layer hands it over, [B, L,
    H, F] in memory."""
    weights, inputs = scan_inputs(kind, B, H, L, width, std=std, eta=eta or 1 / mini_batch)
    tokens = [x.to(dtype).to(device) for x in inputs[:4]]
    tokens[0] = tokens[0].transpose(1, 2).contiguous().transpose(1, 2)
    return [w.float().to(device) for w in weights], [*tokens, *(x.float().to(device) for x in inputs[4:])]


def kernel_errors(kind, weights, inputs, mini_batch, scan):
    """Errors by name of a scan(weights, inputs), which returns what scan_gradients does, against float64:
    relative to what is added to q, to how far W moves, to the gradient."""
    exact = [w.double() for w in weights], [x.double() for x in inputs]
    truth, found = scan_gradients(kind, *exact, "torch", mini_batch), scan(weights, inputs)
    first = dict(zip(truth, (exact[1][0], *exact[0])))
    return {name: relative(found[name].double() - first.get(name, 0), true - first.get(name, 0))
            for name, true in truth.items()}


def triton_errors(kind, dtype, width, mini_batch, L, checkpoint, *sizes):
    inputs = kernel_inputs(kind, dtype, width, mini_batch, L, *sizes)
    scan = lambda *inputs: scan_gradients(kind, *inputs, "triton", mini_batch, checkpoint)
    return kernel_errors(kind, *inputs, mini_batch, scan)


@pytest.mark.parametrize("kind, dtype, width, mini_batch, L, checkpoint, B", [
    ("linear", torch.float32, 32, 16, 37, 2, 2), ("linear", torch.float32, 64, 64, 1, 16, 1),
    ("linear", torch.bfloat16, 64, 32, 70, 3, 1), ("linear", torch.bfloat16, 32, 64, 70, 16, 1),
    ("mlp", torch.float32, 32, 16, 55, 2, 1), ("mlp", torch.float32, 32, 32, 20, 3, 2),
    ("mlp", torch.float32, 64, 64, 70, 1, 1), ("mlp", torch.bfloat16, 64, 16, 20, 16, 1),
    ("mlp", torch.bfloat16, 32, 32, 70, 1, 1)])
def test_the_triton_kernels_agree_with_float64(interpreter, kind, dtype, width, mini_batch, L, checkpoint, B):
    """The interpreter cuts to bf16, without rounding."""
    errors = interpreter(triton_errors, kind, dtype, width, mini_batch, L, checkpoint, B, 2)
    assert max(errors.values()) < (4e-2 if dtype == torch.bfloat16 else 4e-6), errors


def in_pieces():
    """Gradients through the output alone and through the last W alone, of weights with a batch axis."""
    weights, inputs = kernel_inputs("mlp", torch.float32, 32, 16, 20, 2, 1)
    gradients = dict(triton=[], torch=[])
    for backend, found in gradients.items():
        leaves = [x.clone().requires_grad_() for x in (*(torch.stack([w, 2 * w]) for w in weights), *inputs)]
        out, last = ttt_scan("mlp", leaves[:4], *leaves[4:], 16, backend=backend, checkpoint=2)
        for loss in out.square().sum(), sum(w.square().sum() for w in last):
            found += torch.autograd.grad(loss, leaves, None, True, materialize_grads=True)
    return max(map(relative, *gradients.values()))


def test_triton_gradients_flow_through_either_result_and_weights_may_differ_by_video(interpreter):
    assert interpreter(in_pieces) < 1e-5


@pytest.mark.parametrize("kernel, chip, shared, kind", [
    ("scan_kernel", 80, 163, "mlp"), ("scan_kernel", 89, 99, "linear"),
    ("scan_backward_kernel", 90, 227, "linear"),
    pytest.param("scan_backward_kernel", 90, 227, "mlp", marks=SLOW)])
def test_the_triton_kernels_compile_for_chips_that_need_not_be_here(kernel, chip, shared, kind, monkeypatch):
    """Within the shared memory, in KB, that a program may have there; F 64, b 64, in bf16."""
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this system")
    function, signature, values, aligned = getattr(kernels, kernel), {}, {}, {}
    constants = dict(F=64, E=64 if kind == "linear" else 256, b=64, PRECISION="bf16")
    scalars = dict.fromkeys(constants, "constexpr") | dict(H="i32", L="i32", every="i32", eps="fp32")
    for i, name in enumerate(function.arg_names):
        signature[name] = scalars.get(name, "*bf16" if name in "q k v out dout dq dk dv".split() else "*fp32")
        if name in constants:
            values[i,] = constants[name]
        elif name not in scalars:
            aligned[i,] = [["tt.divisibility", 16]]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (chip // 10, chip % 10))
    q = types.SimpleNamespace(is_cuda=True, device="cuda", shape=(1, 1, 64, 64))
    options = kernels.launch_options(q, "W1 b1 W2 b2".split()[:2 if kind == "linear" else 4], "bf16")
    source = triton.compiler.ASTSource(function, signature, values, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", chip, 32)
    assert triton.compile(source, target=target, options=options).metadata.shared <= 1024 * shared


def trusted(factor):
    """What "auto" would think of Triton here, if gradients on its step sizes were wrong by this factor."""
    scan = kernels.scan_by_kernel

    def wrong(how, W, q, k, v, eta, *rest):
        return scan(how, W, q, k, v, eta + factor * (eta - eta.detach()), *rest)

    kernels.agrees.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "scan_by_kernel", wrong)
        return kernels.agrees(ttt_minute.scan_in_torch, "linear", 32, 16, "fp32", CPU)


def test_auto_trusts_a_kernel_only_after_it_agreed_with_torch_on_this_machine(interpreter):
    assert interpreter(trusted, 0.0) and not interpreter(trusted, 0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_on_a_gpu_triton_errs_no_more_than_twice_torch_with_operands_in_bf16(kind):
    for width, mini_batch, L, checkpoint in (64, 64, 1000, 16), (64, 16, 333, 3), (32, 32, 100, 1):
        errors = triton_errors(kind, torch.bfloat16, width, mini_batch, L, checkpoint, 2, 3, "cuda")
        assert max(errors.values()) < 9e-3, errors                # torch's: up to 4.3e-3


# ttt_kernel.cu (section 3.5), executed on a CPU where nvcc is (appendix/hopper.py), and on Hopper GPUs ---


def chip_inputs(B, H, L, device="cpu"):
    """In the paper's regime: first W of 0.02, eta_base 0.1."""
    return kernel_inputs("mlp", torch.bfloat16, 64, 64, L, B, H, device, 0.02, 0.1 / (64 * 64))


def chip_arguments(weights, inputs):
    return [*inputs, *(w.expand(len(inputs[0]), *w.shape) for w in weights)]


def assert_within_gates(weights, inputs, scan):
    """Output and change of W 5e-3, gradients 2e-2."""
    for name, error in kernel_errors("mlp", weights, inputs, 64, scan).items():
        assert error <= (2e-2 if name.startswith("d ") else 5e-3), f"{name}: {error:.1e}"


class Emulated:
    """ttt_kernel.cu in torch, for machines without nvcc, used as hopper.Chip: state, statistics and sums in
    fp32, operands of products bf16, E over tp shards. Not `rounded`, in float64, it must be exact."""

    def __init__(self, rounded=True):
        self.R = (lambda x: x.to(torch.bfloat16).to(x.dtype)) if rounded else lambda x: x
        self.dtype = torch.float32 if rounded else torch.float64

    def cut(self, x):
        """[B, H, L, .] -> [M, B H, 64, .]; what lies behind the end reads as zeros, as TMA fills it in."""
        return rearrange(nnf.pad(x, (0, 0, 0, -self.L % 64)), "B H (M b) F -> M (B H) b F", b=64)

    def join(self, x):
        return rearrange(x, "M (B H) b F -> B H (M b) F", B=self.videos)[:, :, :self.L]

    def shards(self, *pairs):
        """The sum over the cluster: every shard adds its own products, then shards are added in pairs."""
        own = lambda rank: [x.chunk(self.tp, dim=-1)[rank] @ w.chunk(self.tp, dim=-2)[rank] for x, w in pairs]
        parts = [sum(own(rank)) for rank in range(self.tp)]
        while len(parts) > 1:
            parts = [one + two for one, two in zip(parts[::2], parts[1::2])]
        return parts[0]

    def normalise(self, Z):
        Z = Z - Z.mean(-1, keepdim=True)
        r = torch.rsqrt(Z.square().mean(-1, keepdim=True) + 1e-8)
        return Z * r, r

    def learn(self, W, t):
        """Steps 1 to 5 at mini-batch t: the new W, and what a backward pass saves (D1 = -G1, D2 = -G2)."""
        R, (W1, b1, W2, b2), k = self.R, W, self.k[t]
        X2, slope, _ = kernels.gelu_derivatives(k @ R(W1) + b1, order=2)
        X2, slope = R(X2), R(slope)
        Z2 = self.shards((X2, R(W2))) + b2
        xh, r = self.normalise(Z2)
        p = self.gamma * (self.gamma * xh + self.beta - (self.v[t] - k))
        D2 = -self.eta[t] * r * (p - p.mean(-1, keepdim=True) - xh * (p * xh).mean(-1, keepdim=True))
        D1 = (R(D2) @ R(W2).mT) * slope
        new = (W1 + k.mT @ R(D1), b1 + D1.sum(-2, keepdim=True),
               W2 + X2.mT @ R(D2), b2 + D2.sum(-2, keepdim=True))
        return new, (X2, R(D1), R(D2), xh, r)

    def read(self, W, t):
        R, (W1, b1, W2, b2) = self.R, W
        X2 = R(nnf.gelu(self.q[t] @ R(W1) + b1, approximate="tanh"))
        xh, _ = self.normalise(self.shards((X2, R(W2))) + b2)
        return R(self.q[t] + self.gamma * xh + self.beta)

    def forward(self, arguments, every, tp):
        q, k, v, eta, gamma, beta, W1, b1, W2, b2 = (x.to(self.dtype) for x in arguments)
        self.videos, _, self.L, _ = q.shape
        self.first = [x.flatten(0, 1) for x in (W1, b1[:, :, None], W2, b2[:, :, None])]
        self.q, self.k, self.v, self.eta = map(self.cut, (q, k, v, eta[..., None]))
        self.gamma, self.beta = (x[:, None].repeat(self.videos, 1, 1) for x in (gamma, beta))
        self.every, self.tp = every, tp
        W, out, kept = self.first, [], []
        for t in range(len(self.q)):
            if t % self.every == 0:
                kept.append(W)
            W, _ = self.learn(W, t)
            out.append(self.read(W, t))
        return self.join(torch.stack(out)), [w.reshape(x.shape) for w, x in zip(W, arguments[6:])], kept

    def backward(self, arguments, kept, dout, dW, every, tp):
        """Gradients of q, k, v, eta, gamma, beta (by video) and the first W, by replaying and rewinding each
        group; `drift` is how far a rewound W is from the one it was."""
        R, gamma, mean = self.R, self.gamma, lambda x: x.mean(-1, keepdim=True)
        D = self.cut(dout.to(self.q.dtype))
        dq, dk, dv, deta = (torch.zeros_like(x) for x in (self.q, self.k, self.v, self.eta))
        dgamma, dbeta = torch.zeros_like(gamma), torch.zeros_like(gamma)
        d1, c1, d2, c2 = (x.to(self.q.dtype).reshape(w.shape).clone() for x, w in zip(dW, self.first))
        over = lambda x: x.sum(-2, keepdim=True)
        self.drift = 0
        for start in reversed(range(0, len(self.q), self.every)):
            W, saved, biases = kept[start // self.every], {}, {}
            steps = range(start, min(start + self.every, len(self.q)))
            for t in steps:
                biases[t] = W[1], W[3]
                W, saved[t] = self.learn(W, t)
            for t in reversed(steps):
                X2, D1, D2, xh, r = saved[t]
                k, q, eta = self.k[t], self.q[t], self.eta[t]
                W1, b1, W2, b2 = W
                # 1-4: the output branch, at the updated W
                Xb, slope, _ = kernels.gelu_derivatives(q @ R(W1) + b1, order=2)
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
                _, slope, bend = kernels.gelu_derivatives(k @ R(W1) + b1, order=2)
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
                dgamma, dbeta = dgamma + over(w * (e + gamma * xh)), dbeta + over(gamma * w)
                dv[t] = R(-gamma * w)
                # 8, 9: through the first forward pass
                dZ1 = (D2 @ R(d2).mT + R(dZ2) @ R(W2).mT) * slope + Z1
                dk[t] = self.shards((D1, R(d1).mT), (R(dZ1), R(W1).mT)) - dv[t]
                d1, c1 = d1 + k.mT @ R(dZ1), c1 + over(dZ1)
                d2, c2 = d2 + N.mT @ D2 + X2.mT @ R(dZ2), c2 + over(dZ2)
            old = kept[start // self.every]
            self.drift = max(self.drift, *(relative(w, o) for w, o in zip(W, old) if w.shape[-2] > 1))
        by_video = lambda x, shape: rearrange(x, "(B H) a b -> B H a b", B=self.videos).reshape(shape)
        return [self.join(R(dq)), self.join(R(dk)), self.join(dv), self.join(deta)[..., 0],
                *(by_video(x, (self.videos, -1, x.shape[-1])) for x in (dgamma, dbeta)),
                *(by_video(x, w.shape) for x, w in zip((d1, c1, d2, c2), dW))]


def execute(chip, every, tp, weights, inputs):
    """What scan_gradients returns, by the kernel as executed or emulated."""
    arguments = chip_arguments(weights, inputs)
    out, last, kept = chip.forward(arguments, every, tp)
    dout, *dlast = [normals(torch.bfloat16)(*y.shape) for y in (out, *last)]
    gradients = chip.backward(arguments, kept, dout, dlast, every, tp)
    ln, W = ([x.sum(0) for x in own] for own in (gradients[4:6], gradients[6:]))      # they come by video
    return dict(zip(result_names(weights), (out, *last, *W, *gradients[:4], *ln)))


@pytest.mark.parametrize("every, L, tp", [(16, 1024, 2), (3, 449, 4), (16, 64, 4)])
def test_the_kernels_algorithm_is_exact_and_its_rounding_within_the_gates(every, L, tp):
    """Shards, replay and rewinding change nothing in float64."""
    inputs, exact, rounded = chip_inputs(1, 2, L), Emulated(rounded=False), Emulated()
    errors = kernel_errors("mlp", *inputs, 64, functools.partial(execute, exact, every, tp))
    assert max(errors.values()) < 1e-12 and exact.drift < 1e-14
    assert_within_gates(*inputs, functools.partial(execute, rounded, every, tp))
    assert rounded.drift < 1e-6


EXECUTED_CASES = [(1, 1, 200, 3, 4), (1, 2, 64, 16, 2), (1, 1, 65, 1, 4)]
EXECUTED_CASES += [pytest.param(*case, marks=SLOW) for case in
                   [(1, 4, 1, 16, 2), (1, 4, 1, 16, 4), (2, 2, 130, 1, 2), (1, 1, 449, 3, 4),
                    (1, 1, 600, 4, 2), (1, 2, 320, 16, 4), (2, 1, 63, 2, 4), (1, 1, 1100, 16, 2)]]


@functools.cache
def executed(source=hopper.KERNEL):
    return hopper.Chip(source)


@pytest.mark.skipif(not shutil.which("nvcc") or not os.environ.get("THUNDERKITTENS_ROOT"),
                    reason="needs nvcc on PATH and ThunderKittens' headers in THUNDERKITTENS_ROOT")
class TestExecutedKernel:
    @pytest.mark.parametrize("B, H, L, every, tp", EXECUTED_CASES)
    def test_it_is_within_the_gates(self, B, H, L, every, tp):
        executed().seed = L
        assert_within_gates(*chip_inputs(B, H, L), functools.partial(execute, executed(), every, tp))

    @pytest.mark.parametrize("schedules", [range(8), pytest.param(range(8, 24), marks=SLOW)], ids=["8", "16"])
    @pytest.mark.parametrize("tp", [2, 4])
    def test_no_order_of_events_changes_a_bit_and_nothing_races(self, tp, schedules):
        """Warps, or a whole multiprocessor, that fall behind; copies and products that are late."""
        chip, inputs, first, races = executed(), chip_inputs(1, 1, 130), None, set()
        for chip.seed in schedules:
            chip.races = None if chip.seed % 8 else races     # looking for races takes three times as long
            results = execute(chip, 2, tp, *inputs)
            first = first or results
            assert same(first, results), chip.seed
        assert not races, chip.report()

    def test_two_defects_it_once_had_are_noticed(self, tmp_path):
        """A wait of warps that send nothing, in the sum over a cluster: some orders deadlock; it says where.
        Vectors at 4 mod 8 bytes (here with TP 4): read in pairs, they fault at once."""
        waits = "if (SHARE < 4 || i == 1) wait_peer(ring.empty[0], n % 2 ^ 1);"
        changed = hopper.KERNEL.read_text()
        first = "const int rank = cluster_ctarank();\n    if (thread() == 0) tma::expect"
        early = first.replace("    if", "    wait_peer(ring.empty[0], n % 2 ^ 1);\n    if")
        for old, new in ((waits, ""), (first, early),
                         ("alignas(16) float part", "float odd[TP_ODD], part"), ("TP_ODD", "P::TP / 4")):
            assert old in changed
            changed = changed.replace(old, new)
        (tmp_path / "ttt_kernel.cu").write_text(changed)
        chip, inputs = executed(tmp_path / "ttt_kernel.cu"), chip_arguments(*chip_inputs(1, 1, 192))
        with pytest.raises(hopper.Fault, match="no multiple of 8"):
            chip.forward(inputs, 16, 4)
        with pytest.raises(hopper.Fault, match=r"deadlock(.|\n)*sum_over_cluster\(z2.*\n.*mbarrier made on"):
            for chip.seed in range(24):
                chip.forward(inputs, 16, 2)

    def test_an_instruction_it_does_not_know_is_named_with_its_line(self):
        chip = hopper.Chip()
        for name, text in chip.texts.items():
            chip.texts[name] = text.replace("rsqrt.approx", "cbrt.approx")
        with pytest.raises(hopper.Fault, match=r"does not know the instruction cbrt.approx.* of line \d+"):
            chip.forward(chip_arguments(*chip_inputs(1, 1, 64)), 16, 2)

    def test_its_command_prints_errors_and_shows_a_warp(self):
        line = (HERE / "ttt_kernel.cu").read_text().splitlines().index("    row_means(square);") + 1
        command = [HERE / "appendix/hopper.py", "--length=10", f"--watch={line}", "--warp=0.0"]
        said = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
        assert "rsqrt" not in said and "shfl.sync" in said and "d b2" in said


HOPPER_CASES = [(1, 1, 192, 1, 4), (1, 1, 64, 16, 2), (2, 3, 449, 3, 2), (3, 5, 200, 3, 4),
                (1, 48, 1024, 16, 2), (1, 48, 1000, 16, 4), (1, 2, 600 * 64 - 17, 16, 2), (2, 48, 321, 16, 2)]


@pytest.mark.hopper
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                    reason="needs a Hopper GPU (H100, H200)")
@pytest.mark.parametrize("B, H, L, every, tp", HOPPER_CASES)
def test_on_hopper_the_kernel_is_within_the_gates_and_repeatable(B, H, L, every, tp, monkeypatch):
    """Not yet run on a GPU."""
    monkeypatch.setattr(kernels, "cluster_size", lambda heads: tp)
    scan = functools.partial(scan_gradients, "mlp", backend="cuda", mini_batch=64, checkpoint=every)
    inputs = chip_inputs(B, H, L, "cuda")
    assert_within_gates(*inputs, scan)
    assert same(scan(*inputs), scan(*inputs))


@SLOW
def test_people_vote_with_two_keys_and_nobody_sees_a_name(tmp_path, capsys):
    """vote.html in headless Chromium, by chromedriver's HTTP interface; then --elo of what it saved."""
    driver = shutil.which("chromedriver") or pytest.skip("needs chromedriver (apt install chromium-driver)")
    layers = "local", "ttt_mlp", "mamba2"
    for shade, layer in enumerate(layers):
        dataset.write_video(tmp_path / f"{layer}.mp4", np.full((8, 64, 96, 3), 60 + 60 * shade, np.uint8))
    sample.write_vote_page({layer: [tmp_path / f"{layer}.mp4"] for layer in layers}, tmp_path / "vote.html")
    port = free_port()
    process, session = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL), "/session"

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60) as reply:
            return json.load(reply)["value"]

    def run(script):
        return ask(f"{session}/execute/sync", dict(script=f"return {script}", args=[]))

    def press(*keys):
        events = [dict(type=way, value=key) for key in keys for way in ("keyDown", "keyUp")]
        ask(f"{session}/actions", dict(actions=[dict(type="key", id="keys", actions=events)]))

    def wait_until(true, seconds=30):
        while not true():
            time.sleep(0.2)
            assert (seconds := seconds - 0.2) > 0

    try:
        time.sleep(2)
        wait_until(lambda: ask("/status")["ready"])
        prefs = {"download.default_directory": str(tmp_path)}
        options = dict(args=["--headless=new", "--no-sandbox"], prefs=prefs)
        wanted = dict(capabilities=dict(alwaysMatch={"goog:chromeOptions": options}))
        session += "/" + ask("/session", wanted)["sessionId"]
        ask(f"{session}/url", dict(url=(tmp_path / "vote.html").as_uri()))
        wait_until(lambda: run("sides.every(video => video.readyState > 1 && video.videoWidth == 96)"))
        assert not any(layer in run("document.body.innerText") for layer in layers)
        assert run("new Set(pairs.map(pair => pair.axis + pair.pair.sort())).size") == 12   # 4 axes, 3 pairs
        press("\ue014", "\ue012", "\ue003", *["\ue014"] * 20)           # right, left, undo, right to the end
        press("s")
        wait_until((tmp_path / "votes.json").exists)
    finally:
        process.terminate()
    votes = json.loads((tmp_path / "votes.json").read_text())
    assert len(votes) == 12 and all({vote["winner"], vote["loser"]} < set(layers) for vote in votes)
    sample.print_elo(tmp_path / "votes.json")
    assert "12 votes" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Exercises. A statement is the docstring of a test; pytest -s prints it. Tests run on assets/answers.md and
# on your exercises.py. Likely mistakes are edits of an answer: what is wrong in the same way gets the hint.
# ----------------------------------------------------------------------------------------------------------

PRETRAINED = ttt_minute.ASSETS / "pocket-local-pretrain.safetensors"


@pytest.fixture(params=["reference", "yours"])
def source(request):
    print(inspect.getdoc(request.function) if request.param == "yours" else "")
    return request.param


ANSWERS = (ttt_minute.ASSETS / "answers.md").read_text()


def answer(name, *edit):
    """A function of assets/answers.md, or of sample.py; with an edit (old, new, ...) a mistake is in it."""
    head, *blocks = re.findall("```python\n(.*?)```", ANSWERS, re.S)
    found, space = [block for block in blocks if f"def {name}(" in block], dict(vars(sample))
    code = found[0] if found else inspect.getsource(space[name])
    for old, new in zip(edit[::2], edit[1::2]):
        assert code.count(old) == 1, f"{name} does not contain {old!r} once"
        code = code.replace(old, new)
    exec(head + code, space)
    return space[name]


def mistakes(name):
    """{hint: edit of the answer that makes this mistake}."""
    return eval("{" + re.search(rf"```python mistakes in {name}\n(.*?)```", ANSWERS, re.S)[1] + "}")


def yours(name):
    module = importlib.import_module("exercises") if importlib.util.find_spec("exercises") else None
    return getattr(module, name, None)


def written(source, name):
    """The answer, or yours from exercises.py. A skip where there is none yet."""
    if source == "reference":
        return answer(name)
    return yours(name) or pytest.skip(f"write {name} in exercises.py")


def form(x):
    """What a result looks like, in words."""
    def leaf(y):
        number = isinstance(y, (int, float)) or torch.is_tensor(y) and not y.ndim
        return "a number" if number else f"a tensor {[*y.shape]}" if torch.is_tensor(y) else type(y).__name__
    return tree_map(leaf, x)


def judge(source, name, inputs, right=None, look=lambda result: result, tolerance=1e-9):
    """Fails with a hint unless a function gives on `inputs` what is right (default: what the answer gives);
    `look`: what of a result to compare. Each likely mistake has to make a difference. Returns the result."""
    def errors(x, y):
        pairs = zip(tree_leaves(x), tree_leaves(y))
        return [relative(*(torch.as_tensor(z).detach().double() for z in pair)) for pair in pairs]

    def fail(words):
        pytest.fail(f"{name}: {words}", pytrace=False)

    mine, theirs = written(source, name)(*inputs), answer(name)(*inputs)
    right = look(theirs) if right is None else right
    if form(mine) != form(theirs):
        words = (str(form(x)).replace("'", "") for x in (theirs, mine))
        fail("asked is for {:.200}; this returns {:.200}".format(*words))
    found = look(mine)
    off = errors(found, right)
    good = max(off) < tolerance
    for hint, edit in {} if good and source == "yours" else mistakes(name).items():
        wrong = look(answer(name, *edit)(*inputs))
        assert max(errors(wrong, right)) > tolerance, f"this mistake would not be noticed: {hint}"
        if not good and max(errors(found, wrong)) < tolerance:
            fail(hint)
    if not good:
        parts = [keystr(path) for path, _ in tree_flatten_with_path(found)[0]]
        where = ", ".join(f"result{part} by {error:.0e}" for part, error in zip(parts, off))
        fail(f"not right yet, in a way not known here; off is {where}")
    return mine


def inner_step(kind):
    """Arguments of a mini-batch of 10 tokens, n = 3, float64: W, q, k, v, eta, gamma, beta, eps."""
    weights, (q, k, v, eta, gamma, beta) = scan_inputs(kind, B=1, L=10)
    W = tuple(w if w.ndim == 3 else w[:, None] for w in weights)
    return W, q[0], k[0], v[0], eta[0, :, :, None], gamma[:, None], beta[:, None], 1e-8


def learnable(kind, heads, width, dtype):
    """weights, k, v, eta, gamma, beta of 512 tokens whose v - k is everywhere the same function of k."""
    weights, (_, k, _, eta, gamma, beta) = scan_inputs(kind, 1, heads, 512, width, dtype, std=0.2)
    truth = torch.randn(heads, width, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return weights, k, k + nnf.layer_norm(k @ truth, [width]), torch.full_like(eta, 0.1), gamma, beta


def first_step_inputs():
    (W1, b1), k, v, eta, gamma, beta = learnable("linear", 1, 16, torch.float64)
    return (W1, b1[None]), k[0], v[0], 0.2 * eta[0, ..., None], gamma[None], beta[None], 1e-8, 16


def test_exercise_00_a_first_step(source):
    """first_step(W, k, v, eta, gamma, beta, eps, b) -> losses

    Watch f learn. Given are one head's keys k and values v [1, L, F], step sizes eta [1, L, 1], gamma and
    beta [1, 1, F] and TTT-Linear's first W = (W1 [1, F, F], b1 [1, 1, F]). Cut the tokens into mini-batches
    of b (which divides L). At each measure how wrong f is before it learns: 1/2 || k + LN(f(k)) - v ||^2,
    summed over channels, averaged over tokens, without eta; `read` gives k + LN(f(k)), with INNER["linear"]
    as f. Then take a step, step_autograd with k as q, and go on with its W. Return a tensor [L/b].
    """
    W, k, *rest = first_step_inputs()
    losses = judge(source, "first_step", (W, k, *rest))
    strange = written(source, "first_step")(W, k.flip(1), *rest)
    assert losses[-4:].mean() < losses[0] / 4 and strange[-4:].mean() > strange[0] / 2, "does k decide v?"


def test_exercise_01_the_gradient_through_layernorm(source):
    """l2_gradient(Z, target, gamma, beta, eps) -> gradient

    The derivative of 1/2 || gamma xh + beta - target ||^2, summed over everything, with respect to Z, by
    hand: no autograd, no backward function of torch. Z and target [n, b, F], gamma and beta [n, 1, F]; xh =
    (Z - mean) / sqrt(variance + eps) over the last axis, the variance divided by F. Return [n, b, F].
    """
    _, Z, target, _, _, gamma, beta, eps = inner_step("linear")
    leaf = Z.clone().requires_grad_()
    error = gamma * nnf.layer_norm(leaf, Z.shape[-1:], eps=eps) + beta - target
    right, = torch.autograd.grad(0.5 * error.square().sum(), leaf)
    judge(source, "l2_gradient", (Z, target, gamma, beta, eps), right)


def test_exercise_02_a_dual_form_with_a_causal_mask(source):
    """causal_dual(W, q, k, v, eta, gamma, beta, eps) -> z

    TTT-Linear for text, where no token may know a later one. All gradients of a mini-batch are taken at the W
    in hand, as always, but token i reads a W that has stepped on tokens 0 .. i only, itself included. Write
    the dual form: no loop, no new W. Given are W = (W1 [n, F, F], b1 [n, 1, F]), q, k, v [n, b, F], eta [n,
    b, 1], gamma, beta [n, 1, F]. Return q + LN(...) [n, b, F]. gradient_on_output may be used, with
    INNER["linear"] as f.
    """
    W, q, k, v, eta, *rest = inputs = inner_step("linear")
    steps = [eta * (torch.arange(10)[:, None] <= i) for i in range(10)]               # later tokens have 0
    right = [step_autograd(INNER["linear"], W, q, k, v, eta, *rest)[0][:, i] for i, eta in enumerate(steps)]
    judge(source, "causal_dual", inputs, torch.stack(right, dim=1))


def test_exercise_03_the_primal_form_with_momentum(source):
    """momentum_step(W, velocity, q, k, v, eta, gamma, beta, eps, mu) -> z, W, velocity

    A mini-batch of TTT-MLP whose inner optimizer has momentum: velocity <- mu velocity + dl/dW (it points
    uphill), then W <- W - velocity, then q is read with the new W. W and velocity are tuples of W1 [n, F, E],
    b1 [n, 1, E], W2 [n, E, F] and b2 [n, 1, F], mu is a number, the rest is as in exercise 2; GELU is the
    tanh approximation. Return the output [n, b, F] and two tuples as given. No autograd; gradient_on_output
    and INNER["mlp"].gradient may be used.
    """
    W, q, k, v, eta, gamma, beta, eps = inner_step("mlp")
    velocity, leaves = tuple(0.1 * w.roll(1, dims=-1) for w in W), [w.clone().requires_grad_() for w in W]
    loss = (0.5 * eta * (read(INNER["mlp"], leaves, k, gamma, beta, eps) - v).square()).sum()
    speeds = [0.7 * old + g for old, g in zip(velocity, torch.autograd.grad(loss, leaves))]
    new = [w - speed for w, speed in zip(W, speeds)]
    judge(source, "momentum_step", (W, velocity, q, k, v, eta, gamma, beta, eps, 0.7),
          (read(INNER["mlp"], new, q, gamma, beta, eps), new, speeds))


def test_exercise_04_a_story_told_wholly_backwards(source):
    """reverse_order(segments, text, frame) -> order

    Layout's reverse order leaves a text as it is. Let its words run backwards, too: segments last to first,
    of each the text, last word first, then the video, last token first. Stored are all texts, then all
    frames; `text` tokens a text, `frame` tokens a latent frame, FRAMES latent frames a segment, one more in
    the first. Return where tokens are stored, int64 [L].
    """
    first, second = list(range(4, FRAMES + 5)), list(range(FRAMES + 5, 2 * FRAMES + 5))
    judge(source, "reverse_order", (2, 2, 1), torch.tensor([3, 2, *second[::-1], 1, 0, *first[::-1]]))
    judge(source, "reverse_order", (5, 3, 4))


def test_exercise_05_who_sees_whom_inside_segments(source):
    """segment_mask(segments, text, frame) -> mask

    Which token reads which in one local attention: bool [L, L], True where token i (row) reads token j
    (column), tokens as stored, `text` and `frame` as in exercise 4. Segment i attends over its own text and
    its latent frames FRAMES i .. FRAMES (i + 1), the last included; all these read each other.
    """
    layout, attention = Layout(3, 2, (3 * FRAMES + 1, 1, 1)), LocalAttention(TINY)
    x = torch.randn(1, layout.tokens, TINY.dim)
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(x, layout).sum((0, 2)), x)
    judge(source, "segment_mask", (3, 2, 1), jacobian[:, 0].abs().sum(-1) > 0)        # [L, L]


def test_exercise_06_a_gated_delta_step(source):
    """delta_step(S, q, k, v, g, beta) -> out, S

    A token of Gated DeltaNet (equation: appendix/memories.py): the state S [K, V] fades to e^g S, where g <=
    0 is a *log* decay; what it then answers for k is corrected towards v, by the fraction beta; the new state
    is asked q. q and k [K] (k of length 1), v [V]; g and beta are tensors []. Return the answer [V], divided
    by sqrt(K) as scores of attention are, and the new S.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 4, 6))
    k, g, beta = nnf.normalize(k, dim=-1), -v[:, 0].abs(), v[:, 1].sigmoid()
    _, before = memories.gated_delta_rule(*(x[None, None, :4] for x in (q, k, v, g, beta)))
    outs, after = memories.gated_delta_rule(*(x[None, None] for x in (q, k, v, g, beta)))
    judge(source, "delta_step", (before[0, 0], q[4], k[4], v[4], g[4], beta[4]), (outs[0, 0, 4], after[0, 0]))


def test_exercise_07_a_ddim_step_from_a_noise_prediction(source):
    """noise_step(x, noise, alpha_bar, next_bar) -> x_next, v

    Our network predicts v, many others the noise. Take a DDIM step with one of those: x = sqrt(alpha_bar) x_0
    + sqrt(1 - alpha_bar) noise; x and the predicted noise are given, of any shape, alpha_bar and next_bar as
    tensors []. Return where the same x_0 and the same noise lead at next_bar, and the v that our network
    would have said at x, so at alpha_bar.
    """
    x_0, noise = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).double()
    bar, after = alphas_cumprod()[[600, 300]]
    x, v = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise, bar.sqrt() * noise - (1 - bar).sqrt() * x_0
    judge(source, "noise_step", (x, noise, bar, after), (after.sqrt() * x_0 + (1 - after).sqrt() * noise, v))


def test_exercise_08_a_gate_of_a_head(source):
    """head_gates(x, layer, order, alpha, beta) -> x

    Eq 6 to 12 around any layer, with a gate for a head and not for a channel. x [B, L, H F], the channels of
    a head side by side; layer maps [B, L, H F] to the same; alpha and beta [H] are what tanh is taken of, for
    the story forwards and then backwards, which x[:, order] is; order is any permutation, not its own
    inverse. Return [B, L, H F], tokens in the order of x.
    """
    x, weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double().split([14, 6])
    order, gates = torch.tensor([1, 0, 6, 5, 4, 2, 3]), torch.tensor([[0.5, -0.2], [-1.5, 0.7]]).double()
    layer = lambda x: (x @ weight).cumsum(1)                  # anything that is not the same backwards
    judge(source, "head_gates", (x.view(2, 7, 6), layer, order, *gates))


def test_exercise_09_how_large_a_mini_batch(source):
    """mini_batch_curve(sizes, weights, k, v, eta, gamma, beta) -> {b: (error, seconds)}

    For each b of `sizes` read keys k and values v [B, H, L, F] once, with ttt_scan, kind "mlp", mini-batches
    of b tokens and step sizes eta / b (eta [B, H, L] is for a whole mini-batch), k as q, the rest as ttt_scan
    takes it. `seconds` is how long that took. Then ask the last weights: a second scan, with eta 0, only
    reads, and `error` is the mean squared error of its output against v, a float.
    """
    judge(source, "mini_batch_curve", ((8, 16, 32, 64), *learnable("mlp", 2, 32, torch.float32)),
          look=lambda curve: torch.tensor([pair[0] for _, pair in sorted(curve.items())]), tolerance=1e-5)


GATED = Config(eta_mlp=12.0, ttt_std=0.2)                     # fresh layers that can be heard


def test_exercise_10_how_far_the_gate_is_open_at_first(source, world):
    """gate_curve(inits, steps, runs, config, weights) -> {init: (losses, heard)}

    For each gate_init of `inits` (a field of config) take the network new_model(weights, config), `weights` a
    file without TTT, whose fresh layers config.seed decides, and train all of it: Stage(1, steps, 2, 1e-3,
    5e-4, everything=True), the groups of make_optimizer(model, stage, config) at 1e-3 where group["new"] and
    5e-4 elsewhere. The only batch of step 0, 1, ... is next(draw(runs, stage, config, "3s", step)), its loss
    diffusion_loss(model, *batch). Return two lists of floats for each: the losses, and what the layers hear,
    the norm of the gradient on all new parameters (is_new(name)) but those with "gate_" in their name.
    """
    judge(source, "gate_curve", ((0.0, 0.5), 2, dataset.Runs(world, 1), GATED, PRETRAINED),
          look=lambda curves: torch.tensor([pair for _, pair in sorted(curves.items())]), tolerance=1e-4)


def test_exercise_11_a_kernel_that_waits_for_ever(source, tmp_path):
    """without_a_wait(source) -> source, hanging

    Take one wait_full or wait_empty out of ttt_forward_kernel (source is the text of ttt_kernel.cu), so that
    all three roles wait for ever although none of them is slow: already while the learners load their first
    W. Return the new text, and on whose Ring each role then waits (all three do): a dict with the keys
    "producer", "learner", "reader" and values such as "kv" for s.kv. appendix/hopper.py runs it without a GPU
    (20 to 50 seconds a try), here with two multiprocessors a head, five mini-batches and three orders of
    events.
    """
    hopper = pytest.importorskip("appendix.hopper", reason="appendix/hopper.py is not there")
    if not shutil.which("nvcc") or not os.environ.get("THUNDERKITTENS_ROOT"):
        pytest.skip("needs nvcc on PATH and ThunderKittens in THUNDERKITTENS_ROOT")
    text, roles = hopper.KERNEL.read_text(), ("learner", "learner", "reader", "producer")     # 4 warps each
    arguments = chip_arguments(*chip_inputs(1, 1, 5 * 64))

    def look(x):                                              # one wait is out, it hangs, and there
        found, path = {}, tmp_path / "kernel.cu"
        path.write_text(x[0])
        for seed in range(3):
            try:
                hopper.Chip(path, seed).forward(arguments, 16, 2)
            except hopper.Fault as fault:
                for warps, ring in re.findall(r"warps ([\d. ]+) wait on .*wait_\w+\(s\.(\w+)", str(fault)):
                    found |= {roles[int(warp[2:]) // 4]: ring for warp in warps.split()}
        return torch.tensor([text.count("wait_") == x[0].count("wait_") + 1, bool(found), found == x[1]])

    judge(source, "without_a_wait", (text,), torch.ones(3), look)


def test_exercise_12_how_many_votes_are_a_difference(source):
    """elo(wins) -> scores; elo_errors(wins, resamples) -> errors; votes_needed(better, worse) -> votes

    People saw pairs of videos, and preferred layer i to layer j wins[i, j] times (float64 [n, n]), by Bradley
    and Terry with probability 1 / (1 + 10^((score_j - score_i) / 400)). elo: the scores [n] of largest
    likelihood whose mean is 1000. elo_errors: their standard deviation [n] if the votes on each pair are
    drawn again, as many, with replacement, `resamples` times (as many on the average, as by Poisson's
    numbers, will do). votes_needed: for two scores, that of the better and that of the worse layer, how many
    votes on their pair put the share to expect, p, two standard errors sqrt(p (1 - p) / votes) from 1/2; an
    int, rounded up.
    """
    wins = torch.tensor([[0, 70, 40, 9], [30, 0, 33, 70], [8, 27, 0, 61], [1, 20, 39, 0]]).double()
    judge(source, "elo", (wins,), tolerance=1e-6)
    judge(source, "elo_errors", (wins, 1000), tolerance=0.1)
    judge(source, "votes_needed", (1033, 999))


def experiment(number):
    """exercise_NN.png: the curves of exercise 0, 9 or 10, by exercises.py where it has the function."""
    name = {0: "first_step", 9: "mini_batch_curve", 10: "gate_curve"}[number]
    curve, file = yours(name) or answer(name), f"exercise_{number:02}.png"
    plot = functools.partial(dataset.plot, title=name if yours(name) else f"{name} (the answer)")
    if number == 0:
        with plot(Path(file), xlabel="mini-batch", ylabel="inner loss before the step") as axes:
            W, k, *rest = first_step_inputs()
            for label, keys in ("their own keys", k), ("keys of other tokens", k.flip(1)):
                axes.plot(curve(W, keys, *rest).detach(), label=label)
    elif number == 9:
        sizes = 2, 4, 8, 16, 32, 64, 128, 256
        error, seconds = np.array([*curve(sizes, *learnable("mlp", 2, 32, torch.float32)).values()]).T
        with plot(Path(file), xlabel="b, tokens of a mini-batch", xscale="log", yscale="log") as axes:
            axes.plot(sizes, error, marker="o", label="error of v at the end")
            axes.plot(sizes, seconds / seconds[-1], marker="s", label="time, b = 256 is 1")
    else:
        with tempfile.TemporaryDirectory() as folder:
            dataset.make_world(Path(folder), 4)
            curves = curve((0.0, 0.03, 0.1, 0.3, 1.0), 60, dataset.Runs(folder, 1), GATED, PRETRAINED)
        for heard, label in enumerate(("loss above that of gates at 0", "gradient that the layers hear")):
            file = file.replace("10.", "10_heard.") if heard else file
            with plot(Path(file), xlabel="step", ylabel=f"{label}, mean of 10", yscale="log") as axes:
                for init in curves:
                    values = np.array(curves[init][heard]) - (0 if heard else np.array(curves[0.0][0]))
                    axes.plot(np.convolve(values, np.ones(10) / 10, mode="valid"), label=f"gate_init {init}")
    print(f"look at {file}")


# python test_ttt.py --bench ------------------------------------------------------------------------------


def measure(call, repeats=3):
    """Median of the seconds that a call takes, after one to warm up, and its peak in MB."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2], peak_bytes(call) / 1e6


def bench():
    """Seconds and peak MB, forward and backward: of the scan by backend, of a training step by layer."""
    gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads", torch.__version__)
    cpu = "cpu", torch.float32, ("autograd", "dual", "primal", "torch")
    cases = [(4, 64, 64, 1, 6400, *cpu), (4, 32, 64, 8, 352, *cpu)]
    if gpu:                                                   # 9 and 63 seconds of the real model
        cases += [(48, 64, 64, 1, tokens, "cuda", torch.bfloat16, ("torch", "triton", "cuda"))
                  for tokens in (50_628, 346_296)]
    for H, width, b, B, L, device, dtype, backends in cases:
        print(f"scan on {device}: B {B}, H {H}, F {width}, b {b}, {L} tokens, {dtype}")
        for kind, backend in itertools.product(("mlp", "linear"), backends):
            if (kind, backend) != ("linear", "cuda"):
                inputs = kernel_inputs(kind, dtype, width, b, L, B, H, device, 0.02)
                seconds, peak = measure(lambda: scan_and_back(kind, *inputs, backend, b, 16))
                print(f"  {f'TTT-{kind}, backend {backend}':<30} {seconds:>8.4f} {peak:>8.0f}", flush=True)
    print("a training step of pocket, and in brackets relative to local (the paper's Figure 6)")
    for stage, batch in ("3s", 8), ("9s", 4), ("18s", 2), ("63s", 1):
        local = None
        for layer in sorted(LAYERS, key="local".__ne__):
            model = DiT(Config(layer=layer))
            batches = *random_latents(model.config, STAGES[stage].segments, batch), torch.full((batch,), 500)
            numbers = measure(lambda: diffusion_loss(model, *batches, batches[0]).backward())
            local = local or numbers
            cells = "".join(f"{x:>9.2f} ({x / first:.2f})" for x, first in zip(numbers, local))
            print(f"  {f'{stage} x {batch} videos, {layer}':<30}{cells}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The tests run by: python -m pytest -q test_ttt.py")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--bench", action="store_true", help="time the scan and a training step")
    action.add_argument("--experiment", type=int, metavar="N", help="plot an experiment of the exercises")
    args = parser.parse_args()
    bench() if args.bench else experiment(args.experiment)
