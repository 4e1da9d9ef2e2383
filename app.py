"""Opens the demo: `python app.py`. A Hugging Face Space runs this file too.

VARKIT_MODEL names the models, separated by commas."""

import os

from varkit.demo.app import launch

if __name__ == "__main__":
    launch(
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        model=os.environ.get("VARKIT_MODEL", "fashion-var").split(","),
    )
