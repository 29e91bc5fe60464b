"""CALVIN without the download: scripted play and demonstrations in its scene D, and networks that a CPU can train.

Command: python -m experiments.reproduce --config=experiments/configs/calvin_d_scripted.py
--workdir=runs/calvin_d_scripted --calvin_assets=calvin_env/data --starts=eval_starts.npz
Hardware, hours and scores: docs/results/calvin_d_scripted/README.md.
Networks and settings are playtable.py's (what differs from the paper stands there), with a fifth fewer updates.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores collect and train in three hours."""
    config = playtable.get_config(method)
    with config.unlocked():
        config.environment = "calvin"
    config.dataset.update(play_episodes=120)
    config.world_model.update(num_steps=4000)
    config.ppo.update(num_iterations=40)
    config.evaluation.update(num_episodes=29, batch_size=16)  # WAM's start configurations; simulators at once
    return config
