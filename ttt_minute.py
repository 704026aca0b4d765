"""One-Minute Video Generation with Test-Time Training (arXiv 2504.05298), in one file.

A diffusion transformer (DiT) makes 3-second clips well. To tell a one-minute story it must remember
what the red room looked like forty seconds ago. Full attention remembers everything and costs 11 times as
much as attention inside 3-second segments; a recurrent layer is cheap and forgets, because its hidden state
is small. Test-time training (TTT) makes the hidden state itself a small network f with weights W, and lets
*reading* the sequence mean *training* f on it, one gradient step per 64 tokens. This file adds such layers,
behind a gate, to CogVideoX, keeps attention inside each 3-second segment, and trains the whole in stages up
to a minute.

    python ttt_minute.py --stage 9s            # renders a small cartoon world, trains, ends with a video
    python sample.py --stage 9s --storyboard story.txt --out video.mp4

Read [1] the paper; [2] Sun et al., Learning to (Learn at Test Time), 2407.04620, for the TTT layer;
[3] Yang et al., CogVideoX, 2408.06072, for the DiT; [4] Salimans & Ho, 2202.00512, for v-prediction.

Glossary: code (paper)
    B, S, L, N        batch; 3-second segments; tokens in the whole sequence; text tokens of a segment
    T, h, w, C        latent frames (12 S + 1), latent height and width in patches, latent channels
    D, H, F, E        model width; heads; head width; inner hidden width E = 4F (TTT-Linear has none)
    M, b              mini-batches; tokens of one mini-batch (the paper's b)
    W                 the hidden state: weights of the inner model f, (W1, b1) or (W1, b1, W2, b2)
    q, k, v           theta_Q x, theta_K x, theta_V x: what f is asked, shown, and should answer, as v - k (eq 4, 5)
    eta               the inner learning rate of each token
    gamma, beta       scale and shift of the LayerNorm around f
    alpha, beta       in the paper only: the gates of the forward and the backward direction (eq 6 to 12)
    DIFF:             marks every departure from the paper or from its published code, with the reason

Map
     1  Config, presets and stages        6  Attention inside a segment
     2  Parts                             7  The other memories: a window, linear recurrences
     3  One sequence out of many segments 8  Gate, both directions, block, model
     4  The inner loop (the heart), K     9  Diffusion
     5  The TTT layer                    10  Training in stages; before it P, F, after it C
    Skip on first reading: K, kernels; P, many devices and what it all costs; F, files; C, the command line
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import dataset
from dataset import Parser, UserError, atomic, run_main

# ----------------------------------------------------------------------------------------------------
# 1. Config, presets and stages
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network and its training. The defaults are the preset "pocket"."""

    preset: str = "pocket"          # a row of PRESETS
    layer: str = "ttt_mlp"          # a key of LAYERS: what carries memory across segments

    # The latent video and its text
    channels: int = 16              # C, latent channels
    height: int = 8                 # latent rows and columns before patching
    width: int = 12
    text_len: int = 40              # N, text tokens of a segment
    text_dim: int = 64              # width of the text encoder's output

    # The transformer (section 4.1 of the paper: CogVideoX-5B)
    depth: int = 4
    heads: int = 4                  # H
    head_width: int = 32            # F
    time_dim: int = 128             # width of the timestep embedding
    patch: int = 2
    norm_eps: float = 1e-5          # LayerNorms of the blocks; DIFF: the published code uses 1e-6, the weights were made with 1e-5
    qk_norm_eps: float = 1e-6       # LayerNorm of q and k inside attention
    rope_theta: float = 10000.0

    # The inner loop (sections 2.3 and 3.4). A small world has few inner steps, so it needs bolder ones
    # than the paper's eta 0.1 and std 0.02, which assume the 5,411 mini-batches of a minute at 5b.
    mini_batch: int = 64            # b
    eta_mlp: float = 12.0           # eta_base of TTT-MLP
    eta_linear: float = 1.0         # eta_base of TTT-Linear
    ttt_std: float = 0.2            # standard deviation of the initial W1 and W2
    ttt_proj_std: float = 0.09      # of the linear maps around the scan: 1/sqrt(D), as the paper's 0.02 is at D = 3072
    ttt_eps: float = 1e-8           # epsilon of the inner LayerNorm
    scan_checkpoint: int = 4        # the scan keeps W every so many mini-batches, for its backward pass
    decay: float = 1.0              # scales how fast Mamba 2 and Gated DeltaNet forget at the start; 1 as published
    gate_init: float = 0.3          # alpha at the start (eq 6): small, so that untrained layers disturb little; at 0 they vanish
    backend: str = "auto"           # of ttt_scan: auto, triton, cuda, torch, dual or autograd

    # Training (appendix A)
    snr_shift: float = 3.0          # > 1 means more noise; 3 as in CogVideoX-2B, 1 as in CogVideoX-5B
    warmup: float = 0.02            # fraction of a stage's steps
    clip: float = 0.1               # gradient norm
    weight_decay: float = 1e-4      # on matrices only
    text_dropout: float = 0.1       # how often all text of a sample is zeroed, for classifier-free guidance
    micro_batch: int = 8            # videos on the device at once; the gradients of a batch are summed over them
    recompute: bool = False         # keep the inputs of blocks only, and recompute the rest in the backward pass
    compile: bool = False           # torch.compile the blocks, all but the scan
    seed: int = 0

    @property
    def dim(self):                  # D
        return self.heads * self.head_width

    @property
    def window(self):               # W of sliding-window attention: 8192 of a segment's 17,776 tokens at 5b (section 4.1)
        return max(1, round((self.text_len + math.prod(self.grid(1))) * 8192 / 17776))

    @property
    def frame_size(self):           # height and width in pixels: the codec has a factor of 8
        return 8 * self.height, 8 * self.width

    @property
    def text_size(self):            # tokens of a segment, and their width
        return self.text_len, self.text_dim

    def grid(self, segments):       # (T, h, w) of a video, in tokens
        return 12 * segments + 1, self.height // self.patch, self.width // self.patch


PAPER = dict(scan_checkpoint=16, gate_init=0.1, eta_mlp=0.1, eta_linear=1.0, ttt_std=0.02, ttt_proj_std=0.02, snr_shift=1.0)

PRESETS = {
    "pocket": dict(),
    "small": dict(height=16, width=24, depth=12, heads=8, head_width=64, time_dim=512,
                  ttt_std=0.05, ttt_proj_std=0.04, eta_mlp=1.0, micro_batch=1, recompute=True),
    "5b": dict(height=60, width=90, text_len=226, text_dim=4096, depth=42, heads=48, head_width=64, time_dim=512,
               micro_batch=1, recompute=True, **PAPER),
}


@dataclass(frozen=True)
class Stage:
    """One row of Table 2: adapt to longer videos, starting from the stage before."""

    segments: int                   # S, of 3 seconds each
    steps: int
    batch: int                      # videos a step
    lr_new: float                   # learning rate of TTT layers and gates
    lr_rest: float                  # learning rate of everything else that trains
    schedule_new: str = "constant"  # "cosine" falls to LR_END
    schedule_rest: str = "constant"
    everything: bool = False        # train all parameters; else only TTT, gates and local attention (QKVO and its norms)
    lr_muon: float = 0.0            # > 0: matrices of the blocks learn by Muon instead of AdamW, at this rate
    noise: tuple = (0.0, 1.0)       # diffusion timesteps are drawn from this part of 0 .. 999
    minutes: float = 0.0            # > 0: of training, in which the schedule of `steps` is walked through at the pace of the machine


PAPER_STAGES = {
    "3s": Stage(1, 5000, 64, 1e-4, 1e-5, "cosine", everything=True),
    "9s": Stage(3, 5000, 64, 1e-5, 1e-5),
    "18s": Stage(6, 1000, 64, 1e-5, 1e-5),
    "30s": Stage(10, 500, 64, 1e-5, 1e-5),
    "63s": Stage(21, 250, 64, 1e-5, 1e-5),
}
LR_END = 1e-5                       # where the cosine schedule ends

# A small network learns with larger steps, and a laptop affords fewer of them. "pretrain" stands in for
# CogVideoX-5B: 3-second clips, layer "local", shared by all layers; its weights ship in assets/. It is not part of the
# paper's recipe, so it may use Muon, which learns faster than AdamW here.
# DIFF: pocket and small train stages longer than a segment at high noise only, where the colours of a scene are decided. With
# less noise a scene shows its own colours, with more no scene shows any: only in between does another scene have something to tell.
RETURNS = dict(schedule_rest="cosine", noise=(0.8, 0.96))
POCKET_STAGES = {
    "pretrain": Stage(1, 4000, 8, 4e-3, 4e-3, "cosine", "cosine", everything=True, lr_muon=0.05),
    "3s": Stage(1, 40, 8, 5e-4, 5e-4, "cosine", "cosine", everything=True),
    "9s": Stage(3, 800, 4, 3e-3, 5e-4, **RETURNS),
    "18s": Stage(6, 700, 2, 2e-3, 3e-4, **RETURNS),
    "30s": Stage(10, 250, 2, 1e-3, 2e-4, **RETURNS),
    "63s": Stage(21, 400, 1, 1e-3, 2e-4, **RETURNS),
}
# The preset in between starts from nothing too, and is meant for a GPU. Not yet run on one: these numbers are a first guess.
SMALL_STAGES = {
    "pretrain": Stage(1, 20000, 32, 1e-3, 1e-3, "cosine", "cosine", everything=True, lr_muon=0.02),
    "3s": Stage(1, 1000, 32, 1e-3, 2e-4, "cosine", "cosine", everything=True),
    "9s": Stage(3, 3000, 16, 5e-4, 2e-4, **RETURNS),
    "18s": Stage(6, 1000, 8, 2e-4, 1e-4, **RETURNS),
    "30s": Stage(10, 500, 8, 2e-4, 1e-4, **RETURNS),
    "63s": Stage(21, 500, 4, 2e-4, 1e-4, **RETURNS),
}
PRESET_STAGES = {"pocket": POCKET_STAGES, "small": SMALL_STAGES, "5b": PAPER_STAGES}
STAGES = {"pretrain": POCKET_STAGES["pretrain"]} | PAPER_STAGES      # every name there is


# ----------------------------------------------------------------------------------------------------
# 2. Parts
# ----------------------------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """Diffusion timestep -> vector: sinusoids [cos, sin] of width D, then two linear maps."""

    def __init__(self, config):
        super().__init__()
        self.width = config.dim
        self.linear_1 = nn.Linear(config.dim, config.time_dim)
        self.linear_2 = nn.Linear(config.time_dim, config.time_dim)

    def forward(self, t):                                                             # [B]
        half = self.width // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None].float() * frequency                                        # [B, D/2]
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)                     # [B, D]
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


def modulate(x, shift, scale):                                                        # adaLN
    return x * (1 + scale) + shift


