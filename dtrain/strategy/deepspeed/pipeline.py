"""Pipeline parallelism by DeepSpeed's PipelineModule and its engine, with its ZeRO stage 1 on `dp`.

    pp 0:  embedding, blocks 0, 1  ->  activations  ->  pp 1:  blocks 2, 3, head      schedule: 1F1B
    the engine runs forward, backward, exchange, clipping and step;
    the gradient of a matrix that both ends share is summed over them

The stages are those of `pipeline`: each is one layer of a PipelineModule. Evaluations run as
`pipeline`'s. Cost a micro-batch, per rank: its activation to the next stage, its gradient to the
one before; then as DeepSpeed's stage 1 along `dp`, and one all-reduce of the shared matrix between
first and last stage. Source: https://www.deepspeed.ai/tutorials/pipeline/; Narayanan et al. 2019,
PipeDream (1806.03377).
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message
from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy, full_tensor
from dtrain.parallel.unused_parameters import refuse_unused
from dtrain.strategy.deepspeed.engine_state import (
    distribute_states,
    materialize_states,
    tensors_by_kind,
    whole_tensors,
)
from dtrain.strategy.deepspeed.library import ENGINE, check_beside_zero, fresh_groups, imported
from dtrain.strategy.deepspeed.zero import DeepSpeed
from dtrain.strategy.pipeline.executor import PipelineExecutor
from dtrain.strategy.pipeline.stages import keep_stage
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.task.batch import Batch, Models, divide


class DeepSpeedPipeline(PipelineParallel):
    """Cut the model's blocks over `pp`, by DeepSpeed; beside its ZeRO on `dp`.

    Args:
        degree, micro_batches, split: as PipelineParallel's.
    """

    name = "deepspeed_pipeline"
    engine = ENGINE

    def __init__(
        self,
        degree: int = REST,
        *,
        micro_batches: int | None = None,
        split: list[int] | None = None,
    ) -> None:
        super().__init__(degree, micro_batches=micro_batches, split=split)

    def check(self, plan: ParallelContext) -> None:
        super().check(plan)
        check_beside_zero(plan, self.name, "strategy=pipeline")
        stage = _zero(plan).stage
        if stage != 1:
            reason = "refuses it"
            if not stage:
                reason = "tells no norm, and counts a matrix that both ends share twice"
            raise ValueError(f"DeepSpeed's pipeline {reason} at stage {stage}: use stage 1")

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        super().check_model(model, plan)
        counts = self._blocks_of_stages(model)
        for stage in range(len(counts)):
            piece = keep_stage(copy.deepcopy(model), stage, counts)
            if not any(parameter.requires_grad for parameter in piece.parameters()):
                raise ValueError(
                    f"nothing trains in stage {stage} of {len(counts)}, and DeepSpeed's pipeline "
                    f"steps every stage: use strategy=pipeline, or another strategy.pp.split"
                )

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        deepspeed, zero = imported(), _zero(plan)
        ((name, model),) = models.items()
        fresh_groups(deepspeed, plan)
        ((stage, piece),) = self._by_stage(model, plan).items()
        executor = DeepSpeedPipelineExecutor(
            self.schedule, {stage: piece}, self.whole.outline, plan, micro_batches
        )
        with redirect_stdout(io.StringIO()):  # it prints a table of the stages
            module = deepspeed.pipe.PipelineModule(
                [self._layer_spec(each, executor.layer) for each in range(self.schedule.stages)],
                num_stages=self.schedule.stages,
                loss_fn=executor.loss,
                partition_method="uniform",
            )
            executor.engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizers[name], config=zero.config(plan, micro_batches)
            )
        # Its `train_batch` calls `train()`, which would wake what its author keeps in evaluation.
        executor.engine.module.train = lambda mode=True: executor.engine.module
        # DeepSpeed takes a shared layer to be shared in all its parameters
        parameters: dict[str, Any] = dict(piece.named_parameters())
        for key, parameter in parameters.items():
            parameter.ds_pipe_replicated = stage > 0 and key in self.whole.tied
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: executor.used.add(id(p)))
        zero.verify_engine(executor.engine, zero.degree)
        stages = executor.engine.num_stages
        assert stages == self.degree, f"{stages} stages, not {self.degree}"
        return executor

    def _layer_spec(self, stage: int, module: nn.Module) -> Any:
        """Return DeepSpeed's layer of a stage: all of it. Its own rank builds the module only."""
        from deepspeed.pipe import LayerSpec, TiedLayerSpec

        if self.whole.tied and stage in (0, self.schedule.stages - 1):
            tied = [f"piece.{name}" for name in self.whole.tied]
            spec = TiedLayerSpec("ends", nn.Identity, tied_weight_attr=tied)
        else:
            spec = LayerSpec(nn.Identity)
        spec.build = lambda log=False: module
        return spec

    reduce_gradients = Strategy.reduce_gradients  # nothing: the engine sums them

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        raise ValueError("the messages of DeepSpeed's pipeline are not told")


