// TTT-MLP on chip, for Hopper GPUs: forward and backward, with ThunderKittens (section 3.5 and appendix B of the paper).
// Not yet run on a GPU: what is known about it comes from the compiler, an emulation of its rounding points and a model of its
// barriers, all three in test_ttt.py.
//
// What it computes, for every head of every video, in Python (section 4 of ttt_minute.py; G1 and G2 are gradients):
//
//     for k, v, q, eta in mini_batches:                               # 64 tokens of width F = 64, E = 4F = 256
//         X2 = gelu(k @ W1 + b1);  Z2 = X2 @ W2 + b2;  xh = (Z2 - mean(Z2)) * r                       # 1 hidden, 2 guess
//         p = gamma * (gamma * xh + beta - (v - k));  G2 = eta * r * (p - mean(p) - xh * mean(p * xh))        # 3 error
//         G1 = (G2 @ W2.mT) * gelu'(k @ W1 + b1)                                                              # 4 blame
//         W1 -= k.mT @ G1;  b1 -= sum(G1);  W2 -= X2.mT @ G2;  b2 -= sum(G2);  out = q + LN(f(q; W))          # 5 step, read
//
// Build (ttt_minute.py does it on first use; ThunderKittens at commit 0b55588d2769dde0c7a9a606ffc015b0ca7a9551):
//     nvcc -std=c++20 -O3 -DNDEBUG --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda -DKITTENS_HOPPER
//          -gencode arch=compute_90a,code=sm_90a -I$THUNDERKITTENS_ROOT/include -diag-suppress 3189
//          -Xcompiler=-fPIC,-fno-strict-aliasing,-Wno-psabi,-fvisibility=hidden -shared -cudart static ttt_kernel.cu -o ttt_kernel.so
//
// The picture. A head belongs to a cluster of TP multiprocessors (1, 2 or 4). E is cut into 4 slices of 64: a slice is 64 columns of
// W1 and the 64 rows of W2 that read them. A learner warpgroup keeps its slice in fp32 accumulators from the first to the last
// mini-batch, 64 registers a thread; shared memory holds copies in bf16 for the products that read W.
//
//              +-------------------- multiprocessor 0 ---------------------+      +------- multiprocessor 1 (TP = 2) ------+
//   q, k, v -> | producer: TMA, two mini-batches ahead                     |      |                                        |
//              | learner 0 (slice 0) \                                     |      |  learner 0 (slice 2)                   |
//              | learner 1 (slice 1) --> Z2, my part --------------------------------> + Z2, its part, fp32 through DSMEM  |
//              | reader: z of mini-batch t while the learners are at t + 1 |      |                                        |
//   out     <- |         rows 0 .. 31 of z, by TMA                         |      |  reader: rows 32 .. 63                 |
//              +-----------------------------------------------------------+      +----------------------------------------+
//
// One product needs every slice, X2 @ W2; its parts are added in fp32, in pairs of ranks and then pairs of pairs, on every multiprocessor
// alike, so that all of them go on with the same bits. A checkpoint of W leaves by TMA every `every` mini-batches.
//
// The backward pass takes the groups between checkpoints last to first. It replays a group with the forward's own functions, keeping X2, G1
// and G2 (in bf16, as the products read them), xh, r and the biases in global memory, then walks it back, holding W and its gradient dW:
// W before a step is W after it plus the very products that were taken off (the formulas: backward_of_read and backward_of_step in ttt_minute.py).
// A fourth role, the judge, has registers free for the LayerNorms: it does all that needs a sum over slices.
//
// Limits: TTT-MLP, F = 64, E = 256, b = 64, q, k, v in bf16, any L; backward on 2 or 4 multiprocessors, since W and dW fill one's registers.
// Tiles hold D1 = -G1 and D2 = -G2: tensor cores add, so the step down is stored. `//@` marks name what a line reads (== the
// mini-batch it must belong to) and writes (:=); test_ttt.py follows them, and every wait below, through all orders of events.

// ThunderKittens asks the driver for two functions. They are looked up at run time, so that no libcuda is needed to build or to load.
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>
template <class Function> static Function driver_function(const char *name) {
    void *address = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<Function>(address);
}
template <class... Args> static CUresult encode_tiled(Args... args) {
    static auto function = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    return function ? function(args...) : CUDA_ERROR_NOT_FOUND;
}
template <class... Args> static CUresult explain(Args... args) {
    static auto function = driver_function<decltype(&cuGetErrorString)>("cuGetErrorString");
    return function ? function(args...) : CUDA_ERROR_NOT_FOUND;
}
#define cuTensorMapEncodeTiled encode_tiled
#define cuGetErrorString explain
#include "kittens.cuh"
using namespace kittens;

constexpr int F = 64, SLICES = 4, E = SLICES * F, STAGES = 2, KB = 1024;
using tile = st_bf<F, F>;                                                             // 8 KB, swizzled as TMA and wgmma like it
using acc = rt_fl<16, F>;                                                             // 64 x 64 fp32 over a warpgroup: 32 registers a thread
using frag = rt_bf<16, F>;                                                            // the same in bf16: 16 registers
using tokens = gl<bf16, -1, -1, -1, F, tile>;                                         // [B, H, L, F]
using token_rows = gl<bf16, -1, -1, -1, F, st_bf<16, F>>;

// ---------------------------------------------------------------------------------------------------- budget
//
//   shared memory, KB           forward TP 1   TP 2   TP 4     backward TP 2   TP 4      registers a thread        learner  reader/judge  producer
//   k, v, q (dout), stages                48     48     48                32     32      forward  TP 1, 4 groups   2 x 208            72        24
//   W in bf16, copies (and dW)            64     64     32                64     32               TP 2, 4 groups   2 x 184           112        24
//   X2 and G1, G2                         72     40     24                40     24               TP 4, 3 groups       232           168        24
//   working tiles                         32      8      8                56     32      backward TP 2, 4 groups   2 x 192           104        24
//   parts of Z2, of outputs                0     24     60                24     60               TP 4, 3 groups       232           248        24
//   vectors, barriers                      7      6      4                 8      6      (static_asserts below hold both)
//   at most                              223    190    176               224    186      64 fp32 of W, 64 of dW, 32 of the product at hand
//
// The pool of registers is what the kernel is launched with; asking for more than is there would wait for ever. Nothing spills, and this
// hangs by a thread: the compiler likes to compute addresses once, before a loop, and to keep them through all phases of a mini-batch. So
// `thread`, `fresh` and `again` hide from it that a number is the same as before, and it is cheaper to compute again than to keep.
constexpr int pool(int groups) { return 65536 / (128 * groups) / 8 * 8 * groups; }

// HS slices a multiprocessor, SL a learner, NL learners. JUDGE is the warpgroup that does the LayerNorms, TEAM who meets at its barrier.
template <int TP_> struct Plan {
    static constexpr int TP = TP_, HS = SLICES / TP, SL = TP == 1 ? 2 : 1, NL = HS / SL, JUDGE = 0, TEAM = NL;
    static constexpr int THREADS = 128 * (NL + 2), COPIES = TP == 1 ? 1 : 2;
    static constexpr int LEARNER = TP == 1 ? 208 : TP == 2 ? 184 : 232, READER = TP == 1 ? 72 : TP == 2 ? 112 : 168, PRODUCER = 24, SHARED_KB = TP == 1 ? 223 : TP == 2 ? 190 : 176;
    static_assert(NL * LEARNER + READER + PRODUCER <= pool(NL + 2), "the warpgroups want more registers than the kernel has");
};

struct Slice { tile x2, g1; };                                                        // before X2 of a step: 16 KB to stage a checkpoint; g1: gelu', then D1
using image = float2[4][16][32];                                                      // an accumulator as the threads hold it: warp, pair, lane
template <int TP, int SHARE> struct Exchange { float4 from[TP - 1][SHARE][8][32]; };
template <int SHARE> struct Exchange<1, SHARE> {};
template <int HS> struct Weights { tile w1[HS], w2[HS]; };
template <int HS> struct Biases { float b1[HS][F], b2[F]; };

// Who fills a slot and who empties it take turns: item i lies in slot i % SLOTS, and a barrier's phases alternate with i / SLOTS. The
// first round finds every slot empty: a wait for the phase before the first passes. A warp signals once all its lanes are done.
template <int SLOTS> struct Ring { semaphore full[SLOTS], empty[SLOTS]; };

