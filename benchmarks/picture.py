"""README's picture: what the plain way computes, and one packed row with its attention mask, as common.pack makes them.

python benchmarks/picture.py        # benchmarks/results/packed_row.png
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Encoded, pack, pack_padded  # noqa: E402

SPANS = [  # name, tokens, colour; a token's id is 100 * its span's number + its place there, and -1 is padding
    *(("template", 6, "#4c566a"), ("prompt A", 7, "#5e81ac"), ("A1", 4, "#a3be8c"), ("A2", 6, "#bf616a")),
    *(("A3", 5, "#d08770"), ("prompt B", 6, "#81a1c1"), ("B1", 5, "#a3be8c"), ("B2", 4, "#bf616a")),
]
NUMBER = {name: i for i, (name, *_) in enumerate(SPANS)}


def ids(*names):
    return [100 * NUMBER[name] + k for name in names for k in range(SPANS[NUMBER[name]][1])]


def draw(axes, tokens, y, height):
    """A row of tokens as coloured cells, the name of each span in its middle."""
    spans = [t // 100 for t in tokens]
    for x, span in enumerate(spans):
        colour = SPANS[span][2] if span >= 0 else "#eceff4"
        axes.add_patch(plt.Rectangle((x, y), 1, height, facecolor=colour, edgecolor="white", linewidth=0.8))
    for span in sorted(set(spans) - {-1}):
        middle = spans.index(span) + spans.count(span) / 2
        style = {"ha": "center", "va": "center", "color": "white", "fontsize": 8, "weight": "bold"}
        axes.text(middle, y + height / 2, SPANS[span][0], **style)


def main():
    responses = {"A": ["A1", "A2", "A3"], "B": ["B1", "B2"]}
    records = [
        Encoded(p, ids("template", f"prompt {p}"), [ids(r) for r in names], 0, 0) for p, names in responses.items()
    ]
    padded, packed = pack_padded(records, pad_id=-1).input_ids, pack(records)
    row, mask = packed.input_ids[0].tolist(), packed.attention_mask[0, 0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=[1, 1.9], layout="constrained")
    for y, tokens in enumerate(padded.tolist()):
        draw(left, tokens, y, 0.8)
    left.set(xlim=(0, padded.shape[1]), ylim=(padded.shape[0] + 3, -0.6))
    left.set_title(f"the plain way: {padded.numel()} positions, a softmax over each", fontsize=10)
    draw(right, row, -2.6, 1.6)
    for query, key in mask.nonzero().tolist():
        colour = SPANS[row[key] // 100][2]
        right.add_patch(plt.Rectangle((key, 0.42 * query), 1, 0.42, facecolor=colour, edgecolor="white", linewidth=0.3))
    right.set(xlim=(0, len(row)), ylim=(0.42 * len(row), -2.8))
    predicted = len(packed.targets)
    right.set_title(
        f"one packed row: {len(row)} positions, logits at {predicted}; below, what each token sees", fontsize=10
    )
    for axes in (left, right):
        axes.axis("off")
    path = ROOT / "benchmarks/results/packed_row.png"
    figure.savefig(path, dpi=110)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
