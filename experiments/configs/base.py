"""The paper's sizes and settings, with the source of every value; other configs change what they need.

Sources: WAM (arXiv 2603.28955), DiWA (arXiv 2508.03645), LUMOS (its public code), DPPO (its public code).
"""

from ml_collections import ConfigDict

from wam_jax.specs import MAX_EPISODE_STEPS, TASKS

PICTURES = (  # from CALVIN's simulator, which draws other pixels at another size
    "drawn",  # at 64 x 64, the fastest
    "averaged",  # at CALVIN's own 200 and 84, averaged to 64: what its recordings become when they are converted
    "full",  # the same to a policy; but collected data keep 200 and 84
)
METHODS = {"wam": 1000.0, "dreamer_v2": 0.0}  # the weight of the action loss is all that tells them apart


def get_config(method: str = "wam") -> ConfigDict:
    """Returns the paper's config; `--config=FILE.py:dreamer_v2` gives the baseline.

    Raises:
      ValueError: an unknown method.
    """
    method = method or "wam"
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} after the config's name; expected one of {', '.join(METHODS)}")
    config = ConfigDict()
    config.method = method
    config.environment = "playtable"
    config.seed = 0
    config.tasks = TASKS
    config.num_devices = 1  # 0: all of this host

    config.dataset = ConfigDict(
        {
            "play": "",  # directory of the play dataset's shards; empty: collected into the workdir
            "demonstrations": "",  # likewise for the demonstrations
            "play_episodes": 600,
            "validation_episodes": 8,
            "disturbed_share": 0.6,  # of play's attempts, when it is collected; most of the disturbed ones fail
            "play_steps": 800,  # per episode; 600 x 800 / 30 Hz = 4.4 hours (CALVIN D: 4.7 hours)
            "demonstrations_per_task": 50,  # WAM, DiWA; of a dataset that holds more, the first
            "pictures": "drawn",  # CALVIN's simulator: see PICTURES; a policy must see what it was trained on
            "cache": "memory",  # frames "memory": decoded once; "mmap": once for all runs, on disk; "device"; "none"
        }
    )
    config.world_model = ConfigDict(
        {
            "kind": "conv",  # LUMOS' convolutions; "patch" is far cheaper on a CPU
            "encoder_width": 48,  # LUMOS
            "fused_dim": 1536,  # LUMOS
            "proprioception_input": True,  # WAM, LUMOS; False: the embedding sees the cameras alone
            "deterministic_dim": 1024,  # WAM
            "robot_state": False,  # True: the robot's proprioception is carried beside [h; z], see rssm.py; ours
            "num_latents": 32,  # WAM
            "num_classes": 32,  # WAM
            "rssm_hidden_dim": 1000,  # LUMOS
            "decoder_width": 48,  # LUMOS
            "decoder_dim": 1536,  # LUMOS
            "inverse_dynamics_dims": (512, 512),  # three layers in WAM, widths not given
            "proprioception_dims": (256,),  # ours; unused at weight 0
            "scene_dims": (256,),  # ours; unused at weight 0
            "compute_dtype": "float32",  # "bfloat16" on accelerators
            "kl_weight": 3.0,  # WAM (LUMOS: 0.3); nats, summed over latents
            "kl_balance": 0.8,  # WAM
            "first_kl_weight": 1.0,  # of a window's first frame beside the others; ours: 0 lets its z say all it sees
            "action_weight": METHODS[method],  # WAM: 1000; absolute error, mean over 7 dims
            "action_input": "embeddings",  # WAM; "features": of the RSSM, whose h has received the action, as a control
            "action_target": "taken",  # WAM; "shuffled": over batch and time, nothing to learn, as a control
            "action_steps": 1,  # WAM; K: from frames 1 to K steps apart, told which (AC-State, arXiv 2207.08229)
            "proprioception_weight": 0.0,  # ours, not in the paper
            "scene_weight": 0.0,  # above 0 DiWA's hybrid: the mechanisms' state as another decoder's target; value ours
            "open_loop_weight": 0.0,  # ours, not in the paper
            "open_loop_steps": 10,
            "soft_prior": False,  # True: imagination feeds back expected z in place of samples
            "batch_size": 50,  # LUMOS ("500" in WAM's text, which no sampler of that family has)
            "window_length": 50,  # WAM, in steps of 1/30 s
            "learning_rate": 3e-4,  # WAM
            "final_learning_rate": 3e-4,  # WAM: constant; less makes it a cosine over num_steps
            "weight_decay": 0.05,  # WAM
            "adam_epsilon": 1e-5,  # LUMOS
            "max_gradient_norm": 100.0,  # LUMOS, here on true gradients; with weights of 1000 it clips every update
            "num_steps": 230_000,  # WAM (its DreamerV2 baseline: 2M)
            "updates_per_call": 10,
            "save_every": 2000,
        }
    )
    config.prior_ensemble = ConfigDict(  # ours, all of it: see prior_ensemble.py
        {
            "num_members": 0,  # priors that are fitted to the trained world model; 0: imagination is as it was trained
            "imagine": True,  # imagination draws z from their mixture; False: only their disagreement is used
            "hidden_dims": (256, 256),
            "num_windows": 2000,  # of play, whose frames they learn from
            "window_length": 48,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "weight_decay": 1e-3,
            "num_steps": 3000,
            "updates_per_call": 100,
            "save_every": 3000,
        }
    )
    config.policy = ConfigDict(
        {
            "kind": "diffusion",  # or DiWA's ablation "gaussian", in one step: the two numbers of steps are not read
            "hidden_dim": 512,  # DiWA
            "num_blocks": 1,  # DPPO: "[512, 512, 512]" is one residual block
            "time_dim": 16,  # DPPO
            "compute_dtype": "float32",
            "chunk": 4,  # WAM: predict 4, execute 4
            "denoising_steps": 20,  # WAM, K
            "finetuned_steps": 10,  # WAM, F: the last ones, which PPO trains
            "exploration_std": 0.1,  # DPPO, least noise of a step while PPO collects; all the noise of a Gaussian
            "evaluation_std": 1e-3,  # DPPO
            "noise_clip": 3.0,  # DPPO
            "batch_size": 256,  # WAM, in noised chunks
            "noise_draws": 1,  # ours; 4: a batch of 64 states, 4 noises each: 1.55 times as fast on a CPU
            "learning_rate": 1e-4,  # WAM
            "final_learning_rate": 1e-5,  # WAM
            "warmup_steps": 100,  # DPPO, there in epochs
            "weight_decay": 1e-6,  # WAM
            "ema_decay": 0.995,  # WAM
            "resample_latent": True,  # ours: z drawn anew at every update
            "soft_feature": False,  # True: expected z in place of samples, for reward and PPO too
            "standardize": False,  # True: features standardised over the demonstrations
            "num_steps": 40_000,  # WAM: 5,000 epochs of 50 demonstrations, about 8 batches each
            "updates_per_call": 100,
            "save_every": 5000,
        }
    )
    config.reward = ConfigDict(
        {
            "kind": "classifier",  # or "scene" (DiWA's hybrid): the oracle on decoded scene states; nothing to train
            "embedding_dims": (512, 512),  # DiWA
            "classification_dims": (512, 512),  # DiWA
            "temperature": 0.1,  # of NT-Xent; ours, DiWA gives none
            "use_play": True,  # ours: annotated attempts of play, failures among them, beside the demonstrations
            "use_imagined": False,  # ours; WAM: True, imagination of the same episodes with their labels, beside them
            "threshold": 0.5,  # argmax of two classes
            # Ours; above 0 a frame counts only where the ensemble disagrees no more than at this quantile of the frames
            # of play's successes, imagined, that the classifier calls solved, too.
            "disagreement_quantile": 0.0,
            "consecutive": 1,  # frames in a row that must say success; DiWA looks at the last frame of a chunk
            "resample_latent": True,  # ours
            "batch_size": 256,  # this and the next three: ours, the papers give none
            "learning_rate": 3e-4,
            "weight_decay": 1e-4,
            "num_steps": 5000,
            "updates_per_call": 100,
            "save_every": 5000,
        }
    )
    config.ppo = ConfigDict(
        {
            "num_iterations": 800,  # WAM
            "num_rollouts": 50,  # WAM
            "rollouts": "imagination",  # "environment": no imagination at all (DPPO); success is the oracle's
            "starts": "demonstrations",  # of imagination (DiWA); "play": attempts at the task; "both"
            # Ours; above 0 only starts from which the recorded actions, imagined, come to the recorded end; a task
            # keeps its cloned policy where they do so for a smaller share than this of its successes or its failures.
            "min_trust": 0.0,
            "min_start_step": 0,  # imagination starts at frames from this one
            "max_start_step": 0,  # to this one: at a demonstration's first (DiWA)
            "max_steps": 0,  # of a rollout; 0: as many as evaluation's
            "resample_latent": True,  # z of the start drawn anew for every rollout
            "batch_size": 7500,  # WAM: more decisions than there are, so one full-batch step an epoch
            "epochs": 10,  # WAM
            "actor_learning_rate": 1e-5,  # WAM
            "actor_max_gradient_norm": float("inf"),  # DPPO: no clipping
            "critic_learning_rate": 1e-3,  # WAM
            "critic_hidden_dim": 256,  # DPPO
            "critic_num_blocks": 1,  # DPPO
            "critic_warmup": 2,  # DPPO, iterations
            "weight_decay": 0.0,  # DPPO
            "discount": 0.999,  # WAM, per decision
            "gae_lambda": 0.95,  # WAM
            "denoising_discount": 0.99,  # DPPO
            "bootstrap_at_limit": True,  # DPPO; False: ours, an episode that runs out of time is worth 0
            "clip_last": 0.01,  # DPPO, at the last denoising step
            "clip_noisiest": 0.001,  # DPPO
            "clip_rate": 3.0,  # DPPO
            "value_weight": 0.5,  # DPPO
            "bc_weight": 0.025,  # WAM (DiWA: 0.05)
            "target_kl": 1.0,  # DPPO
            "reward_clip": 10.0,  # DPPO
            "min_advantage_std": 0.0,  # ours; 1.0 keeps the actor still where nearly all rollouts succeed
            "ema_decay": 0.0,  # ours; above 0 the policy is the actor's moving average over the iterations
            "tasks_at_once": 1,  # tasks that are fine-tuned as one program; 8 keep an accelerator busier than 1
            "updates_per_call": 1,
            "save_every": 25,
            "keep_checkpoints": 2,  # the newest; more of them are the policies along training that `diagnose` compares
        }
    )
    config.evaluation = ConfigDict(
        {
            "num_episodes": 256,
            "batch_size": 256,  # episodes at once; bounds the memory
            "max_steps": MAX_EPISODE_STEPS,
            "seed": 1000,  # of the starts: the same for every method and stage
            "video_task": "open_drawer",
        }
    )
    config.prediction = ConfigDict(
        {
            "num_windows": 100,  # WAM, of the play's validation split
            "horizon": 50,  # WAM, open-loop steps
            "context": 1,  # WAM, real frames before them
            "batch_size": 10,  # windows at once; bounds the memory
            "seed": 2000,  # of the windows: the same for every method
        }
    )
    return config.lock()
