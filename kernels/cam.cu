// Class activation maps from features and channel weights, in one read of the features.
//
//     map_p = ReLU(sum_c w_c F_cp)
//
// Bytes: n C H W sizeof(T) read once, 4 n H W written, and 8 H W for the partial map of each share of the channels. Operations: 2 per
// element. The floor is the bytes over the bandwidth.
//
// An image's features are read as a flat array of packs of 16 bytes. After lcm(pack, H W) elements, which is one period, packs fall on
// the same positions of later channels. So a thread owns one pack of the period, steps by whole periods, and keeps its sums in
// registers for any H W: 7 x 7 maps, whose rows are not aligned with packs, take periods of 49 packs, five of them side by side in 256
// threads. Periods longer than a block are divided into slices of blocks. If the packs of an image would not be aligned, or a pack would
// span more than two channels, the features are read one element at a time in the same way.
//
// The blocks of an image share its channels and write partial maps. The last block to finish adds them up in order, so the result
// does not depend on which block that was.
//
// cam_weights  Prepares the channel weights of several maps: as float32 numbers near one with an exponent per image, because weights are
//              large if features are small; as plain float32; and whether they are more than rounding (kdx/kernels/rounding.py).
//              Bytes: 8 n C read and 8 n C written per map.

#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr double kFinite = 1.7976931348623157e308;  // the largest double; NVRTC has no INFINITY, which comes from a header of the C library

struct Image {
    int channels, height, width;
    int period;  // packs
    int lanes;   // packs of the period in this block: all, or a slice
    int periods_per_block;
};

// This block's share of the weighted sum, into partial [positions].
template <class T, int W>
__device__ void weighted_sum(const T* features, const float* weights, const Image& image, float* shared, float* partial) {
    const int positions = image.height * image.width, packs = int((long long)image.channels * positions / W);
    const int step = image.period * W / positions;  // channels of a period
    const int side_by_side = kThreads / image.lanes, own = threadIdx.x / image.lanes;
    const int pack = blockIdx.y * image.lanes + threadIdx.x % image.lanes;
    const int channel = pack * W / positions, boundary = positions - pack * W % positions;  // elements before the next channel

    float sum[W] = {};
    if (own < side_by_side && pack < image.period) {
        const int periods = (packs - pack + image.period - 1) / image.period;  // that contain this pack
        const int begin = blockIdx.z * image.periods_per_block, end = min(periods, begin + image.periods_per_block);
#pragma unroll (W == 8 ? 2 : 4)
        for (int at = begin + own; at < end; at += side_by_side) {
            const Pack<T, W> values = load<W>(features + ((long long)at * image.period + pack) * W);
            const float* weight = weights + at * step + channel;
            const float before = weight[0], after = boundary < W ? weight[1] : before;
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] += (k < boundary ? before : after) * float(values.value[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) shared[threadIdx.x * W + k] = sum[k];
    __syncthreads();
    // Element e of the period has position e mod H W: a position occurs once for each channel of the period.
    const int width = image.lanes * W, first = blockIdx.y * width, count = min(width, positions - first);
    for (int position = threadIdx.x; position < count; position += kThreads) {
        float total = 0;
        for (int group = 0; group < side_by_side; ++group)
            for (int repeat = 0; repeat < step; ++repeat) total += shared[group * width + repeat * positions + position];
        partial[first + position] = total;
    }
}

// Whether all other blocks of the image have written their partial maps, which this block can then read.
__device__ bool last_of_image(int* finished) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(finished + blockIdx.x, 1) == int(gridDim.y * gridDim.z) - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// The map from the partial maps [splits, positions], times 2^exponent.
__device__ void finish(const float* partial, int positions, int exponent, float* map) {
    for (int position = threadIdx.x; position < positions; position += kThreads) {
        float sum = 0;
        for (int split = 0; split < int(gridDim.z); ++split) sum += partial[(long long)split * positions + position];
        map[position] = ldexpf(sum < 0 ? 0.0f : sum, exponent);  // NaN stays NaN
    }
}

}  // namespace

// features [n, C, H, W], weights [n, C], exponents [n] or null for zeros, partial [n, splits, H W], finished [n] zero on entry; out: maps
// [n, H, W].
// ``wide``: packs of 16 bytes, aligned. Grid (n, slices of the period, splits of the channels).
#define KDX_CAM(name, T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads) name(                                                               \
        const T* features, const float* weights, int channels, int height, int width, int period, int lanes,                   \
        int periods_per_block, int wide, const int* exponents, float* partial, int* finished, float* maps                      \
    ) {                                                                                                                        \
        __shared__ float shared[kThreads * 16 / sizeof(T)];                                                                    \
        const Image image{channels, height, width, period, lanes, periods_per_block};                                          \
        const long long at = blockIdx.x, positions = height * width;                                                           \
        features += at * channels * positions;                                                                                 \
        weights += at * channels;                                                                                              \
        partial += at * gridDim.z * positions;                                                                                 \
        if (wide)                                                                                                              \
            weighted_sum<T, 16 / sizeof(T)>(features, weights, image, shared, partial + blockIdx.z * positions);               \
        else                                                                                                                   \
            weighted_sum<T, 1>(features, weights, image, shared, partial + blockIdx.z * positions);                            \
        if (last_of_image(finished)) finish(partial, int(positions), exponents ? exponents[at] : 0, maps + at * positions);    \
    }
KDX_CAM(cam_float32, float)
KDX_CAM(cam_float16, __half)
KDX_CAM(cam_bfloat16, __nv_bfloat16)

// weights [S, n, C + probes]; relative: the rounding of the features. Out: normal and plain [S, n, C] with normal 2^exponents = plain,
// exponents [S, n], real [S, n]: one where a weight is larger than its rounding; and finished [S, n], zeros. Grid (n, S).
extern "C" __global__ void __launch_bounds__(kThreads) cam_weights(
    const double* weights, int channels, int probes, double relative, float* normal, float* plain, int* exponents, double* real, int* finished
) {
    __shared__ double largest[kThreads / 32];
    const long long image = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    weights += image * (channels + probes);
    double own = 0;
    for (int channel = threadIdx.x; channel < channels; channel += kThreads) own = fmax(own, fabs(weights[channel]));
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) own = fmax(own, __shfl_xor_sync(kWarp, own, bits));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = own;
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) own = fmax(own, largest[warp]);
    int exponent = 0;
    if (own <= kFinite) frexp(own, &exponent);
    for (int channel = threadIdx.x; channel < channels; channel += kThreads) {
        normal[image * channels + channel] = float(ldexp(weights[channel], -exponent));
        plain[image * channels + channel] = float(weights[channel]);
    }
    if (threadIdx.x) return;
    double squares = 0;
    for (int probe = 0; probe < probes; ++probe) squares += weights[channels + probe] * weights[channels + probe];
    exponents[image] = exponent;
    real[image] = own > relative * sqrt(squares / probes);
    finished[image] = 0;
}
