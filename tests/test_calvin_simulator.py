"""CALVIN's simulator against a recording of the original, its pool of processes, and what it refuses."""

import dataclasses
import os
import signal
import sys

import helpers
import jax
import numpy as np
import pytest
from calvin_files import ASSETS, SHARED, needs_simulator

from wam_jax import environments, evaluation, images, specs
from wam_jax.environments.calvin import assets, kinematics, oracle, recordings, scene, starts
from wam_jax.environments.calvin.environment import Calvin
from wam_jax.environments.calvin.pool import Pool, begin
from wam_jax.environments.calvin.worker import Settings


@pytest.fixture(scope="module")
def recording():
    return recordings.load(str(SHARED / "replay_D.npz"))


@pytest.fixture(scope="module")
def pool():
    pool = Pool(Settings(str(ASSETS)), num_workers=1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def environment():
    environment = environments.make("calvin", assets=str(ASSETS), num_workers=2)
    yield environment
    environment.close()


def shortened(recording, steps, **changes):
    """The first steps of a recording, with the pictures of its reset alone."""
    changes = {
        "actions": recording.actions[:steps],
        "robot_obs": recording.robot_obs[: steps + 1],
        "scene_obs": recording.scene_obs[: steps + 1],
        **{key: getattr(recording, key)[:1] for key in ("frame_steps", "rgb_static", "rgb_gripper")},
    } | changes
    return dataclasses.replace(recording, **changes)


# --- Equal to the original ---


@needs_simulator
def test_a_recording_of_the_original_is_repeated_bit_for_bit(pool, recording):
    difference = recordings.compare(pool, recording)
    assert difference == recordings.Difference(0.0, 0.0, 22, 22, None)


@needs_simulator
def test_the_check_names_what_differs(pool, recording, tmp_path):
    robot_obs = recording.robot_obs[:6].copy()
    robot_obs[3, 2] += 1e-9
    state = recordings.compare(pool, shortened(recording, 5, robot_obs=robot_obs))
    assert state.robot_obs == pytest.approx(1e-9, rel=1e-3) and state.scene_obs == 0
    assert (state.identical_frames, state.frames, state.first_step) == (2, 2, 3)
    rgb_static = recording.rgb_static[:1] ^ 1
    frame = recordings.compare(pool, shortened(recording, 1, rgb_static=rgb_static))
    assert (frame.robot_obs, frame.identical_frames, frame.first_step) == (0, 1, 0)


@needs_simulator
def test_states_are_the_same_without_pictures(recording):
    pool = Pool(Settings(str(ASSETS), pictures=False), num_workers=1)
    episode = begin(recording.reset_robot_obs, recording.reset_scene_obs)
    _, (frames,) = pool.step([episode], recording.actions[None], [False])
    np.testing.assert_array_equal(frames.robot_obs, recording.robot_obs[1:])
    np.testing.assert_array_equal(frames.scene_obs, recording.scene_obs[1:])
    with pytest.raises(ValueError, match="built with pictures=False"):
        pool.look([episode], [True])
    pool.close()


@needs_simulator
def test_the_binary_ends_with_1_on_a_difference(recording, tmp_path):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, **dataclasses.asdict(shortened(recording, 2)))
    np.savez(bad, **dataclasses.asdict(shortened(recording, 2, scene_obs=recording.scene_obs[1:4])))
    arguments = "-m", "experiments.check_calvin", f"--assets={ASSETS}", f"--replay={good}"
    done = helpers.run_python(*arguments)
    assert done.returncode == 0, done.stderr
    for text in ("identical frames: 2/2", "renderer: TinyRenderer", "pybullet: 3", "robot_obs 0, scene_obs 0", "D"):
        assert text in done.stdout
    done = helpers.run_python(*arguments, f"--replay={bad}")
    assert done.returncode == 1 and "different: 1 of 2" in done.stdout


@needs_simulator
def test_the_assets_without_the_floors_texture_show_the_same_floor(pool, recording):
    frames = pool.look([begin(recording.reset_robot_obs, recording.reset_scene_obs)], [True])[0]
    colors = {tuple(color) for color in frames.rgb_static[0, -8:, 32:].reshape(-1, 3)}
    assert {(239, 239, 239), (208, 208, 208)} <= colors  # both squares of the board


