"""The command line: one short function a command; what they do lives in the rooms.

Exit codes: 0 done; 2 something the user can mend, 3 it does not fit (one line on stderr); 130 stopped by Ctrl-C.
"""

import gc
import json
import shutil
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lowvram_db.config import Config, load
from lowvram_db.errors import DoesNotFit, Interrupted, UserError
from lowvram_db.memory import segments
from lowvram_db.memory.gpu_fault import is_gpu_fault, told
from lowvram_db.memory.size import parse_size
from lowvram_db.quiet import hide_loading_bars, quiet_libraries, skip_unneeded
from lowvram_db.reading import Reading
from lowvram_db.streams import patient_streams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Full DreamBooth (every weight of the denoiser) on the card people own.",
)

cache_app = typer.Typer(no_args_is_help=True, help="What the encoders made: build it, look at it, check it.")
app.add_typer(cache_app, name="cache")

identifier_app = typer.Typer(no_args_is_help=True, help="Words that can name a subject: find some, look at one.")
app.add_typer(identifier_app, name="identifier")


class Precision(StrEnum):
    """As `precision.compute` in the config."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. train.steps=400.")
]
CacheFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The cache's folder, such as runs/NAME/cache.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read in _leave
Vram = Annotated[str | None, typer.Option(metavar="SIZE", help="GPU memory to stay inside, e.g. 12GiB.")]
Prediction = Annotated[
    str | None, typer.Option(metavar="epsilon|v_prediction", help="What the UNet of a single file predicts.")
]
Tokenizer = Annotated[str | None, typer.Option(metavar="FOLDER", help="The tokenizer of a single file.")]
Vae = Annotated[str | None, typer.Option(metavar="FILE|FOLDER", help="Another VAE for a single file.")]
TextEncoder = Annotated[str | None, typer.Option(metavar="FILE|FOLDER", help="The same of its text encoder.")]
SecondTextEncoder = Annotated[
    str | None, typer.Option("--text-encoder-2", metavar="FILE|FOLDER", help="The same of SDXL's second one.")
]
ModelOnDisk = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, file or hub id.")]
ClassNoun = Annotated[str | None, typer.Option("--class", metavar="NOUN", help="What kind of thing the subject is.")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights of a single file that has both.")]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the run; writes NAME.toml here.")],
    photos: Annotated[str, typer.Option(help="Folder of 3-6 photos of the subject.")],
    class_noun: Annotated[str, typer.Option("--class", help="What kind of thing it is: dog, teapot, ...")],
    model: Annotated[
        str, typer.Option(help="Hub id, folder or single file of a Stable Diffusion 1.x, 2.x or XL model.")
    ],
    identifier: Annotated[
        str | None, typer.Option(help="A rare word that will come to mean the subject; default: one is found.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a short, commented config to start from."""
    from lowvram_db.new import train_command, write_config

    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    write_config(path, photos, class_noun, model, identifier)
    print(f"wrote {path}; now: {train_command(path)}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    overrides: Overrides = None,
    vram: Vram = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="Where to go on from.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Do not begin with photos that have something odd.")] = False,
    debug: Debug = False,
) -> None:
    """Teach a model one subject from a few photos, or go on where a run stopped."""
    # Before the heavy imports: a typo is answered at once.
    settings = load(config, [*(overrides or []), *_vram_override(vram)])
    skip_unneeded(*{"peft", "bitsandbytes"}.difference(settings.packages))
    from lowvram_db.dreambooth import run_dreambooth

    hide_loading_bars()
    gc.freeze()  # else each look for garbage, some fifteen a run, goes through all of torch, for a third of a second
    run = run_dreambooth(settings, resume, strict)
    print(f"lora: {run.lora}" if settings.method.name == "lora" else f"model: {run.model}")
    if (pictures := run.sample_grid(settings.train.steps)).exists():
        print(f"pictures: {pictures}")
    if run.report.exists():
        print(f"report: {run.report}")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    overrides: Overrides = None,
    vram: Vram = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show each strategy and why it was passed over.")] = False,
    debug: Debug = False,
) -> None:
    """Tell whether a run fits, before anything is downloaded; needs neither weights nor a GPU."""
    settings = _as_trained_here(load(config, [*(overrides or []), *_vram_override(vram)]))
    skip_unneeded(*{"peft", "bitsandbytes"}.difference(settings.packages))
    from lowvram_db.plan import make_plan
    from lowvram_db.plan.show import does_not_fit, show

    made = make_plan(settings, _budget(settings), explain)
    gc.freeze()  # else the interpreter looks for garbage in all of torch before it goes, for a second
    if as_json:
        print(json.dumps(made.to_json(), indent=1))
    else:
        show(made, explain)
    if made.fits is False:
        raise DoesNotFit(f"{config}: {does_not_fit(made)}")


def _reading(
    prediction_type: str | None,
    tokenizer: str | None,
    vae: str | None,
    text_encoder: str | None,
    text_encoder_2: str | None,
    ema: bool,
) -> Reading:
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise UserError(f"--prediction-type {prediction_type}: choose epsilon or v_prediction")
    return Reading(prediction_type, tokenizer, vae, text_encoder, text_encoder_2, ema)


