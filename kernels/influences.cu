// The influences of single images on the inner products of U-centred matrices: L_i and Q_ij of kdx/kernels/moments.py, with mean zero.
//
// Let h = A B entry by entry, X = A B the product of the matrices, c_i = X_ii = sum_j h_ij, and S = sum_i c_i. If the rows of the matrices
// sum to zero, the inner products without some images are
//
//     <A,B> without i, times (n-1)(n-4):         S - 2 (n-2)/(n-3) c_i
//     <A,B> without i and j, times (n-2)(n-5):   S - 2 (n-3)/(n-4) (c_i + c_j) - 2/(n-4) (X_ij + X_ji)
//                                                + (2 + 4/(n-4) + 4/((n-3)(n-4))) h_ij.
//
// Both influences are linear in these numbers, and so are their means: sum_ij h_ij = S, and the sum of the X_ij off the diagonal is -S.
//
//     L_i  = s (c_i - S/n),    s = 2 (n-2)/((n-3)(n-4))
//     Q_ij = b (c_i + c_j - 2 S/n) + g (h_ij - S/(n(n-1))) + d (X_ij + X_ji + 2 S/(n(n-1)))      i != j
//
// The products X of all matrices come from one call of cuBLAS. Bytes: 32 n^2 read and 8 n^2 written per inner product.

#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;

}  // namespace

// matrices [K, n, n]; gram [K n, K n], <row u of A_a, row v of A_b> at (a n + u, b n + v); n <= 256. Out: first [m, n] and unless null second
// [m, n, n] of the pairs a <= b in the order of the upper triangle. Grid (n, m).
extern "C" __global__ void __launch_bounds__(kThreads) influences(
    const double* matrices, const double* gram, int count, int n, double s, double b, double g, double d, double* first, double* second
) {
    __shared__ double own[kThreads], sums[kThreads / 32];
    const int u = blockIdx.x, v = threadIdx.x;
    int left = 0, place = blockIdx.y;
    for (; place >= count - left; ++left) place -= count - left;
    const int right = left + place;
    const long long width = (long long)count * n, at = (long long)left * n, to = (long long)right * n;

    own[v] = v < n ? gram[(at + v) * width + to + v] : 0.0;
    const double part = warp_sum(own[v]);
    if (v % 32 == 0) sums[v / 32] = part;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += sums[warp];

    const double mean = sum / n, pair_mean = mean / (n - 1);
    if (v == 0) first[(long long)blockIdx.y * n + u] = s * (own[u] - mean);
    if (v >= n || !second) return;
    const double product = matrices[(at + u) * n + v] * matrices[(to + u) * n + v];
    const double mixed = gram[(at + u) * width + to + v] + gram[(to + u) * width + at + v];
    const double value = b * (own[u] + own[v] - 2 * mean) + g * (product - pair_mean) + d * (mixed + 2 * pair_mean);
    second[((long long)blockIdx.y * n + u) * n + v] = u == v ? 0.0 : value;
}
