// Included by every kernel file: the half-precision types, and the dynamic shared buffer.
//
// nvcc and NVRTC compile the kernels for a GPU. g++ (with KDX_HOST) compiles the same files for the CPU, where the tests
// run them thread by thread; host/cuda.h is the part of CUDA C++ that is available there.

#pragma once

#ifdef KDX_HOST
#include "host/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// KDX_DYNAMIC_SHARED(float, tile); declares `float* tile`, the dynamic shared memory of the launch, 16-byte aligned.
#ifdef KDX_HOST
#define KDX_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(kdx::host::dynamic_shared())
#else
#define KDX_DYNAMIC_SHARED(type, name)                          \
    extern __shared__ __align__(16) unsigned char kdx_shared[]; \
    type* name = reinterpret_cast<type*>(kdx_shared)
#endif
