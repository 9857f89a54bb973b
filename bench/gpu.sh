#!/usr/bin/env bash
# Everything here that wants a GPU, what was seen least first: five parts in 10 minutes at the most, all in 22. Rows go to
# bench/results as always.
#
#     PYTHON=.venv/bin/python bash bench/gpu.sh
#     bash bench/gpu.sh plan caps    # only these parts, with more time for each: for what was cut off
#
# On a machine without a network, lay wheels of what its Python lacks, and of setuptools, into .whl/ and leave PYTHON out;
# where the tree comes without its history, say what it is: COMMIT=abc1234.
# PEER=diffusers=PATH/train_dreambooth.py runs that beside us (bench/README.md). What failed or was cut off is named at the end.
set -uo pipefail
python=${PYTHON:-python3}
whole=500
source "$(dirname "$0")/parts.sh"

if [[ -d .whl ]]; then
    # A venv that sees the packages of the Python it is made of, which may itself be one of a venv: it sees no others.
    venv=runs/gpu-venv/bin/python
    "$python" -m venv --without-pip runs/gpu-venv || exit 1
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$venv" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/around.pth"
    pip=("$python" -m pip --python "$venv" install --quiet --no-index --no-deps)
    "${pip[@]}" .whl/*.whl && "${pip[@]}" --no-build-isolation --editable . || exit 1
    python=$venv
fi
nvidia-smi || { echo "no GPU answers here" >&2; exit 1; }

part doctor 15 -m lowvram_db doctor
part draw 30 -m pytest -q -p no:cacheprovider tests/families/test_draw.py tests/memory/test_layers.py
part sdxl 170 bench/compare.py --model sdxl --resolution 1024 --recipes ours --vram 4,6GiB --steps 5
part whole 220 bench/full_size.py --model sdxl --resolution 1024 --steps 4 --vram 4.5GiB
part stream 80 bench/streaming_proof.py --model sd15
part stream-sdxl 180 bench/streaming_proof.py --model sdxl
part kernels 70 -m pytest -q -p no:cacheprovider tests/kernels tests/optim tests/memory
part loop 40 -m pytest -q -p no:cacheprovider tests/train/test_on_every_device.py tests/train/test_out_of_memory.py
part runs 120 -m pytest -q -p no:cacheprovider tests/test_dreambooth.py tests/test_resume.py tests/train/test_validation.py
part train 45 -m lowvram_db train configs/demo.toml --set train.steps=60 --set prior.steps=10 \
    --set checkpoint.every=20 --set sample.every=30 --set sample.steps=10 --set output.name=gpu
part step 50 bench/compare.py --model sd15 --checkpointed 0,5,9 --steps 10
part caps 75 bench/compare.py --model sd15 --vram 4,6,8,12GiB --steps 5
part plan 80 bench/plan_accuracy.py --only accuracy
part adam8 30 bench/adam8.py --model sd15
part adam8-lora 15 bench/adam8.py --model sd15-lora
part noise 20 bench/noise_loss.py
part layout 30 bench/layout.py --model sd15 --steps 10
part profile 25 bench/profile_step.py --model sd15
[[ -z ${PEER:-} ]] || part peer 60 bench/compare.py --recipes classic --checkpointed 9 --steps 10 --peer "$PEER"
report
