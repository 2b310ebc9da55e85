"""Every method of growth, by the name that the command line knows."""

from megatron_sgt.checkpoint.surgery.growth import Operator
from megatron_sgt.checkpoint.surgery.operators import auto_prog, compound_grow, g_stack, grad_stack, lidas, midas, msg

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
