"""Builds amos_dist._C against the torch that is installed: the CPU kernels always, the CUDA kernels on request.

AMOS_CUDA   1: build them, or fail with the reason; 0: do not; auto (default): if nvcc is found
CUDA_HOME   the toolkit; by default the one that `nvcc` on PATH, or /usr/local/cuda, belongs to
AMOS_ARCHS  GPU architectures, default "80;90;100"
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "amos_dist: torch is not installed in this environment. Install it first (pip install torch), then run "
        "`pip install --no-build-isolation .` again (without that flag pip builds where torch cannot be seen)."
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"amos_dist: torch {torch.__version__} is too old. Install torch 2.11 or later, then run this again.")
compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
if sys.platform != "win32" and not shutil.which(compiler):
    sys.exit(
        f"amos_dist: no C++ compiler: `{compiler}` is not on PATH. "
        "Install one (Debian, Ubuntu: apt-get install g++), or name it in the variable CXX."
    )

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: runs on that and on all later ones


def find_toolkit() -> tuple[Path | None, str]:
    """The folder of the CUDA toolkit, or None and the reason."""
    wanted = os.environ.get("AMOS_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"amos_dist: AMOS_CUDA={wanted} is unknown. Set it to 1, 0 or auto.")
    if wanted == "0":
        return None, "AMOS_CUDA=0 when it was built"
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        # `nvcc` may be a wrapper script elsewhere: the compiler itself knows where its toolkit is.
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = [line.split("TOP=", 1)[1] for line in dry_run.stderr.splitlines() if "TOP=" in line]
        candidates[1:1] = top[:1]
    for home in candidates:
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home).resolve(), ""
    if wanted == "1":
        sys.exit("amos_dist: AMOS_CUDA=1, but no nvcc was found. Install the CUDA toolkit or set CUDA_HOME to it.")
    return None, "no nvcc was found when it was built"


toolkit, no_cuda_reason = find_toolkit()
archs = os.environ.get("AMOS_ARCHS", "80;90;100")


class Build(BuildExtension):
    """Compiles the .cu files with nvcc itself: CUDAExtension refuses to under a CPU build of torch."""

    def build_extensions(self) -> None:
        self.force = True  # what is up to date in build/ may be of another AMOS_CUDA, AMOS_ARCHS or torch
        if toolkit:
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                self.extensions[0].extra_objects.append(self.compile_cuda(source, toolkit))
        super().build_extensions()

    def compile_cuda(self, source: Path, toolkit: Path) -> str:
        target = Path(self.build_temp).absolute() / f"{source.stem}.cuda.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs.split(";")]
        newest = archs.split(";")[-1]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # for GPUs that come later
        command = [str(toolkit / "bin" / "nvcc"), "-O3", "-std=c++17", "--threads=0", *codes]
        command += [
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-Xfatbin",
            "-compress-all",
            f'-DAMOS_CUDA_ARCHS="{archs}"',
        ]
        command += ["-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        if subprocess.call(command) != 0:
            sys.exit(f"amos_dist: nvcc could not compile {source.name}. See its message above, or set AMOS_CUDA=0.")
        return str(target)


version = re.search(r'^__version__ = "(.+)"', (ROOT / "amos_dist" / "__init__.py").read_text(), re.MULTILINE)
macros = [
    ("AMOS_VERSION", f'"{version[1] if version else "?"}"'),
    ("TORCH_TARGET_VERSION", TORCH_TARGET),
    ("AMOS_TORCH_BUILT", f'"{torch.__version__}"'),
    ("AMOS_NO_CUDA_REASON", f'"{no_cuda_reason}"'),
]
cuda = {}
if toolkit:
    macros.append(("AMOS_WITH_CUDA", "1"))
    folders = [str(toolkit / name) for name in ("lib64", "lib") if (toolkit / name).exists()]
    cuda = {"library_dirs": folders, "libraries": ["cudart_static", "dl", "rt", "pthread"]}

extension = CppExtension(
    "amos_dist._C",
    ["csrc/ops.cpp", "csrc/cpu/cpu.cpp"],
    depends=[str(path) for path in (ROOT / "csrc").rglob("*") if path.is_file()],
    define_macros=macros,
    # No contraction to fused multiply-add: results must not depend on the instruction set.
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wno-psabi",
    ],
    extra_link_args=["-s"],
    py_limited_api=True,
    **cuda,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
