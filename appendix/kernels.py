"""The scan of ttt_minute.py, section 4, made fast: three more backends for ttt_scan, the same numbers.

    torch      the primal form with its backward pass in closed form; any device, and what a CPU takes
    triton     one kernel a pass; any NVIDIA GPU since Ampere
    cuda       ttt_kernel.cu: TTT-MLP with its hidden state on chip; Hopper GPUs (paper, 3.5 and appendix B)

Not yet run on a GPU: the Triton kernels are tested in Triton's interpreter, the CUDA kernel is executed
instruction by instruction on a CPU (hopper.py). So "auto" takes Triton only after it agreed with torch on the
very GPU, and never the other.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dataset import UserError, atomic

# 1. The backward pass in closed form, in torch ------------------------------------------------------------
#
# Autograd through the primal form keeps every intermediate of a step. Here the forward pass keeps W every few
# mini-batches, and the backward pass takes these groups last to first: it replays a group from its W, then
# walks it backwards, carrying dW, the gradient on the state. Tensors are [n, b, F], as in section 4. "What
# falls on x" is the gradient of the outer loss on x.

def normalise(Z, eps):
    """xh, and what J needs: (Z, mean, r). Biased variance, eps inside the root."""
    xh, mean, r = torch.native_layer_norm(Z, Z.shape[-1:], None, None, eps)
    return xh, (Z, mean, r)


def J(p, statistics):
    """LayerNorm's Jacobian, symmetric: r (p - mean(p) - xh mean(p xh))."""
    Z, mean, r = statistics
    only_p = True, False, False
    return torch.ops.aten.native_layer_norm_backward(p, Z, Z.shape[-1:], mean, r, None, None, only_p)[0]


def over_tokens(x):                                                         # [n, b, F] -> [n, 1, F]
    return x.sum(-2, keepdim=True)


def gelu_derivatives(x, order):
    """gelu_tanh(x) = x s, s = sigmoid(z), z = c x (1 + d x^2), c = sqrt(8 / pi), and its first `order`
    derivatives, s (1 + v (1 - s)) and (r (v (1 - 2s) + 4) - 2c) s (1 - s), where r = z' = c (1 + 3 d x^2),
    v = x r and z = (v + 2c x) / 3. Overwrites x."""
    c, d = math.sqrt(8 / math.pi), 0.044715
    r = (x * x).mul_(3 * c * d).add_(c)
    v = x * r if order == 2 else r.mul_(x)
    s = torch.add(v, x, alpha=2 * c).mul_(1 / 3).sigmoid_()
    if order == 2:
        second = r.mul_(torch.addcmul(v, v, s, value=-2).add_(4)).sub_(2 * c).mul_(s)
        second.addcmul_(second, s, value=-1)
    first, y = v.addcmul_(v, s, value=-1).add_(1).mul_(s), x.mul_(s)
    return (y, first, second) if order == 2 else (y, first)


class ClosedLinear:
    """What the closed form has to know of the inner model f(x; W) = x W1 + b1."""

    def f(self, W, x, order):                                 # f(x; W), and what comes back through it needs
        return torch.baddbmm(W[1], x, W[0]), ()

    def inner(self, W, G, kept):                          # the gradients inside f, where G falls on f(k; W)
        return ()

    def descend(self, W, k, G, kept, inner):                        # W - dl/dW
        return torch.baddbmm(W[0], k.mT, G, alpha=-1), W[1] - over_tokens(G)

    def back_of_update(self, W, dW, k, G, kept, inner):
        """Through W' = W - k^T G: what falls on G, on k (its negative), and, not yet complete, inside f."""
        return torch.baddbmm(dW[1], k, dW[0], alpha=-1, beta=-1), torch.bmm(G, dW[0].mT), None

    def back(self, W, dW, x, dZ, kept, dx, known=None):
        """Through Z = f(x; W): adds to dW, returns dx and what falls on x."""
        dW[0].baddbmm_(x.mT, dZ)
        dW[1] += over_tokens(dZ)
        return torch.baddbmm(dx, dZ, W[0].mT)


