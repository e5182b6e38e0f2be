"""
Parses the PTX text that nvcc emits.

Debug directives (`.loc`, `.file`, `.pragma`) are skipped. Anything else that is not understood raises [`PtxError`]
with its line: directives here, instructions when they are decoded (`decoding.py`). A kernel is parsed when it is
first asked for, since a module may hold hundreds of thousands of lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .ptx import (
    BYTES_OF_TYPE,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Operand,
    PtxError,
    Register,
    Symbol,
    Variable,
    Vector,
)


_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(?P<space>shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)(?P<array>(?:\[\d*\])*)\s*(?:=\s*(?P<value>.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{]*)\{", re.DOTALL)
_LABEL = re.compile(r"([$\w]+):(?!:)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SKIPPED_LINE = re.compile(r"\.(?:loc|file)\b[^\n]*")


class Module(Mapping[str, Kernel]):
    """
    The kernels of a PTX text by their mangled names.

    Args:
        text (`str`):
            What `nvcc -ptx` writes.

    Raises:
        PtxError: at a directive or operand that is not understood; the message has the line.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._parsed: dict[str, Kernel] = {}
        self._entries: dict[str, tuple[re.Match[str], int]] = {}
        self._variables: dict[str, Variable] = {}
        end = 0
        for match in _ENTRY.finditer(text):
            self._variables |= _parse_module_variables(text[end : match.start()])
            end = _end_of_body(text, match.end())
            self._entries[match[1]] = match, end

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._parsed:
            match, end = self._entries[name]
            self._parsed[name] = self._parse(match, end)
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _parse(self, match: re.Match[str], end: int) -> Kernel:
        kernel = Kernel(match[1], variables=dict(self._variables))
        _parse_parameters(_without_comments(match[2] or ""), kernel)
        if threads := re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", match[3]):
            kernel.max_threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        first_line = self._text.count("\n", 0, match.end()) + 1
        _BodyParser(kernel, _without_comments(self._text[match.end() : end]), first_line).parse()
        return kernel


def _without_comments(text: str) -> str:
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _parse_module_variables(text: str) -> dict[str, Variable]:
    statements = (" ".join(statement.split()) for statement in _without_comments(text).split(";"))
    variables = [_parse_variable(statement) for statement in statements if _VARIABLE.search(statement)]
    return {variable.name: variable for variable in variables}


def _parse_variable(statement: str) -> Variable:
    match = _VARIABLE.search(statement)
    if match is None:
        raise PtxError(f"Variable not understood: {statement!r}. A space, a type and a name are expected.")
    element = BYTES_OF_TYPE[match["type"]]
    dimensions = re.findall(r"\[(\d*)\]", match["array"])
    size: int | None = element
    for dimension in dimensions:
        size = None if size is None or not dimension else size * int(dimension)
    values = [int(value, 0) for value in re.findall(r"-?\b(?:0[xX][0-9a-fA-F]+|\d+)\b", match["value"] or "")]
    initial = b"".join((value % (1 << 8 * element)).to_bytes(element, "little") for value in values)
    return Variable(match["name"], match["space"], int(match["align"] or element), size, initial)


