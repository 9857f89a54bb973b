"""How fast can the optimizer's kernel be at best on a card? `python bench/adam8_floor.py`, which needs no GPU

Compiles it for each card, counts machine instructions, and appends a row a card, model and way of storing weights to
bench/results/adam8_floor.csv: the milliseconds of a step that the memory's bandwidth allows, and those that the
instructions allow, the larger of
    all of them, of which a multiprocessor starts 128 lanes a clock,
    integers, comparisons and logic, 64 lanes,
    roots, logarithms and conversions, 16 lanes
(CUDA programming guide, throughput of native arithmetic instructions). Computed, not measured: both can be missed.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from machine import add_row
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowvram_db.kernels import adam8

WEIGHTS = {"sd15": 859.5e6, "sdxl": 2567.5e6}
BYTES = {"bf16": 10.03, "residual": 12.03, "fp16": 10.03, "fp32": 16.03}  # moved a weight
SCALAR_TYPES = {"n": "i32", "width": "i32", "size": "i32", "plane": "i32"}
HALF_RATE = re.compile("IADD3?|LOP3|SHF|LEA|PRMT|F?SEL|[FI]SETP|(F|I|VI)MNMX|I2FP|P2R|PLOP3")
EIGHTH_RATE = re.compile("MUFU|FRND|F2I|I2F|F2F|POPC|FLO")


class Card(NamedTuple):
    capability: int
    multiprocessors: int
    gigahertz: float  # boost
    gigabytes_a_second: float


CARDS = {
    "RTX 3060": Card(86, 28, 1.777, 360),
    "RTX 4070": Card(89, 46, 2.475, 504),
    "H200": Card(90, 132, 1.98, 4800),
}


class Machine(NamedTuple):
    """What became of a kernel."""

    opcodes: list[str]  # without those that do nothing
    registers: int
    spilled: int  # bytes


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: Any) -> Any:
    """A kernel for a card that need not be there. types: of arguments by name; the others are float32 pointers."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else (SCALAR_TYPES | types).get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n] or n == "n"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def optimizer_kernel(mode: str, capability: int) -> Any:
    weight = {"fp16": "*fp16", "fp32": "*fp32"}.get(mode, "*i16")
    types = {"weight": weight, "residual": "*i8", "grad": weight, "codes": "*i16", "scales": "*i32", "record": "*i64"}
    constants = {"STREAM": 16, "MODE": mode} | ({} if mode == "residual" else {"residual": None})
    return compiled(adam8._kernel, types, constants, capability, maxnreg=adam8.REGISTERS)


def machine_of(result: Any) -> Machine:
    """Found by the tools that come with Triton."""
    ptx = result.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    assembler = triton.knobs.nvidia.ptxas_blackwell if "sm_1" in target[1] else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        binary.write_bytes(result.asm["cubin"])
        said = _run(assembler.path, "-v", f"--gpu-name={target[1]}", source, "-o", "/dev/null").stderr
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", binary).stdout
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.M)
    assert registers and spills and opcodes, said
    return Machine([code for code in opcodes if code != "NOP"], int(registers[1]), sum(map(int, spills)))


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)


def lanes_a_weight(machine: Machine) -> dict[str, float]:
    """Instructions a weight of each kind."""
    each = adam8.BLOCK / 32  # a warp has a block
    return {
        "instructions": len(machine.opcodes) / each,
        "half_rate": sum(bool(HALF_RATE.fullmatch(code)) for code in machine.opcodes) / each,
        "eighth_rate": sum(bool(EIGHTH_RATE.fullmatch(code)) for code in machine.opcodes) / each,
    }


def main() -> None:
    for name, card in CARDS.items():
        for mode in ("bf16", "residual"):
            machine = machine_of(optimizer_kernel(mode, card.capability))
            lanes = lanes_a_weight(machine)
            clocks = max(lanes["instructions"] / 128, lanes["half_rate"] / 64, lanes["eighth_rate"] / 16)
            for model, weights in WEIGHTS.items():
                row = {
                    "card": name,
                    "model": model,
                    "weights": mode,
                    **{kind: f"{count:.1f}" for kind, count in lanes.items()},
                    "registers": machine.registers,
                    "ms_by_instructions": f"{clocks * weights / (card.multiprocessors * card.gigahertz * 1e6):.1f}",
                    "ms_by_memory": f"{BYTES[mode] * weights / (card.gigabytes_a_second * 1e6):.1f}",
                }
                add_row("adam8_floor", row)
                print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
