// Shares of images and positions in sum_ij D_ij G_ij: the signed maps that add up to a score. Distances from the same pass.
//
//     c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2,    W_ij = G_ij/D_ij, and 0 where D_ij = 0.
//
// The sum is taken as it stands. Its other form, r_i |F_i(p)|^2 - 2 F_i(p) . (W F)_i(p) + (W q)_i(p), needs a product [n, n] x [n, d] for
// each W and loses the digits of near-duplicates, whose W is large, so that it needs centred features, a product without TF32, and a second
// path for close pairs. Differences of features lose no digit. Their count is no larger: a squared difference belongs to a pair and not to
// an image, so half of the n^2 pairs are enough, with two operations per element (a difference and a multiply-add) in place of the product's
// one multiply-add for each of all pairs. They do not depend on W, so one pass serves the shares of every score, and their sum over the
// positions is D_ij^2: the distances need no Gram product, and no repair.
//
// shares_squares_{float32,float16,bfloat16}  |F_i(p) - F_j(p)|^2 of the pairs i < j. Lanes are neighbouring positions; a thread has 8 x 8
//                     pairs in registers, and the warps of a block read the same 32 + 16 images, mostly from L1.
//                     Bytes: n C P sizeof(T) read from memory once, and from L2 by each tile of pairs, n/21 times in all; 2 n^2 P written
//                     for each part of the channels, which is n/(2 C) of float32 features. Centred features and W F, which the product
//                     would write and read again, do not exist.
//                     Operations: n^2 C P in float32. The floor is the time of the operations.
// shares_contract     The sum over j for up to four W at a time. Bytes: 2 n^2 P read twice for each part of the channels, and 8 n^2 per W
//                     and 32 positions, mostly from L2. Operations: n^2 P per W in float64. The floor is the bytes over the bandwidth.
//
// Squares of many images would not fit into memory. Both kernels therefore take a strip: the pairs whose first image is one of the first
// ``rows`` of ``count`` images. The next strip begins behind these rows.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kSide = 8;     // images of a thread, on each side of its pairs
constexpr int kAcross = 2;   // warps beside each other
constexpr int kAtOnce = 4;   // shares of a block
constexpr int kRows = kWarps / kAcross * kSide, kColumns = kAcross * kSide;  // images of a block

// How lanes share the positions: a warp has ``lanes`` positions. If all positions are at most half a warp, ``groups`` channels lie side
// by side in it.
struct Lanes {
    int positions, lanes, groups;
};

// The squared differences of one tile of pairs in a part of the channels, into squares [rows, count, positions].
template <class T>
__device__ void measure(const T* features, int rows, int count, int channels, Lanes shape, int channels_per_block, float* squares) {
    const int tiles = (count + kColumns - 1) / kColumns, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int top = blockIdx.x / tiles * kRows + warp / kAcross * kSide, left = blockIdx.x % tiles * kColumns + warp % kAcross * kSide;
    if (top >= rows || left >= count || left + kSide - 1 <= top) return;  // no pair i < j
    const int group = lane / shape.lanes, position = blockIdx.y * shape.lanes + lane % shape.lanes;
    const bool present = group < shape.groups && position < shape.positions;

    float sum[kSide][kSide] = {};
    const int image = channels * shape.positions;
    int own_at[kSide], other_at[kSide];  // elements from the tile's first images; in place of images beyond the last one, the last one
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
        own_at[k] = min(k, count - 1 - top) * image;
        other_at[k] = min(k, count - 1 - left) * image;
    }
    const int begin = blockIdx.z * channels_per_block, end = present ? min(channels, begin + channels_per_block) : 0;
    const T* first = features + ((long long)top * image + (begin + group) * shape.positions + position);
    const T* second = first + (long long)(left - top) * image;
