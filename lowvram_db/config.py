"""The TOML file as a whole: what its sections may not be together, and every refusal by the name of its key."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from lowvram_db import folder_name, toml_text
from lowvram_db.errors import UserError
from lowvram_db.sections import (
    CacheConfig,
    CheckpointConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    PrecisionConfig,
    PriorConfig,
    SampleConfig,
    Section,
    SubjectConfig,
    TextEncoderConfig,
    TrainConfig,
)
from lowvram_db.wording import template_fields


class Config(Section):
    """One DreamBooth run. Relative paths start from the current folder."""

    attention: Literal["auto", "sdpa", "xformers"] = Field("auto", description="auto | sdpa | xformers")
    kernels: Literal["auto", "triton", "torch"] = Field("auto", description="auto | triton | torch (plain operations)")
    model: ModelConfig
    subject: SubjectConfig
    prior: PriorConfig = PriorConfig()
    train: TrainConfig = TrainConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    method: MethodConfig = MethodConfig()
    cache: CacheConfig = CacheConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig = OutputConfig()

    @property
    def weights(self) -> Literal["bf16", "bf16+residual", "fp16", "fp32"]:
        """How what is trained is stored in training; a LoRA is so small that it is exact."""
        narrow = self.optimizer.kind.stores_weights and self.method.name == "full"
        default = self.precision.compute if narrow else "fp32"
        return self.precision.weights or default

    @property
    def autocasts(self) -> bool:
        """Whether weights are more precise than what is computed in."""
        return self.weights == "fp32" and self.precision.compute != "fp32"

    @property
    def packages(self) -> set[str]:
        """Those that not every run needs."""
        quantised = self.method.base in ("int8", "nf4")
        method = {"peft"} if self.method.name == "lora" else set()
        return {*self.optimizer.kind.packages, *method, *({"bitsandbytes"} if quantised else ())}

    @property
    def text_encoder_lr(self) -> float:
        """The text encoders' learning rate, where they are trained: what is set, or half of the denoiser's.

        What they learn of a few prompts reaches every other prompt, so they overfit sooner; half is what EveryDream 2,
        a trainer of whole models, gives as its example (text_encoder_lr_scale in its optimizer.json: 1e-6 beside 2e-6).
        """
        return self.train.lr / 2 if self.text_encoder.lr is None else self.text_encoder.lr

    def fill(self, template: str) -> str:
        """A prompt template with this subject's identifier and class noun in it."""
        return template.format_map({"identifier": self.subject.identifier, "class": self.subject.class_noun})

    def to_toml(self) -> str:
        """The resolved settings as TOML."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @model_validator(mode="before")
    @classmethod
    def _a_lora_is_stepped_by_adamw(cls, tree: Any) -> Any:
        """Where nothing is said: over few, small tensors it is faster (bench/adam8.py), and less to save."""
        method, optimizer = (tree.get(section, {}) for section in ("method", "optimizer"))
        of_lora = isinstance(method, dict) and method.get("name") == "lora"
        if of_lora and isinstance(optimizer, dict):
            return {**tree, "optimizer": {"name": "adamw", **optimizer}}
        return tree

    @model_validator(mode="after")
    def _weights_can_be_stepped(self) -> "Config":
        if self.weights == "fp32":
            return self
        if not self.optimizer.kind.stores_weights:
            raise ValueError(
                f'precision.weights: {self.weights} weights need optimizer.name = "adam8" or "adafactor"; '
                f"{self.optimizer.name} would lose most updates in rounding; leave precision.weights out"
            )
        if not self.weights.startswith(self.precision.compute):
            raise ValueError(
                f"precision.weights: {self.weights} weights compute in that precision, precision.compute is "
                f'"{self.precision.compute}"; leave precision.weights out, or set precision.compute = '
                f'"{self.weights.partition("+")[0]}"'
            )
        return self

    @model_validator(mode="after")
    def _a_lora_is_beside_weights_that_can_be_computed_with(self) -> "Config":
        method, compute = self.method, self.precision.compute
        if method.base == "bf16" and compute != "bf16":
            raise ValueError(f'method.base: "bf16" is computed in bf16, precision.compute is "{compute}"; leave it out')
        if method.name == "lora" and self.text_encoder.stop is not None:
            raise ValueError("text_encoder.stop: a LoRA's text encoders are trained to the end; leave it out")
        return self

    @model_validator(mode="after")
    def _text_encoders_stop_on_the_way(self) -> "Config":
        stop, steps = self.text_encoder.stop, self.train.steps
        if stop is not None and stop >= steps:
            raise ValueError(
                f"text_encoder.stop: {stop} is not before the end of the run (train.steps = {steps}); leave it out to "
                "train them to the end"
            )
        return self

    @model_validator(mode="after")
    def _the_optimizer_has_what_is_set(self) -> "Config":
        for key in self.optimizer.kind.lacks:
            section, _, leaf = key.partition(".")
            settings = getattr(self, section)
            default = type(settings).model_fields[leaf].default
            if leaf in settings.model_fields_set and getattr(settings, leaf) != default:
                raise ValueError(f"{key}: means nothing to {self.optimizer.name}; leave it out")
        return self

    @model_validator(mode="after")
    def _templates_can_be_filled(self) -> "Config":
        for key, templates in (
            ("subject.prompts", self.subject.templates),
            ("sample.prompts", self.sample.prompts),
        ):
            for template in templates:
                unknown = template_fields(template) - {"identifier", "class"}
                if unknown:
                    raise ValueError(f"{key}: {{{min(unknown)}}} is unknown; use {{identifier}} and {{class}}")
        return self


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply `key=value` overrides, and validate. Raises UserError naming the file and the key."""
    return parse(toml_text.read(path), path, overrides)


