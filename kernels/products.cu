// Inner products of U-centred distance matrices from the raw distances, which are read once. No centred matrix is written.
//
//     <A,B> = (sum_ij D_ij E_ij - 2/(n-2) sum_i r_i s_i + t u/((n-1)(n-2))) / (n(n-3)),
//
// with r, s the row sums of D, E and t, u their totals. If distances are large beside their spread, the difference cancels most of its
// terms. Centring removes a constant off the diagonal, so a constant close to the distances (`typical`) is subtracted from each matrix
// first, and every sum is float64, in which a product of two float32 numbers is exact.
//
// products_{float32,float64}  For K matrices in groups of four: a block has some rows and a pair of groups, a warp has one row at a
//                     time. Sixteen products of a pair of groups stay in registers. Writes partial sums per block, and row sums.
//                     Bytes: sizeof(T) K n^2 per batch, once from memory; with more than four matrices, a group is read again for each
//                     group, by blocks that run side by side, mostly from L2. Operations: K(K+1)/2 + 3K in float64 per element.
//                     If float64 runs at half the rate of float32, the floor is the bytes over the bandwidth. If it runs at a 64th
//                     (consumer GPUs), the operations take two to four times as long by count.
// products_close      Adds the partial sums in order and evaluates the formula. O(K^2 n) per batch.
// products_bordered   The same for a set of m images and one more image, with only its distances to the m: n = m + 1, without the
//                     n x n matrices. O(K^2 m) per query.
// products_centred    The centred matrices, from the results. Bytes: 8 n^2 read and 8 n^2 written per matrix.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kGroup = 4;  // matrices
constexpr double kRounding = 1e-14;  // of a sum of squares: less than this after centring counts as zero

// A value close to the distances of a matrix: the mean of up to 32 distances of its first row, the same in every block.
template <class T>
__device__ double typical(const T* d, int n) {
    const int j = threadIdx.x % 32 + 1;
    return warp_sum(j < n ? double(d[j]) : 0.0) / min(n - 1, 32);
}

// Distances of up to four matrices in one row, minus their typical values; zero on the diagonal and for missing matrices.
template <class T, int W>
struct Group {
    const T* d;
    long long stride;
    int count;
    double shift[kGroup];

    __device__ Group(const T* batch, long long stride, int first, int matrices, int n)
        : d(batch + first * stride), stride(stride), count(min(kGroup, matrices - first)) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) shift[k] = k < count ? typical(d + k * stride, n) : 0.0;
    }

    __device__ void read(Pack<T, W> (&packs)[kGroup], long long at) const {
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
            if (k < count) packs[k] = load<W>(d + k * stride + at);
    }

    __device__ void shifted(double (&value)[kGroup], const Pack<T, W> (&packs)[kGroup], int w, bool diagonal) const {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) value[k] = k < count && !diagonal ? double(packs[k].value[w]) - shift[k] : 0.0;
    }
};

// Products of a group with itself, and its row sums.
template <class T, int W>
__device__ void within(double (&product)[kGroup][kGroup], const Group<T, W>& group, int n, int begin, int end, double* rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = begin + warp; i < end; i += kWarps) {
        double row[kGroup] = {};
#pragma unroll 2
        for (int j = lane * W; j < n; j += 32 * W) {
            Pack<T, W> packs[kGroup];
            group.read(packs, (long long)i * n + j);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                double value[kGroup];
                group.shifted(value, packs, w, i == j + w);
#pragma unroll
                for (int a = 0; a < kGroup; ++a) {
                    row[a] += value[a];
#pragma unroll
                    for (int b = a; b < kGroup; ++b) product[a][b] += value[a] * value[b];
                }
            }
        }
        const double sum = warp_sum_of_four(row);
        if (lane % 8 == 0 && lane / 8 < group.count) rows[(long long)(lane / 8) * n + i] = sum;
    }
}

