import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_db.formats.extract import extract
from lowvram_db.formats.merged import merged
from lowvram_db.formats.stored import open_stored

CPU = torch.device("cpu")
KINDS = ["sd1", "sd2", "sdxl"]


def tuned_of(folder, text=True, everything=False):
    """The same model with every matrix and convolution of UNet and text encoders changed; or all tensors."""
    copy = folder.with_name("tuned")
    shutil.copytree(folder, copy)
    torch.manual_seed(1)
    for file in copy.glob("*/*.safetensors"):
        if file.parent.name == "vae" or (file.parent.name != "unet" and not text):
            continue
        tensors = load_file(file)
        for name, tensor in tensors.items():
            is_layer = (
                name.endswith(".weight")
                and tensor.dim() in (2, 4)
                and (file.parent.name == "unet" or ".layers." in name)
            )
            if is_layer or everything:
                tensors[name] = tensor + 0.01 * torch.randn_like(tensor)
        save_file(tensors, file, {"format": "pt"})
    return copy


def whole(model):
    return {f"{part}.{n}": s.read().clone().float() for part in model.parts for n, s in model.parts[part].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_it_gives_the_tuned_model_back(kind, write_folder):
    folder = write_folder(kind, dtype=torch.float32)
    with open_stored(str(folder)) as base, open_stored(str(tuned_of(folder))) as tuned:
        found = extract(base, tuned, 10**6, CPU)
        back, wanted = whole(merged(base, found.lora)), whole(tuned)
        assert back.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-5)
        assert not found.left and all(group.kept == pytest.approx(group.energy) for group in found.groups.values())
        assert {part for part, _ in found.lora} == {part for part in tuned.parts if part != "vae"}


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_what_is_lost_is_what_the_discarded_singular_values_hold(rank, write_folder):
    folder = write_folder("sdxl", dtype=torch.float32)
    with open_stored(str(folder)) as base, open_stored(str(tuned_of(folder))) as tuned:
        found = extract(base, tuned, rank, CPU)
        before, after, back = whole(base), whole(tuned), whole(merged(base, found.lora))
        lost: dict[tuple[str, str], float] = {}
        for (part, layer), low in found.lora.items():
            name = next(n for n in after if n.startswith(f"{part}.") and n.endswith(f"{layer}.weight"))
            change = (after[name] - before[name]).flatten(1).double()
            discarded = torch.linalg.svdvals(change)[rank:].square().sum().sqrt()
            error = (after[name] - back[name]).double().norm()
            assert error == pytest.approx(float(discarded), rel=1e-3, abs=1e-5)
            assert low.rank == min(rank, *change.shape)
            lost[part] = lost.get(part, 0.0) + float(error.square())
        for part, energy in lost.items():
            groups = [group for (of, _), group in found.groups.items() if of == part]
            assert sum(group.energy - group.kept for group in groups) == pytest.approx(energy, rel=1e-3)


def test_the_rank_that_is_told_keeps_what_it_says(write_folder):
    folder = write_folder("sd1", dtype=torch.float32)
    with open_stored(str(folder)) as base, open_stored(str(tuned_of(folder, text=False))) as tuned:
        kinds = extract(base, tuned, 8, CPU).groups
        for share in (0.90, 0.95, 0.99):
            for kind, group in kinds.items():
                rank = group.rank_for(share)
                kept = [extract(base, tuned, r, CPU).groups[kind] for r in (rank, rank - 1) if r > 0]
                assert kept[0].kept / kept[0].energy >= share * (1 - 1e-9)
                assert len(kept) == 1 or kept[1].kept / kept[1].energy < share
                break
        assert {part for part, _ in kinds} == {"unet"}  # text encoders that were not trained have none


def test_what_no_lora_has_is_told(write_folder):
    folder = write_folder("sd1", dtype=torch.float32)
    with open_stored(str(folder)) as base, open_stored(str(tuned_of(folder, everything=True))) as tuned:
        found = extract(base, tuned, 8, CPU)
    assert set(found.left) == {"unet", "text_encoder"}
    assert any("norms, biases and embeddings, which no LoRA has" in line for line in found.lines())
    assert any(line.startswith("unet, convolutions: ") and "90% " in line for line in found.lines())
