"""Installation of art_edm; see README.md."""

import re
from pathlib import Path

from setuptools import setup

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
    packages=["art_edm"],
    package_data={"art_edm": ["weights/*"]},
    install_requires=["torch>=2.0", "numpy", "click", "pillow", "scipy", "requests"],
    extras_require={"plot": ["matplotlib"], "test": ["pytest", "hypothesis", "ruff", "matplotlib"]},
)
