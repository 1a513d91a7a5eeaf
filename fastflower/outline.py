"""A function's signature and docstring, read from its source: importing its module takes seconds, because of torch."""

import ast
import builtins
from collections.abc import Container
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from typing import cast


class Outline:
    """A function without its body, for `inspect.signature`."""

    def __init__(self, module: str, name: str, but: Container[str] = ()) -> None:
        """Read a function. but  Parameters whose annotations are not evaluated."""
        names = _Names(module)
        function = next(node for node in names.tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        args = function.args
        absent = [None] * (len(args.args) - len(args.defaults))
        kinds = [Parameter.POSITIONAL_OR_KEYWORD] * len(args.args) + [Parameter.KEYWORD_ONLY] * len(args.kwonlyargs)
        defaults = [*absent, *args.defaults, *args.kw_defaults]
        self.__doc__ = ast.get_docstring(function)
        self.__signature__ = Signature(
            [
                Parameter(
                    arg.arg,
                    kind,
                    default=names.value(default) if default else Parameter.empty,
                    annotation=names.value(arg.annotation) if arg.annotation and arg.arg not in but else object,
                )
                for arg, kind, default in zip([*args.args, *args.kwonlyargs], kinds, defaults, strict=True)
            ]
        )

    def __call__(self) -> None:
        """Do nothing: it only has a signature."""


class _Names(dict[str, object]):
    """The names of a module, each evaluated when it is needed. Other modules of fastflower are read in the same way."""

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        self.tree = ast.parse(Path(cast("str", spec and spec.origin)).read_text(encoding="utf-8"))

    def value(self, expression: ast.expr) -> object:
        return eval(compile(ast.Expression(expression), "", "eval"), {}, self)

    def __missing__(self, name: str) -> object:
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
                module = cast("str", node.module)
                return (
                    _Names(module)[name] if module.startswith("fastflower.") else getattr(import_module(module), name)
                )
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return self.value(node.value)
        return getattr(builtins, name)
