"""The reference: a page of Markdown for each public module, made of its docstrings without importing it.

A module is public if it has an `__all__`, and so are the names in that; nothing else is on these pages. A name has its
description in the module that defines it, if that is public, and otherwise where it is
imported to; all other modules link to it.
"""

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import griffe

from .markdown import anchors_of, outside_code, prose_of

_WIDE: Final = 88
_SECTION: Final = re.compile(
    r"(?:^|[.:] )(?:Args|Attributes|Returns|Raises|Yields|Examples?|Notes?|Warnings?):[ \t]*$", re.MULTILINE
)
_DUNDERS: Final = ("__aiter__", "__iter__", "__call__")


@dataclass(frozen=True, slots=True)
class Module:
    """A public module: its dotted path, the file of its page, and its names, each with the page that describes it."""

    path: str
    page: str
    homes: Mapping[str, str]


def public_modules(source: Path) -> list[Module]:
    """Give the public modules of the package that is in a directory."""
    modules = _public(_loaded(source))
    return [_module_of(module, modules) for module in modules.values()]


def reference_pages(source: Path) -> dict[str, str]:
    """Give the pages of the reference, by the names of their files.

    Raises SystemExit naming what is public and has no docstring.
    """
    modules = _public(_loaded(source))
    described = [_module_of(module, modules) for module in modules.values()]
    missing = [f"{path}.{name}" for path, module in modules.items() for name in _names(module) if not _text(module[name])]
    if missing:
        raise SystemExit(f"public, and without a docstring: {', '.join(missing)}")
    texts = {module.page: _page(modules[module.path], module) for module in described}
    anchors = {page: {words: anchor for anchor, words in anchors_of(text).items()} for page, text in texts.items()}
    # A class is linked wherever it is named; what has a name in lower case, such as `stop`, in its own module only.
    classes = {name: home for module in reversed(described) for name, home in module.homes.items() if name[0].isupper()}
    return {
        module.page: _linked(
            texts[module.page],
            {name: f"{home}#{anchors[home][name]}" for name, home in {**classes, **module.homes}.items()},
            module.page,
        )
        for module in described
    }


@lru_cache(maxsize=1)
def _loaded(source: Path) -> griffe.Module:
    package = griffe.load("streamkeep", search_paths=[source], docstring_parser="google", resolve_aliases=True)
    assert isinstance(package, griffe.Module)
    return package


def _public(module: griffe.Module) -> dict[str, griffe.Module]:
    found = {module.path: module} if module.exports is not None else {}
    for name, inner in sorted(module.modules.items()):
        if not name.startswith("_") and not inner.is_alias:
            found |= _public(inner)
    return found


def _module_of(module: griffe.Module, modules: Mapping[str, griffe.Module]) -> Module:
    homes = {}
    for name in _names(module):
        defined_in = module[name].canonical_path.rpartition(".")[0]
        # Where a name is not defined in a public module, the one with the shortest path that has it describes it.
        has = [path for path in sorted(modules, key=len) if _describes(modules[path], name, module[name].canonical_path)]
        homes[name] = _file_of(defined_in if defined_in in has else has[0])
    return Module(module.path, _file_of(module.path), homes)


def _describes(module: griffe.Module, name: str, canonical: str) -> bool:
    return name in _names(module) and module[name].canonical_path == canonical


def _file_of(path: str) -> str:
    return f"{path}.md"


def _names(module: griffe.Module) -> list[str]:
    return sorted((str(name) for name in module.exports or ()), key=lambda name: (name.lower(), name))


def _page(module: griffe.Module, public: Module) -> str:
    here = [name for name, home in public.homes.items() if home == public.page]
    elsewhere = [name for name in public.homes if name not in here]
    parts = [f"# {module.path}", _prose(module)]
    if elsewhere:
        parts.append("Described on other pages: " + ", ".join(f"`{name}`" for name in elsewhere) + ".")
    for name in here:
        parts += _described(name, _final(module[name]), here)
    return "\n\n".join(part for part in parts if part) + "\n"


def _final(member: griffe.Object | griffe.Alias) -> griffe.Object:
    return member.final_target if isinstance(member, griffe.Alias) else member


