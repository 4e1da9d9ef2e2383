"""Score images, reconstructions or videos: `accelerate launch eval/evaluate.py GENERATED REFERENCE --protocol adm`.

The same as `varkit eval`, on one process or on several; `--help` lists every option.
"""

import sys

from varkit.cli import app

if __name__ == "__main__":
    from accelerate import PartialState

    PartialState()  # joins the processes of a launch
    app(["eval", *sys.argv[1:]])
