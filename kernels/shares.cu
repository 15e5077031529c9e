// Shares of images and positions in sum_ij D_ij G_ij: the signed maps that add up to a score. Distances from the same pass.
//
//     c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2,    W_ij = G_ij/D_ij, and 0 where D_ij = 0.
//
// The squared differences follow from one product per position, which cuBLAS computes as a batch, K_p = F(p) F(p)^T:
//
//     |F_i(p) - F_j(p)|^2 = q_i(p) + q_j(p) - 2 K_p,ij,    q_i(p) = |F_i(p)|^2.
//
// The products of all positions take as many operations as the one Gram product of whole images, which is their sum. They do not depend
// on W, so one pass serves the shares of every score, and the sum of the squared differences over the positions is D_ij^2: the distances
// need no Gram product of their own. If D_ij^2 is tiny beside the norms, the differences are mostly rounding; a warp then computes them
// from the features.
//
// shares_rows_{float32,float16,bfloat16}  Features [n, C, P] minus a centre, as rows [P, n, C], through shared memory; with up to 64
//                     positions also their spatial means in float64, from the same read. Bytes: n C P sizeof(T) read and 4 n C P written.
//                     The floor is the bytes over the bandwidth.
// shares_squares_{float32,float16,bfloat16}  The squared differences of the pairs i < j, in the order [i, j, p], and their distances. A block has one image and 32
//                     others, and transposes their products through shared memory. Bytes: 2 n^2 P read and 2 n^2 P written.
// shares_contract     The sum over j, or over the j of one context, for up to four pairs of a matrix G and a context at a time. Bytes:
//                     2 n^2 P read twice, and 16 n^2 per pair and 32 positions, mostly from L2. Operations: n^2 P per pair in float64.
//                     The floor is the bytes over the bandwidth.
//
// Squares of many images would not fit into memory. The last two kernels therefore take a strip: the pairs whose first image is one of the
// first ``rows`` of ``count`` images. The next strip begins behind these rows.

#include "reduce.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kLanes = 32;
constexpr int kPositions = 64;  // of a block that transposes features
constexpr int kChannels = 128;  // of such a block: it writes them as one piece of memory
constexpr int kAtOnce = 4;      // shares of a block

// kChannels channels of one image, at up to kPositions positions. Two threads add up each channel.
template <class T>
__device__ void centre(
    const T* features, const float* centres, int count, int channels, int positions, int columns, float* rows, double* means
) {
    __shared__ float tile[kChannels][kPositions + 1];
    const int tiles = (channels + kChannels - 1) / kChannels, image = blockIdx.x / tiles, first = blockIdx.x % tiles * kChannels;
    const int left = blockIdx.y * kPositions, width = min(kPositions, positions - left), height = min(kChannels, channels - first);
    features += ((long long)image * channels + first) * positions + left;
#pragma unroll 8
    for (int at = threadIdx.x; at < height * width; at += kLanes * kWarps) {
        const int channel = at / width, position = at % width;
        tile[channel][position] = float(features[channel * positions + position]);
    }
    __syncthreads();
    if (means) {
        const int channel = threadIdx.x / 2;
        double sum = 0;
        if (channel < height)
            for (int position = threadIdx.x % 2; position < width; position += 2) sum += double(tile[channel][position]);
        sum += __shfl_xor_sync(kWarp, sum, 1);
        if (threadIdx.x % 2 == 0 && channel < height) means[(long long)image * columns + first + channel] = sum / positions;
    }
    const int channel = threadIdx.x % kChannels;
    if (channel >= height) return;
    rows += ((long long)left * count + image) * channels + first + channel;
    centres += (long long)left * channels + first + channel;
#pragma unroll 4
    for (int position = threadIdx.x / kChannels; position < width; position += kLanes * kWarps / kChannels)
        rows[(long long)position * count * channels] = tile[channel][position] - centres[(long long)position * channels];
}