// The number of a thread in its warpgroup. Volatile: what follows from it is computed again, not kept.
__device__ static inline int thread() { int i = threadIdx.x % 128; asm volatile("" : "+r"(i)); return i; }
__device__ static inline int first_row() { const int i = thread(); return i / 32 * 16 + i % 32 / 4; } // of 64; the other is 8 below
__device__ static inline int lane() { return threadIdx.x % 32; }
__device__ static inline int quarter() { return threadIdx.x / 32 % 4; }
__device__ static inline void await(semaphore &s, int phase) { while (!try_wait(s, phase)); }
__device__ static inline void wait_peer(semaphore &s, int phase) { while (!tma::cluster::try_wait(s, phase)); }
template <int SLOTS> __device__ static inline void wait_full(Ring<SLOTS> &r, int i) { await(r.full[i % SLOTS], i / SLOTS % 2); }
template <int SLOTS> __device__ static inline void wait_empty(Ring<SLOTS> &r, int i) { await(r.empty[i % SLOTS], i / SLOTS % 2 ^ 1); }
template <int SLOTS> __device__ static inline void signal_full(Ring<SLOTS> &r, int i) { __syncwarp(); if (lane() == 0) arrive(r.full[i % SLOTS]); }
template <int SLOTS> __device__ static inline void signal_empty(Ring<SLOTS> &r, int i) { __syncwarp(); if (lane() == 0) arrive(r.empty[i % SLOTS]); }
template <int SLOTS> __device__ static inline void init_ring(Ring<SLOTS> &r, int full, int empty) {
    for (int i = 0; i < SLOTS; i++) { init_semaphore(r.full[i], full); init_semaphore(r.empty[i], empty); }
}
// Tensor cores and TMA see what threads wrote to shared memory only after this.
__device__ static inline void to_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int THREADS> __device__ static inline void barrier_of(int id) { asm volatile("bar.sync %0, %1;" :: "r"(id), "n"(THREADS) : "memory"); }
__device__ static inline uint32_t shared(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ static inline uint32_t at_peer(const void *p, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared(p)), "r"(rank));
    return address;
}
__device__ static inline void send(uint32_t to, float4 x, uint32_t arrived) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(arrived) : "memory");
}

// ---------------------------------------------------------------------------------------------------- pieces
// f(pair of neighbours, its number, which of the thread's two rows, first column) for the 16 pairs that a thread holds of 64 x 64.
// The number comes with the place where the thread's pairs begin in a tile.
extern __shared__ __align__(1024) uint8_t dynamic[];
struct At { int i; uint32_t first; __device__ operator int() const { return i; } };
template <class Function> __device__ static inline void each(acc &a, Function f) {
    uint32_t first = shared(dynamic) + 128 * (16 * quarter() + lane() / 4) + 16 * (lane() / 4) + 4 * (lane() % 4);
    asm volatile("" : "+r"(first));
    #pragma unroll
    for (int i = 0; i < 16; i++) f(a.tiles[0][i / 4].data[i % 4], At{i, first}, i % 2, 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * (lane() % 4));
}
// A pair's address: 16 bytes change places by the row, as TMA and wgmma like it. Tiles begin at multiples of 1024 bytes, so the eight
// numbers in brackets serve all of them.
__device__ static inline uint32_t place(const tile &t, At p) { return (p.first ^ 16 * (p.i / 2)) + (shared(t.data) - shared(dynamic)) + 1024 * (p.i % 2); }
// The same number, the same tile; what is computed from it is not kept for the next phase.
__device__ static inline int fresh(int x) { return __shfl_sync(~0u, x, 0); }
template <class T> __device__ static inline T &again(T &x) { return *reinterpret_cast<T *>(reinterpret_cast<char *>(&x) + fresh(0)); }
// Volatile, so that the passes over a LayerNorm read again instead of keeping everything in registers.
__device__ static inline float2 pair(const tile &t, At i) {
    bf16_2 x;
    asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(*reinterpret_cast<uint32_t *>(&x)) : "r"(place(t, i)));
    return __bfloat1622float2(x);
}
__device__ static inline float2 pair(const float *row, int column) {
    float2 x;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared(row + column)));
    return x;
}
__device__ static inline void put(tile &t, At i, float2 x) {
    move<bf16_2>::sts(place(t, i), __float22bfloat162_rn(x));
}
template <int SIGN = 1> __device__ static inline void store(tile &t, acc &a) {
    each(a, [&](float2 &x, At i, int, int) { put(t, i, {SIGN * x.x, SIGN * x.y}); });
}
// A row lies in the 4 lanes of a quad, a column in the 8 quads of each of 4 warps; partial sums of columns are added in a fixed order.
__device__ static inline float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ static inline void column_sums(const acc &a, float (*part)[F]) {
    #pragma unroll
    for (int i = 0; i < 16; i += 2) {
        const float2 *x = &a.tiles[0][i / 4].data[i % 4];
        float2 sum = {x[0].x + x[1].x, x[0].y + x[1].y};
        #pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            sum.x += __shfl_xor_sync(~0u, sum.x, distance);
            sum.y += __shfl_xor_sync(~0u, sum.y, distance);
        }
        if (lane() < 4) *reinterpret_cast<float2 *>(&part[quarter()][16 * (i / 4) + 8 * (i / 2 % 2) + 2 * lane()]) = sum;
    }
}
__device__ static inline float add_parts(const float (*part)[F], int column) {
    return part[0][column] + part[1][column] + part[2][column] + part[3][column];
}
__device__ static inline void to_image(image &to, acc &a) { each(a, [&](float2 &x, At i, int, int) { to[quarter()][i][lane()] = x; }); }
__device__ static inline void add_row(acc &a, const float *row) {
    each(a, [&](float2 &x, At, int, int c) { x.x += row[c]; x.y += row[c + 1]; });
}

// gelu(x) = x s with s = sigmoid(phi), phi = 2c x (1 + d x^2); with C2 = 2c and C2D = 2c d
//     gelu' = s + s (1 - s) x p,  gelu'' = s (1 - s) (2 p + x (1 - 2 s) p^2 + 6 C2D x^2),  p = C2 + 3 C2D x^2
// Beyond |x| = 10 the bell s (1 - s) is 0 in fp32: x^2 is held at 100, lest it overflow and 0 times infinity come out.
constexpr float C2 = 1.5957691216f, C2D = 0.0713548163f;
__device__ static inline float gelu(float x) { return x * __fdividef(1.f, 1.f + __expf(-x * (C2 + C2D * fminf(x * x, 100.f)))); }
__device__ static inline float gelu_slope(float x, float &slope) {
    float square = fminf(x * x, 100.f), s = __fdividef(1.f, 1.f + __expf(-x * (C2 + C2D * square)));
    slope = s + s * (1.f - s) * x * (C2 + 3.f * C2D * square);
    return x * s;
}

__device__ static inline void gelu_bend(float x, float &slope, float &bend) {
    const float square = fminf(x * x, 100.f), p = C2 + 3.f * C2D * square;
    const float a = __fdividef(1.f, 1.f + __expf(-x * (C2 + C2D * square))), bell = a * (1.f - a);
    slope = a + bell * x * p;
    bend = bell * (2.f * p + x * (1.f - 2.f * a) * p * p + 6.f * C2D * square);
}

__device__ static inline void normalise(acc &z, float (&r)[2], float eps) {
    float mean[2] = {}, square[2] = {};
    each(z, [&](float2 &x, int, int half, int) { mean[half] += x.x + x.y; });
    mean[0] = row_sum(mean[0]) / F, mean[1] = row_sum(mean[1]) / F;
    each(z, [&](float2 &x, int, int half, int) { x.x -= mean[half]; x.y -= mean[half]; square[half] += x.x * x.x + x.y * x.y; });
    r[0] = rsqrtf(row_sum(square[0]) / F + eps), r[1] = rsqrtf(row_sum(square[1]) / F + eps);
    each(z, [&](float2 &x, int, int half, int) { x.x *= r[half]; x.y *= r[half]; });
}

