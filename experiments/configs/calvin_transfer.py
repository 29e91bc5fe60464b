"""CALVIN's scene D with few demonstrations: what PPO in imagination gains in its simulator, WAM and DreamerV2.

Command: python -m experiments.reproduce --config=experiments/configs/calvin_transfer.py --workdir=runs/calvin_wam
--calvin_assets=calvin_env/data --starts=eval_starts.npz
and, for the baseline, --config=experiments/configs/calvin_transfer.py:dreamer_v2.
Scores: docs/results/calvin_transfer/. The setting is playtable_transfer.py's, fixed there, with a quarter of its play.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable_transfer


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores collect and train in three hours for both methods."""
    config = playtable_transfer.get_config(method)
    with config.unlocked():
        config.environment = "calvin"
    config.dataset.update(play_episodes=240, validation_episodes=8)
    config.evaluation.update(num_episodes=29, batch_size=16)  # CALVIN's start configurations; simulators at once
    return config
