// TTT-MLP on chip, for Hopper GPUs: forward and backward, with ThunderKittens (section 3.5 and appendix B of
// the paper). Not yet run on a GPU. What is known about it comes from the compiler and from
// appendix/hopper.py, which executes it on a CPU, instruction by instruction.
//
// What it computes, for every head of every video, in Python (section 4 of ttt_minute.py; G1, G2 are
// gradients):
//
//     for k, v, q, eta in mini_batches:                        # 64 tokens of width F = 64, E = 4F = 256
//         X2 = gelu(k @ W1 + b1)                                                           # 1 hidden
//         Z2 = X2 @ W2 + b2;  xh = (Z2 - mean(Z2)) * r                                     # 2 guess
//         p = gamma * (gamma * xh + beta - (v - k))                                        # 3 error
//         G2 = eta * r * (p - mean(p) - xh * mean(p * xh))
//         G1 = (G2 @ W2.mT) * gelu'(k @ W1 + b1)                                           # 4 blame
//         W1 -= k.mT @ G1;  b1 -= sum(G1);  W2 -= X2.mT @ G2;  b2 -= sum(G2)               # 5 step
//         out = q + LN(f(q; W))
//
// The picture. A head belongs to a cluster of TP multiprocessors (2 or 4). E is cut into 4 slices of 64: a
// slice is 64 columns of W1 and the 64 rows of W2 that read them. A learner warpgroup keeps its slice in fp32
// accumulators from the first to the last mini-batch, 64 registers a thread; shared memory holds copies in
// bf16 for the products that read W.
//
//             +---------------- multiprocessor 0 ----------------+      +---- multiprocessor 1 (TP = 2) ----+
//  q, k, v -> | producer: TMA, two mini-batches ahead            |      |                                   |
//             | learner 0 (slice 0) \                            |      | learner 0 (slice 2)               |
//             | learner 1 (slice 1) --> Z2, my part -----------------------> + Z2, its part: fp32, by DSMEM |
//             | reader: z of mini-batch t, learners are at t + 1 |      |                                   |
//  out     <- |         rows 0 .. 31 of z, by TMA                |      | reader: rows 32 .. 63             |
//             +--------------------------------------------------+      +-----------------------------------+
//
// One product needs every slice, X2 @ W2; its parts are added in fp32, in pairs of ranks and then pairs of
// pairs, on every multiprocessor alike, so that all of them go on with the same bits. A checkpoint of W
// leaves by TMA every `every` mini-batches.
//
// The backward pass takes the groups between checkpoints last to first. It replays a group with the forward's
// own functions, keeping X2, G1 and G2 (in bf16, as the products read them), xh, r and the biases in global
// memory, then walks it back, holding W and its gradient dW: W before a step is W after it plus the very
// products that were taken off. A fourth role, the judge, has registers free for the LayerNorms: it does all
// that needs a sum over slices.
//
// Tiles hold D1 = -G1 and D2 = -G2: tensor cores add, so the step down is stored. Limits: TTT-MLP, F = 64,
// E = 256, b = 64, q, k, v in bf16, any L; ThunderKittens at commit 0b55588d (appendix/kernels.py builds it).

// ThunderKittens asks the driver for two functions. They are looked up at run time, so that no libcuda is
// needed to build or to load.
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>
template <class Function, class... Args> static CUresult call_driver(const char *name, Args... args) {
    void *address = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found);
    return address ? reinterpret_cast<Function *>(address)(args...) : CUDA_ERROR_NOT_FOUND;
}
#define LOOK_UP(name, ...) call_driver<decltype(::name)>(#name, __VA_ARGS__)
#define cuTensorMapEncodeTiled(...) LOOK_UP(cuTensorMapEncodeTiled, __VA_ARGS__)
#define cuGetErrorString(...) LOOK_UP(cuGetErrorString, __VA_ARGS__)
#include "kittens.cuh"
using namespace kittens;
#define DEVICE __device__ static inline

constexpr int F = 64, SLICES = 4, E = SLICES * F, STAGES = 2, COPIES = 2;
using tile = st_bf<F, F>;                                 // 8 KB, swizzled as TMA and wgmma like it
using acc = rt_fl<16, F>;                                 // 64 x 64 fp32 over a warpgroup: 32 a thread
using frag = rt_bf<16, F>;                                // the same in bf16: 16 registers
using tokens = gl<bf16, -1, -1, -1, F, tile>;             // [B, H, L, F]
using token_rows = gl<bf16, -1, -1, -1, F, st_bf<16, F>>; // the same, 16 tokens at a time

// ---------------------------------------------------------------------------------------------------- budget
//
//   shared memory, KB          forward TP 2   TP 4   backward TP 2   TP 4
//   k, v, q (dout), stages               48     48              32     32
//   W in bf16, copies (and dW)           64     32              64     32
//   X2 and G1, G2                        40     24              40     24
//   working tiles                         0      0              56     32
//   parts of Z2, of outputs              24     60              24     60
//   vectors, barriers                     6      4               8      6     (held by static_asserts)
//   at most                             182    168             224    186
//
//   registers a thread            learner   reader or judge   producer
//   forward TP 2, 4 groups        2 x 184               112         24
//           TP 4, 3 groups            232               168         24
//   backward TP 2, 4 groups       2 x 192               104         24         64 fp32 of W, 64 of dW,
//            TP 4, 3 groups           232               248         24         32 of the product at hand
//
// Asking for more registers than the kernel is launched with would wait for ever. Nothing spills, but only
// just: the compiler likes to compute addresses once, before a loop, and to keep them. So `thread`, `fresh`
// and `again` hide from it that a number is the same as before: computing again is cheaper than keeping.
constexpr int launched(int groups) { return 65536 / (128 * groups) / 8 * 8; }

// HS slices a multiprocessor, one a learner. JUDGE is the warpgroup that does the LayerNorms: a learner in
// the forward pass, a role of its own in the backward pass. TEAM is who meets at the learners' barrier.
template <int TP_, bool BACKWARD> struct Plan {
    static constexpr int TP = TP_, HS = SLICES / TP, GROUPS = HS + 2, THREADS = 128 * GROUPS;
    static constexpr int JUDGE = BACKWARD ? HS : 0, TEAM = BACKWARD ? HS + 1 : HS;
    static constexpr int LEARNER = TP == 4 ? 232 : BACKWARD ? 192 : 184, PRODUCER = 24;
    static constexpr int OTHER = BACKWARD ? (TP == 4 ? 248 : 104) : TP == 4 ? 168 : 112;
    static constexpr int SHARED_KB = BACKWARD ? (TP == 4 ? 186 : 224) : TP == 4 ? 168 : 182;
};

struct Slice { tile x2, g1; };     // before X2 of a step: 16 KB to stage a checkpoint; g1: gelu', then D1
using image = float2[4][16][32];   // an accumulator as the threads hold it: warp, pair, lane
template <int TP, int SHARE> struct Exchange { float4 from[TP - 1][SHARE][8][32]; };
template <int HS> struct Weights { tile w1[HS], w2[HS]; };
template <int HS> struct Biases { float b1[HS][F], b2[F]; };

// Who fills a slot and who empties it take turns: item i lies in slot i % SLOTS, and a barrier's phases
// alternate with i / SLOTS. At first every slot is empty: a wait for the phase before the first passes.
template <int SLOTS> struct Ring { semaphore full[SLOTS], empty[SLOTS]; };

