"""The scan of ttt_minute.py, section 4, made fast: three more backends for ttt_scan, the same numbers.

    torch      the primal form with its backward pass in closed form, for linear and mlp
    triton     one kernel a pass; NVIDIA GPUs since Ampere, heads of 32 or 64, mini-batches of 16, 32 or 64,
               bf16 or fp32
    cuda       ttt_kernel.cu: TTT-MLP with its hidden state on chip (paper, 3.5 and appendix B); Hopper GPUs,
               heads and mini-batches of 64, bf16

Not yet run on a GPU: the Triton kernels are tested in Triton's interpreter, the CUDA kernel is executed
instruction by instruction on a CPU (hopper.py). So "auto" takes torch, or Triton once it agreed with torch on
the very GPU.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from einops import pack, unpack
from torch.autograd.function import once_differentiable

from dataset import UserError, atomic, warn

# 1. The backward pass in closed form, in torch ------------------------------------------------------------
#
# Autograd through the primal form keeps every intermediate of a step. Here the forward pass keeps W every few
# mini-batches, and the backward pass takes these groups last to first: it replays a group from its W, then
# walks it backwards, carrying dW, the gradient on the state. Tensors are [n, b, F], as in section 4. "What
# falls on x" is the gradient of the outer loss on x. TTT-Linear has W1 and b1 only: its G1 is G.

def normalise(Z, eps):
    """xh, and what J needs of it. Biased variance, eps inside the root."""
    xh, mean, r = torch.native_layer_norm(Z, Z.shape[-1:], None, None, eps)
    return xh, (Z, Z.shape[-1:], mean, r, None, None, (True, False, False))


def J(p, statistics):
    """LayerNorm's Jacobian, symmetric: r (p - mean(p) - xh mean(p xh))."""
    return torch.ops.aten.native_layer_norm_backward(p, *statistics)[0]


def gelu_derivatives(x, order):
    """gelu_tanh(x) = x s, s = sigmoid(z), z = c x (1 + d x^2), c = sqrt(8 / pi), and its first `order`
    derivatives, s (1 + v (1 - s)) and (r (v (1 - 2s) + 4) - 2c) s (1 - s), where r = z' = c (1 + 3 d x^2),
    v = x r and z = (v + 2c x) / 3. Overwrites x."""
    c, d = 1.5957691216057308, 0.044715
    r = (x * x).mul_(3 * c * d).add_(c)
    v = x * r if order == 2 else r.mul_(x)
    s = torch.add(v, x, alpha=2 * c).mul_(1 / 3).sigmoid_()
    if order == 2:
        second = r.mul_(torch.addcmul(v, v, s, value=-2).add_(4)).sub_(2 * c).mul_(s)
        second.addcmul_(second, s, value=-1)
    first, y = v.addcmul_(v, s, value=-1).add_(1).mul_(s), x.mul_(s)
    return (y, first, second) if order == 2 else (y, first)


def model(W, x, order=1):
    """Z = f(x; W), and what comes back through it needs: X2, GELU' [, GELU'']."""
    if len(W) == 2:
        return torch.baddbmm(W[1], x, W[0]), ()
    kept = gelu_derivatives(torch.baddbmm(W[1], x, W[0]), order)
    return torch.baddbmm(W[3], kept[0], W[2]), kept


def backward_of_model(W, dW, x, dZ, kept, dx, inside=None):
    """Through Z = f(x; W): adds to dW, returns dx and what falls on x. inside: the negative of what falls on
    X2 besides, and what falls on Z1 besides."""
    if len(W) == 4:
        dW[2].baddbmm_(kept[0].mT, dZ)
        dW[3] += dZ.sum(-2, keepdim=True)
        if inside is None:
            dZ = torch.bmm(dZ, W[2].mT).mul_(kept[1])
        else:
            dZ = inside[0].baddbmm_(dZ, W[2].mT, beta=-1).mul_(kept[1]).add_(inside[1])
    dW[0].baddbmm_(x.mT, dZ)
    dW[1] += dZ.sum(-2, keepdim=True)
    return torch.baddbmm(dx, dZ, W[0].mT)


