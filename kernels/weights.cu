// UniCAM's channel weights a = Lap mean_hw(F) from distances and the inner products of their U-centred matrices, for a stack of
// batches in one launch.
//
// With A, B, G the U-centred matrices of the explained distances D, of the given distances and of the target's distances, and
// R = A - (<A,B>/<B,B>) B:
//
//     W_ij = M_ij/D_ij off the diagonal, zero at distance zero,      a_i = sum_j W_ij (f_i - f_j),      Lap = diag(W 1) - W,
//
// where M is a combination of three matrices whose coefficients depend on the inner products only. So an entry of W costs one read of
// each of the three distances, and no other matrix than the three of distances is ever in memory:
//
//     relevance    L = <R,G>/sqrt(<R,R><G,G>);    M = 2 (-L/<R,R> R + (G - (<B,G>/<B,B>) B)/sqrt(<R,R><G,G>))
//     uniqueness   L = sum_i max_j R_ij;          M = U(E + E^T) - 2 (<E,B>/<B,B>) B, with E one at each row's first maximum
//
// Distances are float32, and everything computed from them is float64: near-duplicates put large opposite numbers into W, and
// f_i - f_j is exact there.
//
// weights_{relevance,uniqueness}        S batches of n images: distances [S, 3, n, n]; n rows of weights per batch.
//                     Bytes: 12 n^2 of distances per 128 channels and 8 n C of means per 16 rows, mostly from L2.
//                     Operations: 2 n^2 C in float64, and about 40 n^2 per 128 channels. The floor is the time of the operations.
// query_weights_{relevance,uniqueness}  q queries, each the last of m + 1 images after one set: distances inside the set [3, m, m]
//                     and to it [3, q, m]; one row of weights per query. Bytes and operations as above with q m in place of n^2.
// {weights,query}_maxima                The first maximum of each row of R, which uniqueness needs first: 8 n^2 bytes per batch, or
//                     8 q m^2.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;       // images of a block
constexpr int kChannels = 128;  // of a block
constexpr int kStep = 32;       // images whose weights are in shared memory at a time
constexpr int kRowsEach = kRows * kChannels / (32 * kWarps);

enum Matrix { kExplained, kGiven, kTarget };

// The results of products.cu for the three matrices of each batch.
struct Products {
    const double* inner;    // [S, 3, 3]
    const double* rows;     // sums [S, 3, n]
    const double* totals;   // [S, 3]
    const double* squares;  // sum_ij D_ij^2 [S, 3]
};

// Distances of a stack of batches: inside [S, 3, n, n]. BORDERED: of S queries, each after the same n - 1 images, with distances
// inside [3, n - 1, n - 1] among the images and border [3, S, n - 1] to the queries.
template <bool BORDERED>
struct Geometry {
    const float* inside;
    const float* border;
    Products products;
    int stack, n;

    __device__ double distance(int s, Matrix k, int i, int j) const {
        if (!BORDERED) return inside[(((long long)s * 3 + k) * n + i) * n + j];
        const int m = n - 1;
        if (i < m && j < m) return inside[((long long)k * m + i) * m + j];
        return border[((long long)k * stack + s) * m + min(i, j)];
    }

    // U-centred, for i != j.
    __device__ double centred(int s, Matrix k, int i, int j) const {
        const double* rows = products.rows + ((long long)s * 3 + k) * n;
        const double total = products.totals[s * 3 + k] / ((n - 1.0) * (n - 2.0));
        return distance(s, k, i, j) - (rows[i] + rows[j]) * (1 / (n - 2.0)) + total;
    }
};

// Unnormalised inner products of one batch; share = <A,B>/<B,B>, and rr = <R,R>.
struct Projection {
    double aa, ab, ag, bb, bg, gg, share, rr;

    __device__ Projection(const Products& products, int s, int n) {
        const double* inner = products.inner + s * 9;
        const double size = double(n) * (n - 3);
        aa = inner[0] * size, ab = inner[1] * size, ag = inner[2] * size;
        bb = inner[4] * size, bg = inner[5] * size, gg = inner[8] * size;
        share = ab / bb;
        rr = aa - share * ab;
        rr = rr < 0 ? 0 : rr;  // NaN stays NaN
    }
};

// M = explained A + given B + third (G, or U(E + E^T)).
struct Combination {
    double explained, given, third;
};

struct Relevance {
    struct Source {};

    static __device__ Combination combine(const Projection& p, const Source&, int, int, double rounding, double* score) {
        const double scale = sqrt(p.rr * p.gg), across = p.bg / p.bb, along = (p.ag - p.share * p.bg) / scale;
        *score = along;
        // ||E||^2 <R,R>, with E the derivative minus its part along B: the part of G's direction outside B and R.
        const bool sound = 1 - across * p.bg / p.gg - along * along > rounding * p.aa / p.rr;
        const double explained = -2 * along / p.rr, target = 2 / scale;
        return sound ? Combination{explained, -explained * p.share - target * across, target} : Combination{0, 0, 0};
    }