// The number of a thread in its warpgroup. Volatile: what follows from it is computed again, not kept.
DEVICE int thread() { int i = threadIdx.x % 128; asm volatile("" : "+r"(i)); return i; }
DEVICE int first_row() { const int i = thread(); return i / 32 * 16 + i % 32 / 4; }  // the other: 8 below
template <class Function> DEVICE void each_column(Function f) { if (const int i = thread(); i < F) f(i); }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int quarter() { return threadIdx.x / 32 % 4; }
DEVICE void await(semaphore &s, int phase) { while (!try_wait(s, phase)); }
DEVICE void wait_peer(semaphore &s, int phase) { while (!tma::cluster::try_wait(s, phase)); }
template <int S> DEVICE void wait_full(Ring<S> &r, int i) { await(r.full[i % S], i / S % 2); }
template <int S> DEVICE void wait_empty(Ring<S> &r, int i) { await(r.empty[i % S], i / S % 2 ^ 1); }
// For a warp, once all its lanes are done: lanes may drift apart, also since a barrier just before.
DEVICE void signal(semaphore &s) { __syncwarp(); if (lane() == 0) arrive(s); }
template <int S> DEVICE void signal_full(Ring<S> &r, int i) { signal(r.full[i % S]); }
template <int S> DEVICE void signal_empty(Ring<S> &r, int i) { signal(r.empty[i % S]); }
template <int S> DEVICE void init_ring(Ring<S> &r, int full, int empty) {
    for (int i = 0; i < S; i++) { init_semaphore(r.full[i], full); init_semaphore(r.empty[i], empty); }
}
// Tensor cores and TMA see what threads wrote to shared memory only after this.
DEVICE void to_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE uint32_t shared(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
DEVICE uint32_t at_peer(const void *p, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared(p)), "r"(rank));
    return address;
}
DEVICE void send(uint32_t to, float4 x, uint32_t arrived) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(arrived) : "memory");
}

// ---------------------------------------------------------------------------------------------------- pieces
// A thread holds 16 pairs of neighbours of a 64 x 64 accumulator, in two rows. Arithmetic on pairs:
DEVICE float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
DEVICE float2 operator-(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
DEVICE float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
DEVICE float2 operator-(float2 a) { return {-a.x, -a.y}; }
DEVICE float2 operator-(float2 a, float b) { return {a.x - b, a.y - b}; }
DEVICE float2 operator*(float2 a, float b) { return {a.x * b, a.y * b}; }
DEVICE float total(float2 a) { return a.x + a.y; }

// f(pair, its number and place) for the 16 pairs. `half` says which of the two rows; `first` is where the
// thread's pairs begin in a tile at the start of shared memory.
extern __shared__ __align__(1024) uint8_t dynamic[];
struct At { int i, half, column; uint32_t first; };
template <class Function> DEVICE void each(acc &a, Function f) {
    const int row = lane() / 4, two = lane() % 4;
    uint32_t first = shared(dynamic) + 128 * (16 * quarter() + row) + 16 * row + 4 * two;
    asm volatile("" : "+r"(first));
    #pragma unroll
    for (int i = 0; i < 16; i++)
        f(a.tiles[0][i / 4].data[i % 4], At{i, i % 2, 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * two, first});
}
// A pair's address: 16 bytes change places by the row, as TMA and wgmma like it. Tiles begin at multiples of
// 1024 bytes, so the eight numbers in brackets serve all of them.
DEVICE uint32_t place(const tile &t, At at) {
    return (at.first ^ 16 * (at.i / 2)) + (shared(t.data) - shared(dynamic)) + 1024 * (at.i % 2);
}
// The same number, the same tile; what is computed from it is not kept for the next phase.
DEVICE int fresh(int x) { return __shfl_sync(~0u, x, 0); }
template <class T> DEVICE T &again(T &x) {
    return *reinterpret_cast<T *>(reinterpret_cast<char *>(&x) + fresh(0));
}
// Volatile, so that the passes over a LayerNorm read again instead of keeping everything in registers.
DEVICE float2 pair(const tile &t, At at) {
    uint32_t x;
    asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(x) : "r"(place(t, at)));
    return __bfloat1622float2(*reinterpret_cast<bf16_2 *>(&x));
}
DEVICE float2 pair(const float *row, At at) {
    float2 x;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y) : "r"(shared(row + at.column)));
    return x;
}
DEVICE float2 kept(const float *row, At at) { return {row[at.column], row[at.column + 1]}; }
DEVICE void put(tile &t, At at, float2 x) { move<bf16_2>::sts(place(t, at), __float22bfloat162_rn(x)); }
DEVICE void store(tile &t, acc &a) { each(a, [&](float2 &x, At at) { put(t, at, x); }); }
DEVICE void store_negated(tile &t, acc &a) { each(a, [&](float2 &x, At at) { put(t, at, -x); }); }
DEVICE void negate(acc &a) { each(a, [](float2 &x, At) { x = -x; }); }
DEVICE void add_row(acc &a, const float *row) { each(a, [&](float2 &x, At at) { x = x + kept(row, at); }); }
DEVICE void from_image(acc &a, const image &from) {
    each(a, [&](float2 &x, At at) { x = from[quarter()][at.i][lane()]; });
}
// 16 rows of a tile, those of a warp, to global memory.
DEVICE void store_rows(const token_rows &to, tile &from, int video, int h, int t) {
    const int warp = thread() / 32;
    auto &rows = *reinterpret_cast<st_bf<16, F> *>(&from.data[16 * F * warp]);
    tma::store_async(to, rows, {video, h, 4 * t + warp, 0});
}
// What a warp wrote leaves by TMA, and has been read when this returns.
template <class Function> DEVICE void send_away(Function store) {
    to_async_proxy();
    __syncwarp();
    if (lane() == 0) { store(); tma::store_async_read_wait(); }
}

// A row lies in the 4 lanes of a quad, a column in the 8 quads of each of 4 warps; partial sums of columns
// are added in a fixed order.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
DEVICE void row_means(float (&sum)[2]) { sum[0] = row_sum(sum[0]) / F, sum[1] = row_sum(sum[1]) / F; }
DEVICE float2 over_quads(float2 x) {
    #pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
        x.x += __shfl_xor_sync(~0u, x.x, distance);
        x.y += __shfl_xor_sync(~0u, x.y, distance);
    }
    return x;
}
DEVICE void column_sums(acc &a, float (*part)[F]) {
    float2 above;
    each(a, [&](float2 &x, At at) {
        if (at.half == 0) { above = x; return; }
        const float2 sum = over_quads(above + x);
        if (lane() < 4) *reinterpret_cast<float2 *>(&part[quarter()][at.column]) = sum;
    });
}
DEVICE float add_parts(const float (*part)[F], int column) {
    return part[0][column] + part[1][column] + part[2][column] + part[3][column];
}

