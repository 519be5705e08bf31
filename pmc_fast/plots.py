"""unlearning.png: what happened over the steps of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence


def plot_unlearning(path: str | os.PathLike[str], metrics: Sequence[dict]) -> None:
    """Draw the selected answers' score, and the collapse and retain loss, over the steps of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    score, loss = figure.subplots(2, 1, sharex=True)
    steps = [record["step"] for record in metrics]
    score.plot(steps, [record["score"] for record in metrics], color="#7b3294", linewidth=2)
    score.set(ylabel="score of the selected answers", ylim=(-0.02, None))
    score.set_title("What is left of the old answers in those trained on (0 is nothing)", fontsize=10, loc="left")
    loss.plot(steps, [record["collapse_loss"] for record in metrics], color="#d7601a", label="collapse", linewidth=2)
    loss.plot(steps, [record["retain_loss"] for record in metrics], color="#1a7f5a", label="retain", linewidth=2)
    loss.set(xlabel="optimizer step", ylabel="loss, nats per token", ylim=(0, None))
    loss.legend(frameon=False)
    for axes in (score, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