def _vram_override(vram: str | None) -> list[str]:
    return [] if vram is None else [f"memory.vram={json.dumps(vram)}"]


def _as_trained_here(settings: Config) -> Config:
    """What `train` would make of them on this machine's card, where there is one."""
    if not shutil.which("nvidia-smi"):
        return settings
    from lowvram_db.memory.device import pick_device
    from lowvram_db.train.optimizer import that_runs

    return that_runs(settings, pick_device())


def _budget(settings: Config) -> int | None:
    """What the config says, else what the card has free; without a card None."""
    vram = settings.memory.vram
    if vram is not None and not shutil.which("nvidia-smi"):  # no card to ask, which would take torch a second
        return parse_size(vram)
    from lowvram_db.memory.budget import free_bytes, lacking
    from lowvram_db.memory.device import pick_device
    from lowvram_db.progress import say

    if vram is None:
        return free_bytes(pick_device())
    if problem := lacking(vram, pick_device()):
        say(f"{problem}; this is the plan for another card")
    return parse_size(vram)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Model folder (such as runs/NAME/model), file or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="A row of the grid; may be given several times.")],
    guidance: Annotated[str, typer.Option(help="Guidance scales, with commas between.")] = "7,11",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a prompt and scale: seeds 0, 1, ...")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps a picture.")] = 30,
    resolution: Annotated[int | None, typer.Option(min=8, help="Pixels a side; default: the model's own.")] = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the sampling.")] = Precision.bf16,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("grid.png"),
    prediction_type: Prediction = None,
    tokenizer: Tokenizer = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    text_encoder_2: SecondTextEncoder = None,
    ema: Ema = False,
    debug: Debug = False,
) -> None:
    """Draw a labelled grid: prompts down, guidance scales and seeds across."""
    from lowvram_db.sampling import parse_scales, sample_model

    hide_loading_bars()
    sample_model(
        model,
        prompt,
        out,
        guidance=parse_scales(guidance),
        seeds=seeds,
        steps=steps,
        resolution=resolution,
        compute=precision.value,
        reading=_reading(prediction_type, tokenizer, vae, text_encoder, text_encoder_2, ema),
    )
    print(f"pictures: {out}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/NAME.")],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts with {identifier} and {class}, one a line.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(metavar="auto|dinov2|clip|imagenet|FOLDER", help="The network that judges.")
    ] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a prompt; intervals are over these.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Score every checkpoint of a run (likeness, prompts, class, copies) and name the step to keep."""
    from lowvram_db.evaluate.evaluation import evaluate as judge
    from lowvram_db.evaluate.show import lines

    hide_loading_bars()
    result = judge(run, prompts, backbone, seeds, overrides or [])
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines(result)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="Folders of runs, such as runs/NAME.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: RUN/report.html, of several runs comparison.html.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a page on a run, or one that compares several: one file, with everything in it."""
    from lowvram_db.report import write_comparison, write_report

    several = partial(write_comparison, runs, out or Path("comparison.html"))
    print(f"report: {several() if len(runs) > 1 else write_report(runs[0], out)}")


