"""The shape of the house: who may import whom, how long a file may be, and that every config builds."""

import ast
import functools
import importlib
from pathlib import Path

import helpers
import jax
import pytest
from ml_collections import FrozenConfigDict

from experiments import finetune_policy, train_policy, train_reward, train_world_model
from wam_jax import prior_ensemble, world_model, world_model_training

PACKAGES = ("wam_jax", "experiments", "data")
SOURCES = sorted(path for package in PACKAGES for path in (helpers.ROOT / package).rglob("*.py"))
WAM_JAX = [path for path in SOURCES if path.relative_to(helpers.ROOT).parts[0] == "wam_jax"]
LEARNING = (
    "world_model",
    "inverse_dynamics",
    "diffusion_policy",
    "success_classifier",
    "reward_rules",
    "prior_ensemble",
    "imagination",
    "ppo",
    "networks",
)
CONFIGS = sorted(path.stem for path in (helpers.ROOT / "experiments/configs").glob("*.py") if path.stem != "__init__")


def name(path: Path) -> str:
    return str(path.relative_to(helpers.ROOT))


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:  # relative: resolved against the file's own package
                parents = path.relative_to(helpers.ROOT).parts[: -node.level]
                package = ".".join((*parents, *filter(None, [node.module])))
            found |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
    return found


def importers(modules: tuple[str, ...], paths) -> list[str]:
    return [
        name(path)
        for path in paths
        if any(found == module or found.startswith(f"{module}.") for found in imports(path) for module in modules)
    ]


def test_the_library_imports_neither_data_nor_experiments():
    assert len(WAM_JAX) > 20
    assert importers(("data", "experiments"), WAM_JAX) == []


def test_losses_and_networks_never_import_trainers():
    learning = [
        path for path in WAM_JAX if path.relative_to(helpers.ROOT / "wam_jax").parts[0].removesuffix(".py") in LEARNING
    ]
    assert {name(path) for path in learning} >= {f"wam_jax/{module}.py" for module in LEARNING[:-1]}
    trainers = ("training", "checkpoints", "metrics", "input_pipeline", "datasets", "rlds", "evaluation", "tables")
    assert importers(tuple(f"wam_jax.{module}" for module in trainers), learning) == []


def test_only_the_writer_and_the_reader_know_the_storage():
    expected = ["wam_jax/datasets.py", "wam_jax/rlds.py", "wam_jax/shards.py"]
    assert importers(("tensorflow_datasets", "array_record", "tensorflow"), SOURCES) == expected


def test_networks_import_no_losses():
    networks = [path for path in WAM_JAX if path.parent.name == "networks"]
    assert importers(tuple(f"wam_jax.{module}" for module in LEARNING[:-1]), networks) == []


def test_pmap_is_in_one_file():
    def mentions(path):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        return "pmap" in {getattr(node, "attr", getattr(node, "id", getattr(node, "name", ""))) for node in nodes}

    assert [name(path) for path in SOURCES if mentions(path)] == ["wam_jax/parallel.py"]


def test_files_are_under_400_lines():
    paths = [*SOURCES, *(helpers.ROOT / "tests").glob("*.py")]
    lengths = {name(path): len(path.read_text().splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length >= 400} == {}


# --- Configs ---


def get_config(config, method):
    return importlib.import_module(f"experiments.configs.{config}").get_config(method)


def test_there_are_configs():
    assert {"base", "quickstart", "calvin_d"} <= set(CONFIGS)


@pytest.mark.parametrize("method", ["wam", "dreamer_v2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_initialises_every_network(config, method):
    config = FrozenConfigDict(get_config(config, method))
    task = config.tasks[0]

    def init(rng):
        model = world_model.build(config.world_model)
        policy = train_policy.initial_state(config, task)
        states = world_model_training.create_state(model, rng), policy, train_reward.initial_state(config, task)
        if config.prior_ensemble.num_members:
            prior_ensemble.init(train_world_model.build_ensemble(config), rng)
        return *states, finetune_policy.initial_state(config, task, policy.ema_params)

    model_state, policy, classifier, ppo = jax.eval_shape(init, jax.random.key(0))
    assert ("inverse_dynamics" in model_state.params) == (method == "wam") == bool(config.world_model.action_weight)
    assert config.method == method
    assert jax.tree.structure(ppo.params.actor) == jax.tree.structure(policy.params)
    feature_dim = world_model.feature_dim(config.world_model)
    assert feature_dim in {dim for x in jax.tree.leaves(classifier.params) for dim in x.shape}


@pytest.mark.parametrize("config", CONFIGS)
def test_an_unknown_method_is_named(config):
    with pytest.raises(ValueError, match="unknown method 'dreamer'.*expected one of wam, dreamer_v2"):
        get_config(config, "dreamer")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_locked_and_says_what_it_is(config):
    module = importlib.import_module(f"experiments.configs.{config}")
    assert module.__doc__
    with pytest.raises((AttributeError, KeyError)):
        module.get_config().world_model.no_such_key = 1
    assert module.get_config().method == "wam"
