"""Train a tokenizer: `accelerate launch tokenizers/train_tokenizer.py RECIPE [key=value ...] [--resume] [--dry-run]`.

The same as `varkit train`; also runs plainly as `python tokenizers/train_tokenizer.py fashion_vq`.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
