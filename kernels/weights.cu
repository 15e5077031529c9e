// UniCAM's channel weights a = Lap mean_hw(F) from distances and the inner products of their U-centred matrices, for a stack of
// batches in one launch.
//
// With A, B, G the U-centred matrices of the explained distances D, the given and the target's, and R = A - (<A,B>/<B,B>) B:
//
//     W_ij = M_ij/D_ij off the diagonal, zero at distance zero,      a_i = sum_j W_ij (f_i - f_j),      Lap = diag(W 1) - W,
//
// where M is a combination of three matrices with coefficients from the inner products alone, so an entry of W costs one read of
// each of the three distances, and no matrix but D, E and the target's is ever in memory:
//
//     relevance    L = <R,G>/sqrt(<R,R><G,G>);    M = 2 (-L/<R,R> R + (G - (<B,G>/<B,B>) B)/sqrt(<R,R><G,G>))
//     uniqueness   L = sum_i max_j R_ij;          M = U(E + E^T) - 2 (<E,B>/<B,B>) B, E one at each row's first maximum
//
// Distances are float32, everything after them float64: near-duplicates put large opposite numbers into W, and f_i - f_j is exact
// where they meet.
//
// weights_{relevance,uniqueness}        S batches of n images: distances [S, 3, n, n]; n rows of weights a batch.
//                     Bytes: 12 n^2 of distances for each 128 channels and 8 n C of means for each 16 rows, mostly from L2.
//                     Operations: 2 n^2 C in float64, and about 40 n^2 for each 128 channels. The floor is the operations'.
// query_weights_{relevance,uniqueness}  q queries, each the last of m + 1 images behind one set: distances inside the set [3, m, m]
//                     and to it [3, q, m]; one row of weights a query. Bytes and operations as above with q m in place of n^2.
// {weights,query}_maxima                Each row's first maximum of R, which uniqueness needs before: 8 n^2 bytes a batch, or q m^2.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;       // images of a block
constexpr int kChannels = 128;  // of a block
constexpr int kStep = 32;       // images that are weighed at a time
constexpr int kRowsEach = kRows * kChannels / (32 * kWarps);

enum Matrix { kExplained, kGiven, kTarget };

// What `products` found of each batch's three matrices.
struct Products {
    const double* inner;    // [S, 3, 3]
    const double* rows;     // sums [S, 3, n]
    const double* totals;   // [S, 3]
    const double* squares;  // sum_ij D_ij^2 [S, 3]
};

// Distances of a stack of batches [S, 3, n, n]; or of S queries, each behind the same n - 1 images, which are [3, n - 1, n - 1] apart
// and [3, S, n - 1] from the queries.
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

// Unnormalised inner products of one batch, and what is left of A once B is projected out.
struct Projection {
    double aa, ab, ag, bb, bg, gg, share, rr;

    __device__ Projection(const Products& products, int s, int n) {
        const double* inner = products.inner + s * 9;
        const double size = double(n) * (n - 3);
        aa = inner[0] * size, ab = inner[1] * size, ag = inner[2] * size;
        bb = inner[4] * size, bg = inner[5] * size, gg = inner[8] * size;
        share = ab / bb;
        rr = aa - share * ab;
        rr = rr < 0 ? 0 : rr;  // and a NaN stays
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
        // ||E||^2 <R,R>, with E the derivative less its part along B: what is left of G's direction beside those of B and R.
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
        const int* where;      // [S, n] column of each row's first maximum
        const int* count;      // [S, n] rows whose maximum is in this column
        const double* best;    // [S, n] R there
        const double* picked;  // [S, n] B there
    };

    static __device__ Combination combine(const Projection& p, const Source& source, int s, int n, double rounding, double* score) {
        double best = 0, picked = 0;
        for (int i = threadIdx.x % 32; i < n; i += 32) {
            best += source.best[(long long)s * n + i];
            picked += source.picked[(long long)s * n + i];
        }
        *score = warp_sum(best);
        picked = warp_sum(picked);
        const double along = picked / p.bb;
        const bool sound = n - along * picked > rounding * p.aa / p.rr * n;  // of ||E||^2 = n
        return sound ? Combination{0, -2 * along, 1} : Combination{0, 0, 0};
    }

