"""Files of starts: what is needed of them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from calvin_files import ASSETS, needs_simulator

from wam_jax import environments, specs
from wam_jax.environments.calvin import recordings, scene, starts


def write_starts(path, **changes):
    tasks = "open_drawer", "turn_on_led", "turn_on_lightbulb"
    arrays = {f"{task}_robot_obs": np.tile(scene.EVALUATION_ROBOT_OBS, (1, 1)) for task in tasks}
    arrays |= {f"{task}_scene_obs": np.zeros((1, 24)) for task in tasks}
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open_drawer_scene_obs": None}, "has no open_drawer_scene_obs"),
        (
            {"open_drawer_scene_obs": np.full((1, 24), 0.15)},
            "start 0 of open_drawer cannot be used: the drawer is at 0.15, where open_drawer is done already or",
        ),
        ({"turn_on_led_scene_obs": np.ones((1, 24))}, "start 0 of turn_on_led cannot be used: the LED is at 1"),
        (
            {"turn_on_lightbulb_scene_obs": 0.06 * np.eye(24)[3:4]},  # the bulb is off, and would go on by itself
            "the switch is at 0.06, where turn_on_lightbulb is done already or impossible; it needs -0.01 to 0.044",
        ),
        ({"turn_on_led_robot_obs": np.full((1, 15), np.nan)}, "start 0 of turn_on_led cannot be used: .*not finite"),
        (
            {"turn_on_led_scene_obs": 9 * np.eye(24)[:1]},
            "start 0 of turn_on_led .*: scene_obs 0 to 3, .* reaches 9; expe",
        ),
        ({"open_drawer_robot_obs": np.zeros((2, 15))}, r"shapes \(2, 15\) and \(1, 24\)"),
        ({"open_drawer_robot_obs": np.array([{}])}, "cannot read the starts .*a pickled one, which is never loaded"),
    ],
)
def test_starts_that_cannot_be_used_are_named(tmp_path, changes, message):
    path = write_starts(tmp_path / "starts.npz", **changes)
    with pytest.raises(ValueError, match=message):
        starts.load(path)


@needs_simulator
def test_a_file_of_starts_needs_the_tasks_that_are_asked_for_alone(tmp_path):
    path = write_starts(tmp_path / "starts.npz")
    environment = environments.make("calvin", assets=str(ASSETS), starts_file=path, pictures=False, num_workers=1)
    environment.check_starts("turn_on_led", 1)
    state = environment.reset_to_task(None, np.array([specs.task_index("turn_on_led")]))
    np.testing.assert_array_equal(state.scene_obs[0, 4:6], 0)
    with pytest.raises(ValueError, match="holds 0 starts of close_drawer, fewer than the 1 .* --config.tasks, without"):
        environment.check_starts("close_drawer", 1)
    environment.close()


def test_files_that_are_no_starts_are_named(tmp_path):
    path = str(tmp_path / "starts.npz")
    np.savez(path, robot_obs=np.zeros((1, 15)))
    with pytest.raises(ValueError, match="starts.npz holds no starts; expected TASK_robot_obs and TASK_scene_obs"):
        starts.load(path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match="cannot read the starts .*single.npy: it is a single array"):
        starts.load(str(tmp_path / "single.npy"))


def test_a_cut_file_is_named(tmp_path):
    path = Path(write_starts(tmp_path / "starts.npz"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot read the starts"):
        starts.load(str(path))
    with pytest.raises(ValueError, match="cannot read the recording"):
        recordings.load(str(path))
