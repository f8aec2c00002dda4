"""What is confused with what: by the vote, and by each unit.

Shapes: K classes, P panels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ff_lightning.drawing.figure import new_figure, short, small_multiples

NAMED = 40
"""So many classes have their names at the axes, half as many also numbers in the fields."""


def draw_confusion(confusion: Tensor, names: Sequence[str]) -> Any:
    """A field for each true class (row) and answer (column), coloured by its share of the row.

    Args:
        confusion: Numbers of samples (K, K), int64.
        names: Of the classes.
    """
    classes = len(confusion)
    side = max(4.5, min(12, 0.45 * classes))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    shares = _shares(confusion)
    field = _fields(axes, shares)
    _explain_colours(figure, field, axes)
    if 2 * classes <= NAMED:
        for i, j in confusion.nonzero().tolist():
            colour = "white" if shares[i, j] > 36 else "black"
            axes.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=7, color=colour)
    if classes <= NAMED:
        _name(axes, names, True, True, "medium")
    total = confusion.sum()
    axes.set(xlabel="answer", ylabel="true class", title=f"{_right(confusion):.2f} % of {total:,} samples are right")
    return figure


def draw_confusions(confusions: Tensor, titles: Sequence[str], names: Sequence[str]) -> Any:
    """The same for several units, a panel for each, with the pair that is confused most.

    Args:
        confusions: (P, K, K), int64.
        titles: Of the panels.
        names: Of the classes.
    """
    figure, every, columns = small_multiples(len(titles), 3.3)
    named = 2 * len(names) <= NAMED
    for number, (axes, title, confusion) in enumerate(zip(every, titles, confusions, strict=True)):
        shares = _shares(confusion)
        field = _fields(axes, shares)
        axes.set_title(f"{title}: {_right(confusion):.1f} %", fontsize="small")
        wrong = shares.clone().fill_diagonal_(0)
        true, answer = divmod(int(wrong.argmax()), len(names))
        pair = f"{short(names[true])} → {short(names[answer])}: {wrong.max():.0f} %" if wrong.any() else ""
        if named:
            _name(axes, names, number % columns == 0, number + columns >= len(titles), "x-small")
        else:
            axes.set(xticks=[], yticks=[])
        axes.set_xlabel(pair, fontsize="small")
    _explain_colours(figure, field, every)
    figure.supylabel("true class", fontsize="small")
    figure.supxlabel("answer, and the pair that is confused most", fontsize="small")
    return figure


def _shares(confusion: Tensor) -> Tensor:
    return 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)


def _right(confusion: Tensor) -> float:
    return (100 * confusion.diag().sum() / confusion.sum().clamp_min(1)).item()


def _fields(axes: Any, shares: Tensor) -> Any:
    return axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=10)  # the root: mistakes are few, and seen


def _explain_colours(figure: Any, field: Any, axes: Any) -> None:
    bar = figure.colorbar(field, ax=axes, ticks=[0, 1, 10**0.5, 5, 10], label="% of the true class", shrink=0.8)
    bar.ax.set_yticklabels(["0", "1", "10", "25", "100"])


def _name(axes: Any, names: Sequence[str], at_rows: bool, at_columns: bool, size: str) -> None:
    texts = [short(name) for name in names]
    nothing: list[str] = [""] * len(texts)
    turned = 0 if max(map(len, texts)) < 3 else 90
    axes.set_xticks(range(len(texts)), texts if at_columns else nothing, rotation=turned)
    axes.set_yticks(range(len(texts)), texts if at_rows else nothing)
    axes.tick_params(labelsize=size)