// gelu(x) = x (1 + y) / 2 with y = tanh(x (c + c d x^2)), p = c + 3 c d x^2, bell = (1 - y^2) / 2
//     gelu' = (1 + y) / 2 + bell x p,  gelu'' = 2 bell (p - x y p^2 + 3 c d x^2)
// Beyond |x| = 10 the bell is 0 in fp32: x^2 is held at 100, lest it overflow and 0 times infinity come out.
constexpr float C = 0.7978845608f, CD = 0.0356774081f;
DEVICE float tanh_of(float x, float square) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x * (C + CD * square)));
    return y;
}
DEVICE float gelu(float x, float &slope) {
    const float square = fminf(x * x, 100.f), y = tanh_of(x, square);
    slope = .5f + .5f * y + (.5f - .5f * y * y) * x * (C + 3.f * CD * square);
    return .5f * x + .5f * x * y;
}
DEVICE void gelu_bend(float x, float &slope, float &bend) {
    const float square = fminf(x * x, 100.f), p = C + 3.f * CD * square, y = tanh_of(x, square);
    const float bell = .5f - .5f * y * y;
    slope = .5f + .5f * y + bell * x * p;
    bend = 2.f * bell * (p - x * y * p * p + 3.f * CD * square);
}
DEVICE float2 gelu(float2 x, float2 &slope) { return {gelu(x.x, slope.x), gelu(x.y, slope.y)}; }
DEVICE void gelu_bend(float2 x, float2 &slope, float2 &bend) {
    gelu_bend(x.x, slope.x, bend.x), gelu_bend(x.y, slope.y, bend.y);
}

DEVICE void normalise(acc &z, float (&r)[2], float eps) {
    float mean[2] = {}, square[2] = {};
    each(z, [&](float2 &x, At at) { mean[at.half] += total(x); });
    row_means(mean);
    each(z, [&](float2 &x, At at) { x = x - mean[at.half], square[at.half] += total(x * x); });
    row_means(square);
    r[0] = rsqrtf(square[0] + eps), r[1] = rsqrtf(square[1] + eps);
    each(z, [&](float2 &x, At at) { x = x * r[at.half]; });
}

DEVICE float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
// z <- the sum of all ranks' z: the AllReduce of section 3.5 with SHARE = 4; with SHARE = 4 / TP a rank gets
// only the rows of its own SHARE warps, and the others are left alone. Registers go straight into the peer's
// shared memory, which counts the bytes. Who sends nothing must not wait for `empty`: its peers can pass that
// round without it. In the backward pass other barriers and sums imply `empty`; it stays, so that this asks
// nothing of its callers.
template <int TP, int SHARE>
DEVICE void sum_over_cluster(acc &z, Exchange<TP, SHARE> &x, Ring<1> &ring, int n) {
    const int rank = cluster_ctarank();
    if (thread() == 0) tma::expect_bytes(ring.full[0], sizeof(x.from));
    #pragma unroll
    for (int i = 1; i < TP; i++) {
        const int peer = rank ^ i;
        if (SHARE < 4 && quarter() / SHARE != peer) continue;
        if (SHARE < 4 || i == 1) wait_peer(ring.empty[0], n % 2 ^ 1); // for the peers: what I sent is read
        const uint32_t to = at_peer(&x.from[i - 1][quarter() % SHARE][0][lane()], peer);
        const uint32_t arrived = at_peer(&ring.full[0], peer);
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 *pairs = &z.tiles[0][j / 2].data[j % 2 * 2];
            send(to + j * 32 * sizeof(float4), {pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y}, arrived);
        }
    }
    wait_peer(ring.full[0], n % 2);                                    // for the peers: their parts have come
    if (SHARE == 4 || quarter() / SHARE == rank) {
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 *pairs = &z.tiles[0][j / 2].data[j % 2 * 2];
            auto theirs = [&](int i) { return x.from[i - 1][quarter() % SHARE][j][lane()]; };  // of rank ^ i
            float4 sum = add({pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y}, theirs(1));
            if constexpr (TP == 4) sum = add(sum, add(theirs(2), theirs(3)));
            pairs[0] = {sum.x, sum.y}, pairs[1] = {sum.z, sum.w};
        }
    }
    __syncwarp();                                                      // all lanes have read, see `signal`
    if (lane() == 0) for (int i = 1; i < TP; i++) tma::cluster::arrive(ring.empty[0], rank ^ i);
}

// -------------------------------------------------------------------------------------------------- the step
// What the warpgroups of a multiprocessor share while they learn. Both passes use it, and the four functions
// below.
template <class P> struct Team {
    Weights<P::HS> *W; Biases<P::HS> *b; Slice *slice; tile *g2; float (*part)[4][F];
    const float *gamma, *beta; float eps; Exchange<P::TP, 4> *exchange; Ring<1> *sum;
    DEVICE void barrier() { asm volatile("bar.sync 1, %0;" :: "n"(128 * P::TEAM) : "memory"); }
};

DEVICE void step_sizes(float (&eta)[2], const float *from, int head, int t, int L) {
    const int token = 64 * t + first_row();
    #pragma unroll
    for (int half = 0; half < 2; half++)
        eta[half] = token + 8 * half < L ? from[size_t(head) * L + token + 8 * half] : 0.f;
}

// 1 hidden: X2 = gelu(k W1 + b1), and gelu' where D1 will lie.
template <class P> DEVICE void hidden(const Team<P> &s, const tile &k) {
    const int slice = warpgroup::groupid();
    acc z;
    warpgroup::mm_AB(z, k, s.W->w1[slice]);
    warpgroup::mma_async_wait();
    each(z, [&](float2 &x, At at) {
        float2 slope;
        put(s.slice[slice].x2, at, gelu(x + kept(s.b->b1[slice], at), slope));
        put(s.slice[slice].g1, at, slope);
    });
    to_async_proxy();
}

// 2 guess: Z2 = X2 W2 + b2, over all slices, in sum number n over the cluster; 3 error: D2 from xh and p as
// in the header.
template <class P>
DEVICE void guess_and_error(const Team<P> &s, const tile &k, const tile &v, const float (&eta)[2], int n,
                            float2 *kept_xh) {
    acc z;
    warpgroup::mm_AB(z, s.slice[0].x2, s.W->w2[0]);
    if constexpr (P::HS == 2) warpgroup::mma_AB(z, s.slice[1].x2, s.W->w2[1]);
    warpgroup::mma_async_wait();
    sum_over_cluster(z, *s.exchange, *s.sum, n);
    add_row(z, s.b->b2);
    float r[2], along_1[2] = {}, along_xh[2] = {};
    normalise(z, r, s.eps);
    if (kept_xh) {
        kept_xh += thread();
        each(z, [&](float2 &xh, At at) { kept_xh[128 * at.i] = xh; });
        kept_xh[128 * 16] = {r[0], r[1]};
    }
    auto p_of = [&](float2 xh, At at) {
        const float2 target = pair(v, at), start = pair(k, at), g = pair(s.gamma, at), b = pair(s.beta, at);
        return g * (g * xh + b - (target - start));
    };
    each(z, [&](float2 &xh, At at) {
        const float2 p = p_of(xh, at);
        along_1[at.half] += total(p), along_xh[at.half] += total(p * xh);
    });
    row_means(along_1), row_means(along_xh);
    each(z, [&](float2 &xh, At at) {                          // D2 = -eta r (p - mean(p) - xh mean(p xh))
        const float scale = -eta[at.half] * r[at.half];
        xh = (p_of(xh, at) - along_1[at.half] - xh * along_xh[at.half]) * scale;
    });
    store(*s.g2, z);
    column_sums(z, s.part[P::HS]);
    to_async_proxy();
}

