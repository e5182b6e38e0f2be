"""
Puts the compiled extension into the wheel where that is asked for, with torch and a compiler at hand:

    HF_LMOPT_BUILD=1 pip wheel --no-build-isolation --no-deps .

Otherwise the wheel holds the sources alone, needs neither, and they are compiled at first use; see
hf_lmopt/build_extension.py.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


# By its path: importing it from the package would import torch.
spec = importlib.util.spec_from_file_location("build_extension", Path(__file__).parent / "hf_lmopt/build_extension.py")
build_extension = sys.modules["build_extension"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_extension)


class BuildLibrary(build_ext):
    """One library with operators, which is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], build_extension.shipped_library().name)

    def build_extension(self, ext: Extension) -> None:
        build_extension.build_library(Path(self.get_ext_fullpath(ext.name)))


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