def parse(text: str, path: Path, overrides: list[str] | None = None) -> Config:
    """As load, for the text that stands, or will stand, in `path`."""
    tree = toml_text.parse(text, path)
    for override in overrides or []:
        _apply(tree, override)
    output = tree.setdefault("output", {})
    if isinstance(output, dict) and not output.get("name"):
        output["name"] = folder_name.from_any(path.stem)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key, its value written as in TOML; where a text is wanted it needs no quotes."""
    dotted, separator, text = override.partition("=")
    key = ".".join(part.strip() for part in dotted.split("."))
    if not separator or not key:
        raise UserError(f"--set {override}: write it as key=value, for example --set train.steps=400")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {parent} is not a section")
    tree[leaf] = _value(override, text.strip(), is_text=_takes_text(key))


def _value(override: str, text: str, is_text: bool) -> Any:
    quoted = text[:1] in ("'", '"')
    try:
        override.encode()
        read = tomllib.loads(f"value = {text}")
    except UnicodeEncodeError as error:
        raise UserError(f"--set {override}: has bytes in it that are no characters; rename what it names") from error
    except (ValueError, RecursionError) as error:
        if quoted:
            raise UserError(f"--set {override}: {toml_text.BACKSLASHES}, and end it as it begins") from error
        return text
    return read["value"] if list(read) == ["value"] and (quoted or not is_text) else text


def _takes_text(key: str) -> bool:
    """Whether a setting is a text, or a text or nothing."""
    field = known_keys().get(key)
    kinds = [] if field is None else [field.annotation]
    if kinds and type(None) in get_args(kinds[0]):
        kinds = [getattr(kind, "__origin__", kind) for kind in get_args(kinds[0])]  # without what is annotated to it
    return str in kinds


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key as the TOML file spells it, with its pydantic field."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        dotted = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= known_keys(field.annotation, dotted + ".")
        else:
            keys[dotted] = field
    return keys


def _first_problem(error: ValidationError) -> str:
    """The first validation error in one line, by the key as the user wrote it."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}; {_nearest(key)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] in ("string_too_short", "string_pattern_mismatch") and not problem["input"].strip():
        return f"{key}: must not be empty"
    if problem["type"] == "value_error":
        return ": ".join(filter(None, [key, problem["msg"].removeprefix("Value error, ")]))
    if problem["type"] == "model_type":
        return f"{key}: must be a section, written [{key}]"
    return f"{key}: {problem['msg'].replace('Input should', 'should')} (is {_shown(problem['input'])})"


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of so many digits
        return "a very large number"
    return shown if len(shown) <= 80 else shown[:80] + "..."


def _nearest(key: str) -> str:
    """The known keys that an unknown one may have meant: by its whole spelling, else by its last word alone."""
    names = list(known_keys())
    if turned := [name for name in names if sorted(name.split(".")) == sorted(key.split("."))]:
        return f"did you mean {turned[0]}?"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not near:
        leaves = [name.rpartition(".")[2] for name in names]
        leaf = difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1)
        near = [name for name in names if name.rpartition(".")[2] in leaf]
    if near:
        return f"did you mean {' or '.join(near)}?"
    section = key.partition(".")[0]
    here = [name for name in names if name.startswith(section + ".")] or list(Config.model_fields)
    return f"known: {', '.join(here)}"


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    before, after = flat(old.model_dump()), flat(new.model_dump())
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values
