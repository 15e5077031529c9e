// Spatial means of features, whose products with the Laplacian are channel weights: mean_ic = sum_p F_icp / P, in float64.
//
// Bytes: n C P sizeof(T) read and 8 n C written. The floor is the bytes over the bandwidth. PyTorch's mean with another type of result
// first writes all features in that type.
//
// Short rows have up to 64 positions. A warp has 16 neighbouring rows, which are contiguous in memory. It reads all of them at once, in
// packs of 16 bytes, into shared memory, from which two lanes add up each row. Rows of 7 x 7 are not aligned with packs, but 16 rows are.
// For long rows, a warp has one row, and each lane reads four packs at once.
//
// After the means of each image there may be probes of rounding (kdx/kernels/rounding.py): the mean absolute value of some channels
// times normal numbers. Further blocks compute them, one per image. They read a part of the features again.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;   // short rows of a warp
constexpr int kShort = 64;  // largest number of positions of a short row
constexpr int kBatch = 4;   // packs of a long row that a lane reads at once
constexpr int kProbes = 8;

// Short rows: ``height`` of up to kRows.
template <class T, int W>
__device__ double short_rows(const T* features, int height, int positions, T* tile) {
    constexpr int batch = kRows * kShort / (32 * W);
    const int lane = threadIdx.x % 32, count = height * positions, packs = count / W;
    Pack<T, W> values[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k)
        if (lane + 32 * k < packs) values[k] = load<W>(features + (lane + 32 * k) * W);
#pragma unroll
    for (int k = 0; k < batch; ++k)
        if (lane + 32 * k < packs) *reinterpret_cast<Pack<T, W>*>(tile + (lane + 32 * k) * W) = values[k];
    for (int at = packs * W + lane; at < count; at += 32) tile[at] = features[at];
    __syncwarp();
    const int row = lane % kRows;
    double sum = 0;
    if (row < height) {
        // Rows of an even length would begin in few banks, so each row begins at a different position.
        int at = lane / kRows + (positions % 2 ? 0 : 2 * row % positions);
        for (int k = lane / kRows; k < positions; k += 2) {
            sum += double(float(tile[row * positions + at]));
            at += 2;
            if (at >= positions && positions % 2 == 0) at -= positions;
        }
    }
    return sum + __shfl_xor_sync(kWarp, sum, kRows);
}

// The sum of one long row, the same in every lane.
template <class T, int W>
__device__ double long_row(const T* features, int positions) {
    const int lane = threadIdx.x % 32, packs = positions / W;
    double sum = 0;
    for (int begin = lane; begin < packs; begin += 32 * kBatch) {
        Pack<T, W> values[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
            if (begin + 32 * k < packs) values[k] = load<W>(features + (begin + 32 * k) * W);
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
            if (begin + 32 * k < packs)
#pragma unroll
                for (int w = 0; w < W; ++w) sum += double(float(values[k].value[w]));
    }
    return warp_sum(sum);
}

// ``size`` numbers [0, kProbes) of one image: the mean absolute value of every step-th channel, times normal numbers.
template <class T>
__device__ void probe(const T* features, int channels, int positions, int step, const double* drawn, double* probes) {
    __shared__ double sums[kWarps];
    const int count = (channels + step - 1) / step * positions;
    double sum = 0;
#pragma unroll 4
    for (int at = threadIdx.x; at < count; at += 32 * kWarps)
        sum += fabsf(float(features[(long long)(at / positions) * step * positions + at % positions]));
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= kProbes) return;
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
    probes[threadIdx.x] = total / count * drawn[threadIdx.x];
}

template <class T>
__device__ void average(
    const T* features, long long rows, int positions, int channels, int pack, int width, int blocks, int step, const double* drawn,
    double* means
) {
    __shared__ __align__(16) unsigned char memory[kWarps * kRows * kShort * sizeof(T)];
    if (int(blockIdx.x) >= blocks) {
        const long long image = blockIdx.x - blocks;
        probe(features + image * channels * positions, channels, positions, step, drawn + image * kProbes, means + image * width + channels);
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool is_short = positions <= kShort;
    const long long first = ((long long)blockIdx.x * kWarps + warp) * (is_short ? kRows : 1);
    if (first >= rows) return;
    features += first * positions;
    double sum;
    long long row = first;
    if (is_short) {
        const int height = int(min((long long)kRows, rows - first));
        T* tile = reinterpret_cast<T*>(memory) + warp * kRows * kShort;
        sum = pack == 16 ? short_rows<T, 16 / sizeof(T)>(features, height, positions, tile) : short_rows<T, 1>(features, height, positions, tile);
        if (lane >= height) return;
        row += lane;
    } else {
        if (pack == 16) sum = long_row<T, 16 / sizeof(T)>(features, positions);
        else if (pack == 8) sum = long_row<T, 8 / sizeof(T)>(features, positions);
        else sum = long_row<T, 1>(features, positions);
        if (lane) return;
    }
    means[row / channels * width + row % channels] = sum / positions;
}

}  // namespace

// features [n, C, P] as ``rows`` = n C rows of P positions; pack: the bytes of a load, to which rows (16 rows if they are short) are
// aligned. drawn: normal numbers [n, 8], or null. Out: means [n, width], whose first C columns are means; the next 8 are probes unless
// drawn is null. Grid (blocks for the rows, + n if there are probes).
#define KDX_MEANS(name, T)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * kWarps, 4) name(                                                               \
        const T* features, long long rows, int positions, int channels, int pack, int width, int blocks, int step, const double* drawn, \
        double* means                                                                                                                \
    ) {                                                                                                                              \
        average<T>(features, rows, positions, channels, pack, width, blocks, step, drawn, means);                                    \
    }
KDX_MEANS(means_float32, float)
KDX_MEANS(means_float16, __half)
KDX_MEANS(means_bfloat16, __nv_bfloat16)
