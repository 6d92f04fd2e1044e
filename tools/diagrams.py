"""Draw the diagram of the system as SVG, once for light and once for dark pages.

    python tools/diagrams.py            # write nbs/images/system-light.svg and nbs/images/system-dark.svg
    python tools/diagrams.py --check    # exit 1 if the stored files differ from what this program draws

Plain Python, no library. Text stays text, so that it can be searched, read aloud and translated."""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "images"
WIDTH, HEIGHT = 1160, 494
LIGHT = {
    "paper": "#ffffff",
    "edge": "#d0d7de",
    "ink": "#1f2328",
    "soft": "#59636e",
    "line": "#59636e",
    "card": "#f6f8fa",
    "frozen": "#dfe6ee",
    "frozen_edge": "#7d8da1",
    "frozen_ink": "#33415a",
    "trained": "#ffe3c7",
    "trained_edge": "#e07b22",
    "trained_ink": "#6b3203",
    "gradient": "#cf4a0a",
    "loss": "#b3261e",
    "loss_fill": "#fdeceb",
    "sky": "#cfe3f7",
    "hill": "#6f9f70",
    "sun": "#f2b632",
    "outline": "#1f2328",
}
DARK = {
    "paper": "#0d1117",
    "edge": "#3d444d",
    "ink": "#f0f6fc",
    "soft": "#9198a1",
    "line": "#9198a1",
    "card": "#161b22",
    "frozen": "#242d3a",
    "frozen_edge": "#72849b",
    "frozen_ink": "#c6d2e1",
    "trained": "#4a2a0e",
    "trained_edge": "#f0883e",
    "trained_ink": "#ffd8b0",
    "gradient": "#ff9a57",
    "loss": "#ff8f86",
    "loss_fill": "#3a1614",
    "sky": "#274766",
    "hill": "#4f7d52",
    "sun": "#d9a032",
    "outline": "#05070a",
}
TITLE = "DreamLLM: one language model that reads and draws pictures"
DESCRIPTION = (
    "A document holds words, pictures and places where a picture is wanted. Its pictures pass through a frozen "
    "CLIP encoder and a trained projector; "
    "its words through the trained word embeddings; each wanted picture becomes learned vectors, the dream "
    "queries. One causal language model reads all of them. "
    "Its output for words gives the next word; the word loss is the cross-entropy. Its output at the dream "
    "queries passes through a trained projector and "
    "conditions a frozen U-Net, which removes noise from the latents of a picture; the picture loss is the "
    "squared error. A frozen VAE decodes the latents to a picture, "
    "and this picture is read again by CLIP before the text continues. In training, the gradient of the picture "
    "loss flows back through the frozen U-Net "
    "to the projector, the language model and the dream queries. CLIP, U-Net and VAE never change."
)


