"""A brush for masks: the image as the model sees it, with the token cells that will be redrawn marked by hand.

gradio's ImageEditor is not used: it keeps what browsers send in the server's memory without a limit, and a brush of
pixels would promise more than cells of tokens can give. Here a mask is a short text, such as `0011/0011`.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from varkit.demo.common import need_gradio

TOOLS = {
    "left": "Left half",
    "right": "Right half",
    "upper": "Upper half",
    "lower": "Lower half",
    "frame": "Frame",
    "invert": "Invert",
    "clear": "Clear",
}

TEMPLATE = """
<div class="painter" data-rows="${rows}" data-columns="${columns}" data-ink="@ink" data-brush="@brush">
  <div class="stage"><img src="${image}" alt="The image as the model sees it" draggable="false">
    <canvas tabindex="0" role="application"
      aria-label="@about: drag to mark, or arrow keys to move and space to mark or unmark"></canvas></div>
  <div class="tools" role="toolbar" aria-label="Marks">
    @tools
  </div>
</div>
"""

STYLE = """
.stage { position: relative; line-height: 0; border-radius: 8px; overflow: hidden; background: #8882; }
.stage img { width: 100%; image-rendering: pixelated; user-select: none; margin: 0; }
.stage img[src=""] { visibility: hidden; aspect-ratio: 1; }
.stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; cursor: crosshair; }
.tools { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; }
.stage:focus-within { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.tools button { margin: 0 !important; font-weight: 500 !important; padding: 4px 10px;
  border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); font-size: 0.85rem; }
.tools button:hover { background: var(--button-secondary-background-fill-hover); }
"""

SCRIPT = """
const part = (selector) => element.querySelector(selector);
const sides = () => [Number(part('.painter').dataset.rows), Number(part('.painter').dataset.columns)];
let cells = [], stroke = null, last = null, cursor = null;