class ClosedMLP:
    """Of f(x; W) = GELU(x W1 + b1) W2 + b2. kept: X2, GELU' [, GELU'']; inner: gX2 = G W2^T, G1."""

    def f(self, W, x, order):
        kept = gelu_derivatives(torch.baddbmm(W[1], x, W[0]), order)
        return torch.baddbmm(W[3], kept[0], W[2]), kept

    def inner(self, W, G, kept):
        gX2 = torch.bmm(G, W[2].mT)
        return gX2, gX2 * kept[1]

    def descend(self, W, k, G, kept, inner):
        return (torch.baddbmm(W[0], k.mT, inner[1], alpha=-1), W[1] - over_tokens(inner[1]),
                torch.baddbmm(W[2], kept[0].mT, G, alpha=-1), W[3] - over_tokens(G))

    def back_of_update(self, W, dW, k, G, kept, inner):
        (X2, slope, bend), (gX2, G1) = kept, inner
        dG1 = torch.baddbmm(dW[1], k, dW[0], alpha=-1, beta=-1)
        dk = torch.bmm(G1, dW[0].mT)
        dG = torch.baddbmm(dW[3], X2, dW[2], alpha=-1, beta=-1)
        dX2 = torch.bmm(G, dW[2].mT)                                        # minus this falls on X2
        dZ1 = bend.mul_(gX2).mul_(dG1)                                # through G1 = gX2 * slope, gX2 = G W2^T
        dgX2 = dG1.mul_(slope)
        dG.baddbmm_(dgX2, W[2])
        dW[2].baddbmm_(dgX2.mT, G)
        return dG, dk, (dX2, dZ1)

    def back(self, W, dW, x, dZ, kept, dx, known=None):
        dW[2].baddbmm_(kept[0].mT, dZ)
        dW[3] += over_tokens(dZ)
        if known is None:
            dZ1 = torch.bmm(dZ, W[2].mT).mul_(kept[1])
        else:
            dZ1 = known[0].baddbmm_(dZ, W[2].mT, beta=-1).mul_(kept[1]).add_(known[1])
        return CLOSED["linear"].back(W, dW, x, dZ1, (), dx)


CLOSED = {"linear": ClosedLinear(), "mlp": ClosedMLP()}


class Gradient(NamedTuple):
    """What dl/dW is made of, and what its own backward pass needs again."""
    xh: Tensor                      # Z = f(k; W), normalised
    statistics: tuple               # that J needs
    error: Tensor                   # LN(f(k; W)) - (v - k)
    p: Tensor                       # gamma error, the gradient on xh before eta
    gZ: Tensor                      # J[p], the gradient on Z before eta
    G: Tensor                       # eta gZ
    kept: tuple                     # of f
    inner: tuple                    # gradients inside f


def gradient_of(f, W, k, shift, eta, gamma, eps, order=1):
    """shift = beta - (v - k), so that the error is gamma xh + shift; `order` derivatives of GELU are kept."""
    Z, kept = f.f(W, k, order)
    xh, statistics = normalise(Z, eps)
    error = torch.addcmul(shift, gamma, xh)
    gZ = J(p := gamma * error, statistics)
    G = eta * gZ
    return Gradient(xh, statistics, error, p, gZ, G, kept, f.inner(W, G, kept))