__device__ static inline float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
// z <- the sum of all ranks' z: the AllReduce of section 3.5 with SHARE = 4; with SHARE = 4 / TP a rank gets only the rows of its own SHARE
// warps, and the others are left alone. Registers go straight into the peer's shared memory, which counts the bytes.
template <int TP, int SHARE>
__device__ static inline void sum_over_cluster(acc &z, Exchange<TP, SHARE> &x, Ring<1> &ring, int n) {
    if constexpr (TP > 1) {
        const int rank = cluster_ctarank();
        if (thread() == 0) tma::expect_bytes(ring.full[0], sizeof(x.from));
        wait_peer(ring.empty[0], n % 2 ^ 1);                                          // for the peers: they have read what I sent last
        #pragma unroll
        for (int i = 1; i < TP; i++) {
            const int peer = rank ^ i;
            if (SHARE == 4 || quarter() / SHARE == peer) {
                const uint32_t to = at_peer(&x.from[i - 1][quarter() % SHARE][0][lane()], peer), arrived = at_peer(&ring.full[0], peer);
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 *pairs = &z.tiles[0][j / 2].data[j % 2 * 2];
                    send(to + j * 32 * sizeof(float4), {pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y}, arrived);
                }
            }
        }
        wait_peer(ring.full[0], n % 2);                                               // for the peers: all their parts have come
        if (SHARE == 4 || quarter() / SHARE == rank) {
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 *pairs = &z.tiles[0][j / 2].data[j % 2 * 2];
                auto theirs = [&](int i) { return x.from[i - 1][quarter() % SHARE][j][lane()]; }; // of rank ^ i
                float4 sum = add({pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y}, theirs(1));
                if constexpr (TP == 4) sum = add(sum, add(theirs(2), theirs(3)));
                pairs[0] = {sum.x, sum.y}, pairs[1] = {sum.z, sum.w};
            }
        }
        __syncwarp();
        if (lane() == 0) for (int i = 1; i < TP; i++) tma::cluster::arrive(ring.empty[0], rank ^ i);
    }
}

__device__ static inline void step_sizes(float (&eta)[2], const float *from, int head, int t, int L) {
    const int token = 64 * t + first_row();
    #pragma unroll
    for (int half = 0; half < 2; half++) eta[half] = token + 8 * half < L ? from[size_t(head) * L + token + 8 * half] : 0.f;
}

template <class P> struct Learner {
    Weights<P::HS> *W; Biases<P::HS> *b; Slice *slice; tile *g2; float (*part)[4][F];
    const float *gamma, *beta; float eps; Exchange<P::TP, 4> *exchange; Ring<1> *sum;
    __device__ static inline void barrier() { barrier_of<128 * P::TEAM>(1); }
    __device__ static inline int first() { return warpgroup::groupid() * P::SL; }
};

// 3 error: xh and p as in inner_gradient of ttt_minute.py; z <- D2 = -eta r (p - mean(p) - xh mean(p xh)).
template <class P> __device__ static inline void error_of(acc &z, const Learner<P> &s, const tile &k, const tile &v, const float (&eta)[2], float2 *kept_xh) {
    float r[2], along_1[2] = {}, along_xh[2] = {};
    normalise(z, r, s.eps);
    if (kept_xh) {
        kept_xh += thread();
        each(z, [&](float2 &xh, At i, int, int) { kept_xh[128 * i] = xh; });
        kept_xh[128 * 16] = {r[0], r[1]};
    }
    auto p_of = [&](float2 xh, At i, int c) {
        float2 target = pair(v, i), start = pair(k, i);
        float2 g = pair(s.gamma, c), b = pair(s.beta, c);
        return float2{g.x * (g.x * xh.x + b.x - (target.x - start.x)), g.y * (g.y * xh.y + b.y - (target.y - start.y))};
    };
    each(z, [&](float2 &xh, At i, int half, int c) {
        float2 p = p_of(xh, i, c);
        along_1[half] += p.x + p.y, along_xh[half] += p.x * xh.x + p.y * xh.y;
    });
    for (int half = 0; half < 2; half++) along_1[half] = row_sum(along_1[half]) / F, along_xh[half] = row_sum(along_xh[half]) / F;
    each(z, [&](float2 &xh, At i, int half, int c) {
        float2 p = p_of(xh, i, c);
        const float scale = -eta[half] * r[half];
        xh = {scale * (p.x - along_1[half] - xh.x * along_xh[half]), scale * (p.y - along_1[half] - xh.y * along_xh[half])};
    });
}

// 1 hidden: X2 = gelu(k W1 + b1), and gelu' where D1 will lie.
template <class P> __device__ static inline void hidden(const Learner<P> &s, const tile &k) {
    acc z;
    #pragma unroll
    for (int i = 0; i < P::SL; i++) {
        const int slice = s.first() + i;
        warpgroup::mm_AB(z, k, s.W->w1[slice]);
        warpgroup::mma_async_wait();
        each(z, [&](float2 &x, At i, int half, int c) {
            float2 d;
            put(s.slice[slice].x2, i, {gelu_slope(x.x + s.b->b1[slice][c], d.x), gelu_slope(x.y + s.b->b1[slice][c + 1], d.y)});
            put(s.slice[slice].g1, i, d);
        });
    }
    to_async_proxy();
}

// 2 guess: Z2 = X2 W2 + b2, over all slices; 3 error.
template <class P> __device__ static inline void guess_and_error(const Learner<P> &s, const tile &k, const tile &v, const float (&eta)[2], int n, float2 *kept_xh) {
    acc z;
    warpgroup::mm_AB(z, s.slice[0].x2, s.W->w2[0]);
    #pragma unroll
    for (int slice = 1; slice < P::HS; slice++) warpgroup::mma_AB(z, s.slice[slice].x2, s.W->w2[slice]);
    warpgroup::mma_async_wait();
    sum_over_cluster(z, *s.exchange, *s.sum, n);
    add_row(z, s.b->b2);
    error_of<P>(z, s, k, v, eta, kept_xh);
    store(*s.g2, z);
    column_sums(z, s.part[P::HS]);
    to_async_proxy();
}

// 4 blame: D1 = (D2 W2^T) gelu'; 5 step: W1 += k^T D1, W2 += X2^T D2, sums of the rows for the biases.
template <class P> __device__ static inline void blame_and_step(acc (&w1)[P::SL], acc (&w2)[P::SL], const Learner<P> &s, const tile &k) {
    acc z;
    #pragma unroll
    for (int i = 0; i < P::SL; i++) {
        const int slice = s.first() + i;
        warpgroup::mm_ABt(z, *s.g2, s.W->w2[slice]);
        warpgroup::mma_AtB(w2[i], s.slice[slice].x2, *s.g2);
        warpgroup::mma_async_wait<1>();
        each(z, [&](float2 &x, At i, int half, int c) {
            float2 slope = pair(s.slice[slice].g1, i);
            x.x *= slope.x, x.y *= slope.y;
        });
        store(s.slice[slice].g1, z);
        column_sums(z, s.part[slice]);
        to_async_proxy();
        warpgroup::sync(2 + warpgroup::groupid());
        warpgroup::mma_AtB(w1[i], k, s.slice[slice].g1);
        warpgroup::mma_async_wait();
    }
}

// 5 step, seen from outside: the new W in bf16 and the new biases.
template <class P> __device__ static inline void publish(acc (&w1)[P::SL], acc (&w2)[P::SL], Weights<P::HS> &W, const Biases<P::HS> &b,
                                                         Biases<P::HS> &next, float (*part)[4][F]) {
    const int group = warpgroup::groupid(), column = thread();
    #pragma unroll
    for (int i = 0; i < P::SL; i++) {
        const int slice = group * P::SL + i;
        store(W.w1[slice], w1[i]);
        store(W.w2[slice], w2[i]);
        if (column < F) next.b1[slice][column] = b.b1[slice][column] + add_parts(part[slice], column);
    }
    if (group == P::JUDGE && column < F) next.b2[column] = b.b2[column] + add_parts(part[P::HS], column);
    to_async_proxy();
}

// ---------------------------------------------------------------------------------------------------- forward
struct State { float *W1, *b1, *W2, *b2; };                                           // [B, H, F, E], [B, H, E], [B, H, E, F], [B, H, F]
struct Checkpoints { image *W; float *b; };                                           // [B, H, groups, SLICES, 2] and [B, H, groups, E + F]
struct Forward {
    tokens q, k, v;
    token_rows out;
    const float *eta, *gamma, *beta;                                                  // [B, H, L], [H, F], [H, F]
    State first, last;
    Checkpoints kept;
    int H, L, every;
    float eps;
};
template <class P> struct ForwardShared {
    tile k[STAGES], v[STAGES], q[STAGES];
    Weights<P::HS> W[P::COPIES];
    Slice slice[P::HS];
    tile g2, xb[P::TP == 1 ? P::HS : 1];
    Exchange<P::TP, 4> z2;
    Exchange<P::TP, 4 / P::TP> zb2;
    Biases<P::HS> b[P::COPIES];
    float part[P::HS + 1][4][F], gamma[F], beta[F];
    Ring<STAGES> kv, asked;
    Ring<P::COPIES> state;
    Ring<1> sum, sum_out;
};

