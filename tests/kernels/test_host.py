"""The emulation itself: known results, and kernels with one mistake each that must be detected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.kernels import cuda
from tests import host
from tests.host import ORDERS, HostLauncher, KernelError, Order

REDUCTION = r"""
#include "common.cuh"

__device__ float warp_sum(float x) {
    for (int by = 16; by; by /= 2) x += __shfl_down_sync(0xffffffff, x, by);
    return x;
}

template <int warps>
__device__ float block_sum(float x) {
    __shared__ float parts[warps];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();  // parts written
    return warp_sum(threadIdx.x < warps ? parts[threadIdx.x] : 0.f);
}

// out = sum x, by any number of blocks; each block reads its tiles of x backwards
extern "C" __global__ void __launch_bounds__(128) total(const float* __restrict__ x, float* out, int n) {
    KDX_DYNAMIC_SHARED(float, tile);
    float sum = 0;
    for (int start = blockIdx.x * blockDim.x; start < n; start += gridDim.x * blockDim.x) {
        const int i = start + threadIdx.x;
        tile[threadIdx.x] = i < n ? x[i] : 0.f;
        __syncthreads();  // tile written
        sum += tile[blockDim.x - 1 - threadIdx.x];
        __syncthreads();  // tile read
    }
    sum = block_sum<4>(sum);
    if (threadIdx.x == 0) atomicAdd(out, sum);
}
"""


def total(text: str, order: Order, seed: int = 0, shared: int = 128 * 4) -> tuple[Tensor, Tensor]:
    x, out = torch.arange(1000.0)[1:], torch.zeros(3)
    HostLauncher(order, seed, {"reduction.cu": text}).launch(
        "reduction", "total", (3, 1, 1), (128, 1, 1), [x, out[1:], np.int32(len(x))], shared
    )
    return out, torch.tensor([0, x.sum(), 0])


def launch(body: str, *arguments: Tensor | np.generic | None, threads: int = 64, blocks: int = 1, order: Order = "forward") -> None:
    """Launch one kernel from the text of its parameters and body."""
    HostLauncher(order, changed={"one.cu": f'#include "common.cuh"\nextern "C" __global__ void one{body}'}).launch(
        "one", "one", (blocks, 1, 1), (threads, 1, 1), arguments
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_reduction_over_shuffles_barriers_and_atomics_is_the_sum(order: Order) -> None:
    out, expected = total(REDUCTION, order)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("barrier", ["tile written", "tile read", "parts written"])
def test_a_missing_barrier_is_caught(barrier: str) -> None:
    text = REDUCTION.replace(f"__syncthreads();  // {barrier}", "")
    assert text != REDUCTION
    for order in ORDERS:
        out, expected = total(text, order)
        if not torch.equal(out, expected):
            return
    pytest.fail(f"no order detects the missing barrier: {barrier}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("i < n ? x[i]", "i <= n ? x[i]", "heap-buffer-overflow"),
        ("atomicAdd(out, sum)", "atomicAdd(out + 2, sum)", "heap-buffer-overflow"),
        ("float parts[warps]", "float parts[warps - 1]", "global-buffer-overflow|out of bounds"),
        ("tile[blockDim.x - 1 - threadIdx.x]", "tile[blockDim.x - threadIdx.x]", "heap-buffer-overflow"),
        ("x[i] : 0.f", "x[n + 2147483647 - i] : 0.f", "signed integer overflow"),
        ("__syncthreads();  // parts written", "if (threadIdx.x != 5) __syncthreads();", "wait for one another"),
        ("__syncthreads();  // tile read", "if (threadIdx.x % 2) __syncthreads(); else\n__syncthreads();", "wait for one another"),
        ("__syncthreads();  // tile written", "if (threadIdx.x == 100) return; __syncthreads();", "127 at the barrier .* 1 exited"),
        (
            "__shfl_down_sync(0xffffffff, x, by)",
            "__shfl_down_sync(threadIdx.x % 2 ? ~0u : 0xffffu, x, by)",
            "wait for one another|not name",
        ),
        (
            "return warp_sum(threadIdx.x < warps",
            "if (threadIdx.x == 40) return 0; return warp_sum(threadIdx.x < warps",
            "reads lane 8, which does",
        ),
    ],
)
def test_a_mistake_is_caught_and_named(old: str, new: str, message: str) -> None:
    assert REDUCTION.count(old) == 1
    with pytest.raises(KernelError, match=message):
        total(REDUCTION.replace(old, new), "forward")


def test_shared_memory_starts_as_nan_in_every_block() -> None:
    out = torch.zeros(2, 2, 3)
    launch(
        """(float* out) {
            __shared__ float kept[3];
            __shared__ double wide[3];
            out[6 * blockIdx.x + threadIdx.x] = kept[threadIdx.x];
            out[6 * blockIdx.x + 3 + threadIdx.x] = float(wide[threadIdx.x]);
            kept[threadIdx.x] = 1;
            wide[threadIdx.x] = 1;
        }""",
        out,
        threads=3,
        blocks=2,
    )
    assert out.isnan().all()
    out.zero_()
    text = '#include "common.cuh"\nextern "C" __global__ void one(float* out) { KDX_DYNAMIC_SHARED(float, s); *out = s[4]; }'
    for shared in (20, 19):
        dynamic = HostLauncher(changed={"one.cu": text})
        if shared == 20:
            dynamic.launch("one", "one", (1, 1, 1), (1, 1, 1), [out], shared)
        else:
            with pytest.raises(KernelError, match="heap-buffer-overflow"):
                dynamic.launch("one", "one", (1, 1, 1), (1, 1, 1), [out], shared)
    assert out[0, 0, 0].isnan() and not out[0, 0, 1]


def test_a_misaligned_vector_load_is_caught() -> None:
    body = """(const float* x, float* out) {
        const float4 four = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
        out[threadIdx.x] = four.x + four.y + four.z + four.w;
    }"""
    x, out = torch.arange(17.0), torch.zeros(4)
    launch(body, x[:16], out, threads=4)
    assert torch.equal(out, x[:16].reshape(4, 4).sum(1))
    with pytest.raises(KernelError, match="misaligned address"):
        launch(body, x[1:], out, threads=4)


@pytest.mark.parametrize(("memory", "message"), [("", "stack-buffer-overflow"), ("__shared__", "global-buffer-overflow")])
def test_an_array_is_guarded_after_a_barrier_too(memory: str, message: str) -> None:
    body = f"""(float* out, int at) {{
        {memory} float kept[4];
        float* volatile place = kept;  // hidden from the compiler
        for (int i = 0; i < 4; ++i) place[i] = i + 1;
        __syncthreads();
        out[threadIdx.x] = place[at];
    }}"""
    out = torch.zeros(64)
    launch(body, out, np.int32(3))
    assert torch.equal(out, torch.full((64,), 4.0))
    with pytest.raises(KernelError, match=message):
        launch(body, out, np.int32(4))


def test_a_block_that_depends_on_the_previous_block_is_caught() -> None:
    """A block draws the ticket of its own number only if blocks run in order."""
    drawn = {}
    for order in ORDERS:
        tickets, out = torch.zeros(1, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
        launch("(int* tickets, int* out) { out[blockIdx.x] = atomicAdd(tickets, 1); }", tickets, out, threads=1, blocks=7, order=order)
        assert tickets == 7 and torch.equal(out.sort().values, torch.arange(7, dtype=torch.int32))
        drawn[order] = out.tolist()
    assert drawn["forward"] == [*range(7)] and drawn["reverse"] == [*range(7)][::-1]
    assert drawn["shuffled"] not in (drawn["forward"], drawn["reverse"])


def test_a_seed_repeats_its_order() -> None:
    def drawn(seed: int) -> list[int]:
        out, tickets = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        text = '#include "common.cuh"\nextern "C" __global__ void one(int* t, int* out) { out[threadIdx.x] = atomicAdd(t, 1); }'
        HostLauncher("shuffled", seed, {"one.cu": text}).launch("one", "one", (1, 1, 1), (64, 1, 1), [tickets, out])
        return list(out.tolist())

    assert drawn(1) == drawn(1) != drawn(2)


def test_three_dimensions_are_numbered_as_on_the_device() -> None:
    out = torch.full((3, 2, 2, 4, 3, 2), -1, dtype=torch.int32)
    text = """#include "common.cuh"
    extern "C" __global__ void one(int* out) {
        const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
        out[24 * block + thread] = 24 * block + thread;
    }"""
    HostLauncher("shuffled", changed={"one.cu": text}).launch("one", "one", (2, 2, 3), (2, 3, 4), [out])
    assert torch.equal(out.flatten(), torch.arange(out.numel(), dtype=torch.int32))


def test_warp_operations_agree_with_the_manual() -> None:
    """With 48 threads, so that the second warp is half a warp."""
    out = torch.zeros(8, 48, dtype=torch.int64)
    launch(
        """(long long* out) {
            const unsigned mask = threadIdx.x < 32 ? 0xffffffff : 0xffff;
            const int lane = threadIdx.x % 32;
            long long* own = out + threadIdx.x;
            own[0] = __shfl_sync(mask, 100 + lane, 5);
            own[48] = __shfl_sync(mask, 100. + lane, lane + 3, 8);
            own[2 * 48] = __shfl_xor_sync(mask, 100ll + lane, 9);
            own[3 * 48] = __shfl_down_sync(mask, 100.f + lane, 3, 16);
            own[4 * 48] = __shfl_up_sync(mask, 100u + lane, 3, 16);
            own[5 * 48] = __ballot_sync(mask, lane % 3 == 0);
            own[6 * 48] = __any_sync(mask, lane == 20) + 2 * __all_sync(mask, lane < 20);
            if (lane % 2) own[7 * 48] = __ballot_sync(mask & 0xaaaaaaaa, 1);  // the odd lanes alone
        }""",
        out,
        threads=48,
        order="shuffled",
    )
    lane = torch.arange(48) % 32
    shift = torch.where(lane % 16 < 13, lane + 3, lane), torch.where(lane % 16 >= 3, lane - 3, lane)
    every_third = [sum(1 << i for i in range(0, lanes, 3)) for lanes in (32, 16)]
    assert torch.equal(out[0], torch.full((48,), 105))
    assert torch.equal(out[1], 100 + lane // 8 * 8 + (lane + 3) % 8)
    assert torch.equal(out[2], 100 + (lane ^ 9))
    assert torch.equal(out[3], 100 + shift[0]) and torch.equal(out[4], 100 + shift[1])
    assert out[5].tolist() == [every_third[0]] * 32 + [every_third[1]] * 16
    assert out[6].tolist() == [1] * 32 + [2] * 16
    assert torch.equal(out[7], torch.where(lane % 2 == 1, torch.tensor([0xAAAAAAAA] * 32 + [0xAAAA] * 16), 0))


def test_a_shuffle_from_an_absent_lane_is_caught() -> None:
    with pytest.raises(KernelError, match="reads lane 20, which does not take part"):
        launch("(int* out) { *out = __shfl_sync(0xffffffff, 1, 20); }", torch.zeros(1, dtype=torch.int32), threads=8)


def test_atomics_return_the_old_value_and_store_the_result() -> None:
    counts = torch.tensor([0, 50, 50, -5], dtype=torch.int32)
    sums, wide = torch.zeros(1), torch.zeros(2, dtype=torch.float64)
    launch(
        """(int* counts, float* sum, double* wide) {
            atomicAdd(counts, threadIdx.x);
            atomicMin(counts + 1, int(threadIdx.x) - 3);
            atomicMax(counts + 2, int(threadIdx.x) - 3);
            atomicMax(reinterpret_cast<unsigned*>(counts + 3), threadIdx.x);  // -5 is large without its sign
            atomicAdd(sum, .5f);
            if (atomicAdd(wide, 1.) == 40) wide[1] = 40;
        }""",
        counts,
        sums,
        wide,
        order="shuffled",
    )
    assert counts.tolist() == [2016, -3, 60, -5] and sums == 32 and wide.tolist() == [64, 40]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "__half"), (torch.bfloat16, "__nv_bfloat16")])
def test_half_precision_agrees_with_pytorch_bit_for_bit(dtype: torch.dtype, name: str) -> None:
    """All 65536 values to float32 and back, and float32 values at and beside the ties between them, rounded to nearest."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].float().sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    values = torch.cat([every.float(), ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))])
    values = torch.cat([values, torch.tensor([65519.996, 65520.0, 3.4e38, 1e-45, -1e-45, torch.inf, -torch.inf])])
    wide, narrow = torch.zeros(len(every)), torch.zeros(len(values), dtype=dtype)
    launch(
        f"""(const {name}* every, float* wide, int n, const float* values, {name}* narrow, int m) {{
            for (int i = threadIdx.x; i < n; i += blockDim.x) wide[i] = float(every[i]);
            for (int i = threadIdx.x; i < m; i += blockDim.x) narrow[i] = values[i];
        }}""",
        *(every, wide, np.int32(len(every)), values, narrow, np.int32(len(values))),
    )
    assert torch.equal(wide.nan_to_num(7e37).view(torch.int32), every.float().nan_to_num(7e37).view(torch.int32))
    expected = values.to(dtype)
    assert torch.equal(narrow.isnan(), expected.isnan())
    assert torch.equal(narrow[~narrow.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


def test_views_of_one_memory_stay_views() -> None:
    x = torch.arange(8.0)
    launch("(const float* x, float* y, int n) { if (threadIdx.x < n) y[threadIdx.x] = 2 * x[threadIdx.x]; }", x, x[4:], np.int32(4))
    assert x.tolist() == [0, 1, 2, 3, 0, 2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([torch.zeros(1, dtype=torch.float64), np.int32(1)], "argument 0 is a tensor of float64 .* a pointer to float32"),
        ([torch.zeros(1), np.int64(1)], "argument 1 is the number int64 .* takes int32"),
        ([np.int64(1), np.int32(1)], "argument 0 is the number int64"),
        ([torch.zeros(1)], "1 arguments for a kernel that takes 2"),
        ([None, np.int32(1)], "null pointer"),
    ],
)
def test_arguments_are_checked_against_the_kernel(arguments: list[Tensor | np.generic | None], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        launch("(float* x, int n) { x[n - 1] = 1; }", *arguments, threads=1)


def test_an_impossible_launch_is_refused() -> None:
    for blocks, threads, message in ((0, 1, "the grid has a size"), (1, 1025, "the block has a size")):
        with pytest.raises(KernelError, match=message):
            launch("(float* x) { *x = 1; }", torch.zeros(1), blocks=blocks, threads=threads)
    with pytest.raises(KernelError, match="no kernel other"):
        HostLauncher(changed={"one.cu": '#include "common.cuh"\nextern "C" __global__ void one() {}'}).launch(
            "one", "other", (1, 1, 1), (1, 1, 1), []
        )


def test_a_kernel_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SECONDS", 1)
    with pytest.raises(KernelError, match="does not end"):
        launch("(volatile int* x) { while (!*x) {} }", torch.zeros(1, dtype=torch.int32))


def test_running_replaces_the_gpu_and_fills_new_memory() -> None:
    before = cuda.launcher, cuda.runs
    x = torch.zeros(3)
    with host.running() as launcher:
        assert cuda.launcher(x.device) is launcher and cuda.runs(x) and cuda.runs(x, "cuda") and not cuda.runs(x, "torch")
        assert torch.empty(5).isnan().all() and x.new_empty(5).isnan().all()
    assert (cuda.launcher, cuda.runs) == before and not torch.are_deterministic_algorithms_enabled()


def test_broken_changes_a_text_that_occurs_once() -> None:
    with pytest.raises(AssertionError, match="occurs 0 times"):
        host.broken("cam", "no such text", "", file="common.cuh")
