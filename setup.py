"""Packaging of megatron-sgt: pure Python, no extension is compiled at install time or at start."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

# megatron-core from 0.17 on needs Python 3.12; an older Python gets 0.16.
# deepspeed before 0.19.8 adds a leaked gradient to the sum of a half-precision run.
# transformers is imported only by export, evaluation and the Hugging Face tokenizer, but exporting
# what was trained is part of the main job, so it is not an extra. protobuf reads sentencepiece's model files.
INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16,<0.20",
    "deepspeed>=0.19.8",
    "numpy",
    "protobuf",
    "pydantic>=2",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "tqdm",
    "transformers>=4.48",
]
# NVIDIA Apex and FlashAttention-3 or -4 are used when importable. They are no extras: they must be built
# against the machine's toolkit, and the name `apex` on PyPI belongs to an unrelated package.
EXTRAS_REQUIRE = {
    "gpu": ["triton>=3.6; platform_system == 'Linux'"],
    "mpi": ["mpi4py"],
    "eval": ["lm-eval[hf]>=0.4.9"],
    "data": ["pyarrow>=16", "zstandard"],
    "report": ["matplotlib"],
    "logging": ["tensorboard", "wandb"],
    "dev": [
        *(
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "pyarrow>=16",
            "zstandard",
            "tensorboard",
            "matplotlib",
            "mpi4py",
        ),
        "triton>=3.7.1; platform_system == 'Linux'",
        "lm-eval[hf]>=0.4.9",
    ],
}


def read_version() -> str:
    """Version of the package, read without importing it (its dependencies may be absent)."""
    text = (ROOT / "megatron_sgt" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_sgt/__init__.py holds no line __version__ = "..."')
    return match.group(1)


setup(
    name="megatron-sgt",
    version=read_version(),
    description="Pretraining of the Sparse Growing Transformer (SGT) on Megatron-Core and DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["pretraining", "megatron", "deepspeed", "transformer", "attention looping"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_sgt", "megatron_sgt.*"]),
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
