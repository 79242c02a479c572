"""Installation of art_edm; see README.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "art_edm" / "__init__.py").read_text()).group(1)
beside = ["third_party", "patches", "tools", *(f"tools.{name}" for name in find_packages(str(here / "tools")))]

setup(
    name="art_edm",
    version=version,
    description="Better timestep grids for EDM and EDM2 samplers, learned by ART-RL",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9",
    # An installed package has a copy of the scripts, the patches and the list of known sources; a checkout its own.
    packages=[*find_packages(include=["art_edm", "art_edm.*"]), *(f"art_edm.{name}" for name in beside)],
    package_dir={f"art_edm.{name}": name.replace(".", "/") for name in beside},
    package_data={"art_edm": ["weights/*"], "art_edm.third_party": ["upstream.json"], "art_edm.patches": ["*.patch"],
                  "art_edm.tools.paper": ["paper.json"]},
    entry_points={"console_scripts": ["art-edm = art_edm.__main__:main"]},
    # torch before 2.3 needs numpy<2, which pip has no way to know: the tools check the pair.
    install_requires=["torch>=2.0", "numpy", "click", "pillow", "scipy", "requests"],
    extras_require={
        "plot": ["matplotlib"],
        "diffusers": ["diffusers>=0.30"],
        "dinov2": ["timm>=1.0"],
        # scipy 1.18 lost the sqrtm that the Frechet distance is tested against
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "matplotlib", "tqdm", "setuptools>=70.1",
                 "scipy<1.18"],
    },
)