// 4 blame: D1 = (D2 W2^T) gelu'; 5 step: W1 += k^T D1, W2 += X2^T D2, sums of the rows for the biases.
template <class P> DEVICE void blame_and_step(acc &w1, acc &w2, const Team<P> &s, const tile &k) {
    const int slice = warpgroup::groupid();
    acc z;
    warpgroup::mm_ABt(z, *s.g2, s.W->w2[slice]);
    warpgroup::mma_AtB(w2, s.slice[slice].x2, *s.g2);
    warpgroup::mma_async_wait<1>();
    each(z, [&](float2 &x, At at) { x = x * pair(s.slice[slice].g1, at); });
    store(s.slice[slice].g1, z);
    column_sums(z, s.part[slice]);
    to_async_proxy();
    warpgroup::sync(2 + slice);
    warpgroup::mma_AtB(w1, k, s.slice[slice].g1);
    warpgroup::mma_async_wait();
}

// 5 step, seen from outside: the new W in bf16 and the new biases.
template <class P>
DEVICE void publish(acc &w1, acc &w2, Weights<P::HS> &W, const Biases<P::HS> &b, Biases<P::HS> &next,
                    float (*part)[4][F]) {
    const int slice = warpgroup::groupid(), column = thread();
    store(W.w1[slice], w1);
    store(W.w2[slice], w2);
    if (column < F) next.b1[slice][column] = b.b1[slice][column] + add_parts(part[slice], column);
    if (slice == P::JUDGE && column < F) next.b2[column] = b.b2[column] + add_parts(part[P::HS], column);
    to_async_proxy();
}

// --------------------------------------------------------------------------------------------------- forward
struct State { float *W1, *b1, *W2, *b2; };       // [B, H, F, E], [B, H, E], [B, H, E, F], [B, H, F]
struct Checkpoints { image *W; float *b; };       // [B, H, groups, SLICES, 2] and [B, H, groups, E + F]
struct Given {                                    // to both passes
    const float *eta, *gamma, *beta;              // [B, H, L], [H, F], [H, F]
    Checkpoints kept;
    int H, L, every;
    float eps;
    int M = (L + 63) / 64, groups = (M + every - 1) / every;                    // M mini-batches, in groups
};
struct Forward : Given { tokens q, k, v; token_rows out; State first, last; };
template <class P> struct ForwardShared {
    tile k[STAGES], v[STAGES], q[STAGES];
    Weights<P::HS> W[COPIES];
    Slice slice[P::HS];
    tile g2;
    Exchange<P::TP, 4> z2;
    Exchange<P::TP, 4 / P::TP> zb2;
    Biases<P::HS> b[COPIES];
    alignas(16) float part[P::HS + 1][4][F], gamma[F], beta[F];                 // read in pairs
    Ring<STAGES> kv, asked;
    Ring<COPIES> state;
    Ring<1> sum, sum_out;
};

// Registers and biases from or to global memory.
template <class P, bool SAVE>
DEVICE void move_state(acc &w1, acc &w2, Biases<P::HS> &b, const State &state, int head) {
    const int group = warpgroup::groupid(), slice = cluster_ctarank() * P::HS + group, row = first_row();
    auto move = [](auto &here, auto &there) { if constexpr (SAVE) there = here; else here = there; };
    each(w1, [&](float2 &x, At at) {
        move(x, *(float2 *)&state.W1[(size_t(head) * F + row + 8 * at.half) * E + F * slice + at.column]);
    });
    each(w2, [&](float2 &x, At at) {
        move(x, *(float2 *)&state.W2[(size_t(head) * E + F * slice + row + 8 * at.half) * F + at.column]);
    });
    each_column([&](int c) {
        move(b.b1[group][c], state.b1[size_t(head) * E + F * slice + c]);
        if (group == P::JUDGE && (!SAVE || slice == 0)) move(b.b2[c], state.b2[size_t(head) * F + c]);
    });
}

// A checkpoint: W1 and W2 of a slice, one after the other, through the place where X2 and D1 will lie.
template <class P>
DEVICE void keep(acc &w1, acc &w2, const Biases<P::HS> &b, Slice *slices, const Checkpoints &to, size_t at) {
    const int group = warpgroup::groupid(), slice = cluster_ctarank() * P::HS + group, column = thread();
    image &staged = *reinterpret_cast<image *>(&slices[group]);
    image *target = to.W + (at * SLICES + slice) * 2;
    #pragma unroll
    for (int second = 0; second < 2; second++) {
        each(second ? w2 : w1, [&](float2 &x, At at) { staged[quarter()][at.i][lane()] = x; });
        to_async_proxy();
        warpgroup::sync(2 + group);
        if (column == 0) {
            tma::store_async((void *)(target + second), (void *)&staged, sizeof(image));
            tma::store_async_read_wait();
        }
        warpgroup::sync(2 + group);
    }
    if (column < F) to.b[at * (E + F) + F * slice + column] = b.b1[group][column];
    if (slice == 0 && column < F) to.b[at * (E + F) + E + column] = b.b2[column];
}

// Barriers are there, and what all warpgroups read.
template <class Shared> DEVICE void begin(Shared &s, const Given &g) {
    if (threadIdx.x == 0) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (const int i = threadIdx.x; i < F) {
        s.gamma[i] = g.gamma[blockIdx.y * F + i];
        s.beta[i] = g.beta[blockIdx.y * F + i];
    }
    everyone::tma::cluster::sync();
}

