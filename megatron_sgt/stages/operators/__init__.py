"""Every method of growth, by the name that configurations and command lines know."""

import difflib

from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Operator
from megatron_sgt.stages.operators import auto_prog, compound_grow, g_stack, grad_stack, lidas, midas, msg

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        g_stack.OPERATOR,
        grad_stack.OPERATOR,
        midas.OPERATOR,
        lidas.OPERATOR,
        msg.OPERATOR,
        compound_grow.OPERATOR,
        auto_prog.OPERATOR,
    )
}


def operator_named(name: str) -> Operator:
    """The method of growth ``name``.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in OPERATORS:
        close = difflib.get_close_matches(name, OPERATORS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"operator {name!r}: must be one of {', '.join(OPERATORS)}{hint}")
    return OPERATORS[name]
