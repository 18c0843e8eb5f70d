"""Everything about the package is in pyproject.toml; this file is where compiled extensions are declared."""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError


class OptionalBuildExt(build_ext):
    """Without a working C++17 compiler the package still installs; the Python twin of each extension is used."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, BaseError, OSError) as error:
            print(f"warning: {ext.name} was not built, the slower Python fallback is used: {error}", file=sys.stderr)


setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_cpt.data._sampling",
            ["csrc/sampling.cpp"],
            depends=["csrc/sampling_core.h"],
            cxx_std=17,
            optional=True,  # setuptools then leaves out what could not be built
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