def learn(W, k, shift, eta, gamma, eps, order=1):
    """W - dl/dW, and what backward_of_learn needs. shift = beta - (v - k); `order` derivatives of GELU."""
    Z, kept = model(W, k, order)
    xh, statistics = normalise(Z, eps)
    error = torch.addcmul(shift, gamma, xh)                                 # LN(Z) - (v - k)
    p = gamma * error                                         # the gradient on xh before eta,
    gZ = J(p, statistics)                                     # and on Z
    G = G1 = eta * gZ
    inside, second = (), ()
    if len(W) == 4:
        gX2 = torch.bmm(G, W[2].mT)
        G1 = gX2 * kept[1]
        inside = gX2, G1
        second = torch.baddbmm(W[2], kept[0].mT, G, alpha=-1), W[3] - G.sum(-2, keepdim=True)
    W = torch.baddbmm(W[0], k.mT, G1, alpha=-1), W[1] - G1.sum(-2, keepdim=True), *second
    return W, (xh, statistics, error, p, gZ, G, kept, inside)


def backward_of_learn(W, dW, k, eta, gamma, dgamma, saved):
    """Gradients on k, v and eta. dW: the gradient on the new W, on return on the old; adds to dgamma."""
    xh, statistics, error, p, gZ, G, kept, inside = saved
    # Through the update W' = W - k^T G: every product here reads dW before anything is added to it.
    dG = dG1 = torch.baddbmm(dW[1], k, dW[0], alpha=-1, beta=-1)
    G1 = G
    if len(W) == 4:
        (X2, slope, bend), (gX2, G1) = kept, inside
        dG = torch.baddbmm(dW[3], X2, dW[2], alpha=-1, beta=-1)
        inside = torch.bmm(G, dW[2].mT), bend.mul_(gX2).mul_(dG1)           # through G1 = gX2 * slope
        dgX2 = dG1.mul_(slope)
        dG.baddbmm_(dgX2, W[2])
        dW[2].baddbmm_(dgX2.mT, G)
    dk = torch.bmm(G1, dW[0].mT)                                            # minus this falls on k
    # Through G = eta J[p], p = gamma error. J's xh and r depend on Z as well: the second line of dZ.
    deta = (dG * gZ).sum(-1, keepdim=True)
    U = eta * dG
    w = J(U, statistics)                                                    # the gradient on p
    dp = gamma * w                                                          # on error, and minus that on v
    dgamma.addcmul_(w, torch.addcmul(error, gamma, xh))
    along_p, along_U = (p * xh).mean(-1, keepdim=True), (U * xh).mean(-1, keepdim=True)
    dZ = J(gamma * dp, statistics)
    dZ -= statistics[3] * (w * along_p).addcmul_(gZ, along_U).addcmul_(xh, eta * deta / k.shape[-1])
    # Through the first forward pass, Z = f(k; W).
    return backward_of_model(W, dW, k, dZ, kept, dp - dk, inside), -dp, deta


