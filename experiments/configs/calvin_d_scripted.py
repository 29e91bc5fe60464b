"""CALVIN without the download: scripted play and demonstrations in its scene D, and networks that a CPU can train.

Command: python -m experiments.reproduce --config=experiments/configs/calvin_d_scripted.py
--workdir=runs/calvin_d_scripted --calvin_assets=calvin_env/data --starts=eval_starts.npz
Hardware, hours and scores: docs/results/calvin_d_scripted/README.md.
Networks and settings are those of playtable.py (what differs from the paper stands there), one fifth fewer updates.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(method: str = "wam") -> ConfigDict:
    """What two CPU cores collect and train in three hours."""
    config = base.get_config(method)
    with config.unlocked():
        config.environment = "calvin"
    config.dataset.update(play_episodes=120, validation_episodes=8, play_steps=400)
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
        num_steps=4000,
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
        num_iterations=40, num_rollouts=48, epochs=5, max_start_step=8, min_advantage_std=1.0, save_every=10
    )
    config.evaluation.update(num_episodes=29, batch_size=16)  # WAM's start configurations; simulators at once
    return config