template <class P> __device__ static inline void load_state(acc (&w1)[P::SL], acc (&w2)[P::SL], Biases<P::HS> &b, const State &from, int head) {
    const int group = warpgroup::groupid(), column = thread(), base = cluster_ctarank() * P::HS, row = first_row();
    #pragma unroll
    for (int i = 0; i < P::SL; i++) {
        const int local = group * P::SL + i, slice = base + local;
        each(w1[i], [&](float2 &x, At, int half, int c) { x = *(const float2 *)&from.W1[(size_t(head) * F + row + 8 * half) * E + F * slice + c]; });
        each(w2[i], [&](float2 &x, At, int half, int c) { x = *(const float2 *)&from.W2[(size_t(head) * E + F * slice + row + 8 * half) * F + c]; });
        if (column < F) b.b1[local][column] = from.b1[size_t(head) * E + F * slice + column];
    }
    if (group == 0 && column < F) b.b2[column] = from.b2[size_t(head) * F + column];
}
template <class P> __device__ static inline void save_state(acc (&w1)[P::SL], acc (&w2)[P::SL], const Biases<P::HS> &b, const State &to, int head) {
    const int group = warpgroup::groupid(), column = thread(), base = cluster_ctarank() * P::HS, row = first_row();
    #pragma unroll
    for (int i = 0; i < P::SL; i++) {
        const int local = group * P::SL + i, slice = base + local;
        each(w1[i], [&](float2 &x, At, int half, int c) { *(float2 *)&to.W1[(size_t(head) * F + row + 8 * half) * E + F * slice + c] = x; });
        each(w2[i], [&](float2 &x, At, int half, int c) { *(float2 *)&to.W2[(size_t(head) * E + F * slice + row + 8 * half) * F + c] = x; });
        if (column < F) to.b1[size_t(head) * E + F * slice + column] = b.b1[local][column];
    }
    if (group == 0 && base == 0 && column < F) to.b2[size_t(head) * F + column] = b.b2[column];
}

// A checkpoint: W1 and W2 of a slice, one after the other, through the place where X2 and D1 will lie.
template <class P> __device__ static inline void keep(acc (&w1)[P::SL], acc (&w2)[P::SL], const Biases<P::HS> &b, Slice *slices,
                                                      const Checkpoints &to, size_t group_of_steps) {
    const int group = warpgroup::groupid(), column = thread(), base = cluster_ctarank() * P::HS;
    #pragma unroll
    for (int i = 0; i < P::SL; i++) {
        const int local = group * P::SL + i, slice = base + local;
        image &staged = *reinterpret_cast<image *>(&slices[local]);
        image *target = to.W + (group_of_steps * SLICES + slice) * 2;
        #pragma unroll
        for (int second = 0; second < 2; second++) {
            to_image(staged, second ? w2[i] : w1[i]);
            to_async_proxy();
            warpgroup::sync(2 + group);
            if (column == 0) {
                tma::store_async((void *)(target + second), (void *)&staged, sizeof(image));
                tma::store_commit_group();
                tma::store_async_read_wait();
            }
            warpgroup::sync(2 + group);
        }
        if (column < F) to.b[group_of_steps * (E + F) + F * slice + column] = b.b1[local][column];
    }
    if (group == 0 && base == 0 && column < F) to.b[group_of_steps * (E + F) + E + column] = b.b2[column];
}

template <int TP> __global__ __cluster_dims__(TP) __launch_bounds__(Plan<TP>::THREADS, 1) void ttt_forward_kernel(const __grid_constant__ Forward g) {
    using P = Plan<TP>;
    auto &s = *reinterpret_cast<ForwardShared<P> *>(dynamic);
    const int rank = cluster_ctarank(), h = blockIdx.y, video = blockIdx.z, head = video * g.H + h, M = (g.L + 63) / 64;
    const int role = warpgroup::groupid();
    if (threadIdx.x == 0) {
        init_ring(s.kv, 1, 4 * P::TEAM);
        init_ring(s.asked, 1, 4);
        init_ring(s.state, 4 * P::NL, 4);
        init_ring(s.sum, 1, 4 * (TP - 1) + (TP == 1));
        init_ring(s.sum_out, 1, 4 * (TP - 1) + (TP == 1));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x < F) s.gamma[threadIdx.x] = g.gamma[h * F + threadIdx.x], s.beta[threadIdx.x] = g.beta[h * F + threadIdx.x];
    __syncthreads();
    everyone::tma::cluster::sync();
    if (role == P::NL + 1) {                                                          // ---- producer
        warpgroup::decrease_registers<P::PRODUCER>();
        if (thread() == 0) {
            for (int t = 0; t < M; t++) {
                wait_empty(s.kv, t);
                tma::expect_bytes(s.kv.full[t % STAGES], 2 * sizeof(tile));
                tma::load_async(s.k[t % STAGES], g.k, {video, h, t, 0}, s.kv.full[t % STAGES]);
                tma::load_async(s.v[t % STAGES], g.v, {video, h, t, 0}, s.kv.full[t % STAGES]);
                wait_empty(s.asked, t);
                tma::expect_bytes(s.asked.full[t % STAGES], sizeof(tile));
                tma::load_async(s.q[t % STAGES], g.q, {video, h, t, 0}, s.asked.full[t % STAGES]);
            }
        }
    } else if (role < P::NL) {                                                        // ---- learners
        warpgroup::increase_registers<P::LEARNER>();
        acc w1[P::SL], w2[P::SL];
        load_state<P>(w1, w2, s.b[P::COPIES - 1], g.first, head);
        const int last = P::COPIES - 1;
        {
            #pragma unroll
            for (int i = 0; i < P::SL; i++) { store(s.W[last].w1[role * P::SL + i], w1[i]); store(s.W[last].w2[role * P::SL + i], w2[i]); }
            to_async_proxy();                                                         //@ W[last] := 0
            Learner<P>::barrier();                                                    // the judge reads every learner's W2
        }
        for (int t = 0; t < M; t++) {
            const int now = (t + last) % P::COPIES, next = t % P::COPIES;
            Learner<P> L{&s.W[now], &s.b[now], s.slice, &s.g2, s.part, s.gamma, s.beta, g.eps, &s.z2, &s.sum};
            if (t % g.every == 0) keep<P>(w1, w2, s.b[now], s.slice, g.kept, size_t(head) * ((M + g.every - 1) / g.every) + t / g.every); //@ x2 := -1
            float eta[2];
            step_sizes(eta, g.eta, head, t, g.L);
            wait_full(s.kv, t);                                                       // for the producer: k and v have come
            hidden<P>(L, s.k[t % STAGES]);                                            //@ k[t % STAGES] == t, W[now] == t; x2 := t
            L.barrier();                                                              // the judge reads every learner's X2
            if (role == P::JUDGE) guess_and_error<P>(L, s.k[t % STAGES], s.v[t % STAGES], eta, t, nullptr); //@ x2[*] == t, W[*][now] == t, v[t % STAGES] == t; g2 := t
            L.barrier();                                                              // for the judge: every learner reads G2
            blame_and_step<P>(w1, w2, L, s.k[t % STAGES]);                            //@ g2 == t, x2 == t, W[now] == t, k[t % STAGES] == t
            signal_empty(s.kv, t);                                                    // the producer may overwrite k and v
            wait_empty(s.state, t);                                                   // for the reader: done with the W that lay here
            publish<P>(w1, w2, s.W[next], s.b[now], s.b[next], s.part);               //@ W[now] == t; W[next] := t + 1
            signal_full(s.state, t);                                                  // the reader may read the new W
            warpgroup::sync(2 + role);
        }
        Learner<P>::barrier();
        save_state<P>(w1, w2, s.b[(M + last) % P::COPIES], g.last, head);
        if (thread() == 0) tma::store_async_wait();
    } else {                                                                          // ---- reader
        if constexpr (P::READER > 65536 / P::THREADS / 8 * 8) warpgroup::increase_registers<P::READER>(); else warpgroup::decrease_registers<P::READER>();
        acc z2;
        for (int t = 0; t < M; t++) {
            tile &q = s.q[t % STAGES];
            const auto &W = s.W[t % P::COPIES];
            const auto &b = s.b[t % P::COPIES];
            wait_full(s.asked, t);                                                    // for the producer: q has come
            wait_full(s.state, t);                                                    // for the learners: the W that has seen mini-batch t
            if constexpr (TP == 1) {
                #pragma unroll
                for (int slice = 0; slice < P::HS; slice++) {
                    warpgroup::mm_AB(z2, q, W.w1[slice]);
                    warpgroup::mma_async_wait();
                    each(z2, [&](float2 &x, At, int, int c) { x = {gelu(x.x + b.b1[slice][c]), gelu(x.y + b.b1[slice][c + 1])}; });
                    store(s.xb[slice], z2);
                }
                to_async_proxy();
                warpgroup::sync(2 + role);
                warpgroup::mm_AB(z2, s.xb[0], W.w2[0]);
                #pragma unroll
                for (int slice = 1; slice < P::HS; slice++) warpgroup::mma_AB(z2, s.xb[slice], W.w2[slice]);
                warpgroup::mma_async_wait();
            } else {
                acc z1;
                #pragma unroll
                for (int slice = 0; slice < P::HS; slice++) {
                    warpgroup::mm_AB(z1, q, W.w1[slice]);
                    warpgroup::mma_async_wait();
                    frag x2;
                    each(z1, [&](float2 &x, At j, int, int c) {
                        x2.tiles[0][j / 4].data[j % 4] = __float22bfloat162_rn({gelu(x.x + b.b1[slice][c]), gelu(x.y + b.b1[slice][c + 1])});
                    });
                    if (slice == 0) warpgroup::mm_AB(z2, x2, W.w2[slice]); else warpgroup::mma_AB(z2, x2, W.w2[slice]);
                    warpgroup::mma_async_wait();
                }
            }
            if (rank == 0) add_row(z2, b.b2);                                         //@ q[t % STAGES] == t, W[*][t % COPIES] == t + 1
            signal_empty(s.state, t);                                                 // the learners may overwrite this W
            sum_over_cluster(z2, s.zb2, s.sum_out, t);
            warpgroup::sync(2 + role);
            if (quarter() * TP / 4 == rank) {
                float r[2];
                normalise(z2, r, g.eps);
                each(z2, [&](float2 &x, At i, int half, int c) {
                    const uint32_t at = place(q, i);
                    bf16_2 y;
                    move<bf16_2>::lds(y, at);
                    float2 asked = __bfloat1622float2(y);
                    y = __float22bfloat162_rn({asked.x + s.gamma[c] * x.x + s.beta[c], asked.y + s.gamma[c + 1] * x.y + s.beta[c + 1]});
                    move<bf16_2>::sts(at, y);
                });
                to_async_proxy();                                                     //@ q[t % STAGES] == t; q[t % STAGES] := -t - 1
                __syncwarp();
                if (lane() == 0) {
                    tma::store_async(g.out, *reinterpret_cast<st_bf<16, F> *>(&q.data[16 * F * quarter()]), {video, h, 4 * t + quarter(), 0});
                    tma::store_async_read_wait();                                     //@ q[t % STAGES] == -t - 1
                }
            }
            signal_empty(s.asked, t);                                                 // the producer may overwrite q, whose place the output took
        }
        if (lane() == 0) tma::store_async_wait();
    }
    everyone::tma::cluster::sync();
}

