"""The model card that hubs show: a README.md with front matter, beside the model that a run has made."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram_db.config import Config
from lowvram_db.progress import say
from lowvram_db.run import Run

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PIPELINES = {"StableDiffusionPipeline": "stable-diffusion", "StableDiffusionXLPipeline": "stable-diffusion-xl"}
_SAID = {
    "subject": "likeness to the photos",
    "prompt": "agreement with prompts",
    "class_likeness": "likeness of the class prompt's pictures to the photos (lower is better)",
    "class_diversity": "diversity of the class, against the base model's",
    "memorised": "share of pictures nearer to a photo than photos are to each other",
}


def write_card(folder: Path, run: Run, config: Config) -> None:
    """README.md, and the run's last sheet of samples beside it, in a model's folder that was just written. The model is
    good without them: what cannot be written is said."""
    sheet = run.sample_grid(config.train.steps)
    try:
        if sheet.is_file():
            shutil.copyfile(sheet, folder / "samples.png")
        (folder / "README.md").write_text(card(folder, run, config, sheet.is_file()), encoding="utf-8")
    except OSError as error:
        say(f"{folder}: the model card is not written ({error})")


def card(folder: Path, run: Run, config: Config, has_samples: bool) -> str:
    """The text. folder: of the model, in diffusers' format."""
    prompt = config.fill(config.subject.plain_template)
    parts = [
        _front_matter(folder, config, prompt, has_samples),
        f"# {_plain(run.folder.name)}",
        f"Full DreamBooth of {_code(config.model.name)} with lowvram-db: every weight of the UNet was trained to "
        f"know one {_code(config.subject.class_noun)} by the word {_code(config.subject.identifier)}.",
        *(["![Pictures drawn by this model](samples.png)"] if has_samples else []),
        f"Write:\n\n{_block(prompt)}",
        "## In diffusers\n\n" + _block(_usage(prompt), "python"),
        "## In web UIs\n\n`lowvram-db export FOLDER --out NAME.safetensors` writes this folder as the one file that "
        "A1111, Forge and ComfyUI take; put it where they keep their checkpoints.",
        "## Training\n\n" + _table(_settings(config)),
        *_scores(run, config),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(folder: Path, config: Config, prompt: str, has_samples: bool) -> str:
    """YAML, of which JSON's strings and lists are a part."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name", "")
    name = config.model.name
    is_hub_id = bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()
    said: dict[str, Any] = {
        "base_model": name if is_hub_id else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": _licence(config),
        "instance_prompt": prompt,
        "tags": ["text-to-image", "dreambooth", *filter(None, [_PIPELINES.get(kind)])],
    }
    if has_samples:
        said["widget"] = [{"text": prompt, "output": {"url": "samples.png"}}]
    lines = [f"{key}: {_yaml(value)}" for key, value in said.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _yaml(value: Any) -> str:
    """JSON, but for the characters that YAML wants escaped in another way, or at all."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda one: f"\\u{ord(one[0]):04x}", text)


def _licence(config: Config) -> str:
    """As the base model's own card has it; where that is not known, nothing is claimed."""
    try:
        text = (Path(config.model.name).expanduser() / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "other"
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else "other"


def _usage(prompt: str) -> str:
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.float16).to("cuda")\n'
        f'pipeline({prompt!r}).images[0].save("picture.png")'
    )


def _settings(config: Config) -> Iterator[tuple[str, str]]:
    train, prior = config.train, config.prior
    yield "steps", str(train.steps)
    yield "learning rate", f"{train.lr:g}, {train.schedule}"
    yield "resolution", str(train.resolution)
    yield "photos a step", str(train.batch * train.accumulate)
    yield "optimizer", config.optimizer.name
    yield "weights in training", config.weights
    yield "prior preservation", f"{prior.count} class images, weight {prior.weight:g}" if prior.enabled else "off"
    yield "text encoder", "trained" if config.text_encoder.train else "as it was"


def _scores(run: Run, config: Config) -> Iterator[str]:
    """What evaluate says of the last step, where it was asked."""
    try:
        found = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
        last = next(one for one in found["checkpoints"] if one["step"] == config.train.steps)
        rows = [(said, f"{last['scores'][name]['mean']:.3f}") for name, said in _SAID.items() if last["scores"][name]]
        findings = [f"It was found: {', '.join(last['findings'])}."] if last["findings"] else []
        yield "\n\n".join(["## Scores", f"By {_code(found['backbone'])}.", _table(rows), *findings])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return


def _table(rows: Any) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _plain(text: str) -> str:
    """One line in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~-])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span of one line, fenced by more backticks than it has in a row."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _block(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
