"""Few demonstrations, so that cloning leaves room: where PPO in imagination has something to gain, or to lose.

Command: python -m experiments.reproduce --config=experiments/configs/playtable_few.py --workdir=runs/playtable_few
The serious run's world model and data serve: add --reuse=runs/playtable_wam. Scores: docs/results/playtable_few/.
Eight demonstrations a task in place of 50, and ten times DPPO's clip widths with a larger learning rate: with DPPO's
own, an iteration moves the policy by a divergence of 2e-5, and 800 iterations are what the papers take.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable


def get_config(method: str = "wam") -> ConfigDict:
    """The serious run with fewer demonstrations and longer steps of PPO."""
    config = playtable.get_config(method)
    config.dataset.update(demonstrations_per_task=8)
    config.ppo.update(
        num_iterations=50, actor_learning_rate=3e-4, clip_last=0.1, clip_noisiest=0.01, min_advantage_std=0.0
    )
    return config
