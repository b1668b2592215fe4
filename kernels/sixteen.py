"""Arithmetic on numbers of 16 bits, for loops that numba compiles.

numba widens integers to 64 bits, so a loop over 16-bit numbers would take a quarter of a vector's lanes at most. These
functions are one instruction for each vector on x86 and ARM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD = ir.IntType(16)
_WIDE = ir.IntType(32)


def _instruction(name: str, number: types.Integer) -> Callable[..., Any]:
    """Returns a function of two numbers that is LLVM's intrinsic `name`."""

    def typed(context, one, other):
        def build(context, builder, signature, arguments):
            form = ir.FunctionType(_WORD, [_WORD, _WORD])
            function = builder.module.globals.get(name) or ir.Function(builder.module, form, name)
            return builder.call(function, arguments)

        return number(number, number), build

    return intrinsic(typed)


def _upper_half(number: types.Integer, extend: str) -> Callable[..., Any]:
    """Returns a function of two numbers that is the upper 16 bits of their product, a uint16."""

    def typed(context, one, other):
        def build(context, builder, signature, arguments):
            wide = [getattr(builder, extend)(argument, _WIDE) for argument in arguments]
            product = builder.mul(*wide)
            return builder.trunc(builder.lshr(product, ir.Constant(_WIDE, 16)), _WORD)

        return types.uint16(number, number), build

    return intrinsic(typed)


difference = _instruction("llvm.ssub.sat.i16", types.int16)
"""The difference of two int16; the nearest int16 where it is beyond."""
signed_sum = _instruction("llvm.sadd.sat.i16", types.int16)
"""The sum of two int16; the nearest int16 where it is beyond."""
sum_of = _instruction("llvm.uadd.sat.i16", types.uint16)
"""The sum of two uint16; 65535 where it is beyond."""
lesser = _instruction("llvm.umin.i16", types.uint16)
"""The lesser of two uint16."""
signed_product = _upper_half(types.int16, "sext")
"""The product of two int16 of one sign, over 65536 and rounded down, uint16."""
product = _upper_half(types.uint16, "zext")
"""The product of two uint16, over 65536 and rounded down, uint16."""
