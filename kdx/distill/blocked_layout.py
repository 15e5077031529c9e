"""Convolutional networks on a processor, in the memory layout in which oneDNN computes.

PyTorch stores features as [n, C, H, W], or with channels last. oneDNN's fastest float32 convolutions work on blocks of 16 channels,
[n, C/16, H, W, 16], so that PyTorch reorders the input and the output of every convolution, in both passes. Here features stay in blocks
from one convolution to the next. All operators are the same; results differ by rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kdx.export import layouts
from kdx.export.graphs import FeatureGraph, Preprocessing

_MOST_CONVERTED = 0.1
"""The largest share of convolutions' outputs that other operators may take back to PyTorch's layout. Conversion costs time."""

_TOLERANCE = 1e-4
"""The largest difference of logits, relative to the largest logit, between both layouts."""

_CONVOLUTION = torch.conv2d
_NORMALISATIONS = (functional.batch_norm, torch.batch_norm)
_SUMS = (Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, torch.add)
_OTHERS = (functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.max_pool2d, torch.max_pool2d, Tensor.clone)
_PROPERTIES = (Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.numel)

Arguments = Sequence[Any]
Keywords = Mapping[str, Any]


@dataclass(frozen=True)
class _Convolution:
    """The arguments of torch.conv2d."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


@dataclass(frozen=True)
class _Normalisation:
    """The arguments of torch.nn.functional.batch_norm."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


@dataclass(frozen=True)
class _Folded:
    """A convolution with the batch normalisation after it: its weight in oneDNN's layout, and its bias."""

    weight: Tensor
    bias: Tensor


