"""Playtable's best policies: fifty demonstrations, and PPO that keeps still where imagination leaves nothing to gain.

Command: python -m experiments.reproduce --config=experiments/configs/playtable_best.py --workdir=runs/best
and, for the baseline, --config=experiments/configs/playtable_best.py:dreamer_v2; seeds with --config.seed=1.
`playtable_transfer.py` with fifty demonstrations, as the papers have, in place of eight. Advantages are not scaled up
where nearly all imagined rollouts succeed, and half of the iterations are made. Cloning reaches 95 %, PPO adds nothing.
Scores: docs/results/playtable_best/.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable_transfer


def get_config(method: str = "wam") -> ConfigDict:
    """What one CPU core trains in about an hour a seed, most of it world model and PPO; collecting the play apart."""
    config = playtable_transfer.get_config(method)
    config.dataset.demonstrations_per_task = 50
    config.ppo.update(num_iterations=40, min_advantage_std=1.0)
    return config
