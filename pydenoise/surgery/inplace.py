"""``x += y`` and its kin as functions that a traced graph can call.

``torch.fx`` records ``x += y`` as ``x + y``, which forgets that x changes for everyone who holds it; the generated code
of ``operator.iadd`` in turn rebinds the name of an int, which must not change for others. These functions do neither.
"""

import operator


def iadd(a, b):
    return operator.iadd(a, b)


def isub(a, b):
    return operator.isub(a, b)


def imul(a, b):
    return operator.imul(a, b)


def itruediv(a, b):
    return operator.itruediv(a, b)


def ifloordiv(a, b):
    return operator.ifloordiv(a, b)


def imod(a, b):
    return operator.imod(a, b)


def ipow(a, b):
    return operator.ipow(a, b)


def iand(a, b):
    return operator.iand(a, b)


def ior(a, b):
    return operator.ior(a, b)


def ixor(a, b):
    return operator.ixor(a, b)


FUNCTIONS = (iadd, isub, imul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor)