class ClosedForm(torch.autograd.Function):
    """All mini-batches, one after the other: q, k, v [M, n, b, F], eta [M, n, b, 1] -> out, *last W."""

    @staticmethod
    def forward(ctx, eps, every, q, k, v, eta, gamma, beta, *W):
        out, states = torch.empty_like(q), []
        for m, (k_m, shift, eta_m) in enumerate(zip(k, beta - (v - k), eta)):
            if m % every == 0:
                states += W
            W, _ = learn(W, k_m, shift, eta_m, gamma, eps)
            xh, _ = normalise(model(W, q[m])[0], eps)
            out[m] = torch.addcmul(q[m] + beta, gamma, xh)
        ctx.save_for_backward(q, k, v, eta, gamma, beta, *states)
        ctx.eps, ctx.every = eps, every
        return out, *W

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *dW):
        q, k, v, eta, gamma, beta, *states = ctx.saved_tensors
        dq, dk, dv, deta = (torch.empty_like(x) for x in (q, k, v, eta))
        dW, dgamma, shift = [dw.clone() for dw in dW], torch.zeros_like(q[0]), beta - (v - k)
        for start in reversed(range(0, len(q), ctx.every)):
            W, replay = states[start // ctx.every * len(dW):][:len(dW)], []
            for m in range(start, min(start + ctx.every, len(q))):
                new, saved = learn(W, k[m], shift[m], eta[m], gamma, ctx.eps, order=2)
                replay.append((m, W, saved))
                W = new
            for m, old, saved in reversed(replay):
                Z, kept = model(W, q[m])                      # through z = q + LN(f(q; W)), W the new one
                xh, statistics = normalise(Z, ctx.eps)
                dgamma.addcmul_(dout[m], xh)
                dq[m] = backward_of_model(W, dW, q[m], J(dout[m] * gamma, statistics), kept, dout[m])
                dk[m], dv[m], deta[m] = backward_of_learn(old, dW, k[m], eta[m], gamma, dgamma, saved)
                W = old
        dbeta = dout.sum((0, 2)) - dv.sum((0, 2))         # beta stands beside every output and every -(v - k)
        return None, None, dq, dk, dv, deta, dgamma.sum(-2, keepdim=True), dbeta[:, None], *dW


def closed_form(f, W, tokens, gamma, beta, eps, checkpoint):
    """A loop for scan_in_torch: (out [M, n, b, F], last W)."""
    out, *W = ClosedForm.apply(eps, checkpoint, *tokens, gamma, beta, *W)
    return out, W


# 2. The same in Triton ------------------------------------------------------------------------------------
#
# The closed form launches some thirty operations a mini-batch and carries what they share through the GPU's
# main memory. Here one program a (batch, head) reads a whole sequence in one launch, forward or backward.
# Products round their operands to the precision of the inputs; their sums and all else are fp32. Every sum
# runs inside one program in the order of the code: no atomics, the same bits each time.
#
# A state is 132 KB for TTT-MLP at F 64. With W in registers ptxas spilled 3 to 97 KB a thread, so it passes
# through them in tiles of F x F and lives in the L1 and L2 caches. DIFF from the paper's kernel (3.5), which
# holds W in the shared memory of two SMs. Backward, a program needs a scratch of `every` states and a row
# [b, E]: 2.2 MB for TTT-MLP at F 64, b 64, 16 mini-batches a group.

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:                                           # there is no Triton for macOS and Windows
    triton, jit, constexpr = None, lambda function: function, lambda value: value

# Triton's interpreter runs kernels on a CPU. It multiplies no bf16: operands are rounded and go back to fp32.
EMULATED = constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@jit
def tile_dot(x, y, PRECISION: constexpr):
    """x @ y: operands rounded to PRECISION, "bf16" or "fp32", and the sum in fp32."""
    if PRECISION == "bf16":
        x, y = x.to(tl.bfloat16), y.to(tl.bfloat16)
    if EMULATED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="tf32x3")


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


@jit
def load_tokens(pointer, rows, F: constexpr):                     # [b, F]; rows -1 are behind the end: zeros
    return tl.load(pointer + rows * F + tl.arange(0, F)[None, :], mask=rows >= 0, other=0).to(tl.float32)


@jit
def store_tokens(pointer, rows, x, F: constexpr):
    tl.store(pointer + rows * F + tl.arange(0, F)[None, :], x.to(pointer.dtype.element_ty), mask=rows >= 0)


@jit
def add(pointers, x):
    tl.store(pointers, tl.load(pointers) + x)


