"""`python -m lowvram_db.demo FOLDER`: write the miniature to FOLDER/model and its photos to FOLDER/photos."""

import sys
from pathlib import Path

from lowvram_db.quiet import hide_loading_bars, quiet_libraries


def main() -> None:
    folder = Path(sys.argv[1])
    quiet_libraries()
    from lowvram_db.demo.miniature import write_photos, write_pipeline

    hide_loading_bars()
    if not (folder / "model" / "model_index.json").exists():
        write_pipeline(folder / "model")
        write_photos(folder / "photos")
    print(f"{folder}: a miniature Stable Diffusion with RANDOM weights, and photos to train it on")


if __name__ == "__main__":
    main()
