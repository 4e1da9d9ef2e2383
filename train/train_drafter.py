"""Train the EAGLE drafter of a generator: `accelerate launch train/train_drafter.py RECIPE [key=value ...] [--resume]
[--dry-run]`.

The same as `varkit train` with a recipe of objective `eagle`; also runs plainly as `python train/train_drafter.py
fashion_eagle`.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
