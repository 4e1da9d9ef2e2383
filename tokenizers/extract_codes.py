"""Code a set of images once: `accelerate launch tokenizers/extract_codes.py TOKENIZER IMAGES --out codes/`.

The same as `varkit tokenize`; also runs plainly, by `python`, and by `torchrun --nproc_per_node 2 -- ...`. Shards go to
processes in turn; after a stop, the same command makes what is missing.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    app(["tokenize", *sys.argv[1:]])