template <int TP> static int launch_forward(const Forward &g, int B, cudaStream_t stream) {
    constexpr size_t bytes = sizeof(ForwardShared<Plan<TP>>);
    static_assert(bytes <= Plan<TP>::SHARED_KB * KB && Plan<TP>::SHARED_KB <= 227, "the tiles want more shared memory than the table says");
    cudaFuncSetAttribute(ttt_forward_kernel<TP>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    ttt_forward_kernel<TP><<<dim3(TP, g.H, B), Plan<TP>::THREADS, bytes, stream>>>(g);
    return cudaGetLastError();
}
extern "C" __attribute__((visibility("default"))) int ttt_forward(
        void *q, void *k, void *v, void *out, const float *eta, const float *gamma, const float *beta, float *W1, float *b1, float *W2, float *b2,
        float *last_W1, float *last_b1, float *last_W2, float *last_b2, void *kept_W, float *kept_b, int B, int H, int L, int every, float eps, int tp, void *stream) {
    try {
        auto at = [&](void *x) { return tokens((bf16 *)x, B, H, L, nullptr); };
        Forward g{at(q), at(k), at(v), token_rows((bf16 *)out, B, H, L, nullptr), eta, gamma, beta, {W1, b1, W2, b2}, {last_W1, last_b1, last_W2, last_b2},
                  {(image *)kept_W, kept_b}, H, L, every, eps};
        return tp == 1 ? launch_forward<1>(g, B, (cudaStream_t)stream) : tp == 2 ? launch_forward<2>(g, B, (cudaStream_t)stream) : launch_forward<4>(g, B, (cudaStream_t)stream);
    } catch (...) { return -1; }
}
// ---------------------------------------------------------------------------------------------------- backward
template <int TP_> struct BackwardPlan {
    static constexpr int TP = TP_, HS = SLICES / TP, SL = 1, NL = HS, JUDGE = NL, TEAM = NL + 1, THREADS = 128 * (NL + 2);
    static constexpr int LEARNER = TP == 2 ? 192 : 232, JUDGES = TP == 2 ? 104 : 248, PRODUCER = 24, SHARED_KB = TP == 2 ? 224 : 186;
    static_assert(NL * LEARNER + JUDGES + PRODUCER <= pool(NL + 2), "the warpgroups want more registers than the kernel has");
};
struct Backward {
    tokens q, k, v, dout;
    token_rows dq, dk, dv;
    const float *eta, *gamma, *beta;                                                  // [B, H, L], [H, F], [H, F]
    float *deta, *dgamma, *dbeta;                                                     // [B, H, L], [B, H, F], [B, H, F]
    State dlast, dfirst;
    Checkpoints kept;
    uint8_t *scratch;                                                                 // [B, H, TP, every] times Saved
    int H, L, M, every, groups;                                                       // M mini-batches, in groups
    float eps;
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
    float part[P::HS + 1][4][F], gamma[F], beta[F], dgamma[4][F], dbeta[4][F];
    Ring<1> kv, asked, back, replayed, sum, sum_rows;
};

__device__ static inline void negate(acc &a) { each(a, [](float2 &x, int, int, int) { x = {-x.x, -x.y}; }); }
__device__ static inline void add_columns(float (*sum)[F], float2 &held, float2 x, int half, int c) {
    if (half == 0) { held = x; return; }
    x = {x.x + held.x, x.y + held.y};
    #pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
        x.x += __shfl_xor_sync(~0u, x.x, distance);
        x.y += __shfl_xor_sync(~0u, x.y, distance);
    }
    if (lane() < 4) sum[quarter()][c] += x.x, sum[quarter()][c + 1] += x.y;
}
// (B) z <- dZb2, the gradient on the output's Z2, as in backward_of_read; gamma and beta collect their sums.
template <class Shared> __device__ static inline void backward_of_read_norm(acc &z, Shared &s, float eps) {
    float r[2], along_1[2] = {}, along_xh[2] = {};
    float2 held_gamma, held_beta;
    normalise(z, r, eps);
    each(z, [&](float2 &xh, At i, int half, int c) {
        float2 D = pair(s.dout, i);
        add_columns(s.dgamma, held_gamma, {D.x * xh.x, D.y * xh.y}, half, c);
        add_columns(s.dbeta, held_beta, D, half, c);
        float2 g = pair(s.gamma, c);
        D = {D.x * g.x, D.y * g.y};
        along_1[half] += D.x + D.y, along_xh[half] += D.x * xh.x + D.y * xh.y;
    });
    for (int half = 0; half < 2; half++) along_1[half] = row_sum(along_1[half]) / F, along_xh[half] = row_sum(along_xh[half]) / F;
    each(z, [&](float2 &xh, At i, int half, int c) {
        float2 D = pair(s.dout, i), g = pair(s.gamma, c);
        xh = {r[half] * (D.x * g.x - along_1[half] - xh.x * along_xh[half]), r[half] * (D.y * g.y - along_1[half] - xh.y * along_xh[half])};
    });
}
// (D) z: dG2 -> dZ2, through G2 = eta J[p], as in backward_of_step; dv takes the place of v, deta goes out. xh and r are those of the replay.
template <class Shared, class Out> __device__ static inline void backward_of_error(acc &z, const float2 *kept_xh, Shared &s, const float (&eta)[2], Out deta_out) {
    float p_1[2] = {}, p_xh[2] = {}, U_1[2] = {}, U_xh[2] = {}, U_gZ[2] = {}, h_1[2] = {}, h_xh[2] = {};
    float2 held_gamma, held_beta;
    auto both = [](float (&sum)[2]) { sum[0] = row_sum(sum[0]) / F, sum[1] = row_sum(sum[1]) / F; };
    auto xh_of = [&](int i) {
        float2 x;
        asm volatile("ld.volatile.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(kept_xh + 128 * i));
        return x;
    };
    kept_xh += thread();
    const float2 both_r = xh_of(16);
    const float r[2] = {both_r.x, both_r.y};
    auto error = [&](float2 xh, float2 g, At i, int c) {
        float2 target = pair(s.v, i), start = pair(s.k, i), b = pair(s.beta, c);
        return float2{g.x * xh.x + b.x - (target.x - start.x), g.y * xh.y + b.y - (target.y - start.y)};
    };
    auto gZ_of = [&](float2 e, float2 xh, float2 g, int half) {
        return float2{r[half] * (g.x * e.x - p_1[half] - xh.x * p_xh[half]), r[half] * (g.y * e.y - p_1[half] - xh.y * p_xh[half])};
    };
    auto w_of = [&](float2 U, float2 xh, int half) {
        return float2{r[half] * (U.x - U_1[half] - xh.x * U_xh[half]), r[half] * (U.y - U_1[half] - xh.y * U_xh[half])};
    };
    each(z, [&](float2 &, At i, int half, int c) {
        float2 g = pair(s.gamma, c), xh = xh_of(i), e = error(xh, g, i, c), p = {g.x * e.x, g.y * e.y};
        p_1[half] += p.x + p.y, p_xh[half] += p.x * xh.x + p.y * xh.y;
    });
    both(p_1), both(p_xh);
    float deta[2] = {};
    each(z, [&](float2 &U, At i, int half, int c) {
        float2 g = pair(s.gamma, c), xh = xh_of(i), gZ = gZ_of(error(xh, g, i, c), xh, g, half);
        deta[half] += U.x * gZ.x + U.y * gZ.y;
        U = {eta[half] * U.x, eta[half] * U.y};
        U_1[half] += U.x + U.y, U_xh[half] += U.x * xh.x + U.y * xh.y, U_gZ[half] += U.x * gZ.x + U.y * gZ.y;
    });
    for (int half = 0; half < 2; half++) deta_out(half, row_sum(deta[half]));
    both(U_1), both(U_xh), both(U_gZ);
    each(z, [&](float2 &U, At i, int half, int c) {
        float2 g = pair(s.gamma, c), xh = xh_of(i), w = w_of(U, xh, half), h = {g.x * g.x * w.x, g.y * g.y * w.y};
        h_1[half] += h.x + h.y, h_xh[half] += h.x * xh.x + h.y * xh.y;
    });
    both(h_1), both(h_xh);
    h_xh[0] += U_gZ[0], h_xh[1] += U_gZ[1];
    each(z, [&](float2 &x, At i, int half, int c) {
        float2 g = pair(s.gamma, c), xh = xh_of(i), w = w_of(x, xh, half), e = error(xh, g, i, c), gZ = gZ_of(e, xh, g, half);
        x = {r[half] * (g.x * g.x * w.x - h_1[half] - xh.x * h_xh[half] - p_xh[half] * w.x - U_xh[half] * gZ.x),
             r[half] * (g.y * g.y * w.y - h_1[half] - xh.y * h_xh[half] - p_xh[half] * w.y - U_xh[half] * gZ.y)};
        add_columns(s.dgamma, held_gamma, {w.x * (e.x + g.x * xh.x), w.y * (e.y + g.y * xh.y)}, half, c);
        add_columns(s.dbeta, held_beta, {g.x * w.x, g.y * w.y}, half, c);
        put(s.v, i, {-g.x * w.x, -g.y * w.y});
    });
}

__device__ static inline void store_rows(const token_rows &to, tile &from, int video, int h, int t) {
    if (lane() == 0) tma::store_async(to, *reinterpret_cast<st_bf<16, F> *>(&from.data[16 * F * quarter()]), {video, h, 4 * t + quarter(), 0});
}

template <int TP> __global__ __cluster_dims__(TP) __launch_bounds__(BackwardPlan<TP>::THREADS, 1) void ttt_backward_kernel(const __grid_constant__ Backward g) {
    using P = BackwardPlan<TP>;
    auto &s = *reinterpret_cast<BackwardShared<P> *>(dynamic);
    int role = warpgroup::groupid();
    // Items: in a ring of one slot it only matters whether an item is odd or even. k and v come twice for every mini-batch of a group, so each
    // group begins with an even one: t - start in the replay, then start + t + 1. q, dout and what was saved come once: M - 1 - t.
    // Asked for where they are needed, as `thread` is:
    const auto h = [] { int i; asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(i)); return i; };
    const auto video = [] { int i; asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(i)); return i; };
    const auto rank = [] { int i; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(i)); return i; };
    const auto head = [&] { return video() * g.H + h(); };
    const auto saved = [&](int step) -> Saved<P::HS> & { return reinterpret_cast<Saved<P::HS> *>(g.scratch)[size_t(head() * TP + rank()) * g.every + step]; };
    if (threadIdx.x == 0) {
        init_ring(s.kv, 1, 4 * P::TEAM);
        init_ring(s.asked, 1, 4 * P::TEAM);
        init_ring(s.back, 1, 4 * P::TEAM);
        init_ring(s.replayed, 4 * P::TEAM, 1);
        init_ring(s.sum, 1, 4 * (TP - 1));
        init_ring(s.sum_rows, 1, 4 * (TP - 1));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x < F) {
        s.gamma[threadIdx.x] = g.gamma[blockIdx.y * F + threadIdx.x], s.beta[threadIdx.x] = g.beta[blockIdx.y * F + threadIdx.x];
        for (int i = 0; i < 4; i++) s.dgamma[i][threadIdx.x] = s.dbeta[i][threadIdx.x] = 0;
    }
    __syncthreads();
    everyone::tma::cluster::sync();
    if (role == P::NL + 1) {                                                          // ---- producer
        warpgroup::decrease_registers<P::PRODUCER>();
        if (thread() == 0) {
            for (int start = (g.M - 1) / g.every * g.every; start >= 0; start -= g.every) {
                const int end = min(start + g.every, g.M);
                for (int t = start; t < end; t++) {
                    wait_empty(s.kv, t - start);
                    tma::expect_bytes(s.kv.full[0], 2 * sizeof(tile));
                    tma::load_async(s.k, g.k, {video(), h(), t, 0}, s.kv.full[0]);
                    tma::load_async(s.v, g.v, {video(), h(), t, 0}, s.kv.full[0]);
                }
                wait_full(s.replayed, g.groups - 1 - start / g.every);
                for (int t = end - 1; t >= start; t--) {
                    wait_empty(s.asked, g.M - 1 - t);
                    tma::expect_bytes(s.asked.full[0], 2 * sizeof(tile));
                    tma::load_async(s.q, g.q, {video(), h(), t, 0}, s.asked.full[0]);
                    tma::load_async(s.dout, g.dout, {video(), h(), t, 0}, s.asked.full[0]);
                    wait_empty(s.kv, start + t + 1);
                    tma::expect_bytes(s.kv.full[0], 2 * sizeof(tile));
                    tma::load_async(s.k, g.k, {video(), h(), t, 0}, s.kv.full[0]);
                    tma::load_async(s.v, g.v, {video(), h(), t, 0}, s.kv.full[0]);
                    wait_empty(s.back, g.M - 1 - t);
                    tma::expect_bytes(s.back.full[0], sizeof(s.saved) + sizeof(tile));
                    tma::load_async((void *)s.saved, (void *)saved(t - start).slice, sizeof(s.saved), s.back.full[0]); //@ stored[*] == start, stored_g2 == start
                    tma::load_async((void *)&s.g2, (void *)&saved(t - start).g2, sizeof(tile), s.back.full[0]);
                }
            }
        }
    } else if (role == P::JUDGE) {                                                    // ---- judge
        if constexpr (P::JUDGES > 65536 / P::THREADS / 8 * 8) warpgroup::increase_registers<P::JUDGES>(); else warpgroup::decrease_registers<P::JUDGES>();
        acc z;
        if (const int column = thread(); column < F) s.dbias.b2[column] = g.dlast.b2[size_t(head()) * F + column];
        Learner<P> team{&s.W, &s.bias, s.saved, &s.g2, s.part, s.gamma, s.beta, g.eps, &s.z2, &s.sum};
        for (int start = (g.M - 1) / g.every * g.every; start >= 0; start -= g.every) {
            const int end = min(start + g.every, g.M);
            if (const int column = thread(); column < F) s.bias.b2[column] = g.kept.b[(size_t(head()) * g.groups + start / g.every) * (E + F) + E + column];
            warpgroup::sync(2 + role);
            for (int t = start; t < end; t++) {                                       // replay
                auto &to = saved(t - start);
                float eta[2];
                step_sizes(eta, g.eta, head(), t, g.L);
                if (const int column = thread(); column < F) to.b.b2[column] = s.bias.b2[column];
                wait_full(s.kv, t - start);
                team.barrier();
                guess_and_error<P>(team, s.k, s.v, eta, g.M - end + t - start, to.xh); //@ k == t, v == t, x2[*] == t, W[*] == t; g2 := t
                team.barrier();
                signal_empty(s.kv, t - start);
                if (thread() == 0) {
                    tma::store_async((void *)&to.g2, (void *)&s.g2, sizeof(tile));
                    tma::store_async_read_wait();                                     //@ g2 == t
                }
                if (const int column = thread(); column < F) s.bias.b2[column] += add_parts(s.part[P::HS], column);
                warpgroup::sync(2 + role);
            }
            if (thread() == 0) {
                tma::store_async_wait();                                              //@ stored_g2 := start
                asm volatile("fence.proxy.async;" ::: "memory");
            }
            signal_full(s.replayed, g.groups - 1 - start / g.every);
            for (int t = end - 1; t >= start; t--) {                                  // walk back
                wait_full(s.asked, g.M - 1 - t);
                team.barrier();
                // 2 Zb2, its LayerNorm, back to dZb2
                warpgroup::mm_AB(z, s.a[0], s.W.w2[0]);
                #pragma unroll
                for (int j = 1; j < P::HS; j++) warpgroup::mma_AB(z, s.a[j], s.W.w2[j]);
                warpgroup::mma_async_wait();
                sum_over_cluster(z, s.z2, s.sum, g.M - start);
                add_row(z, s.bias.b2);
                backward_of_read_norm(z, s, g.eps);                                   //@ a[*] == t, W[*] == t + 1, dout == t; u := t
                store(s.u, z);
                column_sums(z, s.part[P::HS]);
                to_async_proxy();
                team.barrier();
                if (const int column = thread(); column < F) {
                    s.dbias.b2[column] += add_parts(s.part[P::HS], column);
                    s.bias.b2[column] = saved(t - start).b.b2[column];
                }
                team.barrier();
                // 4 dq = dout + dZb1 W1^T                                            //@ b[*] == t, W[*] == t + 1
                warpgroup::mm_ABt(z, again(s.b[0]), again(s.W.w1[0]));
                #pragma unroll
                for (int j = 1; j < P::HS; j++) warpgroup::mma_ABt(z, again(s.b[j]), again(s.W.w1[j]));
                warpgroup::mma_async_wait();
                team.barrier();
                sum_over_cluster(z, s.rows, s.sum_rows, 0);
                if (quarter() * TP / 4 == rank()) {
                    each(z, [&](float2 &x, At i, int half, int c) {
                        float2 D = pair(s.dout, i);
                        put(s.dout, i, {D.x + x.x, D.y + x.y});
                    });
                    to_async_proxy();
                    __syncwarp();
                    store_rows(g.dq, s.dout, video(), h(), t);                        //@ dout == t; dout := -t - 1
                    if (lane() == 0) tma::store_async_read_wait();
                }
                signal_empty(s.asked, g.M - 1 - fresh(t));
                wait_full(s.kv, start + t + 1);
                wait_full(s.back, g.M - 1 - t);
                team.barrier();
                // 7 dG2 = -(X2 dW2 + N W2 + db2), through the LayerNorm's second order
                warpgroup::mm_AB(z, s.saved[0].x2, s.dW.w2[0]);
                warpgroup::mma_AB(z, s.a[0], s.W.w2[0]);
                #pragma unroll
                for (int j = 1; j < P::HS; j++) warpgroup::mma_AB(z, s.saved[j].x2, s.dW.w2[j]), warpgroup::mma_AB(z, s.a[j], s.W.w2[j]);
                warpgroup::mma_async_wait();
                sum_over_cluster(z, s.z2, s.sum, (g.M - start) ^ 1);
                add_row(z, s.dbias.b2);
                negate(z);
                float eta[2];
                step_sizes(eta, g.eta, head(), t, g.L);
                backward_of_error(z, saved(t - start).xh, s, eta, [&](int half, float deta) {
                    const int token = 64 * t + first_row() + 8 * half;
                    if (rank() == 0 && thread() % 4 == 0 && token < g.L) g.deta[size_t(head()) * g.L + token] = deta;
                });                                                                   //@ x2[*] == t, dW[*] == t, a[*] == -t - 1, W[*] == t, k == t, v == t; u := -t - 1, v := -t - 1
                store(s.u, z);
                column_sums(z, s.part[P::HS]);
                to_async_proxy();
                team.barrier();
                if (const int column = thread(); column < F) s.dbias.b2[column] += add_parts(s.part[P::HS], column);
                team.barrier();
                // 9 dk = D1 dW1^T + dZ1 W1^T - dv                                    //@ g1[*] == t, dW[*] == t, b[*] == -t - 1, W[*] == t
                warpgroup::mm_ABt(z, s.saved[0].g1, s.dW.w1[0]);
                warpgroup::mma_ABt(z, s.b[0], s.W.w1[0]);
                #pragma unroll
                for (int j = 1; j < P::HS; j++) warpgroup::mma_ABt(z, s.saved[j].g1, s.dW.w1[j]), warpgroup::mma_ABt(z, s.b[j], s.W.w1[j]);
                warpgroup::mma_async_wait();
                team.barrier();
                sum_over_cluster(z, s.rows, s.sum_rows, 1);
                if (quarter() * TP / 4 == rank()) {
                    each(z, [&](float2 &x, At i, int half, int c) {
                        float2 dv = pair(s.v, i);
                        put(s.k, i, {x.x - dv.x, x.y - dv.y});
                    });
                    to_async_proxy();
                    __syncwarp();
                    store_rows(g.dk, s.k, video(), h(), t);                           //@ v == -t - 1; k := -t - 1
                    store_rows(g.dv, s.v, video(), h(), t);
                    if (lane() == 0) tma::store_async_read_wait();
                }
                signal_empty(s.kv, start + t + 1);
                signal_empty(s.back, g.M - 1 - t);
            }
        }
        warpgroup::sync(2 + role);
        if (const int column = thread(); rank() == 0 && column < F) {
            g.dfirst.b2[size_t(head()) * F + column] = s.dbias.b2[column];
            g.dgamma[size_t(head()) * F + column] = add_parts(s.dgamma, column);
            g.dbeta[size_t(head()) * F + column] = add_parts(s.dbeta, column);
        }
        if (lane() == 0) tma::store_async_wait();
    } else {                                                                          // ---- learners
        warpgroup::increase_registers<P::LEARNER>();
        acc w1[1], w2[1], d1[1], d2[1], z;
        load_state<P>(d1, d2, s.dbias, g.dlast, head());
        Learner<P> learner{&s.W, &s.bias, s.saved, &s.g2, s.part, s.gamma, s.beta, g.eps, &s.z2, &s.sum};
        for (int start = (g.M - 1) / g.every * g.every; start >= 0; start -= g.every) {
            const int end = min(start + g.every, g.M);
            const size_t at = size_t(head()) * g.groups + start / g.every;
            const int slice = rank() * P::HS + role;
            const image *images = g.kept.W + (at * SLICES + slice) * 2;
            const float *biases = g.kept.b + at * (E + F);
            each(w1[0], [&](float2 &x, At j, int, int) { x = images[0][quarter()][j][lane()]; });
            each(w2[0], [&](float2 &x, At j, int, int) { x = images[1][quarter()][j][lane()]; });
            store(s.W.w1[role], w1[0]);
            store(s.W.w2[role], w2[0]);
            if (const int column = thread(); column < F) s.bias.b1[role][column] = biases[F * slice + column];
            to_async_proxy();                                                         //@ W := start
            warpgroup::sync(2 + role);
            for (int t = start; t < end; t++) {                                       // replay
                auto &to = saved(t - start);
                role = fresh(role);
                if (const int column = thread(); column < F) to.b.b1[role][column] = s.bias.b1[role][column];
                wait_full(s.kv, t - start);
                hidden<P>(learner, s.k);                                              //@ k == t, W == t; x2 := t
                learner.barrier();
                learner.barrier();
                blame_and_step<P>(w1, w2, learner, s.k);                              //@ g2 == t, k == t, x2 == t, W == t; g1 := t
                signal_empty(s.kv, t - start);
                if (thread() == 0) {
                    tma::store_async((void *)&to.slice[role], (void *)&s.saved[role], sizeof(Slice));
                    tma::store_async_read_wait();                                     //@ x2 == t, g1 == t
                }
                publish<P>(w1, w2, s.W, s.bias, s.bias, s.part);                      //@ W := t + 1
                warpgroup::sync(2 + role);
            }
            if (thread() == 0) {
                tma::store_async_wait();                                              //@ stored := start
                asm volatile("fence.proxy.async;" ::: "memory");
            }
            signal_full(s.replayed, g.groups - 1 - start / g.every);
            negate(w1[0]), negate(w2[0]);
            for (int t = end - 1; t >= start; t--) {
                role = fresh(role);
                // 1 hidden, of q, at the updated W: Xb2 and gelu'
                wait_full(s.asked, g.M - 1 - t);
                warpgroup::mm_AB(z, s.q, s.W.w1[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At i, int half, int c) {
                    float2 d;
                    put(s.a[role], i, {gelu_slope(x.x + s.bias.b1[role][c], d.x), gelu_slope(x.y + s.bias.b1[role][c + 1], d.y)});
                    put(s.b[role], i, d);
                });                                                                   //@ q == t, W == t + 1; a := t, b := t + 1000
                to_async_proxy();
                learner.barrier();
                learner.barrier();
                role = fresh(role);
                // 3 dZb1 = (dZb2 W2^T) gelu'; dW2 += Xb2^T dZb2, dW1 += q^T dZb1     //@ u == t, W == t + 1, a == t, b == t + 1000; b := t
                warpgroup::mm_ABt(z, s.u, s.W.w2[role]);
                warpgroup::mma_AtB(d2[0], s.a[role], s.u);
                warpgroup::mma_async_wait<1>();
                each(z, [&](float2 &x, At i, int half, int c) {
                    float2 slope = pair(s.b[role], i);
                    x = {x.x * slope.x, x.y * slope.y};
                });
                store(s.b[role], z);
                column_sums(z, s.part[role]);
                to_async_proxy();
                warpgroup::sync(2 + role);
                warpgroup::mma_AtB(d1[0], s.q, s.b[role]);                            //@ q == t, b == t
                if (const int column = thread(); column < F) s.dbias.b1[role][column] += add_parts(s.part[role], column);
                warpgroup::mma_async_wait();
                learner.barrier();
                signal_empty(s.asked, g.M - 1 - t);
                learner.barrier();
                role = fresh(role);
                // 5 rewind: W <- W - (what the step added), held negated so that products only add
                wait_full(s.kv, start + t + 1);
                wait_full(s.back, g.M - 1 - t);
                warpgroup::mma_AtB(w1[0], s.k, s.saved[role].g1);
                warpgroup::mma_AtB(w2[0], s.saved[role].x2, s.g2);
                warpgroup::mma_async_wait();
                store<-1>(s.W.w1[role], w1[0]);
                store<-1>(s.W.w2[role], w2[0]);
                store(s.dW.w1[role], d1[0]);
                store(s.dW.w2[role], d2[0]);
                if (const int column = thread(); column < F) s.bias.b1[role][column] = saved(t - start).b.b1[role][column];
                to_async_proxy();
                warpgroup::sync(2 + role);
                role = fresh(role);
                // 6 A1 = k dW1 + db1 = -dG1; a: N = -dgX2 = A1 gelu'; b: what G1 = gX2 gelu' leaves on Z1//@ k == t, g1 == t, x2 == t, g2 == t; W := t, dW := t
                warpgroup::mm_AB(z, s.k, s.W.w1[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At i, int half, int c) {
                    float2 slope, bend;
                    gelu_bend(x.x + s.bias.b1[role][c], slope.x, bend.x), gelu_bend(x.y + s.bias.b1[role][c + 1], slope.y, bend.y);
                    put(s.c[role], i, slope);
                    put(s.b[role], i, bend);
                });
                warpgroup::mm_ABt(z, s.g2, s.W.w2[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At i, int half, int c) {
                    float2 bend = pair(s.b[role], i);
                    put(s.b[role], i, {x.x * bend.x, x.y * bend.y});
                });
                warpgroup::mm_AB(z, s.k, s.dW.w1[role]);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At i, int half, int c) {
                    float2 slope = pair(s.c[role], i), bend = pair(s.b[role], i);
                    x = {x.x + s.dbias.b1[role][c], x.y + s.dbias.b1[role][c + 1]};
                    put(s.b[role], i, {x.x * bend.x, x.y * bend.y});
                    x = {x.x * slope.x, x.y * slope.y};
                });
                store(s.a[role], z);                                                  //@ k == t, g2 == t; a := -t - 1, b := t + 2000, c := t
                to_async_proxy();
                learner.barrier();
                learner.barrier();
                role = fresh(role);
                // 8 dZ1 = (dX2) gelu' + b; dW2 += N^T D2 + X2^T dZ2, dW1 += k^T dZ1  //@ g2 == t, dW == t, u == -t - 1, W == t, a == -t - 1, x2 == t, c == t, b == t + 2000; b := -t - 1
                auto &u = again(s.u);
                warpgroup::mm_ABt(z, s.g2, s.dW.w2[role]);
                warpgroup::mma_ABt(z, u, s.W.w2[role]);
                warpgroup::mma_AtB(d2[0], s.a[role], s.g2);
                warpgroup::mma_AtB(d2[0], s.saved[role].x2, u);
                warpgroup::mma_async_wait();
                each(z, [&](float2 &x, At i, int half, int c) {
                    float2 slope = pair(s.c[role], i), rest = pair(s.b[role], i);
                    x = {x.x * slope.x + rest.x, x.y * slope.y + rest.y};
                });
                store(s.b[role], z);
                column_sums(z, s.part[role]);
                to_async_proxy();
                warpgroup::sync(2 + role);
                warpgroup::mma_AtB(d1[0], s.k, s.b[role]);                            //@ k == t, b == -t - 1
                if (const int column = thread(); column < F) s.dbias.b1[role][column] += add_parts(s.part[role], column);
                warpgroup::mma_async_wait();
                learner.barrier();
                learner.barrier();
                signal_empty(s.kv, start + t + 1);
                signal_empty(s.back, g.M - 1 - t);
            }
        }
        save_state<P>(d1, d2, s.dbias, g.dfirst, head());
        if (lane() == 0) tma::store_async_wait();
    }
    everyone::tma::cluster::sync();
}