class ClosedForm(torch.autograd.Function):
    """All mini-batches, one after the other: q, k, v [M, n, b, F], eta [M, n, b, 1] -> out, *last W."""

    @staticmethod
    def forward(ctx, f, q, k, v, eta, gamma, beta, eps, every, *W):
        out, states = torch.empty_like(q), []
        for m, (k_m, shift, eta_m) in enumerate(zip(k, beta - (v - k), eta)):
            if m % every == 0:
                states += W
            g = gradient_of(f, W, k_m, shift, eta_m, gamma, eps)
            W = f.descend(W, k_m, g.G, g.kept, g.inner)
            xh, _ = normalise(f.f(W, q[m], 1)[0], eps)
            out[m] = torch.addcmul(q[m] + beta, gamma, xh)
        ctx.save_for_backward(q, k, v, eta, gamma, beta, *states, *W)
        ctx.f, ctx.eps, ctx.every, ctx.size = f, eps, every, len(W)
        return out, *W

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, *dW):
        q, k, v, eta, gamma, beta, *states = ctx.saved_tensors
        dq, dk, dv, deta = (torch.empty_like(x) for x in (q, k, v, eta))
        dW, dgamma, shift = [dw.clone() for dw in dW], torch.zeros_like(q[0]), beta - (v - k)
        new = states[-ctx.size:]                             # the last W: outputs read the W after their step
        for start in reversed(range(0, len(q), ctx.every)):
            W, replay = states[start // ctx.every * ctx.size:][:ctx.size], []
            for m in range(start, min(start + ctx.every, len(q))):
                g = gradient_of(ctx.f, W, k[m], shift[m], eta[m], gamma, ctx.eps, order=2)
                replay.append((m, W, g))
                if m + 1 < min(start + ctx.every, len(q)):
                    W = ctx.f.descend(W, k[m], g.G, g.kept, g.inner)
            while replay:
                m, W, g = replay.pop()
                Z, kept = ctx.f.f(new, q[m], 1)                 # through z = q + LN(f(q; new W))
                xh, statistics = normalise(Z, ctx.eps)
                dgamma.addcmul_(dout[m], xh)
                dq[m] = ctx.f.back(new, dW, q[m], J(dout[m] * gamma, statistics), kept, dout[m])
                dk[m], dv[m], deta[m] = backward_of_step(ctx.f, W, g, k[m], eta[m], gamma, dW, dgamma)
                new = W
        dbeta = dout.sum((0, 2)) - dv.sum((0, 2))         # beta stands beside every output and every -(v - k)
        return None, dq, dk, dv, deta, over_tokens(dgamma), dbeta[:, None], None, None, *dW


def backward_of_step(f, W, g, k, eta, gamma, dW, dgamma):
    """Gradients on k, v and eta of one update. dW: the gradient on the new W, on return on the old."""
    # Through the update W' = W - k^T G: every product here reads dW before anything is added to it.
    dG, dk, known = f.back_of_update(W, dW, k, g.G, g.kept, g.inner)
    # Through G = eta J[p], p = gamma error. J's xh and r depend on Z as well: the second line of dZ.
    deta = (dG * g.gZ).sum(-1, keepdim=True)
    U = eta * dG
    w = J(U, g.statistics)                                                  # the gradient on p
    dp = gamma * w                                                          # on error, and minus that on v
    dgamma.addcmul_(w, torch.addcmul(g.error, gamma, g.xh))
    along_p, along_U = (g.p * g.xh).mean(-1, keepdim=True), (U * g.xh).mean(-1, keepdim=True)
    along_gZ = eta * deta / k.shape[-1]
    dZ = J(gamma * dp, g.statistics)
    dZ -= g.statistics[2] * (w * along_p).addcmul_(g.gZ, along_U).addcmul_(g.xh, along_gZ)
    # Through the first forward pass, Z = f(k; W).
    return f.back(W, dW, k, dZ, g.kept, dp - dk, known), -dp, deta


def closed_form(closed, f, W, tokens, gamma, beta, eps, checkpoint):
    """A loop for scan_in_torch: (out [M, n, b, F], last W)."""
    out, *W = ClosedForm.apply(closed, *tokens, gamma, beta, eps, checkpoint, *W)
    return out, W


# 2. The same in Triton ------------------------------------------------------------------------------------
#
# The closed form launches some thirty operations a mini-batch and carries everything they share through the
# GPU's main memory. Here one program a (batch, head) reads a whole sequence, forward or backward, in a single
# launch.
#
#   products   operands in the precision of the inputs, sums in fp32; all else is fp32
#   tokens     row (batch, head, token) of q, k, v, out is F numbers: 33 KB a mini-batch at F 64, b 64, bf16
#   state      one buffer a program, 132 KB for TTT-MLP at F 64. With W in registers ptxas spilled 3 to 97 KB
#              a thread, so it passes through them in tiles of F x F and lives in the L1 and L2 caches. DIFF
#              from the paper's kernel (3.5), which holds W in the shared memory of two SMs
#   backward   a program replays a group from its kept state into a scratch of `every` + 1 states and one
#              [b, E] row, 2.3 MB for TTT-MLP at F 64, b 64, 16 mini-batches a group, then walks it backwards
#   order      every sum runs inside one program in the order of the code: no atomics, the same bits each time

try:
    import triton
    import triton.language as tl
except ImportError:                                           # there is no Triton for macOS and Windows
    triton, tl = None, types.SimpleNamespace(constexpr=lambda value: value)

# Triton's interpreter runs kernels on a CPU. It cannot multiply bf16 numbers, so there operands are rounded
# and go back to fp32.
EMULATED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def jit(function):
    return triton.jit(function) if triton else function


@jit
def tile_dot(x, y, PRECISION: tl.constexpr):
    """x @ y: operands rounded to PRECISION, "bf16", "tf32" or "fp32", and the sum in fp32."""
    if PRECISION == "bf16":
        x, y = x.to(tl.bfloat16), y.to(tl.bfloat16)
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


# In memory a state is W1 [F, E], b1 [E], W2 [E, F], b2 [F], or W1 [F, F], b1 [F], one behind the other. Tile
# e of it are columns e F ... of W1 and b1 and rows e F ... of W2.


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
def load_tokens(pointer, row, there, F: tl.constexpr):                          # [b, F], zeros behind the end
    x = tl.load(pointer + row[:, None] * F + tl.arange(0, F)[None, :], mask=there[:, None], other=0)
    return x.to(tl.float32)


@jit
def store_tokens(pointer, row, there, x, F: tl.constexpr):
    to = pointer + row[:, None] * F + tl.arange(0, F)[None, :]
    tl.store(to, x.to(pointer.dtype.element_ty), mask=there[:, None])


@jit
def hidden(W, e, x, F: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr):
    """gelu, gelu' and gelu'' of Z1 = x W1 + b1, tile e: [b, F] each."""
    return tile_gelu(tile_dot(x, tl.load(W1_at(W, e, F, E)), PRECISION) + tl.load(b1_at(W, e, F, E)))


@jit
def model(W, x, F: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr):
    """f(x; W), [b, F]."""
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
    """gradient_of and descend: the state W goes to `new`, which may be W."""
    xh, r = tile_normalise(model(W, k, F, E, PRECISION), eps)
    G = eta * tile_J(gamma * (gamma * xh + beta - (v - k)), xh, r)
    tl.debug_barrier()
    if E == F:
        tl.store(W1_at(new, 0, F, E), tl.load(W1_at(W, 0, F, E)) - tile_dot(k.T, G, PRECISION))
        tl.store(b1_at(new, 0, F, E), tl.load(b1_at(W, 0, F, E)) - tl.sum(G, 0)[None, :])
    else:
        for e in tl.range(E // F, disable_licm=True):
            X2, slope, _ = hidden(W, e, k, F, E, PRECISION)                       # again, rather than keep it
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
                F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """ClosedForm.forward of one (batch, head). `state` goes from first to last; a copy of it goes to `kept`
    before mini-batches 0, every, 2 every ..."""
    size: tl.constexpr = 2 * E * F + E + F if E > F else F * F + F
    program = tl.program_id(0).to(tl.int64)                   # batch x H + head
    gamma = tl.load(gamma + program % H * F + tl.arange(0, F))[None, :]
    beta = tl.load(beta + program % H * F + tl.arange(0, F))[None, :]
    steps = tl.cdiv(L, b)
    kept += program * tl.cdiv(steps, every) * size
    state += program * size
    t = 0
    while t < steps:
        if t % every == 0:
            copy_state(state, kept + (t // every).to(tl.int64) * size, size)
        row, there = program * L + t * b + tl.arange(0, b), t * b + tl.arange(0, b) < L
        k_t, v_t = load_tokens(k, row, there, F), load_tokens(v, row, there, F)
        eta_t = tl.load(eta + row, mask=there, other=0)[:, None]
        learn(state, state, k_t, v_t, eta_t, gamma, beta, eps, F, E, PRECISION)
        q_t = load_tokens(q, row, there, F)
        xh, _ = tile_normalise(model(state, q_t, F, E, PRECISION), eps)
        store_tokens(out, row, there, q_t + gamma * xh + beta, F)
        t += 1


@jit
def add(pointers, x):
    tl.store(pointers, tl.load(pointers) + x)


@jit
def tile_backward_of_model(dZ, W, dW, x, dx, known,
                           F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """From the gradient on f(x; W): dx and what falls on x; what falls on W is added to dW. `known` points at
    a part of the gradient on Z1, [b, F] a tile, that has come another way; None where there is none."""
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
def tile_backward_of_step(W, dW, spare, k, v, eta, gamma, beta, eps,
                          F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """backward_of_step: dk, dv [b, F], deta [b], and what falls on gamma [1, F]. spare: [4, b, F]."""
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
    dZ = tile_J(-gamma * dv, xh, r)
    dZ -= r * (w * tile_mean(p * xh) + gZ * tile_mean(U * xh) + xh * tile_mean(U * gZ))
    # Through the first forward pass, Z = f(k; W).
    dk = tile_backward_of_model(dZ, W, dW, k, dk - dv, rows, F, E, b, PRECISION)
    return dk, dv, deta, dgamma


@jit
def scan_backward_kernel(dout, kept, q, k, v, eta, gamma, beta, dq, dk, dv, deta, dgamma, dbeta, dstate,
                         scratch, H, L, eps, every,
                         F: tl.constexpr, E: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """ClosedForm.backward of one (batch, head). dstate: gradient on the last state, then on the first."""
    size: tl.constexpr = 2 * E * F + E + F if E > F else F * F + F
    program = tl.program_id(0).to(tl.int64)
    gamma = tl.load(gamma + program % H * F + tl.arange(0, F))[None, :]
    beta = tl.load(beta + program % H * F + tl.arange(0, F))[None, :]
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
            row, there = program * L + token, token < L
            k_t, v_t = load_tokens(k, row, there, F), load_tokens(v, row, there, F)
            eta_t = tl.load(eta + row, mask=there, other=0)[:, None]
            old, new = states + i * size, states + (i + 1) * size
            learn(old, new, k_t, v_t, eta_t, gamma, beta, eps, F, E, PRECISION)
            i += 1
        while i > 0:                                          # and walk back
            i -= 1
            token = (group * every + i) * b + tl.arange(0, b)
            row, there = program * L + token, token < L
            dout_t, q_t = load_tokens(dout, row, there, F), load_tokens(q, row, there, F)
            old, new = states + i * size, states + (i + 1) * size
            xh, r = tile_normalise(model(new, q_t, F, E, PRECISION), eps)
            dZ = tile_J(dout_t * gamma, xh, r)
            dq_t = tile_backward_of_model(dZ, new, dstate, q_t, dout_t, None, F, E, b, PRECISION)
            store_tokens(dq, row, there, dq_t, F)
            sum_gamma += tl.sum(dout_t * xh, 0)[None, :]
            sum_beta += tl.sum(dout_t, 0)[None, :]        # beta stands beside every output and every -(v - k)
            k_t, v_t = load_tokens(k, row, there, F), load_tokens(v, row, there, F)
            eta_t = tl.load(eta + row, mask=there, other=0)[:, None]
            dk_t, dv_t, deta_t, more = tile_backward_of_step(old, dstate, spare, k_t, v_t, eta_t, gamma, beta,
                                                             eps, F, E, b, PRECISION)
            sum_beta -= tl.sum(dv_t, 0)[None, :]
            store_tokens(dk, row, there, dk_t, F)
            store_tokens(dv, row, there, dv_t, F)
            tl.store(deta + row, deta_t, mask=there)
            sum_gamma += more
        group -= 1
    tl.store(dgamma + program * F + tl.arange(0, F)[None, :], sum_gamma)
    tl.store(dbeta + program * F + tl.arange(0, F)[None, :], sum_beta)


def launch_options(q, weights, precision):
    """Four warps own 16 of 64 tokens each. Eight where a tile's operands are of four bytes and would spill,
    and for TTT-MLP on Hopper, whose wgmma knows what to do with them. One stage, or Triton might fetch a tile
    of the state before the step that changes it has stored it. ptxas sometimes settles for 128 registers and
    spills the rest, unless it may have all."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    many = q.shape[-1] == 64 and (precision in ("tf32", "fp32") or hopper and len(weights) == 4)
    return dict(num_warps=8 if many else 4, num_stages=1, maxnreg=255)


# 3. One pair of operations for both kernels: what autograd and the compiler see ---------------------------

def flat(weights):                                            # [B, H, ...] each -> one state [B, H, size]
    return torch.cat([w.flatten(2) for w in weights], dim=-1)


def unflat(state, weights):
    parts = state.split([w[0, 0].numel() for w in weights], dim=-1)
    return [part.reshape(w.shape).clone() for part, w in zip(parts, weights)]


@torch.library.custom_op("ttt_minute::scan", mutates_args=())
def scan_op(weights: list[Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor,
            b: int, eps: float, every: int, how: str) -> list[Tensor]:
    """One launch. weights [B, H, ...] fp32, q, k, v [B, H, L, F], eta [B, H, L] fp32, gamma, beta [H, F] fp32
    -> out, states kept for the backward pass (flat), last weights. `how`: "cuda", or what Triton rounds
    operands of products to, "bf16", "tf32", "fp32"."""
    out, kept, *last = scan_shapes(weights, q, k, v, eta, gamma, beta, b, eps, every, how)
    B, H, L, F = q.shape
    if how == "cuda":
        tensors = q, k, v, out, eta, gamma, beta, *weights, *last, *tiles_and_biases(kept)
        launch(load_kernel().ttt_forward, tensors, q.shape[:3], every, eps)
        return [out, kept, *last]
    state = flat(weights)
    with torch.cuda.device_of(q):
        scan_kernel[(B * H,)](state, q, k, v, eta, gamma, beta, out, kept, H, L, eps, every, F=F,
                              E=weights[1].shape[-1], b=b, PRECISION=how, **launch_options(q, weights, how))
    return [out, kept, *unflat(state, weights)]


@scan_op.register_fake
def scan_shapes(weights, q, k, v, eta, gamma, beta, b, eps, every, how):
    groups = -(-(-(-q.shape[2] // b)) // every)
    kept = q.shape[0] * q.shape[1] * groups * sum(math.prod(w.shape[2:]) for w in weights)
    return [torch.empty_like(q), eta.new_empty(kept), *(torch.empty_like(w) for w in weights)]


@torch.library.custom_op("ttt_minute::scan_backward", mutates_args=())
def scan_backward_op(dout: Tensor, dlast: list[Tensor], kept: Tensor, q: Tensor, k: Tensor, v: Tensor,
                     eta: Tensor, gamma: Tensor, beta: Tensor, b: int, eps: float, every: int,
                     how: str) -> list[Tensor]:
    """One launch -> dq, dk, dv, deta, dgamma, dbeta, the last two [B, H, F], and dW of the first weights."""
    gradients = scan_backward_shapes(dout, dlast, kept, q, k, v, eta, gamma, beta, b, eps, every, how)
    dq, dk, dv, deta, dgamma, dbeta, *dW = gradients
    B, H, L, F = q.shape
    if how == "cuda":
        scratch = torch.empty(B * H * every * scratch_bytes(B * H), dtype=torch.uint8, device=q.device)
        tensors = (q, k, v, dout, dq, dk, dv, eta, gamma, beta, deta, dgamma, dbeta, *dlast, *dW,
                   *tiles_and_biases(kept), scratch)
        launch(load_kernel().ttt_backward, tensors, q.shape[:3], every, eps)
        return gradients
    E, dstate = dlast[1].shape[-1], flat(dlast)
    scratch = dstate.new_empty(B * H, (every + 1) * dstate.shape[-1] + b * E)
    with torch.cuda.device_of(q):
        scan_backward_kernel[(B * H,)](dout, kept, q, k, v, eta, gamma, beta, dq, dk, dv, deta, dgamma, dbeta,
                                       dstate, scratch, H, L, eps, every, F=F, E=E, b=b, PRECISION=how,
                                       **launch_options(q, dlast, how))
    return [dq, dk, dv, deta, dgamma, dbeta, *unflat(dstate, dlast)]


@scan_backward_op.register_fake
def scan_backward_shapes(dout, dlast, kept, q, k, v, eta, gamma, beta, b, eps, every, how):
    per_video = [eta.new_empty(*q.shape[:2], q.shape[3]) for _ in range(2)]
    return [*(torch.empty_like(x) for x in (q, k, v, eta)), *per_video, *(torch.empty_like(w) for w in dlast)]


def keep_for_backward(ctx, inputs, output):
    _, *tensors, ctx.b, ctx.eps, ctx.every, ctx.how = inputs
    ctx.shapes = [w.shape for w in output[2:]]
    ctx.save_for_backward(output[1], *tensors)


def scan_op_backward(ctx, gradients):
    dout, _, *dlast = gradients
    kept, q, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(q) if dout is None else dout.contiguous()
    dlast = [kept.new_zeros(shape) if dw is None else dw.contiguous() for dw, shape in zip(dlast, ctx.shapes)]
    options = ctx.b, ctx.eps, ctx.every, ctx.how
    dq, dk, dv, deta, dgamma, dbeta, *dW = scan_backward_op(dout, dlast, kept, q, *tensors, *options)
    return dW, dq, dk, dv, deta, dgamma.sum(0), dbeta.sum(0), None, None, None, None


scan_op.register_autograd(scan_op_backward, setup_context=keep_for_backward)


def scan_by_kernel(how, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint):
    B, H, L, _ = q.shape
    tensors = *weights, q, k, v, eta, ln_gamma, ln_beta
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    steps = -(-L // mini_batch)
    every = min(checkpoint, steps) if backward else steps     # one state is always kept
    shapes = [w.shape[-rank:] for w, rank in zip(weights, (2, 1, 2, 1))]
    weights = [w.float().expand(B, H, *shape).contiguous() for w, shape in zip(weights, shapes)]
    q, k, v = (x.contiguous() for x in (q, k, v))
    eta, ln_gamma, ln_beta = (x.float().contiguous() for x in (eta, ln_gamma, ln_beta))
    out, _, *last = scan_op(weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, every, how)
    return out, tuple(last)


# 4. ttt_kernel.cu: built on first use by one call of nvcc, loaded with ctypes -----------------------------

NVCC_FLAGS = """-std=c++20 -O3 -DNDEBUG -DKITTENS_HOPPER --use_fast_math --expt-relaxed-constexpr
    --expt-extended-lambda -gencode arch=compute_90a,code=sm_90a -diag-suppress 3189 -shared -cudart static
    -Xptxas=-v,--warn-on-spills -Xlinker -z,defs
    -Xcompiler=-fPIC,-fno-strict-aliasing,-Wno-psabi,-fvisibility=hidden""".split()
THUNDERKITTENS = ("git clone https://github.com/HazyResearch/ThunderKittens && git -C ThunderKittens checkout"
                  " 0b55588d && export THUNDERKITTENS_ROOT=$PWD/ThunderKittens")


def build_kernel(source=Path(__file__).parents[1] / "ttt_kernel.cu"):
    """The shared object of the kernel, compiled unless this source was before; beside it, as .log, what nvcc
    said. Raises UserError where nvcc or ThunderKittens' headers are missing or the build fails."""
    nvcc, headers = shutil.which("nvcc"), Path(os.environ.get("THUNDERKITTENS_ROOT", "")) / "include"
    if not nvcc or not (headers / "kittens.cuh").exists():
        raise UserError(f"the CUDA kernel needs nvcc 12.8 or newer and ThunderKittens: {THUNDERKITTENS}")
    key = "\n".join([source.read_text(), str(headers), nvcc, *NVCC_FLAGS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_minute"
    library = cache / f"ttt_kernel-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with atomic(library) as temporary:    # several processes may build at once: each renames a whole file
            command = [nvcc, *NVCC_FLAGS, f"-I{headers}", source, "-o", temporary]
            build, log = subprocess.run(command, capture_output=True, text=True), library.with_suffix(".log")
            log.write_text(build.stdout + build.stderr)
            if build.returncode:
                raise UserError(f"nvcc could not build {source.name}; what it said is in {log}")
    return library


@functools.cache
def load_kernel():
    library = ctypes.CDLL(str(build_kernel()))
    for function, pointers in (library.ttt_forward, 17), (library.ttt_backward, 24):
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int] * 4
        function.argtypes += [ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
    return library


def tiles_and_biases(kept):                                   # of states kept, in the kernel's own order
    states = len(kept) // 33088
    return kept.split([32768 * states, 320 * states])


def cluster_size(heads):
    """Multiprocessors that share a head: 4 while all `heads` (of all videos) find a cluster, else 2."""
    return 4 if 4 * heads <= 128 else 2


def scratch_bytes(heads):
    """What the backward pass keeps of a head and mini-batch: X2, G1, G2 in bf16; xh, r, biases in fp32."""
    tp = cluster_size(heads)
    return tp * (-(-(16384 * 4 // tp + 8192 + 16384 + 1024 + 256 * (4 // tp + 1)) // 128) * 128)


def launch(function, tensors, shape, every, eps):
    """Puts a kernel on the current stream of the tensors' device. Nothing waits for it."""
    device = tensors[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        options = *shape, every, eps, cluster_size(shape[0] * shape[1]), stream
        error = function(*[x.data_ptr() for x in tensors], *options)
    if error:
        raise RuntimeError(f"ttt_kernel.cu: launching on {device} failed with CUDA error {error}")


# 5. Which backend takes a scan ----------------------------------------------------------------------------

def scan(backend, scan_in_torch, kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint):
    """ttt_scan with the backends of this file. Raises ValueError where the one asked for cannot take it."""
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    half = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))
    precision = "tf32" if half == "fp32" and torch.get_float32_matmul_precision() != "highest" else half
    refusals = dict(torch=None, triton=triton_cannot(kind, q.device, q.shape[-1], mini_batch, precision),
                    cuda=cuda_cannot(kind, q.device, q.shape[-1], mini_batch, precision))
    if backend == "auto":
        fits = q.is_cuda and not refusals["triton"]
        trusted = fits and agrees(scan_in_torch, kind, q.shape[-1], mini_batch, precision, q.device)
        backend = "triton" if trusted else "torch"
    if backend not in refusals:
        raise ValueError(f'no backend "{backend}"; there are autograd, dual, primal, torch, triton, cuda')
    if refusals[backend]:
        raise ValueError(f'backend "{backend}" {refusals[backend]}; "torch" takes everything')
    if backend == "cuda":
        precision, (q, k, v) = "cuda", (x.to(torch.bfloat16) for x in (q, k, v))
    arguments = weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint
    if backend == "torch":
        return scan_in_torch(functools.partial(closed_form, CLOSED[kind]), kind, *arguments)
    return scan_by_kernel(precision, *arguments)


def triton_cannot(kind, device, F, b, precision):
    """Why Triton cannot take a scan, in words that follow its name; None where it can."""
    if triton is None:
        return "needs the package triton, which Linux alone has"
    if F not in (32, 64) or b not in (16, 32, 64) or precision not in ("bf16", "tf32", "fp32"):
        return f"takes heads of 32 or 64, mini-batches of 16, 32, 64, bf16 or fp32, not {F}, {b}, {precision}"
    if not EMULATED and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return "needs an NVIDIA GPU, Ampere or newer (on a CPU its interpreter: TRITON_INTERPRET=1)"


def cuda_cannot(kind, device, F, b, precision):
    if (kind, F, b, precision) != ("mlp", 64, 64, "bf16"):
        return f"takes mlp with heads and mini-batches of 64 in bf16, not {kind}, {F}, {b}, {precision}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a Hopper GPU (H100, H200)"


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def agrees(scan_in_torch, kind, F, b, precision, device):
    """Whether Triton's output and gradients are those of "torch", in a small scan here; says if not."""
    L, generator, results = 2 * b + 5, torch.Generator().manual_seed(0), []
    W = [(F, F), (F,)] if kind == "linear" else [(F, 4 * F), (4 * F,), (4 * F, F), (F,)]
    shapes = *((2, *w) for w in W), *[(1, 2, L, F)] * 3, (1, 2, L), (2, F), (2, F)
    inputs = [0.1 * torch.randn(shape, generator=generator).to(device) for shape in shapes]
    try:
        with torch.autocast(device.type, enabled=False):
            for how in "torch", precision:
                *weights, q, k, v, eta, gamma, beta = leaves = [x.clone().requires_grad_() for x in inputs]
                arguments = weights, q, k, v, eta, gamma, beta, b, 1e-8, 2
                out, last = (scan("torch", scan_in_torch, kind, *arguments) if how == "torch"
                             else scan_by_kernel(how, *arguments))
                loss = sum((y * y).sum() for y in (out, *last))
                results.append([out, *last, *torch.autograd.grad(loss, leaves)])
        worst = max(((got - wanted).norm() / wanted.norm()).item() for wanted, got in zip(*results))
        limit = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}[precision]
        complaint = None if worst <= limit else f"is off by {worst:.2g} here"
    except Exception as error:                                # whatever a compiler or a driver may say
        complaint = f"does not run here ({type(error).__name__}: {error})"
    if complaint:
        print(f'ttt_scan: backend "triton" {complaint}; taking "torch"', file=sys.stderr)
    return not complaint
