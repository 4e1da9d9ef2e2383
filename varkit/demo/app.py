"""The page: a model chooser above one tab for each thing a model can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varkit.demo.common import Models, need_gradio
from varkit.demo.limits import Limits

SYSTEM_FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

INTRO = """# varkit

Images by visual autoregression: models that draw a picture scale after scale, or token after token."""

CSS = """
.gradio-container { max-width: 1280px !important; min-width: 0 !important; margin: 0 auto !important; }
#header { align-items: end; margin-bottom: 4px; }
#intro h1 { margin: 0 0 2px; font-size: 1.7rem; letter-spacing: -0.02em; }
#intro p { color: var(--body-text-color-subdued); margin: 0; }
.note { min-height: 1.6em; padding: 0 2px; }
.note p { color: var(--body-text-color-subdued); font-size: 0.92rem; }
.heading p { font-weight: 600; margin: 0; }
.pictures { background: none !important; border: none !important; box-shadow: none !important; }
.pictures .grid-wrap {
  min-height: 0 !important; max-height: none !important; padding: 0 !important; overflow: visible !important;
}
.pictures .grid-container {
  padding: 0 !important; grid-template-rows: none !important; grid-auto-rows: auto !important;
}
.pictures .empty { min-height: 130px !important; }
.pictures .caption-label { font-size: 0.72rem; padding: 1px 6px; right: 4px; bottom: 4px; max-width: calc(100% - 8px); }
.examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }
.examples .thumbnail-item, .examples .gallery-item { min-width: 0 !important; width: 100% !important; }
.examples .thumbnail-item { height: auto !important; aspect-ratio: 1; }
.run-row { flex-wrap: nowrap !important; }
.seed-row { align-items: end; }
.cm-scroller { font-size: 0.85rem; }
body:not(.dark) .cm-line span { color: inherit !important; }
.tab-container button.selected { color: var(--body-text-color) !important; }
#evaluate-scores { overflow-x: auto; }
#evaluate-scores th, #evaluate-scores td { word-break: normal; border-color: var(--border-color-primary) !important; }
#evaluate-scores th, #evaluate-scores td:nth-child(2) { white-space: nowrap; }
#painter .html-container, #control-board .html-container { padding: 0 !important; }
#video-clip video, #video-clip img { image-rendering: pixelated; max-height: 440px; object-fit: contain; }
#control-map img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.prompt textarea { unicode-bidi: plaintext; text-align: start; }
#evaluate-pictures .grid-container { grid-template-columns: 3fr 2fr !important; align-items: start; }
#evaluate-pictures .thumbnail-item { display: block; aspect-ratio: auto; height: auto !important; }
#evaluate-pictures img { height: auto; image-rendering: pixelated; }
#evaluate-pictures .caption-label { position: static; max-width: 100%; white-space: normal; text-align: left; }
@media (max-width: 640px) {
  .tab-wrapper, .tab-container { min-width: 0 !important; height: auto !important; }
  .tab-container { flex-wrap: wrap !important; }
  .tab-container button { padding: 6px 5px !important; font-size: 0.75rem !important; }
  .gradio-container main, .gradio-container .app { padding-left: 12px !important; padding-right: 12px !important; }
  #images .grid-container, #scales .grid-container, #reconstruct-scales .grid-container,
  #text-images .grid-container, #control-images .grid-container, #control-scales .grid-container,
  #video-read .grid-container {
    grid-template-columns: repeat(3, minmax(0, 1fr)) !important;
  }
  #evaluate-pictures .grid-container { grid-template-columns: 1fr !important; }
  #evaluate-scores thead { display: none; }
  #evaluate-scores :is(table, tbody, tr, td) { display: block; margin: 0; border: none !important; }
  #evaluate-scores tr { padding: 8px 0; border-bottom: 1px solid var(--border-color-primary) !important; }
  #evaluate-scores td { padding: 2px 0 !important; text-align: left !important; }
  #evaluate-scores td:nth-child(2) { font-weight: 600; }
  #evaluate-scores td:nth-child(3)::before { content: "interval: "; }
}
"""


def build_demo(
    models: Sequence[str | Path] = (), limits: Limits | None = None, reference: str = "fashion-mnist"
) -> Any:
    """The page as `gr.Blocks`, not yet served.

    Args:
        models: what to offer, the first of them shown first: shipped names, saved pipeline folders, released
            checkpoints. The shipped models are always offered too. Models of texts are in the tab Text, those that
            control images steer in the tab Control, those of clips in the tab Video; without any there is no such tab.
        limits: how much a visitor may ask for.
        reference: the real images that the tab "Evaluate" scores against, as `varkit eval` takes them.
    Raises: ImportError without gradio; ValueError when there is no model, or the first cannot be opened.
    """
    gr = need_gradio()
    from varkit.demo import class_to_image, compare, edit, evaluate, reconstruct, steer, text, video
    from varkit.pipelines.auto import zoo_models

    offered = Models([*models, *zoo_models()], limits)
    first = offered.names[0]
    offered.open(first)
    takes = {name: offered.takes(name) for name in offered.names}
    classes = offered.only([n for n, t in takes.items() if not (t.text or t.always or t.clips)])
    texts = offered.only([n for n, t in takes.items() if t.text and not t.always])
    steered = offered.only([n for n, t in takes.items() if t.control])
    clips = offered.only([n for n, t in takes.items() if t.clips])
    kinds = {"generate": classes, "text": texts, "control": steered, "video": clips}
    shown = next(tab for tab, some in kinds.items() if first in some.names)
    with gr.Blocks(title="varkit", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        with gr.Row(elem_id="header"):
            with gr.Column(scale=5, min_width=320):
                gr.Markdown(INTRO, elem_id="intro")
            with gr.Column(scale=2, min_width=240, visible=bool(classes.names)):
                model = gr.Dropdown(
                    classes.names, value=next(iter(classes.names), None), label="Model", elem_id="model"
                )
        with gr.Tabs(selected=shown):
            if classes.names:
                class_to_image.add_tab(classes, model)
            if texts.names:
                text.add_tab(texts)
            if steered.names:
                steer.add_tab(steered)
            if clips.names:
                video.add_tab(clips)
            if classes.names:
                reconstruct.add_tab(classes, model)
                edit.add_tab(classes, model)
                compare.add_tab(classes)
                evaluate.add_tab(classes, model, reference)
    demo.queue(max_size=offered.limits.waiting, default_concurrency_limit=1)
    return demo


def launch(
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    inbrowser: bool = False,
    model: str | Path | Sequence[str | Path] = "fashion-var",
    limits: Limits | None = None,
    reference: str = "fashion-mnist",
) -> None:
    """Serve the page until interrupted.

    Args:
        host, port: where to listen; "0.0.0.0" lets other machines in.
        share: ask gradio for a public address (this goes through gradio's servers).
        inbrowser: open the page in this machine's browser.
        model: one or several names or folders to offer, the first shown first.
        limits, reference: see `build_demo`.
    Raises: ImportError without gradio; ValueError when the model cannot be opened or the port is taken.
    """
    gr = need_gradio()
    limits = limits or Limits()
    demo = build_demo([model] if isinstance(model, str | Path) else model, limits, reference)
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in SYSTEM_FONTS],
        font_mono=[gr.themes.Font(name) for name in MONO_FONTS],
    )
    theme.set(body_text_color_subdued="*neutral_500")  # gradio's own is too pale to read on white
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=inbrowser,
            theme=theme,
            css=CSS,
            max_file_size=limits.upload_mb * 2**20,
            footer_links=["api", "gradio", "settings"],
            run_history=False,
            ssr_mode=False,
        )
    except OSError as error:
        reason = "the port is taken, or this machine may not listen there; choose another"
        raise ValueError(f"cannot listen at {host}:{port}: {reason}") from error
