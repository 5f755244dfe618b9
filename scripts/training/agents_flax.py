"""DQN (Mnih 2015) and SAC (Haarnoja 2018) in Flax: the twin of agents_torch.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization

from training import checkpoints
from training.games import Game, Play, Transitions, title
from training.loop_flax import host, narrow, plain
from training.optimizers import optax_transformation, set_rate


class Agent:
    """The parts that both have. `parts` names their optimizers and what each one trains."""

    parts: ClassVar[dict[str, str]]  # key in a checkpoint -> first part of the parameters' path
    copies: ClassVar[dict[str, str]]  # target network -> the one that it follows

    def __init__(self, play: Play) -> None:
        self.play, self.game = play, play.game
        with self._precision():
            module = checkpoints.create(play.job)
            for target, source in self.copies.items():
                nnx.update(getattr(module, target), nnx.state(getattr(module, source)))
            self._take(module)

    def _take(self, module: Any) -> None:
        self.module = module
        self.graph, self.params = nnx.split(module)
        self.tx = {
            key: optax.partition(
                {
                    "trained": optax_transformation(
                        self.game.optimizer, self.game.rate, self.game.schedule != "constant"
                    ),
                    "kept": optax.set_to_zero(),
                },
                partial(_labels, part),
            )
            for key, part in self.parts.items()
        }
        self.states = {key: tx.init(self.params) for key, tx in self.tx.items()}
        self._act = jax.jit(partial(_act, self.graph))
        self._update = jax.jit(partial(self._both, self.graph, self.tx, self.game))

    @staticmethod
    def _both(graph: Any, tx: Any, game: Game, params: Any, states: Any, b: Any, count: Any) -> Any:
        raise NotImplementedError

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The deterministic actions for observations (B, ...)."""
        with self._precision():
            found = np.asarray(self._act(self.params, self._array(obs)))
        return found.astype(np.int64 if self.game.kind == "dqn" else np.float64)

    def update(self, batch: Transitions, count: int, rate: float) -> tuple[float, ...]:
        """One update; the losses before it. `count` updates came before."""
        with self._precision():
            for state in self.states.values():
                set_rate(state.inner_states["trained"].inner_state, rate)
            given = {k: self._array(v) for k, v in batch.items()}
            found = self._update(self.params, self.states, given, np.int32(count))
            losses, self.params, self.states = found
            return tuple(map(float, losses))

    def save(self, path: Path, step: int) -> None:
        """A msgpack file: the networks with their targets, the optimizers, what else is known."""
        state: dict[str, Any] = {"model": plain(self.params)}
        for key, held in self.states.items():
            name = key.replace("optimizer", "opt_state")
            state[name] = serialization.to_state_dict(plain(held))
        state |= checkpoints.facts(self.play.job, step)
        data = serialization.msgpack_serialize(jax.tree.map(host, state))
        checkpoints.write(path, lambda file: file.write(data), self.play.job)

    def resume(self, path: Path) -> int:
        """Networks, optimizers and the step of either framework's checkpoint."""
        step = checkpoints.check(path, self.play.job)
        with self._precision():
            self._take(checkpoints.load(path, self.play.job))
            for key, tx in self.tx.items():
                args = self.module, self.game.rate_at(step), step, title(key)
                self.states[key] = checkpoints.fill(path, tx, *args)
        return step

    def weights(self) -> dict[str, np.ndarray]:
        """Canonical tensors."""
        flat = nnx.to_flat_state(self.params)
        values = {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}
        return checkpoints.canonical(self.play.job, values)

    def _array(self, array: np.ndarray) -> np.ndarray:
        return narrow(array, self.play.job.param_dtype)

    def _precision(self) -> Any:
        return jax.enable_x64(self.play.dtype == "float64")


