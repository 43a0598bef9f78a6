"""Plans as text."""

from collections.abc import Sequence

from megalodon_jax.chips import GIB
from megalodon_jax.plan.plan import Plan


def format_plan(plan: Plan) -> str:
    """A plan as a table for people."""
    lines = [
        f"{plan.devices} x {plan.chip}   {_mesh(plan)}   remat {plan.remat}",
        _batch_line(plan),
        f"traced in {plan.trace_seconds:.0f} s, compiled in {plan.compile_seconds:.0f} s",
        "fits" if plan.fits else f"DOES NOT FIT: {plan.problem}",
    ]
    if plan.memory:
        lines += ["", *_memory_lines(plan)]
        lines += ["", *_collective_lines(plan)]
        lines += ["", *_work_lines(plan)]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def format_ranking(plans: Sequence[Plan]) -> str:
    """One line for each plan of a sweep."""
    lines = ["tokens/s, estimated: nothing hidden / all but the longest; peak memory per device"]
    for plan in plans:
        what = f"{_mesh(plan)}, remat {plan.remat}"
        if plan.fits and plan.roofline and plan.memory:
            slow, fast = plan.roofline.tokens_per_second_serial, plan.roofline.tokens_per_second
            lines.append(f"{slow:>12,.0f} / {fast:>11,.0f}  {_gib(plan.memory.peak):>10}  {what}")
        else:
            lines.append(f"{'does not fit':>26}  {'':>10}  {what}: {plan.problem[:120]}")
    return "\n".join(lines)


def _mesh(plan: Plan) -> str:
    sizes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return "mesh " + (", ".join(sizes) or "of one device")


def _batch_line(plan: Plan) -> str:
    batches, rows, length = plan.batch
    times = f"{batches} batches of " if batches > 1 else ""
    return f"{times}{rows} rows of {length:,} tokens: {plan.tokens_per_step:,} tokens a step"


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory is None:
        return []
    share = memory.peak / memory.available
    rows = [
        ("parameters", memory.parameters, ""),
        ("optimizer", memory.optimizer, ""),
        ("arguments, with the batch", memory.arguments, ""),
        ("results not in arguments", memory.outputs, ""),
        ("temporaries, summed", memory.temporaries, ""),
        ("program", memory.code, ""),
        ("peak", memory.peak, f"   {share:.0%} of {_gib(memory.available)}"),
    ]
    return ["memory of a device"] + [f"  {name:<28}{_gib(n):>12}{more}" for name, n, more in rows]


def _collective_lines(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["no collectives"]
    lines = [f"collectives in a step {'axes':>16} {'count':>12} {'payload':>12} {'sent':>12}"]
    for total in plan.collectives:
        numbers = f"{total.count:>12,} {_gib(total.bytes):>12} {_gib(total.sent_bytes):>12}"
        lines.append(f"  {total.kind:<20}{total.axes:>16} {numbers}")
    return lines


def _work_lines(plan: Plan) -> list[str]:
    roofline = plan.roofline
    if roofline is None:
        return []
    used = ", ".join(f"{name} {how}" for name, how in plan.implementations.items())
    lines = [
        f"implementations: {used}",
        f"FLOPs per token: model {plan.model_flops_per_token / 1e9:.3g} G, "
        f"compiled {plan.compiled_flops_per_token / 1e9:.3g} G (recomputation counts)",
        "seconds of a step, estimated from data sheets, not measured",
        f"  compute {roofline.compute:.3g}   memory {roofline.hbm:.3g} "
        f"(for {_gib(plan.hbm_bytes)})",
    ]
    links = [f"{axes} {seconds:.3g}" for axes, seconds in roofline.links.items()]
    lines += [f"  links over {', '.join(links)}"] if links else []
    if roofline.network is None:
        lines.append("  network between slices: no published rate")
    elif roofline.network:
        lines.append(f"  network between slices {roofline.network:.3g}")
    if roofline.compiler is not None:
        lines.append(
            f"  the compiler's own estimate of XLA's operations, without kernels and collectives: "
            f"{roofline.compiler:.3g}"
        )
    if roofline.expected is not None:
        rate = plan.tokens_per_step / roofline.expected
        lines.append(
            f"  expected, from steps measured on this chip, {roofline.expected:.3g}: "
            f"{rate:,.0f} tokens/s"
        )
    return [
        *lines,
        f"  longest {roofline.overlapped:.3g}, sum {roofline.serial:.3g}",
        f"estimated tokens/s: {roofline.tokens_per_second_serial:,.0f} (nothing hidden) to "
        f"{roofline.tokens_per_second:,.0f} (all but the longest hidden)",
    ]


def _gib(count: int) -> str:
    if count < 0.01 * GIB:
        return f"{count / 2**20:.3f} MiB"
    return f"{count / GIB:.2f} GiB"
