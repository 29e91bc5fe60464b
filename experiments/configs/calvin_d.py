"""The paper: CALVIN environment D, full sizes; every value stands in base.py with its source.

Command: python -m experiments.train_world_model --config=experiments/configs/calvin_d.py --workdir=runs/calvin_d
with --config.dataset.play=DIR, the converted task_D_D (see data/README.md)
Hardware: a GPU or a TPU; 230,000 updates of 50 x 50 frames. Not run by us yet: no score of ours to expect.
The paper's scores: 71.2 % (or 61.7 %) after behavioural cloning, 92.8 % after PPO.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(method: str = "wam") -> ConfigDict:
    """The paper's settings (what is ours is marked in base.py), data from `--config.dataset.play`."""
    config = base.get_config(method)
    with config.unlocked():
        config.environment = "calvin"
        config.dataset.pictures = "averaged"  # as the converted recordings are
        config.dataset.cache = "none"  # 500,000 frames decoded are 12 GB
        config.world_model.compute_dtype = "bfloat16"  # ours, for accelerators; losses and parameters stay float32
        config.evaluation.num_episodes = 29  # WAM's start configurations a task
        config.evaluation.batch_size = 16  # simulators at once, about 0.1 GB each
    return config
