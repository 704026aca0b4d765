"""One-Minute Video Generation with Test-Time Training (arXiv 2504.05298), in one file.

A diffusion transformer (DiT) makes 3-second clips well. To tell a one-minute story it must remember what the
red room looked like forty seconds ago. Full attention remembers everything and costs 11 times as much as
attention inside 3-second segments; a recurrent layer is cheap and forgets, because its hidden state is small.
Test-time training (TTT) makes the hidden state itself a small network f with weights W, and lets *reading*
the sequence mean *training* f on it, one gradient step per 64 tokens. This file adds such layers, behind a
gate, to CogVideoX, keeps attention inside each 3-second segment, and trains the whole in stages up to a
minute.

    python ttt_minute.py --stage 9s            # draws a small cartoon world, trains, ends with a video
    python sample.py --segments 3              # a video by weights that ship in assets/

Read [1] the paper; [2] Sun et al., Learning to (Learn at Test Time), 2407.04620, for the TTT layer;
[3] Yang et al., CogVideoX, 2408.06072, for the DiT; [4] Salimans & Ho, 2202.00512, for v-prediction.

Glossary: code (paper)
    B, S, L, N        batch; 3-second segments; tokens in the whole sequence; text tokens of a segment
    T, h, w, C        latent frames (12 S + 1); rows and columns of patches in a frame; latent channels
    D, H, F, E        model width; heads; head width; inner hidden width E = 4F (TTT-Linear has none)
    M, b              mini-batches; tokens of one mini-batch (the paper's b)
    W                 the hidden state: weights of the inner model f, (W1, b1) or (W1, b1, W2, b2)
    q, k, v           theta_Q x, theta_K x, theta_V x (eq 4, 5): f learns to map k to v - k, and is read at q
    eta               the inner learning rate of each token
    gamma, beta       scale and shift of the LayerNorm around f
    gate_forward, gate_backward   the paper's alpha and beta of eq 6 to 12
    DIFF:             marks every departure from the paper or from its published code, with the reason


What a first reading skips is in appendix/: kernels.py makes the scan of section 4 fast, memories.py has the
paper's other memories, devices.py many GPUs. This file needs none of them: --backend primal runs without.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as nnf
import torch.utils.checkpoint
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from tqdm import tqdm

import dataset
from dataset import FRAMES, UserError                        # FRAMES: 12, the latent frames of a segment

# 1. Config, presets and stages ----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that shapes the network and its training. The defaults are the preset "pocket"."""
    preset: str = "pocket"          # a row of PRESETS
    layer: str = "ttt_mlp"          # a key of LAYERS: what carries memory across segments

    # The latent video and its text
    channels: int = 16              # C, latent channels
    height: int = 8                 # latent rows and columns before patching, an eighth of the pixels
    width: int = 12
    text_len: int = 40              # N, text tokens of a segment
    text_dim: int = 64              # width of the text encoder's output

    # The transformer (section 4.1 of the paper: CogVideoX-5B)
    depth: int = 4
    heads: int = 4                  # H
    head_width: int = 32            # F
    time_dim: int = 128             # width of the timestep embedding
    patch: int = 2

    # The inner loop (sections 2.3 and 3.4). A small world has few inner steps, so it needs bolder ones: a
    # 9-second video is 16 steps here, and 792 at 5b.
    mini_batch: int = 64            # b
    eta_mlp: float = 0.7            # eta_base of TTT-MLP
    eta_linear: float = 1.0         # eta_base of TTT-Linear
    first_values: bool = True       # of TTT layers come from a batch: TTT.first_values
    ttt_std: float = 0.02           # standard deviation of the first W1 and W2 otherwise
    ttt_proj_std: float = 0.09      # of the maps around the scan: 1/sqrt(D), the paper's 0.02 at D = 3072
    scan_checkpoint: int = 4        # the scan keeps W every so many mini-batches, for its backward pass
    gate_init: float = 0.2          # of the gates (eq 6): small, so that untrained layers disturb little
    backend: str = "auto"           # of ttt_scan: autograd, dual, primal, or one of appendix/kernels.py

    # Training (appendix A)
    snr_shift: float = 3.0          # > 1 means more noise; 3 as in CogVideoX-2B, 1 as in CogVideoX-5B
    warmup: float = 0.02            # fraction of a stage's steps
    clip: float = 0.1               # gradient norm
    weight_decay: float = 1e-4      # on matrices only
    text_dropout: float = 0.1       # how often all text of a sample is zeroed, for classifier-free guidance
    micro_batch: int = 8            # videos on the device at once; a batch sums the gradients of several
    recompute: bool = False         # keep the inputs of blocks only, and compute the rest again
    compile: bool = False           # torch.compile the blocks, all but the scan
    seed: int = 0

    @property
    def dim(self):                  # D
        return self.heads * self.head_width

    @property
    def window(self):               # of sliding-window attention: 8192 of 17,776 tokens of a segment at 5b
        return max(1, round((self.text_len + math.prod(self.grid(1))) * 8192 / 17776))

    def grid(self, segments):       # (T, h, w) of a video, in tokens
        return FRAMES * segments + 1, self.height // self.patch, self.width // self.patch


NORM_EPS = 1e-5                   # of the blocks; DIFF: the published code has 1e-6, CogVideoX's weights 1e-5