@cache_app.command()
def build(
    config: Annotated[Path, typer.Argument(help="A run's TOML file.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Encode what a run needs, after making its missing class images; training then starts at once."""
    settings = load(config, overrides)
    from lowvram_db.dreambooth import build_cache

    hide_loading_bars()
    print(f"cache: {build_cache(settings)}")


@cache_app.command()
def info(folder: CacheFolder, debug: Debug = False) -> None:
    """Say what is in a cache."""
    from lowvram_db.cache import Store

    with Store(folder, writable=False) as store:
        print(store.report())


@cache_app.command()
def verify(folder: CacheFolder, debug: Debug = False) -> None:
    """Read and check every entry of a cache. Changes nothing; exit code 2 where something is damaged."""
    from lowvram_db.cache import Store

    with Store(folder, writable=False) as store:
        wrong, report = store.verify(), store.report()
    for line in wrong:
        print(line)
    if wrong:
        raise UserError(f"{folder}: damaged ({len(wrong)} found); the next run that uses it makes anew what it needs")
    print(f"{report}\nall whole")


@identifier_app.command()
def suggest(
    model: ModelOnDisk,
    count: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 10,
    class_noun: ClassNoun = None,
    render: Annotated[
        bool, typer.Option("--render", help="Draw words with the whole model, and rank by that.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="PNG of the pictures that --render draws; default: words.png.")
    ] = None,
    tokenizer: Tokenizer = None,
    debug: Debug = False,
) -> None:
    """Name rare words of one token that mean least to a model; reads its embedding tables, no other weight unless it is
    to draw."""
    from lowvram_db.concept.suggestions import report_suggestions

    if out is not None and not render:
        raise UserError("--out: is for --render; leave it out")
    sheet = (out or Path("words.png")) if render else None
    for line in report_suggestions(model, Reading(tokenizer=tokenizer), count, class_noun, sheet):
        print(line)


@identifier_app.command()
def check(
    model: ModelOnDisk,
    word: Annotated[str, typer.Argument(help="The word to look at.")],
    class_noun: ClassNoun = None,
    tokenizer: Tokenizer = None,
    debug: Debug = False,
) -> None:
    """Tell how a model reads a word, how rare its pieces are, and what they mean to it already."""
    from lowvram_db.concept.identifier import report_word

    for line in report_word(model, Reading(tokenizer=tokenizer), word, class_noun):
        print(line)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model's folder, file or hub id.")
    ],
    out: Annotated[Path, typer.Option(help="File (.safetensors) or folder to write.")],
    form: Annotated[
        str, typer.Option("--format", metavar="single-file|diffusers|lora", help="What to write.")
    ] = "single-file",
    dtype: Annotated[
        Precision | None, typer.Option(help="Of UNet and text encoders; default: as they are, and fp16 of a LoRA.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of a LoRA, e.g. 64; what it keeps is told.")] = None,
    base: Annotated[str | None, typer.Option(help="What a LoRA is for; default: what the run was trained on.")] = None,
    prediction_type: Prediction = None,
    tokenizer: Tokenizer = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    text_encoder_2: SecondTextEncoder = None,
    ema: Ema = False,
    debug: Debug = False,
) -> None:
    """Write a model as web UIs or as diffusers take it."""
    from lowvram_db.formats.export import Format, export
    from lowvram_db.memory.device import DTYPES

    if form not in (known := [*Format, "lora"]):
        raise UserError(f"--format {form}: choose {' or '.join(known)}")
    reading = _reading(prediction_type, tokenizer, vae, text_encoder, text_encoder_2, ema)
    if form == "lora":
        _export_lora(model, out, rank, base, dtype or Precision.fp16, reading)
        return
    if rank is not None or base is not None:
        raise UserError(f"--{'base' if rank is None else 'rank'}: is for --format lora; leave it out")
    export(model, out, Format(form), None if dtype is None else DTYPES[dtype.value], reading)
    print(f"model: {out}")


def _export_lora(model: str, out: Path, rank: int | None, base: str | None, dtype: Precision, reading: Reading) -> None:
    from lowvram_db.formats.extraction import export_lora
    from lowvram_db.memory.device import DTYPES, pick_device

    if rank is None:
        raise UserError("--rank: is missing; --rank 64 keeps most of a DreamBooth")
    for line in export_lora(model, out, rank, base, DTYPES[dtype.value], pick_device(), reading).lines():
        print(line)
    print(f"lora: {out}")


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="Model folder, file or hub id.")],
    lora: Annotated[Path, typer.Argument(help="The LoRA's file.")],
    out: Annotated[Path, typer.Option(help="File (.safetensors) or folder to write.")],
    weight: Annotated[float, typer.Option(help="How much of it, as web UIs write it.")] = 1.0,
    dtype: Annotated[Precision | None, typer.Option(help="Of UNet and text encoders; default: as they are.")] = None,
    prediction_type: Prediction = None,
    tokenizer: Tokenizer = None,
    vae: Vae = None,
    ema: Ema = False,
    debug: Debug = False,
) -> None:
    """Write a model with a LoRA in its weights."""
    from lowvram_db.formats.merge import merge
    from lowvram_db.memory.device import DTYPES

    reading = _reading(prediction_type, tokenizer, vae, None, None, ema)
    merge(model, lora, weight, out, None if dtype is None else DTYPES[dtype.value], reading)
    print(f"model: {out}")


@app.command()
def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER", help="A single file, or a folder in diffusers' format.")
    ],
    whole: Annotated[bool, typer.Option("--hash", help="Read all of a file for the hash that web UIs show.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what a model is, and whether it can be trained; reads no weights."""
    from lowvram_db.formats.inspect import inspect

    report = inspect(model, whole)
    for name, text in report.lines():
        print(f"{name:20}  {' '.join(text.split())}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what this machine can do, and what mends it; exit code 0 when training is possible."""
    from lowvram_db import doctor

    lines = doctor.examine(Path())
    if as_json:
        print(json.dumps(doctor.as_json(lines), indent=1))
    else:
        for line in lines:
            mend = f"  -> {line.mend}" if line.mend else ""
            print(f"{line.state:6}  {line.name:12}  {line.detail}{mend}")
    if not doctor.possible(lines):
        raise typer.Exit(UserError.exit_code)


def main() -> None:
    """Entry point of `lowvram-db`: run a command and turn the user's errors into one line and an exit code."""
    quiet_libraries()
    segments.grow()
    with patient_streams():
        try:
            app(standalone_mode=True)
        except UserError as error:
            _leave(f"error: {error}", error.exit_code, error)
        except Interrupted as stop:
            _leave(str(stop), stop.exit_code, stop)
        except OSError as error:  # a disk that fails where nobody foresaw it
            _leave(f"error: {error}", UserError.exit_code, error)
        except RuntimeError as error:
            if not is_gpu_fault(error):
                raise
            _leave(f"error: {told(error)}", UserError.exit_code, error)


def _leave(message: str, code: int, error: BaseException) -> None:
    if "--debug" in sys.argv:
        raise error
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
