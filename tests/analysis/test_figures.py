"""Tables as figures: every value is drawn where it belongs, and what is missing is said."""

import io

import pytest

from normjax.analysis import figures

ROWS = [
    {"step": step, "map": name, "rms": step + place, "share": None if name == "head" else 0.5}
    for step in (0, 10, 20)
    for place, name in enumerate(("conv", "norm", "head"))
]


def test_lines_over_names_and_over_steps():
    depth, shares = figures.plot(ROWS, "map", ["rms", ("share", "rms")], by="step").axes
    assert [line.get_label() for line in depth.lines] == [f"rms, step {s}" for s in (0, 10, 20)]
    assert [line.get_ydata().tolist() for line in depth.lines] == [
        [0, 1, 2],
        [10, 11, 12],
        [20, 21, 22],
    ]
    styles = {(line.get_linestyle(), line.get_marker()) for line in depth.lines}
    assert len(styles) == 3, "also in grey"
    depth.figure.canvas.draw()
    names = [label.get_text() for label in depth.get_xticklabels()]
    assert names == ["conv", "norm", "head"]
    assert [len(line.get_ydata()) for line in shares.lines] == [2, 3] * 3, "None is left out"
    (steps,) = figures.plot(ROWS, "step", ["rms"], by="map").axes
    assert [line.get_xdata().tolist() for line in steps.lines] == [[0, 10, 20]] * 3
    assert steps.get_xlabel() == "step"


def test_one_line_without_by_and_a_field_without_any_value():
    head = [row for row in ROWS if row["map"] == "head"]
    figure = figures.plot(head, "step", ["rms", "share"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["rms"]
    assert len(figure.axes[1].lines[0].get_ydata()) == 0
    figure.savefig(io.BytesIO(), dpi=20)


@pytest.mark.parametrize(
    ("rows", "panels", "by"),
    [(ROWS, ["size"], None), (ROWS, ["rms"], "layer"), ([], ["rms"], None), (ROWS, [], None)],
)
def test_what_is_missing(rows, panels, by):
    with pytest.raises(ValueError, match="not all rows have the fields"):
        figures.plot(rows, "map", panels, by=by)
