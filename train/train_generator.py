"""Train a generator: `accelerate launch train/train_generator.py RECIPE [key=value ...] [--resume] [--dry-run]`.

The same as `varkit train`; also runs plainly as `python train/train_generator.py fashion_var`.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
