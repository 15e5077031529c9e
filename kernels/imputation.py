"""Noisy linear imputation: pixels that are not kept become the weighted mean of their neighbours.

If removed pixels were zeros or the mean colour, a model could read the mask's outline from them; imputed pixels show little of it.
Source: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022 (the ROAD benchmark).
The definition is `reference.imputed`; the equations are solved in `multigrid.py`, in PyTorch or by the kernels of imputation.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.kernels import cuda
from kdx.kernels.multigrid import PixelGrid

_VALUES = 2_500_000
"""Pixels, in all channels, that the CPU solves at once: about as many as its cache is good for."""

_BYTES = 120
"""Memory of each of these pixels in float32: thirty numbers."""

_STAGES = 16
"""The most corrections of a solution. Three are usual; after this many, it will not converge."""

_CYCLES = 2
"""Cycles per correction."""

_LEAST, _MOST = 0.03, 0.9
"""Bounds of the share of a correction that its cycles leave. A smaller share is not trusted, because rounding accumulates over large
holes; cycles that converge leave no larger share."""


def impute(
    images: Tensor,
    kept: Tensor,
    *,
    noise: float = 0.0,
    seed: int = 0,
    tolerance: float = 5e-5,
    backend: cuda.Backend = "auto",
) -> Tensor:
    """Replace every pixel that is not kept by the weighted mean of its eight neighbours, by solving for all of them at once:

        u_p = sum_q k_pq u_q / sum_q k_pq,        k_pq = 1/6 for a pixel beside p, 1/12 for a diagonal one,

    with sums over the neighbours inside the image, and u_q the pixel itself if it is kept.

    images: [n, c, h, w], n >= 1, floating-point; half precision is solved in float32. kept: boolean [n, h, w], or [h, w] for all
    images, the same in every channel. noise: the standard deviation of normal noise added to imputed pixels, in their units. It is drawn
    with ``seed`` for the whole batch, so the noise of an image depends on its place in the batch. tolerance: the largest estimated error
    of an imputed pixel, as a share of the image's largest kept value. backend: what solves the equations. Returns images of the same
    shape, type and device, with kept pixels unchanged bit for bit.

    Imputed pixels are between the smallest and the largest kept pixel. They are not a reconstruction: inside a large hole they show
    only the colours around it.

    Raises KdxError if shapes or types do not fit, if an image has NaN or infinity or keeps no pixel, if the noise is negative, if the
    tolerance is not positive, or if the precision of the images is too low to reach it.

    >>> import torch
    >>> from kdx.kernels.imputation import impute
    >>> image = torch.tensor([[0.0, 0.0, 1.0]]).expand(1, 1, 1, 3)
    >>> impute(image, torch.tensor([[True, False, True]]))
    tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    kept = _checked(images, kept, noise, tolerance)
    launcher = cuda.launcher(images.device) if cuda.runs(images, backend) else None
    images = images.detach()
    n, c, h, w = images.shape
    result = torch.empty_like(images)
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) if noise else None
    step = max(1, _values(images.device) // (c * h * w))
    for start in range(0, n, step):
        part = slice(start, start + step)
        wide = images[part].to(torch.promote_types(images.dtype, torch.float32))
        imputed = _solved(wide, kept[part], tolerance, launcher, start)
        if drawn is not None:
            imputed += noise * drawn[part].to(imputed)
        torch.where(kept[part, None], images[part], imputed.to(images.dtype), out=result[part])
    return result


def _values(device: torch.device) -> int:
    """Pixels that are solved at once: on a GPU, where a step costs thousands of launches, as many as fit into half of the free memory."""
    return torch.cuda.mem_get_info(device)[0] // (2 * _BYTES) if device.type == "cuda" else _VALUES


def _solved(images: Tensor, kept: Tensor, tolerance: float, launcher: cuda.Launcher | None, first: int) -> Tensor:
    """The solution [n, c, h, w] at the pixels that are not kept; ``first`` is the number of the first image.

    Each stage solves for the error of the current solution, by cycles that leave a small share of it. This share is estimated from the
    ratio of one correction to the previous one: a residual alone is not enough, because the error that belongs to it grows with the
    square of a hole's width.
    """
    mask = kept.to(images.dtype)
    grid = PixelGrid(1 - mask, images.shape[1], launcher)
    mask = mask[:, None]
    pixels = images * mask
    allowed = tolerance * torch.maximum(pixels.amax((1, 2, 3)), -pixels.amin((1, 2, 3)))
    mean = pixels.sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
    pixels.addcmul_(mean, mask, value=-1)
    grid.start(pixels.transpose(0, 1))
    solution = grid.layout.zeros(images.shape[1], like=images)
    before = torch.full_like(allowed, torch.nan)
    for _ in range(_STAGES):
        for cycles in range(1, _CYCLES + 1):
            grid.cycle()
            correction = grid.u.largest()
            share = (correction / before).nan_to_num(1).clamp(_LEAST, _MOST) ** (cycles / _CYCLES)
            converged = correction * share / (1 - share) <= allowed
            if bool(converged.all()):
                solution.data += grid.u.data
                return solution.merge(torch.empty_like(images).transpose(0, 1)).transpose(0, 1).add_(mean)
        before = correction
        solution.data += grid.u.data
        grid.refine(solution)
    raise KdxError(
        f"The imputation of {_rows(converged, first)} does not come within {tolerance:g} of its solution.",
        "Give a larger tolerance, or images in float64.",
    )


def _checked(images: Tensor, kept: Tensor, noise: float, tolerance: float) -> Tensor:
    """``kept`` as [n, h, w], or a KdxError."""
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise KdxError(
            f"The images have shape {list(images.shape)} and type {images.dtype}.",
            "Give at least one image: floating-point [n, channels, height, width].",
        )
    n, _, h, w = images.shape
    if kept.dtype != torch.bool or tuple(kept.shape) not in ((n, h, w), (h, w)):
        raise KdxError(
            f"The mask has shape {list(kept.shape)} and type {kept.dtype}.", f"Give booleans [{n}, {h}, {w}], or [{h}, {w}] for all images."
        )
    if kept.device != images.device:
        raise KdxError(f"The images are on {images.device} and the mask is on {kept.device}.", "Give both on one device.")
    if not noise >= 0:  # so that NaN fails
        raise KdxError(f"The noise {noise} is negative.", "Give a standard deviation, such as 0.01.")
    if not tolerance > 0:
        raise KdxError(f"The tolerance {tolerance} is not positive.", "Give a share of the largest pixel, such as 5e-5.")
    kept = kept.expand(n, h, w)
    if not bool((nonempty := kept.flatten(1).any(1)).all()):
        raise KdxError(f"The mask of {_rows(nonempty)} keeps no pixel.", "Keep at least one pixel of every image.")
    # A sum is fast, and not finite if a pixel is not finite. It may also overflow, so the pixels are then checked.
    if not bool(images.sum().isfinite()) and not bool((finite := images.isfinite().flatten(1).all(1)).all()):
        raise KdxError(f"The pixels are not finite in {_rows(finite)}.", "Repair or remove those images.")
    return kept


def _rows(valid: Tensor, first: int = 0) -> str:
    """The numbers of the images that are not valid."""
    rows = (first + (~valid).nonzero().flatten()).tolist()
    several = len(rows) > 1
    return f"image{'s' if several else ''} {', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}"