def _described(name: str, what: griffe.Object, described: Collection[str]) -> Iterator[str]:
    yield f"## {name}"
    match what:
        case griffe.Class():
            yield from _class(name, what, described)
        case griffe.Function():
            yield from _function(name, what)
        case griffe.Attribute():
            yield _fence([f"{name} = {what.value}" if what.value is not None else f"{name}: {what.annotation}"])
            yield _prose(what)
        case _:
            raise TypeError(f"{what.path} is neither a class, a function nor a value")


def _class(name: str, shown: griffe.Class, described: Collection[str]) -> Iterator[str]:
    bases = [str(base) for base in shown.bases if not str(base).startswith("_")]
    yield _fence([f"class {name}({', '.join(bases)})" if bases else f"class {name}"])
    yield _prose(shown)
    shared = [base for base in shown.mro() if base.name in described]
    if shared:
        yield "It has all that " + ", ".join(f"`{base.name}`" for base in shared) + " has."
    members = {
        inner: _final(member)
        for inner, member in shown.all_members.items()
        if _is_shown(inner, member) and not any(inner in base.members for base in shared if inner not in shown.members)
    }
    made = shown.all_members.get("__init__")
    made_by = None if made is None else _final(made)
    if isinstance(made_by, griffe.Function) and _is_ours(made_by) and not _is_error(shown):
        yield _fence(_signature(name, made_by, define="", skip_self=True))
    listed = _listed(shown)
    values = {
        inner: member for inner, member in members.items() if isinstance(member, griffe.Attribute) and inner not in listed
    }
    if values:
        yield "\n".join(_value(inner, value) for inner, value in values.items())
    functions = {inner: member for inner, member in members.items() if isinstance(member, griffe.Function)}
    tests = [inner for inner in functions if inner.startswith("test_")]
    for inner, function in functions.items():
        if inner not in tests:
            yield f"### {name}.{inner}"
            yield from _function(inner, function)
    if tests:
        yield f"Its {len(tests)} tests:"
        yield "\n".join(f"- `{test}`" for test in tests)


def _listed(shown: griffe.Class) -> set[str]:
    """Give the attributes that the docstring of a class describes."""
    sections = [] if shown.docstring is None else shown.docstring.parse("google", warnings=False)
    lists = [section for section in sections if isinstance(section, griffe.DocstringSectionAttributes)]
    return {item.name for section in lists for item in section.value}


def _is_ours(member: griffe.Object) -> bool:
    return member.package.name == "streamkeep"


def _is_error(shown: griffe.Class) -> bool:
    return shown.name.endswith("Error")


def _is_shown(name: str, member: griffe.Object | griffe.Alias) -> bool:
    if name.startswith("_") and name not in _DUNDERS:
        return False
    final = _final(member)
    return _is_ours(final) and not isinstance(final, griffe.Class | griffe.TypeAlias) and "unused" not in final.labels


def _value(name: str, value: griffe.Attribute) -> str:
    annotation = re.sub(r"^Final(\[(.*)\])?$", r"\2", str(value.annotation or ""))
    kind = f": `{annotation}`" if annotation else ""
    text = " ".join(_text(value).split())
    return f"- `{name}`{kind}" + (f" – {text}" if text else "")


def _function(name: str, function: griffe.Function) -> Iterator[str]:
    shown = function.overloads or [function]
    define = "async def " if "async" in function.labels else "def "
    lines = [line for overload in shown for line in _signature(name, overload, define=define)]
    yield _fence([*_decorated(function), *lines])
    yield _prose(function)


def _decorated(function: griffe.Function) -> Iterator[str]:
    for label in ("classmethod", "staticmethod"):
        if label in function.labels:
            yield f"@{label}"


def _signature(name: str, function: griffe.Function, *, define: str, skip_self: bool = True) -> list[str]:
    parameters = list(function.parameters)
    if skip_self and parameters and parameters[0].name in {"self", "cls"}:
        del parameters[0]
    written = list(_parameters(parameters))
    returns = f" -> {function.returns}" if define and function.returns is not None else ""
    line = f"{define}{name}({', '.join(written)}){returns}"
    if len(line) <= _WIDE:
        return [line]
    return [f"{define}{name}(", *[f"    {parameter}," for parameter in written], f"){returns}"]


