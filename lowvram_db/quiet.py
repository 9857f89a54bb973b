"""Keep the libraries' chatter from burying our own lines."""

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Before they are imported: absent torchvision, optional kernels of others, deprecations we cannot mend."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("xformers").setLevel(logging.ERROR)  # built for another torch; doctor says whether it runs
    warnings.filterwarnings("ignore", category=FutureWarning)
    # What Pillow finds odd in a photo and decodes all the same; what it does not decode is our line.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def skip_unneeded(*packages: str) -> None:
    """For the rest of the process: diffusers imports these where they are installed, which takes seconds."""
    for package in packages:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # what import takes for "not there"


def hide_loading_bars() -> None:
    """Of parts read from or written to the disk in a moment; a download keeps its bar. Imports the libraries."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
