"""Class-conditional generation by a distilled student, with its teacher beside it or without."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from varkit.pipelines.class_to_image import ClassToImagePipeline


class DistilledPipeline(ClassToImagePipeline):
    """Class labels -> images in one pass or two; with a teacher also in some more.

    Args:
        transformer: a `Student`.   image_tokenizer, id2label: as in `ClassToImagePipeline`.
        sampler: a `DistilledSampler`.
        teacher: the generator that the student learned from; needed for `teacher_start` alone.
    Raises: ValueError when the parts were not made for each other.
    """

    model_cpu_offload_seq = "teacher->transformer->image_tokenizer"
    _optional_components: ClassVar[list[str]] = ["teacher"]

    def __init__(
        self,
        transformer: Any,
        image_tokenizer: Any,
        sampler: Any,
        id2label: dict[str, str] | None = None,
        teacher: Any = None,
    ) -> None:
        super().__init__(transformer, image_tokenizer, sampler, id2label)
        if teacher is not None:
            teacher.layout.require(image_tokenizer.layout, "the teacher", "the image tokenizer")
        self.register_modules(teacher=teacher)

    def helpers(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def edit(self, *arguments: Any, **settings: Any) -> NoReturn:
        """Raises ValueError: a student draws from noise, and knows none that leads to given tokens."""
        raise ValueError(
            "a distilled student draws all tokens from noise and cannot keep given ones; edit with its teacher"
        )
