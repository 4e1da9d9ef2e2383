"""varkit: models that generate images and video by predicting the next token, scale, cell or frame.

Names are imported when first used, so `import varkit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AutoPipeline": "varkit.pipelines.auto",
    "ClassToImagePipeline": "varkit.pipelines.class_to_image",
    "ClassToVideoPipeline": "varkit.pipelines.class_to_video",
    "LlamaGen": "varkit.generators.llamagen",
    "MaskedSampler": "varkit.samplers.masked",
    "MultiScaleVQ": "varkit.tokenizers.multiscale_vq",
    "NextGroupSampler": "varkit.samplers.next_group",
    "Rng": "varkit.rng",
    "TextToImagePipeline": "varkit.pipelines.text_to_image",
    "TokenLayout": "varkit.layout",
    "VQGAN": "varkit.tokenizers.vqgan",
    "VAR": "varkit.generators.var",
    "create_model": "varkit.registry",
    "create_pipeline": "varkit.pipelines.auto",
    "list_checkpoints": "varkit.registry",
    "list_models": "varkit.registry",
    "open_images": "varkit.data.images",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from varkit.data.images import open_images as open_images
    from varkit.generators.llamagen import LlamaGen as LlamaGen
    from varkit.generators.var import VAR as VAR
    from varkit.layout import TokenLayout as TokenLayout
    from varkit.pipelines.auto import AutoPipeline as AutoPipeline
    from varkit.pipelines.auto import create_pipeline as create_pipeline
    from varkit.pipelines.class_to_image import ClassToImagePipeline as ClassToImagePipeline
    from varkit.pipelines.class_to_video import ClassToVideoPipeline as ClassToVideoPipeline
    from varkit.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
    from varkit.registry import create_model as create_model
    from varkit.registry import list_checkpoints as list_checkpoints
    from varkit.registry import list_models as list_models
    from varkit.rng import Rng as Rng
    from varkit.samplers.masked import MaskedSampler as MaskedSampler
    from varkit.samplers.next_group import NextGroupSampler as NextGroupSampler
    from varkit.tokenizers.multiscale_vq import MultiScaleVQ as MultiScaleVQ
    from varkit.tokenizers.vqgan import VQGAN as VQGAN


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'varkit' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
