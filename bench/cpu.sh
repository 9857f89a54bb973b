#!/usr/bin/env bash
# What bench/gpu.sh asks a GPU, in small, on a CPU with 2 cores and 16 GiB: some 15 minutes. Rows go to bench/results.
#
#     PYTHON=.venv/bin/python bash bench/cpu.sh
#
# A part that fails or runs over its time is named at the end; the others go on.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
failed=()
part() { # SECONDS WORDS...
    echo "== ${*:2}"
    timeout "$1" "$python" "${@:2}" || failed+=("${*:2} (exit $?)")
}

part 30 -m lowvram_db doctor
part 120 -m pytest -q -p no:cacheprovider tests/kernels
part 420 bench/compare.py --model sd15 --resolution 256 --checkpointed 9 --steps 3
part 180 bench/plan_accuracy.py
part 120 bench/adam8.py --model sd15
part 60 bench/noise_loss.py
part 150 bench/profile_step.py --model sd15 --resolution 256
part 240 bench/growth.py batch --resolution 128 --values 1,2,4 --steps 2
part 120 bench/growth.py photos --values 5,50,500

for what in "${failed[@]}"; do echo "failed: $what"; done
exit ${#failed[@]}
