import re


def refused(answer, *parts):
    code, out, err = answer
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert all(part in err for part in parts), err


def test_a_model_of_one_file_is_inspected_drawn_with_and_exported(lowvram_db, miniature, tmp_path, letters, write_file):
    file, out = write_file(), tmp_path / "out.safetensors"
    code, said, _ = lowvram_db("inspect", file, "--hash")
    assert code == 0 and said.startswith("kind                  Stable Diffusion 1.x\n")
    assert said.endswith("training              possible here\n")
    refused(lowvram_db("inspect", "nowhere"), "nowhere: no such file or folder")
    refused(lowvram_db("export", file, "--out", file), "model.safetensors: exists already")
    refused(
        lowvram_db("export", file, "--out", out, "--format", "ckpt"), "--format ckpt: choose single-file or diffusers"
    )
    refused(lowvram_db("export", "nowhere", "--out", out), "model.name: no folder or file")
    refused(lowvram_db("sample", file, "--prompt", "x", "--prediction-type", "v"), "choose epsilon or v_prediction")
    refused(lowvram_db("sample", miniature, "--prompt", "x", "--ema"), "model.ema: ", "is no single file")
    assert lowvram_db("export", file, "--out", out, "--dtype", "bf16")[:2] == (0, f"model: {out}\n")
    assert re.search(r"^unet +\d+\.\d M weights in \d+ tensors, bf16$", lowvram_db("inspect", out)[1], re.MULTILINE)
    options = ["--tokenizer", letters, "--guidance", "2", "--seeds", "1", "--steps", "1", "--resolution", "64"]
    assert lowvram_db("sample", out, "--prompt", "a ball", *options, "--precision", "fp32")[0] == 0
    refused(lowvram_db("sample", out, "--prompt", "x", "--out", "b.png"), "514 tokens", "model.tokenizer")
