"""The tab "Reconstruct": an image through the tokenizer and back, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from varkit.demo.common import Models, enlarge, need_gradio, readable_errors, stages
from varkit.demo.controls import RAW, buttons, code, gallery, heading, note, slider_of_two, wire
from varkit.demo.uploads import Upload, opening, read_upload, to_model_size, upload_controls, wire_examples
from varkit.metrics.reconstruction import CodebookUse, ReconstructionMetrics
from varkit.pipelines.edit import image_to_tensor

Scales = list[tuple[Image.Image, str]]


def reconstruct(models: Models, name: str, upload: Upload | None) -> tuple[Any, Scales, str, str]:
    """((original, reconstruction), the image from the first scales alone, what it took, Python lines)."""
    with readable_errors():
        pipeline = models.open(name)
        image, exact = to_model_size(read_upload(upload, models.limits.side), pipeline.image_tokenizer.image_size)
        with models.turns.take():
            tokens, back, scales = through(pipeline, image)
        lines = snippet(models.source(name), image.size if exact else None)
        return (enlarge(image), enlarge(back)), scales, status(pipeline, tokens, image, back), lines


@torch.no_grad()
def through(pipeline: Any, image: Image.Image) -> tuple[torch.Tensor, Image.Image, Scales]:
    """Tokens (1, L), the image made of all of them, and those made of its first scales or tokens, captioned."""
    tokenizer = pipeline.image_tokenizer
    pixels = image_to_tensor(image, tokenizer.image_size).to(pipeline.device)
    tokens = tokenizer.encode(pixels)
    scales = [(enlarge(pipeline.to_images(tokens[:, :n])[0]), name) for n, name in stages(pipeline).items()]
    return tokens, pipeline.to_images(tokens)[0], scales


def status(pipeline: Any, tokens: torch.Tensor, image: Image.Image, back: Image.Image) -> str:
    """Tokens used, and how near the reconstruction is."""
    layout = pipeline.image_tokenizer.layout
    size = (image.height, image.width)
    metrics = ReconstructionMetrics()
    metrics.update(image_to_tensor(back, size), image_to_tensor(image, size))
    found = metrics.means()
    parts = [f"**{layout.length} tokens**"]
    if isinstance(layout.codebook_size, int):
        use = CodebookUse(layout)
        use.update(tokens)
        parts[0] += f", {use.compute()['used']} different codes of {layout.codebook_size}"
    parts.append(f"PSNR **{found['psnr']:.2f} dB**")
    parts.append(f"SSIM **{found['ssim']:.4f}**" if "ssim" in found else "too small for SSIM")
    return " · ".join([*parts, f"{image.width} x {image.height} pixels"])


def snippet(source: str, exact: tuple[int, int] | None) -> str:
    """Python that makes the same reconstruction.   exact: (width, height) when the image was enlarged from that."""
    return (
        "import torch\n"
        "from PIL import Image\n"
        "from varkit import AutoPipeline\n"
        "from varkit.data.transforms import to_rgb\n"
        "from varkit.pipelines.edit import image_to_tensor\n\n"
        f"{opening(source, exact)}"
        "pixels = image_to_tensor(image, pipeline.image_tokenizer.image_size)\n"
        "with torch.no_grad():\n"
        "    tokens = pipeline.image_tokenizer.encode(pixels)\n"
        '    pipeline.to_images(tokens)[0].save("reconstruction.png")'
    )


def add_tab(models: Models, model: Any) -> None:
    """Build the tab inside the open `gr.Tabs`.

    Args: model: the dropdown that holds the model's name.
    """
    gr = need_gradio()
    with gr.Tab("Reconstruct", id="reconstruct") as tab, gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload, examples = upload_controls("reconstruct")
            start_stop = buttons("Reconstruct", "reconstruct")
        with gr.Column(scale=5, min_width=320):
            pair = slider_of_two("Original and reconstruction", "reconstruction")
            line = note("Choose an image and press **Reconstruct**.", "reconstruct-status")
            heading("The image from the first scales, or tokens, alone (of models that can show it)")
            scales = gallery("First scales", "reconstruct-scales", 6)
            lines = code("The same in Python", "reconstruct-snippet", "python")
    outputs: Sequence[Any] = [pair, scales, line, lines]
    wire(start_stop, partial(reconstruct, models), [model, upload], outputs, name="reconstruct", status=line, **RAW)
    wire_examples(models, model, tab, upload, examples)
