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

part 120 -m pytest -q -p no:cacheprovider tests/kernels tests/optim tests/memory
part 70 bench/adam8.py --model sd15
part 20 bench/noise_loss.py
part 120 bench/plan_accuracy.py --only accuracy
part 90 bench/full_size.py --optimizer adam8 --resolution 512 --steps 10
part 90 bench/full_size.py --optimizer bnb-adam8 --resolution 512 --steps 10
part 90 bench/adam8.py --model sdxl

for what in "${failed[@]}"; do echo "failed: $what"; done
exit ${#failed[@]}
