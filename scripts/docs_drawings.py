"""The drawings of docs/axes and docs/asynchronous.md: make drawings

Each is an SVG with a background of its own, light or dark as the reader's system asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from dtrain.parallel.footprint import BACKWARD, FORWARD
from dtrain.strategy.pipeline.schedule import Schedule, timetable

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "axes"
WIDTH = 720
# fills by meaning: in light, in dark
COLOURS = {
    "paper": ("#ffffff", "#16181d"),
    "ink": ("#1f2328", "#e6e8eb"),
    "faint": ("#6b7280", "#9aa3ad"),
    "rank": ("#f3f4f6", "#22262d"),
    "weights": ("#bfdbfe", "#1e4976"),
    "gradients": ("#fed7aa", "#7c3f12"),
    "activations": ("#bbf7d0", "#14532d"),
    "rows": ("#e9d5ff", "#4c2a78"),
    "empty": ("#ffffff", "#16181d"),
    "message": ("#c2410c", "#fb923c"),
}
RANKS = ("weights", "gradients", "activations", "rows")  # fills that tell ranks apart


class Drawing:
    """An SVG that is built of boxes, words and arrows, in pixels."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, text: str = ""
    ) -> None:
        """Draw a box, with words in its middle."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="{fill}" {place} rx="4"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text)

    def text(
        self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "word"
    ) -> None:
        """Write words; `anchor` is start, middle or end, `kind` word, note or head."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, kind: str = "message") -> None:
        """Draw an arrow: a message between ranks, or a `step` within one."""
        self.parts.append(
            f'<path class="{kind}" d="M{x:g} {y:g}L{to_x:g} {to_y:g}" marker-end="url(#{kind})"/>'
        )

    def svg(self) -> str:
        """Return the whole drawing."""
        style = "".join(_rules(0)) + f"@media(prefers-color-scheme:dark){{{''.join(_rules(1))}}}"
        markers = "".join(
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path class="tip-{kind}" d="M0 0L8 4L0 8z"/></marker>'
            for kind in ("message", "step")
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'width="{WIDTH}" height="{self.height}" font-family="sans-serif" font-size="14">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{style}</style><defs>{markers}</defs>",
                f'<rect class="paper" width="{WIDTH}" height="{self.height}" rx="8"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def _rules(scheme: int) -> list[str]:
    colour = {name: each[scheme] for name, each in COLOURS.items()}
    fills = [f".{name}{{fill:{colour[name]}}}" for name in COLOURS if name != "message"]
    return [
        *fills,
        f".rank,.weights,.gradients,.activations,.rows,.empty{{stroke:{colour['faint']}}}",
        f".word{{fill:{colour['ink']}}}.head{{fill:{colour['ink']};font-weight:bold}}",
        f".note{{fill:{colour['faint']};font-size:13px}}",
        f".message{{stroke:{colour['message']};stroke-width:2;fill:none}}",
        f".step{{stroke:{colour['faint']};stroke-width:1.5;fill:none}}",
        f".tip-message{{fill:{colour['message']}}}.tip-step{{fill:{colour['faint']}}}",
    ]


def data() -> Drawing:
    """Data parallel: each rank its rows, all weights, and one all-reduce."""
    it = Drawing("Data parallel: two ranks with all weights and half of the rows", 250)
    for rank, y in enumerate((20, 135)):
        it.box(15, y, 690, 95, "rank")
        it.text(30, y + 25, f"rank {rank}", "start", "head")
        it.box(30, y + 38, 110, 40, "rows", f"rows {8 * rank}–{8 * rank + 7}")
        it.box(180, y + 38, 120, 40, "weights", "all weights")
        it.box(340, y + 38, 110, 40, "gradients", f"gradient g{rank}")
        it.box(580, y + 38, 110, 40, "weights", "same step")
        it.arrow(140, y + 58, 178, y + 58, "step")
        it.arrow(300, y + 58, 338, y + 58, "step")
        it.arrow(450, y + 58, 578, y + 58, "step")
        it.text(514, y + 50, "(g0 + g1) / 2", kind="note")
    it.arrow(395, 98, 395, 171)
    it.arrow(415, 173, 415, 100)
    it.text(428, 130, "all-reduce", "start", "head")
    return it


def sharded() -> Drawing:
    """FSDP: a slice of each block, gathered for as long as it is used."""
    it = Drawing("FSDP: each rank holds half of every block and gathers one block at a time", 420)
    heads = ("between steps", "forward, block 1", "backward, block 1", "step")
    notes = (
        "a slice of every weight and moment",
        "all-gather, compute, free",
        "all-gather again, reduce-scatter",
        "each rank its own slices",
    )
    for rank in range(2):
        it.text(336 + 220 * rank, 22, f"rank {rank}", kind="head")
        for block in range(3):
            it.text(276 + 220 * rank + 60 * block, 40, f"block {block}", kind="note")
    for phase, (head, note) in enumerate(zip(heads, notes, strict=True)):
        y = 45 + 92 * phase
        it.box(15, y, 690, 80, "rank")
        it.text(30, y + 34, head, "start", "head")
        it.text(30, y + 56, note, "start", "note")
        for rank in range(2):
            for block in range(3):
                x, used = 252 + 220 * rank + 60 * block, block == 1 and phase in (1, 2)
                for part in range(2):
                    held = part == rank or used
                    it.box(x + 24 * part, y + 14, 24, 22, "weights" if held else "empty")
                    reduced = phase == 3 or (phase == 2 and block > 0)
                    if reduced and part == rank:
                        it.box(x + 24 * part, y + 44, 24, 22, "gradients")
        if phase in (1, 2):
            it.arrow(428, y + 20, 470, y + 20)
            it.arrow(470, y + 32, 428, y + 32)
        if phase == 2:
            it.arrow(428, y + 50, 470, y + 50)
            it.arrow(470, y + 62, 428, y + 62)
    return it


def tensor() -> Drawing:
    """Tensor parallel: columns, then rows, then a sum."""
    it = Drawing("Tensor parallel: a column layer, a row layer, and an all-reduce", 260)
    for rank, y in enumerate((20, 140)):
        it.box(15, y, 690, 95, "rank")
        it.text(30, y + 25, f"rank {rank}", "start", "head")
        it.box(30, y + 38, 70, 40, "activations", "X")
        it.box(135, y + 38, 110, 40, "weights", f"columns A{rank}")
        it.box(280, y + 38, 90, 40, "activations", f"f(X A{rank})")
        it.box(405, y + 38, 90, 40, "weights", f"rows B{rank}")
        it.box(525, y + 38, 70, 40, "gradients", f"Y{rank}")
        it.box(635, y + 38, 55, 40, "activations", "Y")
        for x, to in ((100, 133), (245, 278), (370, 403), (495, 523), (595, 633)):
            it.arrow(x, y + 58, to, y + 58, "step")
    it.arrow(552, 100, 552, 176)
    it.arrow(570, 178, 570, 102)
    it.text(580, 132, "all-reduce: Y0 + Y1", "start")
    it.text(30, 132, "the same X on both", "start", "note")
    it.text(320, 132, "no message: half of the hidden units", kind="note")
    return it


def pipeline() -> Drawing:
    """Pipeline: three schedules as torch runs them."""
    kinds = (("gpipe", 1), ("1f1b", 1), ("zbv", 2))
    it = Drawing("Three pipeline schedules on two ranks with four micro-batches", 380)
    unit = 40.0  # pixels of a stage's forward pass
    for number, (kind, stages) in enumerate(kinds):
        y = 18 + 112 * number
        schedule = Schedule(kind, 2, stages)
        times, width = timetable(schedule, 4), unit / stages
        it.text(15, y + 14, kind, "start", "head")
        for rank in range(2):
            top = y + 24 + 36 * rank
            it.text(15, top + 20, f"rank {rank}", "start")
            it.box(70, top, max(end for _, end in times.values()) * width, 30, "empty")
        for (work, stage, micro_batch), (begin, end) in times.items():
            fill = {FORWARD: "activations", BACKWARD: "gradients"}.get(work, "weights")
            top = y + 24 + 36 * schedule.owner(stage)
            it.box(70 + begin * width, top, (end - begin) * width, 30, fill, str(micro_batch + 1))
    y = 354
    legend = (
        ("activations", "forward"),
        ("gradients", "backward"),
        ("weights", "gradients of weights, apart"),
        ("empty", "idle"),
    )
    x = 70.0
    for fill, text in legend:
        it.box(x, y, 18, 18, fill)
        it.text(x + 25, y + 14, text, "start", "note")
        x += 62 + 7 * len(text)
    return it


def context() -> Drawing:
    """Ring attention: who computes which pairs of chunks, in which hop."""
    ranks, cell = 4, 34
    chunks = 2 * ranks
    owner = {chunk: min(chunk, chunks - 1 - chunk) for chunk in range(chunks)}
    it = Drawing(
        "Balanced ring attention on four ranks: the hop in which each pair is computed", 372
    )
    left, top = 128, 60
    it.text(left + cell * chunks / 2, 26, "keys and values of chunk", kind="note")
    it.text(15, top - 12, "queries of", "start", "note")
    for query in range(chunks):
        y = top + cell * query
        it.text(left + cell * (query + 0.5), top - 10, str(query))
        it.text(left - 12, y + 22, f"chunk {query}, rank {owner[query]}", "end")
        for key in range(chunks):
            hop = (owner[query] - owner[key]) % ranks
            fill = RANKS[owner[query]] if key <= query else "empty"
            it.box(left + cell * key, y, cell, cell, fill, str(hop) if key <= query else "")
    x = left + cell * chunks + 70
    for rank in range(ranks):
        y = top + 70 * rank
        it.box(x, y, 150, 46, RANKS[rank], f"rank {rank}: {rank} and {chunks - 1 - rank}")
        if rank < ranks - 1:
            it.arrow(x + 75, y + 48, x + 75, y + 68)
    it.parts.append(
        f'<path class="message" d="M{x + 150} {top + 233}h22V{top + 23}h-19" '
        f'marker-end="url(#message)"/>'
    )
    it.text(x + 75, 40, "keys and values go round", kind="note")
    it.text(
        left,
        top + cell * chunks + 22,
        "in a cell: the hop in which it is computed",
        "start",
        "note",
    )
    return it


def experts() -> Drawing:
    """Expert parallel: tokens travel to their experts and back."""
    it = Drawing("Expert parallel: two all-to-alls bring tokens to their experts and back", 260)
    sent = (((0, 2), (1, 0)), ((3, 1), (2, 3)))  # experts of two tokens of each rank, by position
    for rank, y in enumerate((20, 140)):
        it.box(15, y, 690, 100, "rank")
        it.text(30, y + 25, f"rank {rank}", "start", "head")
        for token in range(2):
            top = y + 34 + 32 * token
            it.box(30, top, 90, 26, "rows", f"token {2 * rank + token}")
            it.box(600, top, 90, 26, "rows", f"token {2 * rank + token}")
            it.arrow(120, top + 13, 158, top + 13, "step")
        it.box(160, y + 34, 70, 58, "weights", "router")
        for expert in range(2):
            it.box(340, y + 34 + 32 * expert, 120, 26, "weights", f"expert {2 * rank + expert}")
    for rank in range(2):
        for token, experts_of_token in enumerate(sent[rank]):
            y = 20 + 120 * rank + 47 + 32 * token
            for expert in experts_of_token:
                to = 20 + 120 * (expert // 2) + 47 + 32 * (expert % 2)
                kind = "step" if expert // 2 == rank else "message"
                it.arrow(230, y, 338, to, kind)
                it.arrow(460, to, 598, y, kind)
    it.text(284, 16, "all-to-all", kind="note")
    it.text(530, 16, "all-to-all", kind="note")
    return it


def asynchronous() -> Drawing:
    """A parameter server: two workers, and how stale each gradient is."""
    it = Drawing("A parameter server with a fast and a slow worker", 250)
    lanes = {"worker 1": 40, "server": 120, "worker 2": 200}
    for name, y in lanes.items():
        it.text(15, y + 5, name, "start", "head")
    it.box(90, 102, 615, 36, "rank")
    # who, when it pulls and when it pushes, in pixels
    pulls = [("worker 1", 100 + 115 * n, 205 + 115 * n) for n in range(5)]
    pulls += [("worker 2", 100, 390), ("worker 2", 400, 690)]
    pushed = sorted(end for _, _, end in pulls)
    for worker, begin, end in pulls:
        y = lanes[worker]
        stale = sum(begin < moment < end for moment in pushed)
        above = worker == "worker 1"
        it.box(begin + 8, y - 16, end - begin - 16, 32, "activations", f"staleness {stale}")
        it.arrow(begin, 102 if above else 138, begin + 8, y + 16 if above else y - 16, "step")
        it.arrow(end - 8, y + 16 if above else y - 16, end, 100 if above else 140)
    for version, moment in enumerate(pushed, 1):
        it.text(moment + 3, 125, f"v{version}", "middle", "note")
    it.text(105, 125, "v0", "middle", "note")
    return it


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    each.__name__: each
    for each in (data, sharded, tensor, pipeline, context, experts, asynchronous)
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())