    template <bool BORDERED>
    static __device__ double third(const Geometry<BORDERED>& geometry, const Source&, int s, int i, int j) {
        return geometry.centred(s, kTarget, i, j);
    }
};

struct Uniqueness {
    struct Source {
        const int* maximum_column;       // [S, n] column of each row's first maximum
        const int* count;                // [S, n] number of maxima in each column
        const double* maximum;           // [S, n] R at the maximum
        const double* given_at_maximum;  // [S, n] B at the maximum
    };

    static __device__ Combination combine(const Projection& p, const Source& source, int s, int n, double rounding, double* score) {
        double maxima = 0, given = 0;
        for (int i = threadIdx.x % 32; i < n; i += 32) {
            maxima += source.maximum[(long long)s * n + i];
            given += source.given_at_maximum[(long long)s * n + i];
        }
        *score = warp_sum(maxima);
        given = warp_sum(given);
        const double along = given / p.bb;
        const bool sound = n - along * given > rounding * p.aa / p.rr * n;  // ||E||^2 = n
        return sound ? Combination{0, -2 * along, 1} : Combination{0, 0, 0};
    }

    template <bool BORDERED>
    static __device__ double third(const Geometry<BORDERED>& geometry, const Source& source, int s, int i, int j) {
        const double n = geometry.n;
        const int* column = source.maximum_column + (long long)s * geometry.n;
        const int* count = source.count + (long long)s * geometry.n;
        return (column[i] == j) + (column[j] == i) - (2 + count[i] + count[j]) / (n - 2) + 2 * n / ((n - 1) * (n - 2));
    }
};

// The first maximum of one row of R per warp; the zero of the diagonal is a candidate, as in the definition. ``count`` starts at zero.
template <bool BORDERED>
__device__ void maxima(
    const Geometry<BORDERED>& geometry, int* maximum_column, int* count, double* maximum, double* given_at_maximum
) {
    const int n = geometry.n, lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
    if (row >= (long long)geometry.stack * n) return;
    const int s = int(row / n), i = int(row % n);
    const double share = Projection(geometry.products, s, n).share;
    double largest = 0, given = 0;
    int first = n;  // no maximum yet
    for (int j = lane; j < n; j += 32) {
        const double a = i == j ? 0 : geometry.centred(s, kExplained, i, j), b = i == j ? 0 : geometry.centred(s, kGiven, i, j);
        const double r = a - share * b;
        if (first == n || r > largest) largest = r, given = b, first = j;
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
        const double other = __shfl_xor_sync(kWarp, largest, bits), other_given = __shfl_xor_sync(kWarp, given, bits);
        const int other_first = __shfl_xor_sync(kWarp, first, bits);
        if (other_first == n) continue;
        const bool earlier = other == largest && other_first < first;
        if (first == n || other > largest || earlier) largest = other, given = other_given, first = other_first;
    }
    if (lane) return;
    maximum_column[row] = first;
    maximum[row] = largest;
    given_at_maximum[row] = given;
    atomicAdd(count + (long long)s * n + first, 1);
}

// One block: kRows rows and kChannels channels.
template <class Objective, bool BORDERED>
__device__ void weigh(
    const Geometry<BORDERED>& geometry, const typename Objective::Source& source, const double* queries, const double* means, int channels,
    double rounding, double* weights, double* lap, double* score, double* left
) {
    __shared__ double w[kRows][kStep];
    __shared__ Combination combinations[kRows];
    const int n = geometry.n, lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = BORDERED ? n - 1 : n;
    const int start = blockIdx.y * kRows, rows = BORDERED ? geometry.stack : n;
    for (int row = warp; row < kRows; row += kWarps) {
        if (start + row >= rows) continue;
        const int s = BORDERED ? start + row : blockIdx.x;
        const Projection projection(geometry.products, s, n);
        double value;
        const Combination combination = Objective::combine(projection, source, s, n, rounding, &value);
        if (lane) continue;
        combinations[row] = combination;
        if (blockIdx.z == 0 && (BORDERED || start + row == 0)) {
            score[s] = value;
            left[s] = sqrt(projection.rr / geometry.products.squares[s * 3]);
        }
    }

    const int channel = blockIdx.z * kChannels + threadIdx.x % kChannels, first = threadIdx.x / kChannels * kRowsEach;
    const bool present = channel < channels;
    const double* others = means + (BORDERED ? 0 : (long long)blockIdx.x * n * channels);
    const double* own = BORDERED ? queries : others;
    double mean[kRowsEach], sum[kRowsEach] = {};
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
        const int at = start + first + row;
        mean[row] = present && at < rows ? own[(long long)at * channels + channel] : 0.0;
    }
    for (int begin = 0; begin < count; begin += kStep) {
        __syncthreads();  // the combinations are written; w is read
#pragma unroll 1
        for (int row = warp; row < kRows; row += kWarps) {
            const int at = start + row, j = begin + lane;
            const int s = BORDERED ? at : blockIdx.x, i = BORDERED ? n - 1 : at;
            double weight = 0;
            if (at < rows && j < count && i != j) {
                const Combination c = combinations[row];
                const double distance = geometry.distance(s, kExplained, i, j);
                const double m = c.explained * geometry.centred(s, kExplained, i, j) + c.given * geometry.centred(s, kGiven, i, j) +
                                 c.third * Objective::third(geometry, source, s, i, j);
                weight = distance > 0 ? m / distance : 0.0;
                if (lap && blockIdx.z == 0) lap[((long long)s * n + i) * n + j] = -weight;
            }
            w[row][lane] = weight;
        }
        __syncthreads();
        if (!present) continue;
#pragma unroll 4
        for (int j = 0; j < min(kStep, count - begin); ++j) {
            const double other = others[(long long)(begin + j) * channels + channel];
#pragma unroll
            for (int row = 0; row < kRowsEach; ++row) sum[row] += w[first + row][j] * (mean[row] - other);
        }
    }
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
        const int at = start + first + row;
        if (present && at < rows) weights[((BORDERED ? 0 : (long long)blockIdx.x * n) + at) * channels + channel] = sum[row];
    }
    if (!lap || blockIdx.z != 0) return;
    for (int i = start + warp; i < min(start + kRows, n); i += kWarps) {  // the same loop as above, so that a lane reads what it wrote
        double* row = lap + ((long long)blockIdx.x * n + i) * n;
        double total = 0;
        for (int j = lane; j < n; j += 32) total -= i == j ? 0 : row[j];
        total = warp_sum(total);
        if (lane == 0) row[i] = total;
    }
}

}  // namespace

