"""The sections of a run's TOML file as typed, strict models: what each holds, and what no value in it may be."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

from lowvram_db import folder_name, toml_text
from lowvram_db.memory.size import parse_size
from lowvram_db.optim.kinds import KINDS, Kind, Name
from lowvram_db.prompt_sets import Templates, as_templates, weighted
from lowvram_db.reading import Reading
from lowvram_db.wording import identifier_problem, template_fields, word_problem


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_by_name=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def _is_a_place(place: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", place):
        raise ValueError(f"{place!r} has control characters in it: {toml_text.BACKSLASHES}")
    try:
        Path(place).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{place}: the home folder that ~ stands for is not known; write the whole path") from error
    return place


def _is_a_template(text: str) -> str:
    template_fields(text)
    return text


def _is_a_word(text: str) -> str:
    if problem := word_problem(text):
        raise ValueError(f"{text!r} {problem}")
    return text


Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Word = Annotated[Text, AfterValidator(_is_a_word)]  # that prompts are filled with
Template = Annotated[Text, AfterValidator(_is_a_template)]  # of a prompt
Place = Annotated[Text, AfterValidator(_is_a_place)]  # a path, or what may be one
Count = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PEOPLE = {"person", "man", "woman", "boy", "girl", "child", "baby", "human"}
DEFAULT_IDENTIFIER = "ohwx"  # one token of CLIP's vocabulary, and rare


class ModelConfig(Section):
    name: Place = Field(description="a local folder in diffusers' format, a single file, or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; default: its main branch")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="epsilon | v_prediction, where the model does not say it, or says it wrongly"
    )
    tokenizer: Place | None = Field(
        None, description="folder of the tokenizer of a single file; default: CLIP's own, wherever it is found"
    )
    vae: Place | None = Field(None, description="another VAE for a single file: a file or folder")
    text_encoder: Place | None = Field(None, description="the same of its text encoder")
    text_encoder_2: Place | None = Field(None, description="the same of its second text encoder, which SDXL has")
    ema: bool = Field(False, description="train the averaged weights of a single file that has both")

    @property
    def reading(self) -> Reading:
        """What is said of a single file."""
        return Reading(self.prediction_type, self.tokenizer, self.vae, self.text_encoder, self.text_encoder_2, self.ema)


class SubjectConfig(Section):
    photos: Place = Field(description="folder of 3-6 photos of the one subject")
    identifier: Text = Field(description="a rare word that will come to mean this subject")
    class_noun: Word = Field(alias="class", description="what kind of thing it is")
    prompts: Annotated[Templates, PlainValidator(as_templates)] = Field(
        ["a photo of a {identifier} {class}"],
        description="training prompts, of which each step draws one: a list, a set (object | living | person | style), "
        "or a table of both with their weights; a photo with captions beside it is shown under those",
    )
    caption_dropout: Fraction = Field(0.0, description="share of the photos' rows that are shown without any words")

    @property
    def templates(self) -> dict[str, float]:
        """Those of the training prompts, each with its share of the draws."""
        return weighted(self.prompts)

    @property
    def is_person(self) -> bool:
        """As far as the words tell."""
        sets = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        return "person" in sets or self.class_noun.strip().lower() in PEOPLE

    @property
    def plain_template(self) -> str:
        """The first of them."""
        return next(iter(self.templates))

    @model_validator(mode="after")
    def _the_identifier_can_be_told_apart(self) -> "SubjectConfig":
        if problem := identifier_problem(self.identifier, self.class_noun):
            raise ValueError(f"identifier {self.identifier!r} {problem}")
        return self

    @field_validator("prompts")
    @classmethod
    def _every_prompt_names_the_subject(cls, prompts: Templates) -> Templates:
        for prompt in weighted(prompts):
            if "identifier" not in template_fields(prompt):
                raise ValueError(f"{prompt!r} lacks {{identifier}}: it would teach the subject to the plain prompt")
        return prompts


class PriorConfig(Section):
    enabled: bool = Field(True, description="prior preservation: train on class images too, so the class is kept")
    weight: float = Field(1.0, ge=0, description="lambda, the weight of the prior loss")
    count: Count = Field(200, description="class images; the missing ones are made with the base model")
    prompt: Template = Field("a photo of a {class}", description="prompt of the class images that know no other")
    prompts: Annotated[Templates, PlainValidator(as_templates)] | None = Field(
        None,
        description="several prompts to make class images by: a list, a set (object | living | person | style), or a "
        "table of both with their weights; default: prompt alone",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="every class image that is made follows from it and its number")
    images: Annotated[str, AfterValidator(_is_a_place)] | None = Field(
        None, description="folder of class images; default: one in output.dir that all runs with such images share"
    )
    batch: Count = Field(4, lt=2**16, description="class images made at once")
    steps: Count = Field(30, description="sampling steps a class image")
    guidance: float = Field(7.5, ge=0, description="guidance scale of the class images")

    @property
    def templates(self) -> dict[str, float]:
        """Those by which class images are made, each with its share of them."""
        return weighted(self.prompts or [self.prompt], of_the_class=True)

    @model_validator(mode="after")
    def _class_prompts_know_no_subject(self) -> "PriorConfig":
        for key, templates in (("prompt", [self.prompt]), ("prompts", self.templates)):
            if any(template_fields(template) - {"class"} for template in templates):
                raise ValueError(f"{key}: only {{class}} may stand in a prior prompt: it must not name the subject")
        return self


class TrainConfig(Section):
    resolution: int = Field(512, ge=8, le=2**14, description="pixels a side; photos are resized and cropped to it")
    crop: Literal["square", "buckets", "subject"] = Field(
        "square",
        description="square | buckets (photos keep about their shape, at the square's area) | subject (square; of "
        "people around their upper third); a crop box beside a photo goes before it",
    )
    mask_weight: Fraction = Field(0.1, description="in the loss, of what a photo's mask does not show as the subject")
    variants: Count = Field(1, description="crops of each photo that are cached and drawn from; 1: the middle alone")
    flip: bool = Field(
        False, description="every other variant is mirrored; not for writing or what has a left and right"
    )
    steps: Count = Field(800, description="optimizer steps")
    lr: float = Field(2e-6, gt=0, description="learning rate")
    batch: Count = Field(1, lt=2**16, description="photos a step; as many class images join them")
    accumulate: Count = Field(
        1, lt=2**16, description="batches whose gradients make one step: their mean; adam8 takes its v by their squares"
    )
    max_norm: float | None = Field(
        None,
        gt=0,
        description="larger gradients are scaled down to this global norm, often 1.0; adam8 and adafactor go by the "
        "norm of the batch before; default: off",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="constant | linear | cosine")
    warmup: int = Field(0, ge=0, lt=2**31, description="steps over which the learning rate rises to lr")
    seed: int = Field(0, ge=0, lt=2**63, description="every random draw follows from it")
    deterministic: bool = Field(
        False,
        description="only kernels that give the same bits each time: a run on a GPU then repeats itself, and one that "
        "was stopped goes on to the same weights; takes more time in attention's backward",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="recompute activations in backward: less memory, more time; default: as much as memory.vram asks",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an average of the weights, which is sampled and saved in their place, often 0.999; "
        "4 bytes of RAM a weight; default: off",
    )
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weighting, usually 5.0; default: off")
    hold_out: int = Field(0, ge=0, lt=2**16, description="photos kept back to judge by; three others have to be left")
    validate_every: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="loss on fixed pictures every N steps; 0: never; default: as often as takes 3% of a run",
    )

    @field_validator("resolution")
    @classmethod
    def _divisible_by_8(cls, resolution: int) -> int:
        if resolution % 8:
            raise ValueError(f"{resolution} is not divisible by 8; {max(8, round(resolution / 8) * 8)} is the nearest")
        return resolution

    @model_validator(mode="after")
    def _there_is_a_variant_to_flip(self) -> "TrainConfig":
        if self.flip and self.variants == 1:
            raise ValueError("flip mirrors every other variant, and variants is 1; set variants = 2 or more")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainConfig":
        if self.warmup > self.steps:
            raise ValueError(f"warmup ({self.warmup}) is longer than the run (steps = {self.steps})")
        return self


class TextEncoderConfig(Section):
    train: bool = Field(False, description="train the text encoders too; prompts are then not cached")
    lr: float | None = Field(None, gt=0, description="learning rate of the text encoders; default: half of train.lr")
    stop: Count | None = Field(
        None, description="after so many steps they are trained no more, and make room; default: trained to the end"
    )

    @model_validator(mode="after")
    def _nothing_is_said_of_what_is_not_trained(self) -> "TextEncoderConfig":
        said = [key for key in ("lr", "stop") if getattr(self, key) is not None]
        if said and not self.train:
            raise ValueError(f"{said[0]} means nothing where train is false; set train = true, or leave it out")
        return self


class MethodConfig(Section):
    name: Literal["full", "lora"] = Field(
        "full", description="full (every weight) | lora (few weights beside frozen ones; the result is a small file)"
    )
    rank: Count = Field(16, description="of a LoRA: how many directions each layer may change in")
    alpha: float | None = Field(
        None, gt=0, description="a LoRA's change is multiplied by alpha / rank; default: as rank, which is by 1"
    )
    targets: Literal["attention", "attention+mlp", "all"] = Field(
        "attention", description="layers with a LoRA: attention | attention+mlp | all (linear and convolution)"
    )
    dropout: Fraction = Field(0.0, description="share of a LoRA's inputs that a step leaves out")
    init: Literal["default", "pissa"] = Field(
        "default",
        description="how a LoRA begins: default (without a change) | pissa (matrices: with the largest directions of "
        "the frozen weights, taken out of those; its file has twice the rank)",
    )
    base: Literal["bf16", "int8", "nf4"] | None = Field(
        None,
        description="how a LoRA's frozen weights are held: bf16 | int8 | nf4 (matrices in 8 or 4 bits, by "
        "bitsandbytes); default: as precision.compute",
    )

    @property
    def scale(self) -> float:
        """What a LoRA's change is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @model_validator(mode="after")
    def _nothing_is_said_of_a_lora_that_is_none(self) -> "MethodConfig":
        said = sorted(self.model_fields_set - {"name"})
        said = [key for key in said if getattr(self, key) != type(self).model_fields[key].default]
        if said and self.name == "full":
            raise ValueError(f'{said[0]} is for a LoRA, and name is "full"; set name = "lora", or leave it out')
        return self

    @model_validator(mode="after")
    def _what_a_lora_begins_with_can_be_taken_out(self) -> "MethodConfig":
        if self.init == "pissa" and self.base in ("int8", "nf4"):
            raise ValueError(f'init: "pissa" takes from frozen weights, which "{self.base}" cannot give; leave one out')
        return self


