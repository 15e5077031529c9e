// The part of CUDA C++ that the kernels use, for g++. Threads are fibers of one process (launch.cpp), so plain memory
// accesses need no guard and an atomic is an ordinary read and write: a fiber yields only where threads wait for one another.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

// Declarations

#define __device__
#define __host__
#define __global__ __attribute__((used))  // tests/host.py recognises kernels by it
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static const
// One block runs at a time, so static variables are shared by its threads. Their section is filled before every block.
#define __shared__ static __attribute__((section("kdx_shared")))

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;

extern uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// Vectors, aligned as on the device, so that the sanitizer finds a misaligned 16-byte load

#define KDX_VECTORS(type, name, two, four)                            \
    struct __align__(two) name##2 {                                   \
        type x, y;                                                    \
    };                                                                \
    struct __align__(four) name##4 {                                  \
        type x, y, z, w;                                              \
    };                                                                \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }  \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

KDX_VECTORS(float, float, 8, 16)
KDX_VECTORS(int, int, 8, 16)
KDX_VECTORS(unsigned, uint, 8, 16)
KDX_VECTORS(double, double, 16, 16)
#undef KDX_VECTORS

// Bits

template <class To, class From>
inline To kdx_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline int __float_as_int(float x) { return kdx_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return kdx_bits<unsigned>(x); }
inline float __int_as_float(int x) { return kdx_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return kdx_bits<float>(x); }
inline long long __double_as_longlong(double x) { return kdx_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return kdx_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

// Half precision: storage in 16 bits, arithmetic in float, rounded to nearest even

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x);
    operator float() const;
};

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x);
    operator float() const;
};

inline __half::operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return kdx_bits<float>(sign | 0x7f800000 | fraction << 13);  // infinite, or not a number
    const float size = exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
    return sign ? -size : size;
}

inline __half::__half(float x) {
    const uint32_t all = kdx_bits<uint32_t>(x), size = all & 0x7fffffff;
    bits = uint16_t(all >> 16 & 0x8000);
    if (size > 0x7f800000) bits = 0x7fff;             // not a number
    else if (size >= 0x477ff000) bits |= 0x7c00;      // at least half a step above 65504
    else if (size < 0x38800000) bits |= uint16_t(nearbyintf(ldexpf(fabsf(x), 24)));  // below 2^-14, steps are 2^-24
    else bits |= uint16_t((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

inline __nv_bfloat16::operator float() const { return kdx_bits<float>(uint32_t(bits) << 16); }

inline __nv_bfloat16::__nv_bfloat16(float x) {
    const uint32_t all = kdx_bits<uint32_t>(x);
    bits = (all & 0x7fffffff) > 0x7f800000 ? 0x7fff : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
}

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

struct __align__(4) __half2 {
    __half x, y;
};
struct __align__(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }

// Arithmetic

#define KDX_EXTREMES(type)                                      \
    inline type min(type a, type b) { return b < a ? b : a; }   \
    inline type max(type a, type b) { return a < b ? b : a; }
KDX_EXTREMES(int)
KDX_EXTREMES(unsigned)
KDX_EXTREMES(long long)
KDX_EXTREMES(unsigned long long)
#undef KDX_EXTREMES
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }

// Memory

template <class T>
inline T __ldg(const T* from) {
    return *from;
}
template <class T>
inline T kdx_exchange(T* at, T next) {
    const T old = *at;
    *at = next;
    return old;
}
inline int atomicAdd(int* at, int x) { return kdx_exchange(at, *at + x); }
inline unsigned atomicAdd(unsigned* at, unsigned x) { return kdx_exchange(at, *at + x); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long x) { return kdx_exchange(at, *at + x); }
inline float atomicAdd(float* at, float x) { return kdx_exchange(at, *at + x); }
inline double atomicAdd(double* at, double x) { return kdx_exchange(at, *at + x); }
inline int atomicMax(int* at, int x) { return kdx_exchange(at, max(*at, x)); }
inline int atomicMin(int* at, int x) { return kdx_exchange(at, min(*at, x)); }
inline unsigned atomicMax(unsigned* at, unsigned x) { return kdx_exchange(at, max(*at, x)); }
inline unsigned atomicMin(unsigned* at, unsigned x) { return kdx_exchange(at, min(*at, x)); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Operations in which threads wait for one another

namespace kdx::host {

void* dynamic_shared();

/// Waits until every thread of the block has reached this barrier.
void barrier(const char* file, int line);

/// The values that the lanes of a warp operation post, and the mask of these lanes.
struct Meeting {
    uint64_t posted[32];
    unsigned lanes;
};

/// Waits until every lane of the mask that has not exited has reached the same operation with the same mask.
Meeting meet(const char* operation, unsigned mask, uint64_t posted);

unsigned lane();

/// The value of the lane ``source`` of a meeting; an error if that lane does not take part.
uint64_t value_of(const Meeting& meeting, unsigned source);

template <class T, class Source>
T shuffle(const char* operation, unsigned mask, T value, int width, Source source) {
    static_assert(sizeof(T) <= 8);
    uint64_t posted = 0;
    memcpy(&posted, &value, sizeof value);
    const Meeting meeting = meet(operation, mask, posted);
    const int own = int(lane()), start = own & ~(width - 1), from = source(own, start);
    const uint64_t received = value_of(meeting, unsigned(from < start || from >= start + width ? own : from));
    memcpy(&value, &received, sizeof value);
    return value;
}

}  // namespace kdx::host

#define __syncthreads() kdx::host::barrier(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffff) { kdx::host::meet("__syncwarp", mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return kdx::host::shuffle("__shfl_sync", mask, value, width, [=](int, int start) { return start + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return kdx::host::shuffle("__shfl_xor_sync", mask, value, width, [=](int own, int) { return own ^ bits; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return kdx::host::shuffle("__shfl_down_sync", mask, value, width, [=](int own, int) { return own + int(by); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return kdx::host::shuffle("__shfl_up_sync", mask, value, width, [=](int own, int) { return own - int(by); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const kdx::host::Meeting meeting = kdx::host::meet("__ballot_sync", mask, predicate != 0);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (meeting.lanes >> lane & 1) votes |= unsigned(meeting.posted[lane]) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
