"""Package of wam_jax; the versions it is tested with stand in requirements.txt."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "wam_jax/__init__.py").read_text())[1]

setup(
    name="wam_jax",
    version=VERSION,
    description="World-Action Models in JAX: DreamerV2 with inverse dynamics, and PPO inside the frozen world model",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["wam_jax*", "experiments*", "data*"]),
    install_requires=[
        "absl-py",
        "array_record",
        "chex",
        "distrax",
        "flax",
        "jax>=0.10",
        "matplotlib",
        "ml-collections",
        "numpy",
        "opencv-python-headless",
        "optax",
        "orbax-checkpoint",
        "pillow",
        "psutil",
        "scikit-image",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "calvin": ["pybullet"],
        "beam": ["apache-beam"],
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy"],
    },
)