@jit
def tile_of(state, e, F: constexpr, E: constexpr):
    """Pointers to tile e of a state, W1 [F, E], b1 [E], W2 [E, F], b2 [F] one behind the other, or W1 [F, F],
    b1 [F]: columns e F ... of W1 and b1, rows e F ... of W2, and the whole b2."""
    i, j = tl.arange(0, F)[:, None], tl.arange(0, F)[None, :]
    W2 = state + F * E + E
    return state + e * F + i * E + j, state + F * E + e * F + j, W2 + e * F * F + i * F + j, W2 + E * F + j


@jit
def affine(W, e, x, F: constexpr, E: constexpr, PRECISION: constexpr):                # x W1 + b1, tile e
    W1, b1, _, _ = tile_of(W, e, F, E)
    return tile_dot(x, tl.load(W1), PRECISION) + tl.load(b1)


@jit
def tile_model(W, x, F: constexpr, E: constexpr, PRECISION: constexpr):                # f(x; W)
    if E == F:
        return affine(W, 0, x, F, E, PRECISION)
    Z = tl.zeros_like(x) + tl.load(tile_of(W, 0, F, E)[3])
    for e in tl.range(E // F, disable_licm=True):
        X2, _, _ = tile_gelu(affine(W, e, x, F, E, PRECISION))              # again each time: it is not kept
        Z += tile_dot(X2, tl.load(tile_of(W, e, F, E)[2]), PRECISION)
    return Z


@jit
def tile_backward_of_model(W, dW, x, dZ, dx, inside, F: constexpr, E: constexpr, PRECISION: constexpr):
    """inside: points at what falls on Z1 besides, [b, F] a tile; None where there is nothing."""
    for e in tl.range(E // F, disable_licm=True):
        W1, _, W2, _ = tile_of(W, e, F, E)
        dW1, db1, dW2, _ = tile_of(dW, e, F, E)
        dZ1 = dZ
        if E > F:
            X2, slope, _ = tile_gelu(affine(W, e, x, F, E, PRECISION))
            add(dW2, tile_dot(X2.T, dZ, PRECISION))
            dZ1 = tile_dot(dZ, tl.load(W2).T, PRECISION) * slope
            if inside is not None:
                dZ1 += tl.load(inside + e * x.shape[0] * F)
        add(dW1, tile_dot(x.T, dZ1, PRECISION))
        add(db1, tl.sum(dZ1, 0)[None, :])
        dx += tile_dot(dZ1, tl.load(W1).T, PRECISION)
    if E > F:
        add(tile_of(dW, 0, F, E)[3], tl.sum(dZ, 0)[None, :])
    tl.debug_barrier()
    return dx


@jit
def tile_learn(W, new, k, v, eta, rows, gamma, beta, eps, F: constexpr, E: constexpr, PRECISION: constexpr):
    """The state W after a step goes to `new`, which may be W."""
    k, v, eta = load_tokens(k, rows, F), load_tokens(v, rows, F), load_tokens(eta, rows, 1)
    xh, r = tile_normalise(tile_model(W, k, F, E, PRECISION), eps)
    G = eta * tile_J(gamma * (gamma * xh + beta - (v - k)), xh, r)
    tl.debug_barrier()
    for e in tl.range(E // F, disable_licm=True):
        W1, b1, W2, _ = tile_of(W, e, F, E)
        new_W1, new_b1, new_W2, _ = tile_of(new, e, F, E)
        G1 = G
        if E > F:
            X2, slope, _ = tile_gelu(affine(W, e, k, F, E, PRECISION))
            G1 = tile_dot(G, tl.load(W2).T, PRECISION) * slope
            tl.store(new_W2, tl.load(W2) - tile_dot(X2.T, G, PRECISION))
        tl.store(new_W1, tl.load(W1) - tile_dot(k.T, G1, PRECISION))
        tl.store(new_b1, tl.load(b1) - tl.sum(G1, 0)[None, :])
    if E > F:
        tl.store(tile_of(new, 0, F, E)[3], tl.load(tile_of(W, 0, F, E)[3]) - tl.sum(G, 0)[None, :])
    tl.debug_barrier()


@jit
def scan_kernel(q, k, v, out, eta, gamma, beta, kept, H, L, eps, every,
                F: constexpr, E: constexpr, b: constexpr, PRECISION: constexpr):
    """ClosedForm.forward of one (batch, head). kept: W before mini-batches 0, every, 2 every ... and the last
    W; the first of them is given."""
    size: constexpr = 2 * E * F + E + F if E > F else F * F + F
    program = tl.program_id(0).to(tl.int64)                   # batch x H + head
    own, row, steps = tl.arange(0, b)[:, None], tl.arange(0, F)[None, :], tl.cdiv(L, b)
    gamma, beta = tl.load(gamma + program % H * F + row), tl.load(beta + program % H * F + row)
    kept += program * (tl.cdiv(steps, every) + 1) * size
    for t in tl.range(steps, disable_licm=True):
        new = kept + (t // every + 1).to(tl.int64) * size
        old = tl.where(t % every == 0, new - size, new)
        rows = tl.where(t * b + own < L, program * L + t * b + own, -1)
        tile_learn(old, new, k, v, eta, rows, gamma, beta, eps, F, E, PRECISION)
        q_t = load_tokens(q, rows, F)
        xh, _ = tile_normalise(tile_model(new, q_t, F, E, PRECISION), eps)
        store_tokens(out, rows, q_t + gamma * xh + beta, F)


@jit
def scan_backward_kernel(q, k, v, dout, dq, dk, dv, eta, gamma, beta, deta, dgamma, dbeta, dstate, kept,
                         scratch, H, L, eps, every,
                         F: constexpr, E: constexpr, b: constexpr, PRECISION: constexpr):
    """ClosedForm.backward of one (batch, head). dstate: gradient on the last state, then on the first."""
    size: constexpr = 2 * E * F + E + F if E > F else F * F + F
    program = tl.program_id(0).to(tl.int64)
    own, row, steps = tl.arange(0, b)[:, None], tl.arange(0, F)[None, :], tl.cdiv(L, b)
    gamma, beta = tl.load(gamma + program % H * F + row), tl.load(beta + program % H * F + row)
    groups = tl.cdiv(steps, every)
    kept, dstate = kept + program * (groups + 1) * size, dstate + program * size
    scratch += program * (every * size + E * b)               # states after each step of a group, and a row:
    inside = scratch + every * size + own * F + row           # what falls on Z1 but for what comes through dZ
    dgamma, dbeta = dgamma + program * F + row, dbeta + program * F + row
    for i in tl.range(groups, disable_licm=True):
        group = groups - 1 - i
        first = kept + group.to(tl.int64) * size
        start, stop = group * every, tl.minimum((group + 1) * every, steps)
        for t in tl.range(start, stop, disable_licm=True):    # replay
            rows = tl.where(t * b + own < L, program * L + t * b + own, -1)
            new = scratch + (t - start) * size
            old = tl.where(t > start, new - size, first)
            tile_learn(old, new, k, v, eta, rows, gamma, beta, eps, F, E, PRECISION)
        for s in tl.range(start, stop, disable_licm=True):    # and walk back
            t = start + stop - 1 - s
            rows = tl.where(t * b + own < L, program * L + t * b + own, -1)
            new = scratch + (t - start) * size
            old = tl.where(t > start, new - size, first)
            # Through z = q + LN(f(q; W)), W the new one.
            dout_t, q_t = load_tokens(dout, rows, F), load_tokens(q, rows, F)
            xh, r = tile_normalise(tile_model(new, q_t, F, E, PRECISION), eps)
            dZ = tile_J(dout_t * gamma, xh, r)
            dq_t = tile_backward_of_model(new, dstate, q_t, dZ, dout_t, None, F, E, PRECISION)
            add(dgamma, tl.sum(dout_t * xh, 0)[None, :])
            add(dbeta, tl.sum(dout_t, 0)[None, :])        # beta stands beside every output and every -(v - k)
            store_tokens(dq, rows, dq_t, F)
            # Through the update W' = W - k^T G: every product here reads dW before anything is added to it.
            k_t, v_t, eta_t = load_tokens(k, rows, F), load_tokens(v, rows, F), load_tokens(eta, rows, 1)
            xh, r = tile_normalise(tile_model(old, k_t, F, E, PRECISION), eps)
            error = gamma * xh + beta - (v_t - k_t)
            p = gamma * error
            gZ = tile_J(p, xh, r)
            G = eta_t * gZ
            dG, dk_t = tl.zeros_like(k_t), tl.zeros_like(k_t)
            if E > F:
                dG -= tl.load(tile_of(dstate, 0, F, E)[3])
            for e in tl.range(E // F, disable_licm=True):
                dW1, db1, dW2, _ = tile_of(dstate, e, F, E)
                G1, dW1 = G, tl.load(dW1)
                dG1 = -tile_dot(k_t, dW1, PRECISION) - tl.load(db1)
                if E == F:
                    dG = dG1
                else:
                    X2, slope, bend = tile_gelu(affine(old, e, k_t, F, E, PRECISION))
                    last, W2 = tl.load(dW2), tl.load(tile_of(old, e, F, E)[2])
                    dG -= tile_dot(X2, last, PRECISION)
                    gX2 = tile_dot(G, W2.T, PRECISION)
                    G1, dgX2 = gX2 * slope, dG1 * slope
                    tl.store(inside + e * b * F, dG1 * gX2 * bend - tile_dot(G, last.T, PRECISION) * slope)
                    dG += tile_dot(dgX2, W2, PRECISION)
                    tl.store(dW2, last + tile_dot(dgX2.T, G, PRECISION))
                dk_t -= tile_dot(G1, dW1.T, PRECISION)
            tl.debug_barrier()
            # Through G = eta J[p], p = gamma error.
            U = eta_t * dG
            w = tile_J(U, xh, r)
            dv_t = -gamma * w
            add(dgamma, tl.sum(w * (error + gamma * xh), 0)[None, :])
            add(dbeta, -tl.sum(dv_t, 0)[None, :])
            dZ = tile_J(-gamma * dv_t, xh, r)
            dZ -= r * (w * tile_mean(p * xh) + gZ * tile_mean(U * xh) + xh * tile_mean(U * gZ))
            # Through the first forward pass, Z = f(k; W).
            dk_t = tile_backward_of_model(old, dstate, k_t, dZ, dk_t - dv_t, inside, F, E, PRECISION)
            store_tokens(dk, rows, dk_t, F)
            store_tokens(dv, rows, dv_t, F)
            store_tokens(deta, rows, tl.sum(dG * gZ, 1)[:, None], 1)


def launch_options(q, weights, precision):
    """Four warps own 16 of 64 tokens each; eight where operands of four bytes would spill, and for TTT-MLP on
    Hopper's wgmma. One stage, or Triton might fetch a tile of the state before the step that changes it has
    stored it. 255 registers: ptxas sometimes settles for 128 and spills the rest."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    many = q.shape[-1] == 64 and (precision == "fp32" or hopper and len(weights) == 4)
    return dict(num_warps=8 if many else 4, num_stages=1, maxnreg=255)


# 3. Both kernels to autograd ------------------------------------------------------------------------------

class KernelScan(torch.autograd.Function):
    """One launch a pass. q, k, v [B, H, L, F]; eta [B, H, L], gamma, beta [H, F], weights [B, H, ...] in fp32
    -> out, *last weights. how: "cuda", or what Triton rounds operands of products to, "bf16", "fp32"."""

    @staticmethod
    def forward(ctx, how, b, eps, every, q, k, v, eta, gamma, beta, *weights):
        (B, H, L, F), E, out = q.shape, weights[1].shape[-1], torch.empty_like(q)
        groups, ctx.options = -(-L // (b * every)), (how, b, eps, every)
        tensors = q, k, v, out, eta, gamma, beta
        if how == "cuda":
            kept = [eta.new_empty(B * H * groups * numbers) for numbers in (32768, 320)]
            last = [torch.empty_like(w) for w in weights]
            launch("ttt_forward", (*tensors, *weights, *last, *kept), every, eps)
        else:
            (first, shapes), options = pack(weights, "B H *"), launch_options(q, weights, how)
            kept = [first.new_empty(B, H, groups + 1, first.shape[-1])]
            kept[0][:, :, 0] = first
            scan_kernel[(B * H,)](*tensors, *kept, H, L, eps, every, F, E, b, how, **options)
            last = [w.clone() for w in unpack(kept[0][:, :, -1], shapes, "B H *")]
        ctx.save_for_backward(q, k, v, eta, gamma, beta, *kept)
        return out, *last

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *dW):
        (how, b, eps, every), (q, k, v, eta, gamma, beta, *kept) = ctx.options, ctx.saved_tensors
        (B, H, L, F), E, dW = q.shape, dW[1].shape[-1], [dw.contiguous() for dw in dW]
        dq, dk, dv, deta = (torch.empty_like(x) for x in (q, k, v, eta))
        dgamma, dbeta = eta.new_zeros(2, B, H, F)
        tensors = q, k, v, dout.contiguous(), dq, dk, dv, eta, gamma, beta, deta, dgamma, dbeta
        if how == "cuda":
            first, tp = [torch.empty_like(dw) for dw in dW], cluster_size(B * H)
            scratch = q.new_empty(B * H * every * tp * load_kernel().ttt_scratch_bytes(tp), dtype=torch.uint8)
            launch("ttt_backward", (*tensors, *dW, *first, *kept, scratch), every, eps)
        else:
            (state, shapes), options = pack(dW, "B H *"), launch_options(q, dW, how)
            scratch = state.new_empty(B * H, every * state.shape[-1] + b * E)
            tensors = *tensors, state, *kept, scratch
            scan_backward_kernel[(B * H,)](*tensors, H, L, eps, every, F, E, b, how, **options)
            first = unpack(state, shapes, "B H *")
        return None, None, None, None, dq, dk, dv, deta, dgamma.sum(0), dbeta.sum(0), *first


def scan_by_kernel(how, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint):
    every = checkpoint if torch.is_grad_enabled() else q.shape[2]
    weights = [w.float().expand(len(q), *w.shape[-n:]).contiguous() for w, n in zip(weights, (3, 2, 3, 2))]
    tokens = [x.to(torch.bfloat16 if how == "cuda" else x.dtype).contiguous() for x in (q, k, v)]
    others = [x.float().contiguous() for x in (eta, ln_gamma, ln_beta)]
    with torch.cuda.device_of(q):                             # in its backward pass autograd sees to that
        out, *last = KernelScan.apply(how, mini_batch, eps, every, *tokens, *others, *weights)
    return out, tuple(last)


# 4. ttt_kernel.cu: built on first use by one call of nvcc, loaded with ctypes -----------------------------

NVCC_FLAGS = """-std=c++20 -O3 -DNDEBUG -DKITTENS_HOPPER --use_fast_math --expt-relaxed-constexpr
    --expt-extended-lambda -gencode arch=compute_90a,code=sm_90a -diag-suppress 3189 -shared -cudart static
    -Xcompiler=-fPIC,-fno-strict-aliasing,-Wno-psabi,-fvisibility=hidden""".split()


@functools.cache
def load_kernel(source=Path(__file__).parents[1] / "ttt_kernel.cu"):
    """The functions of the .cu, compiled unless this source was before; UserError where that fails."""
    nvcc, root = shutil.which("nvcc"), os.environ.get("THUNDERKITTENS_ROOT")
    if not nvcc or not root:
        raise UserError("ttt_kernel.cu needs nvcc 12.8 or newer on PATH and ThunderKittens (README, Kernels)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_minute"
    library = cache / f"ttt_kernel-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        with atomic(library) as temporary:    # several processes may build at once: each renames a whole file
            command = [nvcc, *NVCC_FLAGS, f"-I{root}/include", source, "-o", temporary]
            if subprocess.run(command).returncode:
                raise UserError(f"nvcc could not build {source.name}, for the reasons above")
    return ctypes.CDLL(str(library))


def cluster_size(heads):
    """Multiprocessors that share a head: 4 while all `heads` (of all videos) find a cluster, else 2."""
    return 4 if 4 * heads <= 128 else 2


def launch(name, tensors, every, eps):
    """Puts a kernel on the current stream of the tensors' device. Nothing waits for it."""
    (B, H, L, _), stream = tensors[0].shape, torch.cuda.current_stream(tensors[0].device).cuda_stream
    arguments = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    arguments += B, H, L, every, ctypes.c_float(eps), cluster_size(B * H), ctypes.c_void_p(stream)
    assert not (error := load_kernel()[name](*arguments)), f"{name} of ttt_kernel.cu: CUDA error {error}"


# 5. Which backend takes a scan ----------------------------------------------------------------------------

@torch.compiler.disable
def scan(backend, scan_in_torch, kind, weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint):
    """ttt_scan with the backends of this file. Raises ValueError where the one asked for cannot take it."""
    device, F, b = q.device, q.shape[-1], mini_batch
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else q.dtype
    precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))
    chip = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    fits = {"torch": kind in ("linear", "mlp"),
            "cuda": chip == (9, 0) and (kind, F, b, precision) == ("mlp", 64, 64, "bf16"),
            "triton": triton and (chip >= (8, 0) or EMULATED) and F in (32, 64) and b in (16, 32, 64)
                      and precision in ("bf16", "fp32")}
    case = kind, F, b, precision, device
    if backend == "auto":
        backend = "triton" if q.is_cuda and fits["triton"] and agrees(scan_in_torch, *case) else "torch"
    if not fits.get(backend):
        there, case = __doc__.split("\n\n")[1], ", ".join(map(str, case))
        raise ValueError(f'no backend "{backend}" for {case}; besides autograd, dual, primal:\n{there}')
    arguments = weights, q, k, v, eta, ln_gamma, ln_beta, mini_batch, eps, checkpoint
    if backend == "torch":
        return scan_in_torch(closed_form, kind, *arguments)
    return scan_by_kernel("cuda" if backend == "cuda" else precision, *arguments)


@functools.cache
@torch.inference_mode(False)                                  # which turns gradients on
def agrees(scan_in_torch, kind, F, b, precision, device):
    """Whether Triton's output and gradients are those of "torch", in a small scan here; says if not."""
    W = dict(linear=[(2, F, F), (2, F)], mlp=[(2, F, 4 * F), (2, 4 * F), (2, 4 * F, F), (2, F)])[kind]
    tokens, generator, found = (1, 2, 2 * b + 5), torch.Generator().manual_seed(0), []
    shapes = *W, *[(*tokens, F)] * 3, tokens, (2, F), (2, F)
    inputs = [(torch.randn(s, generator=generator) / 10).to(device).requires_grad_() for s in shapes]
    try:
        for scan, *first in (scan_by_kernel, precision), (scan_in_torch, closed_form, kind):
            out, last = scan(*first, inputs[:len(W)], *inputs[len(W):], b, 1e-8, 2)
            loss = sum((y * y).sum() for y in (out, *last))
            found.append([out, *last, *torch.autograd.grad(loss, inputs)])
        worst = max(((got - wanted).norm() / wanted.norm()).item() for got, wanted in zip(*found))
        assert worst <= {"fp32": 1e-3, "bf16": 1e-1}[precision], f"it is off by {worst:.2g}"
        return True
    except Exception as error:                                # whatever a compiler or a driver may say
        warn(f'ttt_scan: backend "triton" does not do here, {error!r}; taking "torch"')
        return False
