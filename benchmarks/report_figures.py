"""The figures of the report. matplotlib is imported where one is drawn."""

from pathlib import Path
from typing import Any

Result = dict[str, Any]
OURS, PEER = "tab:blue", "tab:gray"
PEERS = ("tab:gray", "tab:orange", "tab:red", "tab:purple")


def _figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), constrained_layout=True)
    return plt, figure, axes


def draw_memory(result: Result, path: Path) -> None:
    """As the memory benchmark draws it."""
    from memory import plot

    plot(result["lines"], result["cache_bytes"], path)


def main_cold_case(result: Result) -> Result | None:
    """The cold case that the bars speak of: uniform rows of 512 bytes with every peer."""
    cold = [case for case in result["cases"] if case["kind"] == "cold" and case["distribution"] == "uniform"]
    cold = [case for case in cold if case["row_bytes"] == 512] or cold
    return max(cold, key=lambda case: len(case["ways"]), default=None)


def draw_gather(case: Result, path: Path) -> None:
    """Rows a second of each way, and the limit."""
    plt, figure, axes = _figure(8, 0.4 * len(case["ways"]) + 1)
    ways = sorted(case["ways"].items(), key=lambda item: item[1]["rows_per_second"])
    colors = [OURS if way["is_ours"] else PEER for _, way in ways]
    axes.barh([name for name, _ in ways], [way["rows_per_second"] for _, way in ways], color=colors)
    axes.axvline(case["limit_per_second"], color="black", linestyle=":", label=case["limit_is"])
    axes.set(xlabel="rows/s", xscale="log")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_train(result: Result, path: Path) -> None:
    """Milliseconds a step of ours and of every peer, at the largest batch; peers of one place differ by rule."""
    largest = max((line["batch"] for line in result["train"]), default=0)
    lines = [line for line in result["train"] if line["batch"] == largest]
    plt, figure, axes = _figure(max(6.0, 1.1 * len(lines) + 2), 4)
    width, labelled = 0.8 / max((len(line["seconds"]) for line in lines), default=1), set()
    for place, line in enumerate(lines):
        names = [line["ours"], *(name for name in line["seconds"] if name != line["ours"])]
        for number, name in enumerate(names):
            kind = "bigembed" if name == line["ours"] else _kind(name)
            label = None if kind in labelled else kind
            labelled.add(kind)
            color = OURS if kind == "bigembed" else PEERS[KINDS.index(kind)]
            axes.bar(place + number * width, 1e3 * line["seconds"][name], width, color=color, label=label)
    axes.set_xticks([place + 0.3 for place in range(len(lines))])
    axes.set_xticklabels([f"{line['rule']}\n{line['ids']}" for line in lines], fontsize="small")
    axes.set(ylabel=f"ms a step of {largest:,} ids", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


KINDS = ("nn.Embedding(sparse=True)", "FBGEMM CPU", "nn.Embedding, dense", "other")


def _kind(name: str) -> str:
    for kind, start in zip(KINDS, ("nn.Embedding + ", "FBGEMM", "nn.Embedding, dense"), strict=False):
        if name.startswith(start):
            return kind
    return KINDS[-1]


def draw_out_of_core(cases: list[Result], path: Path) -> None:
    """Ids a second of ours and of the mapped peer, case by case."""
    plt, figure, axes = _figure(max(6.0, 0.9 * len(cases) + 2), 4)
    places = range(len(cases))
    ours = [case["bigembed"]["ids_per_second"] for case in cases]
    peers = [case["mapped"]["ids_per_second"] for case in cases]
    axes.bar([place - 0.2 for place in places], ours, 0.4, color=OURS, label="bigembed")
    axes.bar([place + 0.2 for place in places], peers, 0.4, color=PEER, label="nn.Embedding over MADV_RANDOM maps")
    axes.set_xticks(list(places))
    labels = [f"{case['rule']}\n{case['ids']}\n{case['ratio']:g} x memory" for case in cases]
    axes.set_xticklabels(labels, fontsize="small")
    axes.set(ylabel="ids/s")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
