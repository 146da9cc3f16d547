"""A mask from its text: an expression of masks, `Causal() & Window(64, 0)`, or `FILE.py:NAME`.

The expression is parsed, never evaluated: it may hold calls of the masks and of their class methods, numbers,
strings, lists, tuples, `&`, `|` and `~`, and nothing else has a meaning. A list becomes a tensor.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton

from ...parts.masks.algebra import AnyOf, Not
from ...parts.masks.block_causal import BlockCausal
from ...parts.masks.blocks import Blocks
from ...parts.masks.causal import Causal
from ...parts.masks.dense import Dense
from ...parts.masks.documents import Documents
from ...parts.masks.intervals import Intervals
from ...parts.masks.mask import Mask, as_mask
from ...parts.masks.neighborhood import Neighborhood
from ...parts.masks.padding import Padding
from ...parts.masks.prefix import Prefix
from ...parts.masks.window import Window
from ..doctor.maker import MakerError, load

MASKS: dict[str, type[Mask]] = {
    mask.__name__: mask
    for mask in (
        Causal, Window, Prefix, Padding, Documents, Intervals, BlockCausal, Neighborhood, Blocks, Dense,
        AnyOf, Not,
    )
}  # fmt: skip
PACKAGES = ("tw", "tilewise")  # what a name may be written behind
LONGEST = 1 << 22  # elements of a list
TOO_DEEP = "this is nested too deeply"
FILE = re.compile(r"(?P<file>[^()&|~]+\.py):(?P<name>\w+)")


class ExpressionError(ValueError):
    """The text is not a mask; the message says what was not understood, and where."""


def mask_from(text: str) -> Mask:
    """The mask that the text means. Raises ExpressionError."""
    text = " ".join(text.split())
    if named := FILE.fullmatch(text):
        return mask_of_file(text, named["file"], named["name"])
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        at = max((error.offset or 1) - 1, 0)
        raise ExpressionError(pointed(text, at, at + 1, f"this is not an expression: {error.msg}")) from None
    except (RecursionError, MemoryError):  # of Python's own parser
        raise ExpressionError(pointed(text, 0, len(text), TOO_DEEP)) from None
    reader = Reader(text)
    try:
        return reader.as_mask(tree, reader.value(tree))
    except RecursionError:
        raise ExpressionError(pointed(text, 0, len(text), TOO_DEEP)) from None


def mask_of_file(text: str, file: str, name: str) -> Mask:
    """The mask, or what `mask=` takes, that a file has under a name, or that its function of that name
    returns."""
    try:
        module = load(file)
    except MakerError as error:
        raise ExpressionError(f"{text}: {error}") from None
    if not hasattr(module, name):
        near = did_you_mean(name, [each for each in vars(module) if not each.startswith("_")])
        raise ExpressionError(f"{text}: {file} has no {name}{near}")
    found = getattr(module, name)
    if callable(found) and not isinstance(found, triton.runtime.KernelInterface):
        found = found()
    try:
        return as_mask(found)
    except ValueError as error:
        raise ExpressionError(f"{text}: {error}") from None


class Reader:
    """What the nodes of an expression mean."""

    def __init__(self, text: str) -> None:
        self.text = text

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.number(node.operand)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~self.as_mask(node.operand, self.value(node.operand))
        if isinstance(node, ast.List):
            return [self.value(each) for each in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple([self.value(each) for each in node.elts])
        if isinstance(node, ast.BinOp):
            return self.operation(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, (ast.Name, ast.Attribute)):
            self.callee(node)
            raise self.error(node, f"a mask is a call: {ast.unparse(node)}(...)")
        raise self.error(node, "only masks, numbers, strings, lists, &, | and ~ are understood here")

    def number(self, node: ast.expr) -> int | float:
        found = self.value(node)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self.error(node, "- stands before numbers alone")
        return found

    def operation(self, node: ast.BinOp) -> Any:
        """Masks are joined with & and |; lists with +, and repeated with *."""
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.BitAnd):
            return self.as_mask(node.left, left) & self.as_mask(node.right, right)
        if isinstance(node.op, ast.BitOr):
            return self.as_mask(node.left, left) | self.as_mask(node.right, right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return self.of_length(node, elements(left) + elements(right), lambda: left + right)
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and type(right) is int:
            return self.of_length(node, elements(left) * right, lambda: left * right)
        raise self.error(
            node, "masks are joined with & and |, lists with +, and a list is repeated with [0] * 20"
        )

    def of_length(self, node: ast.expr, length: int, made: Callable[[], list[Any]]) -> list[Any]:
        if length > LONGEST:
            raise self.error(node, f"this list would have {length} elements; {LONGEST} is the most")
        return made()

    def call(self, node: ast.Call) -> Mask:
        name, function = self.callee(node.func)
        arguments = [self.argument(each) for each in self.unstarred(node)]
        named = {each.arg or "": self.argument(each.value) for each in node.keywords}
        signature = inspect.signature(function)
        try:
            signature.bind(*arguments, **named)
        except TypeError as error:
            raise self.error(node, f"{name}({', '.join(signature.parameters)}): {error}") from None
        try:
            made = function(*arguments, **named)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self.error(node, f"{name}: {error}") from None
        assert isinstance(made, Mask)
        return made

    def argument(self, node: ast.expr) -> Any:
        """A value; a list as a tensor."""
        value = self.value(node)
        if not isinstance(value, list):
            return value
        try:
            return torch.tensor(value, device="cpu")
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise self.error(node, f"this list is no tensor: {error}") from None

    def unstarred(self, node: ast.Call) -> list[ast.expr]:
        for each in (*node.args, *(keyword.value for keyword in node.keywords if keyword.arg is None)):
            if isinstance(each, ast.Starred) or each not in node.args:
                raise self.error(each, "arguments are written out one by one here")
        return node.args

    def callee(self, node: ast.expr) -> tuple[str, Callable[..., Any]]:
        """The mask of this name, or its class method."""
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in PACKAGES:
                return node.attr, self.mask_class(node, node.attr)
            _, owner = self.callee(node.value)
            methods = class_methods(owner)
            if node.attr not in methods:
                owned = f"{ast.unparse(node.value)} has no class method {node.attr}"
                raise self.error(node, owned + did_you_mean(node.attr, methods))
            return f"{ast.unparse(node.value)}.{node.attr}", methods[node.attr]
        if isinstance(node, ast.Name):
            return node.id, self.mask_class(node, node.id)
        raise self.error(node, "only masks are called here: " + ", ".join(MASKS))

    def mask_class(self, node: ast.expr, name: str) -> type[Mask]:
        if name == "UserMask":
            raise self.error(node, "UserMask is made of functions: make it in a file, and give FILE.py:NAME")
        if name not in MASKS:
            raise self.error(node, f"there is no mask {name}{did_you_mean(name, MASKS)}")
        return MASKS[name]

    def as_mask(self, node: ast.expr, found: Any) -> Mask:
        """What an operand of &, | or ~ means; a list is a bool tensor."""
        if not isinstance(found, (Mask, list)):
            raise self.error(node, "a mask should stand here: " + ", ".join(f"{n}(...)" for n in MASKS))
        try:
            return as_mask(self.argument(node) if isinstance(found, list) else found)
        except ExpressionError:
            raise
        except ValueError as error:
            raise self.error(node, str(error)) from None

    def error(self, node: ast.expr, reason: str) -> ExpressionError:
        begin, end = (self.column(at) for at in (node.col_offset, node.end_col_offset or 0))
        return ExpressionError(pointed(self.text, begin, end, reason))

    def column(self, at: int) -> int:
        """A place in the text, of one in its bytes."""
        return len(self.text.encode()[:at].decode(errors="ignore"))


def elements(value: Any) -> int:
    """How many numbers a list would have as a tensor, lists in it alike."""
    return len(value) * max(1, elements(value[0])) if isinstance(value, list) and value else 1


def class_methods(owner: Any) -> dict[str, Callable[..., Any]]:
    """The public class methods of a mask, by name."""
    return {
        name: getattr(owner, name)
        for name, value in vars(owner).items()
        if isinstance(value, classmethod) and not name.startswith("_")
    }


def did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [
        each for each in known if each.lower() == name.lower()
    ]
    if near:
        return f": did you mean {near[0]}?"
    return f"; there is {', '.join(known)}" if known else ""


def pointed(text: str, begin: int, end: int, reason: str) -> str:
    """The reason, and the text with what it is about underlined; of a long text, the part around it."""
    start = max(0, begin - 30)
    shown = text[start : max(end, begin + 1) + 30][:100]
    marks = min(max(end - begin, 1), len(shown) - (begin - start) or 1)
    return f"{reason}\n  {shown}\n  {' ' * (begin - start)}{'^' * marks}"
