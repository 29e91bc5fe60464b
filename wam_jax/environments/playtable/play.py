"""Recorded data: play that goes from one attempt to the next without resets, and demonstrations of single tasks.

A world model that never saw a failure imagines none. A share of play's attempts is therefore disturbed: placed
2 to 4.5 cm beside their goal, pushed only part of the way, broken off, or with fingers that close early, late or not
at all. Between attempts the hand moves freely, also among the fixtures. After a failure play simply goes on.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import specs
from wam_jax.environments.playtable import draws, dynamics, experts, starts
from wam_jax.environments.playtable.dynamics import State
from wam_jax.environments.playtable.environment import observe
from wam_jax.environments.playtable.experts import Plan, Progress
from wam_jax.types import Array, StepBatch

ACTION_NOISE = 0.05  # standard deviation on the three position entries, units of the action
STEPS_AFTER_SUCCESS = 6  # of a demonstration
_NO_LIMIT = 10_000  # steps
_FREE = -1  # label of steps without an attempt

# How an attempt is disturbed, and how often in relation to the other ways: offset, short, broken off, gripper.
_CLEAN, _OFFSET, _SHORT, _BROKEN_OFF, _GRIPPER = range(5)
_DISTURBANCES = np.array([26, 16, 10, 8])
_GRIPPER_SHIFTS = np.array([-2, -1, 0, 0, 1, 2])  # waypoints by which the fingers are late or early, 0: reversed

_FREE_SHARE = 0.6  # of attempts that free motion follows
_NEAR_SHARE = 0.35  # of free motions that go among the fixtures instead of above the table
_FREE_LOW = np.array([-0.20, -0.30, 0.50], np.float32)
_FREE_HIGH = np.array([0.30, -0.08, 0.66], np.float32)
_NEAR_LOW = np.array([-0.30, -0.48, 0.37], np.float32)
_NEAR_HIGH = np.array([0.36, 0.02, 0.62], np.float32)
_TURN = np.array([0.2, 0.2, 0.6], np.float32)  # half range of roll, pitch and yaw

# Random numbers of a new activity, by name: see `draws.uniform`.
_W = experts.MAX_WAYPOINTS
_ATTEMPT_DRAWS = dict(task=(8,), kind=(), steps=(), plan=(experts.PLAN_DRAWS,), push=(), offset=(3,), shift=())
_FREE_DRAWS = dict(near=(), pose=(_W, 6), flip=(_W,), wait=(_W,), count=(), speed=(), noisy=())
_DRAWS = dict(to_free=(), **_ATTEMPT_DRAWS, **_FREE_DRAWS)

# An attempt is labelled if its entry of scene_obs is within this range: the oracle can then find it solved.
_LABEL_INDEX = np.array([specs.DRAWER] * 2 + [specs.SLIDER] * 2 + [specs.LIGHTBULB] * 2 + [specs.LED] * 2)
_LABEL_LOW = np.array([-1, 0.15, -1, 0.185, -1, 0.5, -1, 0.5], np.float32)
_LABEL_HIGH = np.array([0.07, 1, 0.095, 1, 0.5, 2, 0.5, 2], np.float32)


@flax.struct.dataclass
class _Activity:
    """What an episode is doing: an attempt at a task, or free motion."""

    plan: Plan
    progress: Progress
    task: Array  # int32 [], its label, -1 where there is none
    scene: Array  # float32 [24], scene_obs when it began
    steps_left: Array  # int32 [], it is broken off when they are used up
    noise: Array  # float32 [], standard deviation on the position entries of the action
    is_free: Array  # bool []


def collect_play(
    rng: Array, num_episodes: int, num_steps: int, *, disturbed_share: float, chunk: int = 16
) -> StepBatch:
    """Records play.

    Args:
      rng: one key; the same key gives the same data.
      num_episodes, num_steps: size of the data.
      disturbed_share: of the attempts, 0 to 1; most of the disturbed ones fail.
      chunk: episodes that are recorded at once on the accelerator; a step of one needs 25 kB there.

    Returns:
      Arrays on the host. `task` is the attempted task and -1 between attempts; `reward` is 1 where the oracle finds the
      attempted task solved since the attempt began. Only the last step of an episode is `is_last`.
    """
    shares = np.array([1 - disturbed_share, *disturbed_share * _DISTURBANCES / _DISTURBANCES.sum()])
    kind_choice = jnp.asarray(np.cumsum(shares)[:-1], jnp.float32)  # as `draws.choice` has it
    collect = partial(_play_chunk, kind_choice=kind_choice, num_steps=num_steps)
    return _in_chunks(collect, jax.random.split(rng, num_episodes), chunk)


def collect_demonstrations(rng: Array, task: int, num_episodes: int, chunk: int = 64) -> StepBatch:
    """Records an expert that solves one task from random starts, with noise and speeds of its own each time.

    Args:
      rng: one key; the same key gives the same data.
      task: index into `specs.TASKS`.
      num_episodes: number of episodes, those in which the expert fails included: their reward is never 1.
      chunk: episodes that are recorded at once on the accelerator.

    Returns:
      Arrays on the host, T = `specs.MAX_EPISODE_STEPS`. `is_last` is six steps after the first success, or at the last
      step; rows after it are padding.
    """
    keys = jax.random.split(rng, num_episodes)
    return _in_chunks(partial(_demonstrate_chunk, task=jnp.int32(task)), keys, chunk)


def _in_chunks(collect, keys: Array, chunk: int) -> StepBatch:
    """Runs `collect` on equal chunks of episodes and joins what they return on the host."""
    total = keys.shape[0]
    chunk = min(chunk, total)
    index = np.arange(-(-total // chunk) * chunk) % total  # the last chunk is filled up with repetitions
    parts = [jax.device_get(collect(keys[rows])) for rows in index.reshape(-1, chunk)]
    return jax.tree.map(lambda *x: np.concatenate(x)[:total], *parts)


@partial(jax.jit, static_argnames="num_steps")
def _play_chunk(keys: Array, kind_choice: Array, num_steps: int) -> StepBatch:
    return jax.vmap(partial(_play_episode, kind_choice=kind_choice, num_steps=num_steps))(keys)


@jax.jit
def _demonstrate_chunk(keys: Array, task: Array) -> StepBatch:
    return jax.vmap(partial(_demonstrate_episode, task=task))(keys)


def _play_episode(rng: Array, kind_choice: Array, num_steps: int) -> StepBatch:
    start_rng, draw_rng, noise_rng = jax.random.split(rng, 3)
    draw = jax.vmap(lambda key: draws.uniform(key, **_DRAWS))(jax.random.split(draw_rng, num_steps))
    noise = jax.random.normal(noise_rng, (num_steps, 3))
    state = starts.reset(start_rng)
    first = _free_motion(jax.tree.map(lambda x: x[0], draw), state)

    def one(carry, inputs):
        state, activity, counts = carry
        draw, noise, t = inputs
        activity, counts = _continue(draw, activity, counts, state, kind_choice)
        activity, action = _act(noise, activity, state)
        reward = _reward(activity.task, activity.scene, state)
        row = StepBatch(observe(state), action, t == 0, t == num_steps - 1, activity.task, reward)
        return (dynamics.step(state, action), activity, counts), row

    carry = (state, first, jnp.zeros(len(specs.TASKS)))
    return jax.lax.scan(one, carry, (draw, noise, jnp.arange(num_steps)))[1]


def _demonstrate_episode(rng: Array, task: Array) -> StepBatch:
    start_rng, plan_rng, noise_rng = jax.random.split(rng, 3)
    state = starts.reset_to_task(start_rng, task)
    scene = dynamics.scene_obs(state)
    horizon = specs.MAX_EPISODE_STEPS

    def one(carry, inputs):
        state, expert, since_success = carry
        noise, t = inputs
        expert, action = experts.act(expert, state)
        action = _with_noise(action, ACTION_NOISE * noise)
        reward = _reward(task, scene, state)
        since_success = jnp.where((since_success > 0) | (reward > 0), since_success + 1, 0)
        is_last = (since_success == STEPS_AFTER_SUCCESS + 1) | (
            (t == horizon - 1) & (since_success <= STEPS_AFTER_SUCCESS)
        )
        row = StepBatch(observe(state), action, t == 0, is_last, task, reward)
        return (dynamics.step(state, action), expert, since_success), row

    carry = (state, experts.start(plan_rng, task, state), jnp.int32(0))
    noise = jax.random.normal(noise_rng, (horizon, 3))
    return jax.lax.scan(one, carry, (noise, jnp.arange(horizon)))[1]


def _reward(task: Array, scene: Array, state: State) -> Array:
    solved = specs.task_success(jnp.maximum(task, 0), scene, dynamics.scene_obs(state))
    return (solved & (task >= 0)).astype(jnp.float32)


def _with_noise(action: Array, noise: Array) -> Array:
    """Adds noise to the position entries and keeps all within [-1, 1]."""
    return jnp.clip(action.at[:3].add(noise), -1.0, 1.0)


def _act(noise: Array, activity: _Activity, state: State) -> tuple[_Activity, Array]:
    action, progress = experts.follow(activity.plan, activity.progress, state)
    activity = activity.replace(progress=progress, steps_left=activity.steps_left - 1)
    return activity, _with_noise(action, activity.noise * noise)


def _continue(
    draw: dict, activity: _Activity, counts: Array, state: State, kind_choice: Array
) -> tuple[_Activity, Array]:
    """The same activity, or a new one where it is finished; `counts` [8] are the labelled attempts so far."""
    finished = experts.is_finished(activity.plan, activity.progress) | (activity.steps_left <= 0)
    to_free = ~activity.is_free & (draw["to_free"] < _FREE_SHARE)
    attempt = _attempt(draw, activity.task, counts, state, kind_choice)
    new = jax.tree.map(partial(jnp.where, to_free), _free_motion(draw, state), attempt)
    activity = jax.tree.map(partial(jnp.where, finished), new, activity)
    begun = (jnp.arange(len(specs.TASKS)) == activity.task) & finished
    return activity, counts + begun


def _attempt(draw: dict, previous: Array, counts: Array, state: State, kind_choice: Array) -> _Activity:
    """An attempt at the possible task that was tried least; a share of them is disturbed."""
    task, label = _choose_task(draw["task"], previous, counts, state)
    kind = draws.choice(kind_choice, draw["kind"])
    plan = _disturb(draw, experts.plan(draw["plan"], task, state), kind)
    return _Activity(
        plan=plan,
        progress=experts.first_progress(),
        task=label,
        scene=dynamics.scene_obs(state),
        steps_left=jnp.where(kind == _BROKEN_OFF, draws.integer(8, 36, draw["steps"]), _NO_LIMIT),
        noise=jnp.float32(ACTION_NOISE),
        is_free=jnp.asarray(False),
    )


def _choose_task(draw: Array, previous: Array, counts: Array, state: State) -> tuple[Array, Array]:
    """The task to try, and its label.

    A task does not follow on itself without a pause, so that labels tell attempts apart. A door that stands where
    neither of its tasks can be solved is moved on by an attempt without a label.
    """
    value = dynamics.scene_obs(state)[_LABEL_INDEX]
    possible = (value > _LABEL_LOW) & (value < _LABEL_HIGH)
    neither = ~(possible | possible.reshape(-1, 2)[:, ::-1].reshape(-1))
    allowed = (possible | neither) & (jnp.arange(len(specs.TASKS)) != previous)
    gumbel = -jnp.log(-jnp.log(draw + 1e-6))
    task = jnp.argmax(jnp.where(allowed, gumbel - counts, -jnp.inf)).astype(jnp.int32)
    return task, jnp.where(possible[task], task, _FREE)


def _disturb(draw: dict, plan: Plan, kind: Array) -> Plan:
    """Spoils a plan; the waypoints that leave the last place stay as they are."""
    in_task = jnp.arange(_W) >= experts.RETREATS
    before = jnp.roll(plan.position, 1, axis=0)
    pushes = (in_task & ~plan.measured & (kind == _SHORT))[:, None]
    missing = draws.between(0.4, 0.85, draw["push"]) * (plan.position - before)
    position = plan.position - jnp.cumsum(jnp.where(pushes, missing, 0.0), axis=0)
    offset = jnp.where(kind == _OFFSET, _offset(draw["offset"]), 0.0)
    gripper = jnp.where(in_task & (kind == _GRIPPER), _wrong_gripper(draw["shift"], plan.gripper), plan.gripper)
    return plan.replace(position=position + in_task[:, None] * offset, gripper=gripper)


def _offset(draw: Array) -> Array:
    """2 to 4.5 cm to the side, and up to 4 cm up: [3]."""
    angle, size = draws.between(0.0, 2 * np.pi, draw[0]), draws.between(0.022, 0.045, draw[1])
    return jnp.stack([size * jnp.cos(angle), size * jnp.sin(angle), draws.between(-0.01, 0.04, draw[2])])


def _wrong_gripper(draw: Array, gripper: Array) -> Array:
    """Commands that come one or two waypoints early or late, or that are reversed: [W]."""
    shift = jnp.asarray(_GRIPPER_SHIFTS)[draws.integer(0, len(_GRIPPER_SHIFTS), draw)]
    shifted = gripper[jnp.clip(jnp.arange(_W) + shift, 0, _W - 1)]
    return jnp.where(shift == 0, -gripper, shifted)


def _free_motion(draw: dict, state: State) -> _Activity:
    """One to three random poses, above the table or among the fixtures, with fingers that open and close at will."""
    is_near = draw["near"] < _NEAR_SHARE
    low, high = jnp.where(is_near, _NEAR_LOW, _FREE_LOW), jnp.where(is_near, _NEAR_HIGH, _FREE_HIGH)
    flips = jnp.cumprod(jnp.where(draw["flip"] < 0.35, -1.0, 1.0))
    plan = Plan(
        position=draws.between(low, high, draw["pose"][:, :3]),
        euler=np.array([np.pi, 0, np.pi / 2], np.float32) + draws.between(-_TURN, _TURN, draw["pose"][:, 3:]),
        gripper=state.gripper_command * flips,
        tolerance=jnp.full(_W, 0.02),
        measured=jnp.zeros(_W, bool),
        speed=jnp.full(_W, draws.between(0.3, 0.9, draw["speed"])),
        cap=jnp.full(_W, 40, jnp.int32),
        hold=draws.integer(0, 5, draw["wait"]),
        length=draws.integer(1, 4, draw["count"]),
    )
    return _Activity(
        plan=plan,
        progress=experts.first_progress(),
        task=jnp.int32(_FREE),
        scene=dynamics.scene_obs(state),
        steps_left=jnp.int32(_NO_LIMIT),
        noise=jnp.where(draw["noisy"] < 0.3, 0.3, ACTION_NOISE),
        is_free=jnp.asarray(True),
    )
