"""CALVIN's scene D with imagination that is doubted: playtable_ensemble.py in its simulator.

Command: python -m experiments.reproduce --config=experiments/configs/calvin_ensemble.py --workdir=runs/calvin_ensemble
--calvin_assets=calvin_env/data --starts=eval_starts.npz
and, for the baseline on the same data, --config=experiments/configs/calvin_ensemble.py:dreamer_v2
--workdir=runs/calvin_ensemble_dreamer_v2 --reuse=runs/calvin_ensemble
Runs of calvin_transfer.py with the same seed lend all that comes before: --reuse=runs/calvin_wam and
--reuse=runs/calvin_dreamer_v2.
Its values are those of playtable_ensemble.py, fixed there. Hardware, hours and scores: docs/results/calvin_ensemble/.
"""

from ml_collections import ConfigDict

from experiments.configs import calvin_transfer, playtable_ensemble


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores train in an hour beyond calvin_transfer.py, for one method."""
    config, doubted = calvin_transfer.get_config(method), playtable_ensemble.get_config(method)
    config.prior_ensemble = doubted.prior_ensemble
    config.reward.disagreement_quantile = doubted.reward.disagreement_quantile
    return config
