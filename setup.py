"""Builds pmc_fast._C, and pmc_fast._cuda where nvcc is found, with CMake; everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt, leaving the modules where setuptools expects them. Needs no torch."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "pmc_fast._C":
            return  # one run of CMake builds both
        import pybind11  # a build requirement: present in the isolated build environment

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        for folder in {target.parent, ROOT / "pmc_fast"}:  # this build may be the first without CUDA
            for earlier in folder.glob("_cuda.*.so"):
                earlier.unlink()
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPMC_FAST_MODULE_FILE={target.name}",
            f"-DPMC_FAST_CUDA={os.environ.get('PMC_FAST_CUDA') or 'AUTO'}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension("pmc_fast._C", sources=[]), Extension("pmc_fast._cuda", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
