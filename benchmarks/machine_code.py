"""
The machine code of CUDA kernels: compiled as for a wheel, taken apart by NVIDIA's disassembler, and read.

`nvdisasm` comes with the toolkit, or alone: `pip install nvidia-cuda-nvdisasm`. What a kernel needs of the card is
what the assembler says of it (`ptxas -v`). Where the loops are is told by `machine_loops.py`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_lmopt.compilers import find_compiler
from hf_lmopt.cuda_toolkit import NVCC_FLAGS, find_nvcc
from hf_lmopt.extension_sources import SOURCE_DIR


# Spills are counted here, so that a table can show them; in a build they are an error.
READING_FLAGS = (*NVCC_FLAGS, "-Xptxas", "-v")
_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x?_?\d+):")
_SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")
_TARGET = re.compile(r"`\((\.L_x?_?\d+)\)")


@dataclass(frozen=True)
class Instruction:
    """
    One instruction of a warp.

    Attributes:
        predicate (`str`): `"@P0"` or `"@!P0"`, empty where all lanes take part.
        opcode (`str`): with its modifiers, such as `"HMMA.16816.F32"`.
        operands (`str`): as written.
        target (`int`, *optional*): of a branch, the number of the instruction that it goes to.
    """

    predicate: str
    opcode: str
    operands: str
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class MachineKernel:
    """
    A kernel for one architecture.

    Attributes:
        name (`str`): mangled.
        registers (`int`): of a thread.
        stack_bytes, spill_bytes (`int`): of a thread.
        static_shared_bytes (`int`): of a block, without what a launch asks for.
        instructions (`tuple[Instruction, ...]`): in order.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    instructions: tuple[Instruction, ...]

    @property
    def counts(self) -> Counter[str]:
        """How many instructions of each name the code has."""
        return count_names(self.instructions)


def count_names(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.name for instruction in instructions)


def compile_kernels(
    source: Path, architecture: str, folder: Path, source_dir: Path = SOURCE_DIR
) -> list[MachineKernel]:
    """
    All kernels of a source file, compiled for one architecture.

    Args:
        source (`Path`):
            A `.cu` file.
        architecture (`str`):
            Such as `"80"`.
        folder (`Path`):
            Where the object goes.
        source_dir (`Path`, *optional*, defaults to the package's `csrc`):
            Where headers are looked for.

    Raises:
        RuntimeError: if nvcc or the disassembler is not there, or the source does not compile.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("There is no nvcc, which machine code needs. Put it on the PATH or set CUDA_HOME.")
    compiler = find_compiler()
    host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = [str(nvcc), *READING_FLAGS, *host, "-cubin", f"-arch=sm_{architecture}", f"-I{source_dir}"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{architecture}. nvcc says:\n{done.stderr}")
    code = disassemble(cubin)
    return [_kernel(usage, code) for usage in _USAGE.finditer(done.stderr)]


def find_disassembler() -> Path:
    """
    `nvdisasm` of the Python package, on the path or beside nvcc.

    Raises:
        RuntimeError: if it is nowhere.
    """
    # The package first: its version is the one that is tested.
    package, nvcc = importlib.util.find_spec("nvidia"), find_nvcc()
    folders = [Path(folder) for folder in package.submodule_search_locations or ()] if package else []
    candidates = [folder / "cu13" / "bin" / "nvdisasm" for folder in folders]
    candidates += [Path(found) for found in [shutil.which("nvdisasm")] if found]
    candidates += [Path("/usr/local/cuda/bin/nvdisasm"), *([nvcc.parent / "nvdisasm"] if nvcc else [])]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise RuntimeError(
        "There is no nvdisasm, which reads machine code: neither as a package nor on the PATH nor beside nvcc. "
        "pip install nvidia-cuda-nvdisasm"
    )


def disassemble(cubin: Path) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of each kernel, by its mangled name."""
    command = [str(find_disassembler()), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[str]] = {}
    for line in text.splitlines():
        if section := _SECTION.match(line):
            kernels[section[1]] = []
        elif kernels:
            next(reversed(kernels.values())).append(line)
    return {name: tuple(parse_instructions(lines)) for name, lines in kernels.items()}


def parse_instructions(lines: Iterable[str]) -> list[Instruction]:
    """What the disassembler prints of one kernel; branches get the number of their target."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction[2] or "", instruction[3], instruction[4]))
    return [
        Instruction(
            predicate, opcode, operands, labels.get(target[1]) if (target := _TARGET.search(operands)) else None
        )
        for predicate, opcode, operands in found
    ]


def _kernel(usage: re.Match[str], code: dict[str, tuple[Instruction, ...]]) -> MachineKernel:
    shared = re.search(r"(\d+) bytes smem", usage["rest"])
    return MachineKernel(
        name=usage["name"],
        registers=int(usage["registers"]),
        stack_bytes=int(usage["stack"]),
        spill_bytes=int(usage["stores"]) + int(usage["loads"]),
        static_shared_bytes=int(shared[1]) if shared else 0,
        instructions=code[usage["name"]],
    )