    template <bool BORDERED>
    static __device__ double third(const Geometry<BORDERED>& geometry, const Source& source, int s, int i, int j) {
        const double n = geometry.n;
        const int* where = source.where + (long long)s * geometry.n;
        const int* count = source.count + (long long)s * geometry.n;
        return (where[i] == j) + (where[j] == i) - (2 + count[i] + count[j]) / (n - 2) + 2 * n / ((n - 1) * (n - 2));
    }
};

// R's first maximum in one row a warp, the diagonal's zero among the candidates as in the definition. ``count`` starts at zero.
template <bool BORDERED>
__device__ void maxima(const Geometry<BORDERED>& geometry, int* where, int* count, double* best, double* picked) {
    const int n = geometry.n, lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
    if (row >= (long long)geometry.stack * n) return;
    const int s = int(row / n), i = int(row % n);
    const double share = Projection(geometry.products, s, n).share;
    double most = 0, given = 0;
    int first = n;  // none yet
    for (int j = lane; j < n; j += 32) {
        const double a = i == j ? 0 : geometry.centred(s, kExplained, i, j), b = i == j ? 0 : geometry.centred(s, kGiven, i, j);
        const double r = a - share * b;
        if (first == n || r > most) most = r, given = b, first = j;
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
        const double other = __shfl_xor_sync(kWarp, most, bits), other_given = __shfl_xor_sync(kWarp, given, bits);
        const int other_first = __shfl_xor_sync(kWarp, first, bits);
        if (other_first == n) continue;
        if (first == n || other > most || (other == most && other_first < first)) most = other, given = other_given, first = other_first;
    }
    if (lane) return;
    where[row] = first;
    best[row] = most;
    picked[row] = given;
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
        const Combination found = Objective::combine(projection, source, s, n, rounding, &value);
        if (lane) continue;
        combinations[row] = found;
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
            double found = 0;
            if (at < rows && j < count && i != j) {
                const Combination c = combinations[row];
                const double distance = geometry.distance(s, kExplained, i, j);
                const double m = c.explained * geometry.centred(s, kExplained, i, j) + c.given * geometry.centred(s, kGiven, i, j) +
                                 c.third * Objective::third(geometry, source, s, i, j);
                found = distance > 0 ? m / distance : 0.0;
                if (lap && blockIdx.z == 0) lap[((long long)s * n + i) * n + j] = -found;
            }
            w[row][lane] = found;
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
    for (int i = start + warp; i < min(start + kRows, n); i += kWarps) {  // as above, so that a lane reads what it wrote
        double* row = lap + ((long long)blockIdx.x * n + i) * n;
        double total = 0;
        for (int j = lane; j < n; j += 32) total -= i == j ? 0 : row[j];
        total = warp_sum(total);
        if (lane == 0) row[i] = total;
    }
}

}  // namespace

#define KDX_PRODUCTS_IN const double *inner, const double *rows, const double *totals, const double *squares
#define KDX_MAXIMA_IN const int *where, const int *count, const double *best, const double *picked

// distances [S, 3, n, n]; out: where, best, picked [S, n], count [S, n] zero on entry. Grid ceil(S n/8).
extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) weights_maxima(
    const float* distances, KDX_PRODUCTS_IN, int stack, int n, int* where, int* count, double* best, double* picked
) {
    maxima<false>({distances, nullptr, {inner, rows, totals, squares}, stack, n}, where, count, best, picked);
}

// inside [3, m, m], border [3, q, m]; out as above with S = q, n = m + 1.
extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) query_maxima(
    const float* inside, const float* border, KDX_PRODUCTS_IN, int stack, int n, int* where, int* count, double* best, double* picked
) {
    maxima<true>({inside, border, {inner, rows, totals, squares}, stack, n}, where, count, best, picked);
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
        {distances, nullptr, {inner, rows, totals, squares}, stack, n}, {where, count, best, picked}, nullptr, means, channels, rounding,
        weights, lap, score, left
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
        {inside, border, {inner, rows, totals, squares}, stack, n}, {where, count, best, picked}, queries, references, channels,
        rounding, weights, nullptr, score, left
    );
}