@functools.lru_cache(maxsize=64)
def rope_table(grid, width, theta, device):
    """exp(i angle) of the 3D rotary embedding for a (t, h, w) grid of tokens, complex [t h w, width/2].

    A quarter of the channels turns with time, three eighths each with height and width. Tokens are in
    (t, h, w) order, positions are integers from 0, angles are fp32.
    """
    widths = width // 4, 3 * width // 8, 3 * width // 8
    angles = []
    for axis, length in enumerate(grid):
        frequency = theta ** -(torch.arange(0, widths[axis], 2).float() / widths[axis])
        angle = torch.arange(length).float()[:, None] * frequency                     # [length, widths/2]
        shape = [1, 1, 1, -1]
        shape[axis] = length
        angles.append(angle.reshape(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)                                   # [t h w, F/2]
    return torch.polar(torch.ones_like(angle), angle).to(device)


def rotate(x, table):
    """Turn neighbouring pairs of channels of x [..., L, F] by the angles of a RoPE table: products of complex numbers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(wide) * table).flatten(-2).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


# ----------------------------------------------------------------------------------------------------
# 3. One sequence out of many segments
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the tokens of a video of S segments lie in a sequence. A value: it carries no activations.

    The network stores all texts, then all frames. Layers that scan the whole video want the order in which
    a story is told: text_0 video_0 text_1 video_1 ... (section 3.2). Segment 0 owns latent frames 0..12, segment
    i > 0 owns frames 12i+1 .. 12i+12. The reverse order visits the segments backwards, each text, itself
    unreversed, before its own segment's video, whose tokens run fully backwards.
    DIFF: the published code reverses all video tokens first and then cuts 13 + 12 + 12 ..., which moves
    every segment's boundary by a frame.
    """

    segments: int                   # S
    text: int                       # N, tokens of a segment's text
    grid: tuple                     # (T, h, w) of the video in tokens, T = 12 S + 1
    reversed: bool = False

    def __post_init__(self):
        if self.grid[0] != 12 * self.segments + 1:
            raise ValueError(f"{self.segments} segments have {12 * self.segments + 1} latent frames, not {self.grid[0]}")

    @property
    def frames(self):               # that each segment owns: 13, 12, 12, ...
        return [13] + [12] * (self.segments - 1)

    @property
    def text_tokens(self):          # S N: video tokens start here in storage
        return len(self.frames) * self.text

    @property
    def tokens(self):               # L
        return self.text_tokens + sum(self.frames) * math.prod(self.grid[1:])

    def reverse(self):
        return dataclasses.replace(self, reversed=not self.reversed)

    def to_scan(self, x):                                                             # [B, L, D] stored -> scan order
        return x.index_select(1, scan_order(self, x.device))

    def from_scan(self, x):                                                           # [B, L, D] scan order -> stored
        return x.index_select(1, scan_order(self, x.device).argsort())

    # One device has all tokens and all heads. Where several share a video each has the tokens of some segments, and what
    # follows exchanges what is missing (Part, section P); here it does nothing.

    def own(self, video, texts):    # [B, T, ...] and [B, S, ...] -> the latent frames and texts that are here
        return video, texts

    def with_border(self, y):       # [B, H, L, F] as stored -> frames behind the past's last one, if that is elsewhere
        return y

    def merge_border(self, y):      # and back, the two outputs of a shared frame averaged
        return y

    def by_head(self, y):           # [B, H, L, ...]: all heads of tokens that are here -> the heads that are here, of all tokens in
                                    # scan order; a single head serves everybody
        return y

    def by_token(self, y):          # and back
        return y

    def own_heads(self, parameter): # [H, ...] -> the heads that are here
        return parameter

    def pieces(self, heads):        # into which every head is cut, so that all devices have as many
        return 1

    @property
    def whole(self):                # the layout of all tokens
        return self

    @property
    def inside(self):               # the layout of what with_border returns
        return self


@functools.lru_cache(maxsize=64)
def scan_order(layout, device):
    """Where each token of the scan order is stored: int64 [L]."""
    text = torch.arange(layout.text_tokens).split(layout.text)                        # S pieces of [N]
    frame = layout.grid[1] * layout.grid[2]
    video = torch.arange(layout.text_tokens, layout.tokens)
    video = video.split([frames * frame for frames in layout.frames])                 # S pieces
    pieces = list(zip(text, video))
    if layout.reversed:
        pieces = [(words, tokens.flip(0)) for words, tokens in reversed(pieces)]
    return torch.cat([part for piece in pieces for part in piece]).to(device)


@functools.lru_cache(maxsize=64)
def scan_rope(layout, width, theta, device):
    """RoPE for a whole scan, complex [L, F/2]: text is not turned; video positions count along the
    order given, so in the reverse order t, h and w all run backwards."""
    is_video = scan_order(layout, device) >= layout.text_tokens                       # [L]
    table = torch.ones(layout.tokens, width // 2, dtype=torch.complex64, device=device)
    table[is_video] = rope_table(layout.grid, width, theta, device)
    return table


# ----------------------------------------------------------------------------------------------------
# 4. The inner loop (the heart)
#
# The hidden state is W, the weights of a small model f. Reading a mini-batch of b tokens means one step of
# gradient descent on a loss that asks f to reconstruct v from k (sections 2.2, 2.3 and 3.4):
#
#     l(W) = sum_j eta_j * 1/2 || LN(f(k_j; W)) - (v_j - k_j) ||^2          f learns the residual v - k   (eq 4)
#     W <- W - dl/dW                                                         one step a mini-batch         (eq 13)
#     z_j = q_j + LN(f(q_j; W))                                              with the UPDATED W            (eq 14)
#
# The step comes first, so that a token's output knows its own mini-batch too. All b tokens read the same W, which has seen
# all of them: there is nothing to mask. That is allowed because diffusion denoises all tokens at once; none is predicted
# from those before it. The learning rate of each token is in the loss, so the step is 1.
#
# Between mini-batches only W is carried. A scan starts from a learned W, the same for every video, and drops its last one.
#
# One mini-batch, tensors [n, b, F] with n = batch x heads (as a size F is the width of a head, in code torch's functional);
# W = (W1 [n,F,F], b1 [n,1,F]) for TTT-Linear or (W1 [n,F,E], b1 [n,1,E], W2 [n,E,F], b2 [n,1,F]) for TTT-MLP; eta [n,b,1];
# gamma, beta [n,1,F] belong to LN.
# ----------------------------------------------------------------------------------------------------


def inner_model(W, x):
    """f(x; W): a linear map, or two with a GELU between them (section 2.3)."""
    Z = x @ W[0] + W[1]
    if len(W) == 4:
        Z = F.gelu(Z, approximate="tanh") @ W[2] + W[3]
    return Z


def read(W, q, gamma, beta, eps):
    """z = q + LN(f(q; W)), the output rule (eq 5)."""
    return q + gamma * F.layer_norm(inner_model(W, q), q.shape[-1:], eps=eps) + beta


def step_autograd(W, q, k, v, eta, gamma, beta, eps):
    """The definition: a loss, its gradient, a step. Returns z and the updated W."""
    outer_gradients = torch.is_grad_enabled()
    with torch.enable_grad():
        W = [w if w.requires_grad else w.detach().requires_grad_() for w in W]
        error = read(W, k, gamma, beta, eps) - v                                      # k + LN(f(k)) - v
        loss = 0.5 * (eta * error.square()).sum()
        gradient = torch.autograd.grad(loss, W, create_graph=outer_gradients)
    W = [w - g for w, g in zip(W, gradient)]
    return read(W, q, gamma, beta, eps), W


# The gradient of that loss is short enough to write by hand. Normalisation gives xh = (Z - mean) r with r = 1/std, and
# its Jacobian J is symmetric: a gradient p on xh is the gradient J[p] = r (p - mean(p) - xh mean(p xh)) on Z.


def normalise(Z, eps):
    """xh, and what J needs: (Z, mean, r). Biased variance, eps inside the root."""
    xh, mean, r = torch.native_layer_norm(Z, Z.shape[-1:], None, None, eps)
    return xh, (Z, mean, r)


def J(p, statistics):
    Z, mean, r = statistics
    return torch.ops.aten.native_layer_norm_backward(p, Z, Z.shape[-1:], mean, r, None, None, [True, False, False])[0]


def over_tokens(x):                                                                   # [n, b, F] -> [n, 1, F]
    return x.sum(-2, keepdim=True)


def gelu_derivatives(x, order):
    """gelu_tanh(x) = x s, s = sigmoid(z), z = c x (1 + d x^2), c = sqrt(8 / pi), and its first `order` derivatives. Overwrites x.

    With r = z' = c (1 + 3 d x^2) and v = x r, so that z = (v + 2c x) / 3, they are s (1 + v (1 - s)) and
    (r (v (1 - 2s) + 4) - 2c) s (1 - s).
    """
    c, d = math.sqrt(8 / math.pi), 0.044715
    r = (x * x).mul_(3 * c * d).add_(c)
    v = x * r if order == 2 else r.mul_(x)
    s = torch.add(v, x, alpha=2 * c).mul_(1 / 3).sigmoid_()
    if order == 2:
        second = r.mul_(torch.addcmul(v, v, s, value=-2).add_(4)).sub_(2 * c).mul_(s)
        second.addcmul_(second, s, value=-1)
    first, y = v.addcmul_(v, s, value=-1).add_(1).mul_(s), x.mul_(s)
    return (y, first, second) if order == 2 else (y, first)


def step_dual(W, q, k, v, eta, gamma, beta, eps):
    """The naive dual form: the outputs without ever forming the new W1 and W2 for them.

    f(q; W - dl/dW) = q W1 + b1 - (q k^T + 1) * eta  G1, and the same once more for the second layer. G1 is the gradient
    of 1/2 ||.||^2 on Z1 = k W1 + b1, before eta. The paper's lineage computes TTT so; because nothing is masked, the
    b x b products can be folded into the new W at once, and the primal form below is equal and cheaper (7 products of
    b x F x E against 9.5 where b = F). This form stays as what everything faster is tested against.
    """
    xh, statistics = normalise(inner_model(W, k), eps)
    G = J(gamma * (gamma * xh + beta - (v - k)), statistics)                          # [n, b, F]
    eta_row = eta.mT                                                                  # [n, 1, b]
    if len(W) == 2:
        W1, b1 = W
        Zb = q @ W1 + b1 - ((q @ k.mT + 1) * eta_row) @ G
        W = W1 - k.mT @ (eta * G), b1 - (eta * G).sum(-2, keepdim=True)
    else:
        W1, b1, W2, b2 = W
        Z1 = k @ W1 + b1                                                              # [n, b, E]
        X2 = F.gelu(Z1, approximate="tanh")
        G2, G1 = G, torch.ops.aten.gelu_backward(G @ W2.mT, Z1, approximate="tanh")
        Zb1 = q @ W1 + b1 - ((q @ k.mT + 1) * eta_row) @ G1
        Xb2 = F.gelu(Zb1, approximate="tanh")
        Zb = Xb2 @ W2 + b2 - ((Xb2 @ X2.mT + 1) * eta_row) @ G2
        W = (W1 - k.mT @ (eta * G1), b1 - (eta * G1).sum(-2, keepdim=True),
             W2 - X2.mT @ (eta * G2), b2 - (eta * G2).sum(-2, keepdim=True))
    xhb, _ = normalise(Zb, eps)
    return q + gamma * xhb + beta, W


class InnerGradient(NamedTuple):
    """What dl/dW is made of, and what its own backward pass needs again."""

    xh: torch.Tensor                # Z = f(k; W), normalised
    statistics: tuple               # that J needs
    error: torch.Tensor             # LN(f(k; W)) - (v - k)
    p: torch.Tensor                 # gamma error, the gradient on xh before eta
    gZ: torch.Tensor                # J[p], the gradient on Z before eta
    G: torch.Tensor                 # eta gZ
    X2: torch.Tensor = None         # TTT-MLP: what the second layer reads, GELU(k W1 + b1)
    gX2: torch.Tensor = None        # G W2^T, the gradient on it
    G1: torch.Tensor = None         # gX2 GELU', the gradient on k W1 + b1
    slopes: tuple = None            # GELU's derivatives


def inner_gradient(W, k, shift, eta, gamma, eps, order=1):
    """The primal form. shift = beta - (v - k), so that the error is gamma xh + shift; `order` derivatives of GELU are kept."""
    Z = torch.baddbmm(W[1], k, W[0])                                                  # k W1 + b1
    if len(W) == 4:
        X2, *slopes = gelu_derivatives(Z, order)
        Z = torch.baddbmm(W[3], X2, W[2])
    xh, statistics = normalise(Z, eps)
    error = torch.addcmul(shift, gamma, xh)
    p = gamma * error
    gZ = J(p, statistics)                                                             # the gradient on Z, before eta
    G = eta * gZ
    if len(W) == 2:
        return InnerGradient(xh, statistics, error, p, gZ, G)
    gX2 = torch.bmm(G, W[2].mT)
    return InnerGradient(xh, statistics, error, p, gZ, G, X2, gX2, gX2 * slopes[0], slopes)


def descend(W, k, g):
    """W - dl/dW, the step that an InnerGradient asks for."""
    if len(W) == 2:
        return torch.baddbmm(W[0], k.mT, g.G, alpha=-1), W[1] - over_tokens(g.G)
    return (torch.baddbmm(W[0], k.mT, g.G1, alpha=-1), W[1] - over_tokens(g.G1),
            torch.baddbmm(W[2], g.X2.mT, g.G, alpha=-1), W[3] - over_tokens(g.G))


class PrimalScan(torch.autograd.Function):
    """All mini-batches, one after the other, with the backward pass written out by hand.

    Forward keeps W every `every` mini-batches: one scan of a minute at 5b has 5,411 x 48 heads x 132 KB = 34 GB of them, and
    keeps 2.2 GB. Backward takes these groups last to first: it replays a group from its W, then walks it backwards. Carried
    from step to step is dW, the gradient on the state.
    """

    @staticmethod
    def forward(ctx, q, k, v, eta, gamma, beta, eps, every, *W):                      # q, k, v [M, n, b, F]
        out, kept = torch.empty_like(q), []
        for t, (k_t, shift, eta_t) in enumerate(zip(k, beta - (v - k), eta)):
            if t % every == 0:
                kept += W
            W = descend(W, k_t, inner_gradient(W, k_t, shift, eta_t, gamma, eps))
            out[t] = read(W, q[t], gamma, beta, eps)
        ctx.save_for_backward(q, k, v, eta, gamma, beta, *kept, *W)
        ctx.eps, ctx.every, ctx.size = eps, every, len(W)
        return out, *W

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, *dW):
        q, k, v, eta, gamma, beta, *kept = ctx.saved_tensors
        dq, dk, dv, deta = (torch.empty_like(x) for x in (q, k, v, eta))
        dW, dgamma, shift = [dw.clone() for dw in dW], torch.zeros_like(q[0]), beta - (v - k)
        new = kept[-ctx.size:]                                # the last W: outputs read the W after their step
        for start in reversed(range(0, len(q), ctx.every)):
            W, replay = kept[start // ctx.every * ctx.size:][:ctx.size], []
            for t in range(start, min(start + ctx.every, len(q))):
                if replay:
                    W = descend(W, k[t - 1], gradient)
                gradient = inner_gradient(W, k[t], shift[t], eta[t], gamma, ctx.eps, order=2)
                replay.append((t, W, gradient))
            while replay:
                t, W, gradient = replay.pop()
                dq[t] = backward_of_read(dout[t], new, q[t], gamma, ctx.eps, dW, dgamma)
                dk[t], dv[t], deta[t] = backward_of_step(W, gradient, k[t], eta[t], gamma, dW, dgamma)
                new = W
        dbeta = dout.sum((0, 2)) - dv.sum((0, 2))             # beta stands beside every output and every -(v - k)
        return dq, dk, dv, deta, over_tokens(dgamma), dbeta[:, None], None, None, *dW


def backward_of_read(dout, W, q, gamma, eps, dW, dgamma):
    """Gradient on q of z = q + LN(f(q; W)); what falls on W and gamma is added to dW and dgamma [n, b, F] in place."""
    Z = torch.baddbmm(W[1], q, W[0])
    if len(W) == 4:
        X2, slope = gelu_derivatives(Z, order=1)
        Z = torch.baddbmm(W[3], X2, W[2])
    xh, statistics = normalise(Z, eps)
    dgamma.addcmul_(dout, xh)
    dZ = J(dout * gamma, statistics)
    if len(W) == 4:
        dW[2].baddbmm_(X2.mT, dZ)
        dW[3] += over_tokens(dZ)
        dZ = torch.bmm(dZ, W[2].mT).mul_(slope)
    dW[0].baddbmm_(q.mT, dZ)
    dW[1] += over_tokens(dZ)
    return torch.baddbmm(dout, dZ, W[0].mT)


def backward_of_step(W, gradient, k, eta, gamma, dW, dgamma):
    """Gradients on k, v and eta of one update. On entry dW is the gradient on the new W, on return on the old one."""
    xh, statistics, error, p, gZ, G, X2, gX2, G1, slopes = gradient
    # Through the update W' = W - k^T G: every product here reads dW before anything is added to it.
    if len(W) == 4:
        slope, bend = slopes
        dG1 = torch.baddbmm(dW[1], k, dW[0], alpha=-1, beta=-1)
        dk = torch.bmm(G1, dW[0].mT)                                                  # minus this falls on k
        dG = torch.baddbmm(dW[3], X2, dW[2], alpha=-1, beta=-1)
        dX2 = torch.bmm(G, dW[2].mT)                                                  # minus this falls on X2
        dZ1 = bend.mul_(gX2).mul_(dG1)                                                # through G1 = gX2 * slope, gX2 = G W2^T
        dgX2 = dG1.mul_(slope)
        dG.baddbmm_(dgX2, W[2])
        dW[2].baddbmm_(dgX2.mT, G)
    else:
        dG = torch.baddbmm(dW[1], k, dW[0], alpha=-1, beta=-1)
        dk = torch.bmm(G, dW[0].mT)
    # Through G = eta gZ with gZ = J[p], p = gamma * error. In J = r (p - mean(p) - xh mean(p xh)) xh and r depend on Z as well: the
    # second line of dZ.
    deta = (dG * gZ).sum(-1, keepdim=True)
    U = eta * dG
    w = J(U, statistics)                                                              # the gradient on p
    dp = gamma * w                                                                    # on error, and minus that on v
    dgamma.addcmul_(w, torch.addcmul(error, gamma, xh))
    along_p, along_U, along_gZ = (p * xh).mean(-1, keepdim=True), (U * xh).mean(-1, keepdim=True), eta * deta / xh.shape[-1]
    dZ = J(gamma * dp, statistics)
    dZ -= statistics[2] * (w * along_p).addcmul_(gZ, along_U).addcmul_(xh, along_gZ)
    # Through the first forward pass, Z = f(k; W).
    if len(W) == 4:
        dW[2].baddbmm_(X2.mT, dZ)
        dW[3] += over_tokens(dZ)
        dZ = dX2.baddbmm_(dZ, W[2].mT, beta=-1).mul_(slope).add_(dZ1)
    dW[0].baddbmm_(k.mT, dZ)
    dW[1] += over_tokens(dZ)
    return torch.baddbmm(dp - dk, dZ, W[0].mT), -dp, deta


def ttt_scan(kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch=64, *, eps=1e-8, checkpoint=16, backend="auto"):
    """Read a sequence with a TTT layer's inner model (section 3.4): every mini-batch of tokens is one training step.

    kind        "linear" or "mlp"
    weights     the initial hidden state: (W1 [H,F,F], b1 [H,F]) or (W1 [H,F,4F], b1 [H,4F], W2 [H,4F,F], b2 [H,F]);
                a leading batch axis is allowed
    q, k, v     [B, H, L, F], any L >= 1; the scan itself subtracts k from v
    eta         [B, H, L], the full step size of each token
    ln_gamma, ln_beta   [H, F], of the LayerNorm around f
    checkpoint  W is kept every so many mini-batches, and recomputed in between by the backward pass (not of "autograd" and "dual")
    backend     "autograd" (the definition), "dual" (naive dual form), "torch" (primal form with a closed-form backward); "triton"
                (one kernel a pass, section K); "cuda" (ttt_kernel.cu, on Hopper GPUs); "auto" takes the fastest that fits and
                has proved itself, and says which on a GPU

    Returns out [B, H, L, F] in q's dtype, and the last weights in the order of `weights`, with B in front, in fp32
    (float64 for float64). Differentiable in every tensor, through both results. Raises ValueError for a wrong kind or shape, and for
    a backend that is unknown or cannot take these inputs, with what it could take.
    """
    if kind not in ("linear", "mlp"):
        raise ValueError(f'ttt_scan: kind "{kind}" is neither "linear" nor "mlp"')
    B, H, L, width = q.shape
    E = width if kind == "linear" else 4 * width
    expected = [(H, width, E), (H, E), (H, E, width), (H, width)][:2 if kind == "linear" else 4]
    shapes = [tuple(w.shape[-len(e):]) for w, e in zip(weights, expected)]
    if len(weights) != len(expected) or shapes != expected or not L or min(mini_batch, checkpoint) < 1:
        raise ValueError(f"ttt_scan: {kind} weights for q {tuple(q.shape)} have shapes {expected}, not {[tuple(w.shape) for w in weights]}")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    precision, dtype = operand_precision(dtype, q.device.type), torch.promote_types(dtype, eta.dtype)
    backend = choose_backend(backend, kind, width, mini_batch, str(dtype).removeprefix("torch."), precision, str(q.device))
    if backend == "cuda":
        return scan_on_chip(kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint)
    if backend == "triton":
        return scan_in_triton(kind, weights, expected, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint, precision)
    return scan_in_torch(kind, weights, expected, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint, backend)


@torch.compiler.disable
def scan_in_torch(kind, weights, expected, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint, backend):
    """ttt_scan with "autograd", "dual" or "torch"."""
    B, H, L, width = q.shape
    if q.numel() > SCAN_AT_ONCE and H > 1 and not torch.is_grad_enabled():      # a minute at 5b: some heads at a time
        halves = zip(*[x.chunk(2, dim=1) for x in (q, k, v, eta)], *[x.chunk(2, dim=-2) for x in (ln_gamma, ln_beta)],
                     zip(*[w.chunk(2, dim=-len(e)) for w, e in zip(weights, expected)]))
        outs, lasts = zip(*[ttt_scan(kind, W, *half, mini_batch, eps=eps, checkpoint=checkpoint, backend=backend) for *half, W in halves])
        return torch.cat(outs, dim=1), tuple(torch.cat(last, dim=1) for last in zip(*lasts))

    dtype = torch.promote_types(q.dtype, torch.float32)       # the state lives in fp32 whatever the inputs are
    W = []
    for w, e in zip(weights, expected):
        w = w.to(dtype).expand(B, *e).flatten(0, 1)                                   # [n, ...], n = B H
        W.append(w if len(e) == 3 else w[:, None])                                    # biases [n, 1, .]
    gamma, beta = (x.to(dtype).expand(B, H, width).flatten(0, 1)[:, None] for x in (ln_gamma, ln_beta))

    def mini_batches(x):                                      # [B, H, L, .] -> [M, n, b, .]; padded tokens get eta = 0
        x = F.pad(x.to(dtype), (0, 0, 0, -L % mini_batch)) if L % mini_batch else x.to(dtype)
        return rearrange(x, "B H (M b) F -> M (B H) b F", b=mini_batch).contiguous()

    tokens = [mini_batches(x) for x in (q, k, v, eta[..., None])]
    with torch.autocast(q.device.type, enabled=False):        # the dtypes above stand
        if backend == "torch":
            out, *W = PrimalScan.apply(*tokens, gamma, beta, eps, checkpoint, *W)
        else:
            step, out = SCAN_BACKENDS[backend], []
            for q_t, k_t, v_t, eta_t in zip(*tokens):
                z, W = step(W, q_t, k_t, v_t, eta_t, gamma, beta, eps)
                out.append(z)
            out = torch.stack(out)
    out = rearrange(out, "M (B H) b F -> B H (M b) F", B=B)[:, :, :L].to(q.dtype)
    return out, tuple(w.reshape(B, *e) for w, e in zip(W, expected))


SCAN_AT_ONCE = 1 << 28               # numbers in q: sampling scans more than these in parts, for their copies' sake
SCAN_BACKENDS = {"autograd": step_autograd, "dual": step_dual, "torch": PrimalScan}     # and the kernels of section K


# ----------------------------------------------------------------------------------------------------
# K. Skip on first reading: kernels
#
# PrimalScan launches some thirty operations a mini-batch and carries everything they share through the GPU's main memory. Here one
# program a (batch, head) reads a whole sequence, forward or backward, in a single launch. Names and formulas are those of section 4.
#
#   products   operands in the precision of the inputs, sums in fp32. All else is fp32: state, biases, LayerNorm, GELU, eta, dW.
#   tokens     q, k, v, eta are read and out is written in place, whatever their strides, 33 KB a mini-batch at F 64, b 64 in bf16.
#   state      one buffer a program, 132 KB for TTT-MLP at F 64. A register file holds 256 KB, but of what Triton keeps there a product's
#              second operand costs 64 of a thread's 255 registers: with W in registers (tiles of 64 or of 128 rows, 8 warps) ptxas spilled
#              3 to 97 KB a thread. So W passes through registers in tiles of F x F and lives in the L1 and L2 caches, where it stays since nothing
#              else comes by. DIFF from the paper's kernel (3.5), which holds W in the shared memory of two SMs: this one runs on any.
#   backward   a program replays a group from its kept state into a scratch of `every` + 1 states and one [b, E] row, 2.3 MB for TTT-MLP at
#              F 64, b 64 and 16 mini-batches a group, then walks it backwards. A step touches two states, dW and the row: 460 KB, within
#              the L2 cache for every program (40 MB on an A100, 50 MB on an H100, 72 MB on an RTX 4090).
#   order      every sum runs inside one program in the order of the code: no atomics, the same bits every time.
#
# Limits. TTT-MLP at F 64, b 64 takes 7 products of 2 b F E = 2.1 MFLOP a (head, mini-batch), 14.7 MFLOP: on one SM of an H100 (989 TFLOP/s
# over 132) 2.0 us, of an A100 (312 over 108) 5.1 us, of an RTX 4090 (165 over 128) 11.4 us. This kernel multiplies 8 times, k W1 twice rather
# than keep Z1, and moves the state 4 times, 0.5 MB: 4.8 us at an SM's 64 bytes a cycle from L2 and 1.7 GHz, less what L1 answers. The 33 KB
# of tokens take 0.3 us at the same rate. What fraction is reached is not measured: not yet run on a GPU.
# ----------------------------------------------------------------------------------------------------

try:
    import triton
    import triton.language as tl
except ImportError:                                           # there is no Triton for macOS and Windows
    triton, tl = None, types.SimpleNamespace(constexpr=lambda value: value)

# Triton's interpreter runs kernels on a CPU. It cannot multiply bf16 numbers, so there operands are rounded and go back to fp32.
EMULATED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def jit(function):
    return triton.jit(function) if triton else function


@jit
def tile_dot(x, y, PRECISION: tl.constexpr):
    """x @ y: operands rounded to PRECISION, "bf16", "fp16", "tf32" or "fp32", and the sum in fp32."""
    if PRECISION == "bf16":
        x, y = x.to(tl.bfloat16), y.to(tl.bfloat16)
    elif PRECISION == "fp16":
        x, y = x.to(tl.float16), y.to(tl.float16)
    if EMULATED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="tf32" if PRECISION == "tf32" else "tf32x3")


@jit
def tile_gelu(x):
    """gelu_derivatives: the function, its first and its second derivative."""
    c, d = 1.5957691216057308, 0.044715                       # sqrt(8 / pi)
    r = x * x * (3 * c * d) + c
    v = x * r
    s = tl.sigmoid((v + 2 * c * x) / 3)
    return x * s, s * (1 + v * (1 - s)), (r * (v * (1 - 2 * s) + 4) - 2 * c) * s * (1 - s)


@jit
def tile_mean(x):                                                                     # [b, F] -> [b, 1]
    return (tl.sum(x, 1) / x.shape[1])[:, None]


@jit
def tile_normalise(Z, eps):
    centred = Z - tile_mean(Z)
    r = 1 / tl.sqrt(tile_mean(centred * centred) + eps)
    return centred * r, r


@jit
def tile_J(p, xh, r):
    return r * (p - tile_mean(p) - xh * tile_mean(p * xh))


# In memory a state is W1 [F, E], b1 [E], W2 [E, F], b2 [F], or W1 [F, F], b1 [F], one behind the other. Tile e of it are columns e F ... of
# W1 and b1 and rows e F ... of W2.


@jit
def W1_at(state, e, F: tl.constexpr, E: tl.constexpr):                                # [F, F]
    return state + e * F + tl.arange(0, F)[:, None] * E + tl.arange(0, F)[None, :]


@jit
def b1_at(state, e, F: tl.constexpr, E: tl.constexpr):                                # [1, F]
    return state + F * E + e * F + tl.arange(0, F)[None, :]


@jit
def W2_at(state, e, F: tl.constexpr, E: tl.constexpr):                                # [F, F]
    return state + F * E + E + e * F * F + tl.arange(0, F)[:, None] * F + tl.arange(0, F)[None, :]


@jit
def b2_at(state, F: tl.constexpr, E: tl.constexpr):                                   # [1, F]
    return state + 2 * F * E + E + tl.arange(0, F)[None, :]


@jit
def tokens_at(pointer, strides, batch, head, token, F: tl.constexpr):                 # [b, F]
    pointer += batch * strides[0] + head * strides[1]
    return pointer + token[:, None].to(tl.int64) * strides[2] + tl.arange(0, F)[None, :] * strides[3]


@jit
def load_tokens(pointer, strides, batch, head, token, L, F: tl.constexpr):            # [b, F], zeros behind the end
    return tl.load(tokens_at(pointer, strides, batch, head, token, F), mask=token[:, None] < L, other=0).to(tl.float32)


@jit
def eta_at(pointer, strides, batch, head, token):                                     # [b]
    return pointer + batch * strides[0] + head * strides[1] + token.to(tl.int64) * strides[2]


@jit
def load_eta(pointer, strides, batch, head, token, L):                                # [b, 1], zeros behind the end
    return tl.load(eta_at(pointer, strides, batch, head, token), mask=token < L, other=0).to(tl.float32)[:, None]


@jit
def hidden(W, e, x, F: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr):
    """gelu, gelu' and gelu'' of Z1 = x W1 + b1, tile e: [b, F] each."""
    return tile_gelu(tile_dot(x, tl.load(W1_at(W, e, F, E)), PRECISION) + tl.load(b1_at(W, e, F, E)))


@jit
def model(W, x, F: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr):
    """inner_model: f(x; W), [b, F]."""
    if E == F:
        Z = tile_dot(x, tl.load(W1_at(W, 0, F, E)), PRECISION) + tl.load(b1_at(W, 0, F, E))
    else:
        Z = tl.zeros_like(x) + tl.load(b2_at(W, F, E))
        for e in tl.range(E // F, disable_licm=True):
            X2, _, _ = hidden(W, e, x, F, E, PRECISION)
            Z += tile_dot(X2, tl.load(W2_at(W, e, F, E)), PRECISION)
    return Z


@jit
def learn(W, new, k, v, eta, gamma, beta, eps, F: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr):
    """inner_gradient and descend: the state W goes to `new`, which may be W."""
    xh, r = tile_normalise(model(W, k, F, E, PRECISION), eps)
    G = eta * tile_J(gamma * (gamma * xh + beta - (v - k)), xh, r)
    tl.debug_barrier()
    if E == F:
        tl.store(W1_at(new, 0, F, E), tl.load(W1_at(W, 0, F, E)) - tile_dot(k.T, G, PRECISION))
        tl.store(b1_at(new, 0, F, E), tl.load(b1_at(W, 0, F, E)) - tl.sum(G, 0)[None, :])
    else:
        for e in tl.range(E // F, disable_licm=True):
            X2, slope, _ = hidden(W, e, k, F, E, PRECISION)                           # again, rather than keep it
            W2 = tl.load(W2_at(W, e, F, E))
            G1 = tile_dot(G, W2.T, PRECISION) * slope
            tl.store(W1_at(new, e, F, E), tl.load(W1_at(W, e, F, E)) - tile_dot(k.T, G1, PRECISION))
            tl.store(b1_at(new, e, F, E), tl.load(b1_at(W, e, F, E)) - tl.sum(G1, 0)[None, :])
            tl.store(W2_at(new, e, F, E), W2 - tile_dot(X2.T, G, PRECISION))
        tl.store(b2_at(new, F, E), tl.load(b2_at(W, F, E)) - tl.sum(G, 0)[None, :])
    tl.debug_barrier()


@jit
def copy_state(source, target, size: tl.constexpr):
    for first in range(0, size, 1024):
        place = first + tl.arange(0, 1024)
        tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)
    tl.debug_barrier()


@jit
def scan_kernel(state, q, k, v, eta, gamma, beta, out, kept, H, L, eps, every,
                q_strides, k_strides, v_strides, eta_strides, out_strides,
                F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr):
    """PrimalScan.forward of one (batch, head). `state` goes from the first to the last. KEEP: as it is before mini-batches 0, every,
    2 every ... it is copied to `kept`."""
    size: tl.constexpr = 2 * E * F + E + F if E > F else F * F + F
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // H, program % H
    gamma = tl.load(gamma + head * F + tl.arange(0, F))[None, :]
    beta = tl.load(beta + head * F + tl.arange(0, F))[None, :]
    steps = tl.cdiv(L, b)
    kept += program * tl.cdiv(steps, every) * size
    state += program * size
    t = 0
    while t < steps:
        if KEEP:
            if t % every == 0:
                copy_state(state, kept + (t // every).to(tl.int64) * size, size)
        token = t * b + tl.arange(0, b)
        k_t = load_tokens(k, k_strides, batch, head, token, L, F)
        v_t = load_tokens(v, v_strides, batch, head, token, L, F)
        learn(state, state, k_t, v_t, load_eta(eta, eta_strides, batch, head, token, L), gamma, beta, eps, F, E, PRECISION)
        q_t = load_tokens(q, q_strides, batch, head, token, L, F)
        xh, _ = tile_normalise(model(state, q_t, F, E, PRECISION), eps)
        z = q_t + gamma * xh + beta
        tl.store(tokens_at(out, out_strides, batch, head, token, F), z.to(out.dtype.element_ty), mask=token[:, None] < L)
        t += 1


@jit
def add(pointers, x):
    tl.store(pointers, tl.load(pointers) + x)


@jit
def tile_backward_of_model(dZ, W, dW, x, dx, known, F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """From the gradient on f(x; W): dx and what falls on x; what falls on W is added to dW. `known` points at a part of the gradient on
    Z1, [b, F] a tile, that has come another way; None where there is none."""
    if E == F:
        add(W1_at(dW, 0, F, E), tile_dot(x.T, dZ, PRECISION))
        add(b1_at(dW, 0, F, E), tl.sum(dZ, 0)[None, :])
        dx += tile_dot(dZ, tl.load(W1_at(W, 0, F, E)).T, PRECISION)
    else:
        add(b2_at(dW, F, E), tl.sum(dZ, 0)[None, :])
        for e in tl.range(E // F, disable_licm=True):
            X2, slope, _ = hidden(W, e, x, F, E, PRECISION)
            add(W2_at(dW, e, F, E), tile_dot(X2.T, dZ, PRECISION))
            dZ1 = tile_dot(dZ, tl.load(W2_at(W, e, F, E)).T, PRECISION) * slope
            if known is not None:
                dZ1 += tl.load(known + e * b * F)
            add(W1_at(dW, e, F, E), tile_dot(x.T, dZ1, PRECISION))
            add(b1_at(dW, e, F, E), tl.sum(dZ1, 0)[None, :])
            dx += tile_dot(dZ1, tl.load(W1_at(W, e, F, E)).T, PRECISION)
    tl.debug_barrier()
    return dx


@jit
def tile_backward_of_read(dout, W, dW, q, gamma, eps, F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """backward_of_read: dq [b, F], and what falls on gamma [1, F]; what falls on W is added to dW."""
    xh, r = tile_normalise(model(W, q, F, E, PRECISION), eps)
    dZ = tile_J(dout * gamma, xh, r)
    dq = tile_backward_of_model(dZ, W, dW, q, dout, None, F, E, b, PRECISION)
    return dq, tl.sum(dout * xh, 0)[None, :]


@jit
def tile_backward_of_step(W, dW, spare, k, v, eta, gamma, beta, eps,
                          F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """backward_of_step: dk, dv [b, F], deta [b], and what falls on gamma [1, F]; `spare` is room for [4, b, F]."""
    xh, r = tile_normalise(model(W, k, F, E, PRECISION), eps)
    error = gamma * xh + beta - (v - k)
    p = gamma * error
    gZ = tile_J(p, xh, r)
    G = eta * gZ
    rows = spare + tl.arange(0, b)[:, None] * F + tl.arange(0, F)[None, :]
    # Through the update W' = W - k^T G: every product here reads dW before anything is added to it.
    if E == F:
        dW1 = tl.load(W1_at(dW, 0, F, E))
        dG = -tile_dot(k, dW1, PRECISION) - tl.load(b1_at(dW, 0, F, E))
        dk = -tile_dot(G, dW1.T, PRECISION)
    else:
        dG = tl.zeros_like(k) - tl.load(b2_at(dW, F, E))
        dk = tl.zeros_like(k)
        for e in tl.range(E // F, disable_licm=True):
            X2, slope, bend = hidden(W, e, k, F, E, PRECISION)
            dW2 = tl.load(W2_at(dW, e, F, E))
            dG -= tile_dot(X2, dW2, PRECISION)
            dX2 = -tile_dot(G, dW2.T, PRECISION)
            W2, dW1 = tl.load(W2_at(W, e, F, E)), tl.load(W1_at(dW, e, F, E))
            gX2 = tile_dot(G, W2.T, PRECISION)
            dk -= tile_dot(gX2 * slope, dW1.T, PRECISION)
            dG1 = -tile_dot(k, dW1, PRECISION) - tl.load(b1_at(dW, e, F, E))
            # dZ1, but for what comes through dZ and is not known yet.
            tl.store(rows + e * b * F, dG1 * gX2 * bend + dX2 * slope)
            dgX2 = dG1 * slope
            dG += tile_dot(dgX2, W2, PRECISION)
            tl.store(W2_at(dW, e, F, E), dW2 + tile_dot(dgX2.T, G, PRECISION))
        tl.debug_barrier()
    # Through G = eta gZ with gZ = J[p].
    deta = tl.sum(dG * gZ, 1)
    U = eta * dG
    w = tile_J(U, xh, r)
    dv = -gamma * w
    dgamma = tl.sum(w * (error + gamma * xh), 0)[None, :]
    dZ = tile_J(-gamma * dv, xh, r) - r * (w * tile_mean(p * xh) + gZ * tile_mean(U * xh) + xh * tile_mean(U * gZ))
    # Through the first forward pass, Z = f(k; W).
    dk = tile_backward_of_model(dZ, W, dW, k, dk - dv, rows, F, E, b, PRECISION)
    return dk, dv, deta, dgamma


@jit
def scan_backward_kernel(dout, kept, q, k, v, eta, gamma, beta, dq, dk, dv, deta, dgamma, dbeta, dstate, scratch, H, L, eps, every,
                         dout_strides, q_strides, k_strides, v_strides, eta_strides, dq_strides, dk_strides, dv_strides, deta_strides,
                         F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """PrimalScan.backward of one (batch, head). dstate comes in as the gradient on the last state and leaves as that on the first."""
    size: tl.constexpr = 2 * E * F + E + F if E > F else F * F + F
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // H, program % H
    gamma = tl.load(gamma + head * F + tl.arange(0, F))[None, :]
    beta = tl.load(beta + head * F + tl.arange(0, F))[None, :]
    steps = tl.cdiv(L, b)
    groups = tl.cdiv(steps, every)
    kept += program * groups * size
    dstate += program * size
    states = scratch + program * ((every + 1) * size + E * b)
    spare = states + (every + 1) * size
    sum_gamma, sum_beta = tl.zeros_like(gamma), tl.zeros_like(gamma)
    group = groups - 1
    while group >= 0:
        count = tl.minimum(every, steps - group * every)
        copy_state(kept + group.to(tl.int64) * size, states, size)
        i = 0
        while i < count:                                      # replay
            token = (group * every + i) * b + tl.arange(0, b)
            k_t = load_tokens(k, k_strides, batch, head, token, L, F)
            v_t = load_tokens(v, v_strides, batch, head, token, L, F)
            eta_t = load_eta(eta, eta_strides, batch, head, token, L)
            learn(states + i * size, states + (i + 1) * size, k_t, v_t, eta_t, gamma, beta, eps, F, E, PRECISION)
            i += 1
        while i > 0:                                          # and walk back
            i -= 1
            token = (group * every + i) * b + tl.arange(0, b)
            inside = token[:, None] < L
            dout_t = load_tokens(dout, dout_strides, batch, head, token, L, F)
            q_t = load_tokens(q, q_strides, batch, head, token, L, F)
            dq_t, more = tile_backward_of_read(dout_t, states + (i + 1) * size, dstate, q_t, gamma, eps, F, E, b, PRECISION)
            tl.store(tokens_at(dq, dq_strides, batch, head, token, F), dq_t.to(dq.dtype.element_ty), mask=inside)
            sum_gamma += more
            sum_beta += tl.sum(dout_t, 0)[None, :]            # beta stands beside every output and every -(v - k)
            k_t = load_tokens(k, k_strides, batch, head, token, L, F)
            v_t = load_tokens(v, v_strides, batch, head, token, L, F)
            eta_t = load_eta(eta, eta_strides, batch, head, token, L)
            dk_t, dv_t, deta_t, more = tile_backward_of_step(states + i * size, dstate, spare, k_t, v_t, eta_t, gamma, beta, eps, F, E, b, PRECISION)
            tl.store(tokens_at(dk, dk_strides, batch, head, token, F), dk_t.to(dk.dtype.element_ty), mask=inside)
            tl.store(tokens_at(dv, dv_strides, batch, head, token, F), dv_t.to(dv.dtype.element_ty), mask=inside)
            tl.store(eta_at(deta, deta_strides, batch, head, token), deta_t.to(deta.dtype.element_ty), mask=token < L)
            sum_gamma += more
            sum_beta -= tl.sum(dv_t, 0)[None, :]
        group -= 1
    tl.store(dgamma + program * F + tl.arange(0, F)[None, :], sum_gamma)
    tl.store(dbeta + program * F + tl.arange(0, F)[None, :], sum_beta)


def launch_options(F, E, chip, precision):
    """Four warps own 16 of 64 tokens each. Eight where a tile's operands are of four bytes and would spill, and for TTT-MLP on Hopper, whose wgmma
    knows what to do with them. One stage, or Triton might fetch a tile of the state before the step that changes it has stored it. ptxas sometimes
    settles for 128 registers and spills the rest, unless it is told that it may have all."""
    many = F == 64 and (precision in ("tf32", "fp32") or chip[0] == 9 and E == 256)
    return dict(num_warps=8 if many else 4, num_stages=1, maxnreg=255)


def chip_of(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)        # the interpreter has none


@torch.library.custom_op("ttt_minute::scan", mutates_args=())
def scan_op(state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor,
            b: int, E: int, eps: float, every: int, keep: bool, precision: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch. state [B, H, size] fp32, q, k, v [B, H, L, F], eta [B, H, L], gamma, beta [H, F] fp32 -> out, last state, states kept."""
    out, last, kept = scan_shapes(state, q, k, v, eta, gamma, beta, b, E, eps, every, keep, precision)
    last.copy_(state)
    B, H, L, F = q.shape
    with torch.cuda.device_of(q):
        scan_kernel[(B * H,)](last, q, k, v, eta, gamma, beta, out, kept, H, L, eps, every,
                              q.stride(), k.stride(), v.stride(), eta.stride(), out.stride(),
                              F=F, E=E, b=b, KEEP=keep, PRECISION=precision, **launch_options(F, E, chip_of(q), precision))
    return out, last, kept


@scan_op.register_fake
def scan_shapes(state, q, k, v, eta, gamma, beta, b, E, eps, every, keep, precision):
    groups = -(-(-(-q.shape[2] // b)) // every) if keep else 0
    return torch.empty_like(q), state.new_empty(state.shape), state.new_empty(*state.shape[:2], groups, state.shape[2])


@torch.library.custom_op("ttt_minute::scan_backward", mutates_args=())
def scan_backward_op(dout: torch.Tensor, dlast: torch.Tensor, kept: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor,
                     gamma: torch.Tensor, beta: torch.Tensor, b: int, E: int, eps: float, every: int, precision: str) -> list[torch.Tensor]:
    """One launch -> dstate, dq, dk, dv, deta, dgamma, dbeta, the last two [B, H, F]."""
    gradients = scan_backward_shapes(dout, dlast, kept, q, k, v, eta, gamma, beta, b, E, eps, every, precision)
    dstate, dq, dk, dv, deta, dgamma, dbeta = gradients
    dstate.copy_(dlast)
    B, H, L, F = q.shape
    scratch = dstate.new_empty(B * H, (every + 1) * dstate.shape[-1] + b * E)
    with torch.cuda.device_of(q):
        scan_backward_kernel[(B * H,)](dout, kept, q, k, v, eta, gamma, beta, dq, dk, dv, deta, dgamma, dbeta, dstate, scratch, H, L, eps, every,
                                       dout.stride(), q.stride(), k.stride(), v.stride(), eta.stride(), dq.stride(), dk.stride(), dv.stride(), deta.stride(),
                                       F=F, E=E, b=b, PRECISION=precision, **launch_options(F, E, chip_of(q), precision))
    return gradients


@scan_backward_op.register_fake
def scan_backward_shapes(dout, dlast, kept, q, k, v, eta, gamma, beta, b, E, eps, every, precision):
    partial = dlast.new_empty(*q.shape[:2], q.shape[3])
    return [dlast.new_empty(dlast.shape), *(torch.empty_like(x) for x in (q, k, v, eta)), partial, torch.empty_like(partial)]


def keep_for_backward(ctx, inputs, output):
    _, *tensors, ctx.b, ctx.E, ctx.eps, ctx.every, _, ctx.precision = inputs
    ctx.save_for_backward(output[2], *tensors)


def scan_op_backward(ctx, dout, dlast, _):
    dstate, dq, dk, dv, deta, dgamma, dbeta = scan_backward_op(dout, dlast, *ctx.saved_tensors, ctx.b, ctx.E, ctx.eps, ctx.every, ctx.precision)
    return dstate, dq, dk, dv, deta, dgamma.sum(0), dbeta.sum(0), None, None, None, None, None, None


scan_op.register_autograd(scan_op_backward, setup_context=keep_for_backward)


def scan_in_triton(kind, weights, expected, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint, precision):
    """ttt_scan with "triton": the weights become one state, and what autograd and the compiler see is one operation."""
    B, H, L, width = q.shape
    E = width if kind == "linear" else 4 * width
    state = torch.cat([w.float().expand(B, *e).flatten(2) for w, e in zip(weights, expected)], dim=-1)       # [B, H, size]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, q, k, v, eta, ln_gamma, ln_beta))
    every = min(checkpoint, -(-L // mini_batch))
    out, last, _ = scan_op(state, q, k, v, eta, ln_gamma.float().contiguous(), ln_beta.float().contiguous(),
                           mini_batch, E, eps, every, keep, precision)
    last = last.split([math.prod(e[1:]) for e in expected], dim=-1)
    return out, tuple(w.reshape(B, *e) for w, e in zip(last, expected))


# Which backend takes a scan. A kernel states in one sentence why it cannot, or returns None; the first of KERNELS that can is the fastest.

OLDEST_TRITON, OLDEST_CHIP = (3, 6), (8, 0)


def triton_cannot(kind, width, mini_batch, dtype, precision, device):
    """Why "triton" cannot take a scan, or None."""
    if triton is None:
        return "needs the package triton, which has no wheel for this system (Linux has one: pip install triton)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, not {triton.__version__}"
    if dtype not in ("float32", "bfloat16", "float16"):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    if width not in (32, 64) or mini_batch not in (16, 32, 64):
        return f"takes heads of 32 or 64 and mini-batches of 16, 32 or 64 tokens, not {width} and {mini_batch}"
    if EMULATED:
        return None
    if torch.device(device).type != "cuda" or torch.version.hip:
        return f"runs on NVIDIA GPUs, not on {torch.device(device).type} (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1)"
    chip = torch.cuda.get_device_capability(device)
    if chip < OLDEST_CHIP:
        return f"needs a GPU of compute capability 8.0 (Ampere) or newer, not {chip[0]}.{chip[1]}"
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024
    if (kind, width, mini_batch, precision) == ("mlp", 64, 64, "fp32") and room < 128:
        return (f'needs 128 KB of shared memory for products in fp32, this GPU has {room}; bf16, mini-batches of 32 or '
                'torch.set_float32_matmul_precision("high") fit')
    return None


KERNELS = {"triton": triton_cannot}                           # "cuda" joins when it has run


def backends():
    return ["auto", *KERNELS, "cuda", *SCAN_BACKENDS]


def operand_precision(dtype, device):
    """What operands of products are rounded to: as torch does, the inputs' dtype, under autocast autocast's, tf32 for fp32 where torch may use it."""
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float32:
        return precision_of_fp32()
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))


@torch.compiler.assume_constant_result
def precision_of_fp32():
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@torch.compiler.assume_constant_result
def choose_backend(asked, kind, width, mini_batch, dtype, precision, device):
    """The backend to take. One asked for by name must fit; "auto" says once on stderr what it took and why not something faster."""
    if asked not in backends():
        raise ValueError(f'ttt_scan: no backend "{asked}"; there are {", ".join(backends())}')
    if asked in KERNELS:
        reason = KERNELS[asked](kind, width, mini_batch, dtype, precision, device)
        if reason:
            raise ValueError(f'ttt_scan: backend "{asked}" {reason}; "torch" takes everything')
    if asked != "auto":
        return asked
    if torch.device(device).type == "cpu":
        return "torch"
    chosen, reasons = "torch", []
    for name, cannot in KERNELS.items():
        reason = cannot(kind, width, mini_batch, dtype, precision, device) or self_check(name, kind, width, mini_batch, precision, device)
        if not reason:
            chosen = name
            break
        reasons.append(f'"{name}" {reason}')
    say_once(f'ttt_scan: backend "{chosen}"' + "".join(f"; {reason}" for reason in reasons))
    return chosen


@functools.cache
def say_once(line):
    print(line, file=sys.stderr)


TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}      # of a self-check, relative in norm


@functools.cache
@torch.inference_mode(False)
def self_check(name, kind, width, mini_batch, precision, device):
    """Run a small scan and its gradients with a kernel and with "torch" in fp32 on this very GPU: None, or why the kernel is not to be trusted."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=generator)).to(device)

    E, L = width if kind == "linear" else 4 * width, 2 * mini_batch + 5
    expected = [(2, width, E), (2, E), (2, E, width), (2, width)][:2 if kind == "linear" else 4]
    inputs = [normal(*shape, std=0.1) for shape in expected] + [F.normalize(normal(1, 2, L, width), dim=-1) for _ in "qk"]
    inputs += [normal(1, 2, L, width), normal(1, 2, L).sigmoid() / mini_batch, 1 + normal(2, width, std=0.1), normal(2, width, std=0.1)]
    weights, directions = len(expected), [normal(1, 2, L, width), *(normal(1, *shape) for shape in expected)]
    names = ["out", *["last W1", "last b1", "last W2", "last b2"][:weights],
             *["dW1", "db1", "dW2", "db2"][:weights], "dq", "dk", "dv", "deta", "dln_gamma", "dln_beta"]
    results = []
    for backend in "torch", name:
        scan, how = (scan_in_torch, "torch") if backend == "torch" else (KERNEL_SCANS[name], precision)
        leaves = [x.clone().requires_grad_() for x in inputs]
        try:
            with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
                out, last = scan(kind, leaves[:weights], expected, *leaves[weights:], mini_batch, 1e-8, 2, how)
                loss = sum((y * direction).sum() for y, direction in zip((out, *last), directions))
                results.append([out, *last, *torch.autograd.grad(loss, leaves)])
        except Exception as error:                            # whatever a compiler or a driver may say
            return f"failed its self-check ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    for label, wanted, got in zip(names, *results):
        difference = ((got - wanted).norm() / wanted.norm()).item()
        if not difference <= TOLERANCE[precision]:
            return f"failed its self-check ({label} is off by {difference:.2g}, more than {TOLERANCE[precision]:g})"
    return None


KERNEL_SCANS = {"triton": scan_in_triton}


# ----------------------------------------------------------------------------------------------------
# K, continued. Skip on first reading: the CUDA kernel
#
# ttt_kernel.cu keeps the hidden state of TTT-MLP on chip, spread over a cluster of 1, 2 or 4 multiprocessors of a Hopper GPU
# (section 3.5 and appendix B). It is built on first use by one call of nvcc and loaded with ctypes: no torch headers, no libcuda.
# Not yet run on a GPU, so "auto" never takes it: ask for it with backend="cuda".
# ----------------------------------------------------------------------------------------------------

THUNDERKITTENS = "0b55588d2769dde0c7a9a606ffc015b0ca7a9551"                           # github.com/HazyResearch/ThunderKittens
GET_THUNDERKITTENS = ("git clone https://github.com/HazyResearch/ThunderKittens, git checkout " + THUNDERKITTENS[:8]
                      + " inside, and set THUNDERKITTENS_ROOT to that folder")
NVCC_FLAGS = """-std=c++20 -O3 -DNDEBUG --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda -DKITTENS_HOPPER
    -gencode arch=compute_90a,code=sm_90a -diag-suppress 3189 -Xptxas=-v,--warn-on-spills -shared -cudart static -Xlinker -z,defs
    -Xcompiler=-fPIC,-fno-strict-aliasing,-Wno-psabi,-fvisibility=hidden""".split()


def thunderkittens():
    """The folder of ThunderKittens' headers and their revision. Raises UserError where they are missing or of another commit."""
    root = os.environ.get("THUNDERKITTENS_ROOT")
    if not root:
        raise UserError(f"the CUDA kernel needs ThunderKittens' headers; {GET_THUNDERKITTENS}")
    root = Path(root)
    if not (root / "include" / "kittens.cuh").exists():
        raise UserError(f"THUNDERKITTENS_ROOT {root} has no include/kittens.cuh; {GET_THUNDERKITTENS}")
    if (root / ".git").exists():                              # a clone knows its commit; a bare copy of the headers does not
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        if head != THUNDERKITTENS:
            raise UserError(f"THUNDERKITTENS_ROOT {root} is at commit {head[:8] or 'unknown'}, the kernel was written for "
                            f"{THUNDERKITTENS[:8]}; run git checkout {THUNDERKITTENS[:8]} there")
    files = sorted((root / "include").rglob("*.cuh")) + sorted((root / "include").rglob("*.impl"))
    return root, hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def build_kernel(source=Path(__file__).with_name("ttt_kernel.cu")):
    """Compiles the kernel, unless this source was built before by this compiler against these headers; returns the shared object.

    Beside it lies KEY.log, what the compiler said. Raises UserError where nvcc or the headers are missing or the build fails.
    """
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise UserError("the CUDA kernel needs nvcc 12.8 or newer on PATH; install the CUDA toolkit, or take another --backend")
    root, headers = thunderkittens()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([source.read_text(), version, headers, *NVCC_FLAGS]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_minute"
    library, log = cache / f"ttt_kernel-{key}.so", cache / f"ttt_kernel-{key}.log"
    if not library.exists():
        with atomic(library) as temporary:                    # several processes may build at once: each renames a whole file
            command = [nvcc, *NVCC_FLAGS, f"-I{root / 'include'}", source, "-o", temporary]
            build = subprocess.run(command, capture_output=True, text=True)
            log.write_text(build.stdout + build.stderr)
            if build.returncode:
                raise UserError(f"nvcc could not build {source.name}; what it said is in {log}")
    return library


@functools.cache
def load_kernel():
    """The kernel's two launchers, as ctypes functions. Built on first use. Raises UserError where that cannot be done."""
    library = ctypes.CDLL(str(build_kernel()))
    for launch, pointers in (library.ttt_forward, 17), (library.ttt_backward, 24):
        launch.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int] * 4 + [ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
    return library


def cluster_size(heads):
    """Multiprocessors that share a head: 4 while every cluster of `heads` fits the 132 of an H100 at once, else 2."""
    return 4 if 4 * heads <= 132 else 2


def cuda_refusal(kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch):
    """One sentence on why the CUDA kernel cannot take these inputs, or None. Shapes agree with each other already."""
    if kind != "mlp":
        return f'the kernel knows TTT-MLP, not "{kind}"; take backend="torch"'
    if q.shape[-1] != 64 or mini_batch != 64:
        return f"heads have width {q.shape[-1]} and mini-batches {mini_batch} tokens, the kernel wants 64 and 64; take backend=\"torch\""
    for name, x, dtype in ("q", q, torch.bfloat16), ("k", k, torch.bfloat16), ("v", v, torch.bfloat16):
        if x.dtype != dtype:
            return f"{name} is {str(x.dtype)[6:]}, the kernel reads bfloat16; cast q, k and v, or run under torch.autocast in bfloat16"
    for name, x in dict(q=q, k=k, v=v, eta=eta).items():
        if not x.is_contiguous():
            return f"{name} {tuple(x.shape)} is not contiguous in memory; call .contiguous()"
        if x.data_ptr() % 16 and not isinstance(x, torch._subclasses.FakeTensor):
            return f"{name} does not begin at a multiple of 16 bytes; call .clone()"
    if max(q.shape[:2]) > 65535 or q.shape[2] > 1 << 24:
        return f"q {tuple(q.shape)} is beyond 65535 videos, 65535 heads or 16,777,216 tokens; cut it in parts"
    if torch.float64 in (x.dtype for x in (*weights, eta, ln_gamma, ln_beta)):
        return 'the kernel computes in fp32, and some weights, eta or LayerNorm parameters are float64; take backend="torch"'
    devices = {str(x.device) for x in (q, k, v, eta, ln_gamma, ln_beta, *weights)}
    if len(devices) > 1 or q.device.type != "cuda":
        return f"tensors are on {', '.join(sorted(devices))}, the kernel wants all of them on one Hopper GPU"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return f'{torch.cuda.get_device_name(q.device)} is not a Hopper GPU (H100, H200); take backend="torch"'
    return None


def launch(function, tensors, shape, every, eps, tp):
    """Puts a kernel on the current stream of the tensors' device. Nothing waits for it."""
    device = tensors[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        error = function(*[x.data_ptr() for x in tensors], *shape, every, eps, tp, stream)
    if error:
        raise RuntimeError(f"ttt_kernel.cu: launching on {device} failed with CUDA error {error}"
                           + (" (tensor maps could not be made: is the driver older than CUDA 12?)" if error < 0 else ""))


def empty_checkpoints(q, every):
    """W every `every` mini-batches, in the kernel's own order: (tiles [B,H,G,4,2,4096], biases [B,H,G,320]), fp32."""
    B, H, L, _ = q.shape
    groups = -(-L // (64 * every))
    return q.new_empty(B, H, groups, 4, 2, 4096, dtype=torch.float32), q.new_empty(B, H, groups, 320, dtype=torch.float32)


@torch.library.custom_op("ttt_minute::mlp_scan", mutates_args=(), device_types="cuda")
def mlp_scan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, W1: torch.Tensor,
             b1: torch.Tensor, W2: torch.Tensor, b2: torch.Tensor, eps: float, every: int, tp: int) -> tuple[
                 torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B,H,L,64] bf16; the rest fp32: eta [B,H,L], gamma and beta [H,64], W1 [B,H,64,256] ... -> out, last W, checkpoints."""
    out, last, kept = torch.empty_like(q), [torch.empty_like(w) for w in (W1, b1, W2, b2)], empty_checkpoints(q, every)
    launch(load_kernel().ttt_forward, (q, k, v, out, eta, gamma, beta, W1, b1, W2, b2, *last, *kept), q.shape[:3], every, eps, tp)
    return out, *last, *kept


@mlp_scan.register_fake
def _(q, k, v, eta, gamma, beta, W1, b1, W2, b2, eps, every, tp):
    return torch.empty_like(q), *[torch.empty_like(w) for w in (W1, b1, W2, b2)], *empty_checkpoints(q, every)


def scratch_bytes(tp):
    """What the backward pass sets aside for a shard and a mini-batch of one group: X2, G1 and G2 in bf16, xh, r and the biases in fp32."""
    return -(-(16384 * 4 // tp + 8192 + 16384 + 1024 + 256 * (4 // tp + 1)) // 128) * 128


@torch.library.custom_op("ttt_minute::mlp_scan_backward", mutates_args=(), device_types="cuda")
def mlp_scan_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor,
                      dout: torch.Tensor, dlast: list[torch.Tensor], kept_W: torch.Tensor, kept_b: torch.Tensor, eps: float, every: int,
                      tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
                                        torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the ten tensors that mlp_scan reads, in its order; those of gamma and beta per video, [B,H,64]."""
    B, H, L, width = q.shape
    dq, dk, dv, deta = (torch.empty_like(x) for x in (q, k, v, eta))
    dgamma, dbeta = (eta.new_empty(B, H, width) for _ in range(2))
    dW = [torch.empty_like(x) for x in dlast]
    scratch = torch.empty(B * H * tp * every * scratch_bytes(tp), dtype=torch.uint8, device=q.device)
    launch(load_kernel().ttt_backward, (q, k, v, dout, dq, dk, dv, eta, gamma, beta, deta, dgamma, dbeta, *dlast, *dW, kept_W, kept_b, scratch),
           (B, H, L), every, eps, tp)
    return dq, dk, dv, deta, dgamma, dbeta, *dW


@mlp_scan_backward.register_fake
def _(q, k, v, eta, gamma, beta, dout, dlast, kept_W, kept_b, eps, every, tp):
    per_video = eta.new_empty(*q.shape[:2], q.shape[-1]), eta.new_empty(*q.shape[:2], q.shape[-1])
    return *(torch.empty_like(x) for x in (q, k, v, eta)), *per_video, *(torch.empty_like(x) for x in dlast)


def remember(ctx, inputs, output):
    *tensors, ctx.eps, ctx.every, ctx.tp = inputs
    ctx.shapes = [w.shape for w in tensors[6:]]
    ctx.save_for_backward(*tensors[:6], *output[5:])


def mlp_scan_gradients(ctx, dout, dW1, db1, dW2, db2, *_):
    *tensors, kept_W, kept_b = ctx.saved_tensors
    dlast = [(tensors[3].new_zeros(shape) if dw is None else dw).contiguous() for dw, shape in zip((dW1, db1, dW2, db2), ctx.shapes)]
    dout = (torch.zeros_like(tensors[0]) if dout is None else dout).contiguous()
    tp = max(ctx.tp, 2)                                       # W and its gradient together do not fit one multiprocessor
    *gradients, dgamma, dbeta, dW1, db1, dW2, db2 = mlp_scan_backward(*tensors, dout, dlast, kept_W, kept_b, ctx.eps, ctx.every, tp)
    return *gradients, dgamma.sum(0), dbeta.sum(0), dW1, db1, dW2, db2, None, None, None


mlp_scan.register_autograd(mlp_scan_gradients, setup_context=remember)


def scan_on_chip(kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint):
    """ttt_scan by the CUDA kernel. Raises UserError where it cannot take the inputs."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    reason = cuda_refusal(kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch)
    if reason:
        raise UserError(f"ttt_scan: backend cuda: {reason}")
    load_kernel()
    B, H = q.shape[:2]
    fp32 = [x.float().contiguous() for x in (eta, ln_gamma, ln_beta)]
    W = [w.float().expand(B, H, *w.shape[-rank:]).contiguous() for w, rank in zip(weights, (2, 1, 2, 1))]
    out, *last, _, _ = mlp_scan(q, k, v, *fp32, *W, eps, checkpoint, cluster_size(B * H))
    return out, tuple(last)


# ----------------------------------------------------------------------------------------------------
# 5. The TTT layer
# ----------------------------------------------------------------------------------------------------


class TTT(nn.Module):
    """A TTT layer (section 2.2): learned maps theta_K, theta_V, theta_Q around the inner loop.

    x [B, L, D] in scan order -> [B, L, D]. The outer loop learns the maps, the initial W and the step sizes; the inner
    loop trains W while the sequence is read.
    DIFF from the paper's equations, all as published in code: the 1/2 in the loss, a sigmoid and 1/F in eta, normalised
    q, k and v.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.kind = "linear" if config.layer == "ttt_linear" else "mlp"
        self.eta_base = config.eta_linear if self.kind == "linear" else config.eta_mlp
        H, width, D = config.heads, config.head_width, config.dim
        E = width if self.kind == "linear" else 4 * width
        self.qkv = nn.ModuleList(nn.Linear(D, D) for _ in "qkv")
        self.eta = nn.Linear(D, H)
        self.ln_gamma = nn.Parameter(torch.ones(H, width))
        self.ln_beta = nn.Parameter(torch.zeros(H, width))
        self.W1 = nn.Parameter(torch.randn(H, width, E) * config.ttt_std)
        self.b1 = nn.Parameter(torch.zeros(H, E))
        if self.kind == "mlp":
            self.W2 = nn.Parameter(torch.randn(H, E, width) * config.ttt_std)
            self.b2 = nn.Parameter(torch.zeros(H, width))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.out = nn.Linear(D, D)
        for linear in (*self.qkv, self.eta, self.out):
            nn.init.normal_(linear.weight, std=config.ttt_proj_std)
            nn.init.zeros_(linear.bias)

    def forward(self, x, layout):
        config = self.config
        q, k, v = (layout.by_head(rearrange(linear(x), "B L (H F) -> B H L F", H=config.heads)) for linear in self.qkv)
        rope = scan_rope(layout.whole, config.head_width, config.rope_theta, x.device)
        q, k = (rotate(F.normalize(y.float(), dim=-1, eps=1e-12), rope) for y in (q, k))
        # f learns the residual v - k; its target is normalised like its output, by the same gamma and beta.
        width = config.head_width
        residual = F.layer_norm(v.float() - k, [width], eps=1e-16) * math.sqrt((width - 1) / width)      # unbiased variance
        gamma, beta = layout.own_heads(self.ln_gamma), layout.own_heads(self.ln_beta)
        v = k + gamma[:, None] * residual + beta[:, None]
        # The step size of each token: eta_base / b in eq 13, learned by a gate, and 1/F as published in code.
        eta = self.eta_base * torch.sigmoid(self.eta(x).float()) / (config.head_width * config.mini_batch)
        eta = layout.by_head(rearrange(eta, "B L H -> B H L"))
        weights = (self.W1, self.b1) if self.kind == "linear" else (self.W1, self.b1, self.W2, self.b2)
        z, _ = ttt_scan(self.kind, [layout.own_heads(w) for w in weights], q, k, v, eta, gamma, beta, config.mini_batch,
                        eps=config.ttt_eps, checkpoint=config.scan_checkpoint, backend=config.backend)
        return self.out(self.norm(rearrange(layout.by_token(z.to(x.dtype)), "B H L F -> B L (H F)")))


# ----------------------------------------------------------------------------------------------------
# 6. Attention inside a segment
# ----------------------------------------------------------------------------------------------------


class LocalAttention(nn.Module):
    """CogVideoX's attention, within one segment at a time (section 3.2): x [B, L, D] as stored -> [B, L, D].

    Segment i attends over its own text and latent frames 12i .. 12i+12, RoPE starting at 0. Neighbouring segments share
    one latent frame; its two outputs are averaged (the paper names the overlap, its code the average). So information
    crosses one border a block even here: what TTT adds is memory beyond that.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in "qkv")
        self.norm_q = nn.LayerNorm(config.head_width, eps=config.qk_norm_eps)
        self.norm_k = nn.LayerNorm(config.head_width, eps=config.qk_norm_eps)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, layout):
        q, k, v = (rearrange(linear(x), "B L (H F) -> B H L F", H=self.config.heads) for linear in self.qkv)
        return self.out(rearrange(self.attend(self.norm_q(q), self.norm_k(k), v, layout), "B H L F -> B L (H F)"))

    def attend(self, q, k, v, layout):                                                # [B, H, L, F], each
        whole, layout = layout, layout.inside
        q, k, v = (whole.with_border(y) for y in (q, k, v))
        S, frame = layout.segments, layout.grid[1] * layout.grid[2]
        rope = rope_table((13, *layout.grid[1:]), q.shape[-1], self.config.rope_theta, q.device)
        attended = 12 * torch.arange(S, device=q.device)[:, None] + torch.arange(13, device=q.device)

        def split(y, turn):                                   # stored tokens -> one sequence a segment
            text, video = y.split([layout.text_tokens, layout.tokens - layout.text_tokens], dim=2)
            text = rearrange(text, "B H (S N) F -> B S H N F", S=S)
            video = rearrange(video, "B H (T f) F -> B H T f F", f=frame)[:, :, attended]
            video = rearrange(video, "B H S t f F -> B S H (t f) F")
            return torch.cat([text, rotate(video, rope) if turn else video], dim=3).flatten(0, 1)

        y = F.scaled_dot_product_attention(split(q, True), split(k, True), split(v, False))
        text, video = y.split([layout.text, 13 * frame], dim=2)
        text = rearrange(text, "(B S) H N F -> B H (S N) F", S=S)
        video = rearrange(video, "(B S) H (t f) F -> B H S t f F", S=S, f=frame)
        first, video = video[:, :, :, :1], video[:, :, :, 1:]                         # the frame shared with the past, the rest
        shared = (video[:, :, :-1, -1:] + first[:, :, 1:]) / 2                        # [B, H, S-1, 1, f, F]
        last = torch.cat([shared, video[:, :, -1:, -1:]], dim=2)
        video = rearrange(torch.cat([video[:, :, :, :-1], last], dim=3), "B H S t f F -> B H (S t f) F")
        return whole.merge_border(torch.cat([text, first[:, :, 0].flatten(2, 3), video], dim=2))


class FullAttention(LocalAttention):
    """One attention over all texts and all frames, RoPE from 0: CogVideoX at any length, and the paper's 11x."""

    def attend(self, q, k, v, layout):
        rope, N = rope_table(layout.grid, q.shape[-1], self.config.rope_theta, q.device), layout.text_tokens
        rope, _ = layout.own(rearrange(rope, "(T f) F -> 1 T f F", T=layout.grid[0]), rope[None])
        q, k = (torch.cat([y[:, :, :N], rotate(y[:, :, N:], rope.flatten(0, 2))], dim=2) for y in (q, k))
        return layout.by_token(F.scaled_dot_product_attention(*map(layout.by_head, (q, k, v))))


# ----------------------------------------------------------------------------------------------------
# 7. The other memories: a window, and linear recurrences (section 4.1)
#
# What the paper compares TTT with. Each has the same signature as TTT, layer(x [B, L, D] in scan order, layout) -> [B, L, D].
# The two recurrences carry a matrix S where TTT carries a network, and update it by rules that need no gradient:
#
#     Mamba 2            S_t = e^(dt_t A) S_{t-1} + dt_t x_t B_t^T                                out_t = S_t C_t
#     Gated DeltaNet     S_t = e^(g_t) S_{t-1} + beta_t k_t (v_t - k_t^T e^(g_t) S_{t-1})^T       out_t = q_t^T S_t
#
# The second is TTT-Linear without LayerNorm, with a mini-batch of one token and a decay: its bracket is the error of a linear f.
# ----------------------------------------------------------------------------------------------------


class SlidingWindow(LocalAttention):
    """Attention to the last W tokens in scan order, itself included. W is the fraction of a segment that the paper's 8192 tokens are.

    Queries come in blocks of W: each sees its own block and the one before, so memory is linear in L.
    """

    def attend(self, q, k, v, layout):
        q, k, v = map(layout.by_head, (q, k, v))
        rope = scan_rope(layout.whole, q.shape[-1], self.config.rope_theta, q.device)
        return layout.by_token(window_attention(rotate(q, rope), rotate(k, rope), v, self.config.window))


def window_attention(q, k, v, window):
    """Causal attention in which a token sees itself and the window - 1 before it: [B, H, L, F], each."""
    B, L = q.shape[0], q.shape[2]
    q, k, v = (rearrange(F.pad(y, (0, 0, 0, -L % window)), "B H (m W) F -> m B H W F", W=window) for y in (q, k, v))
    first = F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)
    i = torch.arange(window, device=q.device)
    band = torch.cat([i[None] > i[:, None], i[None] <= i[:, None]], dim=1)            # the block before, the own block: [W, 2W]
    k, v = (torch.cat([y[:-1], y[1:]], dim=3).flatten(0, 1) for y in (k, v))          # [(m-1) B, H, 2W, F]
    rest = F.scaled_dot_product_attention(q[1:].flatten(0, 1), k, v, attn_mask=band)
    return rearrange(torch.cat([first, rest]), "(m B) H W F -> B H (m W) F", B=B)[:, :, :L]


def in_chunks(x, chunk):
    """[B, H, L, ...] -> [m, B, H, chunk, ...], zeros behind the end."""
    after = (0, 0) * (x.ndim - 3) + (0, -x.shape[2] % chunk)
    return F.pad(x, after).unflatten(2, (-1, chunk)).movedim(2, 0)


def decays_within(g):
    """Log decays g [..., C] of a chunk -> their running sum G, and e^(G_t - G_i) for i <= t, zero above the diagonal: [..., C, C]."""
    G = g.cumsum(-1)
    return G, torch.exp((G[..., :, None] - G[..., None, :]).tril()).tril()


def gated_delta_rule(q, k, v, g, beta, chunk=64):
    """Gated DeltaNet's recurrence (Yang et al., 2412.06464) in chunks, in fp32 (float64 for float64).

    q, k [B, H, L, F], L2-normalised by the caller, q scaled by F^-1/2 here; v [B, H, L, V]; g log decay and beta [B, H, L].
    Returns out [B, H, L, V] and the last state [B, H, F, V].

    With u_t = beta_t (v_t - k_t^T e^(g_t) S_{t-1}), what a token writes, S_t = e^(G_t) S_0 + sum_{i<=t} e^(G_t - G_i) k_i u_i^T
    inside a chunk. So the u solve a triangular system, (I + A) U = beta (V - e^G K S_0), A_ti = beta_t e^(G_t - G_i) k_t.k_i for i < t,
    of which all but S_0 is known for all chunks at once.
    """
    L, dtype = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    q, k, v, g, beta = (in_chunks(x.to(dtype), chunk) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta))
    G, decay = decays_within(g)                                                       # [m, B, H, C], [m, B, H, C, C]
    A = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    grown = G.exp()[..., None]                                                        # e^(G_t)
    known = torch.cat([beta[..., None] * v, beta[..., None] * grown * k], dim=-1)
    U, UK = torch.linalg.solve_triangular(A + torch.eye(chunk, dtype=dtype, device=q.device), known, upper=False,
                                          unitriangular=True).split([v.shape[-1], k.shape[-1]], dim=-1)
    scores, q, k = (q @ k.mT) * decay, q * grown, k * (G[..., -1:] - G).exp()[..., None]
    S, out = torch.zeros(*k.shape[1:3], k.shape[-1], v.shape[-1], dtype=dtype, device=q.device), []
    for U_t, UK_t, q_t, k_t, scores_t, grown_t in zip(U, UK, q, k, scores, grown[:, :, :, -1:]):
        u = U_t - UK_t @ S
        out.append(q_t @ S + scores_t @ u)
        S = grown_t * S + k_t.mT @ u
    return rearrange(torch.stack(out), "m B H C V -> B H (m C) V")[:, :, :L], S


def ssd(x, dt, A, Bm, Cm, chunk=64):
    """Mamba 2's recurrence (Dao & Gu, 2405.21060) in chunks, in fp32 (float64 for float64), without the skip.

    x [B, H, L, P]; dt [B, H, L] after softplus; A [H], negative; Bm, Cm [B, G, L, N], each group serving H / G heads.
    Returns out [B, H, L, P] and the last state [B, H, P, N].
    """
    groups, L, dtype = Bm.shape[1], x.shape[2], torch.promote_types(x.dtype, torch.float32)
    x, dt, Bm, Cm = (in_chunks(y.to(dtype), chunk).unflatten(2, (groups, -1)) for y in (x, dt, Bm, Cm))      # [m, B, G, H/G or 1, C, ...]
    G, decay = decays_within(dt * A.unflatten(0, (groups, -1))[..., None])
    x = dt[..., None] * x
    within = ((Cm @ Bm.mT) * decay) @ x                                               # what a chunk tells itself
    grown, x = G.exp()[..., None], x * (G[..., -1:] - G).exp()[..., None]
    S, out = torch.zeros(*x.shape[1:4], x.shape[-1], Bm.shape[-1], dtype=dtype, device=x.device), []
    for x_t, B_t, C_t, within_t, grown_t in zip(x, Bm, Cm, within, grown):
        out.append(within_t + grown_t * (C_t @ S.mT))
        S = grown_t[..., -1:, :] * S + x_t.mT @ B_t
    return rearrange(torch.stack(out), "m B G h C P -> B (G h) (m C) P")[:, :, :L], S.flatten(1, 2)


def short_convolution(x, weight, bias=None):
    """Each channel sees itself in the last four tokens, then SiLU: x [B, H, L, F], weight [H F, 1, 4] -> [B, H, L, F]."""
    y = F.conv1d(rearrange(x, "B H L F -> B (H F) L"), weight, bias, padding=3, groups=len(weight))
    return rearrange(F.silu(y[..., :x.shape[2]]), "B (H F) L -> B H L F", H=x.shape[1])


def rms_norm(x, weight, eps=1e-5):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def decay_rates(heads, scale):
    """A and the bias of dt: A in 1 .. 16 times `scale` (1 as published), softplus(bias) log-uniform in 0.001 .. 0.1."""
    dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    return nn.Parameter(torch.empty(heads).uniform_(1, 16).mul(scale).log()), nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


class Mamba2(nn.Module):
    """Mamba 2's block: width 2D, heads of F, state N = 2F, one group. Its state is 2D x 2F numbers, four times TTT-Linear's."""

    def __init__(self, config):
        super().__init__()
        self.inner, self.heads, self.state = 2 * config.dim, 2 * config.heads, 2 * config.head_width
        self.widths = [self.inner, self.inner + 2 * self.state, self.heads]           # gate z; x, B, C; dt
        self.in_proj = nn.Linear(config.dim, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(self.widths[1], self.widths[1], kernel_size=4, groups=self.widths[1], bias=True)
        self.A_log, self.dt_bias = decay_rates(self.heads, config.decay)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, config.dim, bias=False)
        for linear in self.in_proj, self.out:
            nn.init.normal_(linear.weight, std=config.ttt_proj_std)

    def forward(self, x, layout):
        z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        u, BC = xBC.split([self.inner, 2 * self.state], dim=-1)
        u = layout.by_head(rearrange(u, "B L (H P) -> B H L P", H=self.heads))
        BC, dt = layout.by_head(BC[:, None]), layout.by_head(rearrange(dt, "B L H -> B H L"))      # B and C serve all heads
        (weight_u, weight_BC), (bias_u, bias_BC) = (y.split([self.inner, 2 * self.state]) for y in (self.conv.weight, self.conv.bias))
        own = [layout.own_heads(y.unflatten(0, (self.heads, -1))).flatten(0, 1) for y in (weight_u, bias_u)]
        u, (Bm, Cm) = short_convolution(u, *own), short_convolution(BC, weight_BC, bias_BC).chunk(2, dim=-1)
        A_log, dt_bias, D = map(layout.own_heads, (self.A_log, self.dt_bias, self.D))
        dt = F.softplus(dt.float() + dt_bias[:, None])
        with torch.autocast(x.device.type, enabled=False):
            y, _ = ssd(u, dt, -A_log.float().exp(), Bm, Cm)
        y = rearrange(layout.by_token(y + D[:, None, None] * u), "B H L P -> B L (H P)")
        return self.out(rms_norm(y * F.silu(z.float()), self.norm).to(x.dtype))


def delta_heads(config):
    """Heads of Gated DeltaNet: half of H, so that its state is as large as Mamba 2's, or H where it is odd."""
    return config.heads // 2 if config.heads % 2 == 0 else config.heads


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet's block: keys D wide, values 2D, in `delta_heads(config)` heads."""

    def __init__(self, config):
        super().__init__()
        D = config.dim
        self.heads = delta_heads(config)
        self.widths = [D, D, 2 * D]                                                   # q, k, v
        self.qkv = nn.Linear(D, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(sum(self.widths), sum(self.widths), kernel_size=4, groups=sum(self.widths), bias=False)
        self.rates = nn.Linear(D, 2 * self.heads, bias=False)                         # of decay and of writing
        self.A_log, self.dt_bias = decay_rates(self.heads, config.decay)
        self.gate = nn.Linear(D, 2 * D, bias=False)
        self.norm = nn.Parameter(torch.ones(2 * D // self.heads))
        self.out = nn.Linear(2 * D, D, bias=False)
        for linear in self.qkv, self.rates, self.gate, self.out:
            nn.init.normal_(linear.weight, std=config.ttt_proj_std)

    def by_head(self, y, n):
        """Channels [..., q k v] -> [..., heads n, q k v of one]. The columns of v never meet: in n pieces, a head is n heads."""
        q, k, v = y.split(self.widths, dim=-1)
        q, k = (repeat(part, "... (H F) -> ... (H n) F", H=self.heads, n=n) for part in (q, k))
        return torch.cat([q, k, rearrange(v, "... (H V) -> ... H V", H=self.heads * n)], dim=-1)

    def forward(self, x, layout):
        n = layout.pieces(self.heads)
        y = layout.by_head(rearrange(self.by_head(self.qkv(x), n), "B L H F -> B H L F"))
        weight = self.by_head(rearrange(self.conv.weight, "channels 1 t -> t channels"), n)
        y = short_convolution(y, rearrange(layout.own_heads(rearrange(weight, "t H F -> H F 1 t")), "H F 1 t -> (H F) 1 t"))
        K = self.widths[0] // self.heads
        q, k, v = y.split([K, K, y.shape[-1] - 2 * K], dim=-1)
        q, k = (y * torch.rsqrt(y.float().square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        step, beta = (layout.by_head(y) for y in repeat(self.rates(x).float(), "B L (two H) -> two B (H n) L", two=2, n=n))
        A_log, dt_bias = (layout.own_heads(repeat(y, "H -> (H n)", n=n)) for y in (self.A_log, self.dt_bias))
        g = -A_log.float().exp()[:, None] * F.softplus(step + dt_bias[:, None])
        with torch.autocast(x.device.type, enabled=False):
            y, _ = gated_delta_rule(q, k, v, g, beta.sigmoid())
        y = rms_norm(rearrange(layout.by_token(y), "B (H n) L V -> B H L (n V)", n=n), self.norm)
        y = rearrange(y, "B H L V -> B L (H V)") * F.silu(self.gate(x).float())
        return self.out(y.to(x.dtype))


# ----------------------------------------------------------------------------------------------------
# 8. Gate, both directions, block, model
# ----------------------------------------------------------------------------------------------------

# What carries memory across segments. Every class has the signature TTT has: layer(x, layout) -> y, [B, L, D] in scan order.
LAYERS = {"local": None, "full": None, "swa": SlidingWindow, "ttt_linear": TTT, "ttt_mlp": TTT, "mamba2": Mamba2, "gated_deltanet": GatedDeltaNet}


class Gate(nn.Module):
    """tanh(alpha) * y, alpha a vector for text and one for video tokens, all gate_init at the start (eq 6). With alpha = 0 the
    block is CogVideoX's own; it starts small so that the untrained layer disturbs little of what was learned before.
    DIFF: the paper has one alpha; its code has these two."""

    def __init__(self, config):
        super().__init__()
        self.gate_text = nn.Parameter(torch.full((config.dim,), config.gate_init))
        self.gate_video = nn.Parameter(torch.full((config.dim,), config.gate_init))

    def forward(self, y, layout):                                                     # y [B, L, D] as stored
        text, video = y.split([layout.text_tokens, layout.tokens - layout.text_tokens], dim=1)
        return torch.cat([torch.tanh(self.gate_text) * text, torch.tanh(self.gate_video) * video], dim=1)


class BothDirections(nn.Module):
    """Z = X + gate(layer(X)), Z' = Z + gate'(rev(layer(rev(Z)))): one layer, two gates (eq 6, 7, 10, 11)."""

    def __init__(self, config):
        super().__init__()
        self.layer = LAYERS[config.layer](config)
        self.gate_forward = Gate(config)
        self.gate_backward = Gate(config)

    def forward(self, x, layout):                                                     # x [B, L, D] as stored
        for gate, order in (self.gate_forward, layout), (self.gate_backward, layout.reverse()):
            x = x + gate(order.from_scan(self.layer(order.to_scan(x), order)), layout)
        return x


class AdaLN(nn.Module):
    """LayerNorm shifted and scaled by the timestep, and a gate for what the branch returns; text has its own three."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.time_dim, 6 * config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x, time, layout):                                               # [B, L, D], [B, time_dim]
        video, text = rearrange(self.linear(F.silu(time)), "B (two three D) -> two three B 1 D", two=2, three=3)
        lengths = [layout.text_tokens, layout.tokens - layout.text_tokens]
        shift, scale, gate = (torch.cat([a.expand(-1, n, -1) for a, n in zip(pair, lengths)], dim=1) for pair in zip(text, video))
        return modulate(self.norm(x), shift, scale), gate                             # each [B, L, D]


class Block(nn.Module):
    """CogVideoX's block, with the global layer between attention and its residual (eq 8 to 12)."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = AdaLN(config)
        self.attention = FullAttention(config) if config.layer == "full" else LocalAttention(config)
        self.global_layer = BothDirections(config) if LAYERS[config.layer] else None
        self.norm_2 = AdaLN(config)
        self.mlp = MLP(config)

    def forward(self, x, time, layout):
        y, gate = self.norm_1(x, time, layout)
        y = self.attention(y, layout)
        if self.global_layer is not None:
            y = self.global_layer(y, layout)
        x = x + gate * y
        y, gate = self.norm_2(x, time, layout)
        return x + gate * self.mlp(y)


def is_new(name):
    """The parameters that the pre-trained network does not have: global layers and their gates."""
    return ".global_layer." in name


def layer_of(config, name):
    """All layers share one pretrain."""
    return "local" if name == "pretrain" else config.layer


def trains(name, stage):
    """Table 2: everything, or the new parameters and local attention."""
    return stage.everything or is_new(name) or ".attention." in name


class DiT(nn.Module):
    """The diffusion transformer: (latents [B, T, C, h, w], text [B, S, N, text_dim], t int64 [B]) -> v [B, T, C, h, w] (where several
    devices share a video, of the latent frames that are here).

    With the layer "local" this is CogVideoX-5B (section 4.1), tensor for tensor.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stored_dtype = torch.float32       # of the file its base weights were read from
        self.layout = Layout        # section P puts another in its place where several devices share a video
        self.encoders = {}          # ids of the codec and the text encoder whose numbers it is trained on
        pixels = config.channels * config.patch ** 2
        self.patch_in = nn.Linear(pixels, config.dim)
        self.text_in = nn.Linear(config.text_dim, config.dim)
        self.time = TimeEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_final = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.norm_out = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.modulate_out = nn.Linear(config.time_dim, 2 * config.dim)
        self.patch_out = nn.Linear(config.dim, pixels)

    def forward(self, latents, text, t):
        config, S = self.config, text.shape[1]
        layout = self.layout(S, text.shape[2], config.grid(S))
        if latents.shape[1:] != (layout.grid[0], config.channels, config.height, config.width):
            raise ValueError(f"{S} segments need latents [B, {layout.grid[0]}, {config.channels}, {config.height}, {config.width}], "
                             f"not {list(latents.shape)}")
        latents, text = layout.own(latents, text)
        p = config.patch
        video = self.patch_in(rearrange(latents, "B T C (h p) (w q) -> B (T h w) (C p q)", p=p, q=p))
        words = self.text_in(rearrange(text, "B S N d -> B (S N) d"))
        x = torch.cat([words, video], dim=1)                                          # [B, L, D] as stored
        time = self.time(t)                                                           # [B, time_dim]
        for block in self.blocks:
            x = block(x, time, layout)
        video = self.norm_final(x[:, layout.text_tokens:])
        shift, scale = self.modulate_out(F.silu(time))[:, None].chunk(2, dim=-1)
        video = self.patch_out(modulate(self.norm_out(video), shift, scale))
        _, h, w = layout.grid
        return rearrange(video, "B (T h w) (C p q) -> B T C (h p) (w q)", h=h, w=w, p=p, q=p)

    @classmethod
    def from_cogvideox(cls, folder, layer="ttt_mlp", **overrides):
        """CogVideoX's weights from a folder that diffusers wrote: the pipeline's, or its transformer/. Global layers and gates
        start fresh. `overrides` are fields of Config. Raises UserError if the folder does not hold this network."""
        return read_cogvideox(folder, layer, overrides)

    def save_cogvideox(self, folder, shard_bytes=5_000_000_000):
        """The base network as diffusers writes and reads it, in the precision it was read in: config.json and safetensors."""
        write_cogvideox(self, folder, shard_bytes)


# ----------------------------------------------------------------------------------------------------
# 9. Diffusion
# ----------------------------------------------------------------------------------------------------


def alphas_cumprod(snr_shift=1.0):
    """alpha-bar of the 1000 diffusion steps, float64, with zero signal at the last (appendix A)."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    alpha_bar = alpha_bar / (snr_shift + (1 - snr_shift) * alpha_bar)
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def add_noise(latents, t, noise, snr_shift):
    """x_t and v of latents [B, T, C, h, w] and noise like them, at t int64 [B] in 0 .. 999 (appendix A)."""
    alpha_bar = alphas_cumprod(snr_shift).to(latents.device)[t]
    a, s = (rearrange(y.sqrt().float(), "B -> B 1 1 1 1") for y in (alpha_bar, 1 - alpha_bar))
    return a * latents + s * noise, a * noise - s * latents


def diffusion_loss(model, latents, text, t, noise):
    """Mean squared error of v (v-prediction, appendix A)."""
    x_t, v = add_noise(latents, t, noise, model.config.snr_shift)
    # An x_0 error weighted by 1/s^2, as in the published code, is the same number: x_0 = a x_t - s v.
    answer = model(x_t, text, t).float()
    if answer.shape == v.shape:
        return F.mse_loss(answer, v)
    own, _ = model.layout(text.shape[1], text.shape[2], model.config.grid(text.shape[1])).own(v, text)      # several devices share the video
    return F.mse_loss(answer, own) * (own.shape[1] / v.shape[1])


# ----------------------------------------------------------------------------------------------------
# P. Skip on first reading: many devices
#
# Parameters, their gradients and moments are sharded over devices (FSDP2): a block's are gathered while it runs. The gradient of
# a step is the sum over all devices of the gradients of their parts of the loss: other videos, or other tokens of the same video.
# ----------------------------------------------------------------------------------------------------


class Exchange(torch.autograd.Function):
    """All-to-all of a flat tensor: sent[i] numbers go to device i of the group, received[i] come from it. Its gradient goes back."""

    @staticmethod
    def forward(ctx, x, group, sent, received):
        ctx.group, ctx.sent, ctx.received = group, sent, received
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, dout):
        return Exchange.apply(dout, ctx.group, ctx.received, ctx.sent), None, None, None


@dataclass(frozen=True)
class Part(Layout):
    """What device `device` of `devices` has of a video: the tokens of its segments, texts before frames (context parallelism).

    What looks at one token needs nothing else, and local attention one frame of the segment before. A scan needs all tokens: around
    it an all-to-all turns all heads of own tokens into own heads of all tokens and back (as in 2309.14509). The shares may differ by
    a segment. Every device makes the same calls in the same order, with empty tensors where it has nothing to say, or they would
    wait for each other forever.
    """

    device: int = 0
    devices: int = 1
    group: object = dataclasses.field(default=None, compare=False)

    def of(self, device):
        return dataclasses.replace(self, device=device)

    @property
    def here(self):                 # own segments
        return range(self.segments * self.device // self.devices, self.segments * (self.device + 1) // self.devices)

    @property
    def frames(self):
        return [13 if i == 0 else 12 for i in self.here]

    @property
    def whole(self):
        return Layout(self.segments, self.text, self.grid, self.reversed)

    @property
    def inside(self):
        return Layout(len(self.here), self.text, (12 * len(self.here) + 1, *self.grid[1:]))

    def own(self, video, texts):
        first, last = self.here.start, self.here.stop
        return video[:, 12 * first + (first > 0):12 * last + 1], texts[:, first:last]

    def pass_on(self, y, step):
        """Send a frame's tokens [B, H, f, F] `step` devices on, and receive as many; none at the ends."""
        to, source, size = self.device + step, self.device - step, y.shape[0] * y.shape[1] * math.prod(self.grid[1:]) * y.shape[3]
        sent, received = ([size * (i == other) for i in range(self.devices)] for other in (to, source))
        y = y if 0 <= to < self.devices else y[:, :, :0]
        return Exchange.apply(y.flatten(), self.group, sent, received).view(*y.shape[:2], -1, y.shape[3])

    def with_border(self, y):
        text, video = y.split([self.text_tokens, self.tokens - self.text_tokens], dim=2)
        return torch.cat([text, self.pass_on(video[:, :, -math.prod(self.grid[1:]):], +1), video], dim=2)

    def merge_border(self, y):
        text, first, video = y.split([self.text_tokens, y.shape[2] - self.tokens, self.tokens - self.text_tokens], dim=2)
        second = self.pass_on(first, -1)                      # what the next device made of our last frame
        ours, last = video.split([video.shape[2] - second.shape[2], second.shape[2]], dim=2)
        return torch.cat([text, ours, (last + second) / 2], dim=2)

    @property
    def order(self):                # devices in scan order
        return range(self.devices)[::-1 if self.reversed else 1]

    def by_head(self, y):
        y = y.expand(-1, self.devices, *y.shape[2:]) if y.shape[1] == 1 else y
        B, h, rest = y.shape[0], y.shape[1] // self.devices, y.shape[3:]
        tokens = [self.of(i).tokens for i in range(self.devices)]
        sent = rearrange(y, "B (C h) L ... -> C B h L ...", C=self.devices).flatten()
        received = [B * h * L * math.prod(rest) for L in tokens]
        parts = Exchange.apply(sent, self.group, [len(sent) // self.devices] * self.devices, received).split(received)
        return torch.cat([parts[i].view(B, h, tokens[i], *rest) for i in self.order], dim=2)

    def by_token(self, y):
        tokens = [self.of(i).tokens for i in self.order]
        parts = dict(zip(self.order, y.split(tokens, dim=2)))
        sent = torch.cat([parts[i].flatten() for i in range(self.devices)])
        shape = self.devices, *y.shape[:2], self.tokens, *y.shape[3:]
        received = Exchange.apply(sent, self.group, [parts[i].numel() for i in range(self.devices)],
                                  [math.prod(shape[1:])] * self.devices)
        return rearrange(received.view(shape), "C B h L ... -> B (C h) L ...")

    def all_frames(self, video):
        """[B, own frames, ...] -> [B, T, ...] on every device; not to be differentiated."""
        parts = [self.of(i) for i in range(self.devices)]
        received = [video[:, 0].numel() * sum(part.frames) for part in parts]
        own = video.flatten().repeat(self.devices)
        parts = Exchange.apply(own, self.group, [video.numel()] * self.devices, received).split(received)
        return torch.cat([part.view(len(video), -1, *video.shape[2:]) for part in parts], dim=1)

    def own_heads(self, parameter):
        return parameter.unflatten(0, (self.devices, -1))[self.device]

    def pieces(self, heads):
        return self.devices // math.gcd(self.devices, heads)


@dataclass(frozen=True)
class Devices:
    """Which of `count` processes this is, each with a device. `context` neighbours share every video, `shard` a copy of the weights.
    Alone, a process is 0 of 1, and nothing here does anything."""

    device: torch.device
    rank: int = 0
    count: int = 1
    context: int = 1
    sharing: object = None          # the process group of those that share a video
    mesh: object = None             # over which weights are sharded: [shard], or [copies, shard]

    @property
    def groups(self):               # that read different videos
        return self.count // self.context

    @property
    def group(self):
        return self.rank // self.context

    def sum(self, x):
        """A tensor on the CPU, summed over all processes."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def tell(self, x):
        """What the first process has for x, everywhere."""
        box = [x]
        if self.count > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def collect(self, x):
        """[x of every process]."""
        boxes = [x] * self.count
        if self.count > 1:
            dist.all_gather_object(boxes, x)
        return boxes

    def first(self, work):
        """work() by the first process, while the others wait. A UserError there is one everywhere."""
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except UserError as caught:
                error = caught
        if error := self.tell(error):
            raise error
        return result


def join(device, context=1, shard=0):
    """The Devices of this process: what torchrun says in the environment, or one alone. Raises UserError for numbers that do not divide.

    Whoever falls silent is noticed by `watch`, so that a collective may wait as long as it likes: for a first process that renders.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    shard = shard or count
    for name, value in ("context_parallel", context), ("shard", shard):
        if value < 1 or count % value:
            raise UserError(f"--{name} {value} does not divide the {count} processes of this run; start as many with torchrun --nproc_per_node N")
    if count == 1:
        return Devices(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {device}: several processes need cuda or cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    if rank:                        # one voice is enough
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    threading.Thread(target=watch, args=(rank, count), daemon=True).start()
    mesh = init_device_mesh(device.type, (count // shard, shard), mesh_dim_names=("copies", "shard"))
    sharing = init_device_mesh(device.type, (count // context, context), mesh_dim_names=("videos", "context"))["context"].get_group()
    return Devices(device, rank, count, context, sharing, mesh if shard < count else mesh["shard"])


warnings.filterwarnings("ignore", "torch.distributed is disabled")       # a process alone saves its state in the same way
BEAT, SILENCE = 2, 30               # seconds
LEAVING = threading.Event()


def watch(rank, count):
    """Ends this process with a sentence when its neighbour has been silent for SILENCE seconds, or somebody else found that: who
    waits for the dead waits forever."""
    heard, silent, beats = None, 0, 0                         # silence is counted in own beats: a run may be suspended as a whole
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=datetime.timedelta(seconds=SILENCE))
        while not LEAVING.wait(BEAT):
            beats += 1
            store.set(f"beat {rank}", str(beats))
            now = store.get(f"beat {(rank + 1) % count}")     # waits for its first
            heard, silent = now, silent + 1 if now == heard else 0
            if silent * BEAT > SILENCE:
                store.set("fallen", "1")
            if store.check(["fallen"]):
                break
    except (RuntimeError, ValueError):                        # the store itself is gone, with the process that kept it
        pass
    if not LEAVING.is_set():
        print(f"error: {FALLEN}", file=sys.stderr, flush=True)
        os._exit(1)


FALLEN = "another process of this run has stopped, and the others stop with it; its own message says why; go on with --resume"


def together(main):
    """Wraps a main(): all processes end together, and the loss of one is a sentence in the others. So is a file that cannot be written."""
    @functools.wraps(main)
    def run():
        try:
            main()
            LEAVING.set()
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
        except (PermissionError, SafetensorError) as error:
            raise UserError(f"a file could not be written: {error}") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS):
                raise
            raise UserError(f"a file could not be written: {error}; make room, then go on with --resume") from error
        except RuntimeError as error:                         # gloo tells of a closed connection in a plain one
            if not dist.is_initialized() or not isinstance(error, dist.DistError) and "onnection" not in str(error):
                raise
            sys.exit(f"error: {FALLEN}")
        finally:
            LEAVING.set()
    return run


def whole(x):
    """A tensor without its sharding; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_video(model, latents, text, t):
    """What the network says of all frames, also where several devices share the video."""
    answer = model(latents, text, t)
    S, N = text.shape[1:3]
    return answer if answer.shape == latents.shape else model.layout(S, N, model.config.grid(S)).all_frames(answer)


def asks_for_heads(config):
    """Whether a global layer turns its tokens into heads by layout.by_head, as it must where several devices share a video."""
    asked = []

    class Asked(Layout):
        def by_head(self, y):
            asked.append(True)
            return y

    layout = Asked(1, 1, (13, 1, 1))
    with torch.no_grad():
        LAYERS[config.layer](dataclasses.replace(config, backend="torch"))(torch.zeros(1, layout.tokens, config.dim), layout)
    return bool(asked)


def check_devices(devices, config, stages):
    """UserError where so many processes cannot work on these stages."""
    if devices.context > 1 and config.layer != "local" and config.heads % devices.context:
        raise UserError(f"--context_parallel {devices.context} does not divide the {config.heads} heads")
    if devices.context > 1 and LAYERS[config.layer] and not asks_for_heads(config):
        raise UserError(f"--context_parallel {devices.context}: layer {config.layer} never calls layout.by_head, so that on each device it would "
                        "read that device's segments only; let it ask for its heads as TTT does")
    for name, stage in stages.items():
        if devices.context > stage.segments:
            raise UserError(f"--context_parallel {devices.context}: stage {name} has {stage.segments} segments, each for one device")
        if stage.batch % devices.groups:
            raise UserError(f"stage {name} has a batch of {stage.batch}, which {devices.groups} groups of processes cannot share; choose another "
                            "--nproc_per_node, --context_parallel or --batch_size")
        if stage.lr_muon and devices.count > 1:
            raise UserError(f"stage {name} learns by Muon, which needs whole matrices; train it in one process")


def build(make, devices):
    """The network that make() returns, on its device. Where there are several the first process makes it and hands it over, tensor by
    tensor, and each keeps its shards: it exists whole in the memory of one machine only, and on no device.

    On GPUs weights are gathered in bf16, gradients summed in fp32.
    """
    if devices.count == 1:
        return make().to(devices.device)
    made = []
    devices.first(lambda: made.append(make()))
    facts = [(model.config, model.encoders, model.stored_dtype, model.patch_in.weight.dtype) for model in made]
    config, encoders, stored_dtype, dtype = devices.tell(facts)[0]
    with torch.device("meta"):
        model = DiT(config).to(dtype)
    model.encoders, model.stored_dtype = encoders, stored_dtype
    if devices.context > 1:
        model.layout = functools.partial(Part, device=devices.rank % devices.context, devices=devices.context, group=devices.sharing)
    half = torch.bfloat16 if devices.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)      # autocast casts inputs
    for module in *model.blocks, model:
        fully_shard(module, mesh=devices.mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)                # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=devices.device)
    tensors = made[0].state_dict() if made else {}
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


# What it costs: what --dry_run prints

PAPER_TOKENS = {"3s": 18048, "9s": 51456, "18s": 99894, "30s": 168320, "63s": 341550}       # section 3.3; its text lengths differ by stage
H100_FLOPS, USED = 989e12, 0.4      # bf16, dense; the fraction that we assume a run reaches
CARD_GB = 72                        # of a GPU's 80, for what is counted here
# Bytes alive at once in a block, in units of one bf16 tensor [L, D]: in a training step, and in sampling. Counted on the CPU
# by PeakMemory of test_ttt.py.
ALIVE = {"local": (33, 15), "full": (33, 14), "swa": (67, 18), "ttt_linear": (80, 21), "ttt_mlp": (84, 22), "mamba2": (193, 41),
         "gated_deltanet": (210, 50)}


def layer_flops(config):
    """FLOPs of a global layer for one token: (its linear maps and convolutions, the rest)."""
    D, H, width, C = config.dim, config.heads, config.head_width, 64                     # C, the chunk of the recurrences
    heads = delta_heads(config)
    K, V = D // heads, 2 * D // heads
    return {"swa": (8 * D ** 2, 8 * config.window * D),
            "ttt_linear": (8 * D ** 2 + 2 * D * H, 3 * 2 * width * D),                # products of F x F, section 4
            "ttt_mlp": (8 * D ** 2 + 2 * D * H, 7 * 8 * width * D),
            "mamba2": (2 * D * (6 * D + 4 * width + 2 * H) + 8 * (2 * D + 4 * width), 4 * C * width + 2 * H * (2 * C * width + 8 * width ** 2)),
            "gated_deltanet": (2 * D * (8 * D + 2 * heads) + 32 * D, heads * (5 * C * K + 3 * C * V + 6 * K * V))}.get(config.layer, (0, 0))


def state_size(config):
    """Numbers that a global layer carries from token to token."""
    D, width = config.dim, config.head_width
    return {"swa": 2 * D * config.window, "ttt_linear": D * (width + 1), "ttt_mlp": D * (8 * width + 5), "mamba2": 4 * D * width,
            "gated_deltanet": 2 * D ** 2 // delta_heads(config)}.get(config.layer, 0)


def forward_flops(config, segments):
    """FLOPs of one video through the network, by part; a multiplication and its addition are two."""
    layout = Layout(segments, config.text_len, config.grid(segments))
    L, D, frame = layout.tokens, config.dim, math.prod(layout.grid[1:])
    scores = L ** 2 if config.layer == "full" else segments * (config.text_len + 13 * frame) ** 2
    maps, scan = layer_flops(config)
    step = {"swa": config.window, "ttt_linear": config.mini_batch, "ttt_mlp": config.mini_batch}.get(config.layer, 64)
    padded = math.ceil(L / step) * step
    pixels = config.channels * config.patch ** 2
    return {"maps of attention": config.depth * L * 8 * D ** 2,
            "attention": config.depth * 4 * scores * D,
            "MLPs": config.depth * L * 16 * D ** 2,
            "maps of layer": config.depth * 2 * L * maps,
            "scan of layer": config.depth * 2 * padded * scan,
            "the rest": 2 * D * (layout.text_tokens * config.text_dim + 2 * (L - layout.text_tokens) * pixels)
            + 2 * config.time_dim * (D * (12 * config.depth + 3) + config.time_dim)}


def step_flops(config, stage):
    """The same for one video of a training step: forward, recomputed, backward. What is frozen needs no gradient of its own."""
    replayed = config.layer in ("ttt_linear", "ttt_mlp")      # the scan's backward pass computes the states again
    backward = {"maps of attention": 2, "attention": 2.5, "MLPs": 2 if stage.everything else 1, "maps of layer": 2,
                "scan of layer": 3 if replayed else 2, "the rest": 2 if stage.everything else 1}
    forward = forward_flops(config, stage.segments)
    return {part: flops * (1 + config.recompute + backward[part]) for part, flops in forward.items()}


@functools.lru_cache
def parameter_counts(config, stage):
    """How many parameters: base, TTT, gates, trained in the stage. Nothing is allocated."""
    with torch.device("meta"):
        model = DiT(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    gates = sum(size for name, size in sizes.items() if ".gate_" in name)
    new = sum(size for name, size in sizes.items() if is_new(name))
    return sum(sizes.values()) - new, new - gates, gates, sum(size for name, size in sizes.items() if trains(name, stage))


def sharing_for(config, stage, gpus):
    """How many of so many GPUs share a video: as few as fit into CARD_GB; None where the batch cannot be spread over them."""
    fits = [C for C in range(1, min(gpus, stage.segments) + 1) if gpus % C == 0 and stage.batch % (gpus // C) == 0
            and (C == 1 or config.heads % C == 0 or config.layer == "local")]
    return next((C for C in fits if sum(training_parts(config, stage, gpus, C).values()) < CARD_GB), fits[-1] if fits else None)


def training_parts(config, stage, gpus, sharing):
    """GB of memory of a GPU, by part: weights, gradients and AdamW's moments in fp32, sharded over all GPUs; two blocks gathered in
    bf16; the inputs of all blocks, and what is alive in one, of the largest share of a video (without the buffers of exchanges)."""
    base, ttt, gates, trained = parameter_counts(config, stage)
    weights = base + ttt + gates
    tokens = Layout(stage.segments, config.text_len, config.grid(stage.segments)).tokens
    tensor = 2 * tokens * config.dim * config.micro_batch * math.ceil(stage.segments / sharing) / stage.segments
    alive = ALIVE[config.layer][0]
    parts = {"weights": 4 * weights / gpus, "gradients": 4 * trained / gpus, "moments": 8 * trained / gpus,
             "gathered": 2 * weights * min(1, 2 / config.depth if gpus > 1 else 1),
             "activations": tensor * (config.depth + alive if config.recompute else config.depth * alive)}
    return {part: size / 1e9 for part, size in parts.items()}


def exchanged_bytes(config, segments, sharing):
    """What a GPU sends to the others that share a video, on average, in one pass of the network over it, in bf16 where it is that."""
    D, H, width, C = config.dim, config.heads, config.head_width, sharing
    layout, heads = Layout(segments, config.text_len, config.grid(segments)), delta_heads(config)
    n = C // math.gcd(C, heads)
    token = {"full": 12 * D, "swa": 2 * 12 * D, "ttt_linear": 2 * (8 * D + 4 * H), "ttt_mlp": 2 * (8 * D + 4 * H),
             "mamba2": 2 * (12 * D + 4 * H + 8 * width * C),
             "gated_deltanet": 2 * (4 * D * n + 4 * D + 8 * heads * n + 8 * D)}.get(config.layer, 0)        # of it 1/C stays here
    border = 0 if config.layer == "full" else 12 * D * math.prod(layout.grid[1:])     # q, k, v of a frame, and its output back
    return config.depth * (C - 1) / C * (layout.tokens / C * token + border)


def sent_gb(config, stage, gpus, sharing):
    """GB that a GPU sends in a step: (for the sharded weights, for the shared videos). Every micro-batch gathers the weights twice, in
    bf16, and scatters the gradients, in fp32; activations pass forward, recomputed and backward."""
    base, ttt, gates, trained = parameter_counts(config, stage)
    videos = stage.batch * sharing / gpus
    weights = math.ceil(videos / config.micro_batch) * (2 * 2 * (base + ttt + gates) + 4 * trained) * (gpus - 1) / gpus
    return weights / 1e9, videos * (2 + config.recompute) * exchanged_bytes(config, stage.segments, sharing) / 1e9


def tensor_parallel_gb(config, stage, gpus, sharing):
    """The second number for tensor parallelism: maps split by columns and rows, tokens gathered before and scattered after attention,
    both directions of the layer, and the MLP."""
    tokens = Layout(stage.segments, config.text_len, config.grid(stage.segments)).tokens
    regions = 4 if LAYERS[config.layer] else 2
    passes = config.depth * (2 + config.recompute) * regions * 2
    return stage.batch * sharing / gpus * passes * 2 * config.dim * tokens * (sharing - 1) / sharing / 1e9


def sampling_gb(config, segments):
    """Memory to sample one video on one GPU, in GB, with bf16 weights; the text encoder and the VAE are elsewhere then."""
    base, ttt, gates, _ = parameter_counts(config, STAGES["3s"])
    tokens = Layout(segments, config.text_len, config.grid(segments)).tokens
    return 2 * (base + ttt + gates + tokens * config.dim * ALIVE[config.layer][1]) / 1e9


def print_cost(config, stages, names):
    """Tokens, parameters, FLOPs and memory of every stage."""
    print("tokens of a video, parameters, and TFLOP of one video in a training step, by part")
    parts = [part for part, flops in forward_flops(config, 1).items() if flops]
    print(f"{'stage':<9} {'tokens':>7} {'paper':>7} {'trained':>14}" + "".join(f"{part:>19}" for part in parts) + f"{'in all':>10}")
    for name in names:
        stage, own = stages[name], dataclasses.replace(config, layer=layer_of(config, name))
        tokens, flops = Layout(stage.segments, config.text_len, config.grid(stage.segments)).tokens, step_flops(own, stage)
        print(f"{name:<9} {tokens:>7} {PAPER_TOKENS.get(name, '') if config.preset == '5b' else '':>7} {parameter_counts(own, stage)[3]:>14,}"
              + "".join(f"{flops[part] / 1e12:>19,.1f}" for part in parts) + f"{sum(flops.values()) / 1e12:>10,.0f}")
    base, ttt, gates, _ = parameter_counts(config, stages[names[0]])
    print(f"parameters: base {base:,}, global layers {ttt:,}, gates {gates:,}\n")
    print(f"H100-hours of a stage's steps at {USED:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s, and of one sample on one GPU (50 steps, 99 passes)")
    print(f"{'stage':<9} {'H100-hours':>11}{'sampling':>12} {'minutes':>8}")
    for name in names:
        stage, own = stages[name], dataclasses.replace(config, layer=layer_of(config, name))
        hours = sum(step_flops(own, stage).values()) * stage.batch * stage.steps / (USED * H100_FLOPS) / 3600
        minutes = 99 * sum(forward_flops(own, stage.segments).values()) / (USED * H100_FLOPS) / 60
        print(f"{name:<9} {hours:>11,.1f}{sampling_gb(own, stage.segments):>9,.1f} GB {minutes:>8,.1f}")
    print(f"\nGB of memory of a GPU, by part; C GPUs share a video (--context_parallel), as few as leave it under {CARD_GB} GB; GB that a GPU "
          "sends in a step, and its seconds")
    parts = "weights", "gradients", "moments", "gathered", "activations"
    columns = "".join(f"{part:>14}" for part in (*parts, "in all", "sent: weights", "tokens", "seconds"))
    print(f"{'stage':<9} {'GPUs':>5} {'C':>3}" + columns)
    for name, gpus in ((name, gpus) for name in names for gpus in (1, 8, 64, 256)):
        stage, own = stages[name], dataclasses.replace(config, layer=layer_of(config, name))
        if sharing := sharing_for(own, stage, gpus):
            memory, sent = training_parts(own, stage, gpus, sharing), sent_gb(own, stage, gpus, sharing)
            seconds = sum(step_flops(own, stage).values()) * stage.batch / (gpus * USED * H100_FLOPS)
            numbers = *memory.values(), sum(memory.values()), *sent, seconds
            print(f"{name:<9} {gpus:>5} {sharing:>3}" + "".join(f"{number:>14,.1f}" for number in numbers)
                  + ("  does not fit" if sum(memory.values()) > CARD_GB else ""))
        else:
            print(f"{name:<9} {gpus:>5}   -  a batch of {stage.batch} videos of {stage.segments} segments cannot be spread so far")
    if config.preset == "5b" and "63s" in names:              # the published layout
        stage = stages["63s"]
        memory = training_parts(config, stage, 256, 4) | {"activations": training_parts(config, stage, 256, 1)["activations"] / 4}
        numbers = *memory.values(), sum(memory.values()), sent_gb(config, stage, 256, 4)[0], tensor_parallel_gb(config, stage, 256, 4), seconds
        print("published 256   4" + "".join(f"{number:>14,.1f}" for number in numbers)
              + "  63s, tensor parallel 4; that tokens are split, too, is assumed")
    print("(FLOPs are those of matrix products; what is sent is taken to hide behind them.)\n")


# ----------------------------------------------------------------------------------------------------
# F. Skip on first reading: files
#
# CogVideoX's folders as diffusers writes them, checkpoints to sample from, and states, from which an interrupted run goes on bit for bit.
# ----------------------------------------------------------------------------------------------------

# The names that diffusers gives to this network (CogVideoXTransformer3DModel): fields of its config.json, what they must be
# where we have no choice, and parts of the names of tensors.
COGVIDEOX_FILE = "diffusion_pytorch_model"
COGVIDEOX_CONFIG = {"channels": "in_channels", "height": "sample_height", "width": "sample_width", "text_len": "max_text_seq_length",
                    "text_dim": "text_embed_dim", "depth": "num_layers", "heads": "num_attention_heads", "head_width": "attention_head_dim",
                    "time_dim": "time_embed_dim", "patch": "patch_size", "norm_eps": "norm_eps"}
COGVIDEOX_FIXED = {"_class_name": "CogVideoXTransformer3DModel", "patch_size_t": None, "use_rotary_positional_embeddings": True,
                   "use_learned_positional_embeddings": False, "ofs_embed_dim": None, "flip_sin_to_cos": True, "freq_shift": 0,
                   "attention_bias": True, "norm_elementwise_affine": True, "activation_fn": "gelu-approximate",
                   "timestep_activation_fn": "silu", "temporal_compression_ratio": 4}
COGVIDEOX_NAMES = {"blocks.": "transformer_blocks.", "norm_1": "norm1", "norm_2": "norm2", "attention.qkv.0": "attn1.to_q",
                   "attention.qkv.1": "attn1.to_k", "attention.qkv.2": "attn1.to_v", "attention.out": "attn1.to_out.0",
                   "attention.": "attn1.", "mlp.up": "ff.net.0.proj", "mlp.down": "ff.net.2", "patch_in": "patch_embed.proj",
                   "text_in": "patch_embed.text_proj", "time.": "time_embedding.", "norm_out.": "norm_out.norm.",
                   "modulate_out": "norm_out.linear", "patch_out": "proj_out"}


def cogvideox_folder(folder):
    return Path(folder) / "transformer" if (Path(folder) / "transformer").is_dir() else Path(folder)


def cogvideox_name(name):
    """Our name of a tensor -> diffusers'."""
    for ours, theirs in COGVIDEOX_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def cogvideox_config(folder, layer, overrides):
    """The Config of a diffusers folder, the pipeline's or its transformer/; UserError if its network is not the one of this file."""
    path = cogvideox_folder(folder) / "config.json"
    saved = dataset.read_json(dataset.read_text(path), path)
    missing = [theirs for theirs in COGVIDEOX_CONFIG.values() if theirs not in saved]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; this is not the folder of CogVideoX's transformer")
    for field, value in COGVIDEOX_FIXED.items():
        if saved.get(field, value) != value:
            raise UserError(f"{path}: {field} is {saved[field]}, this network needs {value}")
    fields = {ours: saved[theirs] for ours, theirs in COGVIDEOX_CONFIG.items()}
    return Config(**{"preset": "5b", **PRESETS["5b"], **fields, "layer": layer, **overrides})


def cogvideox_files(folder):
    """Where each tensor of a diffusers folder lies, name -> path; UserError for pickles and missing or damaged files."""
    index = folder / f"{COGVIDEOX_FILE}.safetensors.index.json"
    shards = [f"{COGVIDEOX_FILE}.safetensors"]
    if index.exists():
        shards = sorted(set(dataset.read_json(dataset.read_text(index), index)["weight_map"].values()))
    files = {}
    for path in (folder / shard for shard in shards):
        pickles = sorted(folder.glob("*.bin"))
        if pickles and not path.exists():
            raise UserError(f"{pickles[0]} is a pickle, which may run code when it is opened; convert it to safetensors")
        try:
            with safe_open(path, "pt") as file:
                files |= {name: path for name in file.keys()}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; download it") from None
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or corrupt ({error}); download it again") from None
    return files


def read_cogvideox(folder, layer, overrides):
    """DiT.from_cogvideox. Tensors are read one by one, to fp32, so that no more memory is needed than the network takes."""
    folder = cogvideox_folder(folder)
    config = cogvideox_config(folder, layer, overrides)
    with torch.device("meta"):
        model = DiT(config)
    ours = {cogvideox_name(name): name for name, _ in model.named_parameters() if not is_new(name)}
    files = cogvideox_files(folder)
    for names, what in (ours.keys() - files.keys(), "is missing"), (files.keys() - ours.keys(), "is not part of this network"):
        if names:
            raise UserError(f"{folder}: tensor {min(names)} {what} ({len(names)} such in all)")
    for theirs, path in files.items():
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(theirs)
        wanted = model.get_parameter(ours[theirs]).shape
        if ours[theirs] == "patch_in.weight":             # a convolution there
            tensor = tensor.flatten(1)
        if tensor.shape != wanted:
            raise UserError(f"{path}: tensor {theirs} has shape {list(tensor.shape)}, not {list(wanted)}")
        module, _, name = ours[theirs].rpartition(".")
        setattr(model.get_submodule(module), name, nn.Parameter(tensor.float()))
    for block in model.blocks if LAYERS[layer] else ():
        block.global_layer = BothDirections(config)
    model.stored_dtype = tensor.dtype
    return model


def write_cogvideox(model, folder, shard_bytes):
    """DiT.save_cogvideox."""
    shards, size = [{}], 0
    for name, tensor in model.state_dict().items():
        if is_new(name):
            continue
        tensor = tensor.to("cpu", model.stored_dtype)
        if name == "patch_in.weight":
            tensor = rearrange(tensor, "D (C p q) -> D C p q", p=model.config.patch, q=model.config.patch)
        if size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][cogvideox_name(name)] = tensor.contiguous()
        size += tensor.nbytes
    folder, count = Path(folder), len(shards)
    names = [f"{COGVIDEOX_FILE}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{COGVIDEOX_FILE}.safetensors"]
    fields = {theirs: getattr(model.config, ours) for ours, theirs in COGVIDEOX_CONFIG.items()}
    texts = {"config.json": COGVIDEOX_FIXED | fields | {"out_channels": model.config.channels}}
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        texts[f"{COGVIDEOX_FILE}.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    for name, shard in zip(names, shards):
        with atomic(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    for name, content in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


ASSETS = Path(__file__).parent / "assets"


def run_folder(out_dir, config, name):
    """Where a stage is written: OUT_DIR/PRESET-LAYER/STAGE. All layers and seeds share a pretrain."""
    seed = f"-seed{config.seed}" if config.seed and name != "pretrain" else ""
    return Path(out_dir) / f"{config.preset}-{layer_of(config, name)}{seed}" / name


def save_model(model, path, **manifest):
    """Write what sampling needs, config included, in one file."""
    manifest = dict(manifest, encoders=model.encoders, config=dataclasses.asdict(model.config))
    first, tensors = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor.detach())
        if first:
            tensors[name] = tensor.cpu().contiguous()
    if first:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"ttt_minute": json.dumps(manifest)})


def read_checkpoint(path, whole=True):
    """Tensors and manifest of a file that save_model or save_state wrote; no tensors unless `whole`. Nothing in it is executed."""
    try:
        with safe_open(path, "pt") as file:
            manifest = json.loads((file.metadata() or {}).get("ttt_minute", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if whole}
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train its stage first")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); train its stage again with --overwrite")
    if manifest is None:
        raise UserError(f"{path} was not written by ttt_minute.py")
    return tensors, manifest


SHARED = "preset channels height width text_dim depth heads head_width time_dim patch snr_shift".split()


def difference(saved, config):
    """What keeps weights made with one config from fitting another, in words; None if nothing does."""
    if saved["layer"] not in (config["layer"], "local"):
        return f'layer "{saved["layer"]}", this run has "{config["layer"]}"'
    return next((f"{field} {saved[field]}, this run has {config[field]}" for field in SHARED if saved[field] != config[field]), None)


def check_config(path, saved, config):
    if found := difference(saved, config):
        raise UserError(f"{path} was trained with {found}")


def find_checkpoint(out_dir, config, name):
    """The file of a trained stage: one in OUT_DIR, else one that ships in assets/ and fits; None if there is neither."""
    folder = run_folder(out_dir, config, name)
    if (own := folder / "model.safetensors").exists():
        return own
    shipped = ASSETS / f"{folder.parent.name}-{name}.safetensors"
    fits = shipped.exists() and not difference(read_checkpoint(shipped, whole=False)[1]["config"], dataclasses.asdict(config))
    return shipped if fits else None


def load_weights(model, path, encoders):
    """Start from an earlier stage. A `local` checkpoint leaves the new parameters as they are initialised."""
    tensors, manifest = read_checkpoint(path)
    check_config(path, manifest["config"], dataclasses.asdict(model.config))
    dataset.check_encoders(path, manifest["encoders"], encoders, "train that stage again with --overwrite")
    missing, extra = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not (manifest["config"]["layer"] == "local" and is_new(name))]
    if missing or extra:
        raise UserError(f"{path} does not fit this network: tensor {(missing + extra)[0]} is {'missing' if missing else 'unknown'}")


def load_checkpoint(path):
    """The DiT in a model.safetensors, with the config it was trained with."""
    tensors, manifest = read_checkpoint(path)
    known = {field.name for field in dataclasses.fields(Config)}
    model = DiT(Config(**{name: value for name, value in manifest["config"].items() if name in known}))
    model.load_state_dict(tensors)
    model.encoders = manifest["encoders"]
    return model


def state_tensors(model, optimizers):
    """Everything that changes in training, name -> tensor: weights, moments, AdamW's count of steps."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {"model." + name: tensor for name, tensor in model.state_dict().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"{key}.{names[parameter]}": value for key, value in state.items()}
    return tensors


def checksum(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def hash_files(folder, names, devices):
    """{name: sha256}; the processes share the work."""
    own, mine = sorted(names)[devices.rank::devices.count], {}
    for name in own:
        try:
            with open(folder / name, "rb") as file:
                mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            mine[name] = f"unreadable: {error}"
    return {name: digest for found in devices.collect(mine) for name, digest in found.items()}


def save_state(folder, model, optimizers, step, manifest, devices):
    """state/STEP: everything resuming needs, one safetensors file a process and manifest.json. The last two are kept.

    All is written beside, the manifest with its checksums last, and then renamed: a state is there whole or not at all. Training waits
    for it: that is seconds every hundred steps, and a copy to write in the background would need its memory and fail unseen.
    """
    path = folder / "state" / f"{step:06d}"
    partial = path.with_name(f".{path.name}.partial")
    try:
        with said_by_all(devices):
            if devices.rank == 0:
                for left in (folder / "state").glob(".*.partial"):
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
        tensors = {name: tensor.detach() for name, tensor in state_tensors(model, optimizers).items()}
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True), no_dist=devices.count == 1)
        files = hash_files(partial, [file.name for file in partial.glob("*.safetensors")], devices)
        with said_by_all(devices):
            if devices.rank == 0:
                content = manifest | dict(step=step, samples=step * manifest["batch"], seed=manifest["config"]["seed"],
                                          processes=devices.count, files=files)
                (partial / "manifest.json").write_text(json.dumps(content | {"checksum": checksum(content)}, indent=1))
                shutil.rmtree(path, ignore_errors=True)       # found damaged, or it would not be written again
                os.replace(partial, path)
    except (OSError, SafetensorError, CheckpointException) as error:
        if devices.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        kept = f"the last good one is {saved_states(folder)[-1]}" if saved_states(folder) else "there is none before it"
        raise UserError(f"{path}: the state could not be saved ({reason}); {kept}; make room, then go on with --resume") from None
    for old in saved_states(folder)[:-2] if devices.rank == 0 else ():
        shutil.rmtree(old)


@contextlib.contextmanager
def said_by_all(devices):
    """An OSError in one process becomes one in all, where otherwise the others would wait."""
    error = None
    try:
        yield
    except OSError as caught:
        error = caught
    if found := [error for error in devices.collect(error) if error]:
        raise found[0]


def saved_states(folder):
    return sorted(path for path in (folder / "state").glob("*") if path.name.isdigit())


def check_state(path, devices):
    """(manifest, None), or (None, what is wrong with a state): cut, changed or put in another's place."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest.pop("checksum") != checksum(manifest) or manifest["step"] != int(path.name):
            wrong = "manifest.json is not what was written"
        else:
            wrong = next((f"{name} is missing" for name in manifest["files"] if not (path / name).exists()), None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        wrong = f"manifest.json: {error}"
    if any(wrongs := devices.collect(wrong)):
        return None, next(filter(None, wrongs))
    found = hash_files(path, manifest["files"], devices)
    wrong = [name for name, digest in manifest["files"].items() if found[name] != digest]
    return (None, f"{wrong[0]} is not what was written") if wrong else (manifest, None)


def load_state(folder, model, optimizers, manifest, devices):
    """Put the newest whole state back and return its step. It may have been saved by another number of processes."""
    for path in reversed(saved_states(folder)):
        saved, wrong = check_state(path, devices)
        if saved:
            break
        print(f"{path} is damaged ({wrong}) and set aside", file=sys.stderr)
        devices.first(lambda: os.replace(path, path.with_name(f"damaged-{path.name}-{time.time_ns()}")))
    else:
        raise UserError(f"{folder / 'state'}: no state is whole; start the stage again with --overwrite")
    check_config(path, saved["config"], manifest["config"])
    dataset.check_encoders(path, saved["encoders"], manifest["encoders"], "start the stage again with --overwrite")
    for key in ("batch", "steps", "minutes", "videos"):
        if saved.get(key) != manifest[key]:
            raise UserError(f"{path} was made by a run with {key} {saved.get(key)}, this one has {manifest[key]}; resume with the same flags and data")
    reader = HuggingFaceStorageReader(str(path))
    shapes = {tuple(key.split(".", 1)): entry.size for key, entry in reader.read_metadata().state_dict_metadata.items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            kinds = {kind: shape for (kind, name), shape in shapes.items() if name == names[parameter] and kind != "model"}
            optimizer.state[parameter] = {kind: torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(shape)
                                          for kind, shape in kinds.items()}
    dcp.load(state_tensors(model, optimizers), storage_reader=reader, no_dist=devices.count == 1)
    return saved["step"]


# ----------------------------------------------------------------------------------------------------
# 10. Training in stages (section 3.3, Table 2)
# ----------------------------------------------------------------------------------------------------


def decays(name, parameter):
    """Weight decay is for matrices, TTT's W1 and W2 among them; not for biases, norms and gates."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] in ("weight", "W1", "W2")


def make_optimizers(model, stage, config):
    """AdamW over what the stage trains, in up to four groups: new or not, decayed or not. In pretrain Muon takes the matrices."""
    groups, matrices = {}, []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, stage))
        if stage.lr_muon and name.startswith("blocks.") and parameter.ndim == 2:
            matrices.append(parameter)
        elif parameter.requires_grad:
            key = is_new(name), decays(name, parameter)
            groups.setdefault(key, []).append(parameter)
    groups = [dict(params=params, peak=stage.lr_new if new else stage.lr_rest, schedule=stage.schedule_new if new else stage.schedule_rest,
                   new=new, weight_decay=config.weight_decay * decay) for (new, decay), params in groups.items()]
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))]
    if matrices:
        group = dict(params=matrices, peak=stage.lr_muon, schedule=stage.schedule_rest, new=False)
        optimizers.append(torch.optim.Muon([group], lr=0.0, weight_decay=config.weight_decay))
    return optimizers


@torch.no_grad()
def unit_attention(model):
    """The same function with attention outputs near 1. Muon's steps have no scale: attention grew to hundreds while adaLN's
    gate shrank, and beside hundreds a TTT layer behind its gate would be nothing."""
    for block in model.blocks:
        v, out, norm = block.attention.qkv[2], block.attention.out, block.norm_1.linear
        scale = (out.weight @ v.weight).norm() / model.config.dim ** 0.5
        for parameter, factor in (v.weight, scale.sqrt()), (v.bias, scale.sqrt()), (out.weight, scale.sqrt()), (out.bias, scale):
            parameter /= factor
        for parameter in norm.parameters():
            gates = rearrange(parameter, "(two three D) ... -> two three D ...", two=2, three=3)[:, 2]
            gates *= scale


def lr_at(step, steps, peak, schedule, config):
    """Learning rate of a step 0 .. steps-1: linear warmup, then constant or a cosine that ends at LR_END."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return LR_END + (peak - LR_END) * (1 + math.cos(math.pi * progress)) / 2


GOLDEN = (5 ** 0.5 - 1) / 2


def draw(runs, stage, config, name, step, group=0, groups=1):
    """Yields the batch of a step in micro-batches: latents, text, t, noise; of several groups of processes each gets its share. Seed,
    stage, step and place in the batch decide everything, so a resumed run needs no random state: it draws what the undisturbed run
    would have drawn, and any number of processes draws the same.

    DIFF: t is uniform in 0 .. 999 as in the paper (or in a stage's part of it), but the t of successive samples are a golden section
    apart, so that small batches see all noise levels equally often and the loss is less noisy (after Kingma et al., 2107.00630).
    """
    seed = config.seed * 1_000_003 + list(STAGES).index(name) * 100_003
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + step)
    items = torch.randint(len(runs), (stage.batch,), generator=generator)
    keep = torch.rand(stage.batch, generator=generator) >= config.text_dropout
    t = (offset + GOLDEN * (step * stage.batch + torch.arange(stage.batch, dtype=torch.float64))) % 1
    t = stage.noise[0] + t * (stage.noise[1] - stage.noise[0])
    seeds = torch.randint(2 ** 32, (stage.batch,), generator=generator).tolist()
    for own in torch.arange(stage.batch).chunk(groups)[group].split(config.micro_batch):
        latents, text = runs.batch(items[own].tolist())
        noise = torch.stack([torch.randn(latents[0].shape, generator=torch.Generator().manual_seed(seeds[i])) for i in own])
        yield latents, text * keep[own, None, None, None], (1000 * t[own]).long(), noise


def prepare(model):
    """Recomputation and compilation, by block, as the config asks."""
    for block in model.blocks:
        if model.config.compile:
            block.forward = torch.compile(block.forward)
        if model.config.recompute:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


SPIKE = 10                          # a loss so many times the median of the last 50 is not learning any more


def check_loss(loss, norm, recent, where, folder, devices):
    """Ends the run with a sentence when the loss or its gradient is not finite any more, or the loss jumps, before a weight is touched."""
    spike = len(recent) >= 20 and loss > SPIKE * statistics.median(recent)
    if spike or not torch.isfinite(loss + norm):
        kept = saved_states(folder)
        became = f"jumped from {statistics.median(recent):.3g} to {loss:.3g}" if spike else f"or its gradient became {(loss + norm).item()}"
        sentence = (f"error: the loss {became} at {where}; {f'the last good state is {kept[-1]}' if kept else 'nothing had been saved yet'}; "
                    "lower the learning rate or eta")
        sys.exit(1 if devices.rank else sentence)


def train(model, name, stage, runs, folder, save_every, devices):
    """One stage. Goes on from a saved state if there is one.

    Ctrl-C or SIGTERM ends the step, saves and leaves.
    """
    config, device = model.config, devices.device
    optimizers = make_optimizers(model, stage, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trainable = [parameter for group in groups for parameter in group["params"]]
    manifest = dict(config=dataclasses.asdict(config), stage=name, steps=stage.steps, minutes=stage.minutes, batch=stage.batch,
                    videos=len(runs), encoders=runs.encoders)
    prepare(model)
    first = load_state(folder, model, optimizers, manifest, devices) if saved_states(folder) else 0
    tokens = stage.batch * Layout(stage.segments, config.text_len, config.grid(stage.segments)).tokens
    log, recent, spent = open_log(folder / "log.jsonl", first, devices)
    asked, done = [], first
    old_handlers = {number: signal.signal(number, lambda *_: asked.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}

    bar = tqdm(desc=name, initial=first, total=None if stage.minutes else stage.steps, unit="step", dynamic_ncols=True)
    while (place := schedule_step(stage, done, spent)) < stage.steps:
        begin, step = time.perf_counter(), done
        for group in groups:
            group["lr"] = lr_at(place, stage.steps, group["peak"], group["schedule"], config)
        loss = 0.0
        for batch in draw(runs, stage, config, name, step, devices.group, devices.groups):
            latents, text, t, noise = (x.to(device) for x in batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                part = diffusion_loss(model, latents, text, t, noise) * len(t) / stage.batch
            part.backward()
            loss += part.detach()
        norm = whole(torch.nn.utils.clip_grad_norm_(trainable, config.clip)).cpu()
        loss, interrupted = devices.sum(torch.stack([loss.cpu(), torch.tensor(float(bool(asked)))]))
        check_loss(loss, norm, recent, f"step {step} of stage {name}", folder, devices)
        recent.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

        seconds, done = devices.sum(torch.tensor(time.perf_counter() - begin)).item() / devices.count, step + 1
        spent += seconds
        lr = {"lr_new" if group["new"] else "lr": group["lr"] for group in optimizers[0].param_groups}
        log.write(json.dumps(dict(stage=name, step=step, loss=loss.item(), **lr, grad_norm=norm.item(), ms=round(1000 * seconds, 1),
                                  tokens_per_second=round(tokens / seconds), memory_gb=round(memory_gb(device), 2))) + "\n")
        log.flush()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
        over = schedule_step(stage, done, spent) >= stage.steps
        if interrupted or over or done % save_every == 0:
            save_state(folder, model, optimizers, done, manifest, devices)
        if interrupted and not over:
            bar.close()
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            print(f"interrupted after step {done} of stage {name}, which is saved; go on with --resume", file=sys.stderr)
            raise KeyboardInterrupt
    bar.close()
    log.close()
    for number, handler in old_handlers.items():
        signal.signal(number, handler)
    model.encoders = runs.encoders
    if stage.lr_muon:
        unit_attention(model)
    save_model(model, folder / "model.safetensors", stage=name, steps=done, minutes=stage.minutes)


def schedule_step(stage, done, seconds):
    """Where a stage is in its schedule of steps, after so many steps and seconds: at the step, or at its share of the minutes."""
    return int(stage.steps * seconds / (60 * stage.minutes)) if stage.minutes else done


def open_log(path, first, devices):
    """A stage's log, without the steps that will be taken again, its last 50 losses and its seconds. The first process writes for all."""
    lines = []
    if devices.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True)[:first] if path.exists() else []
        with atomic(path) as temporary:
            temporary.write_text("".join(lines))
    steps = [json.loads(line) for line in devices.tell(lines)]
    recent = collections.deque((step["loss"] for step in steps), maxlen=50)
    return open(os.devnull, "w") if devices.rank else path.open("a"), recent, sum(step["ms"] for step in steps) / 1000


def memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return math.nan             # Windows has no `resource`
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


# ----------------------------------------------------------------------------------------------------
# C. Skip on first reading: the command line
#
# Every Config field is a flag, and a few flags say what to run.
# ----------------------------------------------------------------------------------------------------


def add_device_flags(parser):
    parser.add_argument("--context_parallel", type=int, default=1, metavar="C", help="with torchrun: so many processes share every video (default 1)")
    parser.add_argument("--shard", type=int, default=0, metavar="N",
                        help="with torchrun: so many processes share a copy of the weights (default: all)")


def add_config_flags(parser):
    group = parser.add_argument_group("every field of Config is a flag too; the preset's value stands unless given")
    for field in dataclasses.fields(Config):
        choices = {"preset": list(PRESETS), "layer": list(LAYERS), "backend": backends()}.get(field.name)
        kind = type(field.default)
        if kind is bool:
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=f"pocket: {field.default}")
        else:
            group.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=None if choices else kind.__name__,
                               help=f"pocket: {field.default}")


def config_from(args):
    """Defaults, then the preset's row or what --init_from says of CogVideoX, then the flags."""
    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)}
    given = {name: value for name, value in flags.items() if value is not None}
    row = PRESETS[given.get("preset", Config.preset)]
    if args.init_from and Path(args.init_from).is_dir():
        if given.get("preset") != "5b":
            raise UserError(f"--init_from {args.init_from}: a folder is taken for CogVideoX's weights; add --preset 5b, or name a model.safetensors")
        row = dataclasses.asdict(cogvideox_config(args.init_from, given.get("layer", Config.layer), {}))
    config = Config(**{**row, **given})
    for name in "depth heads head_width patch mini_batch scan_checkpoint text_len micro_batch".split():
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1 is needed")
    if config.head_width % 16:
        raise UserError(f"--head_width {config.head_width}: must be a multiple of 16, since RoPE turns eighths of it in pairs")
    if config.height % config.patch or config.width % config.patch:
        raise UserError(f"--patch {config.patch} does not divide latents of {config.height} x {config.width}")
    return config


def pick_device(name=None):
    """The device asked for, or the first of these that there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(name or next(kind for kind in there if there[kind]))
    if not there.get(device.type, False):
        raise UserError(f"--device {name}: this machine has {', '.join(kind for kind in there if there[kind])}")
    return device


def seconds_a_token(config, device):
    """Time a training step of 3-second clips, to announce how long a run will take."""
    batch = config.micro_batch
    model = DiT(config).to(device)
    text = torch.zeros(batch, 1, config.text_len, config.text_dim, device=device)
    latents = torch.zeros(batch, 13, config.channels, config.height, config.width, device=device)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        diffusion_loss(model, latents, text, torch.zeros(batch, dtype=torch.long), latents).backward()
        times.append(time.perf_counter() - begin)
    return min(times) / (batch * Layout(1, config.text_len, config.grid(1)).tokens)


def print_plan(config, stages, todo, start, device, episodes):
    minutes = lambda seconds: f"{seconds / 60:7.1f} min" if seconds == seconds else f"{'not known':>11}"
    print(f"{config.preset}, layer {config.layer} (state of {state_size(config):,} numbers a block), on {device} with {torch.get_num_threads()} threads."
          " Paper's numbers in brackets (Table 2).\n")
    print(f"{'stage':<9} {'segments':>8} {'tokens':>8} {'steps x batch':>22} {'lr of new / rest':>36} {'expected':>9}")
    if episodes:
        world = f"{episodes} episode{'s' * (episodes > 1)} of a minute: render, encode"
        print(f"{'world':<9} {world:<76} {minutes(WORLD_SECONDS * episodes)}")
    total = WORLD_SECONDS * episodes
    rate = {}
    for name in todo:
        stage, paper = stages[name], STAGES[name]             # pretrain is not the paper's
        own = dataclasses.replace(config, layer=layer_of(config, name))
        if own.layer not in rate:
            rate[own.layer] = seconds_a_token(own, device) if config.preset != "5b" else math.nan
        tokens = Layout(stage.segments, config.text_len, config.grid(stage.segments)).tokens
        sampling = rate[own.layer] * tokens * 30                                      # it reads its video 99 times, forward only
        seconds = sampling + (60 * stage.minutes or rate[own.layer] * tokens * stage.steps * stage.batch)
        total += seconds
        known = name != "pretrain"
        steps = f"{stage.minutes:.1f} min" if stage.minutes else f"{stage.steps}"
        steps += f" x {stage.batch}" + (f" ({paper.steps} x {paper.batch})" if known else "")
        lr = f"{stage.lr_new:.0e} / {stage.lr_rest:.0e}" + (f" ({paper.lr_new:.0e} / {paper.lr_rest:.0e})" if known else "")
        print(f"{name:<9} {stage.segments:>8} {tokens:>8} {steps:>22} {lr:>36} {minutes(seconds)}")
    print(f"{'in all':<87} {minutes(total)}\n")
    if start:
        print(f"starts from {start}\n")


def open_runs(data, segments, config):
    """The training videos, if they fit this run."""
    runs = dataset.Runs(data, segments)
    sizes = dict(zip(("channels", "height", "width", "text_len", "text_dim"), runs.index["latents"][1:] + runs.index["text"]))
    flags = " ".join(f"--{name} {value}" for name, value in sizes.items() if value != getattr(config, name))
    if flags:
        raise UserError(f"{data} holds latents and texts of other sizes than this run's; ingest the videos again, or add {flags}")
    return runs


def find_start(args, config, chain):
    """The weights to start from, and the stages of the chain to train: those after the nearest trained one."""
    own = run_folder(args.out_dir, config, args.stage) / "model.safetensors"
    if own.exists() and not args.overwrite:
        if args.init_from:
            raise UserError(f"--init_from {args.init_from}: stage {args.stage} is already trained; add --overwrite to train it again")
        return own, []
    if args.init_from:
        return Path(args.init_from), [args.stage]
    for i in reversed(range(1, len(chain))):
        start = find_checkpoint(args.out_dir, config, chain[i - 1])
        if start:
            return start, chain[i:]
    return None, chain


def check_5b(args, start, todo):
    """Preset 5b makes nothing by itself: weights and data are the user's."""
    if not start and args.stage == "3s":
        raise UserError("stage 3s of preset 5b starts from CogVideoX-5B's weights; name their folder with --init_from FOLDER")
    if len(todo) > 1:
        raise UserError(f"stage {args.stage} starts from the stage before it, and {todo[-2]} is not trained; "
                        f"train it with --stage {todo[-2]}, or name weights with --init_from")
    if todo and not args.data:
        raise UserError("--data DIR is missing; make it with python dataset.py --ingest VIDEOS --out DIR --vae FOLDER --text_encoder FOLDER")


def new_model(config, start, encoders):
    """A network on the CPU with the weights of `start`: an earlier stage, a folder of CogVideoX, or none."""
    torch.manual_seed(config.seed)
    if start and start.is_dir():
        return DiT.from_cogvideox(start, **dataclasses.asdict(config))
    model = DiT(config)
    if start:
        load_weights(model, start, encoders)
    return model


def make_world(videos, data, episodes, config):
    """The pocket world, from drawing to latents in `data`."""
    world = dataset.open_encoders(size=config.frame_size, text=config.text_size)
    dataset.render_world(videos, episodes)
    dataset.ingest(videos, data, *world)


WORLD_SECONDS = 0.8                 # an episode of the pocket world on two cores, from drawing to latents


@together
def main():
    parser = Parser("ttt_minute.py", description="Train a stage of one-minute video generation with TTT, and what it needs before it.",
                    epilog="example: python ttt_minute.py --stage 9s")
    parser.add_argument("--stage", choices=list(STAGES), default="9s", help="train up to this stage (default 9s)")
    parser.add_argument("--out_dir", default="out", help="where runs are written (default out)")
    parser.add_argument("--data", help="a folder made by `dataset.py --ingest` (default: the pocket world, rendered when missing)")
    parser.add_argument("--episodes", type=int, help="one-minute episodes of the pocket world to train on (default 256)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps of every stage, in place of the preset's")
    length.add_argument("--minutes", type=float, help="train the stage for so long instead, and those before it in proportion to their tokens")
    parser.add_argument("--batch_size", type=int, help="videos a step, in place of the preset's")
    parser.add_argument("--checkpoint_every", type=int, default=100, help="save what --resume needs every so many steps (default 100)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    add_device_flags(parser)
    parser.add_argument("--init_from", metavar="PATH", help="weights to start the stage from, in place of the stage before it: a "
                        "model.safetensors, or with --preset 5b CogVideoX's folder")
    parser.add_argument("--vae", metavar="FOLDER", help="CogVideoX's VAE, to end a stage on real videos with a video")
    parser.add_argument("--vae_scale", type=float, metavar="X", help="the scale the videos were ingested with (default: the VAE's own)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted stage")
    parser.add_argument("--overwrite", action="store_true", help="train the stage again")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    add_config_flags(parser)
    parser.set_defaults(**{field.name: None for field in dataclasses.fields(Config)})
    args = parser.parse_args()
    for name in ("steps", "batch_size", "checkpoint_every", "episodes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1 is needed")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes}: more than 0 is needed")
    config, device = config_from(args), pick_device(args.device)

    changes = {"steps": args.steps, "batch": args.batch_size}
    changes = {field: value for field, value in changes.items() if value}
    stages = {name: dataclasses.replace(stage, **changes) for name, stage in PRESET_STAGES[config.preset].items()}
    if args.stage not in stages:
        raise UserError(f"--stage {args.stage}: preset {config.preset} has the stages {', '.join(stages)}")
    chain = list(stages)[:list(stages).index(args.stage) + 1]
    if args.minutes:
        tokens = {name: stage.steps * stage.batch * stage.segments for name, stage in stages.items()}
        stages = {name: dataclasses.replace(stage, minutes=args.minutes * tokens[name] / tokens[args.stage]) for name, stage in stages.items()}
    folders = {name: run_folder(args.out_dir, config, name) for name in chain}
    start, todo = find_start(args, config, chain)
    data = Path(args.data or Path(args.out_dir) / "pocket-world" / "latents-{}x{}".format(*config.frame_size))
    own_videos = args.data or config.preset == "5b"
    if own_videos and args.episodes:
        raise UserError(f"--episodes {args.episodes}: it counts episodes of the pocket world; this run takes {args.data or 'the videos of --data'}")
    there = len(list(data.glob("*.safetensors"))) if (data / "index.json").exists() else 0
    episodes = args.episodes or there or 256
    if episodes < there:
        raise UserError(f"--episodes {episodes}: {data} holds {there} already; take another --out_dir for fewer")
    missing = 0 if own_videos or not todo else episodes - there
    if args.dry_run:
        print_plan(config, stages, todo or chain, start if todo else None, device, missing)
        return print_cost(config, stages, todo or chain) if config.preset != "pocket" else None
    if config.preset == "5b":
        check_5b(args, start, todo)
    for name in todo:
        if saved_states(folders[name]) and not args.resume and not (args.overwrite and name == args.stage):
            raise UserError(f"stage {name} was interrupted; add --resume to go on, or --overwrite to start it again")
    devices = join(device, args.context_parallel, args.shard)
    device = devices.device
    check_devices(devices, config, {name: stages[name] for name in todo or [args.stage]})
    if todo:
        devices.first(lambda: print_plan(config, stages, todo, start, device, missing))
    if missing:
        devices.first(lambda: make_world(Path(args.out_dir) / "pocket-world" / "videos", data, episodes, config))
    import sample
    runs = open_runs(data, stages[args.stage].segments, config) if todo or args.data else None      # a mistake should show before hours of work
    made_with = runs.encoders if runs else read_checkpoint(start, whole=False)[1]["encoders"]
    codec, text_encoder = dataset.encoders_of(made_with, data if runs else start, args.vae, None, args.vae_scale,
                                              config.frame_size, config.text_size, device)

    for name in todo:
        stage, folder = stages[name], folders[name]
        runs = open_runs(data, stage.segments, config)
        model = build(lambda: new_model(dataclasses.replace(config, layer=layer_of(config, name)), start, runs.encoders), devices)
        if args.overwrite and name == args.stage:
            devices.first(lambda: shutil.rmtree(folder, ignore_errors=True))
        train(model, name, stage, runs, folder, args.checkpoint_every, devices)
        start = folder / "model.safetensors"
        devices.first(lambda: sample.plot_loss(folder))
        sample.show_stage(model, folder, stage.segments, codec, text_encoder, runs, devices)
    if not todo:
        print(f"stage {args.stage} is already trained ({folders[args.stage]}); --overwrite trains it again")
        model = build(lambda: load_checkpoint(start), devices)
        sample.show_stage(model, folders[args.stage], stages[args.stage].segments, codec, text_encoder, runs, devices)
    print(f"done: {folders[args.stage]} holds {', '.join(sorted(path.name for path in folders[args.stage].iterdir()))}")


if __name__ == "__main__":
    from ttt_minute import main     # as one module, so that errors raised elsewhere are the errors caught here
    run_main(main)
