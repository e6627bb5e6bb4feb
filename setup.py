"""The part of the build that cannot be declared in pyproject.toml: the C++ and CUDA operators.

In: `csrc/**/*.cpp`, and `csrc/**/*.cu` where nvcc and a CUDA build of torch of the same major
version are present. Out: one shared object `deltafx/_C.abi3.so`, which registers its operators with
`TORCH_LIBRARY` and is loaded by `torch.ops.load_library`; it has no Python module inside and does
not depend on the version of Python. Compilation goes through ninja, so a second build is
incremental.

Environment: `DELTAFX_CUDA=0` leaves the CUDA operators out; `TORCH_CUDA_ARCH_LIST` (torch's own
variable, for example "7.5;8.6;9.0a") chooses the GPU architectures, by default that of the GPU of
this machine, or 9.0a if it has none: from 7.0 on, as far as nvcc goes back; from 8.0 on with tensor
cores; only 9.0a, not 9.0, has the kernels for Hopper's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_ARCH = "9.0a"
HEADERS = (".h", ".inl", ".cuh")


def find_cuda_toolkit() -> Path | None:
    """Return the root of the toolkit that the `nvcc` on PATH runs, or None.

    `nvcc` may be a wrapper script outside of its toolkit, so it is asked where it lives.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ _HERE_=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve().parent if top else None


def nvcc_major(toolkit: Path) -> str:
    """Return the major version of a toolkit, such as "13"."""
    version = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    )
    found = re.search(r"release (\d+)\.", version.stdout)
    return found.group(1) if found else ""


def cuda_toolkit_to_use() -> Path | None:
    """Return the toolkit to compile `.cu` files with, or None to build for the CPU only."""
    import torch

    toolkit = find_cuda_toolkit()
    if os.environ.get("DELTAFX_CUDA") == "0" or toolkit is None or torch.version.cuda is None:
        return None
    if nvcc_major(toolkit) != torch.version.cuda.split(".")[0]:
        print(
            f"deltafx: CPU operators only: nvcc is CUDA {nvcc_major(toolkit)}, "
            f"torch was built for CUDA {torch.version.cuda}",
            file=sys.stderr,
        )
        return None
    return toolkit


def pip_cuda_include() -> list[str]:
    """Return the headers that pip installed with torch, for what a small toolkit leaves out."""
    import torch

    site = Path(torch.__file__).resolve().parents[1]
    return [str(path) for path in sorted(site.glob("nvidia/cu*/include"))]


def sources(suffix: str) -> list[str]:
    """Return the csrc files with this suffix, relative to the root as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob(f"*{suffix}"))


def default_cuda_arch() -> str:
    """Return the architecture of this machine's GPU, as TORCH_CUDA_ARCH_LIST has it."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_CUDA_ARCH
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def check_object_names(files: list[str]) -> None:
    """Refuse two sources that would be compiled to the same object file (`x.cpp` and `x.cu`)."""
    stems = [os.path.splitext(file)[0] for file in files]
    clashes = sorted({stem for stem in stems if stems.count(stem) > 1})
    if clashes:
        raise SystemExit(f"deltafx: .cpp and .cu sources need different names: {clashes}")


def make_extension(toolkit: Path | None):
    """Describe the shared object, with CUDA if a toolkit is given."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    headers = [str(path) for suffix in HEADERS for path in CSRC.rglob(f"*{suffix}")]
    common = ["-O3", "-std=c++17", "-g0"]
    # at::parallel_for is a plain loop in code compiled without OpenMP.
    host = [*common, "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    files, kind, macros = sources(".cpp"), CppExtension, []
    flags = {"cxx": host}
    if toolkit is not None:
        files, kind, macros = files + sources(".cu"), CUDAExtension, [("DELTAFX_CUDA", None)]
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:
            macros.append(("DELTAFX_SM90A", None))
        system = [flag for path in pip_cuda_include() for flag in ("-isystem", path)]
        flags = {"cxx": host + system, "nvcc": ["-O3", "-std=c++17", "-lineinfo", *system]}
    check_object_names(files)
    return kind(
        "deltafx._C",
        files,
        include_dirs=[str(CSRC)],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        depends=headers,
        py_limited_api=True,
    )


def extension_arguments() -> dict:
    """Return what `setup` needs to build the operators; nothing where only metadata is wanted."""
    if not any(command in sys.argv for command in BUILD_COMMANDS):
        return {}
    toolkit = cuda_toolkit_to_use() if sources(".cu") else None
    if toolkit is not None:
        # torch reads both when its build tools are imported.
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_cuda_arch())
    from torch.utils.cpp_extension import BuildExtension

    class BuildOperators(BuildExtension):
        """Keeps its object files in one place, so that pip's builds are incremental as well."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "operators")

    return {
        "ext_modules": [make_extension(toolkit)],
        "cmdclass": {"build_ext": BuildOperators},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}

setup(**extension_arguments())
