"""Every stage of the quickstart in two steps each, to see that all binaries run.

Command: python -m experiments.reproduce --config=tests/smoke_config.py --workdir=DIR
Hardware: two CPU cores, 2 to 3 minutes, most of them compilation. Its policies solve nothing.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart


def get_config(method: str = "wam") -> ConfigDict:
    """The quickstart with little of everything."""
    config = quickstart.get_config(method)
    config.tasks = ("open_drawer", "turn_on_led")
    config.dataset.update(play_episodes=2, validation_episodes=1, play_steps=64, demonstrations_per_task=2)
    config.world_model.update(
        encoder_width=4,
        fused_dim=16,
        deterministic_dim=16,
        num_latents=4,
        num_classes=4,
        rssm_hidden_dim=16,
        decoder_width=4,
        decoder_dim=16,
        inverse_dynamics_dims=(16, 16),
        proprioception_dims=(16,),
        scene_dims=(16,),
        open_loop_steps=4,
        batch_size=2,
        window_length=8,
        num_steps=2,
        updates_per_call=1,
        save_every=1,
    )
    config.prior_ensemble.update(
        num_members=2, hidden_dims=(16,), num_windows=2, window_length=8, batch_size=8, num_steps=2, updates_per_call=1,
        save_every=1,
    )  # fmt: skip
    config.policy.update(hidden_dim=16, batch_size=8, warmup_steps=1, num_steps=2, updates_per_call=1, save_every=1)
    config.reward.update(
        embedding_dims=(16, 16), classification_dims=(16,), batch_size=8, num_steps=2, updates_per_call=1, save_every=1
    )
    config.ppo.update(
        num_iterations=2, num_rollouts=4, epochs=1, critic_warmup=1, tasks_at_once=2, updates_per_call=1, save_every=1
    )
    config.evaluation.update(num_episodes=1, max_steps=8)
    config.prediction.update(num_windows=3, horizon=4, batch_size=2)
    return config
