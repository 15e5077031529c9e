// Multigrid cycles for linear imputation. The mathematics is in kernels/multigrid.py, the layout of fields in kernels/stencils.py.
//
// A field is four planes [4, channels, length], one per parity of row and column. The cells of a plane start `margin` after its
// beginning, rows are `pitch` apart, and the cells between rows and between images are zero. For colour 2a + b, the neighbour at (y, x)
// is in the plane of (a + y, b + x) modulo 2, moved by (a + y, b + x) halved and rounded down.
// Factors that all channels share are [4, length]. The weights of a coarse matrix are [5, 4, length]: its diagonal, and the weights
// between a point and its neighbours at (0, 1), (1, -1), (1, 0), (1, 1).
//
// A thread has one cell of one channel. Points of a colour have no neighbour of their own colour, so a launch never reads what
// it writes, and no thread waits for another: the launches are the barriers.
//
//   kernel      reads and writes per value of a colour's plane           floor for 32 x 3 x 224 x 224 in float32 at 4 TB/s
//   relax       3 planes of u, f, gain/3, and writes u; 10 operations    5.3 planes of 4.9 MB: 7 us; all colours take four launches
//   restrict    4 planes of u, 3 of f and of factors, writes one         10 planes: 12 us (the five residuals that a thread
//                                                                        adds are read from cache; 60 operations)
//   correct     3 planes of u twice, the correction, factors             8 planes: 10 us
//
// On the grid of pixels, the weights are 1/6 and 1/12, and `scale` is unknown/(12 s). On a coarse grid, the weights are read, which
// is 5/3 planes more, and `scale` is the inverse of the diagonal. Coarse grids have a quarter, a sixteenth, ... of the pixels, so their
// cost is that of the launches.

#include "common.cuh"

namespace {

// A cell of one channel, with the strides to its neighbours.
struct Place {
    int cell, channel, channels, pitch, margin, length;

    __device__ long long shared(int y, int x) const {
        return (long long)(2 * (y & 1) + (x & 1)) * length + margin + cell + (y >> 1) * pitch + (x >> 1);
    }
    __device__ long long own(int y, int x) const {
        return ((long long)(2 * (y & 1) + (x & 1)) * channels + channel) * length + margin + cell + (y >> 1) * pitch + (x >> 1);
    }
    __device__ Place moved(int rows, int columns) const {
        return {cell + rows * pitch + columns, channel, channels, pitch, margin, length};
    }
};

// The equations of pixels: weights of 1/6 and 1/12, multiplied by twelve.
template <class T>
struct Pixels {
    const T* f;
    const T* scale;

    // f_p + sum_q k_pq u_q/s_p at the point (a, b) of a cell: the value of u that solves its equation.
    __device__ T relaxed(const T* u, Place at, int a, int b) const {
        const T beside = u[at.own(a, b - 1)] + u[at.own(a, b + 1)] + u[at.own(a - 1, b)] + u[at.own(a + 1, b)];
        const T diagonal = u[at.own(a - 1, b - 1)] + u[at.own(a - 1, b + 1)] + u[at.own(a + 1, b - 1)] + u[at.own(a + 1, b + 1)];
        return f[at.own(a, b)] + scale[at.shared(a, b)] * (2 * beside + diagonal);
    }
};

// The equations of the points of a coarse grid.
template <class T>
struct Points {
    const T* f;
    const T* scale;
    const T* weights;

    __device__ T weight(Place at, int entry, int a, int b) const { return weights[4LL * entry * at.length + at.shared(a, b)]; }

