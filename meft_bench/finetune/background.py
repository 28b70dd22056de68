"""The background text of a user's run: what distinctive updates are to leave alone. No torch here."""

from pathlib import Path

from meft_bench.finetune.settings import TrainSettings
from meft_bench.reading import read_text

_LARGEST = 1 << 27
_OPTIONS = ("distinctive", "distinctive_above")


def background_texts(settings: TrainSettings) -> list[str] | None:
    """The lines of the file that settings.background names, empty ones left out; None where it names none. Raises
    ValueError for a file without text, and for a method that would not read it."""
    if settings.background is None:
        return None
    options = settings.method_options()
    if all(options.get(name) is None for name in _OPTIONS):
        raise ValueError("background is for distinctive updates alone: add --option distinctive=T, or leave it out")
    path = Path(settings.background)
    if not path.is_file():
        raise ValueError(f"no background file {path}: give a text file, one text a line")
    lines = [line.strip() for line in read_text(path, _LARGEST, "background text").splitlines()]
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"{path} holds no text: write one text a line")
    return texts
