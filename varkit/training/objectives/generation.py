"""What training a generator on a frozen tokenizer has in common, whatever its tokens and their order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from varkit import registry
from varkit.conditioning.frames import FrameCondition
from varkit.conditioning.label import LabelCondition
from varkit.config import ConfigError, config
from varkit.data.codes import CodeInfo
from varkit.interfaces import Cond, Generator, Losses, Objective, Tokenizer
from varkit.pictures import SHOWN_FRAMES, rows_of_frames
from varkit.pipelines.auto import assemble, open_tokenizer
from varkit.pipelines.fingerprint import tokenizer_fingerprint
from varkit.rng import Rng
from varkit.training import finetune, lora
from varkit.training.captions import Captions
from varkit.training.codes import CodeMemory
from varkit.training.control import ControlConfig, Controls
from varkit.training.objectives.variants.arra import FrozenEncoder
from varkit.training.objectives.variants.combined import Together, VariantConfig, Variants

GIVEN_FRAMES = 5
"""Of 16 or 17, in the papers of LARP and NBP."""


@config
class GeneratorConfig(VariantConfig, finetune.FinetuneConfig):
    """Keys of every such objective.

    `VariantConfig` has further objectives, each a section; `FinetuneConfig` how to start from a trained model.
    """

    tokenizer: str  # a shipped model, a folder (of a tokenizer or a pipeline), a released checkpoint or its file
    num_frames: int | None = None  # of clips, each coded by itself where the tokenizer is one of images; None: as it is
    gradient_checkpointing: bool = False
    control: ControlConfig | None = None  # control images that steer the generator (docs/control.md)
    sampling: dict[str, Any] = field(default_factory=dict)  # default sampler settings of the exported pipeline
    given_frames: int | None = None  # first frames that a generator of condition `frames` goes on with; None: 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_finetuning()
        if self.num_frames is not None and self.num_frames < 1:
            raise ConfigError(f"objective.num_frames must be at least 1; got {self.num_frames}")


def registered(config: Any) -> Any:
    """The generator that `config.model` names, without weights. Raises ConfigError when it names none."""
    entry = registry.model_entry(config.model)
    if entry.kind != "generator":
        raise ConfigError(f"objective.model: {config.model} is a {entry.kind}; {config.name} trains a generator")
    with torch.device("meta"):
        return entry.build()


def require_same_tokenizer(tokenizer: Any, name: str, codes: CodeInfo) -> None:
    """Raises ConfigError when another tokenizer than this, objective.tokenizer `name`, made the token files."""
    own, made = tokenizer_fingerprint(tokenizer), codes.fingerprint
    if own != made or codes.token_layout != tokenizer.layout:
        raise ConfigError(
            f"the token files were made by {codes.tokenizer} (fingerprint {made}, "
            f"{codes.token_layout.describe()}); objective.tokenizer {name} is another (fingerprint {own}, "
            f"{tokenizer.layout.describe()}). Set objective.tokenizer to the one that made them, or make new ones "
            f"with `varkit tokenize`"
        )


class GeneratorTraining(Objective):
    """Owns the generator; the tokenizer is frozen, and its codes are made anew for each batch, or read from
    files."""

    shards = True
    kind: type[Any]  # class of the generator; a subclass sets it before `__init__`, or for good
    captions: Captions | None = None  # of a generator of texts; a subclass sets it before `__init__`
    from_frames = False  # of a generator that goes on with given frames; likewise
    text_encoder: nn.Module | None  # of the captions, where it is trained too
    config: Any

    def __init__(self, config: Any, classes: list[str]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        tokenizer = self.open_tokenizer()
        self.freeze("tokenizer", tokenizer)
        self.image_size, self.num_frames = tokenizer.image_size, tokenizer.num_frames
        if self.num_frames is not None:
            self._require_clips(self.num_frames)
        self.given_frames = self._check_given()
        self.model: Any = self._build(tokenizer)
        self.model.layout.require(tokenizer.layout, "the generator", f"tokenizer {config.tokenizer}")
        self._steer()
        self.notes += finetune.prepare(self.model, config)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.condition = LabelCondition(self.model.num_classes)
        self.text_encoder = None  # here, not at the class: there it would hide the module
        if self.captions is not None:
            self.captions.fit(self.model)
            if self.captions.trains:
                self.text_encoder = self.captions.network
                self.shards = False
            elif self.captions.network is not None:
                self.freeze("text_encoder", self.captions.network)
        self.max_steps = 1
        self.memory: dict[bool, CodeMemory] = {}  # by `training`: set by a sweep, whose members see the same images
        self._pipeline()  # settings that the sampler does not know are refused now, not at the end
        self.variants = self._variants(tokenizer) if config.any_variant else None

    def _require_clips(self, frames: int) -> None:
        """Raises ConfigError for what is done to images alone."""
        self.columns = min(SHOWN_FRAMES, frames)
        odd = [
            n for n in ("control", "alignment", "self_generated", "sizes") if getattr(self.config, n, None) is not None
        ]
        if odd or self.captions is not None:
            what = f"objective.{odd[0]}" if odd else "a generator of texts"
            raise ConfigError(f"{what} is for images; objective.tokenizer {self.config.tokenizer} codes clips")

    def _check_given(self) -> int:
        """How many first frames are given. Raises ConfigError where there cannot be so many."""
        given, frames = self.config.given_frames, self.num_frames or 0
        if given is not None and not self.from_frames:
            raise ConfigError("objective.given_frames is for generators that go on with given frames: leave it out")
        if self.from_frames and not 0 < (given or GIVEN_FRAMES) < frames:
            raise ConfigError(
                f"objective.given_frames must be 1 to {frames - 1}, of clips of {frames}; got {given or GIVEN_FRAMES}"
            )
        return given or GIVEN_FRAMES

    def _steer(self) -> None:
        """Make what reads control images. Raises ConfigError where generator and recipe do not agree on it."""
        self.controls = None if self.config.control is None else Controls(self.config.control)
        if self.controls is not None:
            self.notes.append(self.controls.fit(self.model))
        elif "control" in self.model.takes:
            kinds = list(self.model.config.control.get("kinds", ()))
            raise ConfigError(f"the model is steered by control images: give objective.control.kinds, such as {kinds}")

    def open_tokenizer(self) -> Any:
        """The frozen tokenizer. Raises ConfigError when it codes clips of other lengths."""
        return self._opened()

    def _opened(self, **options: Any) -> Any:
        frames = self.config.num_frames
        try:
            return open_tokenizer(self.config.tokenizer, num_frames=frames, **options)
        except ValueError as error:
            if frames is None:
                raise
            raise ConfigError(f"objective.num_frames={frames}: {error}") from error

    def _variants(self, tokenizer: Tokenizer) -> Variants:
        dim = None
        if self.config.alignment is not None:
            encoder = FrozenEncoder(self.config.alignment.encoder, self.config.alignment.weights)
            self.freeze("encoder", encoder)
            dim = encoder.dim
        return Variants(self.config, self.model, tokenizer, sampling=self.config.sampling, feature_dim=dim)

    def _build(self, tokenizer: Any) -> Any:
        if self.config.init_from is not None:
            model, note = finetune.start_from(self.config, self.kind, self.classes)
            self.notes.append(note)
            wanted = ("frames" if self.from_frames else "class") if self.captions is None else "text"
            if model.condition != wanted:
                raise ConfigError(
                    f"objective.init_from {self.config.init_from} is conditioned on {model.condition}, objective.model "
                    f"{self.config.model} on {wanted}; name a model of the same condition in objective.model"
                )
            return model
        if self.captions is not None:
            own = {"num_classes": None, **self.captions.sizes(), **self.sizes(tokenizer)}
            return self.fresh(own | self.config.model_overrides)
        sizes = {
            "num_classes": 0 if self.from_frames else max(len(self.classes), 1),
            **self.sizes(tokenizer),
            **self.config.model_overrides,
        }
        unconditional = sizes["num_classes"] == 0 and self.num_frames is not None
        if sizes["num_classes"] < len(self.classes) and not unconditional:
            raise ConfigError(
                f"the model has {sizes['num_classes']} classes, the data {len(self.classes)}; set "
                f"objective.model_overrides.num_classes, or leave it out"
            )
        try:
            return self.fresh(sizes)
        except ValueError as error:
            if self.num_frames is None:
                raise
            raise ConfigError(
                f"objective.model {self.config.model} cannot be made for clips, {tokenizer.layout.describe()}: {error}"
            ) from error

    @abstractmethod
    def sizes(self, tokenizer: Any) -> dict[str, Any]:
        """The generator's constructor arguments that the tokenizer decides."""

    def fresh(self, sizes: dict[str, Any]) -> Any:
        """A new generator of these constructor arguments."""
        return registry.create_model(self.config.model, **sizes)

    def trained(self, phase: str) -> nn.Module:
        others = {"variants": self.variants, "text_encoder": self.text_encoder}
        present = {name: module for name, module in others.items() if module is not None}
        return Together(self.model, **present) if present else self.model

    def options(self, step: int, max_steps: int) -> dict[str, Any]:
        """What the generator's `training_loss` is given besides its tensors."""
        return {}

    def check_codes(self, codes: CodeInfo) -> None:
        """Raises ConfigError when another tokenizer made them, or when what is trained needs the images."""
        require_same_tokenizer(self.frozen("tokenizer"), self.config.tokenizer, codes)
        needy = [n for n in ("alignment", "self_generated", "control") if getattr(self.config, n) is not None]
        if self.from_frames:
            raise ConfigError("the generator reads the first frames of clips, token files hold none; give the clips")
        if needy:
            raise ConfigError(
                f"objective.{needy[0]} reads the images, token files hold none; give the images in data.train"
            )

    def check_texts(self, name: str, texts: Sequence[str] | None) -> None:
        """Raises ConfigError when a generator of texts has no captions, or no features of some."""
        if self.captions is not None:
            self.notes += self.captions.check(name, texts)

    def cond(self, batch: dict[str, Any], rng: Rng | None = None) -> Cond:
        """What the images of a batch are drawn from: their captions or their classes, and their control images.

        Args: rng: where a subclass draws how they are read; None, for sample sheets, is one way alone.
        """
        if self.captions is None and self.from_frames:
            return self._given(batch["images"])
        if self.captions is None:
            labels = batch["labels"].clamp_min(0)
            cond = self.condition.encode(class_labels=labels if self.model.num_classes else labels * 0)
        else:
            cond = self.captions.encode(batch["texts"], self.model, batch["labels"].device)
        return cond if self.controls is None else cond + self.controls.encode(batch["images"])

    def _given(self, clips: Tensor) -> Cond:
        """The ids of clips' first frames."""
        return FrameCondition(self.frozen("tokenizer")).encode(frames=clips[:, :, : self.given_frames])

    def tokens(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """The codes of a batch of images or of token files, (B, L). Args: rng: of tokenizers that draw."""
        if "tokens" in batch:
            return batch["tokens"]
        tokenizer = self.frozen("tokenizer")
        memory = self.memory.get(self.training)
        return memory.tokens(batch, tokenizer.encode) if memory else tokenizer.encode(batch["images"])

    def _losses(self, batch: dict[str, Tensor], rng: Rng, **options: Any) -> Losses:
        with torch.no_grad():
            tokens = self.tokens(batch, rng)
            inputs = self.frozen("tokenizer").embed(tokens)
        return cast(Generator, self.model).training_loss(tokens, inputs, self.cond(batch, rng), rng, **options)

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        options = self.options(step, max_steps)
        if self.variants is None:
            return self._losses(batch, rng, **options)
        return self.variants(
            self.model,
            self.frozen("tokenizer"),
            batch.get("images"),
            self.cond(batch, rng),
            rng,
            step=step,
            max_steps=max_steps,
            tokens=batch.get("tokens"),
            feature=self.frozen("encoder")(batch["images"]) if self.config.alignment is not None else None,
            **options,
        )

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        return self._losses(batch, rng)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Up to ten classes, five images each, or one image a caption, by the sampler's default settings.

        Where control images steer, each of them, and beside it an image that it led to. Of clips some frames in a row.
        """
        if self.num_frames is not None:
            return self._clips(batch)
        if self.captions is not None or self.controls is not None:
            cond = self.cond(batch)
            images = self._pipeline().draw(
                cond,
                self.condition.null(cond) if self.captions is None else self.model.null(cond),
                Rng.from_seed(0, len(cond)).to(batch["labels"].device),
                known=None,
                output_type="pt",
                callback=None,
            )[0]
            images = images * 2 - 1
            if cond.control is None:
                return images
            return torch.cat([cond.control.to(images), images[:, None]], 1).flatten(0, 1)
        classes = torch.arange(self.model.num_classes, device=batch["labels"].device)[:10]
        out = self._pipeline()(
            class_labels=classes.repeat(5).tolist(), rng=Rng.from_seed(0, 5 * len(classes)), output_type="pt"
        )
        return out.images * 2 - 1

    def _clips(self, batch: dict[str, Tensor]) -> Tensor:
        """Frames of eight clips: of classes spread over all, or that go on with given frames."""
        device, count = batch["labels"].device, self.model.num_classes
        if self.from_frames:
            cond = self._given(batch["images"][:8])
            null = cond  # the sampler does not read it: such models have no guidance
        else:
            labels = torch.linspace(0, count - 1, min(8, count)).round().long() if count else torch.zeros(8).long()
            cond = self.condition.encode(class_labels=labels.to(device))
            null = self.condition.null(cond)
        tokens = self._pipeline().draw(
            cond,
            null,
            Rng.from_seed(0, len(cond)).to(device),
            known=None,
            output_type="latent",
            callback=None,
        )[0]
        return rows_of_frames(self.frozen("tokenizer").decode(tokens).float(), self.columns or SHOWN_FRAMES)

    def _pipeline(self, model: Any = None) -> Any:
        pipeline = assemble(model or self.model, self.frozen("tokenizer"), self.config.sampling)
        if self.captions is not None:
            pipeline.register_to_config(text_encoder_name=self.captions.encoder, clean_prompts=self.captions.clean)
            if self.captions.trains:
                pipeline.register_modules(text_encoder=self.text_encoder, tokenizer=self.captions.condition.tokenizer)
        else:
            pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(self.classes)} or None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, folder: Path) -> None:
        if self.config.lora is None:
            self._pipeline().save_pretrained(folder)
            return
        self._pipeline(lora.merged(self.model)).save_pretrained(folder)
        lora.write_adapter(self.model, folder / lora.ADAPTER, str(self.config.init_from))
