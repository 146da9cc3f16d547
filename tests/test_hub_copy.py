"""What `.ci/hub/make.py` copies, and how: the names and the files of a kernel of Hugging Face's Hub, and what
stops it from being written."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = runpy.run_path(str(ROOT / ".ci/hub/make.py"))


def test_the_same_files_give_the_same_name_and_each_backend_its_own(tmp_path):
    MAKE["main"](tmp_path)
    again, name_again = MAKE["copies"]("rocm", MAKE["there"]())
    names = set()
    for backend in MAKE["BACKENDS"]:
        folder = tmp_path / "build" / f"torch-{backend}"
        some = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        metadata = json.loads(some[Path("metadata.json")])
        if backend == "rocm":
            copied = {str(path): content for path, content in some.items() if path.name != "metadata.json"}
            assert (copied, metadata["id"]) == (again, name_again)
        assert metadata["backend"] == {"type": backend} and metadata["name"] == "tilewise"
        assert Path("plan/tile_table.json") in some and Path("LICENSE") in some
        assert Path("demo/command.py") not in some and Path("cli.py") not in some
        names.add(metadata["id"])
    assert len(names) == len(MAKE["BACKENDS"])


FILES = {"__init__.py": b"", "api.py": b"x = 1\n", "parts/__init__.py": b"", "parts/shape.py": b""}
BROKEN = [
    ("import tilewise_reference", "reaches another copy"),
    ("def late():\n    from tilewise.api import x", "reaches another copy"),
    ("from ..api import x, y\nfrom ..nothing import x", "'from ..nothing import x' leads nowhere"),
    ("from . import nothing", "leads nowhere"),
    ("from ....api import x", "beyond top-level package"),
    ("import einops", "is not brought by PyTorch or Triton"),
    ("op = torch.ops.tilewise.attention_forward", "still uses torch.ops.tilewise"),
    ('mine = torch.library.Library("tilewise", "FRAGMENT")', "still makes a library of tilewise"),
    ("register('tilewise::attention_forward')", "still names 'tilewise::attention_forward'"),
]
FINE = [
    "from ..api import x",
    "from .. import api",
    "from . import shape as s",
    "import torch.library",
    "import re",
    "def late():\n    import einops",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import einops",
    "'''The op `tilewise::attention_forward`.'''",
]


def troubles(source: str) -> list[str]:
    try:
        return list(MAKE["troubles"]("parts/broken.py", source, FILES | {"parts/broken.py": source.encode()}))
    except ImportError as error:
        return [str(error)]


@pytest.mark.parametrize(("source", "said"), BROKEN)
def test_what_would_break_is_found(source, said):
    (found,) = troubles(source)
    assert said in found


@pytest.mark.parametrize("source", FINE)
def test_what_works_is_let_through(source):
    assert troubles(source) == []


MOVED = [
    ("import tilewise_reference", "from .. import tilewise_reference"),
    ("import tilewise_reference.scores as dense", "from ..tilewise_reference import scores as dense"),
    (
        "from tilewise_reference.scores import (\n    a,\n    b as c,\n)",
        "from ..tilewise_reference.scores import a, b as c",
    ),
    ("if x:\n    from tilewise.tools.doctor import doctor", "if x:\n    from ..tools.doctor import doctor"),
    ("from tilewise import cli  # ∑", "from .. import cli  # ∑"),
    ("o = 'Σ'; torch.ops.tilewise.f(1)", "o = 'Σ'; torch.ops.NAME.f(1)"),
    ("l = torch.library.Library('tilewise', 'FRAGMENT')", "l = torch.library.Library('NAME', 'FRAGMENT')"),
    ('register("tilewise::f", lib=l)', "register('NAME::f', lib=l)"),
    ("from ..api import x  # tilewise", "from ..api import x  # tilewise"),
    ('"give tilewise.Causal()"', '"give tilewise.Causal()"'),
]


@pytest.mark.parametrize(("source", "wanted"), MOVED)
def test_a_moved_module(source, wanted):
    assert MAKE["moved_source"]("parts/broken.py", source, "NAME") == wanted


@pytest.mark.parametrize(
    "source", ["import tilewise", "import tilewise.api", "import tilewise_reference, torch"]
)
def test_what_cannot_be_moved_says_so(source):
    with pytest.raises(ValueError, match=source.split(",")[0].replace(".", r"\.")):
        MAKE["moved_source"]("parts/broken.py", source, "NAME")
