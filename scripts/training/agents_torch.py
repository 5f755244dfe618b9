"""DQN (Mnih 2015) and SAC (Haarnoja 2018) in PyTorch: acting, one update, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training import checkpoints
from training.games import Play, Transitions, title
from training.optimizers import torch_optimizer


class Agent:
    """The parts that both have. `parts` names their optimizers and what each one trains."""

    parts: ClassVar[dict[str, str]]  # key in a checkpoint -> prefix of parameters
    copies: ClassVar[dict[str, str]]  # target network -> the one that it follows

    def __init__(self, play: Play) -> None:
        self.play, self.game = play, play.game
        self.dtype = getattr(torch, play.job.param_dtype)
        self.policy: Any = checkpoints.create(play.job)
        with torch.no_grad():
            for target, source in self.copies.items():
                getattr(self.policy, target).load_state_dict(
                    getattr(self.policy, source).state_dict()
                )
        self._prepare()

    def _prepare(self) -> None:
        named = list(self.policy.named_parameters())
        self.optimizers = {
            key: torch_optimizer(
                self.game.optimizer, [(n, p) for n, p in named if n.startswith(f"{part}.")],
                self.game.rate,
            )
            for key, part in self.parts.items()
        }  # fmt: skip

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The deterministic actions for observations (B, ...)."""
        with torch.no_grad():
            found: Tensor = self.policy.act(self._tensor(obs))
        return found.numpy().astype(np.int64 if self.game.kind == "dqn" else np.float64)

    def save(self, path: Path, step: int) -> None:
        """One dict: the networks with their targets, the optimizers, what else is known."""
        state: dict[str, Any] = {"model": self.policy.state_dict()}
        state |= {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()}
        state |= checkpoints.facts(self.play.job, step)
        checkpoints.write(path, lambda file: torch.save(state, file), self.play.job)

    def resume(self, path: Path) -> int:
        """Networks, optimizers and the step of either framework's checkpoint."""
        step = checkpoints.check(path, self.play.job)
        self.policy = checkpoints.load(path, self.play.job)
        self._prepare()
        for key, optimizer in self.optimizers.items():
            checkpoints.fill(
                path, optimizer, self.policy, self.game.rate_at(step), step, title(key)
            )
        return step

    def weights(self) -> dict[str, np.ndarray]:
        """Canonical tensors."""
        return {k: v.numpy() for k, v in self.policy.state_dict().items()}

    def _set_rate(self, rate: float) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _tensors(self, batch: Transitions) -> dict[str, Tensor]:
        return {name: self._tensor(values) for name, values in batch.items()}


class DQN(Agent):
    """Huber loss against the target network, which becomes the network every `sync` updates."""

    parts: ClassVar[dict[str, str]] = {"optimizer": "q_net"}
    copies: ClassVar[dict[str, str]] = {"q_net_target": "q_net"}

    def update(self, batch: Transitions, count: int, rate: float) -> tuple[float, ...]:
        """One update; the loss before it. `count` updates came before."""
        self._set_rate(rate)
        b = self._tensors(batch)
        with torch.no_grad():
            following = self.policy.q_net_target(b["following"]).max(dim=1).values
            wanted = b["reward"] + self.game.discount * (1 - b["done"]) * following
        values = self.policy.q_net(b["obs"]).gather(1, b["action"][:, None])[:, 0]
        loss = F.smooth_l1_loss(values, wanted)
        _descend(self.optimizers["optimizer"], loss)
        if (count + 1) % self.game.sync == 0:
            self.policy.q_net_target.load_state_dict(self.policy.q_net.state_dict())
        return (loss.item(),)


class SAC(Agent):
    """Twin critics against their targets, then the actor against the critics; alpha is fixed."""

    parts: ClassVar[dict[str, str]] = {"critic_optimizer": "critic", "actor_optimizer": "actor"}
    copies: ClassVar[dict[str, str]] = {"critic_target": "critic"}

    def sample(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions drawn with standard normal `noise` (B, A)."""
        with torch.no_grad():
            action: Tensor = self.policy.sample(self._tensor(obs), self._tensor(noise))[0]
        return action.double().numpy()

    def update(self, batch: Transitions, count: int, rate: float) -> tuple[float, ...]:
        """One update of all three; the losses of the critics and of the actor before it."""
        self._set_rate(rate)
        game, policy, b = self.game, self.policy, self._tensors(batch)
        with torch.no_grad():
            action, density = policy.sample(b["following"], b["noise_following"])
            q0, q1 = policy.critic_target(b["following"], action)
            value = torch.minimum(q0, q1)[:, 0] - game.entropy * density
            wanted = b["reward"] + game.discount * (1 - b["done"]) * value
        q0, q1 = policy.critic(b["obs"], b["action"])
        critic = 0.5 * (F.mse_loss(q0[:, 0], wanted) + F.mse_loss(q1[:, 0], wanted))
        _descend(self.optimizers["critic_optimizer"], critic)
        action, density = policy.sample(b["obs"], b["noise"])
        q0, q1 = policy.critic(b["obs"], action)
        actor = (game.entropy * density - torch.minimum(q0, q1)[:, 0]).mean()
        _descend(self.optimizers["actor_optimizer"], actor)
        with torch.no_grad():
            pairs = zip(policy.critic_target.parameters(), policy.critic.parameters(), strict=True)
            for target, source in pairs:
                target.mul_(1 - game.blend).add_(source, alpha=game.blend)
        return critic.item(), actor.item()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
