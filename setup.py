"""Installation of art_edm; see README.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "art_edm" / "__init__.py").read_text()).group(1)

setup(
    name="art_edm",
    version=version,
    description="Better timestep grids for EDM and EDM2 samplers, learned by ART-RL",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9",
    # The list of known sources is read at run time: an installed package has a copy, a checkout its own file.
    packages=[*find_packages(include=["art_edm", "art_edm.*"]), "art_edm.third_party"],
    package_dir={"art_edm.third_party": "third_party"},
    package_data={"art_edm": ["weights/*"], "art_edm.third_party": ["upstream.json"]},
    install_requires=["torch>=2.0", "numpy", "click", "pillow", "scipy", "requests"],
    extras_require={
        "plot": ["matplotlib"],
        "diffusers": ["diffusers>=0.30"],
        # scipy 1.18 lost the sqrtm that the Frechet distance is tested against
        "test": ["pytest", "hypothesis", "ruff", "matplotlib", "tqdm", "scipy<1.18"],
    },
)