class BlockedLayout(TorchFunctionMode):
    """Inside the block, convolutions return features in oneDNN's layout, and the operators that have it keep it.

    Every other operator takes features back to PyTorch's layout. Autograd records the conversions.

    folded: by the id of a convolution's weight, the convolution that includes its batch normalisation (`_Recorder`).
    """

    def __init__(self, folded: Mapping[int, _Folded]) -> None:
        super().__init__()
        self._folded = folded
        self._normalised: dict[int, Tensor] = {}
        self.convolved = self.converted = 0
        """Numbers in the outputs of convolutions, and in the tensors that went back to PyTorch's layout."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Arguments = (), kwargs: Keywords | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _CONVOLUTION:
            return self._convolved(_Convolution(*args, **kwargs))
        blocked = [tensor for tensor in _tensors((args, kwargs)) if _is_blocked(tensor)]
        if not blocked or _is_property(func):
            return func(*args, **kwargs)
        if func in _NORMALISATIONS and id(blocked[0]) in self._normalised:
            return self._normalised.pop(id(blocked[0]))
        if _has_layout(func, args, kwargs):
            return func(*args, **kwargs)
        if _works_in_place(func, kwargs) and (args[0] is blocked[0] or "out" in kwargs):
            raise NotImplementedError(f"{func} would change a copy")
        self.converted += sum(tensor.numel() for tensor in blocked)
        return func(*dense(args), **dense(kwargs))

    def _convolved(self, call: _Convolution) -> Tensor:
        images, weight, bias = call.input, call.weight, call.bias
        if isinstance(call.padding, str) or images.ndim != 4 or images.dtype != torch.float32 or weight.dtype != torch.float32:
            return torch.conv2d(dense(images), weight, bias, call.stride, call.padding, call.dilation, call.groups)
        folded = self._folded.get(id(weight))
        if folded is not None:
            weight, bias = folded.weight, folded.bias
        blocked = images if _is_blocked(images) else images.to_mkldnn()
        result = torch.conv2d(blocked, weight, bias, call.stride, call.padding, call.dilation, call.groups)
        if folded is not None:
            self._normalised[id(result)] = result
        self.convolved += result.numel()
        return result


def dense(value: Any) -> Any:
    """The same with tensors in PyTorch's layout, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.to_dense() if _is_blocked(value) else value
    if isinstance(value, list | tuple):
        items = [dense(item) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    return {key: dense(item) for key, item in value.items()} if type(value) is dict else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_blocked(tensor: Tensor) -> bool:
    return tensor.layout is torch._mkldnn  # type: ignore[attr-defined]


def _is_property(func: Callable[..., Any]) -> bool:
    return func in _PROPERTIES or getattr(func, "__name__", "") == "__get__"


def _works_in_place(func: Callable[..., Any], kwargs: Keywords) -> bool:
    name: str = getattr(func, "__name__", "")
    named = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return named or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def _has_layout(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> bool:
    """Whether this call works in oneDNN's layout, and so does its backward pass."""
    if func in _NORMALISATIONS:
        if func is torch.batch_norm:  # its arguments have another order
            return False
        call = _Normalisation(*args, **kwargs)
        complete = all(tensor is not None for tensor in (call.running_mean, call.running_var, call.weight, call.bias))
        return complete and (call.training or not torch.is_grad_enabled())
    if func in _SUMS:
        first, *others = args
        return not kwargs and len(others) == 1 and all(isinstance(term, Tensor) and _is_blocked(term) for term in args) and (
            first.shape == others[0].shape
        )  # fmt: skip
    if func in (functional.max_pool2d, torch.max_pool2d):
        dilation = args[4] if len(args) > 4 else kwargs.get("dilation", 1)
        return dilation in (1, (1, 1), [1, 1]) and len(args) <= 5 and not kwargs.get("ceil_mode") and not kwargs.get("return_indices")
    return func in _OTHERS


class _Recorder(TorchFunctionMode):
    """Records which convolutions are followed by a batch normalisation and by nothing else, in a pass without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._convolutions: dict[int, _Convolution] = {}
        self._outputs: dict[int, tuple[Tensor, int]] = {}
        self._normalisations: dict[int, _Normalisation] = {}
        self._excluded: set[int] = set()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Arguments = (), kwargs: Keywords | None = None) -> Any:
        kwargs = kwargs or {}
        if not _is_property(func):
            for tensor in _tensors((args, kwargs)):
                if id(tensor) in self._outputs:
                    self._used(self._outputs[id(tensor)][1], func, args, kwargs)
        result = func(*args, **kwargs)
        if func is _CONVOLUTION:
            call = _Convolution(*args, **kwargs)
            key = id(call.weight)
            if key in self._convolutions or isinstance(call.padding, str):
                self._excluded.add(key)
            self._convolutions[key] = call
            self._outputs[id(result)] = result, key
        return result

    def _used(self, key: int, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> None:
        if func is not functional.batch_norm or key in self._normalisations:
            self._excluded.add(key)
            return
        call = self._normalisations[key] = _Normalisation(*args, **kwargs)
        if call.training or call.running_mean is None or call.running_var is None:
            self._excluded.add(key)

    def folded(self) -> dict[int, _Folded]:
        """The convolutions that can include their batch normalisation."""
        return {key: _fold(self._convolutions[key], call) for key, call in self._normalisations.items() if key not in self._excluded}


def _fold(convolution: _Convolution, normalisation: _Normalisation) -> _Folded:
    """y = s (W x + b - m) + t = (s W) x + s (b - m) + t, with s = weight / sqrt(variance + eps), m the mean and t the bias."""
    assert normalisation.running_var is not None and normalisation.running_mean is not None
    scale = (normalisation.running_var.double() + normalisation.eps).rsqrt()
    if normalisation.weight is not None:
        scale = scale * normalisation.weight.detach().double()
    bias = -normalisation.running_mean.double() * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias.detach().double() * scale
    if normalisation.bias is not None:
        bias = bias + normalisation.bias.detach().double()
    weight = (convolution.weight.detach().double() * scale[:, None, None, None]).float().to_mkldnn()
    stride, padding, dilation = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (convolution.stride, convolution.padding, convolution.dilation)
    )
    shape = tuple(convolution.input.shape)
    weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight, padding, stride, dilation, convolution.groups, shape)
    return _Folded(weight, bias.float())


class BlockedGraph(FeatureGraph):
    """A `FeatureGraph` whose network computes in oneDNN's layout; its results are in PyTorch's.

    frozen_for: the size (H, W) of the images of a network whose weights no longer change and that is only evaluated. Batch
    normalisations are then parts of the convolutions before them.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], preprocessing: Preprocessing, frozen_for: tuple[int, int] | None = None
    ) -> None:
        super().__init__(network, layers, preprocessing)
        self._folded: Mapping[int, _Folded] = {}
        if frozen_for is not None:
            with torch.no_grad(), layouts.eval_mode(network), _Recorder() as recorder:
                super()._pass(torch.zeros(2, 3, *frozen_for), lambda raw: raw)
            self._folded = recorder.folded()

    def _pass(self, images: Tensor, capture: Callable[[Tensor], Tensor]) -> tuple[object, dict[str, object]]:
        with BlockedLayout({} if self.network.training else self._folded):
            output, raw = super()._pass(images, capture)
        return dense(output), dense(raw)


def suits(network: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a network on a processor computes the same in oneDNN's layout, with few conversions. A trial on a copy decides it.

    The trial does not measure time: the decision must be the same whenever a training is resumed.
    """
    weights = [weight for weight in network.parameters() if weight.is_floating_point()]
    if not torch.backends.mkldnn.is_available() or any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            return _agrees(FeatureGraph(copy.deepcopy(network), ()), size)
    except Exception:  # an operator, perhaps one of the network's own, that does not take this layout
        return False


def _agrees(graph: FeatureGraph, size: tuple[int, int]) -> bool:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), layouts.eval_mode(graph.network):
        expected, _ = graph.watch(images)
        with BlockedLayout({}) as layout:
            logits, _ = graph.watch(images)
    if not layout.convolved or layout.converted > _MOST_CONVERTED * layout.convolved:
        return False
    graph.network.train()
    with torch.enable_grad(), BlockedLayout({}):
        loss = graph.watch(images)[0].sum()
    if loss.requires_grad:
        torch.autograd.backward(loss)
    return bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())
