// Inner products of centred matrices with one matrix whose images are permuted, for many permutations. No permuted matrix is stored.
//
//     out_pk = f sum_ij A_k,ij B_(p_i)(p_j),    A_k and B symmetric with zero diagonals, so that the pairs j < i suffice.
//
// A warp has one permutation, and a block has eight. They read the same rows of A, mostly from L1; the entries of B that a warp gathers
// lie in one row. Blocks share the rows: each takes every chunks-th row and writes its part of the sums.
//
// permuted_labels does the same for the distances of labels, where the A_k have rows that sum to zero:
//
//     sum_ij A_k,ij B_(p_i)(p_j) = -sqrt(2) sum_ij A_k,ij over the pairs of one label,
//
// so pairs gather no entries of B. A warp has two permutations, whose labels are in shared memory.
//
// permuted_products  Bytes: 8 n^2 (K + 8) per eight permutations, from L2. Operations: K n^2 / 2 multiplications and additions in float64
// per permutation. The floor is the time of the gathered loads: P n^2 / 2 of 8 bytes.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kGroup = 4;  // matrices of a block
constexpr int kImages = 256;  // with labels
constexpr int kEach = 2;      // permutations of a warp, with labels

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

// labels [n], n <= 256; factor: of the sums over pairs. The rest is as above. Grid (ceil(P/16), chunks, ceil(K/4)).
extern "C" __global__ void __launch_bounds__(32 * kWarps, 3) permuted_labels(
    const double* matrices, const long long* labels, const long long* permutations, int count, int n, int total, double factor, double* partial
) {
    __shared__ long long codes[kWarps][kEach][kImages];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = (blockIdx.x * kWarps + warp) * kEach, first = blockIdx.z * kGroup;
    if (place >= total) return;
    const int members = min(kGroup, count - first), each = min(kEach, total - place);
    for (int q = 0; q < each; ++q)
        for (int j = lane; j < n; j += 32) codes[warp][q][j] = labels[permutations[(long long)(place + q) * n + j]];
    __syncwarp();
    matrices += (long long)first * n * n;
    double sum[kEach][kGroup] = {};
    for (int i = blockIdx.y; i < n; i += gridDim.y) {
        long long own[kEach];
#pragma unroll
        for (int q = 0; q < kEach; ++q) own[q] = q < each ? codes[warp][q][i] : 0;
#pragma unroll 4
        for (int j = lane; j < i; j += 32) {
            bool same[kEach];
#pragma unroll
            for (int q = 0; q < kEach; ++q) same[q] = q < each && codes[warp][q][j] == own[q];
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                const double value = k < members ? matrices[((long long)k * n + i) * n + j] : 0.0;
#pragma unroll
                for (int q = 0; q < kEach; ++q) sum[q][k] += same[q] ? value : 0.0;
            }
        }
    }
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
        const double whole = warp_sum_of_four(sum[q]);
        if (q < each && lane % 8 == 0 && lane / 8 < members)
            partial[((long long)blockIdx.y * total + place + q) * count + first + lane / 8] = 2 * factor * whole;
    }
}