template <int TP> __global__ __cluster_dims__(TP) __launch_bounds__(Plan<TP, false>::THREADS, 1)
void ttt_forward_kernel(const __grid_constant__ Forward g) {
    using P = Plan<TP, false>;
    auto &s = *reinterpret_cast<ForwardShared<P> *>(dynamic);
    const int rank = cluster_ctarank(), h = blockIdx.y, video = blockIdx.z, head = video * g.H + h;
    const int role = warpgroup::groupid();
    if (threadIdx.x == 0) {
        init_ring(s.kv, 1, 4 * P::TEAM);
        init_ring(s.asked, 1, 4);
        init_ring(s.state, 4 * P::HS, 4);
        init_ring(s.sum, 1, 4 * (TP - 1));
        init_ring(s.sum_out, 1, 4 * (TP - 1));
    }
    begin(s, g);
    if (role == P::HS + 1) {                                  // ---- producer
        warpgroup::decrease_registers<P::PRODUCER>();
        if (thread() == 0)
            for (int t = 0; t < g.M; t++) {
                wait_empty(s.kv, t);
                tma::expect_bytes(s.kv.full[t % STAGES], 2 * sizeof(tile));
                tma::load_async(s.k[t % STAGES], g.k, {video, h, t, 0}, s.kv.full[t % STAGES]);
                tma::load_async(s.v[t % STAGES], g.v, {video, h, t, 0}, s.kv.full[t % STAGES]);
                wait_empty(s.asked, t);
                tma::expect_bytes(s.asked.full[t % STAGES], sizeof(tile));
                tma::load_async(s.q[t % STAGES], g.q, {video, h, t, 0}, s.asked.full[t % STAGES]);
            }
    } else if (role < P::HS) {                                // ---- learners
        warpgroup::increase_registers<P::LEARNER>();
        acc w1, w2;
        move_state<P, false>(w1, w2, s.b[1], g.first, head);
        store(s.W[1].w1[role], w1);
        store(s.W[1].w2[role], w2);                           // `keep` comes before the first product
        for (int t = 0; t < g.M; t++) {
            const int now = (t + 1) % COPIES, next = t % COPIES;
            Team<P> team{&s.W[now], &s.b[now], s.slice, &s.g2, s.part, s.gamma, s.beta, g.eps, &s.z2, &s.sum};
            const tile &k = s.k[t % STAGES], &v = s.v[t % STAGES];
            if (t % g.every == 0)
                keep<P>(w1, w2, s.b[now], s.slice, g.kept, size_t(head) * g.groups + t / g.every);
            float eta[2];
            step_sizes(eta, g.eta, head, t, g.L);
            wait_full(s.kv, t);                               // for the producer: k and v have come
            hidden<P>(team, k);
            team.barrier();                                   // the judge reads every learner's X2
            if (role == P::JUDGE) guess_and_error<P>(team, k, v, eta, t, nullptr);
            team.barrier();                                   // for the judge: every learner reads G2
            blame_and_step<P>(w1, w2, team, k);
            signal_empty(s.kv, t);                            // the producer may overwrite k and v
            wait_empty(s.state, t);                           // for the reader: done with the W that lay here
            publish<P>(w1, w2, s.W[next], s.b[now], s.b[next], s.part);
            signal_full(s.state, t);                          // the reader may read the new W
            warpgroup::sync(2 + role);
        }
        move_state<P, true>(w1, w2, s.b[(g.M + 1) % COPIES], g.last, head);
        if (thread() == 0) tma::store_async_wait();           // a kernel ends with its stores written
    } else {                                                  // ---- reader
        warpgroup::decrease_registers<P::OTHER>();
        acc z1, z2;
        for (int t = 0; t < g.M; t++) {
            tile &q = s.q[t % STAGES];
            const auto &W = s.W[t % COPIES];
            const auto &b = s.b[t % COPIES];
            wait_full(s.asked, t);                            // for the producer: q has come
            wait_full(s.state, t);                            // for the learners: W has seen mini-batch t
            #pragma unroll
            for (int slice = 0; slice < P::HS; slice++) {
                warpgroup::mm_AB(z1, q, W.w1[slice]);
                warpgroup::mma_async_wait();
                frag x2;
                each(z1, [&](float2 &x, At at) {
                    float2 slope;                             // not needed here
                    const float2 X2 = gelu(x + kept(b.b1[slice], at), slope);
                    x2.tiles[0][at.i / 4].data[at.i % 4] = __float22bfloat162_rn(X2);
                });
                if (slice == 0) warpgroup::mm_AB(z2, x2, W.w2[slice]);
                else warpgroup::mma_AB(z2, x2, W.w2[slice]);
            }
            warpgroup::mma_async_wait();
            if (rank == 0) add_row(z2, b.b2);
            signal_empty(s.state, t);                         // the learners may overwrite this W
            sum_over_cluster(z2, s.zb2, s.sum_out, t);
            warpgroup::sync(2 + role);
            if (quarter() * TP / 4 == rank) {
                float r[2];
                normalise(z2, r, g.eps);
                each(z2, [&](float2 &x, At at) {
                    put(q, at, pair(q, at) + kept(s.gamma, at) * x + kept(s.beta, at));
                });
                send_away([&] { store_rows(g.out, q, video, h, t); });
            }
            signal_empty(s.asked, t);                         // the producer may overwrite q, now the output
        }
        if (lane() == 0) tma::store_async_wait();             // as above
    }
    everyone::tma::cluster::sync();                           // nobody leaves before its peers are done
}

template <class P, template <class> class Shared, class Parameters>
static int launch(void (*kernel)(Parameters), const Parameters &g, int B, void *stream) {
    constexpr size_t bytes = sizeof(Shared<P>);
    static_assert(bytes <= 1024 * P::SHARED_KB && P::SHARED_KB <= 227);
    static_assert(P::HS * P::LEARNER + P::OTHER + P::PRODUCER <= launched(P::GROUPS) * P::GROUPS);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    kernel<<<dim3(P::TP, g.H, B), P::THREADS, bytes, (cudaStream_t)stream>>>(g);
    return cudaGetLastError();
}
#define INTERFACE extern "C" __attribute__((visibility("default")))
INTERFACE int ttt_forward(
        void *q, void *k, void *v, void *out, const float *eta, const float *gamma, const float *beta,
        float *W1, float *b1, float *W2, float *b2, float *last_W1, float *last_b1, float *last_W2,
        float *last_b2, void *kept_W, float *kept_b,
        int B, int H, int L, int every, float eps, int tp, void *stream) {
    try {
        auto at = [&](void *x) { return tokens((bf16 *)x, B, H, L, nullptr); };
        auto rows = [&](void *x) { return token_rows((bf16 *)x, B, H, L, nullptr); };
        Forward g{{eta, gamma, beta, {(image *)kept_W, kept_b}, H, L, every, eps},
                  at(q), at(k), at(v), rows(out), {W1, b1, W2, b2}, {last_W1, last_b1, last_W2, last_b2}};
        return tp == 4 ? launch<Plan<4, false>, ForwardShared>(ttt_forward_kernel<4>, g, B, stream)
                       : launch<Plan<2, false>, ForwardShared>(ttt_forward_kernel<2>, g, B, stream);
    } catch (...) { return -1; }
}

// -------------------------------------------------------------------------------------------------- backward
struct Backward : Given {
    tokens q, k, v, dout;
    token_rows dq, dk, dv;
    float *deta, *dgamma, *dbeta;                 // [B, H, L], [B, H, F], [B, H, F]
    State dlast, dfirst;
    uint8_t *scratch;                             // [B, H, TP, every] times Saved
};
template <int HS> struct alignas(128) Saved { Slice slice[HS]; tile g2; float2 xh[17 * 128]; Biases<HS> b; };
template <class P> struct BackwardShared {
    tile q, dout, k, v;
    Slice saved[P::HS];
    tile g2;
    Weights<P::HS> W, dW;
    tile a[P::HS], b[P::HS], c[P::HS], u;
    Exchange<P::TP, 4> z2;
    Exchange<P::TP, 4 / P::TP> rows;
    Biases<P::HS> bias, dbias;
    alignas(16) float part[P::HS + 1][4][F], gamma[F], beta[F], dgamma[4][F], dbeta[4][F];
    Ring<1> kv, asked, back, replayed, sum, sum_rows;
};

// Sums over tokens of gamma's and beta's gradients: pairs come one by one, the upper row first.
DEVICE void add_columns(float (*sum)[F], float2 &above, float2 x, At at) {
    if (at.half == 0) { above = x; return; }
    x = over_quads(x + above);
    if (lane() < 4) sum[quarter()][at.column] += x.x, sum[quarter()][at.column + 1] += x.y;
}

