// From Gram products to Euclidean distances, in place.
//
//     D_ij = sqrt(max(0, |x_i|^2 + |y_j|^2 - 2 G_ij)),    G = X Y^T.
//
// If D^2 is tiny beside the norms, that difference is rounding. A warp then reads both rows and computes sum_k (x_ik - y_jk)^2.
//
// pairwise_symmetric  Y is X: blocks above the diagonal read G once and write D twice, so that D is symmetric bit for bit, with
//                     zeros on the diagonal. Any number of matrices.
//                     Bytes: 2 n^2 read and 4 n^2 written per matrix; operations: a handful per element. The floor is 6 n^2 over the
//                     bandwidth.
// pairwise_cross      Bytes: 4 q m read and 4 q m written. The floor is 8 q m over the bandwidth.
//
// A block has one 64 x 64 tile. Lanes run along a row, so a warp requests 128 contiguous bytes at any width, and each thread has
// sixteen loads in flight before it uses the first one: 16-byte loads would only add a second code path.

#include "reduce.cuh"

namespace {

constexpr int kTile = 64;
constexpr int kWarps = 8;
constexpr int kTileRows = kTile / kWarps;  // of a warp
constexpr int kBlocks = 4;                 // per multiprocessor at least; without this bound, nvcc makes room for six and spills

struct Rows {
    const float* x;      // [count, d]
    const float* norms;  // |x_i|^2 [count]
    int count;
};

// ||x - y|| by direct difference, the same in every lane.
__device__ float direct_distance(const float* x, const float* y, int d) {
    double sum = 0;
#pragma unroll 4
    for (int k = threadIdx.x % 32; k < d; k += 32) {
        const double difference = double(x[k]) - y[k];
        sum += difference * difference;
    }
    return float(sqrt(warp_sum(sum)));
}

// The tile of distances at (top, left), zero beyond the matrix. A tile on the diagonal of a symmetric matrix is computed
// above the diagonal and mirrored.
__device__ void measure(
    float (&tile)[kTile][kTile + 1], const float* gram, Rows x, Rows y, int d, float near, int top, int left, bool mirrored
) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kTileRows;
#pragma unroll
    for (int step = 0; step < 2 * kTileRows; ++step) {
        const int row = first + step / 2, column = lane + step % 2 * 32, i = top + row, j = left + column;
        if (!mirrored || row < column) tile[row][column] = i < x.count && j < y.count ? gram[(long long)i * y.count + j] : 0.0f;
        if (mirrored && row == column) tile[row][column] = 0.0f;
    }
#pragma unroll 1
    for (int step = 0; step < 2 * kTileRows; ++step) {
        const int row = first + step / 2, column = lane + step % 2 * 32, i = top + row, j = left + column;
        const bool inside = i < x.count && j < y.count && (!mirrored || row < column);
        const float norms = inside ? x.norms[i] + y.norms[j] : 0.0f;
        float squared = inside ? norms - 2 * tile[row][column] : 0.0f;
        squared = squared < 0 ? 0.0f : squared;  // not fmaxf, which would hide a NaN
        float distance = sqrtf(squared);
        for (unsigned close = __ballot_sync(kWarp, squared < near * norms); close; close &= close - 1) {
            const int source = __ffs(close) - 1;
            const float exact = direct_distance(x.x + (long long)i * d, y.x + (long long)(j - lane + source) * d, d);
            if (lane == source) distance = exact;
        }
        if (inside) tile[row][column] = distance;
        if (mirrored && row < column) tile[column][row] = distance;
    }
}

}  // namespace

// gram [B, n, n] in, distances out; x [B, n, d], norms [B, n]. Grid (B, tiles, tiles).
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocks) pairwise_symmetric(
    float* gram, const float* x, const float* norms, float near, int n, int d
) {
    if (blockIdx.z < blockIdx.y) return;
    __shared__ float tile[kTile][kTile + 1];
    const int top = blockIdx.y * kTile, left = blockIdx.z * kTile;
    const long long matrix = blockIdx.x;
    gram += matrix * n * n;
    const bool diagonal = blockIdx.y == blockIdx.z;
    const Rows rows{x + matrix * n * d, norms + matrix * n, n};
    measure(tile, gram, rows, rows, d, near, top, left, diagonal);
    __syncthreads();
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kTileRows;
#pragma unroll
    for (int step = 0; step < 2 * kTileRows; ++step) {
        const int row = first + step / 2, column = lane + step % 2 * 32;
        if (top + row < n && left + column < n) gram[(long long)(top + row) * n + left + column] = tile[row][column];
        if (!diagonal && left + row < n && top + column < n) gram[(long long)(left + row) * n + top + column] = tile[column][row];
    }
}

// gram [q, m] in, distances out; x [q, d], y [m, d]. Grid (ceil(m/64), ceil(q/64)).
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocks) pairwise_cross(
    float* gram, const float* x, const float* y, const float* norms_x, const float* norms_y, float near, int q, int m, int d
) {
    __shared__ float tile[kTile][kTile + 1];
    const int top = blockIdx.y * kTile, left = blockIdx.x * kTile;
    measure(tile, gram, {x, norms_x, q}, {y, norms_y, m}, d, near, top, left, false);
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kTileRows;
#pragma unroll
    for (int step = 0; step < 2 * kTileRows; ++step) {  // a thread writes only what it measured itself: no barrier
        const int row = first + step / 2, column = lane + step % 2 * 32;
        if (top + row < q && left + column < m) gram[(long long)(top + row) * m + left + column] = tile[row][column];
    }
}