function read() {
  const [rows, columns] = sides();
  const lines = String(props.value || '').split('/');
  cells = Array.from({length: rows}, (_, r) => Array.from({length: columns}, (_, c) => (lines[r] || '')[c] === '1'));
}
function draw() {
  const [rows, columns] = sides(), canvas = part('canvas'), k = 32;
  canvas.width = columns * k;
  canvas.height = rows * k;
  const pen = canvas.getContext('2d');
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    pen.strokeStyle = 'rgba(128, 128, 128, 0.35)';
    pen.strokeRect(c * k + 0.5, r * k + 0.5, k - 1, k - 1);
    if (!cells[r][c]) continue;
    pen.fillStyle = part('.painter').dataset.ink;
    pen.fillRect(c * k, r * k, k, k);
  }
  if (!cursor) return;
  pen.lineWidth = 4;
  pen.strokeStyle = 'white';
  pen.strokeRect(cursor[1] * k + 2, cursor[0] * k + 2, k - 4, k - 4);
}
function send() {
  props.value = cells.map((row) => row.map((cell) => (cell ? '1' : '0')).join('')).join('/');
}
function mark(event) {
  const [rows, columns] = sides(), box = part('canvas').getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * columns, y = (event.clientY - box.top) / box.height * rows;
  const reach = Math.max(0.5, Math.max(rows, columns) / 24 * Number(part('.painter').dataset.brush));
  const from = last || [x, y], steps = Math.ceil(2 * Math.hypot(x - from[0], y - from[1])) || 1;
  for (let i = 0; i <= steps; i++) {  // a quick stroke comes in a few points: fill in between
    const px = from[0] + (x - from[0]) * i / steps, py = from[1] + (y - from[1]) * i / steps;
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      if (Math.max(Math.abs(c + 0.5 - px), Math.abs(r + 0.5 - py)) <= reach) cells[r][c] = stroke;
    }
  }
  last = [x, y];
  draw();
}
const tools = {
  left: (r, c, rows, columns) => c < columns / 2,
  right: (r, c, rows, columns) => c >= columns / 2,
  upper: (r, c, rows, columns) => r < rows / 2,
  lower: (r, c, rows, columns) => r >= rows / 2,
  frame: (r, c, rows, columns) => Math.min(r, rows - 1 - r) < rows / 4 || Math.min(c, columns - 1 - c) < columns / 4,
  invert: (r, c) => !cells[r][c],
  clear: () => false,
};
element.addEventListener('pointerdown', (event) => {
  if (event.target.tagName !== 'CANVAS') return;
  const [rows, columns] = sides(), box = event.target.getBoundingClientRect();
  const r = Math.floor((event.clientY - box.top) / box.height * rows);
  const c = Math.floor((event.clientX - box.left) / box.width * columns);
  stroke = !(cells[r] || [])[c];
  last = null;
  event.target.setPointerCapture(event.pointerId);
  mark(event);
});
element.addEventListener('pointermove', (event) => { if (stroke !== null) mark(event); });
for (const end of ['pointerup', 'pointercancel']) {
  element.addEventListener(end, () => { if (stroke !== null) { stroke = null; send(); } });
}
element.addEventListener('click', (event) => {
  const tool = tools[event.target.dataset.tool];
  if (!tool) return;
  const [rows, columns] = sides();
  cells = cells.map((row, r) => row.map((_, c) => tool(r, c, rows, columns)));
  draw();
  send();
});
const arrows = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
element.addEventListener('keydown', (event) => {
  const step = arrows[event.key], space = event.key === ' ';
  if (event.target.tagName !== 'CANVAS' || !(step || space)) return;
  event.preventDefault();
  const start = cursor || [0, 0];
  cursor = step && cursor ? start.map((at, i) => Math.min(Math.max(at + step[i], 0), sides()[i] - 1)) : start;
  if (space) cells[cursor[0]][cursor[1]] = !cells[cursor[0]][cursor[1]];
  draw();
  if (space) send();
});
element.addEventListener('focusout', () => { cursor = null; draw(); });
watch(['value', 'image', 'rows', 'columns'], () => { if (stroke === null) { read(); draw(); } });
read();
draw();
"""


def painter(
    grid: Sequence[int],
    name: str,
    *,
    marks: str | None = None,
    image: str = "",
    tools: Sequence[str] = tuple(TOOLS),
    about: str = "Cells to redraw",
    ink: str = "rgba(249, 115, 22, 0.6)",
    brush: float = 1,
    **options: Any,
) -> Any:
    """The box.

    Args:
        grid: rows and columns of cells.   name: of its element.
        marks: those at the start; None is the lower half.   image: below them, as `showing` gives it.
        tools: names in `TOOLS`.   about: what marks are.   ink: their colour.   brush: its width, 1 is a twelfth.
        options: of `gr.HTML`.
    """
    rows, columns = grid
    shown = "\n    ".join(f'<button type="button" data-tool="{tool}">{TOOLS[tool]}</button>' for tool in tools)
    template = TEMPLATE.replace("@tools", shown).replace("@about", about).replace("@ink", ink)
    return need_gradio().HTML(
        lower_half(grid) if marks is None else marks,
        label="Marks",
        html_template=template.replace("@brush", f"{brush:g}"),
        css_template=STYLE,
        js_on_load=SCRIPT,
        elem_id=name,
        image=image,
        rows=rows,
        columns=columns,
        **options,
    )


def showing(image: Image.Image, grid: Sequence[int]) -> dict[str, Any]:
    """Properties of the box that show this image under these cells."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"image": data, "rows": grid[0], "columns": grid[1]}


def lower_half(grid: Sequence[int]) -> str:
    """The marks at the start."""
    return "/".join(("1" if 2 * row >= grid[0] else "0") * grid[1] for row in range(grid[0]))


def no_marks(grid: Sequence[int]) -> str:
    return "/".join(["0" * grid[1]] * grid[0])


def read_cells(
    text: Any, grid: Sequence[int], empty: str = "nothing would be redrawn: mark what is to be redrawn first"
) -> np.ndarray:
    """(h, w) bool, True where marked. Raises: ValueError for another grid or text, and `empty` where nothing is."""
    rows, columns = grid
    if not isinstance(text, str) or not re.fullmatch(rf"[01]{{{columns}}}(/[01]{{{columns}}}){{{rows - 1}}}", text):
        raise ValueError(f"the marks must be {rows} rows of {columns} cells, 0 or 1, with a slash between rows")
    cells = np.array([[cell == "1" for cell in row] for row in text.split("/")])
    if not cells.any():
        raise ValueError(empty)
    return cells
