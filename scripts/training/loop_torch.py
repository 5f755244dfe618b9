"""The PyTorch side of a run: a model, an optimizer, one step."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.runtime.arrays import named_outputs
from training import checkpoints
from training.description import Batch, Job, Term
from training.optimizers import torch_optimizer
from zoo.containers.errors import UsageError


class Trainer:
    """One job in PyTorch. Under `torchrun` each process computes its part of every batch."""

    framework = "torch"

    def __init__(self, job: Job) -> None:
        if job.devices > 1:
            raise UsageError(
                "--devices is of flax; PyTorch divides a batch among processes",
                f"torchrun --nproc-per-node {job.devices} scripts/train.py ... --framework torch",
            )
        self.job = job
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        compute = job.dtype if job.dtype == "bfloat16" else None
        self.module: nn.Module = checkpoints.create(job, dtype=compute)
        self.dtype = getattr(torch, job.param_dtype)
        torch.manual_seed(job.seed)
        self._prepare()

    def _prepare(self) -> None:
        job = self.job
        self.module.train()
        self.optimizer = torch_optimizer(job.optimizer, self.module.named_parameters(), job.rate)
        self.callable: nn.Module = self.module
        if self.world > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo")
            self.callable = nn.parallel.DistributedDataParallel(self.module)

    def step(self, batch: Batch, rate: float) -> float:
        """One update; the loss before it, of the whole batch."""
        if self.world > 1:
            batch = batch.part(self.rank, self.world)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        output = self.callable(**{k: self._tensor(v) for k, v in batch.inputs.items()})
        loss = self._loss(output, batch)
        # DDP averages gradients, the parts of a loss add up: hence the factor.
        (loss * self.world).backward()
        self.optimizer.step()
        total = loss.detach()
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return float(total)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Outputs in eval mode, by name, float64."""
        self.module.eval()
        with torch.no_grad():
            output = self.module(**{k: self._tensor(v) for k, v in batch.inputs.items()})
        self.module.train()
        return {k: v.double().numpy() for k, v in named_outputs(output).items()}

    def save(self, path: Path, step: int) -> None:
        """A checkpoint as PyTorch's users write them: one dict."""
        if self.rank:
            return
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **checkpoints.facts(self.job, step),
        }
        checkpoints.write(path, lambda file: torch.save(state, file), self.job)

    def resume(self, path: Path) -> int:
        """Take up the weights, the optimizer and the step of either framework's checkpoint."""
        step = checkpoints.check(path, self.job)
        self.module = checkpoints.load(path, self.job)
        self._prepare()
        checkpoints.fill(path, self.optimizer, self.module, self.job.rate_at(step), step)
        return step

    def weights(self) -> dict[str, np.ndarray]:
        """Canonical tensors."""
        return {k: v.detach().numpy() for k, v in self.module.state_dict().items()}

    def wait(self) -> None:
        """For all processes to be here: none may leave while another still talks to it."""
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the group of processes; DDP first, which must not outlive the group."""
        if self.world > 1 and torch.distributed.is_initialized():
            self.callable = self.module
            gc.collect()
            torch.distributed.destroy_process_group()

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _loss(self, output: Any, batch: Batch) -> Tensor:
        parts = [loss_of(term, output, batch, self.dtype) for term in self.job.task.terms]
        return torch.stack([part for part in parts if part is not None]).sum()


def loss_of(term: Term, output: Any, batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """One term of a loss; None where the batch has no such target."""
    found = getattr(output, term.output) if term.output else output
    if term.kind == "value":
        return term.scale * found.to(dtype)
    if term.target not in batch.targets:
        return None
    target = torch.from_numpy(np.ascontiguousarray(batch.targets[term.target]))
    weight = torch.from_numpy(batch.weight(term.target)).to(dtype)
    return term.scale * (elements(term.kind, found.to(dtype), target) * weight).sum()


def elements(kind: str, found: Tensor, target: Tensor) -> Tensor:
    """The loss of every element."""
    if kind == "cross_entropy":
        log = torch.log_softmax(found, -1)
        return -log.gather(-1, target[..., None])[..., 0]
    target = target.to(found.dtype)
    if kind == "mse":
        return (found - target) ** 2
    if kind == "bce":
        return F.binary_cross_entropy(found, target, reduction="none")
    return F.binary_cross_entropy_with_logits(found, target, reduction="none")


def evaluate(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a loaded module, by name, in its own dtype."""
    dtype = next(module.parameters()).dtype
    tensors = {
        k: torch.from_numpy(np.ascontiguousarray(v)).to(dtype if v.dtype.kind == "f" else None)
        for k, v in inputs.items()
    }
    with torch.no_grad():
        output = module(**tensors)
    return {k: v.double().numpy() for k, v in named_outputs(output).items()}
