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


def extension(name: str, source: str, headers: list[str], options: list[str]) -> Pybind11Extension:
    """One module of megatron_cpt.mixture.order from csrc/."""
    return Pybind11Extension(
        f"megatron_cpt.mixture.order.{name}",
        [f"csrc/{source}"],
        depends=[f"csrc/{header}" for header in headers],
        cxx_std=17,
        extra_compile_args=[*options, "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,  # setuptools then leaves out what could not be built
    )


setup(
    ext_modules=[
        extension("_sampling", "sampling.cpp", ["sampling_core.h", "sampling_order.h", "backend_cpu.h"], []),
        # Bit for bit what megatron-core computes: no product may be fused with a sum.
        extension("_megatron_index", "megatron_index.cpp", ["megatron_index_core.h"], ["-ffp-contract=off"]),
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
