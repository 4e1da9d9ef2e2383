"""Distil a teacher: `accelerate launch train/train_distilled.py RECIPE [key=value ...] [--resume] [--dry-run]`.

The same as `varkit train` with a recipe of `objective.name: distilled`; its data are made by `varkit trajectories`.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