class Layer(nn.Module):
    """A stage that is called with activations only: it has each micro-batch's other inputs."""

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        self.piece = piece
        self.others: Iterator[dict[str, Tensor]] = iter(())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.piece(x, **next(self.others))
        return y


class DeepSpeedPipelineExecutor(PipelineExecutor):
    """Micro-batches through DeepSpeed's pipeline engine, which clips and steps by itself."""

    leaves_gradients = False

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.used: set[int] = set()  # parameters that this step's backward passes have reached
        (piece,) = self.stages.values()
        self.layer = Layer(piece)
        self.engine: Any = None

    def train(self, update: Any, batch: Batch, scale: Tensor) -> Tensor:
        losses: list[Tensor] = []

        def criterion(outputs: Tensor, index: Tensor) -> Tensor:
            losses.append(full_tensor(update.criterion(outputs, parts[int(index)])) * scale)
            return losses[-1] * self.micro_batches  # by which the engine divides

        parts = list(divide(batch, self.micro_batches))
        self.criterion = criterion
        self.layer.others = iter([self._arguments(update, part)[1] for part in parts])
        first = update.inputs[0]
        self.used.clear()
        with self.plan.around(), self.plan.autocast():
            self.engine.train_batch(
                iter([(part[first], torch.tensor(i)) for i, part in enumerate(parts)])
            )
        refuse_unused(self.layer.piece, self.used, self.plan, "DeepSpeed")
        return torch.stack(losses).detach().sum() if losses else self._zero()

    def norm(self, model: str) -> Tensor | None:
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64)

    def step(self, model: str, optimizer: Optimizer) -> None:
        """The engine has stepped."""

    def make_states(self, model: str, optimizer: Optimizer) -> None:
        materialize_states(self.engine)

    def state_tensors(self, model: str) -> dict[str, Tensor] | None:
        return {_full_name(name): tensor for name, tensor in whole_tensors(self.engine).items()}

    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:
        name = next(name for name, _ in self.engine.module.named_parameters())
        prefix = name.removesuffix(_full_name(name))
        renamed = {}
        for key, tensor in tensors.items():
            state = OPTIMIZER_STATE if key.startswith(OPTIMIZER_STATE) else ""
            renamed[state + prefix + key.removeprefix(state)] = tensor
        distribute_states(self.engine, renamed)

    def tensors_by_kind(self, model: str) -> dict[str, list[Tensor]] | None:
        return tensors_by_kind(self.engine)


def _zero(plan: ParallelContext) -> DeepSpeed:
    zero = plan.strategy_on("dp")
    assert isinstance(zero, DeepSpeed)  # `check_beside_zero` has refused others
    return zero


def _full_name(name: str) -> str:
    """Return the full name of what DeepSpeed calls `<layer>.piece.<name>`."""
    state = OPTIMIZER_STATE if name.startswith(OPTIMIZER_STATE) else ""
    return state + name.partition("piece.")[2]