template <int TP> static int launch_backward(const Backward &g, int B, cudaStream_t stream) {
    constexpr size_t bytes = sizeof(BackwardShared<BackwardPlan<TP>>);
    static_assert(bytes <= BackwardPlan<TP>::SHARED_KB * KB && BackwardPlan<TP>::SHARED_KB <= 227, "the tiles want more shared memory than the table says");
    cudaFuncSetAttribute(ttt_backward_kernel<TP>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    ttt_backward_kernel<TP><<<dim3(TP, g.H, B), BackwardPlan<TP>::THREADS, bytes, stream>>>(g);
    return cudaGetLastError();
}
extern "C" __attribute__((visibility("default"))) size_t ttt_scratch_bytes(int tp) { return tp == 4 ? sizeof(Saved<1>) : sizeof(Saved<2>); }
extern "C" __attribute__((visibility("default"))) int ttt_backward(
        void *q, void *k, void *v, void *dout, void *dq, void *dk, void *dv, const float *eta, const float *gamma, const float *beta, float *deta, float *dgamma, float *dbeta,
        float *dlast_W1, float *dlast_b1, float *dlast_W2, float *dlast_b2, float *dW1, float *db1, float *dW2, float *db2,
        void *kept_W, float *kept_b, void *scratch, int B, int H, int L, int every, float eps, int tp, void *stream) {
    try {
        auto at = [&](void *x) { return tokens((bf16 *)x, B, H, L, nullptr); };
        auto rows = [&](void *x) { return token_rows((bf16 *)x, B, H, L, nullptr); };
        Backward g{at(q), at(k), at(v), at(dout), rows(dq), rows(dk), rows(dv), eta, gamma, beta, deta, dgamma, dbeta,
                   {dlast_W1, dlast_b1, dlast_W2, dlast_b2}, {dW1, db1, dW2, db2}, {(image *)kept_W, kept_b}, (uint8_t *)scratch, H, L, (L + 63) / 64, every, ((L + 63) / 64 + every - 1) / every, eps};
        return tp == 4 ? launch_backward<4>(g, B, (cudaStream_t)stream) : launch_backward<2>(g, B, (cudaStream_t)stream);
    } catch (...) { return -1; }
}