class Sheet:
    """A list of SVG elements and the colours they are drawn in."""

    def __init__(self, colours: dict[str, str]):
        self.colours, self.parts = colours, []

    def add(self, element: str, **attributes):
        body = attributes.pop("body", None)
        text = "".join(
            f' {name.replace("_", "-")}="{self.colours.get(value, value)}"' for name, value in attributes.items()
        )
        self.parts.append(f"<{element}{text}/>" if body is None else f"<{element}{text}>{body}</{element}>")

    def text(
        self,
        x: float,
        y: float,
        body: str,
        size: int = 17,
        fill: str = "ink",
        weight: str = "normal",
        anchor: str = "middle",
    ):
        body = body.replace("&", "&amp;").replace("<", "&lt;")
        self.add("text", x=x, y=y, font_size=size, fill=fill, font_weight=weight, text_anchor=anchor, body=body)

    def box(self, x: float, y: float, width: float, height: float, lines: list[str], kind: str):
        """A rounded box in the colours of `kind` ("frozen" or "trained"). Lines in `*stars*` are bold. A frozen box
        carries a lock."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=10, fill=kind, stroke=f"{kind}_edge", stroke_width=2)
        for i, line in enumerate(lines):
            bold = line.startswith("*")
            self.text(
                x + width / 2,
                y + 29 + 22 * i,
                line.strip("*"),
                18 if bold else 16,
                f"{kind}_ink",
                "bold" if bold else "normal",
            )
        if kind == "frozen":
            self.lock(x + width - 8, y + 3)

    def lock(self, x: float, y: float):
        """A padlock on a round badge with its middle at (x, y)."""
        self.add("circle", cx=x, cy=y, r=13, fill="frozen_edge", stroke="paper", stroke_width=2)
        self.add(
            "path", d=f"M{x - 3.5},{y - 1} v-2.5 a3.5,3.5 0 0 1 7,0 v2.5", fill="none", stroke="paper", stroke_width=1.8
        )
        self.add("rect", x=x - 5.5, y=y - 1, width=11, height=7.5, rx=1.5, fill="paper")

    def arrow(self, path: str, kind: str = "line", dash: str = "none", width: float = 2.2):
        self.add(
            "path",
            d=path,
            fill="none",
            stroke=kind,
            stroke_width=width,
            stroke_dasharray=dash,
            stroke_linejoin="round",
            marker_end=f"url(#{kind})",
        )

    def picture(self, x: float, y: float, size: float, outline: str = "none"):
        """A small landscape that stands for any picture, with or without outlines (another style)."""
        s = size / 64
        self.add("rect", x=x, y=y, width=size, height=size, rx=5, fill="sky", stroke="edge", stroke_width=1.5)
        self.add("circle", cx=x + 45 * s, cy=y + 18 * s, r=8 * s, fill="sun", stroke=outline, stroke_width=2)
        self.add(
            "path",
            d=f"M{x + 1},{y + 54 * s} L{x + 23 * s},{y + 25 * s} L{x + 37 * s},{y + 43 * s} "
              f"L{x + 45 * s},{y + 34 * s} L{x + size - 1},{y + 55 * s} "
            f"V{y + size - 5} a4,4 0 0 1 -4,4 H{x + 5} a4,4 0 0 1 -4,-4 z",
            fill="hill",
            stroke=outline,
            stroke_width=2,
        )

    def chip(self, x: float, y: float, width: float, body: str, kind: str):
        self.add("rect", x=x, y=y, width=width, height=32, rx=16, fill=f"{kind}_fill", stroke=kind, stroke_width=2)
        self.text(x + width / 2, y + 22, body, 17, kind, "bold")


READ, WORDS, DREAM = 118, 234, 322  # the height of each lane's forward arrows
BACK = 372  # the height of the gradient's way back through the lane of the dream queries


def draw_document(sheet: Sheet):
    """The card at the left: a picture, words, a place for a picture."""
    sheet.add("rect", x=12, y=76, width=164, height=324, rx=12, fill="card", stroke="edge", stroke_width=2)
    sheet.text(94, 64, "document", 18, weight="bold")
    sheet.text(50, READ + 6, "User:", 17)
    sheet.picture(84, 88, 72)
    for i, line in enumerate(("draw this in", "OpenMoji style.", "Assistant:")):
        sheet.text(94, 217 + 23 * i, line, 17)
    sheet.add(
        "rect",
        x=54,
        y=298,
        width=80,
        height=72,
        rx=6,
        fill="none",
        stroke="trained_edge",
        stroke_width=2,
        stroke_dasharray="6 5",
    )
    sheet.text(94, 340, "<dream>", 16, "trained_ink", "bold")


def draw_inputs(sheet: Sheet):
    """Three lanes from the document into the language model: pictures, words, dream queries."""
    sheet.box(214, 84, 118, 78, ["*CLIP*", "encodes"], "frozen")
    sheet.box(366, 84, 110, 78, ["*visual*", "*projector*"], "trained")
    sheet.arrow(f"M158,{READ} H212")
    sheet.arrow(f"M334,{READ} H364")
    sheet.arrow(f"M478,{READ} H512")
    sheet.box(262, 209, 190, 50, ["*word embeddings*"], "trained")
    sheet.arrow(f"M166,{WORDS} H260")
    sheet.arrow(f"M454,{WORDS} H512")
    sheet.box(262, 296, 190, 92, ["*dream queries*", "learned vectors"], "trained")
    for i in range(6):
        sheet.add("circle", cx=307 + 20 * i, cy=BACK, r=5.5, fill="trained_edge")
    sheet.arrow(f"M136,{DREAM} H260")
    sheet.arrow(f"M454,{DREAM} H512")


def draw_model(sheet: Sheet):
    """The language model and its two outputs."""
    sheet.box(514, 76, 130, 324, [], "trained")
    for y, body, size, weight in (
        (222, "language", 20, "bold"),
        (247, "model", 20, "bold"),
        (274, "one causal", 16, "normal"),
        (294, "transformer", 16, "normal"),
    ):
        sheet.text(579, y, body, size, "trained_ink", weight)
    sheet.arrow(f"M646,{READ} H684")
    sheet.text(692, READ + 6, "next token", 18, weight="bold", anchor="start")
    sheet.text(692, READ - 22, "a word or <dream>", 16, "soft", anchor="start")
    sheet.arrow(f"M792,{READ} H824")
    sheet.chip(826, READ - 16, 236, "word loss: cross-entropy", "loss")
    sheet.arrow(f"M646,{DREAM} H684")
    sheet.box(686, 296, 110, 92, ["*condition*", "*projector*"], "trained")
    sheet.arrow(f"M798,{DREAM} H834")


def draw_drawing(sheet: Sheet):
    """The frozen diffusion model, the picture, and the way back to the document."""
    sheet.box(836, 296, 110, 92, ["*U-Net*", "denoises"], "frozen")
    sheet.arrow(f"M948,{DREAM} H980")
    sheet.box(982, 296, 82, 92, ["*VAE*", "decodes"], "frozen")
    sheet.arrow(f"M1066,{DREAM} H1088")
    sheet.picture(1090, 291, 62, "outline")
    sheet.text(1121, 376, "picture", 17, weight="bold")
    sheet.text(886, 222, "to train: a real picture + noise", 16, "soft")
    sheet.text(886, 244, "to draw: noise", 16, "soft")
    sheet.arrow("M886,254 V294")
    sheet.arrow("M1121,289 V46 Q1121,34 1109,34 H285 Q273,34 273,46 V82")
    sheet.text(690, 23, "the new picture is read again, then the text continues", 16, "soft")
    sheet.arrow("M866,390 V420")
    sheet.chip(826, 422, 246, "picture loss: squared error", "loss")


def draw_gradient(sheet: Sheet):
    """The ways of the gradients: the picture loss's through the frozen U-Net, the word loss's through the language
    model."""
    for path in (
        f"M918,422 V{BACK} H800",
        f"M796,{BACK} H648",
        f"M644,{BACK} H456",
        f"M862,{READ + 18} V146 H648",
        "M644,146 H480",
    ):
        sheet.arrow(path, "gradient", "9 6", 3)
    sheet.text(
        808, 440, "the gradient passes through the frozen U-Net, back to the queries", 17, "gradient", "bold", "end"
    )


def draw_legend(sheet: Sheet):
    y = 468
    sheet.add("rect", x=14, y=y, width=28, height=18, rx=5, fill="frozen", stroke="frozen_edge", stroke_width=2)
    sheet.text(50, y + 15, "frozen, with a lock", 16, "soft", anchor="start")
    sheet.add("rect", x=232, y=y, width=28, height=18, rx=5, fill="trained", stroke="trained_edge", stroke_width=2)
    sheet.text(268, y + 15, "trained (language model and embeddings from stage 2 on)", 16, "soft", anchor="start")
    sheet.arrow(f"M790,{y + 9} H744", "gradient", "9 6", 3)
    sheet.text(800, y + 15, "gradient, in training", 16, "soft", anchor="start")


def diagram(colours: dict[str, str]) -> str:
    """The whole drawing as the text of an SVG file."""
    sheet = Sheet(colours)
    for draw in (draw_document, draw_inputs, draw_model, draw_drawing, draw_gradient, draw_legend):
        draw(sheet)
    heads = "".join(
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="{size}" markerHeight="{size}" '
        f'markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{colours[kind]}"/></marker>'
        for kind, size in (("line", 12), ("gradient", 15))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" '
        f'aria-labelledby="title description" font-family="Helvetica, Arial, sans-serif">\n'
        f'<title id="title">{TITLE}</title>\n<desc id="description">{DESCRIPTION}</desc>\n<defs>{heads}</defs>\n'
        + "\n".join(sheet.parts)
        + "\n</svg>\n"
    )


def main() -> int:
    wrong = []
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        path, text = FOLDER / f"system-{name}.svg", diagram(colours)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf8")
        elif not path.exists() or path.read_text(encoding="utf8") != text:
            wrong.append(f"{path.name} is not what tools/diagrams.py draws: run make diagrams")
    print("\n".join(wrong) or "system-light.svg, system-dark.svg")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