PRESETS = {
    "pocket": dict(),
    "5b": dict(height=60, width=90, text_len=226, text_dim=4096, depth=42, heads=48, head_width=64,
               time_dim=512, eta_mlp=0.1, first_values=False, ttt_proj_std=0.02, gate_init=0.1,
               scan_checkpoint=16, snr_shift=1.0, micro_batch=1, recompute=True),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of Table 2: train on longer videos, from the weights of the stage before. "New" are parameters
    that CogVideoX does not have, those of TTT layers and gates (is_new); "rest" are CogVideoX's own."""
    segments: int                   # S, of 3 seconds each
    steps: int
    batch: int                      # videos a step
    lr_new: float                   # learning rate of the new parameters
    lr_rest: float                  # learning rate of those of CogVideoX's that train in this stage
    schedule_new: str = "constant"  # "cosine" falls to LR_END, "late" in the last fifth of the steps
    schedule_rest: str = "constant"
    lr_qk: float = None             # of theta_Q and theta_K (default: lr_new)
    everything: bool = False        # train all parameters; else the new ones and local attention
    noise: tuple = (0.0, 1.0)       # diffusion timesteps are drawn from this part of 0 .. 999

    def rates(self):                # of groups of parameters: kind, peak, schedule
        return (("rest", self.lr_rest, self.schedule_rest), ("new", self.lr_new, self.schedule_new),
                ("qk", self.lr_qk or self.lr_new, self.schedule_new))


PAPER_STAGES = {
    "3s": Stage(1, 5000, 64, 1e-4, 1e-5, "cosine", everything=True),
    "9s": Stage(3, 5000, 64, 1e-5, 1e-5),
    "18s": Stage(6, 1000, 64, 1e-5, 1e-5),
    "30s": Stage(10, 500, 64, 1e-5, 1e-5),
    "63s": Stage(21, 250, 64, 1e-5, 1e-5),
}
LR_END = 1e-5                       # where the cosine schedule ends

# A small network learns with larger steps, and a laptop affords fewer of them. "pretrain" stands in for
# CogVideoX-5B: 3-second clips, layer "local", shared by all layers; its weights ship in assets/. DIFF: pocket
# trains the stages from 9s on at high noise only. With less noise a scene shows its own colours, with more no
# scene shows any; only in between does it help to remember the scene from before.
MEMORY = dict(schedule_new="late", schedule_rest="late", noise=(0.75, 0.95), lr_qk=3e-3)
POCKET_STAGES = {
    "pretrain": Stage(1, 4000, 8, 2e-3, 2e-3, "cosine", "cosine", everything=True),
    "3s": Stage(1, 40, 8, 1e-5, 2e-4, "cosine", "cosine", everything=True),
    "9s": Stage(3, 700, 4, 7e-4, 3e-4, **MEMORY),
    "18s": Stage(6, 300, 2, 7e-4, 3e-4, **MEMORY),
    "30s": Stage(10, 500, 1, 7e-4, 3e-4, **MEMORY),
    "63s": Stage(21, 400, 1, 7e-4, 3e-4, **MEMORY),
}
PRESET_STAGES = {"pocket": POCKET_STAGES, "5b": PAPER_STAGES}
STAGES = POCKET_STAGES | PAPER_STAGES       # every name there is, with the paper's numbers

# 2. Parts -------------------------------------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """Diffusion timestep -> vector: sinusoids [cos, sin] of width D, then two linear maps."""
    def __init__(self, config):
        super().__init__()
        self.width = config.dim
        self.linear_1 = nn.Linear(config.dim, config.time_dim)
        self.linear_2 = nn.Linear(config.time_dim, config.time_dim)

    def forward(self, t):                                                   # [B]
        half = self.width // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None].float() * frequency                              # [B, D/2]
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)           # [B, D]
        return self.linear_2(nnf.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


@functools.lru_cache(maxsize=64)
def rope_table(grid, width, device):
    """exp(i angle) of the 3D rotary embedding for a (t, h, w) grid of tokens, complex [t h w, width/2].

    A quarter of the channels turns with time, three eighths each with height and width. Tokens are in
    (t, h, w) order, positions are integers from 0, angles are fp32."""
    angles = []
    places = torch.cartesian_prod(*(torch.arange(length).float() for length in grid))     # [t h w, 3]
    for place, n in zip(places.T, (width // 4, 3 * width // 8, 3 * width // 8)):
        frequency = 10000.0 ** -(torch.arange(0, n, 2).float() / n)
        angles.append(place[:, None] * frequency)                           # [t h w, n/2]
    angle = torch.cat(angles, dim=-1)                                       # [t h w, width/2]
    return torch.polar(torch.ones_like(angle), angle).to(device)


def rotate(x, table):
    """Turn neighbouring pairs of channels of x [..., L, F] by the angles of a table: complex products."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(wide) * table).flatten(-2).to(x.dtype)


# 3. One sequence out of many segments ---------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tokens of a video of S segments lie in a sequence.

    As stored: all texts, then all frames. In scan order, as a story is told: text_0 video_0 text_1 video_1
    ... (section 3.2). Segment 0 owns latent frames 0 .. 12, segment i > 0 12i+1 .. 12i+12. Reversed: the
    last segment first; in each segment its text, in reading order, then its video tokens, last to first.
    DIFF: the published code reverses all video tokens before it cuts them into 13, 12, 12 ... frames, so that
    every segment is a frame off, and in reverse it gives most tokens the step size of another token."""
    segments: int                   # S
    text: int                       # N, tokens of a segment's text
    grid: tuple                     # (T, h, w) of the video in tokens, T = 12 S + 1
    reversed: bool = False

    @property
    def text_tokens(self):          # S N: video tokens start here in storage
        return self.segments * self.text

    @property
    def tokens(self):               # L
        return self.text_tokens + math.prod(self.grid)

    def reverse(self):
        return dataclasses.replace(self, reversed=not self.reversed)

    def to_scan(self, x, dim=1):                                            # stored -> scan order
        return x.index_select(dim, scan_order(self, x.device))

    def from_scan(self, x, dim=1):                                          # scan order -> stored
        return x.index_select(dim, scan_order(self, x.device).argsort())

    def turn(self, y):                                        # RoPE for y [B, H, L, F] in scan order
        return rotate(y, scan_rope(self, y.shape[-1], y.device))


@functools.lru_cache(maxsize=64)
def scan_order(layout, device):
    """Where each token of the scan order is stored: int64 [L]."""
    frame = layout.grid[1] * layout.grid[2]                                 # tokens of a latent frame
    text = torch.arange(layout.text_tokens).split(layout.text)              # S pieces of [N]
    owned = [(FRAMES + 1) * frame] + [FRAMES * frame] * (layout.segments - 1)
    video = torch.arange(layout.text_tokens, layout.tokens).split(owned)    # S pieces
    pieces = list(zip(text, video))
    if layout.reversed:
        pieces = [(words, tokens.flip(0)) for words, tokens in reversed(pieces)]
    return torch.cat([torch.cat(piece) for piece in pieces]).to(device)


@functools.lru_cache(maxsize=64)
def scan_rope(layout, width, device):
    """RoPE for a whole scan, complex [L, F/2]: text is not turned; video positions count along the
    order given, so in the reverse order t, h and w all run backwards."""
    is_video = scan_order(layout, device) >= layout.text_tokens             # [L]
    table = torch.ones(layout.tokens, width // 2, dtype=torch.complex64, device=device)
    table[is_video] = rope_table(layout.grid, width, device)
    return table


# 4. The inner loop (the heart) ----------------------------------------------------------------------------
#
# The hidden state is W, the weights of a small model f. Reading a mini-batch of b tokens means taking one
# step of gradient descent that trains f to map k to v - k (sections 2.2, 2.3 and 3.4):
#
#     l(W) = sum_j eta_j * 1/2 || LN(f(k_j; W)) - (v_j - k_j) ||^2     f learns the residual v - k   (eq 4)
#     W <- W - dl/dW                                                    one step a mini-batch        (eq 13)
#     z_j = q_j + LN(f(q_j; W))                                         with the UPDATED W           (eq 14)
#
# The target is v - k because the output adds q back: what f has to supply is the difference. The learning
# rate of each token is in the loss, so the step is 1.
#
# W is updated before q is read, so a token's output knows its own mini-batch too. All b tokens read the same
# W, which has seen all of them: there is nothing to mask. That is allowed because diffusion denoises all
# tokens at once; none is predicted from those before it.
#
# Between mini-batches only W is carried. Every block and head has its own learned first W, a parameter. A
# scan starts from it: afresh for every video, direction and denoising step. Its last W is dropped.
#
# One mini-batch: tensors [n, b, F], n = batch x heads. W = (W1 [n,F,F], b1 [n,1,F]) for TTT-Linear, or
# (W1 [n,F,E], b1 [n,1,E], W2 [n,E,F], b2 [n,1,F]) for TTT-MLP; eta [n,b,1]; gamma, beta [n,1,F] of LN, where
# LN(Z) = gamma xh + beta and xh is Z with mean 0 and variance 1.

gelu = functools.partial(nnf.gelu, approximate="tanh")


class Linear:
    """f(x; W) = x W1 + b1."""
    first = dict(W1=(0.0, 0.02), b1=(0.0, 1.0))               # mean and deviation, for TTT.first_values

    def shapes(self, F):
        return dict(W1=(F, F), b1=(F,))

    def f(self, W, x):
        W1, b1 = W
        return x @ W1 + b1

    def gradient(self, W, k, G):                # dl/dW, given G = dl/df(k; W)
        return k.mT @ G, G.sum(-2, keepdim=True)

    def dual(self, W, q, k, G):                 # f(q; W - gradient) without forming W - gradient
        W1, b1 = W
        return q @ W1 + b1 - (q @ k.mT + 1) @ G


class MLP:
    """f(x; W) = GELU(x W1 + b1) W2 + b2."""
    first = dict(W1=(0.0, 2.0), b1=(-2.0, 0.0), W2=(0.0, 0.02), b2=(0.0, 1.0))

    def shapes(self, F):
        return dict(W1=(F, 4 * F), b1=(4 * F,), W2=(4 * F, F), b2=(F,))

    def f(self, W, x):
        W1, b1, W2, b2 = W
        return gelu(x @ W1 + b1) @ W2 + b2

    def inside(self, W, k, G2):                 # X2, the input of the second layer, and G1 = dl/d(k W1 + b1)
        W1, b1, W2, b2 = W
        Z1 = k @ W1 + b1                                                    # [n, b, E]
        return gelu(Z1), torch.ops.aten.gelu_backward(G2 @ W2.mT, Z1, approximate="tanh")

    def gradient(self, W, k, G2):
        X2, G1 = self.inside(W, k, G2)
        return k.mT @ G1, G1.sum(-2, keepdim=True), X2.mT @ G2, G2.sum(-2, keepdim=True)

    def dual(self, W, q, k, G2):
        W1, b1, W2, b2 = W
        X2, G1 = self.inside(W, k, G2)
        Xb2 = gelu(q @ W1 + b1 - (q @ k.mT + 1) @ G1)
        return Xb2 @ W2 + b2 - (Xb2 @ X2.mT + 1) @ G2


INNER = {"linear": Linear(), "mlp": MLP()}      # another f goes here; for step_autograd f and shapes suffice


def read(f, W, q, gamma, beta, eps):
    """z = q + LN(f(q; W)), the output rule (eq 5)."""
    return q + gamma * nnf.layer_norm(f.f(W, q), q.shape[-1:], eps=eps) + beta


def step_autograd(f, W, q, k, v, eta, gamma, beta, eps):
    """The definition: a loss, its gradient, a step. Returns z and the updated W."""
    outer_gradients = torch.is_grad_enabled()
    with torch.enable_grad():
        W = [w.clone() for w in W]                            # the point at which the gradient is taken
        W = [w if w.requires_grad else w.requires_grad_() for w in W]
        error = read(f, W, k, gamma, beta, eps) - v                         # k + LN(f(k)) - v
        loss = 0.5 * (eta * error.square()).sum()
        gradient = torch.autograd.grad(loss, W, create_graph=outer_gradients)
    W = [w - g for w, g in zip(W, gradient)]
    return read(f, W, q, gamma, beta, eps), W


def gradient_on_output(f, W, k, v, eta, gamma, beta, eps):
    """The same gradient by hand: G = dl/dZ of Z = f(k; W), [n, b, F].

    xh = (Z - mean) r with r = 1/std. A gradient p on xh becomes J[p] = r (p - mean(p) - xh mean(p xh)) on Z,
    and here p = gamma (LN(Z) - (v - k)), so G = eta J[p]."""
    Z = f.f(W, k)
    xh, mean, r = torch.native_layer_norm(Z, Z.shape[-1:], None, None, eps)
    p = gamma * (gamma * xh + beta - (v - k))
    return eta * torch.ops.aten.native_layer_norm_backward(p, Z, Z.shape[-1:], mean, r, None, None,
                                                           [True, False, False])[0]


def step_primal(f, W, q, k, v, eta, gamma, beta, eps):
    """The primal form computes with weights: the gradient as matrix products, the new W, then q through it.
    Seven products of b x F x E for TTT-MLP if f and gradient share two, as in appendix/kernels.py."""
    G = gradient_on_output(f, W, k, v, eta, gamma, beta, eps)
    W = [w - g for w, g in zip(W, f.gradient(W, k, G))]
    return read(f, W, q, gamma, beta, eps), W


def step_dual(f, W, q, k, v, eta, gamma, beta, eps):
    """The dual form computes with pairs of tokens: the outputs from the old W and b x b products.

    f(q; W - dl/dW) = q W1 + b1 - (q k^T + 1) G1, and the same once more for a second layer. [2] introduced it
    for causal sequences, where each token has seen another part of the mini-batch and q k^T is masked. Here
    nothing is, so the primal form gives the same outputs with fewer products (7 against 9.5 at b = F)."""
    G = gradient_on_output(f, W, k, v, eta, gamma, beta, eps)
    Z = f.dual(W, q, k, G)
    W = [w - g for w, g in zip(W, f.gradient(W, k, G))]
    return q + gamma * nnf.layer_norm(Z, Z.shape[-1:], eps=eps) + beta, W


STEPS = {"autograd": step_autograd, "dual": step_dual, "primal": step_primal}


def ttt_scan(kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch=64, *, eps=1e-8, checkpoint=16,
             backend="auto"):
    """Read a sequence with an inner model (section 3.4): every mini-batch of tokens is a training step.

    kind        a key of INNER: "linear" or "mlp"
    weights     the initial hidden state: (W1 [H,F,F], b1 [H,F]) or (W1 [H,F,4F], b1 [H,4F], W2 [H,4F,F],
                b2 [H,F]); a leading batch axis is allowed
    q, k, v     [B, H, L, F], any L >= 1; the scan itself subtracts k from v
    eta         [B, H, L], the full step size of each token
    ln_gamma, ln_beta   [H, F], of the LayerNorm around f
    checkpoint  the backward pass finds W kept every so many mini-batches and recomputes what is in between
    backend     a key of STEPS, or of appendix/kernels.py: "torch" (primal, with the backward pass in closed
                form), "triton", "cuda"; "auto" takes the fastest of those that fits

    Returns out [B, H, L, F] in q's dtype and the last weights, B in front, in fp32 (float64 for float64).
    Differentiable in every tensor, through both. Raises ValueError for shapes or a backend that do not fit.
    """
    H, F = q.shape[1], q.shape[3]
    wanted = [(H, *shape) for shape in INNER[kind].shapes(F).values()]
    shapes = [tuple(w.shape[-len(shape):]) for w, shape in zip(weights, wanted)]
    if shapes != wanted or len(weights) != len(wanted):
        raise ValueError(f"ttt_scan: {kind} weights for q {list(q.shape)} are {wanted}, not {shapes}")
    arguments = kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint
    if backend == "auto" and not Path(__file__).with_name("appendix").is_dir():
        backend = "primal"
    if backend in STEPS:
        return scan_in_torch(functools.partial(loop_over_mini_batches, STEPS[backend]), *arguments)
    from appendix import kernels
    return kernels.scan(backend, scan_in_torch, *arguments)


@torch.compiler.disable
def scan_in_torch(loop, kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint):
    """Cuts a sequence into mini-batches, padded with eta = 0, which leaves W as it is; loops; joins them."""
    B, H, L, F = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)      # the state lives in fp32 whatever the inputs are
    W = []
    for w, shape in zip(weights, INNER[kind].shapes(F).values()):
        w = w.to(dtype).expand(B, H, *shape).flatten(0, 1)                  # [n, ...], n = B H
        W.append(w if len(shape) == 2 else w[:, None])                      # biases [n, 1, .]
    gamma, beta = (x.to(dtype).expand(B, H, F).flatten(0, 1)[:, None] for x in (ln_gamma, ln_beta))

    def mini_batches(x):                                      # [B, H, L, .] -> [M, n, b, .]
        x = nnf.pad(x.to(dtype), (0, 0, 0, -L % mini_batch)) if L % mini_batch else x.to(dtype)
        return rearrange(x, "B H (M b) F -> M (B H) b F", b=mini_batch).contiguous()

    tokens = [mini_batches(x) for x in (q, k, v, eta[..., None])]
    with torch.autocast(q.device.type, enabled=False):        # the dtypes above stand
        out, W = loop(INNER[kind], W, tokens, gamma, beta, eps, checkpoint)
    out = rearrange(out, "M (B H) b F -> B H (M b) F", B=B)[:, :, :L].to(q.dtype)
    return out, tuple(w.reshape(B, H, *shape) for w, shape in zip(W, INNER[kind].shapes(F).values()))


def loop_over_mini_batches(step, f, W, tokens, gamma, beta, eps, every):
    """Mini-batch after mini-batch: (out [M, n, b, F], last W). W is kept before every `every`-th of them."""
    def read_some(W, *tokens):
        out = []
        for q, k, v, eta in zip(*tokens):
            z, W = step(f, W, q, k, v, eta, gamma, beta, eps)
            out.append(z)
        return torch.stack(out), W

    outs = []
    for some in zip(*(x.split(every) for x in tokens)):
        if torch.is_grad_enabled() and step is not step_autograd:           # which has gradients inside
            out, W = torch.utils.checkpoint.checkpoint(read_some, W, *some, use_reentrant=False)
        else:
            out, W = read_some(W, *some)
        outs.append(out)
    return torch.cat(outs), W


# 5. The TTT layer -----------------------------------------------------------------------------------------

class TTT(nn.Module):
    """A TTT layer (section 2.2): learned maps theta_Q, theta_K, theta_V around the inner loop.

    x [B, L, D] in scan order -> [B, L, D]. The outer loop (AdamW) learns the maps, the first W, gamma, beta
    and the step sizes; the inner loop trains W while the sequence is read. DIFF from the paper's equations,
    all as published in code: the 1/2 in the loss, a sigmoid and 1/F in eta, normalised q, k and v.

    Here as in attention, mix is the part that looks across tokens. It is a method of its own because
    appendix/devices.py exchanges tokens before and after it."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.kind = "linear" if config.layer == "ttt_linear" else "mlp"
        self.eta_base = config.eta_linear if self.kind == "linear" else config.eta_mlp
        H, F, D = config.heads, config.head_width, config.dim
        self.qkv = nn.ModuleList(nn.Linear(D, D) for _ in "qkv")
        self.eta = nn.Linear(D, H)
        self.ln_gamma = nn.Parameter(torch.ones(H, F))
        self.ln_beta = nn.Parameter(torch.zeros(H, F))
        shapes = INNER[self.kind].shapes(F)                   # of the first W of a head; biases start at 0
        self.matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        for name, shape in shapes.items():
            std = config.ttt_std if name in self.matrices else 0
            self.register_parameter(name, nn.Parameter(torch.randn(H, *shape) * std))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.out = nn.Linear(D, D)
        for linear in (*self.qkv, self.eta, self.out):
            nn.init.normal_(linear.weight, std=config.ttt_proj_std)
            nn.init.zeros_(linear.bias)

    def forward(self, x, layout):
        H, F, b = self.config.heads, self.config.head_width, self.config.mini_batch
        q, k, v = (rearrange(linear(x), "B L (H F) -> B H L F", H=H) for linear in self.qkv)
        # The step size of each token: eta_base / b in eq 13, times a learned sigmoid, and 1/F as published.
        eta = rearrange(self.eta_base / (b * F) * torch.sigmoid(self.eta(x).float()), "B L H -> B H L")
        weights = [getattr(self, name) for name in INNER[self.kind].shapes(F)]
        z = self.mix(layout, (q, k, v, eta), (self.ln_gamma, self.ln_beta, *weights))
        return self.out(self.norm(rearrange(z.to(x.dtype), "B H L F -> B L (H F)")))

    def mix(self, layout, tokens, parameters):                # [B, H, L, ...] and [H, ...] -> [B, H, L, F]
        (q, k, v, eta), (gamma, beta, *weights) = tokens, parameters
        q, k = (layout.turn(nnf.normalize(y.float(), dim=-1, eps=1e-12)) for y in (q, k))
        # v - k is normalised, gamma and beta included, as LN does with f's output. So the inner loss compares
        # two normalised vectors, times gamma; beta cancels in it and only shifts the output.
        config, F = self.config, q.shape[-1]
        residual = nnf.layer_norm(v.float() - k, [F], eps=1e-16) * math.sqrt((F - 1) / F)  # unbiased variance
        v = k + gamma[:, None] * residual + beta[:, None]
        z, _ = ttt_scan(self.kind, weights, q, k, v, eta, gamma, beta, config.mini_batch,
                        checkpoint=config.scan_checkpoint, backend=config.backend)
        return z

    @torch.no_grad()
    def first_values(self, x, layout):
        """Initial values from the x [B, L, D] of one batch, with which a token finds at once what tokens of
        its place wrote. DIFF: pocket only. With random values the same is learned ten times as slowly.

        theta_K = theta_Q, so that like finds like. Both look along the 8 directions in which segments differ
        most, compared with single tokens (linear discriminant analysis). theta_V is orthogonal and theta_out
        its transpose, so that what is read looks like what was written. f starts as a constant, its last
        bias, whose effect is taken off the output: a layer that has read nothing adds nothing."""
        D, frame = x.shape[-1], layout.grid[1] * layout.grid[2]
        video = layout.from_scan(x)[:, layout.text_tokens + frame:].unflatten(1, (layout.segments, -1))
        mean = video.mean((0, 1, 2))
        tokens, segments = (video - mean).flatten(0, 2), (video.mean(2) - mean).flatten(0, 1)
        within, between = (y.T @ y / len(y) for y in (tokens, segments))    # covariances, [D, D]
        spread = within.trace() / D
        white = torch.linalg.inv(torch.linalg.cholesky(within + 0.005 * spread * torch.eye(D)))
        directions = torch.linalg.eigh(white @ between @ white.T)[1][:, -8:]
        keys = nnf.normalize(torch.randn(D, 8) @ directions.T @ white, dim=1)
        values = nn.init.orthogonal_(torch.empty(D, D))
        for linear, weight in zip(self.qkv, (keys, keys, values)):          # the mean token is no evidence
            linear.weight.copy_(weight - torch.outer(weight @ mean, mean) / mean.square().sum())
        self.out.weight.copy_(0.7 * spread.sqrt() * self.qkv[2].weight.T)
        for name, (mean, std) in INNER[self.kind].first.items():
            getattr(self, name).normal_(mean, std)
        is_video = scan_order(layout, x.device) >= layout.text_tokens
        self.out.bias.sub_(self(x, layout)[:, is_video].mean((0, 1)))


# 6. Attention inside a segment ----------------------------------------------------------------------------

class LocalAttention(nn.Module):
    """CogVideoX's attention, within one segment at a time (section 3.2): x [B, L, D] as stored -> [B, L, D].

    Segment i attends over its own text and latent frames 12i .. 12i+12, RoPE starting at 0. Neighbouring
    segments share one latent frame, whose two outputs are averaged (the overlap is in the paper, the average
    in its code). So even here information moves on, by one segment a block; TTT adds memory beyond that."""
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in "qkv")
        self.norm_q = nn.LayerNorm(config.head_width, eps=1e-6)
        self.norm_k = nn.LayerNorm(config.head_width, eps=1e-6)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, layout):
        q, k, v = (rearrange(linear(x), "B L (H F) -> B H L F", H=self.heads) for linear in self.qkv)
        y = self.mix(layout, (self.norm_q(q), self.norm_k(k), v))
        return self.out(rearrange(y, "B H L F -> B L (H F)"))

    def mix(self, layout, tokens, parameters=()):                           # [B, H, L, F], each
        q, k, v = tokens
        S, N, (T, h, w) = layout.segments, layout.text, layout.grid
        rope = rope_table((FRAMES + 1, h, w), q.shape[-1], q.device)
        own = torch.arange(FRAMES + 1, device=q.device)
        frames = FRAMES * torch.arange(S, device=q.device)[:, None] + own           # of each segment: [S, 13]

        def split(y, turn):                                   # stored tokens -> [B S, H, N + 13 h w, F]
            text = rearrange(y[:, :, :S * N], "B H (S N) F -> (B S) H N F", S=S)
            video = rearrange(y[:, :, S * N:], "B H (T f) F -> B H T f F", T=T)[:, :, frames]
            video = rearrange(video, "B H S t f F -> (B S) H (t f) F")
            return torch.cat([text, rotate(video, rope) if turn else video], dim=2)

        y = nnf.scaled_dot_product_attention(split(q, True), split(k, True), split(v, False))
        text = rearrange(y[:, :, :N], "(B S) H N F -> B H (S N) F", S=S)
        video = rearrange(y[:, :, N:], "(B S) H (t f) F -> B H (S t) f F", S=S, t=FRAMES + 1)
        total = video.new_zeros(*video.shape[:2], T, *video.shape[3:]).index_add(2, frames.flatten(), video)
        total[:, :, FRAMES:-1:FRAMES] /= 2                    # frames 12, 24 ... were in two segments
        return torch.cat([text, total.flatten(2, 3)], dim=2)


class FullAttention(LocalAttention):
    """One attention over all texts and all frames, RoPE from 0: 11 times the cost at a minute (paper, 1)."""
    def mix(self, layout, tokens, parameters=()):
        q, k, v = tokens
        rope, N = rope_table(layout.grid, q.shape[-1], q.device), layout.text_tokens
        q, k = (torch.cat([y[:, :, :N], rotate(y[:, :, N:], rope)], dim=2) for y in (q, k))
        return nnf.scaled_dot_product_attention(q, k, v)


# 7. Gate, both directions, block, model -------------------------------------------------------------------

# What carries memory across segments: a class, or the name of one in appendix/memories.py, with TTT's
# signature, layer(x, layout) -> y, [B, L, D] in scan order; None where attention alone does.
LAYERS = {"local": None, "full": None, "ttt_linear": TTT, "ttt_mlp": TTT,
          "swa": "SlidingWindow", "mamba2": "Mamba2", "gated_deltanet": "GatedDeltaNet"}


def layer_class(name):
    if not isinstance(LAYERS[name], str):
        return LAYERS[name]
    from appendix import memories
    return getattr(memories, LAYERS[name])


class Gate(nn.Module):
    """tanh(alpha) * y (eq 6). With alpha = 0 the block is CogVideoX's own; it starts small, at gate_init, so
    that an untrained layer disturbs little. DIFF: the paper has one vector alpha, its code one for text and
    one for video tokens."""
    def __init__(self, config):
        super().__init__()
        self.gate_text = nn.Parameter(torch.full((config.dim,), config.gate_init))
        self.gate_video = nn.Parameter(torch.full((config.dim,), config.gate_init))

    def forward(self, y, texts):                              # y [B, L, D] as stored, `texts` of them text
        return torch.cat([self.gate_text.tanh() * y[:, :texts], self.gate_video.tanh() * y[:, texts:]], dim=1)


class BothDirections(nn.Module):
    """Z = X + gate(layer(X)), Z' = Z + gate'(rev(layer(rev(Z)))) (eq 6, 7, 10, 11). The directions share the
    whole layer, its first W included; each has its own gate, and the second reads what the first added."""
    def __init__(self, config):
        super().__init__()
        self.layer = layer_class(config.layer)(config)
        self.gate_forward = Gate(config)
        self.gate_backward = Gate(config)

    def forward(self, x, layout, texts):                                    # x [B, L, D] as stored
        x = x + self.gate_forward(self.scan(x, layout), texts)
        return x + self.gate_backward(self.scan(x, layout.reverse()), texts)

    def scan(self, x, layout):
        return layout.from_scan(self.layer(layout.to_scan(x), layout))


class AdaLN(nn.Module):
    """DiT's adaLN: LayerNorm with a shift and scale from the timestep, and a gate for what the branch adds to
    x. Text and video tokens have different ones."""
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.time_dim, 6 * config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)

    def forward(self, x, time, texts):                                      # [B, L, D], [B, time_dim]
        video, text = self.linear(nnf.silu(time))[:, None].chunk(2, dim=-1)                  # [B, 1, 3D] each
        both = torch.cat([text.expand(-1, texts, -1), video.expand(-1, x.shape[1] - texts, -1)], dim=1)
        shift, scale, gate = both.chunk(3, dim=-1)                          # [B, L, D] each
        return self.norm(x) * (1 + scale) + shift, gate


class Block(nn.Module):
    """CogVideoX's block, with the global layer between attention and its residual (eq 8 to 12)."""
    def __init__(self, config):
        super().__init__()
        self.norm_1 = AdaLN(config)
        self.attention = FullAttention(config) if config.layer == "full" else LocalAttention(config)
        self.global_layer = BothDirections(config) if LAYERS[config.layer] else None
        self.norm_2 = AdaLN(config)
        self.mlp = nn.Sequential(nn.Linear(config.dim, 4 * config.dim), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * config.dim, config.dim))

    def forward(self, x, time, layout, texts):
        y, gate = self.norm_1(x, time, texts)
        y = self.attention(y, layout)
        if self.global_layer is not None:
            y = self.global_layer(y, layout, texts)
        x = x + gate * y
        y, gate = self.norm_2(x, time, texts)
        return x + gate * self.mlp(y)


def is_new(name):                   # a parameter that CogVideoX does not have: of a global layer or its gates
    return ".global_layer." in name


class DiT(nn.Module):
    """(latents [B, T, C, height, width], text [B, S, N, text_dim], t int64 [B]) -> the v of v-prediction, as
    latents. With the layer "local" this is CogVideoX-5B (section 4.1), tensor for tensor."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch ** 2
        self.patch_in = nn.Linear(pixels, config.dim)
        self.text_in = nn.Linear(config.text_dim, config.dim)
        self.time = TimeEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_final = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.norm_out = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.modulate_out = nn.Linear(config.time_dim, 2 * config.dim)
        self.patch_out = nn.Linear(config.dim, pixels)

    def forward(self, latents, text, t):
        S, N, p = text.shape[1], text.shape[2], self.config.patch
        layout = Layout(S, N, self.config.grid(S))
        assert latents.shape[1] == layout.grid[0], f"{S} segments have {layout.grid[0]} latent frames"
        video = self.patch_in(rearrange(latents, "B T C (h p) (w q) -> B (T h w) (C p q)", p=p, q=p))
        words = self.text_in(rearrange(text, "B S N d -> B (S N) d"))
        time = self.time(t)                                                 # [B, time_dim]
        x = self.through_blocks(torch.cat([words, video], dim=1), time, layout, layout.text_tokens)
        video = self.norm_final(x[:, layout.text_tokens:])
        shift, scale = self.modulate_out(nnf.silu(time))[:, None].chunk(2, dim=-1)
        video = self.patch_out(self.norm_out(video) * (1 + scale) + shift)
        _, h, w = layout.grid
        return rearrange(video, "B (T h w) (C p q) -> B T C (h p) (w q)", h=h, w=w, p=p, q=p)

    def through_blocks(self, x, time, layout, texts):       # x [B, L, D] as stored, its first `texts` text
        for block in self.blocks:
            if self.config.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, time, layout, texts, use_reentrant=False)
            else:
                x = block(x, time, layout, texts)
        return x

    @classmethod
    def from_cogvideox(cls, folder, layer="ttt_mlp", **overrides):
        """CogVideoX's weights from a folder that diffusers wrote: the pipeline's, or its transformer/. New
        parameters start fresh; `overrides` are fields of Config. Raises UserError for another network."""
        from appendix import cogvideox
        fields = {**PRESETS["5b"], "preset": "5b", "layer": layer}
        return cogvideox.load(folder, lambda sizes: cls(Config(**{**fields, **sizes, **overrides})))

    def save_cogvideox(self, folder, dtype=torch.bfloat16):   # all but the new parameters, for diffusers
        from appendix import cogvideox
        cogvideox.save(self, folder, dtype)


# 8. Diffusion, forwards and backwards (appendix A) --------------------------------------------------------

def alphas_cumprod(snr_shift=1.0):
    """alpha-bar of the 1000 diffusion steps, float64: x_t = alpha-bar^1/2 x_0 + (1 - alpha-bar)^1/2 noise."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    root = (alpha_bar / (snr_shift + (1 - snr_shift) * alpha_bar)).sqrt()   # signal-to-noise / snr_shift
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2       # stretched to end at 0, pure noise


def add_noise(latents, t, noise, snr_shift):
    """x_t and v of latents [B, T, C, height, width] and noise like them, at t int64 [B] in 0 .. 999."""
    alpha_bar = alphas_cumprod(snr_shift).to(latents.device)[t]
    a, s = (rearrange(y.sqrt().float(), "B -> B 1 1 1 1") for y in (alpha_bar, 1 - alpha_bar))
    return a * latents + s * noise, a * noise - s * latents


def diffusion_loss(model, latents, text, t, noise):
    """Mean squared error of v (v-prediction). An x_0 error weighted by 1/s^2, as in the published code, is
    the same number: x_0 = a x_t - s v."""
    x_t, v = add_noise(latents, t, noise, model.config.snr_shift)
    return nnf.mse_loss(model(x_t, text, t).float(), v)


def guidance_scale(i, steps, low=1.0, high=4.0, power=5.0):
    """Guidance at step i of 0 .. steps-1: low to high along half a cosine, mostly in the last steps."""
    progress = i / max(1, steps - 1)
    return low + (high - low) * (1 - math.cos(math.pi * progress ** power)) / 2


@torch.no_grad()
def ddim(model, noise, text, negative=None, steps=50, guidance=(1.0, 4.0), power=5.0):
    """DDIM with v-prediction: noise [B, T, C, height, width] and text [B, S, N, text_dim] -> latents.

    Timesteps are trailing (999, 979, ... for 50 steps). `negative`, like text, is what guidance moves away
    from; by default zeros, which text dropout trained. DIFF: the published code encodes the empty string, and
    samples with a stochastic solver whose guidance takes the timestep for the step; this is the paper's text.
    """
    alpha_bar = alphas_cumprod(model.config.snr_shift)
    timesteps = torch.arange(1000, 0, -1000 / steps).round().long() - 1
    negative = torch.zeros_like(text) if negative is None else negative
    x = noise
    for i, t in enumerate(tqdm(timesteps.tolist(), desc="sample", unit="step", leave=False)):
        batch_t = torch.full((len(x),), t, device=x.device)
        scale = guidance_scale(i, steps, *guidance, power)
        v = model(x, text, batch_t).float()
        if scale != 1:
            v_negative = model(x, negative, batch_t).float()
            v = v_negative + scale * (v - v_negative)
        a, s = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
        x_0, e = a * x - s * v, a * v + s * x
        next_bar = alpha_bar[timesteps[i + 1]].item() if i + 1 < steps else 1.0
        x = math.sqrt(next_bar) * x_0 + math.sqrt(1 - next_bar) * e
    return x


def generate(model, text, negative=None, seed=0, **settings):
    """Text and negative [S, N, text_dim] -> latents [T, C, height, width] on the CPU, noise from the seed."""
    config, device = model.config, next(model.parameters()).device
    shape = 1, FRAMES * len(text) + 1, config.channels, config.height, config.width
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    negative = None if negative is None else negative[None].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        latents = ddim(model, noise, text[None].to(device), negative, **settings)[0].cpu()
    if not latents.isfinite().all():
        raise UserError("the sample is not finite; train the stage again, with a lower eta or learning rate")
    return latents


# 9. Weights and checkpoints -------------------------------------------------------------------------------
#
# What sampling needs is in model.safetensors, what resuming needs in state/STEP.

ASSETS = Path(__file__).parent / "assets"
SIZES = "preset channels height width text_len text_dim depth heads head_width time_dim patch".split()


def is_first():                     # of the processes, or the only one
    return not dist.is_initialized() or dist.get_rank() == 0


def run_folder(out_dir, config, name):
    """Where a stage is written: OUT_DIR/PRESET-LAYER/STAGE. All layers and seeds share a pretrain."""
    run = "local" if name == "pretrain" else config.layer + (f"-seed{config.seed}" if config.seed else "")
    return Path(out_dir) / f"{config.preset}-{run}" / name


def save_checkpoint(model, path, **facts):
    """Write weights, gathered in the first process, and the config and `facts` (encoders, stage, steps)."""
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first():
        facts = json.dumps(facts | dict(config=dataclasses.asdict(model.config)))
        with dataset.atomic(path) as temporary:
            save_file(tensors, temporary, {"ttt_minute": facts})


def read_facts(path):               # what save_checkpoint wrote beside the weights
    with dataset.reading(f"{path}: no checkpoint of ttt_minute.py"), safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ttt_minute"])


def load_checkpoint(path, **overrides):
    """The DiT in a model.safetensors, its config changed by `overrides`. From weights of layer "local" new
    parameters stay as initialised. Raises UserError for weights that do not fit or are not finite."""
    saved = read_facts(path)["config"]
    known = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in (saved | overrides).items() if name in known})
    with dataset.reading(f"{path}: weights that do not fit this network"):
        model = DiT(config)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        missing, extra = model.load_state_dict(tensors, strict=False)
        fresh = saved["layer"] == "local" and all(map(is_new, missing))
        assert not extra and (not missing or fresh), f"tensor {(extra + missing)[0]}"
        assert all(x.isfinite().all() for x in tensors.values()), "they are not all finite"
    return model


