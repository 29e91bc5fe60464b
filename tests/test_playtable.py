"""Playtable: honest contact, working experts, pictures that show the state, play with failures."""

from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wam_jax import environments, specs
from wam_jax.environments.playtable import dynamics, experts, geometry, play, rendering, starts

DOWN = (np.pi, 0.0, np.pi / 2)  # fingers open along x
ACROSS = (np.pi, 0.0, 0.0)  # fingers open along y
TILT = (np.pi + 0.6, 0.0, 0.0)  # as the switch is grasped
OPEN, CLOSE = specs.GRIPPER_OPEN, specs.GRIPPER_CLOSE
PLAY_EPISODES, PLAY_STEPS = 12, 480

render = jax.jit(rendering.render)


@pytest.fixture(scope="module", autouse=True)
def full_optimization():
    """Experts and pictures compute far longer than they compile, unlike the networks of the other tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def make_state(position, euler=DOWN, gripper=CLOSE, **scene):
    """A state at rest with the blocks out of the way; `scene` sets entries of scene_obs by index name."""
    robot_obs = np.zeros(specs.ROBOT_OBS_DIM, np.float32)
    robot_obs[:3], robot_obs[3:6], robot_obs[14] = position, euler, gripper
    robot_obs[6] = geometry.MAX_OPENING if gripper > 0 else 0.0
    scene_obs = np.zeros(specs.SCENE_OBS_DIM, np.float32)
    for i, x in enumerate((-0.28, -0.18, 0.10)):
        scene_obs[specs.BLOCKS + 6 * i :][:3] = x, 0.105, geometry.BLOCK_HEIGHT
    for name, value in scene.items():
        scene_obs[getattr(specs, name.upper())] = value
    return starts.reset_to(jnp.asarray(robot_obs), jnp.asarray(scene_obs))


@jax.jit
def drive(state, goal, gripper):
    """Thirty steps straight towards a target position, at 19 mm a step."""

    def one(state, _):
        shift = (goal - state.target_position) / specs.POSITION_SCALE
        shift = 0.95 * shift / jnp.maximum(0.95, jnp.max(jnp.abs(shift)))
        state = dynamics.step(state, jnp.concatenate([shift, jnp.zeros(3), gripper[None]]))
        return state, dynamics.scene_obs(state)

    return jax.lax.scan(one, state, length=30)


def go(state, goal, gripper):
    return drive(state, jnp.asarray(goal, jnp.float32), jnp.float32(gripper))[0]


def joint(state, index):
    return float(dynamics.scene_obs(state)[index])


def test_open_fingers_stop_at_the_drawer_bar():
    state = go(make_state((0.18, -0.25, 0.50), gripper=OPEN), (0.18, -0.25, 0.30), OPEN)
    assert state.position[2] > 0.38  # the bar's top, 4 cm above where they were sent
    assert joint(state, specs.DRAWER) == 0


def test_fingers_stop_at_table_cabinet_and_closed_door():
    table = go(make_state((0.0, -0.10, 0.60)), (0.0, -0.10, 0.30), CLOSE)
    assert table.position[2] >= geometry.TABLE_HEIGHT
    for x in (0.05, 0.30):  # the door, the wall beside it
        state = go(make_state((x, -0.10, 0.55)), (x, 0.25, 0.55), CLOSE)
        height, depth = float(state.position[2]) - geometry.TABLE_HEIGHT, float(state.position[1]) - 0.02
        assert -np.sqrt(0.75) * depth + 0.5 * height > 0  # still in front of the leaning panel
        assert joint(state, specs.SLIDER) == 0


def test_a_bar_between_the_fingers_is_held_and_pulled():
    state = go(make_state((0.18, -0.25, 0.50), ACROSS, OPEN), (0.18, -0.25, 0.37), OPEN)
    state = go(state, (0.18, -0.25, 0.37), CLOSE)
    assert 0.015 < state.opening < 0.04  # the bar keeps the fingers apart
    lifted = go(state, (0.18, -0.25, 0.60), CLOSE)
    assert abs(float(lifted.position[2] - state.position[2])) < 0.01  # a drawer does not go up
    pulled = go(lifted, (0.18, -0.40, 0.37), CLOSE)
    assert joint(pulled, specs.DRAWER) > 0.13
    let_go = go(go(pulled, (0.18, -0.40, 0.37), OPEN), (0.18, -0.40, 0.60), OPEN)
    assert let_go.position[2] > 0.55 and joint(let_go, specs.DRAWER) > 0.13


@pytest.mark.parametrize(("offset", "is_lifted"), [((0, 0), True), ((0.11, 0), False), ((0, 0.05), False)])
def test_only_a_grasp_around_the_switch_lifts_it(offset, is_lifted):
    dx, dz = offset  # the bar ends 6 cm from its middle: 11 cm is a grasp 5 cm beside it
    state = go(make_state((0.30 + dx, -0.10, 0.60), TILT, OPEN), (0.30 + dx, 0.022, 0.522 + dz), OPEN)
    state = go(state, (0.30 + dx, 0.022, 0.522 + dz), CLOSE)
    state = go(state, (0.30 + dx, 0.070, 0.604 + dz), CLOSE)
    assert (joint(state, specs.SWITCH) > geometry.SWITCH_ON) == is_lifted
    assert joint(state, specs.LIGHTBULB) == is_lifted
    assert (joint(state, specs.SWITCH) > 0) == is_lifted


def test_the_button_toggles_once_per_press():
    state = make_state((-0.12, -0.12, 0.55))
    for press in range(1, 4):
        state, scenes = drive(state, jnp.array([-0.12, -0.12, 0.462]), jnp.float32(CLOSE))
        assert scenes[-1, specs.BUTTON] > geometry.BUTTON_PRESSED
        assert np.sum(np.diff(np.asarray(scenes[:, specs.LED])) != 0) == 1  # thirty steps of pressing, one toggle
        state, scenes = drive(state, jnp.array([-0.12, -0.12, 0.55]), jnp.float32(CLOSE))
        assert scenes[-1, specs.BUTTON] == 0
        assert np.all(scenes[:, specs.LED] == press % 2)


def test_blocks_are_pushed_and_stay_on_the_table():
    state = make_state((0.30, -0.10, 0.46)).replace(
        blocks=jnp.array([[0.20, -0.10, 0.0], [-0.28, 0.105, 0.0], [0.10, 0.105, 0.0]])
    )
    pushed = go(state, (0.05, -0.10, 0.46), CLOSE)
    assert pushed.blocks[0, 0] < 0.06
    at_edge = go(go(make_state((0.20, 0.0, 0.50)), (0.2, -0.03, 0.46), CLOSE).replace(blocks=state.blocks),
                 (0.20, -0.40, 0.46), CLOSE)  # fmt: skip
    assert at_edge.blocks[0, 1] >= -0.18


def _wander(rng):
    """Six random poses near and inside the fixtures, 25 steps each: positions and overlaps after every step."""
    low = jnp.array([-0.38, -0.50, 0.30, np.pi - 0.5, -0.4, 0.0, -1.0])
    high = jnp.array([0.40, 0.15, 0.62, np.pi + 0.7, 0.4, 2.2, 1.0])
    start_rng, goal_rng = jax.random.split(rng)
    goals = jax.random.uniform(goal_rng, (6, 7), minval=low, maxval=high)

    def one(state, t):
        shift = jnp.clip((goals[t // 25, :3] - state.target_position) / specs.POSITION_SCALE, -1, 1)
        turn = jnp.clip((goals[t // 25, 3:6] - state.target_euler) / specs.EULER_SCALE, -1, 1)
        state = dynamics.step(state, jnp.concatenate([shift, turn, jnp.sign(goals[t // 25, 6:])]))
        return state, (state.position, dynamics.deepest_overlap(state))

    return jax.lax.scan(one, starts.reset(start_rng), jnp.arange(150))[1]


def test_the_hand_is_never_inside_anything_and_comes_free():
    positions, overlaps = jax.jit(jax.vmap(_wander))(jax.random.split(jax.random.key(5), 64))
    assert np.max(overlaps) < 0.002
    assert np.max(np.linalg.norm(np.diff(positions, axis=1), axis=-1)) < 0.06  # nothing throws it
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(positions), 60, axis=1)
    assert np.min(np.max(np.ptp(windows, axis=-1), axis=-1)) > 0.001


@pytest.fixture(scope="module")
def random_states():
    return jax.jit(jax.vmap(starts.reset))(jax.random.split(jax.random.key(3), 32))


def test_zero_actions_move_nothing(random_states):
    after, _ = environments.make("playtable").step_chunk(random_states, jnp.zeros((32, 8, specs.ACTION_DIM)))
    for field in ("joints", "lightbulb", "led", "blocks"):
        np.testing.assert_array_equal(getattr(after, field), getattr(random_states, field))


def test_a_step_keeps_the_type_of_every_array_so_that_it_compiles_once(random_states):
    one = jax.tree.map(lambda x: x[0], random_states)
    after = jax.eval_shape(dynamics.step, one, jnp.zeros(specs.ACTION_DIM))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype), x.weak_type), after) == jax.tree.map(
        lambda x: (x.shape, str(x.dtype), x.weak_type), one
    )


def test_batches_and_scans_equal_single_steps(random_states):
    rng = jax.random.key(3)
    one = jax.tree.map(lambda x: x[5], random_states)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), starts.reset(jax.random.split(rng, 32)[5]), one)

    actions = jax.random.uniform(jax.random.key(4), (32, 8, 7), minval=-1.0, maxval=1.0)
    env = environments.make("playtable")
    batch_state, batch = env.step_chunk(random_states, actions)
    assert batch.rgb_static.shape == batch.rgb_gripper.shape == (32, 8, 64, 64, 3)
    assert batch.rgb_static.dtype == batch.rgb_gripper.dtype == jnp.uint8
    assert batch.robot_obs.shape == (32, 8, 15) and batch.scene_obs.shape == (32, 8, 24)
    step = jax.jit(dynamics.step)
    for t in range(8):
        one = step(one, actions[5, t])
        np.testing.assert_allclose(dynamics.robot_obs(one), batch.robot_obs[5, t], atol=1e-4)
        np.testing.assert_allclose(dynamics.scene_obs(one), batch.scene_obs[5, t], atol=1e-4)
    for single_rgb, batch_rgb in zip(render(one), (batch.rgb_static, batch.rgb_gripper), strict=True):
        assert np.mean(np.any(np.asarray(single_rgb) != np.asarray(batch_rgb[5, -1]), axis=-1)) < 0.005
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[5], atol=1e-4), one, batch_state)


def test_environment_starts_are_possible_and_unsolved():
    env = environments.make("playtable")
    task = jnp.arange(32) % len(specs.TASKS)
    state = env.reset_to_task(jax.random.key(0), task)
    scene = jax.vmap(dynamics.scene_obs)(state)
    goal = scene
    for index, value in ((specs.DRAWER, 0.22), (specs.SLIDER, 0.28), (specs.LIGHTBULB, 1), (specs.LED, 1)):
        goal = goal.at[:, index].set(jnp.where(goal[:, index] > value / 2, 0.0, value))
    assert jnp.all(specs.task_success(task, scene, goal))  # the other end of its range solves each
    np.testing.assert_array_equal(scene[:, specs.LIGHTBULB], scene[:, specs.SWITCH] > geometry.SWITCH_ON)
    later = env.reset_to_task(
        jax.random.key(0), jnp.roll(task, -1), 1 + jnp.arange(len(task))
    )  # the same episodes, but for the first
    helpers.assert_equal(jax.tree.map(lambda x: x[1:], state), jax.tree.map(lambda x: x[:-1], later))
    with pytest.raises(ValueError, match="task must be"):
        env.reset_to_task(jax.random.key(0), jnp.array([8]))
    with pytest.raises(ValueError, match="actions must be"):
        env.step_chunk(state, jnp.zeros((32, 7)))


def test_lights_change_the_picture():
    state = make_state((-0.30, -0.30, 0.60))
    dark = np.asarray(render(state)[0], int)
    for lit in (state.replace(lightbulb=jnp.float32(1)), state.replace(led=jnp.float32(1))):
        change = np.abs(np.asarray(render(lit)[0], int) - dark).max(-1)
        assert np.sum(change > 100) >= 60


def test_pictures_show_joints_and_opening():
    closed, opened = make_state((0.0, -0.2, 0.6), gripper=CLOSE), make_state((0.0, -0.2, 0.6), gripper=OPEN)
    differs = lambda a, b: np.sum(np.any(np.asarray(a) != np.asarray(b), axis=-1))  # noqa: E731
    assert differs(render(closed)[1], render(opened)[1]) > 300
    for change in (dict(slider=0.28), dict(drawer=0.22), dict(switch=0.088)):
        moved = make_state((0.0, -0.2, 0.6), gripper=CLOSE, **change)
        assert differs(render(closed)[0], render(moved)[0]) > 30


def _expert_episode(rng, task):
    """Whether the expert solves a task within the limit, and the proprioception on the way."""
    start_rng, plan_rng = jax.random.split(rng)
    state = starts.reset_to_task(start_rng, task)
    scene = dynamics.scene_obs(state)

    def one(carry, _):
        state, expert = carry
        expert, action = experts.act(expert, state)
        state = dynamics.step(state, action)
        solved = specs.task_success(task, scene, dynamics.scene_obs(state))
        return (state, expert), (solved, dynamics.robot_obs(state))

    carry = (state, experts.start(plan_rng, task, state))
    _, (solved, robot_obs) = jax.lax.scan(one, carry, length=specs.MAX_EPISODE_STEPS)
    return jnp.any(solved), robot_obs


def test_experts_solve_all_tasks():
    run = jax.jit(jax.vmap(_expert_episode))
    for task, name in enumerate(specs.TASKS):
        solved, robot_obs = run(jax.random.split(jax.random.key(task), 256), jnp.full(256, task))
        assert np.mean(solved) >= 0.95, f"{name}: {np.mean(solved):.3f}"
        seen = np.asarray(specs.proprioception(robot_obs))
        assert np.all(np.abs(seen) <= 1.001), f"{name}: {np.abs(seen).max(axis=(0, 1))}"
        assert np.all((robot_obs[..., 6] >= 0) & (robot_obs[..., 6] <= geometry.MAX_OPENING))


@pytest.fixture(scope="module")
def recorded_play():
    return play.collect_play(jax.random.key(0), PLAY_EPISODES, PLAY_STEPS, disturbed_share=0.6, chunk=PLAY_EPISODES)


def _attempts(batch):
    """(task, solved) of every labelled attempt that ended within its episode."""
    found = []
    for task, reward in zip(batch.task, batch.reward, strict=True):
        ends = np.flatnonzero(np.diff(task)) + 1
        for begin, end in zip(np.r_[0, ends][:-1], ends, strict=True):
            if task[begin] >= 0:
                found.append((task[begin], reward[begin:end].max()))
    return np.array(found)


def test_play_succeeds_and_fails_at_every_turn(recorded_play):
    attempts = _attempts(recorded_play)
    assert 0.2 < 1 - attempts[:, 1].mean() < 0.7
    for task, name in enumerate(specs.TASKS):
        own = attempts[attempts[:, 0] == task, 1]
        assert len(own) >= 0.4 * len(attempts) / len(specs.TASKS), f"{name} is rarely tried"
        assert own.max() == 1, f"{name} never succeeds"
    assert 0.2 < np.mean(recorded_play.task < 0) < 0.6


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.9, 1.0), (1.0, 0.0, 0.5)])
def test_disturbed_attempts_are_those_that_fail(share, low, high):
    size = (PLAY_EPISODES, PLAY_STEPS)
    attempts = _attempts(play.collect_play(jax.random.key(3), *size, disturbed_share=share, chunk=PLAY_EPISODES))
    assert len(attempts) > 20 and low <= attempts[:, 1].mean() <= high


def test_play_is_well_formed(recorded_play):
    batch = recorded_play
    assert batch.action.shape == (PLAY_EPISODES, PLAY_STEPS, specs.ACTION_DIM)
    assert np.abs(batch.action).max() <= 1 and set(np.unique(batch.action[..., 6])) == {-1.0, 1.0}
    assert np.all(batch.is_first.sum(1) == 1) and np.all(batch.is_first[:, 0])
    assert np.all(batch.is_last.sum(1) == 1) and np.all(batch.is_last[:, -1])
    assert np.all(batch.reward[batch.task < 0] == 0)
    # The last command that an observation reports is the action before it.
    np.testing.assert_array_equal(batch.observation.robot_obs[:, 1:, 14], batch.action[:, :-1, 6])
    joints = batch.observation.robot_obs[..., 7:14]
    assert np.all((joints > -3.08) & (joints < 3.76)) and np.all(joints[..., 3] < 0)


def test_play_repeats_for_the_same_key(recorded_play):
    again = play.collect_play(jax.random.key(0), PLAY_EPISODES, PLAY_STEPS, disturbed_share=0.6, chunk=PLAY_EPISODES)
    jax.tree.map(np.testing.assert_array_equal, recorded_play, again)


def test_demonstrations_end_after_their_success():
    task = specs.task_index("turn_on_led")
    batch = play.collect_demonstrations(jax.random.key(1), task, 6, chunk=4)
    assert batch.reward.shape == (6, specs.MAX_EPISODE_STEPS) and np.all(batch.task == task)
    assert np.all(batch.is_last.sum(1) == 1)
    first = batch.reward.argmax(1)
    assert np.all(batch.reward.max(1) == 1)
    expected = np.minimum(first + play.STEPS_AFTER_SUCCESS, specs.MAX_EPISODE_STEPS - 1)
    np.testing.assert_array_equal(batch.is_last.argmax(1), expected)
