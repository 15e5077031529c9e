// From Gram products to Euclidean distances, in place, with their row and column sums.
//
//     D_ij = sqrt(max(0, |x_i|^2 + |y_j|^2 - 2 G_ij)),    G = X Y^T,    sums in float64.
//
// Where D^2 is tiny beside the norms that difference is rounding. A warp then reads both rows and takes sum_k (x_ik - y_jk)^2.
//
// pairwise_symmetric  Y is X: blocks above the diagonal read G once and write D twice, so that D is symmetric bit for bit, with
//                     zeros on the diagonal. Any number of matrices.
//                     Bytes: 2 n^2 read, 4 n^2 written for each; operations: a handful an element. The floor is 6 n^2 over the
//                     bandwidth.
// pairwise_cross      Bytes: 4 q m read and 4 q m written. The floor is 8 q m over the bandwidth.
//
// A block has one 64 x 64 tile. Lanes run along a row, so a warp's request is 128 contiguous bytes whatever the width, and each
// thread has sixteen loads under way before it uses the first: 16-byte loads would add nothing but a second path.
// Sums: a tile leaves one partial for each of its rows and columns (1 KiB for a tile of 16), which the caller adds up in order. Every
// distance is added in float64: U-centring subtracts the sums again, and what is left must not be their rounding.

#include "reduce.cuh"

namespace {

constexpr int kTile = 64;
constexpr int kWarps = 8;
constexpr int kTileRows = kTile / kWarps;  // of a warp
constexpr int kBlocks = 4;                 // of a multiprocessor at least: left to itself, nvcc makes room for six, and spills

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
        squared = squared < 0 ? 0.0f : squared;  // and not fmaxf, which would hide a NaN
        float distance = sqrtf(squared);
        for (unsigned close = __ballot_sync(kWarp, squared < near * norms); close; close &= close - 1) {
            const int source = __ffs(close) - 1;
            const float found = direct_distance(x.x + (long long)i * d, y.x + (long long)(j - lane + source) * d, d);
            if (lane == source) distance = found;
        }
        if (inside) tile[row][column] = distance;
        if (mirrored && row < column) tile[column][row] = distance;
    }
}

// Row sums of the tile by one half of 128 threads, column sums by the other.
__device__ void add_up(const float (&tile)[kTile][kTile + 1], double* rows, int row_count, double* columns, int column_count) {
    const int line = threadIdx.x % kTile;
    const bool down = threadIdx.x >= kTile;
    double* sums = down ? columns : rows;
    if (threadIdx.x >= 2 * kTile || !sums || line >= (down ? column_count : row_count)) return;
    double sum = 0;
#pragma unroll 8
    for (int k = 0; k < kTile; ++k) sum += down ? tile[k][line] : tile[line][k];
    sums[line] = sum;
}

}  // namespace

// gram [B, n, n] in, distances out; x [B, n, d], norms [B, n]; sums [B, tiles, n]. Grid (B, tiles, tiles).
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocks) pairwise_symmetric(
    float* gram, const float* x, const float* norms, float near, int n, int d, double* sums
) {
    if (blockIdx.z < blockIdx.y) return;
    __shared__ float tile[kTile][kTile + 1];
    const int top = blockIdx.y * kTile, left = blockIdx.z * kTile;
    const long long matrix = blockIdx.x;
    gram += matrix * n * n;
    sums += matrix * gridDim.z * n;
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
    add_up(
        tile, sums + (long long)blockIdx.z * n + top, n - top, diagonal ? nullptr : sums + (long long)blockIdx.y * n + left, n - left
    );
}

// gram [q, m] in, distances out; x [q, d], y [m, d]; row_sums [ceil(m/64), q], column_sums [ceil(q/64), m]. Grid (ceil(m/64), ceil(q/64)).
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocks) pairwise_cross(
    float* gram, const float* x, const float* y, const float* norms_x, const float* norms_y, float near, int q, int m, int d,
    double* row_sums, double* column_sums
) {
    __shared__ float tile[kTile][kTile + 1];
    const int top = blockIdx.y * kTile, left = blockIdx.x * kTile;
    measure(tile, gram, {x, norms_x, q}, {y, norms_y, m}, d, near, top, left, false);
    __syncthreads();
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kTileRows;
#pragma unroll
    for (int step = 0; step < 2 * kTileRows; ++step) {
        const int row = first + step / 2, column = lane + step % 2 * 32;
        if (top + row < q && left + column < m) gram[(long long)(top + row) * m + left + column] = tile[row][column];
    }
    add_up(tile, row_sums + (long long)blockIdx.x * q + top, q - top, column_sums + (long long)blockIdx.y * m + left, m - left);
}
