"""The serious run on the embedded table: larger networks, more play, longer training than the quickstart.

Command: python -m experiments.reproduce --config=experiments/configs/playtable.py --workdir=runs/playtable_wam
and, for the baseline, --config=experiments/configs/playtable.py:dreamer_v2 --workdir=runs/playtable_dreamer_v2
Hardware, hours and scores: docs/results/playtable/README.md.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart


def get_config(method: str = "wam") -> ConfigDict:
    """The quickstart's forms with more of everything; equal updates for WAM and the DreamerV2 baseline."""
    config = quickstart.get_config(method)
    config.dataset.update(play_episodes=256, play_steps=400)
    config.world_model.update(
        fused_dim=384,
        deterministic_dim=384,
        rssm_hidden_dim=384,
        decoder_dim=384,
        window_length=24,
        num_steps=6000,
        save_every=500,
    )
    config.policy.update(num_steps=4000)
    config.reward.update(num_steps=1000)
    config.ppo.update(num_iterations=50, num_rollouts=50, save_every=10)
    config.evaluation.update(num_episodes=256)
    return config