class PrecisionConfig(Section):
    compute: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="bf16 | fp16 (for cards without bf16) | fp32")
    weights: Literal["bf16", "bf16+residual", "fp16", "fp32"] | None = Field(
        None,
        description="bf16 | bf16+residual (8 more bits a weight) | fp16 | fp32 (compute under autocast); "
        "default: as compute with adam8 and adafactor, fp32 with the others, and of a LoRA",
    )


class CacheConfig(Section):
    dir: Place | None = Field(
        None, description="folder of what is encoded, shareable by runs; default: cache/ in the run"
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="of the encoders: fp32 | fp16 | bf16; auto: fp16 on a GPU, fp32 on a CPU or with compute fp32",
    )


class OptimizerConfig(Section):
    name: Name = Field(
        "adam8",
        description="adam8 (16 bits of state, steps inside backward) | adafactor (no state, steps inside backward) | "
        "bnb-adam8 (bitsandbytes) | adamw (fp32); default of a LoRA: adamw",
    )
    beta1: Fraction = Field(0.9, description="decay of the first moment")
    beta2: Fraction = Field(0.999, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")

    @property
    def kind(self) -> Kind:
        """What the optimizer of this name can do."""
        return KINDS[self.name]


class MemoryConfig(Section):
    vram: str | None = Field(
        None, description='GPU memory the run may take, for example "12GiB"; default: what the card has free'
    )

    @field_validator("vram")
    @classmethod
    def _is_a_size(cls, vram: str | None) -> str | None:
        if vram is not None:
            parse_size(vram)
        return vram


class SampleConfig(Section):
    prompts: list[Template] = Field(
        ["a photo of a {identifier} {class}", "a photo of a {identifier} {class} on the beach", "a photo of a {class}"],
        min_length=1,
        description="rows of the sample grid",
    )
    guidance: list[Annotated[float, Field(ge=0)]] = Field(
        [7.0, 11.0], min_length=1, description="guidance scales, columns of the grid"
    )
    seeds: Count = Field(2, description="pictures a prompt and guidance scale: seeds 0, 1, ...")
    steps: Count = Field(30, description="sampling steps a picture")
    every: int = Field(0, ge=0, lt=2**31, description="also sample every N training steps; 0: only at the end")

    @property
    def pictures_a_row(self) -> int:
        return len(self.guidance) * self.seeds


class CheckpointConfig(Section):
    every: int | None = Field(
        None, ge=0, lt=2**31, description="save every N steps, to resume from; 0: only at the end; default: by minutes"
    )
    minutes: float = Field(10, gt=0, description="save after so many minutes of training, where every is not set")
    keep: Count = Field(1, description="how many checkpoints to keep")


class OutputConfig(Section):
    dir: Place = Field("runs", description="folder in which runs are kept")
    name: str = Field("", description="the run's folder in it; default: the name of the TOML file")
    dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp16", description="precision of the finished model on disk: fp16 (what web UIs take) | bf16 | fp32"
    )

    single_file: bool = Field(False, description="also write the finished model as one file, as web UIs take it")

    @field_validator("name")
    @classmethod
    def _can_be_a_folder(cls, name: str) -> str:
        if name and (problem := folder_name.problem(name)):
            raise ValueError(f"{name!r} {problem}; choose another name")
        return name
