"""CALVIN's scene D with eight demonstrations a task: what PPO in imagination gains in its simulator, by either method.

Command: python -m experiments.reproduce --config=experiments/configs/calvin_transfer.py --workdir=runs/calvin_wam
--calvin_assets=calvin_env/data --starts=eval_starts.npz
and, for the baseline on the same data, --config=experiments/configs/calvin_transfer.py:dreamer_v2
--workdir=runs/calvin_dreamer_v2 --reuse=runs/calvin_wam
Hardware, hours and scores: docs/results/calvin_transfer/README.md.
The networks and values of playtable_transfer.py, with a quarter of its play and half of its iterations of PPO.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable_transfer


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores collect and train in three hours for both methods."""
    config = playtable_transfer.get_config(method)
    with config.unlocked():
        config.environment = "calvin"
    config.dataset.update(play_episodes=240, validation_episodes=8)
    config.ppo.update(num_iterations=40)
    config.evaluation.update(num_episodes=29, batch_size=16)  # CALVIN's start configurations; simulators at once
    return config
