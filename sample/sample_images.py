"""Sample images: `python sample/sample_images.py fashion-var --class 3,9 --num 8 --out grid.png`.

The same as `varkit sample`; `--help` lists every option.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    app(["sample", *sys.argv[1:]])