// (B) z <- dZb2, the gradient on the output's Z2, as in the closed-form backward of appendix/kernels.py.
template <class Shared> DEVICE void backward_of_read_norm(acc &z, Shared &s, float eps) {
    float r[2], along_1[2] = {}, along_xh[2] = {};
    float2 above_gamma, above_beta;
    normalise(z, r, eps);
    each(z, [&](float2 &xh, At at) {
        const float2 D = pair(s.dout, at);
        add_columns(s.dgamma, above_gamma, D * xh, at);
        add_columns(s.dbeta, above_beta, D, at);
        const float2 p = D * pair(s.gamma, at);
        along_1[at.half] += total(p), along_xh[at.half] += total(p * xh);
    });
    row_means(along_1), row_means(along_xh);
    each(z, [&](float2 &xh, At at) {
        const float2 p = pair(s.dout, at) * pair(s.gamma, at);
        xh = (p - along_1[at.half] - xh * along_xh[at.half]) * r[at.half];
    });
}

// (D) z: dG2 -> dZ2, through G2 = eta J[p]; dv takes the place of v, deta goes out. xh and r are those of the
// replay.
template <class Shared, class Out>
DEVICE void backward_of_error(acc &z, const float2 *kept_xh, Shared &s, const float (&eta)[2], Out deta_out) {
    float p_1[2] = {}, p_xh[2] = {}, U_1[2] = {}, U_xh[2] = {}, U_gZ[2] = {}, h_1[2] = {}, h_xh[2] = {};
    float deta[2] = {};
    float2 above_gamma, above_beta;
    auto xh_of = [&](int i) {
        float2 x;
        asm volatile("ld.volatile.global.v2.f32 {%0, %1}, [%2];"
                     : "=f"(x.x), "=f"(x.y) : "l"(kept_xh + 128 * i));
        return x;
    };
    kept_xh += thread();
    const float2 both_r = xh_of(16);
    const float r[2] = {both_r.x, both_r.y};
    auto error = [&](float2 xh, float2 g, At at) {
        const float2 target = pair(s.v, at), start = pair(s.k, at), b = pair(s.beta, at);
        return g * xh + b - (target - start);
    };
    auto gZ_of = [&](float2 e, float2 xh, float2 g, int i) { return (g * e - p_1[i] - xh * p_xh[i]) * r[i]; };
    auto w_of = [&](float2 U, float2 xh, int i) { return (U - U_1[i] - xh * U_xh[i]) * r[i]; };
    each(z, [&](float2 &, At at) {
        const float2 g = pair(s.gamma, at), xh = xh_of(at.i), p = g * error(xh, g, at);
        p_1[at.half] += total(p), p_xh[at.half] += total(p * xh);
    });
    row_means(p_1), row_means(p_xh);
    each(z, [&](float2 &U, At at) {
        const float2 g = pair(s.gamma, at), xh = xh_of(at.i), gZ = gZ_of(error(xh, g, at), xh, g, at.half);
        deta[at.half] += total(U * gZ);
        U = U * eta[at.half];
        U_1[at.half] += total(U), U_xh[at.half] += total(U * xh), U_gZ[at.half] += total(U * gZ);
    });
    for (int half = 0; half < 2; half++) deta_out(half, row_sum(deta[half]));
    row_means(U_1), row_means(U_xh), row_means(U_gZ);
    each(z, [&](float2 &U, At at) {
        const float2 g = pair(s.gamma, at), xh = xh_of(at.i), h = g * g * w_of(U, xh, at.half);
        h_1[at.half] += total(h), h_xh[at.half] += total(h * xh);
    });
    row_means(h_1), row_means(h_xh);
    h_xh[0] += U_gZ[0], h_xh[1] += U_gZ[1];
    each(z, [&](float2 &x, At at) {
        const int half = at.half;
        const float2 g = pair(s.gamma, at), xh = xh_of(at.i), w = w_of(x, xh, half), e = error(xh, g, at);
        const float2 gZ = gZ_of(e, xh, g, half);
        x = (g * g * w - h_1[half] - xh * h_xh[half] - w * p_xh[half] - gZ * U_xh[half]) * r[half];
        add_columns(s.dgamma, above_gamma, w * (e + g * xh), at);
        add_columns(s.dbeta, above_beta, g * w, at);
        put(s.v, at, -(g * w));
    });
}