#define KDX_PRODUCTS_IN const double *inner, const double *rows, const double *totals, const double *squares
#define KDX_MAXIMA_IN const int *maximum_column, const int *count, const double *maximum, const double *given_at_maximum
#define KDX_MAXIMA_OUT int *maximum_column, int *count, double *maximum, double *given_at_maximum

// distances [S, 3, n, n]; out: maximum_column, maximum, given_at_maximum [S, n], count [S, n] zero on entry. Grid ceil(S n/8).
extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) weights_maxima(
    const float* distances, KDX_PRODUCTS_IN, int stack, int n, KDX_MAXIMA_OUT
) {
    maxima<false>({distances, nullptr, {inner, rows, totals, squares}, stack, n}, maximum_column, count, maximum, given_at_maximum);
}

// inside [3, m, m], border [3, q, m]; out as above with S = q, n = m + 1.
extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) query_maxima(
    const float* inside, const float* border, KDX_PRODUCTS_IN, int stack, int n, KDX_MAXIMA_OUT
) {
    maxima<true>({inside, border, {inner, rows, totals, squares}, stack, n}, maximum_column, count, maximum, given_at_maximum);
}

// means [S, n, C]; out: weights [S, n, C], lap [S, n, n] or null, score and left [S]. Grid (S, ceil(n/16), ceil(C/128)).
extern "C" __global__ void __launch_bounds__(32 * kWarps) weights_relevance(
    const float* distances, KDX_PRODUCTS_IN, int stack, int n, const double* means, int channels, double rounding, double* weights,
    double* lap, double* score, double* left
) {
    weigh<Relevance, false>(
        {distances, nullptr, {inner, rows, totals, squares}, stack, n}, {}, nullptr, means, channels, rounding, weights, lap, score, left
    );
}

extern "C" __global__ void __launch_bounds__(32 * kWarps) weights_uniqueness(
    const float* distances, KDX_PRODUCTS_IN, KDX_MAXIMA_IN, int stack, int n, const double* means, int channels, double rounding,
    double* weights, double* lap, double* score, double* left
) {
    weigh<Uniqueness, false>(
        {distances, nullptr, {inner, rows, totals, squares}, stack, n}, {maximum_column, count, maximum, given_at_maximum}, nullptr, means,
        channels, rounding, weights, lap, score, left
    );
}

// queries [q, C], references [m, C]; out: weights [q, C], score and left [q]. Grid (1, ceil(q/16), ceil(C/128)).
extern "C" __global__ void __launch_bounds__(32 * kWarps) query_weights_relevance(
    const float* inside, const float* border, KDX_PRODUCTS_IN, int stack, int n, const double* queries, const double* references,
    int channels, double rounding, double* weights, double* score, double* left
) {
    weigh<Relevance, true>(
        {inside, border, {inner, rows, totals, squares}, stack, n}, {}, queries, references, channels, rounding, weights, nullptr,
        score, left
    );
}

extern "C" __global__ void __launch_bounds__(32 * kWarps) query_weights_uniqueness(
    const float* inside, const float* border, KDX_PRODUCTS_IN, KDX_MAXIMA_IN, int stack, int n, const double* queries,
    const double* references, int channels, double rounding, double* weights, double* score, double* left
) {
    weigh<Uniqueness, true>(
        {inside, border, {inner, rows, totals, squares}, stack, n}, {maximum_column, count, maximum, given_at_maximum}, queries, references,
        channels, rounding, weights, nullptr, score, left
    );
}
