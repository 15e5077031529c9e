// Sums over a warp in an order that does not depend on scheduling, and loads of several elements at once.

#pragma once

#include "common.cuh"

constexpr unsigned kWarp = 0xffffffff;  // every lane

// The sum over a warp, bit for bit the same in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kWarp, value, bits);
    return value;
}

// Four sums over a warp: lane l returns the sum of value[l / 8]. Lanes exchange the half that they do not need, so this takes six
// shuffles instead of the twenty of four single sums.
__device__ __forceinline__ double warp_sum_of_four(const double (&value)[4]) {
    const int lane = threadIdx.x % 32;
    const bool high = lane & 16, odd = lane & 8;
    double first = high ? value[2] : value[0], second = high ? value[3] : value[1];
    first += __shfl_xor_sync(kWarp, high ? value[0] : value[2], 16);
    second += __shfl_xor_sync(kWarp, high ? value[1] : value[3], 16);
    double sum = (odd ? second : first) + __shfl_xor_sync(kWarp, odd ? first : second, 8);
#pragma unroll
    for (int bits = 4; bits > 0; bits /= 2) sum += __shfl_xor_sync(kWarp, sum, bits);
    return sum;
}

// W neighbours in memory, aligned to their total size so that one instruction loads them.
template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
    T value[W];
};

template <int W, class T>
__device__ __forceinline__ Pack<T, W> load(const T* from) {
    return *reinterpret_cast<const Pack<T, W>*>(from);
}
