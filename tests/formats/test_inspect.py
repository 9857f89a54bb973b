import hashlib
import json
import random
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lowvram_db.errors import UserError
from lowvram_db.formats.content import ema_key
from lowvram_db.formats.inspect import inspect
from lowvram_db.formats.single_file import part_tensors
from lowvram_db.formats.source import find_model
from lowvram_db.reading import STAND_IN, Reading

OUT = "model.diffusion_model.out.2.weight"


def added(**tensors):
    return lambda file: file.update(tensors)


EMPTY = torch.zeros(0)


@pytest.mark.parametrize(
    ("kind", "change", "metadata", "said"),
    [
        ("sd1", added(), {}, {"kind": "Stable Diffusion 1.x", "resolution": 512, "precision": "fp16", "problem": None}),
        ("sdxl", added(v_pred=EMPTY, ztsnr=EMPTY), {},
         {"family": "sdxl", "prediction": "v_prediction, by the marker v_pred and ztsnr, with zero terminal SNR"}),
        ("sd2", added(), {"modelspec.prediction_type": "epsilon"}, {"resolution": 512}),
        ("sd2", added(v_pred=EMPTY), {}, {"resolution": 768, "problem": None}),
        ("sd2", added(), {}, {"problem": "what its UNet predicts is not said in it; set model.prediction_type"}),
        ("sd1", added(), {"ss_steps": "800", "modelspec.title": "a\n\x1b[31mb"},
         {"said": {"title": "a  [31mb", "ss_steps": "800"}}),
        ("sd1", lambda t: t.update({OUT: t[OUT].to(torch.float8_e5m2)}), {},
         {"problem": "weights are stored as F8_E5M2; get it in fp16, bf16 or fp32"}),
        ("sd1", lambda t: [t.pop(key) for key in list(t) if key.startswith("first_stage_model.")], {},
         {"problem": 'it has no vae; name one, model.vae = "FILE or FOLDER"'}),
        ("sd1", lambda t: t.update({ema_key(key): t[key] + 1 for key in list(t) if key.startswith("model.")}), {},
         {"ema": True}),
        ("sd1", added(**{"model.diffusion_model.x": EMPTY}), {}, {"kind": "a model of an unknown kind"}),
    ],
)  # fmt: skip
def test_a_file_is_told_from_its_header(kind, change, metadata, said, write_file):
    report = inspect(write_file(kind, change=change, metadata={"format": "pt"} | metadata))
    assert {key: getattr(report, key) for key in said} == said
    assert all(text.isprintable() for line in report.lines() for text in line)


def test_parts_are_counted_and_mixed_precision_is_named(write_file, networks):
    def change(tensors):
        for key in tensors:
            if key.startswith("first_stage_model."):
                tensors[key] = tensors[key].float()
        tensors[OUT] = tensors[OUT].bfloat16()

    report = inspect(write_file("sdxl", change=change))
    counts = {part: sum(p.numel() for p in net.parameters()) / 1e6 for part, net in networks("sdxl").items()}
    assert report.parts.keys() == counts.keys()
    assert all(text.startswith(f"{counts[part]:.1f} M weights") for part, text in report.parts.items())
    assert report.parts["vae"].endswith(", fp32") and report.parts["unet"].endswith(", fp16, bf16")


