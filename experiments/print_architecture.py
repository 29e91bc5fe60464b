"""Prints the architectures of configs side by side, with the parameters of each part: Table II of WAM.

python -m experiments.print_architecture experiments/configs/calvin_d.py:dreamer_v2 experiments/configs/calvin_d.py:wam

Counted from the modules as they are initialised, without any arithmetic.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from experiments import config_checks, finetune_policy, train_policy, train_reward, train_world_model
from wam_jax import cli, prior_ensemble, tables, world_model

PAPER = {  # by part: what the paper states, and parameters of the public PyTorch code that it builds on
    "encoder": ("embedding 1,554 = 1,536 of two cameras + 18 of proprioception", "7,825,824 (LUMOS)"),
    "rssm": ("h 1,024; z 32 x 32; feature 2,048", "12,917,968 (LUMOS, 18 dims of proprioception)"),
    "decoder": ("two cameras", "19,157,286 (LUMOS)"),
    "inverse_dynamics": ("WAM only: three layers, [e; e'] -> 7; widths not given", ""),
    "proprioception_decoder": ("none", ""),
    "scene_decoder": ("none", ""),
    "prior_ensemble": ("none", ""),
    "policy": ("DiffusionMLP, 20 denoising steps, chunk of 4", "1,612,364 (DPPO)"),
    "critic": ("", "656,385 (DPPO)"),
    "classifier": ("", ""),
}
WORLD_MODEL_PARTS = ("encoder", "rssm", "decoder", "inverse_dynamics", "proprioception_decoder", "scene_decoder")
NOTE = (
    "Policy, critic and classifier are one task's. The paper states sizes and no parameter counts, so a count stands "
    "beside it where the public code it builds on was counted."
)


def main(argv: Sequence[str]) -> None:
    """Prints a Markdown table of every config named."""
    if not argv:
        raise ValueError("name at least one config, e.g. experiments/configs/calvin_d.py or calvin_d.py:dreamer_v2")
    print(markdown({name: load_config(name) for name in argv}))


def load_config(name: str) -> FrozenConfigDict:
    """Loads FILE.py, or FILE.py:METHOD.

    Raises:
      ValueError: there is no such file, it is no config, or a value in it cannot work.
    """
    path, _, method = name.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise ValueError(f"{path} is no config file; name one of experiments/configs/, e.g. calvin_d.py:wam")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(); name a file of experiments/configs/")
    config: ConfigDict = module.get_config(method) if method else module.get_config()
    config_checks.check(config)
    return FrozenConfigDict(config)


def count_parameters(config: FrozenConfigDict) -> dict[str, int]:
    """Parameters of each part of a config, by the names of PAPER; parts that it does not have are left out."""
    task = config.tasks[0]

    def init(rng):
        policy = train_policy.initial_state(config, task)
        fine_tuned = finetune_policy.initial_state(config, task, policy.ema_params)
        others = {
            "policy": policy.params,
            "critic": fine_tuned.params.critic,
        }
        if config.reward.kind == "classifier":
            others["classifier"] = train_reward.initial_state(config, task).params
        if config.prior_ensemble.num_members:
            ensemble = train_world_model.build_ensemble(config)
            others["prior_ensemble"] = prior_ensemble.init(ensemble, rng).params
        return world_model.init(world_model.build(config.world_model), rng) | others

    shapes = jax.eval_shape(init, jax.random.key(0))
    return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in shapes.items()}


def markdown(configs: Mapping[str, FrozenConfigDict]) -> str:
    """A Markdown table: a line per part, a column per config, then the paper's statement and the counted code."""
    counts = {name: count_parameters(config) for name, config in configs.items()}
    lines = [
        tables.line("", [*configs, "paper", "public code, counted"]),
        tables.line("---", ["---"] * (len(configs) + 2)),
    ]
    for name, describe in _SIZES.items():
        lines.append(tables.line(name, [*(describe(config) for config in configs.values()), "", ""]))
    for part, (paper, counted) in PAPER.items():
        cells = [f"{found[part]:,}" if part in found else "-" for found in counts.values()]
        lines.append(tables.line(part.replace("_", " "), [*cells, paper, counted]))
    totals = [sum(found.get(part, 0) for part in WORLD_MODEL_PARTS) for found in counts.values()]
    lines.append(tables.line("**world model**", [*(f"**{total:,}**" for total in totals), "", "39,901,078 (LUMOS)"]))
    return "\n".join([*lines, "", NOTE]) + "\n"


def _latent(settings: Any) -> str:
    return f"{settings.deterministic_dim:,}; {settings.num_latents} x {settings.num_classes}"


_SIZES = {
    "kind of encoder and decoder": lambda config: config.world_model.kind,
    "embedding": lambda config: f"{world_model.embedding_dim(config.world_model):,}",
    "h; z": lambda config: _latent(config.world_model),
    "feature": lambda config: f"{world_model.feature_dim(config.world_model):,}",
    "kind of policy": lambda config: config.policy.kind,
    "weight of the action loss": lambda config: f"{config.world_model.action_weight:g}",
}


if __name__ == "__main__":
    cli.run(main, takes="config files")