template <int TP> __global__ __cluster_dims__(TP) __launch_bounds__(Plan<TP, true>::THREADS, 1)
void ttt_backward_kernel(const __grid_constant__ Backward g) {
    using P = Plan<TP, true>;
    auto &s = *reinterpret_cast<BackwardShared<P> *>(dynamic);
    int role = warpgroup::groupid();
    // Items of a ring of one slot: it only matters whether they are odd or even. k and v come twice for every
    // mini-batch of a group, so each group begins with an even one: t - start in the replay, then start + t
    // + 1. All else comes once: M - 1 - t. Numbers asked for where they are needed, as `thread` is:
    const auto h = [] { int i; asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(i)); return i; };
    const auto video = [] { int i; asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(i)); return i; };
    const auto rank = [] { int i; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(i)); return i; };
    const auto head = [&] { return video() * g.H + h(); };
    const auto saved = [&](int step) -> Saved<P::HS> & {
        return reinterpret_cast<Saved<P::HS> *>(g.scratch)[size_t(head() * TP + rank()) * g.every + step];
    };
    // What TMA stored in the replay is there for this thread, and after the fence for TMA to load again.
    const auto end_replay = [&](int start) {
        if (thread() == 0) {
            tma::store_async_wait();
            asm volatile("fence.proxy.async;" ::: "memory");
        }
        signal_full(s.replayed, g.groups - 1 - start / g.every);
    };
    const Team<P> team{&s.W, &s.bias, s.saved, &s.g2, s.part, s.gamma, s.beta, g.eps, &s.z2, &s.sum};
    if (threadIdx.x == 0) {
        init_ring(s.kv, 1, 4 * P::TEAM);
        init_ring(s.asked, 1, 4 * P::TEAM);
        init_ring(s.back, 1, 4 * P::TEAM);
        init_ring(s.replayed, 4 * P::TEAM, 1);
        init_ring(s.sum, 1, 4 * (TP - 1));
        init_ring(s.sum_rows, 1, 4 * (TP - 1));
    }
    for (int i = threadIdx.x; i < 4 * F; i += P::THREADS) s.dgamma[0][i] = s.dbeta[0][i] = 0;
    begin(s, g);
    if (role == P::HS + 1) {                                  // ---- producer
        warpgroup::decrease_registers<P::PRODUCER>();
        if (thread() == 0) {
            const auto load_kv = [&](int t, int item) {
                wait_empty(s.kv, item);
                tma::expect_bytes(s.kv.full[0], 2 * sizeof(tile));
                tma::load_async(s.k, g.k, {video(), h(), t, 0}, s.kv.full[0]);
                tma::load_async(s.v, g.v, {video(), h(), t, 0}, s.kv.full[0]);
            };
            for (int start = (g.M - 1) / g.every * g.every; start >= 0; start -= g.every) {
                const int end = min(start + g.every, g.M);
                for (int t = start; t < end; t++) load_kv(t, t - start);
                wait_full(s.replayed, g.groups - 1 - start / g.every);
                for (int t = end - 1; t >= start; t--) {
                    wait_empty(s.asked, g.M - 1 - t);
                    tma::expect_bytes(s.asked.full[0], 2 * sizeof(tile));
                    tma::load_async(s.q, g.q, {video(), h(), t, 0}, s.asked.full[0]);
                    tma::load_async(s.dout, g.dout, {video(), h(), t, 0}, s.asked.full[0]);
                    load_kv(t, start + t + 1);
                    wait_empty(s.back, g.M - 1 - t);          // implied: given back with k and v
                    tma::expect_bytes(s.back.full[0], sizeof(s.saved) + sizeof(tile));
                    auto &from = saved(t - start);
                    tma::load_async((void *)s.saved, (void *)from.slice, sizeof(s.saved), s.back.full[0]);
                    tma::load_async((void *)&s.g2, (void *)&from.g2, sizeof(tile), s.back.full[0]);
                }
            }
        }
    } else if (role == P::JUDGE) {                            // ---- judge
        if constexpr (P::OTHER > launched(P::GROUPS)) warpgroup::increase_registers<P::OTHER>();
        else warpgroup::decrease_registers<P::OTHER>();
        // Its waits for k, v, q, dout and what was saved are implied by the learners', whose barrier follows.
        // They stay: who reads what TMA wrote has seen it arrive.
        acc z;
        each_column([&](int c) { s.dbias.b2[c] = g.dlast.b2[size_t(head()) * F + c]; });
        for (int start = (g.M - 1) / g.every * g.every; start >= 0; start -= g.every) {
            const int end = min(start + g.every, g.M);
            each_column([&](int c) {
                const size_t at = size_t(head()) * g.groups + start / g.every;
                s.bias.b2[c] = g.kept.b[at * (E + F) + E + c];
            });
            for (int t = start; t < end; t++) {               // replay
                auto &to = saved(t - start);
                float eta[2];
                step_sizes(eta, g.eta, head(), t, g.L);
                each_column([&](int c) { to.b.b2[c] = s.bias.b2[c]; });
                wait_full(s.kv, t - start);
                team.barrier();
                guess_and_error<P>(team, s.k, s.v, eta, g.M - end + t - start, to.xh);
                team.barrier();
                signal_empty(s.kv, t - start);
                if (thread() == 0) {
                    tma::store_async((void *)&to.g2, (void *)&s.g2, sizeof(tile));
                    tma::store_async_read_wait();
                }
                each_column([&](int c) { s.bias.b2[c] += add_parts(s.part[P::HS], c); });
            }
            end_replay(start);
            for (int t = end - 1; t >= start; t--) {          // walk back
                wait_full(s.asked, g.M - 1 - t);
                team.barrier();
                // 2 Zb2, its LayerNorm, back to dZb2
                warpgroup::mm_AB(z, s.a[0], s.W.w2[0]);
                if constexpr (P::HS == 2) warpgroup::mma_AB(z, s.a[1], s.W.w2[1]);
                warpgroup::mma_async_wait();
                sum_over_cluster(z, s.z2, s.sum, g.M - start);
                add_row(z, s.bias.b2);
                backward_of_read_norm(z, s, g.eps);
                store(s.u, z);
                column_sums(z, s.part[P::HS]);
                to_async_proxy();
                team.barrier();
                if (const int column = thread(); column < F) {
                    s.dbias.b2[column] += add_parts(s.part[P::HS], column);
                    s.bias.b2[column] = saved(t - start).b.b2[column];
                }
                team.barrier();
                // 4 dq = dout + dZb1 W1^T
                warpgroup::mm_ABt(z, again(s.b[0]), again(s.W.w1[0]));
                if constexpr (P::HS == 2) warpgroup::mma_ABt(z, again(s.b[1]), again(s.W.w1[1]));
                warpgroup::mma_async_wait();
                team.barrier();
                sum_over_cluster(z, s.rows, s.sum_rows, 0);
                if (quarter() * TP / 4 == rank()) {
                    each(z, [&](float2 &x, At at) { put(s.dout, at, pair(s.dout, at) + x); });
                    send_away([&] { store_rows(g.dq, s.dout, video(), h(), t); });
                }
                signal_empty(s.asked, g.M - 1 - fresh(t));
                wait_full(s.kv, start + t + 1);
                wait_full(s.back, g.M - 1 - t);
                team.barrier();
                // 7 dG2 = -(X2 dW2 + N W2 + db2), through the LayerNorm's second order
                warpgroup::mm_AB(z, s.saved[0].x2, s.dW.w2[0]);
                warpgroup::mma_AB(z, s.a[0], s.W.w2[0]);
                if constexpr (P::HS == 2) {
                    warpgroup::mma_AB(z, s.saved[1].x2, s.dW.w2[1]);
                    warpgroup::mma_AB(z, s.a[1], s.W.w2[1]);
                }
                warpgroup::mma_async_wait();
                sum_over_cluster(z, s.z2, s.sum, (g.M - start) ^ 1);
                add_row(z, s.dbias.b2);
                negate(z);
                float eta[2];
                step_sizes(eta, g.eta, head(), t, g.L);
                backward_of_error(z, saved(t - start).xh, s, eta, [&](int half, float deta) {
                    const int token = 64 * t + first_row() + 8 * half;
                    if (rank() == 0 && thread() % 4 == 0 && token < g.L)
                        g.deta[size_t(head()) * g.L + token] = deta;
                });
                store(s.u, z);
                column_sums(z, s.part[P::HS]);
                to_async_proxy();
                team.barrier();
                each_column([&](int c) { s.dbias.b2[c] += add_parts(s.part[P::HS], c); });
                team.barrier();
                // 9 dk = D1 dW1^T + dZ1 W1^T - dv
                warpgroup::mm_ABt(z, s.saved[0].g1, s.dW.w1[0]);
                warpgroup::mma_ABt(z, s.b[0], s.W.w1[0]);
                if constexpr (P::HS == 2) {
                    warpgroup::mma_ABt(z, s.saved[1].g1, s.dW.w1[1]);
                    warpgroup::mma_ABt(z, s.b[1], s.W.w1[1]);
                }
                warpgroup::mma_async_wait();
                team.barrier();
                sum_over_cluster(z, s.rows, s.sum_rows, 1);
                if (quarter() * TP / 4 == rank()) {
                    each(z, [&](float2 &x, At at) { put(s.k, at, x - pair(s.v, at)); });
                    send_away([&] {
                        store_rows(g.dk, s.k, video(), h(), t);
                        store_rows(g.dv, s.v, video(), h(), t);
                    });
                }
                signal_empty(s.kv, start + t + 1);
                signal_empty(s.back, g.M - 1 - t);
            }
        }
        if (const int column = thread(); rank() == 0 && column < F) {
            g.dfirst.b2[size_t(head()) * F + column] = s.dbias.b2[column];
            g.dgamma[size_t(head()) * F + column] = add_parts(s.dgamma, column);
            g.dbeta[size_t(head()) * F + column] = add_parts(s.dbeta, column);
        }
        if (lane() == 0) tma::store_async_wait();             // a kernel ends with its stores written
    } else {                                                  // ---- learners
        warpgroup::increase_registers<P::LEARNER>();
        acc w1, w2, d1, d2, z;
        move_state<P, false>(d1, d2, s.dbias, g.dlast, head());
        for (int start = (g.M - 1) / g.every * g.every; start >= 0; start -= g.every) {
            const int end = min(start + g.every, g.M);
            const size_t at = size_t(head()) * g.groups + start / g.every;
            const int slice = rank() * P::HS + role;
            const image *images = g.kept.W + (at * SLICES + slice) * 2;
            from_image(w1, images[0]);
            from_image(w2, images[1]);
            store(s.W.w1[role], w1);
            store(s.W.w2[role], w2);
            each_column([&](int c) { s.bias.b1[role][c] = g.kept.b[at * (E + F) + F * slice + c]; });
            to_async_proxy();
            warpgroup::sync(2 + role);
            for (int t = start; t < end; t++) {               // replay
                auto &to = saved(t - start);
                role = fresh(role);
                each_column([&](int c) { to.b.b1[role][c] = s.bias.b1[role][c]; });
                wait_full(s.kv, t - start);
                hidden<P>(team, s.k);
                team.barrier();
                team.barrier();
                blame_and_step<P>(w1, w2, team, s.k);
                signal_empty(s.kv, t - start);
                if (thread() == 0) {
                    tma::store_async((void *)&to.slice[role], (void *)&s.saved[role], sizeof(Slice));
                    tma::store_async_read_wait();
                }
                publish<P>(w1, w2, s.W, s.bias, s.bias, s.part);
                warpgroup::sync(2 + role);
            }
            end_replay(start);
            negate(w1), negate(w2);
            for (int t = end - 1; t >= start; t--) {          // walk back
                role = fresh(role);
                // 1 hidden, of q, at the updated W: Xb2 and gelu'
                wait_full(s.asked, g.M - 1 - t);
                warpgroup::mm_AB(z, s.q, s.W.w1[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At at) {
                    float2 slope;
                    put(s.a[role], at, gelu(x + kept(s.bias.b1[role], at), slope));
                    put(s.b[role], at, slope);
                });
                to_async_proxy();
                team.barrier();
                team.barrier();
                role = fresh(role);
                // 3 dZb1 = (dZb2 W2^T) gelu'; dW2 += Xb2^T dZb2, dW1 += q^T dZb1
                warpgroup::mm_ABt(z, s.u, s.W.w2[role]);
                warpgroup::mma_AtB(d2, s.a[role], s.u);
                warpgroup::mma_async_wait<1>();
                each(z, [&](float2 &x, At at) { x = x * pair(s.b[role], at); });
                store(s.b[role], z);
                column_sums(z, s.part[role]);
                to_async_proxy();
                warpgroup::sync(2 + role);
                warpgroup::mma_AtB(d1, s.q, s.b[role]);
                each_column([&](int c) { s.dbias.b1[role][c] += add_parts(s.part[role], c); });
                warpgroup::mma_async_wait();
                team.barrier();
                signal_empty(s.asked, g.M - 1 - t);
                team.barrier();
                role = fresh(role);
                // 5 rewind: W <- W - (what the step added), held negated so that products only add
                wait_full(s.kv, start + t + 1);
                wait_full(s.back, g.M - 1 - t);
                warpgroup::mma_AtB(w1, s.k, s.saved[role].g1);
                warpgroup::mma_AtB(w2, s.saved[role].x2, s.g2);
                warpgroup::mma_async_wait();
                store_negated(s.W.w1[role], w1);
                store_negated(s.W.w2[role], w2);
                store(s.dW.w1[role], d1);
                store(s.dW.w2[role], d2);
                each_column([&](int c) { s.bias.b1[role][c] = saved(t - start).b.b1[role][c]; });
                to_async_proxy();
                warpgroup::sync(2 + role);
                role = fresh(role);
                // 6 A1 = k dW1 + db1 = -dG1; a: N = -dgX2 = A1 gelu'; b: what G1 = gX2 gelu' leaves on Z1
                warpgroup::mm_AB(z, s.k, s.W.w1[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At at) {
                    float2 slope, bend;
                    gelu_bend(x + kept(s.bias.b1[role], at), slope, bend);
                    put(s.c[role], at, slope);
                    put(s.b[role], at, bend);
                });
                warpgroup::mm_ABt(z, s.g2, s.W.w2[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At at) { put(s.b[role], at, x * pair(s.b[role], at)); });
                warpgroup::mm_AB(z, s.k, s.dW.w1[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At at) {
                    const float2 slope = pair(s.c[role], at), bend = pair(s.b[role], at);
                    x = x + kept(s.dbias.b1[role], at);
                    put(s.b[role], at, x * bend);
                    x = x * slope;
                });
                store(s.a[role], z);
                to_async_proxy();
                team.barrier();
                team.barrier();
                role = fresh(role);
                // 8 dZ1 = (dX2) gelu' + b; dW2 += N^T D2 + X2^T dZ2, dW1 += k^T dZ1
                auto &u = again(s.u);
                warpgroup::mm_ABt(z, s.g2, s.dW.w2[role]);
                warpgroup::mma_ABt(z, u, s.W.w2[role]);
                warpgroup::mma_AtB(d2, s.a[role], s.g2);
                warpgroup::mma_AtB(d2, s.saved[role].x2, u);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At at) { x = x * pair(s.c[role], at) + pair(s.b[role], at); });
                store(s.b[role], z);
                column_sums(z, s.part[role]);
                to_async_proxy();
                warpgroup::sync(2 + role);
                warpgroup::mma_AtB(d1, s.k, s.b[role]);
                each_column([&](int c) { s.dbias.b1[role][c] += add_parts(s.part[role], c); });
                warpgroup::mma_async_wait();
                team.barrier();
                team.barrier();
                signal_empty(s.kv, start + t + 1);
                signal_empty(s.back, g.M - 1 - t);
            }
        }
        move_state<P, true>(d1, d2, s.dbias, g.dfirst, head());
        if (lane() == 0) tma::store_async_wait();
    }
    everyone::tma::cluster::sync();
}