// Products of one group with another.
template <class T, int W>
__device__ void across(
    double (&product)[kGroup][kGroup], const Group<T, W>& left, const Group<T, W>& right, int n, int begin, int end
) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = begin + warp; i < end; i += kWarps) {
        for (int j = lane * W; j < n; j += 32 * W) {
            Pack<T, W> left_packs[kGroup], right_packs[kGroup];
            left.read(left_packs, (long long)i * n + j);
            right.read(right_packs, (long long)i * n + j);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                double x[kGroup], y[kGroup];
                left.shifted(x, left_packs, w, i == j + w);
                right.shifted(y, right_packs, w, i == j + w);
#pragma unroll
                for (int a = 0; a < kGroup; ++a)
#pragma unroll
                    for (int b = 0; b < kGroup; ++b) product[a][b] += x[a] * y[b];
            }
        }
    }
}

// Group pair p <= q at a place in the order (0,0), (0,1), (1,1), (0,2), ...
__device__ void pair_at(int place, int& p, int& q) {
    for (q = 0; place > q; ++q) place -= q + 1;
    p = place;
}

template <class T, int W>
__device__ void sum_rows(
    const T* d, long long batch_stride, long long matrix_stride, int matrices, int n, int pairs, int rows_per_block, double* partial,
    double* rows, double* shifts
) {
    __shared__ double warps[kWarps][kGroup * kGroup];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int batch = blockIdx.x / pairs, begin = blockIdx.y * rows_per_block, end = min(n, begin + rows_per_block);
    int p, q;
    pair_at(blockIdx.x % pairs, p, q);
    d += batch * batch_stride;
    double product[kGroup][kGroup] = {};
    if (p == q) {
        const Group<T, W> group(d, matrix_stride, p * kGroup, matrices, n);
        const int first = batch * matrices + p * kGroup;
        within(product, group, n, begin, end, rows + (long long)first * n);
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
            if (blockIdx.y == 0 && threadIdx.x == 0 && k < group.count) shifts[first + k] = group.shift[k];
    } else {
        constexpr int half = (W + 1) / 2;  // of a pack: eight whole packs would spill registers
        const Group<T, half> left(d, matrix_stride, p * kGroup, matrices, n), right(d, matrix_stride, q * kGroup, matrices, n);
        across(product, left, right, n, begin, end);
    }
#pragma unroll
    for (int a = 0; a < kGroup; ++a) {
        const double sum = warp_sum_of_four(product[a]);
        if (lane % 8 == 0) warps[warp][a * kGroup + lane / 8] = sum;
    }
    __syncthreads();
    const int a = p * kGroup + threadIdx.x / kGroup, b = q * kGroup + threadIdx.x % kGroup;
    if (threadIdx.x >= kGroup * kGroup || a > b || b >= matrices) return;
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warps[w][threadIdx.x];
    partial[(((long long)batch * gridDim.y + blockIdx.y) * matrices + a) * matrices + b] = sum;
}

// One pair of matrices per warp. ``rows`` are sums over the images [0, m) of distances minus typical ones. BORDERED adds one image,
// whose distances to the m are ``border``.
template <bool BORDERED>
__device__ void close(
    const double* partial, const double* rows, const double* shifts, const float* border, int matrices, int m, int chunks,
    double* inner, double* row_sums, double* totals, double* squares
) {
    const int lane = threadIdx.x % 32, place = blockIdx.y * kWarps + threadIdx.x / 32, n = m + BORDERED;
    if (place >= matrices * (matrices + 1) / 2) return;
    const long long batch = blockIdx.x, set = BORDERED ? 0 : batch;
    int a, b;
    pair_at(place, a, b);
    const double* rows_a = rows + (set * matrices + a) * m;
    const double* rows_b = rows + (set * matrices + b) * m;
    const double shift_a = shifts[set * matrices + a], shift_b = shifts[set * matrices + b];
    const float* border_a = BORDERED ? border + ((long long)a * gridDim.x + batch) * m : nullptr;
    const float* border_b = BORDERED ? border + ((long long)b * gridDim.x + batch) * m : nullptr;

    double pairs = 0, products = 0, total_a = 0, total_b = 0, last_a = 0, last_b = 0;
    for (int chunk = lane; chunk < chunks; chunk += 32) pairs += partial[((set * chunks + chunk) * matrices + a) * matrices + b];
    for (int j = lane; j < m; j += 32) {
        double r = rows_a[j], s = rows_b[j];
        if (BORDERED) {
            const double x = border_a[j] - shift_a, y = border_b[j] - shift_b;
            pairs += 2 * x * y;
            last_a += x;
            last_b += y;
            r += x;
            s += y;
        }
        products += r * s;
        total_a += r;
        total_b += s;
        if (a == b) row_sums[(batch * matrices + a) * n + j] = r + (n - 1) * shift_a;
    }
    pairs = warp_sum(pairs);
    products = warp_sum(products);
    total_a = warp_sum(total_a);
    total_b = warp_sum(total_b);
    if (BORDERED) {
        last_a = warp_sum(last_a);
        last_b = warp_sum(last_b);
        products += last_a * last_b;
        total_a += last_a;
        total_b += last_b;
    }
    if (lane) return;
    const double size = n, off_diagonal = size * (size - 1);
    double product = pairs - 2 / (size - 2) * products + total_a * total_b / ((size - 1) * (size - 2));
    if (a == b && product < kRounding * pairs) product = 0;  // a matrix that centring sends to zero
    product /= size * (size - 3);
    inner[(batch * matrices + a) * matrices + b] = inner[(batch * matrices + b) * matrices + a] = product;
    if (a != b) return;
    totals[batch * matrices + a] = total_a + off_diagonal * shift_a;
    squares[batch * matrices + a] = pairs + shift_a * (2 * total_a + off_diagonal * shift_a);
    if (BORDERED) row_sums[(batch * matrices + a) * n + m] = last_a + m * shift_a;
}

}  // namespace