def _labels(part: str, params: Any) -> Any:
    """Which parameters a transformation trains: those of one network."""
    flat = [
        (path, "trained" if path[0] == part else "kept") for path, _ in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def _act(graph: Any, params: Any, obs: Any) -> Any:
    return nnx.merge(graph, params).act(obs)


def _descend(loss_of: Any, tx: Any, state: Any, params: Any) -> tuple[Any, Any, Any]:
    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(grads, state, params)
    return loss, optax.apply_updates(params, updates), state


class DQN(Agent):
    """Huber loss against the target network, which becomes the network every `sync` updates."""

    parts: ClassVar[dict[str, str]] = {"optimizer": "q_net"}
    copies: ClassVar[dict[str, str]] = {"q_net_target": "q_net"}

    @staticmethod
    def _both(graph: Any, tx: Any, game: Game, params: Any, states: Any, b: Any, count: Any) -> Any:
        following = nnx.merge(graph, params).q_net_target(b["following"]).max(axis=1)
        wanted = b["reward"] + game.discount * (1 - b["done"]) * following

        def loss_of(params: Any) -> Any:
            values = nnx.merge(graph, params).q_net(b["obs"])
            taken = jnp.take_along_axis(values, b["action"][:, None], axis=1)[:, 0]
            return optax.losses.huber_loss(taken, wanted).mean()

        loss, params, state = _descend(loss_of, tx["optimizer"], states["optimizer"], params)
        synced = _follow(params, "q_net_target", "q_net", 1.0)
        due = (count + 1) % game.sync == 0
        params = jax.tree.map(lambda a, b: jnp.where(due, a, b), synced, params)
        return (loss,), params, {"optimizer": state}


class SAC(Agent):
    """Twin critics against their targets, then the actor against the critics; alpha is fixed."""

    parts: ClassVar[dict[str, str]] = {"critic_optimizer": "critic", "actor_optimizer": "actor"}
    copies: ClassVar[dict[str, str]] = {"critic_target": "critic"}

    def __init__(self, play: Play) -> None:
        super().__init__(play)
        self._draw = jax.jit(partial(_draw, self.graph))

    def sample(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions drawn with standard normal `noise` (B, A)."""
        with self._precision():
            found = self._draw(self.params, self._array(obs), self._array(noise))
        return np.asarray(found, np.float64)

    @staticmethod
    def _both(graph: Any, tx: Any, game: Game, params: Any, states: Any, b: Any, count: Any) -> Any:
        policy = nnx.merge(graph, params)
        action, density = policy.sample(b["following"], b["noise_following"])
        q0, q1 = policy.critic_target(b["following"], action)
        value = jnp.minimum(q0, q1)[:, 0] - game.entropy * density
        wanted = b["reward"] + game.discount * (1 - b["done"]) * value

        def critic_loss(params: Any) -> Any:
            q0, q1 = nnx.merge(graph, params).critic(b["obs"], b["action"])
            return 0.5 * (((q0[:, 0] - wanted) ** 2).mean() + ((q1[:, 0] - wanted) ** 2).mean())

        def actor_loss(params: Any) -> Any:
            policy = nnx.merge(graph, params)
            action, density = policy.sample(b["obs"], b["noise"])
            q0, q1 = policy.critic(b["obs"], action)
            return (game.entropy * density - jnp.minimum(q0, q1)[:, 0]).mean()

        key, other = "critic_optimizer", "actor_optimizer"
        critic, params, critic_state = _descend(critic_loss, tx[key], states[key], params)
        actor, params, actor_state = _descend(actor_loss, tx[other], states[other], params)
        params = _follow(params, "critic_target", "critic", game.blend)
        return (critic, actor), params, {key: critic_state, other: actor_state}


def _draw(graph: Any, params: Any, obs: Any, noise: Any) -> Any:
    return nnx.merge(graph, params).sample(obs, noise)[0]


def _follow(params: Any, target: str, source: str, blend: float) -> Any:
    """`params` with the target network moved towards the other by the share `blend`."""
    flat = dict(nnx.to_flat_state(params))
    for path, variable in list(flat.items()):
        if path[0] == target:
            other = flat[(source, *path[1:])].get_value()
            held = variable.get_value()
            flat[path] = variable.replace((1 - blend) * held + blend * other)
    return nnx.from_flat_state(list(flat.items()))
