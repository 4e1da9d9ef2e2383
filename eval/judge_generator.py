"""Judge a class-conditional generator by a classifier trained on the same data.

    python eval/judge_generator.py fashion-var --guidance 1,1.5,2,3 --num 5000 --json judged.json

prints class agreement and FD(classifier) of samples beside those of reconstructions and of held-out images.
"""

import json
from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[str, typer.Argument(help="A shipped model or a saved pipeline folder.")],
    classifier: Annotated[str | None, typer.Option(help="Its folder; default: MODEL's own classifier/.")] = None,
    data: Annotated[str, typer.Option(help="A data set with a train and a test split.")] = "fashion-mnist",
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    mode: Annotated[str, typer.Option(help="How images get the model's size.")] = "pad",
    num: Annotated[int, typer.Option(help="Images of each kind.")] = 5000,
    guidance: Annotated[str, typer.Option(help="Guidance scales, separated by commas.")] = "1,1.5,2,3",
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of mass p.")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear, cosine or late.")] = None,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole result here.")] = None,
) -> None:
    """Class agreement and FD(classifier) of samples, reconstructions and held-out images."""
    from varkit.data.images import open_images
    from varkit.data.transforms import ImageTransform
    from varkit.metrics.classifier import ImageClassifier
    from varkit.metrics.judge import judge, table
    from varkit.pipelines.auto import AutoPipeline, find_folder

    pipeline = AutoPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    folder = classifier or str((find_folder(model) or Path(model)) / "classifier")
    transform = ImageTransform(pipeline.image_tokenizer.image_size, mode=mode)  # type: ignore[arg-type]
    train, test = (open_images(data, split=s, transform=transform, root=root) for s in ("train", "test"))
    result = judge(
        pipeline,
        ImageClassifier.from_pretrained(folder).eval(),
        train,
        test,
        num=num,
        guidances=[float(w) for w in guidance.split(",")],
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        guidance_schedule=schedule,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(f"{result['protocol']}\n\n{table(result)}")


if __name__ == "__main__":
    typer.run(main)