def _parameters(parameters: list[griffe.Parameter]) -> Iterator[str]:
    kinds = griffe.ParameterKind
    starred = False
    for number, parameter in enumerate(parameters):
        match parameter.kind:
            case kinds.var_positional:
                star, starred = "*", True
            case kinds.var_keyword:
                star = "**"
            case kinds.keyword_only if not starred:
                yield "*"
                star, starred = "", True
            case _:
                star = ""
        annotation = "" if parameter.annotation is None else f": {parameter.annotation}"
        equals = " = " if annotation else "="
        # griffe gives `()` and `{}` as what collects the rest.
        default = "" if parameter.default is None or star else f"{equals}{parameter.default}"
        yield f"{star}{parameter.name}{annotation}{default}"
        if parameter.kind is kinds.positional_only and (
            number + 1 == len(parameters) or parameters[number + 1].kind is not kinds.positional_only
        ):
            yield "/"


def _fence(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _text(member: griffe.Object | griffe.Alias) -> str:
    return "" if member.docstring is None else member.docstring.value


def _prose(member: griffe.Object) -> str:
    """Give a docstring as Markdown: what is indented in it is code, and `Args:` and `Attributes:` are lists."""
    if member.docstring is None:
        return ""
    parts = []
    for section in member.docstring.parse("google", warnings=False):
        match section:
            case griffe.DocstringSectionText():
                text = _fenced(section.value).strip("\n")
                if lost := _lost_in(text):
                    raise TypeError(f"{member.path}: its docstring has in prose what is code, or begins a section: {lost}")
                parts.append(text)
            case griffe.DocstringSectionParameters() | griffe.DocstringSectionAttributes():
                parts.append("Parameters:" if isinstance(section, griffe.DocstringSectionParameters) else "Attributes:")
                parts.append("\n".join(f"- `{item.name}`: {' '.join(item.description.split())}" for item in section.value))
            case _:
                raise TypeError(f"{member.path}: a section of its docstring is {section.kind.value}, which no page shows yet")
    return "\n\n".join(parts)


def _lost_in(text: str) -> str:
    """Give what of a docstring a page would show as prose and is not: code that is not indented, a section that is not set apart."""
    paragraphs = re.split(r"\n\s*\n", prose_of(text))
    sections = [paragraph for paragraph in paragraphs if _SECTION.search(paragraph)]
    return next(iter([*sections, *filter(_is_code, paragraphs)]), "")


def _is_code(paragraph: str) -> bool:
    try:
        statements = ast.parse(paragraph).body
    except SyntaxError:
        return False
    return any(
        not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call | ast.Await) for statement in statements
    )


def _fenced(text: str) -> str:
    """Make code that is indented into fences, in the language that it is in."""

    def fence(code: re.Match[str]) -> str:
        block = re.sub(r"^ {4}", "", code[0].strip("\n"), flags=re.MULTILINE)
        return f"```{_language(block)}\n{block.rstrip()}\n```\n\n"

    return re.sub(r"(?:(?<=\n\n)|\A)(?: {4}.*(?:\n+|\Z))+", fence, text)


def _language(block: str) -> str:
    for wrapped in (block, "async def shown():\n" + re.sub("^", "    ", block, flags=re.MULTILINE)):
        try:
            ast.parse(wrapped)
        except SyntaxError:
            continue
        return "python"
    return "text"


def _linked(page: str, places: Mapping[str, str], here: str) -> str:
    """Make each public name that stands between backticks in prose a link to its description."""

    def link(code: re.Match[str]) -> str:
        name = code[1].removesuffix("()").rpartition(".")[2]
        place = places.get(name)
        return code[0] if place is None else f"[{code[0]}]({place.removeprefix(here)})"

    def prose(text: str) -> str:
        return "\n".join(
            line
            if line.startswith("#")
            else re.sub(r"(?<!\[)`((?:streamkeep\.[a-z_.]+)?[A-Za-z_]\w+(?:\(\))?)`(?!\])", link, line)
            for line in text.split("\n")
        )

    return outside_code(page, prose)
