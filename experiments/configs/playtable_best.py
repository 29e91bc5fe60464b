"""Playtable's best policies: fifty demonstrations, and PPO in doubted imagination that stays near the cloned policy.

Command: python -m experiments.reproduce --config=experiments/configs/playtable_best.py --workdir=runs/best
and, for the baseline, --config=experiments/configs/playtable_best.py:dreamer_v2; seeds with --config.seed=1.
`playtable_ensemble.py` with fifty demonstrations, as the papers have, in place of eight. Half of the iterations are
made, advantages are not scaled up where nearly all imagined rollouts succeed, and the cloning loss weighs ten times as
much as the paper's 0.025: cloning reaches 95 %, and what imagination makes up would otherwise cost what PPO gains.
Scores: docs/results/playtable_best/.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable_ensemble


def get_config(method: str = "wam") -> ConfigDict:
    """What one CPU core trains in about an hour a seed, most of it world model and PPO; collecting the play apart."""
    config = playtable_ensemble.get_config(method)
    config.dataset.demonstrations_per_task = 50
    config.ppo.update(num_iterations=40, min_advantage_std=1.0, bc_weight=0.25)
    return config
