// Spatial means of features, whose products with the Laplacian are channel weights: mean_ic = sum_p F_icp / P, in float64.
//
// Bytes: n C P sizeof(T) read and 8 n C written. The floor is the bytes over the bandwidth.
//
// A warp has 32 neighbouring rows of P elements, which are one piece of memory. It reads them as such, a part at a time, into shared
// memory, from which each lane adds up one row in order. PyTorch's mean with another type of result first writes all features in that type.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kRows = 32;  // of a warp
constexpr int kPart = 32;  // elements of each row at a time

template <class T>
__device__ void average(const T* features, long long rows, int positions, double* means) {
    __shared__ float tile[kWarps][kRows][kPart + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long first = ((long long)blockIdx.x * kWarps + warp) * kRows;
    if (first >= rows) return;
    const int height = int(min((long long)kRows, rows - first));
    features += first * positions;
    double sum = 0;
    for (int begin = 0; begin < positions; begin += kPart) {
        const int width = min(kPart, positions - begin);
        if (positions <= kPart) {
#pragma unroll 4
            for (int at = lane; at < height * width; at += 32) tile[warp][at / width][at % width] = float(features[at]);
        } else if (lane < width) {
#pragma unroll 8
            for (int row = 0; row < height; ++row) tile[warp][row][lane] = float(features[(long long)row * positions + begin + lane]);
        }
        __syncwarp();
        if (lane < height)
            for (int k = 0; k < width; ++k) sum += double(tile[warp][lane][k]);
        __syncwarp();
    }
    if (lane < height) means[first + lane] = sum / positions;
}

}  // namespace

// features [rows, positions]; out: means [rows]. Grid (ceil(rows/256)).
#define KDX_MEANS(name, T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * kWarps) name(const T* features, long long rows, int positions, double* means) { \
        average<T>(features, rows, positions, means);                                                                        \
    }
KDX_MEANS(means_float32, float)
KDX_MEANS(means_float16, __half)
KDX_MEANS(means_bfloat16, __nv_bfloat16)