def test_constants_are_those_of_the_specification():
    assert (scene.POSITION_SCALE, scene.EULER_SCALE) == (specs.POSITION_SCALE, specs.EULER_SCALE)
    assert (scene.GRIPPER_OPEN, scene.GRIPPER_CLOSE) == (specs.GRIPPER_OPEN, specs.GRIPPER_CLOSE)


def test_kinematics_agree_with_the_recorded_pose():
    position = kinematics.tcp_position(scene.EVALUATION_ROBOT_OBS[7:14])
    np.testing.assert_allclose(position, scene.EVALUATION_ROBOT_OBS[:3], atol=1e-3)


# --- The pool ---


@needs_simulator
def test_a_killed_worker_is_replaced_and_its_episodes_repeated(recording):
    pool = Pool(Settings(str(ASSETS)), num_workers=1)
    episodes = [begin(recording.reset_robot_obs, recording.reset_scene_obs)] * 2
    first, _ = pool.step(episodes, np.stack([recording.actions[:20]] * 2), [False] * 2)
    os.kill(pool.processes[0], signal.SIGKILL)
    _, frames = pool.step(first, np.stack([recording.actions[20:30]] * 2), [False, True])
    assert pool.restarts == 1
    for moments in frames:
        np.testing.assert_array_equal(moments.robot_obs, recording.robot_obs[21:31])
        np.testing.assert_array_equal(moments.scene_obs, recording.scene_obs[21:31])
    assert len(frames[0].rgb_static) == 0
    np.testing.assert_array_equal(frames[1].rgb_static[-1], recording.rgb_static[3])
    processes = pool.processes
    pool.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@needs_simulator
def test_a_worker_that_dies_again_and_again_is_an_error(pool, monkeypatch):
    monkeypatch.setattr(Pool, "_ask", lambda self, index, *_: self._workers[index].process.kill())
    episode = begin(scene.EVALUATION_ROBOT_OBS, np.zeros(24))
    restarts = pool.restarts
    with pytest.raises(ChildProcessError, match="died 4 times, last with status -9"):
        pool.look([episode], [False])
    assert pool.restarts - restarts == 3


@needs_simulator
def test_an_earlier_state_can_be_stepped_again(environment, recording):
    actions = recording.actions[None, :4].astype(np.float32)
    state = environment.reset_to(recording.reset_robot_obs[None], recording.reset_scene_obs[None])
    after, first = environment.step_chunk(state, actions)
    environment.step_chunk(after, actions)
    _, again = environment.step_chunk(state, actions)
    helpers.assert_equal(first, again)


def test_workers_import_no_jax():
    code = "import sys, wam_jax.environments.calvin.worker; sys.exit('jax' in sys.modules or 'pybullet' in sys.modules)"
    assert helpers.run_python("-c", code).returncode == 0


# --- The environment ---


@pytest.fixture(scope="module")
def drawn(environment):
    """A random start of each task."""
    return environment.reset_to_task(jax.random.key(0), np.arange(len(specs.TASKS)))


@needs_simulator
def test_random_starts_are_possible_repeatable_and_of_their_own(environment, drawn):
    for task, scene_obs in zip(specs.TASKS, drawn.scene_obs, strict=True):
        assert starts.why_impossible(task, scene_obs) == ""
    same, other = (environment.reset_to_task(jax.random.key(seed), np.arange(2)) for seed in (0, 1))
    np.testing.assert_array_equal(drawn.robot_obs[:2], same.robot_obs)
    np.testing.assert_array_equal(drawn.scene_obs[:2], same.scene_obs)
    later = environment.reset_to_task(jax.random.key(0), np.array([1]), np.array([1]))  # as part of a smaller batch
    np.testing.assert_array_equal(drawn.robot_obs[1:2], later.robot_obs)
    assert (drawn.robot_obs[:2, 0] != other.robot_obs[:, 0]).all()


