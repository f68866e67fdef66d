"""What tensor parallelism does at the edges of split layers: who sends what there, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor


def split_parameter(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Leave this rank's slice of a parameter, where the module has it; needs no communication."""
    parameter = getattr(module, name, None)
    if parameter is not None:
        mine = distribute_tensor(parameter.detach(), mesh, (Shard(dim),), src_data_rank=None)
        setattr(module, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))


def is_split(parameter: object) -> bool:
    """Does tensor parallelism know this parameter, cut or not? Then its gradient is whole already."""
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())


def own(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook on the model: in evaluation logits are whole, for whatever is measured of them.

    And an output that is a view, as of a distributed tensor, would lose the hooks that FSDP sets on it.
    """
    if isinstance(output, DTensor):
        return output if module.training else output.full_tensor()
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def gather(mesh: DeviceMesh, outer: Placement, *, local: bool = False) -> Any:
    """A hook: give the module its input whole; a distributed one for column layers, which share its gradient's sum."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        x = DTensor.from_local(inputs[0], mesh, (outer,), run_check=False).redistribute(placements=(Replicate(),))
        return (x.to_local() if local else x, *inputs[1:]), named

    return hook


def summed(forward: Callable[[Tensor, Tensor], Tensor], mesh: DeviceMesh) -> Callable[[Tensor, Tensor], Tensor]:
    """Experts of which each rank has some hidden units: the sum of what they give is the whole."""

    def summed(x: Tensor, counts: Tensor) -> Tensor:
        shared = DTensor.from_local(x, mesh, (Replicate(),), run_check=False).to_local(grad_placements=(Partial(),))
        y = DTensor.from_local(forward(shared, counts), mesh, (Partial(),), run_check=False)
        return y.redistribute(placements=(Replicate(),)).to_local()

    return summed


def cut(mesh: DeviceMesh) -> Any:
    """A hook: of an output that every rank has, go on with this rank's tokens."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = DTensor.from_local(output, mesh, (Replicate(),), run_check=False)
        return whole.redistribute(placements=(Shard(1),)).to_local()

    return hook
