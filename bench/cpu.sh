#!/usr/bin/env bash
# What bench/gpu.sh asks a GPU, in small, on a CPU with 2 cores and 16 GiB: some 15 minutes. Rows go to bench/results.
#
#     PYTHON=.venv/bin/python bash bench/cpu.sh
#     PYTHON=.venv/bin/python bash bench/cpu.sh plan growth    # only these parts
#
# What failed or was cut off is named at the end.
set -uo pipefail
python=${PYTHON:-python3}
whole=1200
source "$(dirname "$0")/parts.sh"

part doctor 30 -m lowvram_db doctor
part kernels 120 -m pytest -q -p no:cacheprovider tests/kernels
part step 420 bench/compare.py --model sd15 --resolution 256 --checkpointed 9 --steps 3
part plan 300 bench/plan_accuracy.py
part adam8 120 bench/adam8.py --model sd15
part adam8-lora 60 bench/adam8.py --model sd15-lora
part noise 60 bench/noise_loss.py
part profile 150 bench/profile_step.py --model sd15 --resolution 256
part growth 240 bench/growth.py batch --resolution 128 --values 1,2,4 --steps 2
part photos 120 bench/growth.py photos --values 5,50,500
report