@needs_simulator
def test_experts_solve_their_tasks(drawn):
    tasks = np.arange(len(specs.TASKS))
    environment = environments.make("calvin", assets=str(ASSETS), pictures=False, num_workers=2)
    state, solved, found = drawn, np.zeros(len(tasks), bool), np.zeros(len(tasks), bool)
    expert = environment.start_expert(jax.random.split(jax.random.key(0), len(tasks)), tasks, state)
    for _ in range(specs.MAX_EPISODE_STEPS):
        expert, action = environment.act_expert(expert, state)
        state, _ = environment.step_chunk(state, action[:, None])
        solved |= np.asarray(specs.task_success(tasks, drawn.scene_obs, state.scene_obs))
        for row, task in enumerate(specs.TASKS):
            found[row] |= oracle.solved(drawn.infos[row][-1], state.infos[row][-1], (task,)) == {task}
    environment.close()
    assert solved.sum() >= 7
    np.testing.assert_array_equal(found, solved)  # the oracle of 34 tasks agrees with the eight's


@needs_simulator
def test_contacts_are_seen(environment, recording):
    """The recording begins with one block on the table and one on each side of the cabinet."""
    state = environment.reset_to(recording.reset_robot_obs[None], recording.reset_scene_obs[None])
    state, _ = environment.step_chunk(state, recording.actions[None, :8].astype(np.float32))
    assert len(state.infos[0]) == 8
    contacts = {name: block.contacts for name, block in state.infos[0][-1].blocks.items()}
    shelf, table = ("table", scene.PLANK), ("table", scene.TABLE_BASE)
    assert contacts == {"block_red": {shelf}, "block_blue": {table}, "block_pink": {shelf}}
    assert state.infos[0][-1].robot_contacts == set()


@needs_simulator
def test_a_rollout_draws_what_is_filmed(environment):
    policy, key = evaluation.ScriptedPolicy(environment), jax.random.key(2)
    result = evaluation.rollout(environment, policy, "turn_on_led", key, numbers=range(2), max_steps=4, films=1)
    assert result.video.rgb_static.shape == (1, 5, 64, 64, 3) and result.video.rgb_static.any(axis=(2, 3, 4)).all()


@needs_simulator
def test_an_episode_can_wait_while_others_go_on(environment, recording):
    actions = np.stack([recording.actions[:3]] * 2)
    state = environment.reset_to(np.tile(recording.reset_robot_obs, (2, 1)), np.tile(recording.reset_scene_obs, (2, 1)))
    nobody = np.zeros(2, bool)
    state, seen = environment.step_chunk(state, actions, drawn=nobody, active=np.array([True, False]))
    np.testing.assert_array_equal(seen.robot_obs[1], np.tile(recording.robot_obs[0], (3, 1)).astype(np.float32))
    state, _ = environment.step_chunk(state, actions, drawn=nobody, active=np.array([False, True]))
    np.testing.assert_array_equal(state.robot_obs, np.stack([recording.robot_obs[3]] * 2))


@needs_simulator
def test_observations_have_the_interfaces_shapes(environment, recording):
    state = environment.reset_to(np.tile(recording.reset_robot_obs, (2, 1)), np.tile(recording.reset_scene_obs, (2, 1)))
    observation = environment.observe(state)
    assert observation.rgb_static.shape == observation.rgb_gripper.shape == (2, 64, 64, 3)
    assert observation.robot_obs.dtype == observation.scene_obs.dtype == np.float32
    actions = np.zeros((2, 3, 7), np.float32)
    actions[:, :, 6] = 0.3  # above 0 opens
    _, observations = environment.step_chunk(state, actions, drawn=np.array([True, False]))
    assert observations.rgb_gripper.shape == (2, 3, 64, 64, 3)
    assert observations.rgb_static[0].any() and not observations.rgb_static[1].any()
    np.testing.assert_array_equal(observations.robot_obs[..., 14], 1)


@needs_simulator
def test_a_target_out_of_reach_is_reported_once(environment, recording, monkeypatch):
    said = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *values: said.append(text % values))
    state = environment.reset_to(recording.reset_robot_obs[None], recording.reset_scene_obs[None])
    actions = np.tile(np.array([1, 1, 1, 0, 0, 0, 1], np.float32), (1, 24, 1))
    for _ in range(2):
        state, _ = environment.step_chunk(state, actions)
    assert len(said) == 1 and "episode 0: the target is out of reach" in said[0]