    // (f_p + sum_q k_pq u_q)/d_p. The weight of a neighbour to the left or above is stored at that neighbour.
    __device__ T relaxed(const T* u, Place at, int a, int b) const {
        T sum = f[at.own(a, b)];
        sum += weight(at, 1, a, b) * u[at.own(a, b + 1)] + weight(at, 1, a, b - 1) * u[at.own(a, b - 1)];
        sum += weight(at, 2, a, b) * u[at.own(a + 1, b - 1)] + weight(at, 2, a - 1, b + 1) * u[at.own(a - 1, b + 1)];
        sum += weight(at, 3, a, b) * u[at.own(a + 1, b)] + weight(at, 3, a - 1, b) * u[at.own(a - 1, b)];
        sum += weight(at, 4, a, b) * u[at.own(a + 1, b + 1)] + weight(at, 4, a - 1, b - 1) * u[at.own(a - 1, b - 1)];
        return scale[at.shared(a, b)] * sum;
    }
};

template <class T, class Equations>
__device__ void relax(Equations equations, T* u, Place at, int colour) {
    const int a = colour >> 1, b = colour & 1;
    u[at.own(a, b)] = equations.relaxed(u, at, a, b);
}

// The contribution of a point to the coarse points around it; share is the prolongation times the diagonal, zero between images.
template <class T, class Equations>
__device__ T contribution(Equations equations, const T* u, const T* share, Place at, int a, int b) {
    const T factor = share[at.shared(a, b)];
    return factor == 0 ? T(0) : factor * (equations.relaxed(u, at, a, b) - u[at.own(a, b)]);
}

// The last colour was relaxed last, so its residual is zero.
template <class T, class Equations>
__device__ void restrict(Equations equations, const T* u, const T* share, T* right, Place at) {
    const Place left = at.moved(0, -1), above = at.moved(-1, 0);
    right[at.own(0, 0)] = contribution(equations, u, share, at, 0, 0) + contribution(equations, u, share, at, 0, 1) +
                          contribution(equations, u, share, left, 0, 1) + contribution(equations, u, share, at, 1, 0) +
                          contribution(equations, u, share, above, 1, 0);
}

// The last colour is relaxed next, from the other colours only. The correction is the third plane of its field.
template <class T>
__device__ void correct(const T* correction, const T* prolongation, T* u, Place at) {
    const T own = correction[at.own(1, 0)];
    u[at.own(0, 0)] += prolongation[at.shared(0, 0)] * own;
    u[at.own(0, 1)] += prolongation[at.shared(0, 1)] * (own + correction[at.own(1, 2)]);
    u[at.own(1, 0)] += prolongation[at.shared(1, 0)] * (own + correction[at.own(3, 0)]);
}

}  // namespace

// One thread per cell, one row of blocks per channel.
#define KDX_PLACE                                                                                               \
    const int cell = blockIdx.x * blockDim.x + threadIdx.x;                                                     \
    if (cell >= cells) return;                                                                                  \
    const Place at = {cell, int(blockIdx.y), int(gridDim.y), pitch, margin, length};

#define KDX_KERNELS(T)                                                                                          \
    extern "C" __global__ void relax_pixels_##T(T* u, const T* f, const T* scale, int colour, int cells, int pitch, int margin, \
                                                int length) {                                                   \
        KDX_PLACE relax(Pixels<T>{f, scale}, u, at, colour);                                                    \
    }                                                                                                           \
    extern "C" __global__ void relax_points_##T(T* u, const T* f, const T* scale, const T* weights, int colour, int cells, \
                                                int pitch, int margin, int length) {                            \
        KDX_PLACE relax(Points<T>{f, scale, weights}, u, at, colour);                                           \
    }                                                                                                           \
    extern "C" __global__ void restrict_pixels_##T(const T* u, const T* f, const T* scale, const T* share, T* right, int cells, \
                                                   int pitch, int margin, int length) {                         \
        KDX_PLACE restrict(Pixels<T>{f, scale}, u, share, right, at);                                           \
    }                                                                                                           \
    extern "C" __global__ void restrict_points_##T(const T* u, const T* f, const T* scale, const T* weights, const T* share, \
                                                   T* right, int cells, int pitch, int margin, int length) {    \
        KDX_PLACE restrict(Points<T>{f, scale, weights}, u, share, right, at);                                  \
    }                                                                                                           \
    extern "C" __global__ void correct_##T(const T* correction, const T* prolongation, T* u, int cells, int pitch, int margin, \
                                           int length) {                                                        \
        KDX_PLACE correct(correction, prolongation, u, at);                                                     \
    }

KDX_KERNELS(float)
KDX_KERNELS(double)
