"""Every kernel compiles for every GPU that people own, without one: no spills, and 16-byte loads where they matter."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

CARDS = (75, 80, 86, 89, 90, 120)

# A process of its own: here kernels are defined for the interpreter.
PROGRAM = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowvram_db.kernels import adam8, noise_loss

def compiled(kernel, types, constants, card):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if "*" in signature[name] or name == "n"}
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", card, 32))

def facts(result, card):
    ptx, metadata = result.asm["ptx"], result.metadata
    widths = re.findall(r"(ld|st)\\.global(?:\\.v(\\d))?\\.b(\\d+)", ptx)
    wide = {way: sum(1 for w, v, b in widths if w == way and int(v or 1) * int(b) == 128) for way in ("ld", "st")}
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = "--gpu-name=" + re.search(r"\\.target (\\w+)", ptx)[1]
        assembler = triton.knobs.nvidia.ptxas if card < 100 else triton.knobs.nvidia.ptxas_blackwell
        command = [assembler.path, "-v", target, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    return {"wide": wide, "spilled": [int(n) for n in re.findall(r"(\\d+) bytes spill (?:stores|loads)", said)]}

card = int(sys.argv[1])
results = {}
pointers = {"words": "*i16", "grids": "*i32", "skipped": "*i32", "unscale": "*fp32", "residual": "*i8"}
numbers = {"n": "i32", "seed": "i64", "counter": "i32", "tensor": "i32", "stream": "i32"}
for mode, weight in {"bf16": "*i16", "residual": "*i16", "fp16": "*fp16", "fp32": "*fp32"}.items():
    grad = {"fp16": "*fp16", "fp32": "*fp32"}.get(mode, "*bf16")
    types = pointers | numbers | {"weight": weight, "grad": grad}
    constants = {"MODE": mode, "ROWS": adam8.ROWS, **adam8.CONSTANTS}
    results[mode] = facts(compiled(adam8._kernel, types, constants, card), card)
places = {"timesteps": "*i64", "address": "*i64", "size": "i32", "plane": "i32"}
floats = dict.fromkeys(("mean", "logvar", "table", "noisy", "weights", "mask", "sums", "gradient"), "*fp32")
constants = {"POSTERIOR": 0, "NOISE": 1, "COLUMNS": 5, "SIZE": noise_loss.SIZE}
results["noisy"] = facts(compiled(noise_loss._noisy_kernel, places | floats, constants, card), card)
types = places | floats | {"prediction": "*bf16"}
results["loss"] = facts(compiled(noise_loss._loss_kernel, types, constants | {"MASKED": True}, card), card)
print(json.dumps(results))
"""


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_without_spills(card):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(card)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results) == {"bf16", "residual", "fp16", "fp32", "noisy", "loss"}
    for name, facts in results.items():
        assert facts["spilled"] and not any(facts["spilled"]), (name, facts)
    assert results["bf16"]["wide"] == {"ld": 3, "st": 2}, "weight, gradient and state in, weight and state out"
    assert results["residual"]["wide"] == {"ld": 3, "st": 2}