// d [B, K, n, n] at any strides of its first two dimensions. Out: partial [B, chunks, K, K] (a <= b), rows [B, K, n] and shifts [B, K].
// ``wide``: rows start at multiples of 16 bytes. Grid (B group pairs, chunks).
#define KDX_PRODUCTS(name, T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) name(                                                               \
        const T* d, long long batch_stride, long long matrix_stride, int matrices, int n, int wide, int pairs, int rows_per_block,        \
        double* partial, double* rows, double* shifts                                                                                \
    ) {                                                                                                                              \
        if (wide)                                                                                                                    \
            sum_rows<T, 16 / sizeof(T)>(d, batch_stride, matrix_stride, matrices, n, pairs, rows_per_block, partial, rows, shifts);       \
        else                                                                                                                         \
            sum_rows<T, 1>(d, batch_stride, matrix_stride, matrices, n, pairs, rows_per_block, partial, rows, shifts);                    \
    }
KDX_PRODUCTS(products_float32, float)
KDX_PRODUCTS(products_float64, double)

// inner [B, K, K], row_sums [B, K, n], totals [B, K], squares sum_ij D_ij^2 [B, K]. Grid (B, ceil(K(K+1)/16)).
extern "C" __global__ void __launch_bounds__(32 * kWarps) products_close(
    const double* partial, const double* rows, const double* shifts, int matrices, int n, int chunks, double* inner, double* row_sums,
    double* totals, double* squares
) {
    close<false>(partial, rows, shifts, nullptr, matrices, n, chunks, inner, row_sums, totals, squares);
}

// The same with n = m + 1 for each of q queries at distances border [K, q, m] from one set. Grid (q, ceil(K(K+1)/16)).
extern "C" __global__ void __launch_bounds__(32 * kWarps) products_bordered(
    const double* partial, const double* rows, const double* shifts, const float* border, int matrices, int m, int chunks,
    double* inner, double* row_sums, double* totals, double* squares
) {
    close<true>(partial, rows, shifts, border, matrices, m, chunks, inner, row_sums, totals, squares);
}

// d [K, n, n] with its row_sums [K, n] and totals [K]; out: centred [K, n, n]. Grid (K, n).
extern "C" __global__ void __launch_bounds__(32 * kWarps) products_centred(
    const double* d, const double* row_sums, const double* totals, int n, double* centred
) {
    const int i = blockIdx.y;
    const double* rows = row_sums + (long long)blockIdx.x * n;
    const double total = totals[blockIdx.x] / ((n - 1.0) * (n - 2.0));
    const long long at = ((long long)blockIdx.x * n + i) * n;
    for (int j = threadIdx.x; j < n; j += 32 * kWarps) centred[at + j] = i == j ? 0.0 : d[at + j] - (rows[i] + rows[j]) / (n - 2.0) + total;
}
