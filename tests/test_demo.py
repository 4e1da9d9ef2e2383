from pathlib import Path


def save_tiny(folder: Path) -> Path:
    from varkit.pipelines.class_to_image import ClassToImagePipeline
    from varkit.registry import model_entry
    from varkit.samplers.next_group import NextGroupSampler

    entry = model_entry("var_fashion")
    tokenizer = model_entry(str(entry.tokenizer)).build(**entry.tiny_tokenizer)
    names = {"0": "Boot", "1": "Coat", "2": "Bag"}
    pipeline = ClassToImagePipeline(
        entry.build(**entry.tiny).eval(), tokenizer.eval(), NextGroupSampler(guidance_scale=2.0), id2label=names
    )
    pipeline.save_pretrained(folder)
    return folder
