"""What is made from the rungs: the notebook of them all, and the table in docs/ladder.md.

    python examples/ladder/build.py              # writes both
    python examples/ladder/build.py --run        # runs the notebook, as CI does, and writes nothing

The notebook needs `pip install 'tilewise[notebook]'`.
"""

import argparse
import ast
import sys
from pathlib import Path

import ladder

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "ladder.ipynb"
PAGE = HERE.parents[1] / "docs" / "ladder.md"
BEGIN, END = "<!-- counted:begin -->\n", "<!-- counted:end -->\n"
INTRODUCTION = """\
# The ladder

Nine steps from attention in three lines of PyTorch to a kernel with warp roles. This notebook is made from
the files beside it by `build.py`; start it in their folder. Without a GPU its kernels run in Triton's
interpreter, where all that is said about bytes and FLOPs is counted."""
COLUMNS = (
    "rung", "memory, bytes", "grows by", "asked for, bytes", "FLOPs in products", "multiplications",
    "exponentials",
)  # fmt: skip
ALSO = {
    7: "forward and backward",
    8: f"1 query, {8 * ladder.SIZES[1]} keys",
}  # what else is counted than O of N


def rungs() -> list[Path]:
    """The files, in order."""
    return sorted(HERE.glob("0*.py"))


def cells(file: Path) -> list[tuple[str, str]]:
    """The kind and the text of a rung's cells: what it is about, its code, and its run."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    doc, body = ast.get_docstring(tree, clean=False) or "", tree.body[1:-1]  # without `if __name__ == ...`
    lines = text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    title, _, about = doc.partition("\n")
    code = f"__doc__ = {title!r}\n\n" + "\n".join(lines)
    return [
        ("markdown", f"## {title}\n\n```text\n{about.strip()}\n```"),
        ("code", code),
        ("code", "_ = main()"),
    ]


def all_cells() -> list[tuple[str, str]]:
    """Those of the whole notebook."""
    return [("markdown", INTRODUCTION), *(cell for file in rungs() for cell in cells(file))]


def notebook():
    """The notebook, not yet run."""
    import nbformat

    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = [new[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(all_cells())]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec})


def run() -> None:
    """Run the notebook that is there, in its folder, and print what it prints.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbclient
    import nbformat

    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            print(output.get("text", ""), end="")


def table() -> str:
    """What each rung counts at the larger size, in Markdown."""
    rows = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1)]
    for number, file in enumerate(rungs(), 1):
        link = f"[{file.stem}](../examples/ladder/{file.name})" + (
            f", {ALSO[number]}" if number in ALSO else ""
        )
        counts = ladder.counts_of(number)
        if not isinstance(counts[0], ladder.Counts):  # on paper
            rows.append((link, *["–"] * (len(COLUMNS) - 1)))
            continue
        small, large = counts
        numbers = (large.asked, large.matmul, large.multiplications, large.exponentials)
        grows = f"× {large.memory / small.memory:.1f}"
        rows.append((link, f"{large.memory:,}", grows, *(f"{number:,}" for number in numbers)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """docs/ladder.md with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--run", action="store_true", help="run the notebook that is there, and write nothing"
    )
    try:
        if parser.parse_args().run:
            run()
        else:
            import nbformat

            nbformat.write(notebook(), NOTEBOOK)
            PAGE.write_text(page(), encoding="utf-8")
    except ModuleNotFoundError as missing:
        if missing.name not in {"nbformat", "nbclient", "ipykernel"}:
            raise
        sys.exit(f"ladder: {missing.name} is not installed: pip install 'tilewise[notebook]'")