INTERFACE size_t ttt_scratch_bytes(int tp) { return tp == 4 ? sizeof(Saved<1>) : sizeof(Saved<2>); }
INTERFACE int ttt_backward(
        void *q, void *k, void *v, void *dout, void *dq, void *dk, void *dv,
        const float *eta, const float *gamma, const float *beta, float *deta, float *dgamma, float *dbeta,
        float *dlast_W1, float *dlast_b1, float *dlast_W2, float *dlast_b2,
        float *dW1, float *db1, float *dW2, float *db2, void *kept_W, float *kept_b, void *scratch,
        int B, int H, int L, int every, float eps, int tp, void *stream) {
    try {
        auto at = [&](void *x) { return tokens((bf16 *)x, B, H, L, nullptr); };
        auto rows = [&](void *x) { return token_rows((bf16 *)x, B, H, L, nullptr); };
        Backward g{{eta, gamma, beta, {(image *)kept_W, kept_b}, H, L, every, eps},
                   at(q), at(k), at(v), at(dout), rows(dq), rows(dk), rows(dv), deta, dgamma, dbeta,
                   {dlast_W1, dlast_b1, dlast_W2, dlast_b2}, {dW1, db1, dW2, db2}, (uint8_t *)scratch};
        return tp == 4 ? launch<Plan<4, true>, BackwardShared>(ttt_backward_kernel<4>, g, B, stream)
                       : launch<Plan<2, true>, BackwardShared>(ttt_backward_kernel<2>, g, B, stream);
    } catch (...) { return -1; }
}
