"""Imagination that is doubted: playtable_transfer.py with priors fitted anew, and no reward where they disagree.

Command: python -m experiments.reproduce --config=experiments/configs/playtable_ensemble.py --workdir=runs/ensemble
and, for the baseline, --config=experiments/configs/playtable_ensemble.py:dreamer_v2; seeds with --config.seed=1.
A run of playtable_transfer.py with the same seed lends all that comes before: --reuse=runs/transfer.
Five small priors learn p(z | h) from the trained world model's posteriors on play. Imagination draws z from their
mixture, and a frame is rewarded only where they disagree less than on four fifths of play's own successes, imagined.
Hardware, hours and scores: docs/results/playtable_ensemble/README.md.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable_transfer


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores train in hours for three seeds of two methods."""
    config = playtable_transfer.get_config(method)
    config.prior_ensemble.num_members = 5
    config.reward.disagreement_quantile = 0.8  # chosen on WAM's seed 2, by episodes of other starts than evaluation's
    return config