@needs_simulator
def test_pictures_of_the_recordings_sizes_are_averaged_as_the_converter_averages_them(recording):
    start = recording.reset_robot_obs[None], recording.reset_scene_obs[None]
    environment = environments.make("calvin", assets=str(ASSETS), num_workers=1, image_size=0)
    full = Pool(Settings(str(ASSETS), "D", 200, 84), num_workers=1)
    seen = environment.observe(environment.reset_to(*start))
    (frames,) = full.look([begin(*(vector[0] for vector in start))], [True])
    assert frames.rgb_static.shape == (1, 200, 200, 3) and frames.rgb_gripper.shape == (1, 84, 84, 3)
    np.testing.assert_array_equal(seen.rgb_static[0], images.resize(frames.rgb_static[0]))
    np.testing.assert_array_equal(seen.rgb_gripper[0], images.resize(frames.rgb_gripper[0]))
    assert environment.facts["pixels"] == "200 and 84"
    assert (seen.rgb_static[0] != recording.rgb_static[0]).any()  # which was drawn at 64
    environment.close()
    full.close()


# --- What is refused ---


@needs_simulator
@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0, 0, np.nan, 0, 0, 0, 1], "action 1 of episode 0 is .*nan.*expected finite entries"),
        ([0, 0, 0, 0, np.inf, 0, 1], "expected finite entries"),
        ([0, 1.01, 0, 0, 0, 0, 1], r"the first six in \[-1, 1\]"),
    ],
)
def test_actions_that_cannot_be_executed_are_named(environment, recording, action, message):
    state = environment.reset_to(recording.reset_robot_obs[None], recording.reset_scene_obs[None])
    with pytest.raises(ValueError, match=message):
        environment.step_chunk(state, np.array([[[0, 0, 0, 0, 0, 0, 1], action]], np.float32))


@needs_simulator
def test_the_pool_refuses_what_the_simulator_refuses_and_goes_on(pool, recording):
    good = begin(recording.reset_robot_obs, recording.reset_scene_obs)
    with pytest.raises(ValueError, match=r"gripper command 0.5; expected \+1 \(open\) or -1 \(close\)"):
        pool.step([good], np.array([[[0, 0, 0, 0, 0, 0, 0.5]]]), [False])
    for broken, message in (
        (begin(np.zeros(14), np.zeros(24)), r"robot_obs has shape \(14,\); expected \(15,\)"),
        (begin(np.zeros(15), np.full(24, np.nan)), "scene_obs has entries that are not finite"),
        (begin(np.zeros(15), np.full(24, 0.5)), r"lights \[0.5, 0.5\] in scene_obs; each must be 0 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.look([broken], [False])
    _, frames = pool.step([good], recording.actions[None, :2], [False])
    np.testing.assert_array_equal(frames[0].robot_obs, recording.robot_obs[1:3])


def test_missing_assets_are_listed(tmp_path):
    with pytest.raises(
        ValueError, match="no folder of CALVIN's assets given: --calvin_assets=DIR .check_calvin: --assets=DIR"
    ):
        environments.make("calvin")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        Calvin(str(tmp_path / "nowhere"))
    robot = tmp_path / scene.ROBOT_URDF
    robot.parent.mkdir()
    robot.write_text('<mesh filename="package://meshes/hand.obj"/>')
    with pytest.raises(ValueError, match="lack blocks/block_blue_small.urdf, .*franka_panda/meshes/hand.obj, plane"):
        Calvin(str(tmp_path))
    with pytest.raises(ValueError, match="unknown scene 'E' of CALVIN; expected one of A, B, C, D"):
        Calvin(str(tmp_path), scene="E")


def test_without_pybullet_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(
        ValueError, match="does not have: .*-m pip install pybullet', or name another Python.*--calvin_python"
    ):
        assets.load_pybullet()


@needs_simulator
def test_other_scenes_are_refused_by_name_where_only_d_is_known():
    settings = Settings(str(ASSETS), scene="B")
    with pytest.raises(
        ValueError, match="lack blocks/block_blue_big.urdf|lack calvin_table_B/urdf/calvin_table_B.urdf"
    ):
        Pool(settings)
    with pytest.raises(ValueError, match="random starts are drawn in scene D only, not B"):
        starts.draw(None, scene.get_scene("B"), "open_drawer", np.random.default_rng(0))
