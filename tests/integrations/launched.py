"""What test_trainer_ranks.py has `accelerate launch` start: a short training, and what each rank came to."""

import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.integrations.test_trainer_ranks import left, trained


def main(folder: Path) -> None:
    """Train as one of the ranks that the environment tells of; the result goes into folder."""
    ranks, rank = (os.environ[name] for name in ("WORLD_SIZE", "RANK"))
    found = left(trained(folder / "out", int(ranks), "plain", save_strategy="no", eval_strategy="no"))
    save_file({str(number): t for number, t in enumerate(found.pop("rows"))}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
