"""Does inverse dynamics make latents better for control? Short trainings, one change a run.

Command: python -m experiments.reproduce --config=experiments/configs/playtable_controls.py --workdir=runs/controls \
    --until=evaluate_bc --config.seed=1 --config.dataset.play=runs/transfer_0/data/playtable_play \
    [--config.world_model.action_weight=100 ...]
and :dreamer_v2 for no inverse dynamics at all. The arms, their commands and scores: docs/results/playtable_controls/.
`playtable_transfer.py` without what may do the work of inverse dynamics there: no proprioception is decoded, and the
robot's state is not carried along. A quarter of its updates, so that many arms fit into an afternoon.
"""

from ml_collections import ConfigDict

from experiments.configs import playtable_transfer


def get_config(method: str = "wam") -> ConfigDict:
    """What one CPU core trains in about ten minutes, up to the evaluated cloned policies; collecting the play apart."""
    config = playtable_transfer.get_config(method)
    config.world_model.update(robot_state=False, proprioception_weight=0.0, num_steps=1200)
    config.evaluation.num_episodes = 128
    return config
