"""tilewise as a kernel of Hugging Face's Hub: `python .ci/hub/make.py OUT` writes OUT/build/torch-cuda/ etc.

The library `kernels` imports such a folder under a name of its own, so that several versions live side by
side in one process. So what is copied imports nothing by an absolute name, which could be another copy:
tilewise's own modules, and those of the specification, which moves inside, are imported relatively. The ops
too get a namespace of their own, for a name in `torch.ops` has one owner, and an op decodes what it is
asked by the module paths of its own copy. The name is made of what the copy holds: the same files give the
same name.

Only what `import tilewise` reaches is copied. The result is read again before anything is written: whatever
is left of the old names, and every import that leads nowhere, or to what PyTorch and Triton do not bring, is
an error.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, REFERENCE = "tilewise", "tilewise_reference"
FOLDERS = {PACKAGE: ROOT / "kernels" / PACKAGE, REFERENCE: ROOT / "reference" / REFERENCE}
Node = ast.expr | ast.stmt
BACKENDS = ("cuda", "rocm", "cpu")  # on a CPU: plain PyTorch, or Triton's interpreter
DATA = ("plan/tile_table.json",)
VERSION = 1  # of the kernel on the Hub; raised when a call that worked no longer does
# numpy: Triton's interpreter is made of it. transformers: imported once it is asked for.
BROUGHT = {"torch", "triton", "numpy", "transformers", *sys.stdlib_module_names}


def main(out: Path) -> None:
    """Write the folders, in place of those that were there."""
    sources = there()
    for backend in BACKENDS:
        files, name = copies(backend, sources)
        folder = out / "build" / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        metadata = {
            "id": name, "name": PACKAGE, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        print(f"{folder}: {len(files)} files, {name}")


def copies(backend: str, sources: dict[str, str]) -> tuple[dict[str, bytes], str]:
    """Every file of a variant by its path, and the name of its namespace. Raises ValueError for what cannot
    be moved."""
    data = {path: (FOLDERS[PACKAGE] / path).read_bytes() for path in DATA}
    given = json.dumps([sorted(sources.items()), [*map(str, data.values())]])
    name = f"{PACKAGE}_{backend}_{hashlib.sha256(given.encode()).hexdigest()[:12]}"
    files = {path: moved_source(path, source, name).encode() for path, source in sources.items()}
    found = [said for path, content in files.items() for said in troubles(path, content.decode(), files)]
    if found:
        raise ValueError("; ".join(found))
    return files | data | {"LICENSE": (ROOT / "LICENSE").read_bytes()}, name


# ---- What is there


def there() -> dict[str, str]:
    """The source of every module that a variant has, by the path that it gets."""
    return {place(module, file): file.read_text(encoding="utf-8") for module, file in reached().items()}


def all_modules() -> dict[str, Path]:
    """The files of both packages by their modules' names."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        assert package in found
    return found


