"""What a user says of a model of one file, beside its name."""

from dataclasses import dataclass

STAND_IN = "tensors.json"  # in place of the weights, in a folder that stands for a single file


@dataclass(frozen=True)
class Reading:
    """How a single file is to be read; the keys of `[model]` in a run's settings."""

    prediction_type: str | None = None  # "epsilon" | "v_prediction"; default: what the file tells
    tokenizer: str | None = None  # folder; default: CLIP's own, wherever it is found
    vae: str | None = None  # file or folder; default: the file's own
    ema: bool = False  # the UNet's averaged weights


AS_IT_IS = Reading()
