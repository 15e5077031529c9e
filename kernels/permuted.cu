// Inner products of centred matrices with one matrix whose images are permuted, for many permutations, without a permuted matrix.
//
//     out_pk = f sum_ij A_k,ij B_(p_i)(p_j),    A_k and B symmetric with zero diagonals, so that the pairs j < i suffice.
//
// A warp has one permutation, and a block has eight. They read the same rows of A, mostly from L1; the entries of B that a warp gathers
// lie in one row. Blocks share the rows: each takes every chunks-th row and writes its part of the sums.
//
// Bytes: 8 n^2 (K + 8) per eight permutations, from L2. Operations: K n^2 / 2 multiplications and additions in float64 per permutation.
// The floor is the time of the gathered loads: P n^2 / 2 of 8 bytes.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kGroup = 4;  // matrices of a block

}  // namespace

// matrices [K, n, n], permuted [n, n], permutations [P, n]; out: partial [chunks, P, K]. Grid (ceil(P/8), chunks, ceil(K/4)).
extern "C" __global__ void __launch_bounds__(32 * kWarps) permuted_products(
    const double* matrices, const double* permuted, const long long* permutations, int count, int n, int total, double factor, double* partial
) {
    const int lane = threadIdx.x % 32, place = blockIdx.x * kWarps + threadIdx.x / 32, first = blockIdx.z * kGroup;
    if (place >= total) return;
    const long long* at = permutations + (long long)place * n;
    const int members = min(kGroup, count - first);
    matrices += (long long)first * n * n;
    double sum[kGroup] = {};
    for (int i = blockIdx.y; i < n; i += gridDim.y) {
        const double* row = permuted + at[i] * n;
#pragma unroll 4
        for (int j = lane; j < i; j += 32) {
            const double value = row[at[j]];
#pragma unroll
            for (int k = 0; k < kGroup; ++k)
                if (k < members) sum[k] += matrices[((long long)k * n + i) * n + j] * value;
        }
    }
    const double whole = warp_sum_of_four(sum);
    if (lane % 8 || lane / 8 >= members) return;
    partial[((long long)blockIdx.y * total + place) * count + first + lane / 8] = 2 * factor * whole;
}