def reached() -> dict[str, Path]:
    """The modules that `import tilewise` reaches, also those that functions import when they are called."""
    modules, found, waiting = all_modules(), {}, [PACKAGE]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = file = modules[module]
        waiting += [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for name in imported(tree, package_of(module, file.name == "__init__.py")):
            if name in modules:
                waiting.append(name)
    return found


def package_of(module: str, is_package: bool) -> str:
    return module if is_package else module.rpartition(".")[0]


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module, and every name in one, that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def place(module: str, file: Path) -> str:
    """Where a file goes inside the variant: tilewise's own at its top, the specification in a folder."""
    package = module.partition(".")[0]
    path = file.relative_to(FOLDERS[package]).as_posix()
    return path if package == PACKAGE else f"{REFERENCE}/{path}"


# ---- What changes


def moved_source(path: str, source: str, name: str) -> str:
    """The source with relative imports and the ops' own namespace. path: where it goes."""
    depth = path.count("/") + 1  # dots to the top
    edits: list[tuple[Node, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(ours(alias.name) for alias in node.names):
            edits.append((node, relative_import(node, depth)))
        elif isinstance(node, ast.ImportFrom) and not node.level and ours(node.module or ""):
            edits.append((node, ast.unparse(at_top(node, depth))))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{PACKAGE}":
            edits.append((node, f"torch.ops.{name}"))
        elif isinstance(node, ast.Constant) and is_namespace(node):
            edits.append((node, repr(str(node.value).replace(PACKAGE, name, 1))))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.library.Library":
            edits.append((node.args[0], repr(name)))
    return edited(source, edits)


def ours(module: str) -> bool:
    return module.partition(".")[0] in FOLDERS


def is_namespace(node: ast.Constant) -> bool:
    """Whether it is a string that names one of tilewise's ops."""
    return bool(re.fullmatch(rf"{PACKAGE}::\w+", str(node.value)))


def relative_import(node: ast.Import, depth: int) -> str:
    """`import a.b as c` as a relative import that binds the same name."""
    if len(node.names) > 1:
        raise ValueError(f"{ast.unparse(node)!r}: write an import of tilewise's own in a line of its own")
    (alias,) = node.names
    parent, _, last = alias.name.rpartition(".")
    if parent and alias.asname is None:
        raise ValueError(f"{ast.unparse(node)!r} binds {parent.partition('.')[0]}: give it a name with `as`")
    if alias.name == PACKAGE:
        raise ValueError(f"{ast.unparse(node)!r}: a module cannot import the package that it is part of")
    return ast.unparse(at_top(ast.ImportFrom(parent, [ast.alias(last, alias.asname)], 0), depth))


def at_top(node: ast.ImportFrom, depth: int) -> ast.ImportFrom:
    """An absolute import of tilewise's own as one that starts at the top of the copy."""
    module = node.module or ""
    if module == PACKAGE or module.startswith(f"{PACKAGE}."):
        module = module.partition(".")[2]
    return ast.ImportFrom(module or None, node.names, depth)


def edited(source: str, edits: list[tuple[Node, str]]) -> str:
    """The source with the text of these nodes replaced."""
    text, starts = source.encode(), [0]
    for line in text.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    spans = [
        (starts[n.lineno - 1] + n.col_offset, starts[(n.end_lineno or 0) - 1] + (n.end_col_offset or 0), new)
        for n, new in edits
    ]
    for start, end, new in sorted(spans, reverse=True):
        text = text[:start] + new.encode() + text[end:]
    return text.decode()


# ---- What must be true of the result


def troubles(path: str, source: str, files: dict[str, bytes]) -> Iterator[str]:
    """What would break, or reach another copy, once the file is where it goes."""
    tree = ast.parse(source)
    module = ".".join(["top", *Path(path).with_suffix("").parts]).removesuffix(".__init__")
    package = package_of(module, path.endswith("__init__.py"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and is_namespace(node):
            yield f"{path}:{node.lineno} still names {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute) and node.attr == PACKAGE:
            if ast.unparse(node) == f"torch.ops.{PACKAGE}":
                yield f"{path}:{node.lineno} still uses torch.ops.{PACKAGE}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Library":
            if ast.unparse(node).startswith(f"torch.library.Library('{PACKAGE}'"):
                yield f"{path}:{node.lineno} still makes a library of {PACKAGE}"
        elif isinstance(node, ast.ImportFrom) and node.level:
            whole = resolve_name("." * node.level + (node.module or ""), package)
            missing = [a.name for a in node.names if node.module is None and not has(whole, a.name, files)]
            if missing or not exists(whole, files):
                yield f"{path}:{node.lineno} {ast.unparse(node)!r} leads nowhere"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            heads = {each.partition(".")[0] for each in imported(ast.Module([node], []), package)}
            if any(ours(head) for head in heads):
                yield f"{path}:{node.lineno} {ast.unparse(node)!r} reaches another copy"
            elif not heads <= BROUGHT and node not in set(deferred(tree)):
                yield f"{path}:{node.lineno} {ast.unparse(node)!r} is not brought by PyTorch or Triton"


def deferred(tree: ast.AST) -> Iterator[ast.AST]:
    """What does not run on import: inside functions, and what is there for types alone."""
    for node in ast.walk(tree):
        is_late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_late or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield from ast.walk(node)


def exists(module: str, files: dict[str, bytes]) -> bool:
    path = "/".join(module.split(".")[1:])
    return f"{path}.py" in files or f"{path}/__init__.py".lstrip("/") in files


def has(package: str, name: str, files: dict[str, bytes]) -> bool:
    """Whether a package has a module of this name, or binds the name itself."""
    init = files.get("/".join([*package.split(".")[1:], "__init__.py"]), b"").decode()
    return exists(f"{package}.{name}", files) or bool(re.search(rf"\b{re.escape(name)}\b", init))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/hub/make.py OUT")
    main(Path(sys.argv[1]))