def find_checkpoint(out_dir, config, name):
    """The file of a trained stage: one in OUT_DIR, else one that ships in assets/ and fits; else None."""
    folder = run_folder(out_dir, config, name)
    if (own := folder / "model.safetensors").exists():
        return own
    shipped = ASSETS / f"{folder.parent.name}-{name}.safetensors"
    if shipped.exists() and not difference(read_facts(shipped)["config"], dataclasses.asdict(config), SIZES):
        return shipped


def difference(saved, now, names):
    """'mini_batch 64 and not 32, ...': in which of these names two dictionaries differ; empty if in none."""
    wrong = [name for name in names if saved.get(name) != now[name]]
    return ", ".join(f"{name} {saved.get(name)} and not {now[name]}" for name in wrong)


def whole_states(folder):           # of a stage, oldest first; .metadata is written last, so all is there
    return sorted(path.parent for path in folder.glob("state/*/.metadata"))


def save_state(folder, model, optimizer, step):
    """state/STEP: weights and moments, each process its shards. The last two are kept."""
    weights, moments = get_state_dict(model, optimizer)
    path, alone = folder / "state" / f"{step:06d}", not dist.is_initialized()
    try:
        dcp.save(dict(model=weights, optimizer=moments), checkpoint_id=path, no_dist=alone)
    except CheckpointException as error:                      # a full disk, say
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{path} could not be saved ({reason}); the one before it is whole") from error
    for old in whole_states(folder)[:-2] if is_first() else ():
        shutil.rmtree(old)


