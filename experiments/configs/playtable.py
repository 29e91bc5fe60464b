"""The serious run on the embedded table: larger networks, more play and longer training than the quickstart.

Command: python -m experiments.reproduce --config=experiments/configs/playtable.py --workdir=runs/playtable_wam
and, for the baseline, --config=experiments/configs/playtable.py:dreamer_v2 --workdir=runs/playtable_dreamer_v2
Hardware, hours and scores: docs/results/playtable/README.md.
It differs from the paper as the quickstart does (see there); both methods get the same number of updates.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores train in hours; an accelerator in minutes."""
    config = base.get_config(method)
    config.dataset.update(play_episodes=256, validation_episodes=8, play_steps=400)
    config.world_model.update(
        kind="patch",
        encoder_width=32,
        fused_dim=384,
        deterministic_dim=384,
        num_latents=32,
        num_classes=16,
        rssm_hidden_dim=384,
        decoder_width=32,
        decoder_dim=384,
        inverse_dynamics_dims=(256, 256),
        kl_weight=1.0,
        proprioception_weight=1000.0,
        open_loop_weight=1.0,
        open_loop_steps=8,
        soft_prior=True,
        batch_size=16,
        window_length=24,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        weight_decay=1e-3,
        num_steps=5000,
        updates_per_call=10,
        save_every=500,
    )
    config.policy.update(
        soft_feature=True,
        standardize=True,
        resample_latent=False,
        hidden_dim=256,
        learning_rate=1e-3,
        final_learning_rate=1e-5,
        num_steps=4000,
        save_every=4000,
    )
    config.reward.update(
        embedding_dims=(128, 128), classification_dims=(128, 128), consecutive=4, num_steps=1000, save_every=1000
    )
    config.ppo.update(
        num_iterations=50, num_rollouts=48, epochs=5, max_start_step=8, min_advantage_std=1.0, save_every=10
    )
    return config
