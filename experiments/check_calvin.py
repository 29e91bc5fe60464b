"""Replays recordings made with the original CALVIN and compares every state and every picture.

python -m experiments.check_calvin --assets=calvin_env/data --replay=replay_D.npz

A recording is an npz with reset_robot_obs, reset_scene_obs, actions, robot_obs, scene_obs, frame_steps, rgb_static and
rgb_gripper. Exit code 1 on any difference.
"""

import sys
from collections.abc import Sequence

from absl import flags

from wam_jax import cli
from wam_jax.environments.calvin import recordings
from wam_jax.environments.calvin.pool import Pool
from wam_jax.environments.calvin.recordings import Recording
from wam_jax.environments.calvin.worker import Settings

_ASSETS = flags.DEFINE_string("assets", None, "Folder of CALVIN's assets: calvin_env's data/, or one laid out like it")
_REPLAY = flags.DEFINE_multi_string("replay", None, "Recording; may be given several times")
_SCENE = flags.DEFINE_string("scene", "D", "Scene of the recordings: A, B, C or D")
_PYTHON = flags.DEFINE_string("calvin_python", "", "Python that has pybullet; empty: this one")


def check(path: str, recording: Recording) -> bool:
    """Replays one recording in a fresh process, prints the comparison and returns whether everything is equal."""
    settings = Settings(str(_ASSETS.value), _SCENE.value, recording.rgb_static.shape[1], recording.rgb_gripper.shape[1])
    pool = Pool(settings, num_workers=1, python=_PYTHON.value)
    try:
        difference = recordings.compare(pool, recording)
    finally:
        pool.close()
    print(f"{path}: {len(recording.robot_obs)} states, {len(recording.frame_steps)} moments with both pictures")
    print(f"  largest difference of states: robot_obs {difference.robot_obs:.3g}, scene_obs {difference.scene_obs:.3g}")
    print(f"  identical frames: {difference.identical_frames}/{difference.frames}")
    if difference.first_step is not None:
        print(f"  first difference: step {difference.first_step}")
    for key, value in pool.facts.items():
        print(f"  {key}: {value}")
    return difference.first_step is None


def main(argv: Sequence[str]) -> None:
    """Checks every recording."""
    del argv
    loaded = [(path, recordings.load(path)) for path in _REPLAY.value]
    equal = [check(path, recording) for path, recording in loaded]
    print("equal" if all(equal) else f"different: {equal.count(False)} of {len(equal)} recordings")
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["assets", "replay"])
    cli.run(main)