def load_state(folder, model, optimizer):
    """Puts the newest whole state back, saved by any number of processes; returns its step, 0 without one."""
    if not (states := whole_states(folder)):
        return 0
    weights, moments = get_state_dict(model, optimizer)
    with dataset.reading(path := states[-1]):
        alone = not dist.is_initialized()
        dcp.load(dict(model=weights, optimizer=moments), checkpoint_id=path, no_dist=alone)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(path.name)


# 10. Training in stages (section 3.3, Table 2) ------------------------------------------------------------

def trains(name, stage):            # Table 2
    return stage.everything or is_new(name) or ".attention." in name


def make_optimizer(model, stage, config):
    """AdamW over what the stage trains, in groups by rate (rest, new, qk) and decay. Weight decay is for
    matrices, those of the first W among them; not for biases, norms and gates."""
    groups = {}
    for prefix, module in model.named_modules():
        matrices = [f"{prefix}.{name}" for name in getattr(module, "matrices", ["weight"])]
        for name, parameter in module.named_parameters(prefix, recurse=False):
            parameter.requires_grad_(trains(name, stage))
            if parameter.requires_grad:
                decays = parameter.ndim >= 2 and name in matrices
                rate = "new" if is_new(name) else "rest"
                rate = "qk" if rate == "new" and (".qkv.0." in name or ".qkv.1." in name) else rate
                groups.setdefault((rate, decays), []).append(parameter)
    groups = [dict(params=params, rate=rate, new=rate != "rest", weight_decay=config.weight_decay * decays)
              for (rate, decays), params in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def lr_at(step, steps, peak, schedule, warmup):
    """Learning rate of a step 0 .. steps-1: linear warmup, then constant, a cosine that ends at LR_END, or
    constant and in the last fifth linearly to LR_END."""
    warmup = max(1, round(warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    high = min(1, 5 * (1 - progress)) if schedule == "late" else (1 + math.cos(math.pi * progress)) / 2
    return LR_END + (peak - LR_END) * high


def draw(runs, stage, config, name, step, group=0, groups=1):
    """Yields a group's share of a batch in micro-batches: latents, text, t, noise. Seed, stage, step and
    place in the batch decide everything: a resumed run, and any number of processes, draw the same.

    DIFF: t is uniform in 0 .. 999 (or in a stage's part of it) as in the paper, but successive samples are a
    golden section apart, so that small batches see all noise levels equally often (after 2107.00630)."""
    seed = config.seed * 1_000_003 + list(STAGES).index(name) * 100_003
    offset, golden = torch.rand((), generator=torch.Generator().manual_seed(seed)), (5 ** 0.5 - 1) / 2
    generator = torch.Generator().manual_seed(seed + step)
    items = torch.randint(len(runs), (stage.batch,), generator=generator)
    keep = torch.rand(stage.batch, generator=generator) >= config.text_dropout
    t = (offset + golden * (step * stage.batch + torch.arange(stage.batch, dtype=torch.float64))) % 1
    t = stage.noise[0] + t * (stage.noise[1] - stage.noise[0])
    seeds = torch.randint(2 ** 32, (stage.batch,), generator=generator).tolist()
    for own in torch.arange(stage.batch).chunk(groups)[group].split(config.micro_batch):
        latents, text = runs.batch(items[own].tolist())
        dice = [torch.Generator().manual_seed(seeds[i]) for i in own]
        noise = torch.stack([torch.randn(latents[0].shape, generator=generator) for generator in dice])
        yield latents, text * keep[own, None, None, None], (1000 * t[own]).long(), noise


def train(model, name, stage, runs, folder, save_every, device, context=1):
    """One stage, from a saved state if there is one. Ctrl-C or SIGTERM ends the step, saves and leaves. Of
    many processes, every `context` neighbours share the videos of a group; gradients are summed over all."""
    config = model.config
    for block in model.blocks if config.compile else ():
        block.compile()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = make_optimizer(model, stage, config)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = load_state(folder, model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.jsonl").open("a") if rank == 0 else None
    tokens = stage.batch * Layout(stage.segments, config.text_len, config.grid(stage.segments)).tokens
    asked = []                                                              # to stop, by Ctrl-C or SIGTERM
    stops = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(stop, lambda *_: asked.append(True)) for stop in stops]
    bar = tqdm(range(first, stage.steps), desc=name, initial=first, total=stage.steps, unit="step")
    for step in bar:
        begin = time.perf_counter()
        rates = {}
        for kind, peak, schedule in stage.rates():
            rates[kind] = lr_at(step, stage.steps, peak, schedule, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["rate"]]
        loss = torch.zeros(2)                                 # the loss, and how many processes should stop
        for batch in draw(runs, stage, config, name, step, rank // context, world_size // context):
            latents, text, t, noise = (x.to(device) for x in batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                part = diffusion_loss(model, latents, text, t, noise) * len(t) / (stage.batch * context)
            part.backward()
            loss[0] += part.detach().cpu()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.clip)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()    # of a sharded network
        loss[1] = len(asked)
        if world_size > 1:
            dist.all_reduce(loss)
        loss, stop = loss.tolist()
        if not math.isfinite(loss + norm):
            last = whole_states(folder)[-1:] or ["not there"]
            raise SystemExit(f"error: the loss or its gradient is not finite at step {step} of stage {name}; "
                             f"the last good state is {last[0]}; lower the learning rate or eta")
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            seconds = time.perf_counter() - begin
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
            line = dict(stage=name, step=step, loss=loss, lr_new=rates["new"], lr=rates["rest"],
                        grad_norm=norm, ms=round(1000 * seconds),
                        tokens_per_second=round(tokens / seconds), memory_gb=memory)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        done = step + 1
        if stop or done == stage.steps or done % save_every == 0:
            save_state(folder, model, optimizer, done)
        if stop and done < stage.steps:
            print(f"\ninterrupted after step {done} of stage {name}, which is saved; go on with --resume")
            raise KeyboardInterrupt
    for stop, handler in zip(stops, handlers):
        signal.signal(stop, handler)
    facts = dict(encoders=runs.encoders, stage=name, steps=stage.steps)
    save_checkpoint(model, folder / "model.safetensors", **facts)


# 11. The command line: every field of Config is a flag ----------------------------------------------------

def parse_arguments(words=None):
    """The flags, and with them config: PRESETS[preset] with the fields of Config that were given."""
    parser = argparse.ArgumentParser(description="Trains TTT video models in stages.", allow_abbrev=False)
    add, count = parser.add_argument, dataset.positive
    add("--stage", choices=STAGES, default="9s", help="train up to this stage (default 9s)")
    add("--out_dir", type=Path, default="out", help="where runs are written (default out)")
    add("--data", type=Path, help="made by dataset.py --ingest (default: the pocket world, drawn if missing)")
    add("--episodes", type=count, help="minutes of the pocket world to train on (default 256)")
    add("--steps", type=count, help="of every stage, in place of the preset's")
    add("--batch_size", type=count, help="videos a step, in place of the preset's")
    add("--checkpoint_every", type=count, default=100, help="save what --resume needs every so many steps")
    add("--init_from", type=Path, metavar="PATH", help="start from this model.safetensors, or CogVideoX")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--context_parallel", type=count, default=1, metavar="C", help="torchrun: C processes share a video")
    add("--shard", type=count, metavar="N", help="torchrun: N processes share the weights (default all)")
    add("--vae", type=Path, metavar="FOLDER", help="CogVideoX's, to end a stage on real videos with a video")
    add("--vae_scale", type=float, metavar="X", help="the videos were ingested with (default: the VAE's own)")
    add("--resume", action="store_true", help="go on with an interrupted run, as it was started")
    add("--overwrite", action="store_true", help="train the stage again")
    add("--dry_run", action="store_true", help="print stages, tokens, parameters and steps, and stop")
    group = parser.add_argument_group("fields of Config, in brackets pocket's values")
    types = {int: count, float: dataset.finite, str: str, "seed": dataset.seed_number,
             "head_width": dataset.whole_number(16, step=16)}
    for field in dataclasses.fields(Config):
        kind = dict(type=types.get(field.name) or types.get(field.type))
        kind["choices"] = dict(preset=PRESETS, layer=LAYERS).get(field.name)
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else kind
        group.add_argument(f"--{field.name}", help=f"({field.default})", **kind)
    args = parser.parse_args(words)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    args.config = Config(**{**PRESETS[given.get("preset", "pocket")], **given})
    return args


def pick_device(name=None):
    """The device asked for, or the first of cuda, mps and cpu that there is."""
    first = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with dataset.reading(f"--device {name}"):
        return torch.zeros(0, device=name or first).device


def as_started(args, folder):
    """With --resume the flags that the run was started with (run.json). UserError where one now given has
    changed, where nothing is to resume, or where something is and nobody said so."""
    interrupted = (folder / "run.json").exists() and not (folder / "model.safetensors").exists()
    if args.resume != interrupted and not args.overwrite and not args.dry_run:
        raise UserError(f"{folder}: an interrupted run; --resume goes on with it, --overwrite starts again"
                        if interrupted else f"--resume: nothing to resume in {folder}")
    if not (args.resume and interrupted):
        return args
    free = "device checkpoint_every context_parallel shard vae vae_scale resume overwrite dry_run".split()
    with dataset.reading(folder / "run.json"):
        started = parse_arguments(json.loads((folder / "run.json").read_text()))
    before = vars(started) | dataclasses.asdict(started.config)
    names = [name for name, value in vars(args).items() if value is not None and name != "config"]
    names = [name for name in names if name not in free]
    if wrong := difference(before, vars(args), names):
        raise UserError(f"--resume: the run was started with {wrong}; leave that out, or --overwrite it all")
    return argparse.Namespace(**vars(started) | {name: getattr(args, name) for name in free})


def find_start(args, chain):
    """The weights to start from, and the stages of the chain to train: those after the last trained one."""
    config, own = args.config, run_folder(args.out_dir, args.config, args.stage) / "model.safetensors"
    if own.exists() and not args.overwrite:
        given = [field.name for field in dataclasses.fields(Config) if getattr(args, field.name) is not None]
        if wrong := difference(read_facts(own)["config"], vars(args), given) or args.init_from:
            raise UserError(f"{own.parent} is already trained (with {wrong}); --overwrite trains it again")
        return own, []
    if args.init_from:
        return args.init_from, chain[-1:]
    for i in reversed(range(1, len(chain))):
        if start := find_checkpoint(args.out_dir, config, chain[i - 1]):
            return start, chain[i:]
    return None, chain


def print_plan(config, stages, names, start):
    """--dry_run: what would be trained, the paper's numbers in brackets (Table 2; other text lengths)."""
    paper_tokens = {"pretrain": "-", "3s": 18048, "9s": 51456, "18s": 99894, "30s": 168320, "63s": 341550}
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in DiT(config).named_parameters()}
    total, new = sum(sizes.values()), sum(size for name, size in sizes.items() if is_new(name))
    print(f"{config.preset}, layer {config.layer}: {total:,} parameters, {new:,} of them new. "
          f"Starts from {start or 'nothing'}.")
    print(f"{'stage':<9}{'segments':>9}{'tokens':>17}{'steps x batch':>24}{'lr new, rest':>16}{'trains':>14}")
    for name in names:
        stage, paper = stages[name], STAGES[name]
        trained = sum(size for parameter, size in sizes.items() if trains(parameter, stage))
        layout = Layout(stage.segments, config.text_len, config.grid(stage.segments))
        tokens = f"{layout.tokens} ({paper_tokens[name]})"
        steps = f"{stage.steps} x {stage.batch} ({paper.steps} x {paper.batch})"
        rates = f"{stage.lr_new:.0e} / {stage.lr_rest:.0e}"
        print(f"{name:<9}{stage.segments:>9}{tokens:>17}{steps:>24}{rates:>16}{trained:>14,}")


def new_model(start, config, runs=None):
    """A network on the CPU with the weights of `start`: an earlier stage, a folder of CogVideoX, or none.
    UserError if `runs` do not fit it, or the encoders of `start`."""
    torch.manual_seed(config.seed)
    fields, weights = dataclasses.asdict(config), start and not start.is_dir()
    if start and not weights:                                 # its own sizes stand
        model = DiT.from_cogvideox(start, **{name: fields[name] for name in fields if name not in SIZES})
    else:
        model = load_checkpoint(start, **fields) if start else DiT(config)
    if runs is None:
        return model
    wrong = difference(runs.sizes, dataclasses.asdict(model.config), runs.sizes)
    facts = read_facts(start) if weights else dict(encoders=runs.encoders, config=fields)
    if wrong := wrong or difference(facts["encoders"], runs.encoders, runs.encoders):
        raise UserError(f"the data do not fit this network: {wrong}; ingest the videos again, or see --data")
    if config.first_values and LAYERS[config.layer] is TTT and facts["config"]["layer"] == "local":
        take_first_values(model, runs)
    return model


@torch.no_grad()
def take_first_values(model, runs):
    """TTT.first_values from 80 segments at high noise: each layer takes them as its input reaches it."""
    for block in model.blocks:
        def first(x, layout, layer=block.global_layer.layer):
            del layer.forward                                 # this function; the class's own is back
            layer.first_values(x, layout)
            return layer(x, layout)
        block.global_layer.layer.forward = first
    videos = -(-80 // runs.segments)
    config = dataclasses.replace(model.config, micro_batch=videos)
    stage = Stage(runs.segments, 1, videos, 0, 0, noise=(0.7, 0.95))
    (latents, text, t, noise), = draw(runs, stage, config, "3s", 0)
    model(add_noise(latents, t, noise, config.snr_shift)[0], text, t)


def show(model, folder, segments, runs, codec, text_encoder):
    """The sample that ends a stage: of an unseen story of the pocket world, else of the first in the data."""
    if codec is None:
        return print("no sample: name CogVideoX's VAE with --vae FOLDER, or use sample.py")
    if text_encoder is not None:
        board = dataset.held_out(segments, model.config.seed)
        text, _ = dataset.embed(board, text_encoder, "held-out story")
    else:
        board, text = runs.storyboard(0), runs.run(0)[1].float()
    latents = generate(model.eval(), text, seed=model.config.seed)
    if is_first():
        dataset.save_video(codec.decode(latents), board, folder / "sample.mp4")
        print(f"look at {folder / 'sample.png'}")


def main():
    args = parse_arguments()
    folder = run_folder(args.out_dir, args.config, args.stage)
    args = as_started(args, folder)
    config, preset = args.config, PRESET_STAGES[args.config.preset]
    if args.stage not in preset:
        raise UserError(f"--stage {args.stage}: there are {', '.join(preset)}")
    changes = {field: value for field, value in (("steps", args.steps), ("batch", args.batch_size)) if value}
    stages = {name: dataclasses.replace(stage, **changes) for name, stage in preset.items()}
    chain = list(stages)[:list(stages).index(args.stage) + 1]
    start, todo = find_start(args, chain)
    if args.dry_run:
        return print_plan(config, stages, todo or chain, start)
    if not todo:
        return print(f"stage {args.stage} is already trained ({folder}); --overwrite trains it again")
    if config.preset == "5b" and not start:
        raise UserError("preset 5b starts from --init_from PATH: CogVideoX's folder, or a checkpoint")

    device, context = pick_device(args.device), args.context_parallel
    place = lambda make: make().to(device)                    # a network; devices.join has one for many GPUs
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or context > 1:
        from appendix import devices
        device, place = devices.join(device, [stages[name].batch for name in todo], context, args.shard)
    local = dataclasses.replace(config, layer="local")
    configs = {name: local if name == "pretrain" else config for name in todo}
    # What the user named is looked at before any work.
    data, pocket, model = args.data or args.out_dir / "pocket-world", True, None
    if args.data:
        pocket = dataset.Runs(data, stages[args.stage].segments).encoders["codec"].startswith("pocket")
        runs = dataset.Runs(data, stages[todo[0]].segments)
        model = place(lambda: new_model(start, configs[todo[0]], runs))
    elif wrong := difference(dataclasses.asdict(Config()), dataclasses.asdict(config), SIZES[1:6]):
        raise UserError(f"the pocket world has {wrong}; other sizes need --data")
    elif is_first():
        new_model(start, configs[todo[0]])
    codec = text_encoder = None
    if pocket:
        codec, text_encoder = dataset.open_encoders(text_len=config.text_len)
    elif args.vae:
        codec, _ = dataset.open_encoders(args.vae, vae_scale=args.vae_scale, device=device)
    if is_first():
        args.lock = dataset.hold(folder)                      # until this process ends
        if args.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            words = [word for word in sys.argv[1:] if word != "--overwrite"]
            (folder / "run.json").write_text(json.dumps(words))
        if not args.data:
            dataset.make_world(data, args.episodes or 256)
    if dist.is_initialized():
        dist.barrier()

    for name in todo:
        own, segments = run_folder(args.out_dir, config, name), stages[name].segments
        runs = dataset.Runs(data, segments)
        if model is None or model.config.layer != configs[name].layer:
            model = place(lambda: new_model(start, configs[name], runs))
        train(model, name, stages[name], runs, own, args.checkpoint_every, device, context)
        start = own / "model.safetensors"
        if is_first():
            dataset.plot_loss(own)
        show(model, own, segments, runs, codec, text_encoder)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    dataset.run_main(main)
