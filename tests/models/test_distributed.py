"""The wrappers of distributed training and of weight averaging, with a process group of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kdx
from kdx import cam, models
from kdx.errors import KdxError
from tests.models.test_prepared import IMAGES, Net

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PyTorch's own, about its distributed packages
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="PyTorch was built without gloo"),
]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


def trained() -> nn.Module:
    """After a training step, when the wrapper has buckets of gradients."""
    network = DistributedDataParallel(Net())
    network.eval()(IMAGES).sum().backward()
    return network


def compiled() -> nn.Module:
    network: Any = torch.compile(DistributedDataParallel(Net()), backend="eager")
    assert isinstance(network, nn.Module)
    return network


def averaged() -> nn.Module:
    network = AveragedModel(DistributedDataParallel(Net()), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    network.update_parameters(DistributedDataParallel(Net()))
    return network


def exponential() -> nn.Module:
    utils = pytest.importorskip("timm.utils")
    network: nn.Module = utils.ModelEmaV3(DistributedDataParallel(Net()))
    return network


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    network = Net()
    network.block = checkpoint_wrapper(network.block)  # type: ignore[assignment]
    return DistributedDataParallel(network)


@pytest.mark.parametrize("make", [trained, pytest.param(compiled, marks=pytest.mark.slow), averaged, exponential, checkpointed])
def test_every_entry_takes_the_wrapped_module(make: Callable[[], nn.Module]) -> None:
    network, base = make(), Net()
    nn.init.normal_(base.get_parameter("block.0.weight"))
    expected = kdx.grad_cam(Net(), IMAGES, "block", 2)
    torch.testing.assert_close(kdx.grad_cam(network, IMAGES, "block", 2).maps, expected.maps)
    assert models.layers(network, (14, 11)) == models.layers(Net(), (14, 11))
    layer = next(module for name, module in network.named_modules() if name.endswith("block"))
    torch.testing.assert_close(cam.GradCAM(network, [layer])(IMAGES), cam.GradCAM(Net(), ["block"])(IMAGES))
    results = []
    for student in (network, Net()):
        with kdx.Explainer(student=student, base=base, layers=["block"], runtime="eager", permutations=0) as explainer:
            results.append(explainer(IMAGES, torch.tensor([0, 1, 0, 1, 2])).layers["block"].distilled.maps)
    torch.testing.assert_close(*results)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def fully_sharded(part: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    network = Net()
    fully_shard(network.block if part else network, mesh=mesh())
    return network


def fully_sharded_wrapper() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))


def of_distributed_tensors() -> nn.Module:
    from torch.distributed.tensor import distribute_module

    network: nn.Module = distribute_module(Net(), mesh())
    return network


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fully_sharded(False), "The network .*"),
        (lambda: fully_sharded(True), "The module 'block' .*"),
        (fully_sharded_wrapper, "The network .*"),
        (of_distributed_tensors, r"The module 'stem.0' \(Conv2d\)"),
    ],
)
def test_a_sharded_module_is_refused_by_name_and_its_full_weights_are_taken(make: Callable[[], nn.Module], name: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    network = make()
    with pytest.raises(KdxError, match=f"{name} is sharded over processes") as refused:
        kdx.grad_cam(network, IMAGES, "block", 2)
    assert "full state_dict" in refused.value.hint
    whole = Net()
    nn.init.zeros_(whole.fc.weight)
    whole.load_state_dict(get_model_state_dict(network, options=StateDictOptions(full_state_dict=True)))
    torch.testing.assert_close(kdx.grad_cam(whole, IMAGES, "block", 2).maps, kdx.grad_cam(Net(), IMAGES, "block", 2).maps)