#pragma unroll 1
    for (int channel = begin + group; channel < end; channel += shape.groups) {
        float own[kSide];
#pragma unroll
        for (int i = 0; i < kSide; ++i) own[i] = float(first[own_at[i]]);
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
            const float other = float(second[other_at[j]]);
#pragma unroll
            for (int i = 0; i < kSide; ++i) sum[i][j] += (own[i] - other) * (own[i] - other);
        }
        first += shape.groups * shape.positions;
        second += shape.groups * shape.positions;
    }
#pragma unroll 1
    for (int next = 1; next < shape.groups; ++next)  // the first group adds up the others in order
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
            for (int j = 0; j < kSide; ++j) {
                const float more = __shfl_sync(kWarp, sum[i][j], lane % shape.lanes + next * shape.lanes);
                if (group == 0) sum[i][j] += more;
            }
    if (!present || group) return;
    squares += (long long)blockIdx.z * rows * count * shape.positions + position;
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j)
            if (top + i < rows && left + j < count && top + i < left + j)
                squares[((long long)(top + i) * count + left + j) * shape.positions] = sum[i][j];
}

// Adds the strip's part of up to kAtOnce shares of one image at up to 32 positions. An image of the strip has its pairs with all others,
// and an image behind the strip has its pairs with the strip.
__device__ void contract(
    const float* squares, const double* weights, int matrices, int images, int rows, int count, Lanes shape, int splits, double* shares
) {
    __shared__ double sums[kWarps][kAtOnce][32];
    const int own = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, partners = own < rows ? count : rows;
    const int position = blockIdx.y * shape.lanes + lane, matrix = blockIdx.z * kAtOnce;
    const bool present = lane < shape.lanes && position < shape.positions;
    const long long split_size = (long long)rows * count * shape.positions;
    weights += (long long)matrix * images * images + (long long)own * images;
    double sum[kAtOnce] = {};
    for (int begin = warp * 32; begin < partners; begin += kWarps * 32) {
        double weight[kAtOnce];
#pragma unroll
        for (int m = 0; m < kAtOnce; ++m) {
            const bool read = begin + lane < partners && matrix + m < matrices;
            weight[m] = read ? weights[(long long)m * images * images + begin + lane] : 0.0;
        }
        for (int k = 0; k < min(32, partners - begin); ++k) {
            const int other = begin + k;
            float squared = 0;
            if (present && other != own) {
                const float* square = squares + ((long long)min(own, other) * count + max(own, other)) * shape.positions + position;
                for (int split = 0; split < splits; ++split) squared += square[split * split_size];
            }
#pragma unroll
            for (int m = 0; m < kAtOnce; ++m) sum[m] += __shfl_sync(kWarp, weight[m], k) * squared;
        }
    }
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) sums[warp][m][lane] = sum[m];
    __syncthreads();
    if (warp >= kAtOnce || matrix + warp >= matrices || !present) return;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][warp][lane];
    shares[((long long)(matrix + warp) * images + own) * shape.positions + position] += total;
}

}  // namespace

// features [count, C, P]; out: squares [splits, rows, count, P] where i < j. Grid (ceil(rows/32) ceil(count/16), parts of the positions,
// parts of the channels).
#define KDX_SQUARES(name, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) name(                                               \
        const T* features, int rows, int count, int channels, int positions, int lanes, int groups,                  \
        int channels_per_block, float* squares                                                                       \
    ) {                                                                                                              \
        measure<T>(features, rows, count, channels, {positions, lanes, groups}, channels_per_block, squares);        \
    }
KDX_SQUARES(shares_squares_float32, float)
KDX_SQUARES(shares_squares_float16, __half)
KDX_SQUARES(shares_squares_bfloat16, __nv_bfloat16)

// weights [matrices, images, images] and shares [matrices, images, P], which are added to, from the first row and column of the strip on.
// Grid (count, parts of the positions, ceil(matrices/4)).
extern "C" __global__ void __launch_bounds__(32 * kWarps, 3) shares_contract(
    const float* squares, const double* weights, int matrices, int images, int rows, int count, int positions, int lanes, int splits,
    double* shares
) {
    contract(squares, weights, matrices, images, rows, count, {positions, lanes, 1}, splits, shares);
}
