"""The other memories that the paper compares TTT with (section 4.1): a window, and two linear recurrences.

Each has the signature of TTT in ttt_minute.py, layer(x [B, L, D] in scan order, layout) -> [B, L, D], and its
method mix is what looks across tokens. The recurrences carry a matrix S where TTT carries a network, and
update it by rules that need no gradient:

    Mamba 2            S_t = e^(dt_t A) S_{t-1} + dt_t x_t B_t^T                             out_t = S_t C_t
    Gated DeltaNet     S_t = e^(g_t) S_{t-1} + write_t k_t (v_t - k_t^T e^(g_t) S_{t-1})^T   out_t = q_t^T S_t

The second is TTT-Linear without LayerNorm, with a mini-batch of one token and a decay: its bracket is the
error of a linear f.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as nnf
from einops import rearrange


class SlidingWindow(nn.Module):
    """Attention to the last `config.window` tokens in scan order, itself included. Queries come in blocks of
    a window: each sees its own block and the one before, so memory is linear in L."""

    def __init__(self, config):
        super().__init__()
        self.window, self.heads = config.window, config.heads
        self.qkv = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in "qkv")
        self.norm_q, self.norm_k = (nn.LayerNorm(config.head_width, eps=1e-6) for _ in "qk")
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, layout):
        q, k, v = (rearrange(linear(x), "B L (H F) -> B H L F", H=self.heads) for linear in self.qkv)
        y = self.mix(layout, (self.norm_q(q), self.norm_k(k), v))
        return self.out(rearrange(y, "B H L F -> B L (H F)"))

    def mix(self, layout, tokens, parameters=()):
        q, k, v = tokens
        return window_attention(layout.turn(q), layout.turn(k), v, self.window)


def in_chunks(x, chunk):
    """[B, H, L, ...] -> [m, B, H, chunk, ...], zeros behind the end."""
    after = (0, 0) * (x.ndim - 3) + (0, -x.shape[2] % chunk)
    return nnf.pad(x, after).unflatten(2, (-1, chunk)).movedim(2, 0)


def window_attention(q, k, v, window):
    """Causal attention in which a token sees itself and the window - 1 before it: [B, H, L, F], each."""
    B, L = q.shape[0], q.shape[2]
    q, k, v = (in_chunks(y, window) for y in (q, k, v))                     # [m, B, H, w, F]
    first = nnf.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)
    i = torch.arange(window, device=q.device)
    band = torch.cat([i[None] > i[:, None], i[None] <= i[:, None]], dim=1)  # block before, own: [w, 2w]
    k, v = (torch.cat([y[:-1], y[1:]], dim=3).flatten(0, 1) for y in (k, v))      # [(m-1) B, H, 2w, F]
    rest = nnf.scaled_dot_product_attention(q[1:].flatten(0, 1), k, v, attn_mask=band)
    return rearrange(torch.cat([first, rest]), "(m B) H w F -> B H (m w) F", B=B)[:, :, :L]


def decays_within(g):
    """Log decays g [..., C] of a chunk -> their running sum G, and e^(G_t - G_i) for i <= t, zero above the
    diagonal: [..., C, C]."""
    G = g.cumsum(-1)
    return G, torch.exp((G[..., :, None] - G[..., None, :]).tril()).tril()


def gated_delta_rule(q, k, v, g, beta, chunk=64):
    """Gated DeltaNet's recurrence (Yang et al., 2412.06464) in chunks, in fp32 (float64 for float64).

    q, k [B, H, L, F], L2-normalised by the caller, q scaled by F^-1/2 here; v [B, H, L, V]; g log decay and
    beta, the rate of writing, [B, H, L]. Returns out [B, H, L, V] and the last state [B, H, F, V].

    With u_t = beta_t (v_t - k_t^T e^(g_t) S_{t-1}), what a token writes, S_t = e^(G_t) S_0 + sum_{i<=t}
    e^(G_t - G_i) k_i u_i^T inside a chunk. So the u solve a triangular system, (I + A) U = beta (V - e^G K
    S_0), A_ti = beta_t e^(G_t - G_i) k_t.k_i for i < t; all but S_0 is known for all chunks at once."""
    L, dtype = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    q, k, v, g, beta = (in_chunks(x.to(dtype), chunk) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta))
    G, decay = decays_within(g)                                             # [m, B, H, C], [m, B, H, C, C]
    grown, beta = G.exp()[..., None], beta[..., None]                       # e^(G_t)
    system = (beta * (k @ k.mT) * decay).tril(-1) + torch.eye(chunk, dtype=dtype, device=q.device)
    known = torch.cat([beta * v, beta * grown * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    U, UK = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores, q, k = (q @ k.mT) * decay, q * grown, k * (G[..., -1:] - G).exp()[..., None]
    S, out = torch.zeros(*k.shape[1:3], k.shape[-1], v.shape[-1], dtype=dtype, device=q.device), []
    for U_m, UK_m, q_m, k_m, scores_m, grown_m in zip(U, UK, q, k, scores, grown[:, :, :, -1:]):
        u = U_m - UK_m @ S
        out.append(q_m @ S + scores_m @ u)
        S = grown_m * S + k_m.mT @ u
    return rearrange(torch.stack(out), "m B H C V -> B H (m C) V")[:, :, :L], S


def ssd(x, dt, A, Bm, Cm, chunk=64):
    """Mamba 2's recurrence (Dao & Gu, 2405.21060) in chunks, in fp32 (float64 for float64), without the skip.

    x [B, H, L, P]; dt [B, H, L] after softplus; A [H], negative; Bm, Cm [B, 1, L, N], which serve all heads.
    Returns out [B, H, L, P] and the last state [B, H, P, N]."""
    L, dtype = x.shape[2], torch.promote_types(x.dtype, torch.float32)
    x, dt, Bm, Cm = (in_chunks(y.to(dtype), chunk) for y in (x, dt, Bm, Cm))
    G, decay = decays_within(dt * A[:, None])
    x = dt[..., None] * x
    within = ((Cm @ Bm.mT) * decay) @ x                                     # what a chunk tells itself
    grown, x = G.exp()[..., None], x * (G[..., -1:] - G).exp()[..., None]
    S, out = torch.zeros(*x.shape[1:3], x.shape[-1], Bm.shape[-1], dtype=dtype, device=x.device), []
    for x_m, B_m, C_m, within_m, grown_m in zip(x, Bm, Cm, within, grown):
        out.append(within_m + grown_m * (C_m @ S.mT))
        S = grown_m[..., -1:, :] * S + x_m.mT @ B_m
    return rearrange(torch.stack(out), "m B H C P -> B H (m C) P")[:, :, :L], S


def short_convolution(x, filters):
    """Each channel sees itself in the last four tokens, then SiLU: x [B, H, L, F], filters [H, F, 4], or with
    a bias behind [H, F, 5] -> [B, H, L, F]."""
    (H, L), filters = x.shape[1:3], filters.flatten(0, 1)
    weight, bias = filters[:, None, :4], filters[:, 4] if filters.shape[1] == 5 else None
    y = nnf.conv1d(rearrange(x, "B H L F -> B (H F) L"), weight, bias, padding=3, groups=len(weight))
    return rearrange(nnf.silu(y[..., :L]), "B (H F) L -> B H L F", H=H)


def decay_rates(heads):
    """A and the bias of dt as published: A in 1 .. 16, softplus(bias) log-uniform in 0.001 .. 0.1."""
    dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    A_log = torch.empty(heads).uniform_(1, 16).log()
    return nn.Parameter(A_log), nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


class Mamba2(nn.Module):
    """Mamba 2's block: width 2D, heads of F, state N = 2F, one group. Its state is 2D x 2F numbers, four
    times TTT-Linear's."""

    def __init__(self, config):
        super().__init__()
        self.inner, self.heads, self.state = 2 * config.dim, 2 * config.heads, 2 * config.head_width
        convolved = self.inner + 2 * self.state
        self.widths = [self.inner, self.inner, 2 * self.state, self.heads]            # gate z, x, B and C, dt
        self.in_proj = nn.Linear(config.dim, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(convolved, convolved, kernel_size=4, groups=convolved, bias=True)
        self.A_log, self.dt_bias = decay_rates(self.heads)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, config.dim, bias=False)
        for linear in self.in_proj, self.out:
            nn.init.normal_(linear.weight, std=config.ttt_proj_std)

    def forward(self, x, layout):
        z, u, BC, dt = self.in_proj(x).split(self.widths, dim=-1)
        u = rearrange(u, "B L (H P) -> B H L P", H=self.heads)
        tokens = u, BC[:, None], rearrange(dt, "B L H -> B H L")            # B and C serve all heads
        filters = torch.cat([self.conv.weight[:, 0], self.conv.bias[:, None]], dim=1)
        own, shared = filters.split(self.widths[1:3])
        filters = own.unflatten(0, (self.heads, -1)), shared[None]
        y = self.mix(layout, tokens, (*filters, self.A_log, self.dt_bias, self.D))
        y = rearrange(y, "B H L P -> B L (H P)")
        y = nnf.rms_norm(y * nnf.silu(z.float()), [self.inner], self.norm.to(y.dtype), 1e-5)
        return self.out(y.to(x.dtype))

    def mix(self, layout, tokens, parameters):
        (u, BC, dt), (own, shared, A_log, dt_bias, D) = tokens, parameters
        u, BC = short_convolution(u, own), short_convolution(BC, shared)
        dt = nnf.softplus(dt.float() + dt_bias[:, None])
        with torch.autocast(u.device.type, enabled=False):
            y, _ = ssd(u, dt, -A_log.float().exp(), *BC.chunk(2, dim=-1))
        return y + D[:, None, None] * u


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet's block: keys D wide, values 2D, in half of H heads, so that its state is as large as
    Mamba 2's (H where odd)."""

    def __init__(self, config):
        super().__init__()
        D = config.dim
        self.heads = config.heads // 2 if config.heads % 2 == 0 else config.heads
        self.widths = [D, D, 2 * D]                                         # q, k, v
        width = sum(self.widths)
        self.qkv = nn.Linear(D, width, bias=False)
        self.conv = nn.Conv1d(width, width, kernel_size=4, groups=width, bias=False)
        self.rates = nn.Linear(D, 2 * self.heads, bias=False)               # of decay and of writing
        self.A_log, self.dt_bias = decay_rates(self.heads)
        self.gate = nn.Linear(D, 2 * D, bias=False)
        self.norm = nn.Parameter(torch.ones(2 * D // self.heads))
        self.out = nn.Linear(2 * D, D, bias=False)
        for linear in self.qkv, self.rates, self.gate, self.out:
            nn.init.normal_(linear.weight, std=config.ttt_proj_std)

    def forward(self, x, layout):
        y = rearrange(self.by_head(self.qkv(x)), "B L H F -> B H L F")
        filters = rearrange(self.by_head(self.conv.weight[:, 0].T), "t H F -> H F t")
        decay, write = rearrange(self.rates(x).float(), "B L (two H) -> two B H L", two=2)
        y = self.mix(layout, (y, decay, write), (filters, self.A_log, self.dt_bias))
        y = nnf.rms_norm(y, y.shape[-1:], self.norm.to(y.dtype), 1e-5)
        y = rearrange(y, "B H L V -> B L (H V)") * nnf.silu(self.gate(x).float())
        return self.out(y.to(x.dtype))

    def by_head(self, y):                               # channels [..., q k v] -> [..., H, q k v of one head]
        parts = y.split(self.widths, dim=-1)
        return torch.cat([rearrange(part, "... (H F) -> ... H F", H=self.heads) for part in parts], dim=-1)

    def mix(self, layout, tokens, parameters):
        (y, decay, write), (filters, A_log, dt_bias) = tokens, parameters
        q, k, v = short_convolution(y, filters).split([width // self.heads for width in self.widths], dim=-1)
        q, k = (y * torch.rsqrt(y.float().square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        g = -A_log.float().exp()[:, None] * nnf.softplus(decay + dt_bias[:, None])
        with torch.autocast(y.device.type, enabled=False):
            return gated_delta_rule(q, k, v, g, write.sigmoid())[0]
