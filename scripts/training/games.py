"""The games of tasks that play, by gymnasium: settings, episodes, the replay buffer, the score.

All of it and every random number are NumPy's and shared; a framework's agent only acts and updates
(`agents_torch`, `agents_flax`; `playing` trains them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.description import Data, Job, Schedule, Task, schedule
from training.optimizers import recipe
from training.score import Score, mean
from zoo.containers.errors import UsageError
from zoo.model import override
from zoo.registry import get

Transitions = dict[str, np.ndarray]  # obs, action, reward, following, done
EPISODES = 100  # of an evaluation
FIRST_EVALUATION = 10_000  # the seed of its first episode: none that training uses


@dataclass(frozen=True)
class Game:
    """`name` is `preset.tag`. Steps are the environment's; rates and sizes are those in use."""

    name: str
    summary: str
    environment: str
    kind: str  # "dqn" or "sac"
    licence: str = "gymnasium (MIT)"
    local: bool = False
    optimizer: str = "Adam"
    rate: float = 1e-3
    batch_size: int = 64
    steps: int = 10000
    starts: int = 1000  # random steps before the first update
    every: int = 1  # environment steps between rounds of updates
    updates: int = 1  # updates in a round
    discount: float = 0.99
    capacity: int = 50000
    explore_until: float = 0.2  # dqn: share of all steps in which epsilon falls to its last value
    explore_last: float = 0.04
    sync: int = 10  # dqn: updates after which the target network becomes the network
    blend: float = 0.005  # sac: how far the targets follow at every update
    entropy: float = 0.2  # sac: the weight of the entropy, fixed
    schedule: Schedule = "constant"
    notes: str = ""

    def rate_at(self, step: int) -> float:
        """The learning rate at this step of the environment, from 0."""
        return self.rate * schedule(self.schedule, step / self.steps)


GAMES = {
    game.name: game
    for game in (
        Game(
            "dqn_cartpole.cartpole",
            "a pole on a cart, balanced by DQN",
            "CartPole-v1",
            "dqn",
            steps=40000,
            every=128,
            updates=128,
            capacity=100000,
            sync=128,
            notes="the settings are the best of five tried on these episodes; "
            "with them, seed 1 gave 103",
        ),
        Game(
            "sac.pendulum",
            "a pendulum swung up by SAC",
            "Pendulum-v1",
            "sac",
            batch_size=256,
            steps=6000,
        ),
    )
}


@dataclass(frozen=True)
class Play:
    """A game with everything settled. `config` has target networks."""

    game: Game
    job: Job  # what checkpoints and models ask for
    dtype: str

    @property
    def framework(self) -> str:
        """torch or flax."""
        return self.job.framework


def settle(
    game: Game,
    framework: str,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    **settings: Any,
) -> Play:
    """The play of a game; settings left out or None are the game's own."""
    if dtype == "bfloat16":
        raise UsageError("games are trained in float32 or float64", "leave out --dtype")
    for name, option in (("epochs", "--epochs"), ("folder", "--data")):
        if settings.pop(name, None) is not None:
            raise UsageError(f"{game.name} has no {option}", "leave it out")
    if settings.pop("devices", 1) > 1:
        raise UsageError("a game is played on one device", "leave out --devices")
    told = {name: value for name, value in settings.items() if value is not None}
    game = dataclasses.replace(game, **told)
    recipe(game.optimizer)
    if min(game.batch_size, game.steps) < 1 or not game.rate > 0:
        raise UsageError("--batch-size, --steps and --lr are above 0", "give larger ones")
    found = get(game.name.partition(".")[0])
    config = override(found.config, {"target": True, **(overrides or {})})
    none = Data({"obs": np.zeros((1, 1))}, {}, lambda rows, rng: None)  # type: ignore[arg-type, return-value]
    task = Task(game.name, game.summary, lambda c, f: none, (), _no_score, game.licence)
    job = Job(
        task, none, found.model, config, framework, game.optimizer, game.rate, game.schedule,
        1, game.steps, seed, dtype,
    )  # fmt: skip
    return Play(game, job, dtype)


def _no_score(results: Any) -> Score:
    raise NotImplementedError("a game is scored by playing")


