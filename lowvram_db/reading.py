"""What a user says of a model of one file, beside its name."""

from dataclasses import dataclass

STAND_IN = "tensors.json"  # in place of the weights, in a folder that stands for a single file


@dataclass(frozen=True)
class Reading:
    """How a single file is to be read; the keys of `[model]` in a run's settings."""

    prediction_type: str | None = None  # "epsilon" | "v_prediction"; default: what the file tells
    tokenizer: str | None = None  # folder; default: CLIP's own, wherever it is found
    vae: str | None = None  # file or folder; default: the file's own, as for the two below
    text_encoder: str | None = None
    text_encoder_2: str | None = None  # of SDXL
    ema: bool = False  # the UNet's averaged weights

    @property
    def parts(self) -> dict[str, str]:
        """The networks that are to come from elsewhere, by the names of their folders."""
        named = {"vae": self.vae, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {part: name for part, name in named.items() if name}


AS_IT_IS = Reading()