def test_hashes_are_those_that_web_uis_show(tmp_path):
    """A1111's old one is of 64 KiB behind the first MiB, its present one of all."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(300_000)}, file, {"modelspec.hash_sha256": "0x" + "ab" * 32})
    content = file.read_bytes()
    report = inspect(file, whole=True)
    assert report.hashes["old hash"] == hashlib.sha256(content[2**20 :][: 2**16]).hexdigest()[:8]
    assert report.hashes["hash"] == hashlib.sha256(content).hexdigest()[:10]
    assert report.hashes["hash of the tensors"].startswith("abababababab,")
    assert "hash" not in inspect(file).hashes


def test_a_folder_in_diffusers_format(miniature, copy_of):
    report = inspect(miniature)
    assert (report.family, report.resolution, report.precision, report.problem) == ("sd1", 64, "fp32", None)
    assert report.prediction == "epsilon, by scheduler_config.json"
    assert list(report.parts) == ["unet", "vae", "text_encoder"]
    folder = copy_of(miniature)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    assert inspect(folder).problem and "FluxPipeline" in inspect(folder).kind
    for name in ("model_index.json", "nowhere"):
        with pytest.raises(UserError, match=r"no such file|header"):
            inspect(folder / name)


def test_a_ckpt_is_told_too(write_file):
    assert inspect(write_file("sdxl", name="model.ckpt")).family == "sdxl"


def test_it_asks_for_nothing_heavy(write_file):
    script = (
        "import sys; from pathlib import Path; from lowvram_db.formats.inspect import inspect;"
        "inspect(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(write_file("sd2"))]).returncode == 0


def spoil_header(tree, chance):
    """One entry lost, renamed, retyped, moved, or another's."""
    name = chance.choice([key for key in tree if key != "__metadata__"])
    entry = tree[name]
    match chance.choice(["lost", "renamed", "dtype", "shape", "offsets", "other", "value", "more", "metadata"]):
        case "lost":
            del tree[name]
        case "renamed":
            tree[name[:-1]] = tree.pop(name)
        case "dtype":
            entry["dtype"] = chance.choice(["F32", "BF16", "I16", "F8_E4M3", "F64", "", None, 16])
        case "shape":
            entry["shape"] = chance.choice(
                [[], [*entry["shape"][::-1], 1], [*entry["shape"], 2], [2**40], [-1], "1", None]
            )
        case "offsets":
            entry["data_offsets"] = [n + chance.choice([0, 1, -1, 2**33, -(2**62)]) for n in entry["data_offsets"]]
        case "other":
            entry["data_offsets"] = tree[chance.choice([key for key in tree if key != "__metadata__"])]["data_offsets"]
        case "value":
            tree[name] = chance.choice([None, [], {}, 0, "x", [[]]])
        case "more":
            tree["model.diffusion_model.made_up"] = dict(entry)
        case "metadata":
            tree["__metadata__"] = chance.choice([{}, [], {"a": None}, {"modelspec.prediction_type": "v" * 10_000}])


def spoiled(content, chance):
    """Bits flipped, the end or a piece gone or doubled, or the header edited."""
    size = 8 + int.from_bytes(content[:8], "little")
    at = chance.randrange(chance.choice([8, size, len(content)]))
    match chance.choice(["flip", "flip", "cut", "lost", "doubled", "header", "header", "header"]):
        case "flip":
            flipped = bytearray(content)
            flipped[at] ^= 1 << chance.randrange(8)
            return bytes(flipped), at >= size
        case "cut":
            return content[:at], False
        case "lost":
            return content[:at] + content[at + chance.choice([1, 8, 1000]) :], False
        case "doubled":
            return content[:at] + content[at : at + 100] + content[at:], False
    tree = json.loads(content[8:size])
    spoil_header(tree, chance)
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + content[size:], False


def tensors_in(folder):
    return {
        (part.parent.name, name): tensor.clone()
        for part in sorted(folder.glob(f"*/{STAND_IN}"))
        for name, _, tensor in part_tensors(part)
    }


def test_300_spoiled_files_are_refused_or_read_as_they_were(write_file, letters, weights, tmp_path, monkeypatch):
    """Only a bit of a weight can change unseen, and that weight alone: nothing in the format would tell."""
    monkeypatch.setattr("lowvram_db.atomic._sync", lambda path: None)  # else the disk is waited for all the time
    reading = Reading(tokenizer=str(letters))
    whole = write_file(metadata={"format": "pt"})
    content, wanted = whole.read_bytes(), tensors_in(find_model(str(whole), reading=reading))
    shapes, refused = {key: tensor.shape for key, tensor in wanted.items()}, 0
    for seed in range(300):
        file = tmp_path / f"{seed}.safetensors"
        spoilt, in_a_weight = spoiled(content, random.Random(seed))
        file.write_bytes(spoilt)
        for look in (inspect, lambda path: find_model(str(path), reading=reading)):
            try:
                found = look(file)
            except UserError as error:
                assert str(error).startswith(str(file)) and str(error).isprintable(), f"seed {seed}: {error}"
                found = None
        if found is None:
            refused += 1
        else:
            read = tensors_in(found)
            if {key: tensor.shape for key, tensor in read.items()} == shapes:
                changed = [key for key, tensor in read.items() if not torch.equal(tensor, wanted[key])]
                assert len(changed) <= in_a_weight, f"seed {seed}: {changed}"
            else:
                refused += 1
                with pytest.raises(UserError, match=re.escape(str(file))):
                    for part in ("unet", "vae", "text_encoder"):
                        weights(found, part)
        file.unlink()
    assert refused > 150