@dataclass
class Buffer:
    """The last `capacity` transitions."""

    capacity: int
    held: Transitions = field(default_factory=dict)
    count: int = 0

    def add(self, **transition: Any) -> None:
        """Put one in, over the oldest where it is full."""
        for name, value in transition.items():
            value = np.asarray(value)
            if name not in self.held:
                self.held[name] = np.zeros((self.capacity, *value.shape), value.dtype)
            self.held[name][self.count % self.capacity] = value
        self.count += 1

    def draw(self, rng: np.random.Generator, size: int) -> Transitions:
        """`size` of them, with repetition."""
        rows = rng.integers(0, min(self.count, self.capacity), size)
        return {name: values[rows] for name, values in self.held.items()}


def environment(name: str) -> Any:
    """The gymnasium environment. UsageError where gymnasium is not installed."""
    try:
        import gymnasium
    except ImportError:
        raise UsageError("games need gymnasium", "pip install gymnasium") from None
    return gymnasium.make(name)


def title(key: str) -> str:
    """What an optimizer is called among several: "actor" for `actor_optimizer`."""
    return key.removesuffix("optimizer").removesuffix("_")


class Episodes:
    """The game that training plays, and its replay buffer."""

    def __init__(self, game: Game, seed: int) -> None:
        self.game = game
        self.env = environment(game.environment)
        self.rng = np.random.default_rng([seed, 8])
        self.buffer = Buffer(game.capacity)
        self.low, self.high = _bounds(self.env)
        self.obs, _ = self.env.reset(seed=seed)
        self.total = 0.0

    def step(self, player: Any, step: int, random: bool) -> float | None:
        """One step of the game; the return of an episode that it ends, else None."""
        action = self._random() if random else self._chosen(player, step)
        taken = action if self.low is None else self.low + (action + 1) / 2 * (self.high - self.low)
        following, reward, done, cut, _ = self.env.step(taken)
        self.buffer.add(
            obs=np.asarray(self.obs, np.float64),
            action=action,
            reward=float(reward),
            following=np.asarray(following, np.float64),
            done=float(done),
        )
        self.obs, self.total = following, self.total + float(reward)
        if not (done or cut):
            return None
        ended, self.total = self.total, 0.0
        self.obs, _ = self.env.reset()
        return ended

    def draw(self) -> Transitions:
        """A batch for an update, with the noise that SAC's actions need."""
        batch = self.buffer.draw(self.rng, self.game.batch_size)
        return batch | noise(self.game, batch, self.rng)

    def _random(self) -> Any:
        if self.low is None:
            return int(self.rng.integers(self.env.action_space.n))
        return self.rng.uniform(-1, 1, self.low.shape)

    def _chosen(self, player: Any, step: int) -> Any:
        obs = np.asarray(self.obs, np.float64)[None]
        if self.low is not None:
            return player.sample(obs, self.rng.standard_normal((1, *self.low.shape)))[0]
        share = min(step / (self.game.explore_until * self.game.steps), 1)
        if self.rng.random() < 1 + share * (self.game.explore_last - 1):
            return self._random()
        return int(player.act(obs)[0])


def noise(game: Game, batch: Transitions, rng: np.random.Generator) -> Transitions:
    """What SAC draws its actions with: one for the following state's, one for this state's."""
    if game.kind != "sac":
        return {}
    shape = batch["action"].shape
    return {"noise_following": rng.standard_normal(shape), "noise": rng.standard_normal(shape)}


def _bounds(env: Any) -> tuple[Any, Any]:
    """The bounds of continuous actions, None for a choice among some."""
    space = env.action_space
    if hasattr(space, "n"):
        return None, None
    return np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)


def evaluate(name: str, act: Callable[[np.ndarray], np.ndarray], episodes: int = EPISODES) -> Score:
    """The mean return of the deterministic policy, over episodes with seeds of their own.

    They are played side by side, so that the policy is asked for all actions at once.
    """
    games = [environment(name) for _ in range(episodes)]
    low, high = _bounds(games[0])
    starts = [game.reset(seed=FIRST_EVALUATION + i)[0] for i, game in enumerate(games)]
    obs, returns = np.array(starts, np.float64), np.zeros(episodes)
    running = np.ones(episodes, bool)
    while running.any():
        actions = act(obs)
        for i in np.flatnonzero(running):
            action = actions[i]
            taken = int(action) if low is None else low + (action + 1) / 2 * (high - low)
            obs[i], reward, done, cut, _ = games[i].step(taken)
            returns[i] += float(reward)
            running[i] = not (done or cut)
    return mean("return", returns)


def recorded(game: Game, seed: int, count: int = 2000) -> Buffer:
    """Transitions of a random policy: what two frameworks can both learn from, step by step."""
    episode = Episodes(dataclasses.replace(game, capacity=count), seed)
    for step in range(count):
        episode.step(None, step, random=True)
    return episode.buffer
