"""The stub of the binding says what the binding has: names, parameters, defaults."""

from __future__ import annotations

import ast
from pathlib import Path

import moec
import pytest
from moec import _moec

FOLDER = Path(moec.__file__).parent
STUB = ast.parse((FOLDER / "_moec.pyi").read_text())

# What every class has, and what nanobind adds.
PLAIN = set(dir(object)) | {"__module__", "__nb_signature__"}


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    out = {}
    for one in body:
        if isinstance(one, (ast.FunctionDef, ast.ClassDef)):
            out[one.name] = one
        elif isinstance(one, ast.AnnAssign):
            out[one.target.id] = one
    return out


def parameters(function: ast.FunctionDef) -> list[tuple[str, bool, str | None]]:
    """(name, whether by keyword only, default) of each."""
    a = function.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + list(a.defaults)
    pairs = [(arg, False, d) for arg, d in zip(a.args, defaults, strict=True)]
    pairs += [(arg, True, d) for arg, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return [(arg.arg, kw, d and ast.unparse(d)) for arg, kw, d in pairs if arg.arg != "self"]


def signature(function: object) -> list[tuple[str, bool, str | None]]:
    """The same of a function of the module, which writes its signature into its text."""
    line = function.__doc__.splitlines()[0]
    return parameters(ast.parse(f"def {line}: ...").body[0])


def test_names():
    public = {name for name in dir(_moec) if not name.startswith("_")}
    assert public == set(members(STUB.body))
    assert (FOLDER / "py.typed").exists()


@pytest.mark.parametrize("name", sorted(members(STUB.body)))
def test_members(name):
    stub, real = members(STUB.body)[name], getattr(_moec, name)
    if isinstance(stub, ast.AnnAssign):
        assert type(real).__name__ == ast.unparse(stub.annotation).partition("[")[0]
        return
    if isinstance(stub, ast.FunctionDef):
        assert parameters(stub) == signature(real)
        return
    said = members(stub.body)
    has = {n for n in vars(real) if n not in PLAIN or n in said}
    has -= {"__reduce__", "__repr__", "__doc__"}
    assert has == set(said) - {"__iter__"}  # Python iterates by __getitem__
    for member, one in said.items():
        if member in ("__iter__", "__getitem__", "__eq__"):
            continue
        found = vars(real)[member]
        is_property = isinstance(found, property) or type(found).__name__ == "nb_static_property"
        if isinstance(one, ast.FunctionDef) and not one.decorator_list:
            assert not is_property, member
            assert parameters(one) == signature(found), member
        else:
            assert is_property, member
            settable = isinstance(one, ast.AnnAssign)
            assert settable == (found.fset is not None), member
