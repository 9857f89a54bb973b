#!/usr/bin/env bash
# Everything here that wants a GPU, most important first, in under 9 minutes; rows go to bench/results as always.
#
#     PYTHON=.venv/bin/python bash bench/gpu.sh
#
# On a machine without a network, lay wheels of what its Python lacks (setuptools too) into .whl/ and leave PYTHON out.
# A part that fails or runs over its time is named at the end; the others go on.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if [[ -d .whl ]]; then
    "$python" -m venv --system-site-packages runs/gpu-venv && python=runs/gpu-venv/bin/python
    "$python" -m pip install --quiet --no-index --no-deps .whl/*.whl || exit 1
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || exit 1
fi
nvidia-smi || { echo "no GPU answers here" >&2; exit 1; }

failed=()
part() { # SECONDS WORDS...
    echo "== ${*:2}"
    timeout "$1" "$python" "${@:2}" || failed+=("${*:2} (exit $?)")
}

part 20 -m lowvram_db doctor
part 80 -m pytest -q -p no:cacheprovider tests/kernels tests/optim tests/memory
part 100 bench/compare.py --model sd15 --checkpointed 0,5,9 --steps 10
part 60 bench/plan_accuracy.py --only accuracy
part 50 bench/adam8.py --model sd15
part 10 bench/noise_loss.py
part 130 bench/compare.py --model sd15 --vram 4,6,8,12GiB --steps 5
part 40 bench/profile_step.py --model sd15
part 50 bench/compare.py --model sdxl --resolution 1024 --no-prior --recipes ours --checkpointed 7 --steps 5

for what in "${failed[@]}"; do echo "failed: $what"; done
exit ${#failed[@]}
