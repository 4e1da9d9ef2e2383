"""ControlAR (arXiv 2410.02705): LlamaGen steered by control images. Its sizes, and the files that its authors released.

What it adds to LlamaGen, and to other generators, is `varkit.conditioning.control`.
Source: hustvl/ControlAR: README.md, autoregressive/sample/*.py (87e32e9).
"""

from typing import Any

from varkit.generators.llamagen import SIZES, TINY_CLASS, TINY_TEXT, builder
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.tokenizers.vqgan import TINY as TINY_TOKENIZER

CONTROL_SAMPLING = {"guidance_scale": 4.0, "guidance_schedule": "constant", "top_k": 2000}
"""Of its scripts."""

_TINY_CONTROL: dict[str, Any] = {
    "depth": 3,
    "control": {"encoder": {"width": 12, "depth": 1, "heads": 2, "patch": 2, "grid": 4}},
    "control_drop_rate": 0.1,
}
_XL: dict[str, Any] = {"num_classes": None, "depth": 36, "hidden_size": 1280, "num_heads": 20}
_PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"controlar_c2i_{name}": (
            {"depth": depth, "hidden_size": width, "num_heads": heads, "control": {"encoder": "vit-small"}},
            f"ControlAR-{name.upper()}: LlamaGen-{name.upper()} steered by control images, 256x256",
        )
        for name, (depth, width, heads, _) in SIZES.items()
        if name in ("b", "l")
    },
    **{
        f"controlar_t2i_xl{tag}": (
            {**_XL, "rope_grid": places, "control": {"encoder": f"dinov2-{encoder}"}},
            f"ControlAR: LlamaGen-XL from text and control images, DINOv2-{encoder}; {what}",
        )
        for tag, encoder, places, what in (
            ("", "small", None, "released at 512x512"),
            ("_mr", "small", (48, 48), "released for any sides up to the area of 768x768"),
            ("_base", "base", None, "released at 512x512"),
        )
    },
}
for _name, (_preset, _summary) in _PRESETS.items():
    register_model(
        ModelEntry(
            _name,
            "generator",
            builder(**_preset),
            _summary,
            tokenizer="vq_ds16",
            tiny={
                **(TINY_TEXT if _preset.get("num_classes", 0) is None else TINY_CLASS),
                **_TINY_CONTROL,
                **({"rope_grid": (5, 4)} if _preset.get("rope_grid") else {}),
            },
            tiny_tokenizer=TINY_TOKENIZER,
        )
    )

for _file, _builder_name, _kinds, _resize in (
    ("canny_MR", "controlar_t2i_xl_mr", ("canny",), "nearest"),
    ("depth_MR", "controlar_t2i_xl_mr", ("depth",), "bicubic"),
    ("hed", "controlar_t2i_xl", ("hed",), "bicubic"),
    ("seg_cocostuff", "controlar_t2i_xl", ("seg",), "nearest"),
    ("edge_base", "controlar_t2i_xl_base", (), "bicubic"),
    ("depth_base", "controlar_t2i_xl_base", ("depth",), "bicubic"),
):
    _large = _builder_name.endswith("_mr")
    _encoder = "dinov2-base" if _builder_name.endswith("_base") else "dinov2-small"
    register_checkpoint(
        Checkpoint(
            name=f"{_builder_name}.{_file.lower()}",
            repo_id="wondervictor/ControlAR",
            filename=f"{_file}.safetensors",
            licence="not stated with the files",
            paper="arXiv 2410.02705",
            resolution=768 if _large else 512,
            official_score="none that we could check against its source",
            tokenizer="vq_ds16.t2i",
            overrides={
                "grid": 48 if _large else 32,
                "rope_grid": (48, 48) if _large else None,
                "control": {"encoder": _encoder, "kinds": list(_kinds), "resize": _resize},
            },
            sampling=CONTROL_SAMPLING,
        )
    )
