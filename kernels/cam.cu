// Class activation maps from features and channel weights, and their rescaled pictures, in one read of the features.
//
//     map_p = ReLU(sum_c w_c F_cp),    picture = bilinear resize of (map - min)/(max - min), or zero where the map is constant.
//
// Bytes: n C H W sizeof(T) read once, 4 n h w written, and 8 H W for the partial map of each share of the channels. Operations: 2 an
// element. The floor is the bytes over the bandwidth.
//
// An image's features are read as a flat array of packs of 16 bytes. After lcm(pack, H W) elements, a period, packs fall on the same
// positions of later channels. So a thread owns one pack of the period, steps by whole periods, and keeps its sums in registers,
// whatever H W is: 7 x 7 maps, whose rows no pack is aligned with, take periods of 49 packs, five of them side by side in 256
// threads. Periods longer than a block are cut into slices of blocks. Images whose packs would not be aligned, or whose pack would
// span more than two channels, are read an element at a time in the same way.
//
// Blocks of an image share its channels and leave partial maps. The last to finish adds them up in order, so that the result does
// not depend on which that was.

#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;

struct Image {
    int channels, height, width;
    int period;  // packs
    int lanes;   // packs of the period in this block: all, or a slice
    int each;    // periods of this block
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
        const int periods = (packs - pack + image.period - 1) / image.period;  // that have this pack
        const int begin = blockIdx.z * image.each, end = min(periods, begin + image.each);
#pragma unroll 4
        for (int at = begin + own; at < end; at += side_by_side) {
            const Pack<T, W> found = load<W>(features + ((long long)at * image.period + pack) * W);
            const float* weight = weights + at * step + channel;
            const float before = weight[0], after = boundary < W ? weight[1] : before;
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] += (k < boundary ? before : after) * float(found.value[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) shared[threadIdx.x * W + k] = sum[k];
    __syncthreads();
    // Element e of the period has position e mod H W: it stands there once for each channel of the period.
    const int width = image.lanes * W, first = blockIdx.y * width, count = min(width, positions - first);
    for (int position = threadIdx.x; position < count; position += kThreads) {
        float total = 0;
        for (int group = 0; group < side_by_side; ++group)
            for (int repeat = 0; repeat < step; ++repeat) total += shared[group * width + repeat * positions + position];
        partial[first + position] = total;
    }
}

// Whether every other block of the image has left its partial map, for all to read.
__device__ bool last_of_image(int* finished) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(finished + blockIdx.x, 1) == int(gridDim.y * gridDim.z) - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// The least and the greatest over the block, for every thread.
__device__ void extremes(float& low, float& high) {
    __shared__ float lows[kThreads / 32], highs[kThreads / 32];
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
        low = min(low, __shfl_xor_sync(kWarp, low, bits));
        high = max(high, __shfl_xor_sync(kWarp, high, bits));
    }
    if (threadIdx.x % 32 == 0) lows[threadIdx.x / 32] = low, highs[threadIdx.x / 32] = high;
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) low = min(low, lows[warp]), high = max(high, highs[warp]);
}

// Where a row or column of the picture lies between two of the map: pixel centres are at halves, and the border is repeated.
struct Between {
    int before, after;
    float share;  // of ``after``

    __device__ Between(int at, float ratio, int size) {
        const float place = max(ratio * (at + 0.5f) - 0.5f, 0.0f);
        before = min(int(place), size - 1);
        after = min(before + 1, size - 1);
        share = place - before;
    }
};

__device__ void resize(const float* scaled, const Image& image, float* picture, int height, int width) {
    const float down = float(image.height) / height, across = float(image.width) / width;
    for (int y = threadIdx.x / 32; y < height; y += kThreads / 32) {
        const Between row(y, down, image.height);
        const float* above = scaled + row.before * image.width;
        const float* below = scaled + row.after * image.width;
        for (int x = threadIdx.x % 32; x < width; x += 32) {
            const Between column(x, across, image.width);
            const float top = (1 - column.share) * above[column.before] + column.share * above[column.after];
            const float bottom = (1 - column.share) * below[column.before] + column.share * below[column.after];
            picture[(long long)y * width + x] = (1 - row.share) * top + row.share * bottom;
        }
    }
}

// The map from the partial ones [splits, positions]; its scaled copy, from which the picture is resized, takes the first one's place.
__device__ void finish(float* partial, const Image& image, float* map, float* picture, int height, int width) {
    const int positions = image.height * image.width;
    float low = __int_as_float(0x7f800000), high = 0;  // no map is below zero
    for (int position = threadIdx.x; position < positions; position += kThreads) {
        float sum = 0;
        for (int split = 0; split < int(gridDim.z); ++split) sum += partial[(long long)split * positions + position];
        sum = sum < 0 ? 0.0f : sum;  // and a NaN stays
        map[position] = sum;
        low = min(low, sum);
        high = max(high, sum);
    }
    if (!picture) return;
    extremes(low, high);
    const float span = high > low ? high - low : 1.0f;
    for (int position = threadIdx.x; position < positions; position += kThreads) partial[position] = (map[position] - low) / span;
    __syncthreads();
    resize(partial, image, picture, height, width);
}

}  // namespace

// features [n, C, H, W], weights [n, C], partial [n, splits, H W], finished [n] zero on entry; out: maps [n, H, W], pictures [n, h, w]
// or null. ``wide``: packs of 16 bytes, aligned. Grid (n, slices of the period, splits of the channels).
#define KDX_CAM(name, T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads) name(                                                               \
        const T* features, const float* weights, int channels, int height, int width, int period, int lanes, int each, int wide, \
        float* partial, int* finished, float* maps, float* pictures, int picture_height, int picture_width                     \
    ) {                                                                                                                        \
        __shared__ float shared[kThreads * 16 / sizeof(T)];                                                                    \
        const Image image{channels, height, width, period, lanes, each};                                                       \
        const long long at = blockIdx.x, positions = height * width;                                                           \
        features += at * channels * positions;                                                                                 \
        weights += at * channels;                                                                                              \
        partial += at * gridDim.z * positions;                                                                                 \
        if (wide)                                                                                                              \
            weighted_sum<T, 16 / sizeof(T)>(features, weights, image, shared, partial + blockIdx.z * positions);               \
        else                                                                                                                   \
            weighted_sum<T, 1>(features, weights, image, shared, partial + blockIdx.z * positions);                            \
        if (!last_of_image(finished)) return;                                                                                  \
        float* picture = pictures ? pictures + at * picture_height * picture_width : nullptr;                                  \
        finish(partial, image, maps + at * positions, picture, picture_height, picture_width);                                 \
    }
KDX_CAM(cam_float32, float)
KDX_CAM(cam_float16, __half)
KDX_CAM(cam_bfloat16, __nv_bfloat16)
