"""The parser on the forms that nvcc emits."""

import pytest

from .parser import Module
from .ptx import Address, Immediate, Negated, PtxError, Register, Symbol, Vector


TEXT = """
.version 9.0
.target sm_80
.address_size 64
.const .align 4 .b8 table[8] = {1, 2, 0xFF, 4};
.extern .shared .align 128 .b8 dynamic[];
\t// .globl first
.visible .entry first(
\t.param .align 8 .b8 first_param_0[20],
\t.param .u16 first_param_1,
\t.param .u64 .ptr .global .align 16 first_param_2
)
.maxntid 64, 2, 1
.minnctapersm 2
{
\t.local .align 16 .b8 __local_depot0[32];
\t.shared .align 4 .u32 tile[2][3];
\t.reg .pred \t%p<3>;
\t.reg .b32 \t%r<9>, %x;
\t.loc\t1 30 0, function_name $L__info_string0, inlined_at 1 53 3
\tld.param.v2.u32 \t{%r1, %r2}, [first_param_0+4]; /* twice */ mov.u32 %r3, %tid.x;
$L__BB0_1:
\t.pragma "nounroll";
\t@!%p1 bra \t$L__BB0_2;
\tsetp.lt.and.f32 %p1|%p2, %r1, 0f3F800000, !%p0;
\t// begin inline asm
\t{ .reg .b16 low; .reg .b32 %r1; mov.b32 {low, _}, %r1; }
\tst.global.L2::cache_hint.b32 [%r3+-8], -5;
\t{ .reg .b64 low; mov.b64 low, table; }
ts: .branchtargets $L__BB0_1, $L__BB0_2;
\tbrx.idx %r1, ts;
$L__BB0_2:
\tret;
}
.entry second() { ret; }
"""


def test_kernels_parameters_and_variables_are_found() -> None:
    kernels = Module(TEXT)
    assert list(kernels) == ["first", "second"]
    first = kernels["first"]
    assert first.parameters == {"first_param_0": 0, "first_param_1": 20, "first_param_2": 24}
    assert first.parameter_sizes == [(0, 20), (20, 2), (24, 8)]
    assert first.parameter_bytes == 32
    assert first.max_threads == 128
    sizes = {name: (v.space, v.align, v.size) for name, v in first.variables.items()}
    assert sizes == {
        "table": ("const", 4, 8),
        "dynamic": ("shared", 128, None),
        "__local_depot0": ("local", 16, 32),
        "tile": ("shared", 4, 24),
    }
    assert first.variables["table"].initial == bytes([1, 2, 255, 4])


def test_operands_have_their_kinds() -> None:
    code = Module(TEXT)["first"].instructions
    load, move, branch, compare = code[:4]
    assert load.opcode == "ld.param.v2.u32"
    assert load.operands == (Vector((Register("%r1"), Register("%r2"))), Address(Symbol("first_param_0"), 4))
    assert move.operands[1] == Register("%tid.x")
    assert branch.predicate == Negated(Register("%p1"))
    assert branch.operands == (Symbol("$L__BB0_2"),)
    assert compare.operands[0] == Vector((Register("%p1"), Register("%p2")))
    assert compare.operands[2:] == (Immediate("0f3F800000"), Negated(Register("%p0")))
    store = next(i for i in code if i.root == "st")
    assert store.modifiers == ("global", "L2", "cache_hint", "b32")
    assert store.operands == (Address(Register("%r3"), -8), Immediate("-5"))


def test_lines_and_labels_count_as_in_the_text() -> None:
    first = Module(TEXT)["first"]
    lines = TEXT.splitlines()
    for instruction in first.instructions:
        assert instruction.root in lines[instruction.line - 1]
    assert first.labels["$L__BB0_1"] == 2
    assert first.instructions[first.labels["$L__BB0_2"]].root == "ret"
    assert first.branch_targets == {"ts": ["$L__BB0_1", "$L__BB0_2"]}


def test_scopes_of_inline_assembly_have_registers_of_their_own() -> None:
    first = Module(TEXT)["first"]
    narrow, wide = (i for i in first.instructions if i.root == "mov" and i.modifiers[0] in ("b32", "b64"))
    inner = narrow.operands[1]
    assert inner != Register("%r1")
    assert first.registers[inner.name] == "b32"
    assert first.registers[narrow.operands[0].items[0].name] == "b16"
    assert first.registers[wide.operands[0].name] == "b64"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (".unheard_of 3; ret;", r"Line \d+: the directive '.unheard_of 3' is not known"),
        ("add.u32 %r1, %r2, (3); ret;", r"Line \d+: the operand '\(3\)' is not understood"),
        ("st.u32 [%r1*4], 1; ret;", r"Line \d+: the address \[%r1\*4\] is not understood"),
        ("ret;", "a closing brace is missing"),
    ],
)
def test_what_is_not_understood_raises_with_its_line(body: str, message: str) -> None:
    end = "" if "brace" in message else "}"
    with pytest.raises(PtxError, match=message):
        Module(f".entry k() {{\n{body}\n{end}")["k"]