// One image of the strip and 32 images from ``left`` on. The strip begins at the image ``first`` of ``images``.
template <class T>
__device__ void measure(
    const float* products, const T* features, const float* norms, const float* totals, float near, int images, int first, int count,
    int channels, int positions, float* squares, double* distances
) {
    __shared__ float tile[kLanes][kLanes + 1];
    const int own = blockIdx.x, left = blockIdx.y * kLanes, height = gridDim.x, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    if (distances && blockIdx.y == 0 && threadIdx.x == 0) distances[(long long)own * count + own] = 0;
    if (left + kLanes - 1 <= own) return;  // no pair i < j
    const int column = min(left + lane, count - 1);
    norms += first;
    totals += first;
    double squared[kLanes / kWarps] = {};
    for (int begin = 0; begin < positions; begin += kLanes) {
        const int end = min(positions, begin + kLanes);
        for (int position = begin + warp; position < end; position += kWarps) {
            const float* norm = norms + (long long)position * images;
            const float difference = norm[own] + norm[column] - 2 * products[((long long)position * height + own) * count + column];
            tile[lane][position - begin] = difference < 0 ? 0.0f : difference;  // not fmaxf, which would hide a NaN
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kLanes / kWarps; ++k) {
            const int other = left + warp + k * kWarps;
            const bool present = begin + lane < end && other < count && own < other;
            const float value = present ? tile[warp + k * kWarps][lane] : 0.0f;
            if (present) squares[((long long)own * count + other) * positions + begin + lane] = value;
            squared[k] += warp_sum(double(value));
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int k = 0; k < kLanes / kWarps; ++k) {
        const int other = left + warp + k * kWarps;
        if (other >= count || other <= own) continue;
        double sum = squared[0];
#pragma unroll
        for (int place = 1; place < kLanes / kWarps; ++place) sum = place == k ? squared[place] : sum;
        if (sum < near * (totals[own] + totals[other])) {
            const T* one = features + (long long)(first + own) * channels * positions;
            const T* two = features + (long long)(first + other) * channels * positions;
            sum = 0;
            for (int position = lane; position < positions; position += kLanes) {
                double exact = 0;
                for (int channel = 0; channel < channels; ++channel) {
                    const int at = channel * positions + position;
                    const double difference = double(float(one[at])) - float(two[at]);
                    exact += difference * difference;
                }
                squares[((long long)own * count + other) * positions + position] = float(exact);
                sum += exact;
            }
            sum = warp_sum(sum);
        }
        if (lane == 0 && distances) distances[(long long)own * count + other] = distances[(long long)other * count + own] = sqrt(sum);
    }
}

// The images start, start + step, ... before ``stop``.
struct Context {
    int start, stop, step;

    __device__ bool has(int image) const { return image >= start && image < stop && (image - start) % step == 0; }
};

// The strip's part of up to kAtOnce shares of one image at up to 32 positions. An image of the strip has its pairs with all other images,
// and an image after the strip has its pairs with the strip. Share s is of context s / matrices and matrix s % matrices.
__device__ void contract(
    const float* squares, const double* g, const double* distances, const Context* contexts, int matrices, int shared, int images, int first,
    int rows, int count, int positions, int lanes, double* shares
) {
    __shared__ double sums[kWarps][kAtOnce][32];
    const int own = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, partners = own < rows ? count : rows;
    const int position = blockIdx.y * lanes + lane, share = blockIdx.z * kAtOnce;
    const bool present = lane < lanes && position < positions;
    const long long corner = (long long)(first + own) * images + first;
    distances += corner;
    double sum[kAtOnce] = {};
    for (int begin = warp * 32; begin < partners; begin += kWarps * 32) {
        const int partner = begin + lane;
        const double distance = partner < partners ? distances[partner] : 0.0;
        double weight[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int place = share + k;
            const bool read = distance > 0 && place < shared && contexts[place / matrices].has(first + partner);
            weight[k] = read ? g[(long long)(place % matrices) * images * images + corner + partner] / distance : 0.0;
        }
        for (int k = 0; k < min(32, partners - begin); ++k) {
            const int other = begin + k;
            float squared = 0;
            if (present && other != own) squared = squares[((long long)min(own, other) * count + max(own, other)) * positions + position];
#pragma unroll
            for (int m = 0; m < kAtOnce; ++m) sum[m] += __shfl_sync(kWarp, weight[m], k) * squared;
        }
    }
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) sums[warp][m][lane] = sum[m];
    __syncthreads();
    if (warp >= kAtOnce || share + warp >= shared || !present) return;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][warp][lane];
    double* to = shares + ((long long)(share + warp) * images + first + own) * positions + position;
    *to = first ? *to + total : total;
}

}  // namespace

// features [count, C, P], centres [P, C]; out: rows [P, count, C], and unless null the means [count, columns] in the first C columns, of at
// most kPositions positions. Grid (count ceil(C/128), ceil(P/64)).
#define KDX_ROWS(name, T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(kLanes * kWarps) name(                                                          \
        const T* features, const float* centres, int count, int channels, int positions, int columns, float* rows, double* means \
    ) {                                                                                                                          \
        centre<T>(features, centres, count, channels, positions, columns, rows, means);                                          \
    }
KDX_ROWS(shares_rows_float32, float)
KDX_ROWS(shares_rows_float16, __half)
KDX_ROWS(shares_rows_bfloat16, __nv_bfloat16)

// products [P, rows, count] of the strip's images with those from its first on; features [images, C, P]; norms [P, images] = q; totals
// [images], their sums over the positions. Out: squares [rows, count, P] where i < j, and unless null the distances [count, count] off the
// diagonal. Grid (rows, ceil(count/32)).
#define KDX_SQUARES(name, T)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(kLanes * kWarps) name(                                                              \
        const float* products, const T* features, const float* norms, const float* totals, float near, int images, int first,        \
        int count, int channels, int positions, float* squares, double* distances                                                    \
    ) {                                                                                                                              \
        measure<T>(products, features, norms, totals, near, images, first, count, channels, positions, squares, distances);          \
    }
KDX_SQUARES(shares_squares_float32, float)
KDX_SQUARES(shares_squares_float16, __half)
KDX_SQUARES(shares_squares_bfloat16, __nv_bfloat16)

// squares [rows, count, P] of the strip that begins at the image ``first``; g [matrices, images, images], distances [images, images];
// shared: contexts times matrices. Out: shares [contexts, matrices, images, P]; the first strip writes them, and the others add to them.
// Grid (count, parts of the positions, ceil(shared/4)).
extern "C" __global__ void __launch_bounds__(kLanes * kWarps, 3) shares_contract(
    const float* squares, const double* g, const double* distances, const int* contexts, int matrices, int shared, int images, int first,
    int rows, int count, int positions, int lanes, double* shares
) {
    contract(
        squares, g, distances, reinterpret_cast<const Context*>(contexts), matrices, shared, images, first, rows, count, positions, lanes, shares
    );
}