def _parse_parameters(text: str, kernel: Kernel) -> None:
    offset = 0
    for align, type_name, name, length in _PARAMETER.findall(text):
        element = BYTES_OF_TYPE[type_name]
        size = element * int(length or 1)
        offset = -(-offset // int(align or element)) * int(align or element)
        kernel.parameters[name] = offset
        kernel.parameter_sizes.append((offset, size))
        offset += size
    kernel.parameter_bytes = offset


def _end_of_body(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("The text ends inside a kernel: a closing brace is missing.")


class _BodyParser:
    """Statements of one kernel. Braces open scopes, in which inline assembly declares registers of its own."""

    def __init__(self, kernel: Kernel, text: str, first_line: int) -> None:
        self.kernel, self.text, self.position, self.end = kernel, text, 0, len(text)
        self.line, self.counted_up_to = first_line, 0
        self.scopes: list[dict[str, str]] = [{}]

    def parse(self) -> None:
        for statement in self.statements():
            if statement.startswith(".reg"):
                self.declare_registers(statement)
            elif statement.startswith("."):
                self.parse_directive(statement)
            else:
                self.kernel.instructions.append(self.parse_instruction(statement))

    def statements(self) -> Iterator[str]:
        """Statements without their semicolons; labels and scopes are noted on the way."""
        skip_space = re.compile(r"\s*")
        while True:
            self.position = skip_space.match(self.text, self.position, self.end).end()  # type: ignore[union-attr]
            if self.position >= self.end:
                return
            if self.text[self.position] == "{":
                self.scopes.append({})
                self.position += 1
            elif self.text[self.position] == "}":
                self.scopes.pop()
                self.position += 1
            elif skipped := _SKIPPED_LINE.match(self.text, self.position, self.end):
                self.position = skipped.end()
            elif label := _LABEL.match(self.text, self.position, self.end):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                self.position = label.end()
            else:
                stop = self.text.index(";", self.position, self.end)
                self.line += self.text.count("\n", self.counted_up_to, self.position)
                self.counted_up_to = self.position
                yield " ".join(self.text[self.position : stop].split())
                self.position = stop + 1

    def parse_directive(self, statement: str) -> None:
        if statement.startswith(".branchtargets"):
            name = next(n for n, at in self.kernel.labels.items() if at == len(self.kernel.instructions))
            self.kernel.branch_targets[name] = re.findall(r"[$\w]+", statement.removeprefix(".branchtargets"))
        elif _VARIABLE.match(statement):
            variable = _parse_variable(statement)
            self.kernel.variables[variable.name] = variable
        elif not statement.startswith(".pragma"):
            raise PtxError(f"Line {self.line}: the directive {statement!r} is not known. Add it to ptx.py.")

    def declare_registers(self, statement: str) -> None:
        type_name, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()  # type: ignore[union-attr]
        for declaration in names.split(","):
            name, count = re.match(r"\s*([\w%$]+)(?:<(\d+)>)?", declaration).groups()  # type: ignore[union-attr]
            for declared in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
                # A second scope may use the name for another type.
                unique = declared if len(self.scopes) == 1 else f"{declared}@{self.line}"
                self.scopes[-1][declared] = unique
                self.kernel.registers[unique] = type_name

    def parse_instruction(self, statement: str) -> Instruction:
        match = re.match(r"(?:@(!?)([\w%$]+)\s+)?([a-z][A-Za-z_0-9.:]*)\s*(.*)$", statement)
        if match is None:
            raise PtxError(f"Line {self.line}: {statement!r} is no instruction.")
        negation, predicate, opcode, rest = match.groups()
        guard: Register | Negated | None = None
        if predicate:
            register = Register(self.resolve(predicate) or predicate)
            guard = Negated(register) if negation else register
        root, *modifiers = re.split(r"\.|::", opcode)
        operands = tuple(self.parse_operand(part) for part in _split_operands(rest))
        return Instruction(root, tuple(modifiers), operands, guard, self.line, statement)

    def resolve(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def parse_operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self.parse_operand(item) for item in _split_operands(text[1:-1])))
        if text[0] == "[":
            return self.parse_address(text[1:-1])
        if text[0] == "!":
            return Negated(Register(self.resolve(text[1:]) or text[1:]))
        if "|" in text:
            return Vector(tuple(self.parse_operand(item.strip()) for item in text.split("|")))
        if re.fullmatch(r"-?\d\w*", text):
            return Immediate(text)
        if (register := self.resolve(text)) or text[0] == "%" or text == "_":
            return Register(register or text)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise PtxError(f"Line {self.line}: the operand {text!r} is not understood. Add its form to ptx.py.")

    def parse_address(self, text: str) -> Address:
        match = re.fullmatch(r"\s*([\w%$.]+)\s*(?:([+-])\s*([+-]?\d+|0x[0-9a-fA-F]+))?\s*", text)
        if match is None:
            raise PtxError(f"Line {self.line}: the address [{text}] is not understood. [base+offset] is expected.")
        base = self.parse_operand(match[1])
        offset = int(match[3] or "0", 0) * (-1 if match[2] == "-" else 1)
        assert isinstance(base, Register | Symbol | Immediate)
        return Address(base, offset)


def _split_operands(text: str) -> list[str]:
    """Splits at the commas that are in no braces or brackets."""
    parts = re.split(r",(?![^{\[]*[}\]])", text)
    return [part.strip() for part in parts if part.strip()]
