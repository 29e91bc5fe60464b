"""The whole pipeline in minutes on two CPU cores: small networks, little data, all eight tasks.

Command: make quickstart
Minutes and scores to expect: docs/results/quickstart/.
Not the paper's setting. Smaller: patches instead of convolutions, a small RSSM, narrow policy and classifier, short
training at larger, decaying learning rates. Options that the paper does not have: a proprioception decoder, a
multi-step open-loop loss, expected z in place of samples (`soft_prior` in imagination, `soft_feature` for policy,
reward and critic), features standardised for the policy, reward only after four positive frames in a row, imagination
from the first nine frames of a demonstration, a floor under the spread that advantages are divided by. The KL weighs
1, not 3.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(method: str = "wam") -> ConfigDict:
    """A small run that shows every stage at work."""
    config = base.get_config(method)
    config.dataset.update(play_episodes=96, validation_episodes=8, play_steps=400)
    config.world_model.update(
        kind="patch",
        encoder_width=32,
        fused_dim=256,
        deterministic_dim=256,
        num_latents=32,
        num_classes=16,
        rssm_hidden_dim=256,
        decoder_width=32,
        decoder_dim=256,
        inverse_dynamics_dims=(256, 256),
        kl_weight=1.0,
        proprioception_weight=1000.0,
        open_loop_weight=1.0,
        open_loop_steps=8,
        soft_prior=True,
        batch_size=16,
        window_length=16,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        weight_decay=1e-3,
        num_steps=2400,
        updates_per_call=10,
        save_every=400,
    )
    config.policy.update(
        soft_feature=True,
        standardize=True,
        resample_latent=False,
        hidden_dim=256,
        learning_rate=1e-3,
        final_learning_rate=1e-5,
        num_steps=2000,
        save_every=2000,
    )
    config.reward.update(
        embedding_dims=(128, 128), classification_dims=(128, 128), consecutive=4, num_steps=500, save_every=500
    )
    config.ppo.update(
        num_iterations=15,
        num_rollouts=32,
        epochs=5,
        max_start_step=8,
        actor_learning_rate=3e-5,
        min_advantage_std=1.0,
        save_every=5,
    )
    config.evaluation.update(num_episodes=64)
    return config
