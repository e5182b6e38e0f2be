"""
Puts the compiled extension into the wheel where that is asked for, with torch and a compiler at hand:

    HF_LMOPT_BUILD=1 pip wheel --no-build-isolation --no-deps .

Its CUDA part is in it where nvcc is found, for the cards and on the conditions of hf_lmopt/cuda_architectures.py.
Without HF_LMOPT_BUILD the wheel holds the sources alone, needs neither, and they are compiled at first use; see
hf_lmopt/build_extension.py.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


# The files of the package without the package, whose import would import torch.
sources = sys.modules["hf_lmopt_sources"] = ModuleType("hf_lmopt_sources")
sources.__path__ = [str(Path(__file__).parent / "hf_lmopt")]
build_extension = importlib.import_module("hf_lmopt_sources.build_extension")


class BuildLibrary(build_ext):
    """One library with operators, which is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        architectures = build_extension.architectures_ahead_of_time()
        return os.path.join(*fullname.split(".")[:-1], build_extension.library_name(architectures))

    def build_extension(self, ext: Extension) -> None:
        architectures = build_extension.architectures_ahead_of_time()
        build_extension.build_library(Path(self.get_ext_fullpath(ext.name)), architectures, is_strict=True)


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, and on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if os.environ.get("HF_LMOPT_BUILD") == "1":
    setup(
        ext_modules=[Extension("hf_lmopt.liblmopt", sources=[])],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    )
else:
    setup()
